"""Estimators that compare episodes of one game, against plain loops, figures by hand and other suites' cases."""

import math
import statistics

import pytest
import torch
from helpers import make_turns

from hiper_fast import estimators
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import needs_groups, needs_values

FLAT = ("grpo", "dr_grpo", "rloo", "gigpo")
CONFIG = AdvantageConfig(gamma=0.9)
EPS = 1e-6


def run(name, turns, config=CONFIG):
    return estimators.find(name)(turns, None, config)


def advantages(name, *arguments, **options):
    [level] = run(name, make_turns(*arguments, **options)).levels
    assert level.roles == 7 and level.carried.all() and level.returns is None and not level.raw
    return level.advantages


def scale(values):
    """Each against the others, as the formulas say it."""
    if len(values) < 2:
        return [0.0] * len(values)
    mean, std = statistics.fmean(values), statistics.stdev(values)
    return [(value - mean) / (std + EPS) for value in values]


def by_group(values, groups, rule):
    out = [0.0] * len(values)
    for group in set(groups):
        places = [i for i, other in enumerate(groups) if other == group]
        for place, value in zip(places, rule([values[i] for i in places]), strict=True):
            out[place] = value
    return out


def returns_to_go(rewards, gamma):
    out, g = [], 0.0
    for reward in reversed(rewards):
        g = reward + gamma * g
        out.insert(0, g)
    return out


def draw(seed, episodes=24, groups=5):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (episodes,), generator=g).tolist()
    rewards = [torch.randn(n, generator=g).tolist() for n in lengths]
    switch = [(torch.rand(n, generator=g) < 0.4).tolist() for n in lengths]
    state = [torch.randint(0, 4, (n,), generator=g).tolist() for n in lengths]
    group = [17 - 3 * int(i) for i in torch.randint(0, groups, (episodes,), generator=g)]
    return rewards, switch, state, group


RULES = {
    "grpo": scale,
    "dr_grpo": lambda values: [value - statistics.fmean(values) for value in values],
    "rloo": lambda values: [
        value - statistics.fmean(values[:i] + values[i + 1 :]) if len(values) > 1 else 0.0
        for i, value in enumerate(values)
    ],
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", RULES)
def test_episodes_against_their_group_in_plain_loops(name, seed):
    rewards, _, _, group = draw(seed)
    expected = by_group([math.fsum(episode) for episode in rewards], group, RULES[name])
    expected = [value for value, episode in zip(expected, rewards, strict=True) for _ in episode]
    torch.testing.assert_close(
        advantages(name, rewards, group=group), torch.tensor(expected), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("seed", range(4))
def test_gigpo_in_plain_loops(seed):
    rewards, _, state, group = draw(seed)
    of_episode = by_group([math.fsum(episode) for episode in rewards], group, scale)
    flat = [g for episode in rewards for g in returns_to_go(episode, 0.9)]
    anchors = [(group[i], s) for i, states in enumerate(state) for s in states]
    of_step = by_group(flat, anchors, scale)
    owner = [i for i, episode in enumerate(rewards) for _ in episode]
    expected = [of_episode[i] + step for i, step in zip(owner, of_step, strict=True)]
    torch.testing.assert_close(
        advantages("gigpo", rewards, state=state, group=group),
        torch.tensor(expected),
        atol=2e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("seed", range(4))
def test_group_hae_in_plain_loops(seed):
    rewards, switch, state, group = draw(seed)
    flat = [g for episode in rewards for g in returns_to_go(episode, 0.9)]
    groups = [group[i] for i, episode in enumerate(rewards) for _ in episode]
    anchors = [(group[i], s) for i, states in enumerate(state) for s in states]
    boundary = [value or turn == 0 for episode in switch for turn, value in enumerate(episode)]
    of_switch, of_state = by_group(flat, groups, scale), by_group(flat, anchors, scale)
    expected_low = [
        at_state if anchors.count(anchor) > 1 else other
        for at_state, anchor, other in zip(of_state, anchors, of_switch, strict=True)
    ]
    places = [i for i, opens in enumerate(boundary) if opens]
    of_high = by_group([flat[i] for i in places], [groups[i] for i in places], scale)
    expected_high = [0.0] * len(flat)
    for place, value in zip(places, of_high, strict=True):
        expected_high[place] = value
    low, high, switched = run("group_hae", make_turns(rewards, switch, state, group)).levels
    for level, expected in ((low, expected_low), (high, expected_high), (switched, of_switch)):
        torch.testing.assert_close(level.advantages, torch.tensor(expected), atol=2e-5, rtol=1e-4)
    assert (low.roles, high.roles, switched.roles) == (1, 2, 4)
    assert high.carried.tolist() == boundary and low.carried.all() and switched.carried.all()


def test_by_hand():
    rewards = [[0.0, 1.0], [0.0], [1.0, 2.0], [0.0, 0.0, 0.0]]
    group = [5, 5, 2, 2]  # returns 1, 0 and 3, 0
    root = math.sqrt(0.5)
    assert advantages("dr_grpo", rewards, group=group).tolist() == [
        0.5,
        0.5,
        -0.5,
        1.5,
        1.5,
        *[-1.5] * 3,
    ]
    assert advantages("rloo", rewards, group=group).tolist() == [1, 1, -1, 3, 3, -3, -3, -3]
    expected = [root, root, -root, root, root, -root, -root, -root]
    assert advantages("grpo", rewards, group=group).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", FLAT)
def test_one_alone_and_equal_ones_teach_nothing(name):
    assert not advantages(name, [[1.0, 0.3], [-0.1], [0.0, 0.0]], group=[2, 0, 1]).any()
    same = [[-0.1] * 7, [-0.1] * 3 + [0.0] * 5 + [-0.1] * 4, [-0.1] * 7]
    assert advantages(name, same, group=[0, 0, 0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", [*FLAT, "group_hae"])
def test_what_they_say_they_need(name):
    estimate = estimators.find(name)
    assert not needs_values(estimate) and needs_groups(estimate)


def test_hae_and_gae_need_a_critic_and_no_groups():
    for name in ("hae", "hae_no_switch", "gae"):
        assert needs_values(estimators.find(name)) and not needs_groups(estimators.find(name))


@pytest.mark.parametrize("name", [*FLAT, "group_hae"])
def test_no_episodes(name):
    for level in run(name, make_turns([])).levels:
        assert level.advantages.shape == (0,)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_permuting_episodes_permutes_advantages(name):
    rewards, _, _, group = draw(9)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0)).tolist()
    whole = advantages(name, rewards, group=group).split([len(episode) for episode in rewards])
    moved = advantages(name, [rewards[i] for i in order], group=[group[i] for i in order])
    torch.testing.assert_close(moved, torch.cat([whole[i] for i in order]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift, factor", [(3.0, 1.0), (0.0, 7.0), (-2.0, 0.5)])
def test_grpo_does_not_see_an_affine_change_of_returns(shift, factor):
    rewards, _, _, group = draw(3)
    changed = [
        [factor * r for r in episode[:-1]] + [factor * episode[-1] + shift] for episode in rewards
    ]
    torch.testing.assert_close(
        advantages("grpo", changed, group=group),
        advantages("grpo", rewards, group=group),
        atol=1e-4,
        rtol=1e-4,
    )
