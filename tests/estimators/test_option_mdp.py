"""What HAE and flat GAE estimate, by the expectation over every episode of a small process (benchmarks/tabular.py)."""

from typing import NamedTuple

import pytest
import torch
from tabular import (
    Episodes,
    Policy,
    Tables,
    World,
    draw_policy,
    draw_world,
    estimate_each,
    evaluate,
    expect,
    find_gradient,
    find_terms,
    find_variance,
    flatten,
    give_credit,
    play,
    sample,
)

from hiper_fast.config import AdvantageConfig

EXACT = 1e-10
LAMBDAS = [(1.0, 0.95), (1.0, 1.0), (0.0, 0.0), (0.3, 0.7)]  # of turns, of segments


class Case(NamedTuple):
    world: World
    policy: Policy
    tables: Tables  # exact
    gamma: float


@pytest.fixture(params=[1.0, 0.9], ids=lambda gamma: f"gamma={gamma}")
def case(request):
    return make_case(request.param)


def make_case(gamma=1.0, seed=0, horizon=4):
    g = torch.Generator().manual_seed(seed)
    world = draw_world(g, horizon=horizon)
    policy = draw_policy(g, world)
    return Case(world, policy, evaluate(world, policy, gamma), gamma)


def configure(case, lambda_turn=1.0, lambda_segment=0.95):
    return AdvantageConfig(gamma=case.gamma, lambda_turn=lambda_turn, lambda_segment=lambda_segment)


def expect_terms(case, name="hae", lambdas=(1.0, 0.95), *, episodes=None, tables=None, after=None):
    """The expected terms of each turn, [T, ...] a role."""
    episodes = episodes or play(case.world, case.policy)
    tables = tables or (flatten(case.tables) if name == "gae" else case.tables)
    credit = give_credit(name, episodes, tables, configure(case, *lambdas), after)
    return expect(case.policy, episodes, find_terms(case.policy, episodes, credit))


def weigh(case, terms):
    """Each turn's by gamma^t, as the gradient of the discounted return has them."""
    factor = case.gamma ** torch.arange(case.world.horizon).double()
    return Policy(*(factor[:, None, None, None] * term for term in terms))


def compare(found, expected):
    """The largest difference, a role."""
    return Policy(*((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)))


def spoil(case, level, size=0.5, seed=1):
    """The exact values, those of one level off by noise, but 0 still after the last turn."""
    g = torch.Generator().manual_seed(seed)
    table = getattr(case.tables, level)
    noise = size * torch.randn(table.shape, dtype=torch.float64, generator=g)
    noise[-1] = 0
    return case.tables._replace(**{level: table + noise})


# The process itself


def test_listed_probabilities_are_those_of_all_episodes(case):
    episodes = play(case.world, case.policy)
    assert episodes.probability.sum() == pytest.approx(1, abs=EXACT)
    assert episodes.terminated.all() and episodes.lengths.unique().tolist() == [1, 2, 3, 4]
    assert find_objective(case, episodes) == pytest.approx(
        (case.world.start @ case.tables.switch[0, :, -1]).item(), abs=EXACT
    )


def find_objective(case, episodes):
    discount = case.gamma ** episodes.columns["turn"].double()
    return (episodes.probability[episodes.episode] * discount * episodes.rewards).sum()


def test_values_are_means_of_what_followed(case):
    """Of the turns at which each is read: `low` of all, `high` of boundary turns, `switch` of all."""
    episodes = play(case.world, case.policy)
    turn, state, held, _, subgoal, _ = episodes.columns.values()
    future = find_future(case, episodes)
    weight = episodes.probability[episodes.episode]
    every = torch.ones_like(episodes.boundary)
    for table, last, read in (
        (case.tables.low, subgoal, every),
        (case.tables.high, held, episodes.boundary),
        (case.tables.switch, held, every),
    ):
        index = turn[read], state[read], last[read]
        total = torch.zeros_like(table).index_put(index, weight[read], accumulate=True)
        mean = torch.zeros_like(table).index_put(index, (weight * future)[read], accumulate=True)
        seen = total > 0
        torch.testing.assert_close((mean / total)[seen], table[seen], rtol=0, atol=EXACT)
        assert seen.sum() >= 12


def find_future(case, episodes):
    """The discounted return from each turn on, by a loop."""
    future, following = episodes.rewards.tolist(), 0.0
    owners = episodes.episode.tolist()
    for turn in reversed(range(len(future))):
        last = turn + 1 == len(future) or owners[turn + 1] != owners[turn]
        following = future[turn] + (0.0 if last else case.gamma * following)
        future[turn] = following
    return torch.tensor(future, dtype=torch.float64)


