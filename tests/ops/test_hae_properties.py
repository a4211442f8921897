"""What holds for `ops.hae`, `ops.gae` and the scatter of any trajectories at all, found by hypothesis."""

from dataclasses import dataclass, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hiper_fast import ops
from hiper_fast.ops.reference import ACTION, SUBGOAL, SWITCH

LEVELS = "low", "high", "switch"
stable = settings(deadline=None, max_examples=60, derandomize=True, database=None)


@dataclass
class Batch:
    """Trajectories in float64, and how they are discounted."""

    lengths: list[int]
    rewards: Tensor  # [turns]
    low: Tensor
    high: Tensor
    decision: Tensor
    switch: Tensor
    terminated: Tensor  # [trajectories]
    bootstrap_low: Tensor
    bootstrap_high: Tensor
    gamma: float
    lambda_turn: float
    lambda_segment: float

    @property
    def cu_turns(self):
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    def hae(self):
        return ops.hae(
            self.rewards, self.low, self.high, self.switch, self.terminated, self.cu_turns,
            values_switch=self.decision, bootstrap_low=self.bootstrap_low, bootstrap_high=self.bootstrap_high,
            gamma=self.gamma, lambda_turn=self.lambda_turn, lambda_segment=self.lambda_segment,
        )  # fmt: skip

    def gae(self, values=None, lambda_=None, bootstrap=None):
        return ops.gae(
            self.rewards, self.high if values is None else values, self.terminated, self.cu_turns,
            bootstrap=self.bootstrap_high if bootstrap is None else bootstrap, gamma=self.gamma,
            lambda_=self.lambda_segment if lambda_ is None else lambda_,
        )  # fmt: skip

    def pick(self, order):
        """These trajectories, in this order."""
        bounds = self.cu_turns.tolist()
        turns = [turn for i in order for turn in range(bounds[i], bounds[i + 1])]
        of_turns = ("rewards", "low", "high", "decision", "switch")
        of_trajectories = ("terminated", "bootstrap_low", "bootstrap_high")
        return replace(
            self,
            lengths=[self.lengths[i] for i in order],
            **{name: getattr(self, name)[turns] for name in of_turns},
            **{name: getattr(self, name)[list(order)] for name in of_trajectories},
        ), turns


