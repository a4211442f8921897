"""GAE over tokens: plain loops, figures by hand, what verl's and torchrl's suites hold, and torchrl itself."""

import pytest
import torch
from helpers import make_turns

from hiper_fast import estimators
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import HIGH, Values, needs_groups, needs_tokens, needs_values


def run(turns, values, bootstrap=None, gamma=0.9, lambda_=0.7):
    """(advantages, returns), [tokens], of V_high at the tokens."""
    tokens = torch.zeros(len(values), 3)
    tokens[:, HIGH] = torch.as_tensor(values, dtype=torch.float32)
    bootstrap = torch.zeros(len(turns.terminated)) if bootstrap is None else torch.tensor(bootstrap)
    config = AdvantageConfig(gamma=gamma, lambda_segment=lambda_, lambda_turn=0.123)
    [level] = estimators.find("token_gae")(turns, Values(None, bootstrap, tokens), config).levels
    assert level.per_token and level.raw and level.roles == 7 and level.head == HIGH
    assert level.carried.all() and level.learned.all() and len(level.carried) == len(values)
    return level.advantages, level.returns


def loops(rewards, lengths, values, bootstrap, gamma, lambda_):
    """Of one trajectory of turns, in double precision: forwards sums of discounted errors, not the recursion."""
    steps = []
    for reward, length in zip(rewards, lengths, strict=True):
        if length:
            steps += [0.0] * (length - 1) + [reward]
        elif steps:
            steps[-1] += reward
    after = [*values[1:], bootstrap] if values else []
    errors = [r + gamma * v1 - v for r, v, v1 in zip(steps, values, after, strict=True)]
    return [
        sum((gamma * lambda_) ** k * error for k, error in enumerate(errors[i:]))
        for i in range(len(errors))
    ]


def draw(seed, episodes=9):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 6, (episodes,), generator=g).tolist()
    rewards = [torch.randn(n, generator=g).tolist() for n in sizes]
    lengths = [torch.randint(0, 5, (n,), generator=g).tolist() for n in sizes]
    values = [torch.randn(sum(n), generator=g).tolist() for n in lengths]
    terminated = (torch.rand(episodes, generator=g) < 0.5).tolist()
    bootstrap = [0.0 if end else float(torch.randn((), generator=g)) for end in terminated]
    return rewards, lengths, values, terminated, bootstrap


def join(lists):
    return [x for one in lists for x in one]


@pytest.mark.parametrize(
    "gamma, lambda_", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (0.5, 0.0), (0.0, 1.0)]
)
@pytest.mark.parametrize("seed", range(4))
def test_loops(seed, gamma, lambda_):
    """Turns without tokens are among them, at the beginning too."""
    rewards, lengths, values, terminated, bootstrap = draw(seed)
    turns = make_turns(rewards, terminated=terminated, tokens=lengths)
    advantages, returns = run(turns, join(values), bootstrap, gamma, lambda_)
    expected = join(
        loops(*one, gamma, lambda_) for one in zip(rewards, lengths, values, bootstrap, strict=True)
    )
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns, advantages + torch.tensor(join(values)))


def test_by_hand():
    """Two turns of two tokens and of one, rewards 1 and 4; gamma and lambda a half, a quarter together."""
    turns = make_turns([[1.0, 4.0]], tokens=[[2, 1]])
    advantages, returns = run(turns, [2.0, 4.0, 6.0], gamma=0.5, lambda_=0.5)
    # Errors: 0 + 2 - 2, 1 + 3 - 4 and 4 - 6; then backwards.
    assert advantages.tolist() == [-0.125, -0.5, -2.0]
    assert returns.tolist() == [1.875, 3.5, 4.0]


def test_a_truncated_episode_goes_on_with_its_bootstrap():
    turns = make_turns([[1.0], [1.0]], tokens=[[1], [1]], terminated=[True, False])
    advantages, _ = run(turns, [0.5, 0.5], [0.0, 10.0], gamma=0.5)
    assert advantages.tolist() == [0.5, 5.5]


def test_an_empty_responses_reward_goes_to_the_token_before_it_of_its_own_episode():
    turns = make_turns([[3.0], [5.0, 1.0, 2.0]], tokens=[[1], [0, 2, 0]])
    advantages, _ = run(turns, [0.0] * 3, gamma=1.0, lambda_=1.0)
    assert advantages.tolist() == [3.0, 3.0, 3.0], "5 came before the episode had said anything"


@pytest.mark.parametrize("rewards, tokens", [([], []), ([[1.0]], [[0]])])
def test_no_episodes_and_no_tokens(rewards, tokens):
    advantages, returns = run(make_turns(rewards, tokens=tokens), [])
    assert advantages.shape == returns.shape == (0,)


def test_of_one_token_a_turn_it_is_gae_over_turns():
    rewards, _, _, terminated, bootstrap = draw(5)
    turns = make_turns(rewards, terminated=terminated)
    values = torch.randn(len(turns.rewards), 3, generator=torch.Generator().manual_seed(0))
    config = AdvantageConfig(gamma=0.9, lambda_segment=0.7)
    [flat] = estimators.find("gae")(turns, Values(values, torch.tensor(bootstrap)), config).levels
    advantages, returns = run(turns, values[:, HIGH], bootstrap)
    torch.testing.assert_close(advantages, flat.advantages)
    torch.testing.assert_close(returns, flat.returns)


def test_with_gamma_and_lambda_one_it_is_the_return_less_the_value():
    turns = make_turns([[1.0, 0.0, 2.0]], tokens=[[3, 1, 2]])
    values = torch.randn(6, generator=torch.Generator().manual_seed(0))
    advantages, returns = run(turns, values, gamma=1.0, lambda_=1.0)
    torch.testing.assert_close(returns, torch.tensor([3.0, 3.0, 3.0, 2.0, 2.0, 2.0]))
    torch.testing.assert_close(advantages, returns - values)


