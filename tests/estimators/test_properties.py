"""What holds for every estimator on any batch of episodes, found by hypothesis."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiper_fast import estimators
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import LOW, SWITCH, Turns, Values
from hiper_fast.learn.credit import scatter
from hiper_fast.ops.reference import SUBGOAL

EVERY = ["hae", "hae_no_switch", "gae", "grpo", "dr_grpo", "rloo", "gigpo", "group_hae"]
WITH_CRITIC = EVERY[:3]
stable = settings(deadline=None, max_examples=30, derandomize=True, database=None)


@st.composite
def batches(draw):
    """Turns and values of groups of one to three episodes, empty ones among them."""
    sizes = draw(st.lists(st.integers(1, 3), max_size=3))
    group = [number for number, size in enumerate(sizes) for _ in range(size)]
    lengths = [draw(st.integers(0, 5)) for _ in group]
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    turns, n = sum(lengths), len(lengths)
    terminated = torch.rand(n, generator=g) < 0.5
    named = torch.rand(turns, generator=g) < 0.7
    return Turns(
        rewards=torch.randn(turns, generator=g),
        switch=torch.rand(turns, generator=g) < 0.4,
        valid=named,
        roles=torch.where(named, 7, 7 - SUBGOAL).to(torch.uint8),
        state=torch.randint(0, 3, (turns,), generator=g),
        cu_turns=torch.tensor([0, *lengths]).cumsum(0).int(),
        cu_tokens=torch.arange(turns + 1).int(),
        terminated=terminated,
        group=torch.tensor(group, dtype=torch.int64),
    ), Values(
        torch.randn(turns, 3, generator=g), torch.randn(n, generator=g).masked_fill(terminated, 0)
    )


def estimate(name, turns, values, **options):
    config = AdvantageConfig(**{"gamma": 0.9, "lambda_turn": 0.8, "lambda_segment": 0.7} | options)
    found = estimators.find(name)
    return found(turns, values if estimators.needs_values(found) else None, config).levels


def pick(turns, values, order):
    """These episodes, in this order; and where their turns were."""
    bounds = turns.cu_turns.tolist()
    index = [turn for i in order for turn in range(bounds[i], bounds[i + 1])]
    lengths = [bounds[i + 1] - bounds[i] for i in order]
    names = "rewards", "switch", "valid", "roles", "state"
    picked = replace(
        turns,
        **{name: getattr(turns, name)[index] for name in names},
        cu_turns=torch.tensor([0, *lengths]).cumsum(0).int(),
        cu_tokens=torch.arange(len(index) + 1).int(),
        terminated=turns.terminated[order],
        group=turns.group[order],
    )
    return picked, Values(values.turns[index], values.bootstrap[order]), index


def assert_same(found, expected, index):
    """Levels, those expected at the turns `index`."""
    for one, other in zip(found, expected, strict=True):
        for name in ("advantages", "carried", "returns", "learned"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b[index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
@stable
@given(batches(), st.randoms(use_true_random=False))
def test_order_of_episodes_and_company_of_other_groups_change_nothing(name, batch, random):
    turns, values = batch
    whole = estimate(name, turns, values)
    order = list(range(len(turns.group)))
    random.shuffle(order)
    for chosen in (order, [i for i in order if turns.group[i] == 0]):
        part, part_values, index = pick(turns, values, chosen)
        assert_same(estimate(name, part, part_values), whole, index)


@pytest.mark.parametrize("name", EVERY)
@stable
@given(batches())
def test_rewards_of_one_group_do_not_reach_another(name, batch):
    turns, values = batch
    of_first = torch.repeat_interleave(turns.group == 0, turns.cu_turns.diff())
    changed = replace(turns, rewards=turns.rewards + 5 * of_first)
    others = ~of_first
    before, after = estimate(name, turns, values), estimate(name, changed, values)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one.advantages[others], other.advantages[others])


@pytest.mark.parametrize("name", WITH_CRITIC)
@stable
@given(batches(), st.sampled_from([-2.0, 0.5]))
def test_advantages_scale_as_rewards_and_values_do(name, batch, factor):
    turns, values = batch
    scaled = Values(factor * values.turns, factor * values.bootstrap)
    found = estimate(name, replace(turns, rewards=factor * turns.rewards), scaled)
    for one, other in zip(found, estimate(name, turns, values), strict=True):
        torch.testing.assert_close(one.advantages, factor * other.advantages, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, power", [("grpo", 0), ("dr_grpo", 1), ("rloo", 1), ("gigpo", 0), ("group_hae", 0)]
)
@stable
@given(batches(), st.sampled_from([0.5, 3.0]))
def test_groups_are_compared_on_their_own_scale(name, power, batch, factor):
    """Rewards `factor` times as large: so are the advantages, but where the group's spread divides them."""
    turns, _ = batch
    larger = replace(turns, rewards=factor * turns.rewards)
    for one, other in zip(estimate(name, larger, None), estimate(name, turns, None), strict=True):
        expected = factor**power * other.advantages
        torch.testing.assert_close(one.advantages, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
@stable
@given(batches(), st.sampled_from([-2.0, 3.0]))
def test_what_every_episode_of_a_group_gets_prefers_none(name, batch, constant):
    turns, values = batch
    played = (turns.cu_turns.diff() > 0).nonzero()[:, 0].tolist()
    turns, _, _ = pick(turns, values, played)
    first = torch.zeros_like(turns.rewards).index_fill(0, turns.cu_turns[:-1].long(), constant)
    more = replace(turns, rewards=turns.rewards + first)
    for one, other in zip(estimate(name, more, None), estimate(name, turns, None), strict=True):
        torch.testing.assert_close(one.advantages, other.advantages, rtol=1e-3, atol=1e-3)


@stable
@given(batches())
def test_a_malformed_turns_measure_is_its_own_affair(batch):
    """At lambda_turn 1 what stands at V_low's place is a baseline: no other turn sees it."""
    turns, values = batch
    named = (turns.roles & SUBGOAL) > 0
    lows = [
        estimate("hae", turns, values, lambda_turn=1.0, malformed=malformed)[LOW].advantages
        for malformed in (True, False)
    ]
    difference = (values.turns[:, LOW] - values.turns[:, SWITCH]).masked_fill(named, 0)
    torch.testing.assert_close(lows[0] - lows[1], difference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("normalize", [True, False])
@stable
@given(batches(), st.integers(0, 2**31))
def test_scattered_levels_add_up(name, normalize, batch, seed):
    """One token of random roles after another, against the plain loop over levels."""
    turns, values = batch
    levels = estimate(name, turns, values)
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (len(turns.rewards),), generator=g)
    cu_tokens = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    roles = torch.randint(0, 8, (int(counts.sum()),), generator=g).to(torch.uint8)
    advantages, mask, credit = scatter(estimators.Credit(levels), roles, cu_tokens, normalize)
    turn_of = [turn for turn, count in enumerate(counts.tolist()) for _ in range(count)]
    for token, turn in enumerate(turn_of):
        taken = [
            level.advantages[turn].item()
            for level in credit.levels
            if level.roles & int(roles[token]) and level.carried[turn]
        ]
        assert bool(mask[token]) == bool(taken)
        assert advantages[token].item() == pytest.approx(sum(taken), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_no_episodes_no_credit(name):
    empty = torch.zeros(0)
    none = empty.bool()
    turns = Turns(
        empty, none, none, empty.to(torch.uint8), empty.long(),
        torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), none, empty.long(),
    )  # fmt: skip
    for level in estimate(name, turns, Values(torch.zeros(0, 3), empty)):
        assert level.advantages.shape == level.carried.shape == (0,)