@st.composite
def batches(draw, least=0):
    lengths = draw(st.lists(st.integers(0, 9), min_size=least, max_size=6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    turns, n = sum(lengths), len(lengths)
    share = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    factor = st.sampled_from([0.0, 0.5, 0.9, 1.0])
    return Batch(
        lengths,
        *torch.randn(4, turns, dtype=torch.float64, generator=g),
        torch.rand(turns, generator=g) < share,
        torch.rand(n, generator=g) < 0.5,
        *torch.randn(2, n, dtype=torch.float64, generator=g),
        draw(factor),
        draw(factor),
        draw(factor),
    )


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def assert_same(found, expected):
    """HAE's advantages, returns and boundaries, or GAE's."""
    for one, other in zip(found, expected, strict=True):
        if one.dtype == torch.bool:
            assert torch.equal(one, other)
        else:
            assert_close(one, other)


def spread(batch, of_trajectories):
    """To every turn its trajectory's."""
    return of_trajectories.repeat_interleave(torch.tensor(batch.lengths, dtype=torch.int64))


def find_last(batch):
    """bool [turns]: each trajectory's last."""
    ends = batch.cu_turns[1:][batch.cu_turns.diff() > 0].long() - 1
    return torch.zeros(len(batch.rewards), dtype=torch.bool).index_fill(0, ends, True)


@stable
@given(batches(), st.randoms(use_true_random=False))
def test_order_and_company_of_trajectories_change_nothing(batch, random):
    order = list(range(len(batch.lengths)))
    random.shuffle(order)
    cut = random.randint(0, len(order))
    for run in (Batch.hae, Batch.gae):
        whole = run(batch)
        for chosen in (order, order[:cut], order[cut:]):
            part, turns = batch.pick(chosen)
            assert_same(run(part), [x[turns] for x in whole])


@stable
@given(batches())
def test_rewards_reach_neither_other_trajectories_nor_later_turns(batch):
    """Changed after turn 4 of the first trajectory and nowhere else."""
    for run in (Batch.hae, Batch.gae):
        first = batch.lengths[0] if batch.lengths else 0
        rewards = batch.rewards.clone()
        rewards[: min(4, first)] += 7
        before, after = run(batch), run(replace(batch, rewards=rewards))
        unreached = slice(min(4, first), None)
        assert_same([x[unreached] for x in after], [x[unreached] for x in before])


@stable
@given(batches())
def test_where_every_turn_switches(batch):
    """The high level is GAE over turns; the others look one turn ahead, whatever lambda_turn."""
    batch = replace(batch, switch=torch.ones_like(batch.switch), bootstrap_low=batch.bootstrap_high)
    found, (advantages, returns) = batch.hae(), batch.gae()
    assert_close(found.advantages_high, advantages)
    assert_close(found.returns_high, returns)
    one_step = batch.gae(lambda_=0.0)[1]  # r_t + gamma V_high(t+1)
    assert_close(found.returns_low, one_step)
    assert_close(found.advantages_low, one_step - batch.low)
    assert_close(found.returns_switch, one_step)
    assert_close(found.advantages_switch, one_step - batch.decision)


@stable
@given(batches())
def test_where_no_turn_switches(batch):
    """An episode is one segment: the low level is GAE over turns, the others count to its end."""
    batch = replace(batch, switch=torch.zeros_like(batch.switch))
    found = batch.hae()
    low = batch.gae(batch.low, batch.lambda_turn, batch.bootstrap_low)
    assert_same((found.advantages_low, found.returns_low), low)
    _, whole = batch.gae(lambda_=1.0)
    assert_close(found.returns_switch, whole)
    begins = found.boundary
    assert begins.sum() == sum(length > 0 for length in batch.lengths)
    assert_close(found.advantages_high[begins], (whole - batch.high)[begins])


@stable
@given(batches(least=1), st.integers(0, 8))
def test_a_cut_gae_is_bootstrapped_by_the_return_of_what_it_lost(batch, at):
    """By (1 - lambda) V + lambda return, the lambda-return: at lambda 0 the next state's value alone."""
    batch, at, prefix = cut(batch, at)
    advantages, _ = batch.gae()
    lost = batch.high[at] + batch.lambda_segment * advantages[at]
    found = replace(prefix, bootstrap_high=lost[None]).gae()
    assert_close(found[0], advantages[:at])


@stable
@given(batches(least=1), st.integers(0, 8))
def test_a_cut_at_a_segments_end_is_bootstrapped_by_the_next_value(batch, at):
    """V_high for switch and low, whatever the lambdas; for high its lambda-return."""
    batch, at, prefix = cut(batch, at)
    batch.switch[at] = True
    whole = batch.hae()
    value = batch.high[at][None]
    found = replace(prefix, bootstrap_low=value, bootstrap_high=value).hae()
    assert_close(found.advantages_low, whole.advantages_low[:at])
    assert_close(found.advantages_switch, whole.advantages_switch[:at])
    lost = value + batch.lambda_segment * whole.advantages_high[at]
    found = replace(prefix, bootstrap_high=lost).hae()
    assert_close(found.advantages_high, whole.advantages_high[:at])


@stable
@given(batches(least=1), st.integers(0, 8))
def test_a_cut_inside_a_segment_is_bootstrapped_by_what_the_segment_has_left(batch, at):
    """Of low the lambda-return of V_low, of switch the segment's own return; the high level's last is cut short."""
    batch, at, prefix = cut(batch, at)
    batch.switch[at] = False
    whole = batch.hae()
    lost_low = batch.low[at] + batch.lambda_turn * whole.advantages_low[at]
    left = whole.returns_switch[at]
    found = replace(prefix, bootstrap_low=lost_low[None], bootstrap_high=left[None]).hae()
    assert_close(found.advantages_low, whole.advantages_low[:at])
    assert_close(found.advantages_switch, whole.advantages_switch[:at])


def cut(batch, at):
    """One trajectory of at least two turns, the turn it is cut before, and what comes before as truncated."""
    at = at % 8 + 1
    size = at + 1 + len(batch.rewards) % 3
    g = torch.Generator().manual_seed(size * 31 + len(batch.lengths))
    turns = torch.randn(4, size, dtype=torch.float64, generator=g)
    switch = torch.rand(size, generator=g) < 0.4
    whole = replace(
        batch, lengths=[size], rewards=turns[0], low=turns[1], high=turns[2], decision=turns[3], switch=switch,
        terminated=batch.terminated[:1], bootstrap_low=batch.bootstrap_low[:1], bootstrap_high=batch.bootstrap_high[:1],
    )  # fmt: skip
    prefix = replace(
        whole, lengths=[at], rewards=turns[0, :at], low=turns[1, :at], high=turns[2, :at], decision=turns[3, :at],
        switch=switch[:at], terminated=torch.tensor([False]),
    )  # fmt: skip
    return whole, at, prefix


@stable
@given(batches(), st.sampled_from([-2.0, 0.25, 8.0]))
def test_advantages_scale_as_rewards_and_values_do(batch, factor):
    names = ("rewards", "low", "high", "decision", "bootstrap_low", "bootstrap_high")
    scaled = replace(batch, **{name: factor * getattr(batch, name) for name in names})
    assert_same(scaled.hae()[:-1], [factor * x for x in batch.hae()[:-1]])
    assert_same(scaled.gae(), [factor * x for x in batch.gae()])


@stable
@given(batches(), st.sampled_from([-3.0, 1.5]))
def test_a_constant_more_of_value_and_of_what_pays_for_it_leaves_advantages(batch, constant):
    """V + c, r + c (1 - gamma); the last reward of a terminated episode, after which values are 0, r + c."""
    ends = find_last(batch) & spread(batch, batch.terminated)
    paid = constant * (1 - batch.gamma * (~ends).double())
    names = ("low", "high", "decision", "bootstrap_low", "bootstrap_high")
    shifted = replace(
        batch,
        rewards=batch.rewards + paid,
        **{name: getattr(batch, name) + constant for name in names},
    )
    before, after = batch.hae(), shifted.hae()
    for level in LEVELS:
        name = f"advantages_{level}"
        assert_close(getattr(after, name), getattr(before, name))
    assert_close(after.returns_low, before.returns_low + constant)
    assert_close(shifted.gae()[0], batch.gae()[0])


@stable
@given(batches(), st.sampled_from([-3.0, 1.5]))
def test_what_only_one_level_reads_touches_that_level_alone(batch, constant):
    before = batch.hae()
    after = replace(batch, decision=batch.decision + constant).hae()
    assert_close(after.advantages_switch, before.advantages_switch - constant)
    assert_same(after[:4], before[:4])
    after = replace(batch, low=batch.low + constant, lambda_turn=1.0).hae()
    before = replace(batch, lambda_turn=1.0).hae()
    assert_close(after.advantages_low, before.advantages_low - constant)
    assert_same(after[2:], before[2:])


@stable
@given(batches(), st.integers(0, 2**31))
def test_a_token_of_several_roles_takes_their_sum(batch, seed):
    """Scattering all bits together is scattering each bit alone, and adding."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (len(batch.rewards),), generator=g)
    cu_tokens = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    roles = torch.randint(0, 8, (int(counts.sum()),), generator=g).to(torch.uint8)
    found = batch.hae()
    advantages, mask = ops.scatter_advantages(found, roles, cu_tokens)
    alone = [
        ops.scatter_advantages(found, roles & bit, cu_tokens) for bit in (ACTION, SUBGOAL, SWITCH)
    ]
    assert_close(sum(part for part, _ in alone), advantages)
    assert torch.equal(alone[0][1] | alone[1][1] | alone[2][1], mask)