def test_gradient_is_that_of_the_listed_probabilities(case):
    leaves = Policy(*(table.detach().clone().requires_grad_() for table in case.policy))
    objective = find_objective(case, play(case.world, leaves))
    found = torch.autograd.grad(objective, leaves)
    assert max(compare(found, find_gradient(case.world, case.policy, case.gamma))) < EXACT


def test_drawn_episodes_are_those_listed():
    case = make_case()
    results = []
    for episodes in (
        play(case.world, case.policy),
        play(case.world, case.policy, sample(torch.Generator().manual_seed(0)), copies=20_000),
    ):
        credit = give_credit("hae", episodes, case.tables, configure(case))
        each = estimate_each(case.policy, episodes, find_terms(case.policy, episodes, credit))
        found = find_objective(case, episodes).item(), *find_variance(episodes, each)
        results.append(found)
    assert results[1] == pytest.approx(results[0], rel=0.03)


# Exact values


@pytest.mark.parametrize("lambdas", LAMBDAS, ids=str)
@pytest.mark.parametrize("name", ["hae", "gae"])
def test_with_exact_values_any_lambda_estimates_the_gradient(case, name, lambdas):
    """Turn by turn; the turns' discount left to `weigh`."""
    true = find_gradient(case.world, case.policy, case.gamma)
    assert max(compare(weigh(case, expect_terms(case, name, lambdas)), true)) < EXACT
    assert min(table.abs().max().item() for table in true) > 1e-3


def test_without_weights_a_discounted_estimate_is_another_gradient():
    """Training leaves gamma^t out, as everyone does: exact for gamma = 1 alone."""
    for gamma, off in ((1.0, 0.0), (0.9, 0.01)):
        case = make_case(gamma)
        pairs = zip(expect_terms(case), find_gradient(case.world, case.policy, gamma), strict=True)
        for found, true in pairs:
            difference = (found.sum(0) - true.sum(0)).norm() / true.sum(0).norm()
            assert difference < EXACT if not off else difference > off


def test_without_its_level_the_switch_does_not_learn(case):
    true = find_gradient(case.world, case.policy, case.gamma)
    found = weigh(case, expect_terms(case, "hae_no_switch"))
    switch, *rest = compare(found, true)
    assert max(rest) < EXACT and switch > 1e-3 and not found.switch.any()


def test_the_first_turns_switch_is_noise_alone():
    """It changes nothing, since a first turn opens a segment in any case; its tokens train all the same."""
    case = make_case(horizon=1)
    episodes = play(case.world, case.policy)
    credit = give_credit("hae", episodes, case.tables, configure(case))
    terms = find_terms(case.policy, episodes, credit)
    assert not find_gradient(case.world, case.policy, 1.0).switch.any()
    assert expect(case.policy, episodes, terms).switch.abs().max() < EXACT
    assert find_variance(episodes, estimate_each(case.policy, episodes, terms)).switch > 0.01


# Wrong values


@pytest.mark.parametrize("lambdas", LAMBDAS, ids=str)
def test_wrong_values_of_the_switch_do_no_harm(case, lambdas):
    true = find_gradient(case.world, case.policy, case.gamma)
    found = expect_terms(case, lambdas=lambdas, tables=spoil(case, "switch"))
    assert max(compare(weigh(case, found), true)) < EXACT


def test_wrong_low_values_harm_below_lambda_one(case):
    true = find_gradient(case.world, case.policy, case.gamma)
    wrong = spoil(case, "low")
    for lambda_turn in (1.0, 0.9, 0.0):
        found = expect_terms(case, lambdas=(lambda_turn, 0.95), tables=wrong)
        switch, subgoal, action = compare(weigh(case, found), true)
        assert max(switch, subgoal) < EXACT
        assert action < EXACT if lambda_turn == 1 else action > 1e-3


@pytest.mark.parametrize("lambdas", LAMBDAS, ids=str)
def test_wrong_high_values_harm_switch_and_action_at_any_lambda(case, lambdas):
    """Both end with their segment, at V_high of the next: only the high level goes on past it."""
    true = find_gradient(case.world, case.policy, case.gamma)
    found = expect_terms(case, lambdas=lambdas, tables=spoil(case, "high"))
    switch, subgoal, action = compare(weigh(case, found), true)
    assert min(switch, action) > 1e-3
    assert subgoal < EXACT if lambdas[1] == 1 else subgoal > 1e-4