def test_what_it_says_it_needs():
    estimate = estimators.find("token_gae")
    assert needs_values(estimate) and needs_tokens(estimate) and not needs_groups(estimate)
    for name in set(estimators.names()) - {"token_gae"}:
        assert not needs_tokens(estimators.find(name)), name


# What verl's suite holds.


def masked_gae(rewards, values, mask, gamma, lambda_):
    """Over a row of tokens, those off the mask skipped: (advantages, returns), as lists."""
    after, carried = 0.0, 0.0
    advantages = [0.0] * len(rewards)
    for i in reversed(range(len(rewards))):
        if mask[i]:
            carried = rewards[i] + gamma * after - values[i] + gamma * lambda_ * carried
            advantages[i], after = carried, values[i]
    return advantages


@pytest.mark.parametrize("seed", range(5))
def test_turns_with_observations_between_them_are_one_turn(seed):
    """verl: whatever values observation tokens have, advantages are those of the responses put together."""
    g = torch.Generator().manual_seed(seed)
    gamma, lambda_ = torch.rand(2, generator=g).tolist()
    mask = [0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0]
    rewards = [0.0, 0.0, 0.1, 0.1, 0.1, 0.0, 0.0, 0.1, 1.0, 0.0, 0.0]
    values = (200 * torch.rand(11, generator=g) - 100).tolist()
    values[2:5], values[7:9] = [4.0, 5.0, 6.0], [7.0, 9.0]
    row = [
        a for a, m in zip(masked_gae(rewards, values, mask, gamma, lambda_), mask, strict=True) if m
    ]
    turns = make_turns([[0.1, 0.1, 0.1, 0.1, 1.0]])
    advantages, _ = run(turns, [4.0, 5.0, 6.0, 7.0, 9.0], gamma=gamma, lambda_=lambda_)
    torch.testing.assert_close(advantages, torch.tensor(row), atol=1e-5, rtol=1e-5)


def test_where_turns_end_is_nothing_to_it():
    values = torch.randn(12, generator=torch.Generator().manual_seed(1))
    whole, _ = run(make_turns([[2.0]], tokens=[[12]]), values)
    parts, _ = run(make_turns([[0.0, 0.0, 0.0, 2.0]], tokens=[[3, 1, 6, 2]]), values)
    assert torch.equal(whole, parts)


# What torchrl's suite holds.

FIGURES = [0.448, -1.1, 2.4156, 2.23, -1.37]


@pytest.mark.parametrize("steps", [3, 5, 200])
def test_successive_trajectories_are_those_alone(steps):
    """torchrl: the first terminated, the second cut; one call or two."""
    g = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(steps, generator=g).tolist() for _ in range(2))
    half = steps // 2
    parts = [rewards[:half], rewards[half:]]
    both, _ = run(make_turns(parts, terminated=[True, False]), values, [0.0, 1.5], 0.95, 0.6)
    first, _ = run(make_turns(parts[:1], terminated=[True]), values[:half], [0.0], 0.95, 0.6)
    second, _ = run(make_turns(parts[1:], terminated=[False]), values[half:], [1.5], 0.95, 0.6)
    torch.testing.assert_close(both, torch.cat([first, second]))


def test_torchrls_figures():
    """Five steps, the second terminal, the fourth cut: made by torchrl 0.14.1, gamma 0.9, lambda 0.8."""
    rewards, values = [1.0, -0.5, 0.25, 2.0, -1.0], [0.3, 0.6, -0.2, 0.4, 0.1]
    turns = make_turns([rewards[:2], rewards[2:4], rewards[4:]], terminated=[True, False, False])
    advantages, returns = run(turns, values, [0.0, 0.7, -0.3], 0.9, 0.8)
    assert advantages.tolist() == pytest.approx(FIGURES, abs=1e-6)
    assert returns.tolist() == pytest.approx(
        [a + v for a, v in zip(FIGURES, values, strict=True)], abs=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gamma, lambda_", [(0.99, 0.95), (1.0, 1.0), (0.1, 0.3)])
def test_torchrl_itself(seed, gamma, lambda_):
    """Many ends, terminal and cut ones mixed, in one row of time."""
    functional = pytest.importorskip(
        "torchrl.objectives.value.functional", reason="torchrl is not installed"
    )
    rewards, lengths, values, terminated, bootstrap = draw(seed, episodes=40)
    lengths = [[max(length, 1) for length in one] for one in lengths]
    values = torch.randn(sum(map(sum, lengths)), generator=torch.Generator().manual_seed(seed))
    turns = make_turns(rewards, terminated=terminated, tokens=lengths)
    advantages, returns = run(turns, values, bootstrap, gamma, lambda_)
    ends = torch.tensor([sum(one) for one in lengths]).cumsum(0) - 1
    done = torch.zeros(len(values), dtype=torch.bool).index_fill(0, ends, True)
    terminal = torch.zeros_like(done).index_fill(0, ends[torch.tensor(terminated)], True)
    after = torch.cat([values[1:], torch.zeros(1)]).index_put((ends,), torch.tensor(bootstrap))
    paid = torch.zeros(len(values))
    paid[torch.tensor(join(lengths)).cumsum(0) - 1] = turns.rewards
    columns = (x[:, None] for x in (values, after, paid))
    theirs, targets = functional.vec_generalized_advantage_estimate(
        gamma, lambda_, *columns, done=done[:, None], terminated=terminal[:, None]
    )
    torch.testing.assert_close(advantages, theirs[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(returns, targets[:, 0], atol=1e-4, rtol=1e-4)