def test_that_harm_is_linear_in_the_error(case):
    true = find_gradient(case.world, case.policy, case.gamma)
    biases = []
    for size in (0.1, 0.4):
        found = weigh(case, expect_terms(case, tables=spoil(case, "high", size)))
        biases.append(Policy(*(a - b for a, b in zip(found, true, strict=True))))
    assert max(compare(biases[1], [4 * bias for bias in biases[0]])) < EXACT


def test_flat_gae_is_unbiased_under_wrong_values_at_lambda_one_alone(case):
    true = find_gradient(case.world, case.policy, case.gamma)
    wrong = flatten(spoil(case, "switch"))
    for lambda_ in (1.0, 0.95, 0.0):
        found = expect_terms(case, "gae", (1.0, lambda_), tables=wrong)
        differences = compare(weigh(case, found), true)
        assert max(differences) < EXACT if lambda_ == 1 else min(differences) > 1e-4


# Truncation


def test_truncated_turns_are_exact_with_the_value_before_the_decision(case):
    """After a cut nobody knows yet whether the next turn would switch: V_switch, not V_high, stands for it."""
    true = find_gradient(case.world, case.policy, case.gamma)
    episodes = play(case.world, case.policy, limit=2)
    assert 0 < episodes.terminated.float().mean() < 1
    differences = {}
    for name, after in (("switch", case.tables.switch), ("high", case.tables.high), ("none", None)):
        found = weigh(case, expect_terms(case, episodes=episodes, after=after))
        differences[name] = compare([x[:2] for x in found], [x[:2] for x in true])
        assert not any(x[2:].any() for x in found)  # turns never played teach nothing
    assert max(differences["switch"]) < EXACT
    assert min(differences["high"]) > 1e-3 and min(differences["none"]) > 1e-3
    flat = weigh(case, expect_terms(case, "gae", episodes=episodes, after=case.tables.switch))
    assert max(compare([x[:2] for x in flat], [x[:2] for x in true])) < EXACT


def test_without_bootstrap_the_return_up_to_the_limit_is_the_objective(case):
    """Of which values that learn from the same episodes are exact."""
    short = World(case.world.rewards, case.world.moves, case.world.start, horizon=2)
    policy = Policy(*(table[:2] for table in case.policy))
    tables = evaluate(short, policy, case.gamma)
    cut = Case(short, policy, tables, case.gamma)
    episodes: Episodes = play(case.world, case.policy, limit=2)
    found = weigh(cut, expect_terms(cut, episodes=episodes, tables=tables))
    assert max(compare(found, find_gradient(short, policy, case.gamma))) < EXACT


# Normalisation


def test_normalised_levels_keep_their_directions_and_lose_their_proportions():
    """With the moments of all episodes: the mean is a baseline, the deviation a scale of its own for each level."""
    case = make_case()
    episodes = play(case.world, case.policy)
    weight = episodes.probability[episodes.episode]
    credit = give_credit("hae", episodes, case.tables, configure(case))
    levels, scales = [], {}
    for level in credit.levels:
        of = weight * level.carried / (weight * level.carried).sum()
        mean = (of * level.advantages).sum()
        scales[level.name] = (of * (level.advantages - mean).square()).sum().sqrt()
        levels.append(rescale(level, (level.advantages - mean) / scales[level.name]))
    terms = find_terms(case.policy, episodes, type(credit)(tuple(levels)))
    true = find_gradient(case.world, case.policy, 1.0)
    by_role = scales["switch"], scales["high"], scales["low"]
    found = expect(case.policy, episodes, terms)
    restored = [scale * x for scale, x in zip(by_role, found, strict=True)]
    assert max(compare(restored, true)) < EXACT
    assert max(by_role) / min(by_role) > 1.1


def rescale(level, advantages):
    return type(level)(level.name, level.roles, advantages, level.carried)


# Variance: what docs/hae.md says of it, on worlds of its own


@pytest.mark.parametrize("seed", range(5))
def test_variance_is_below_flat_gae_at_lambda_one_and_above_it_at_zero(seed):
    case = make_case(seed=seed)
    episodes = play(case.world, case.policy)
    for lambda_, lower in ((1.0, True), (0.0, False)):
        totals = []
        for name, tables in (("hae", case.tables), ("gae", flatten(case.tables))):
            credit = give_credit(name, episodes, tables, configure(case, lambda_, lambda_))
            each = estimate_each(case.policy, episodes, find_terms(case.policy, episodes, credit))
            totals.append(sum(find_variance(episodes, each)))
        assert (totals[0] < totals[1]) == lower
