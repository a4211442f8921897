"""Cases of verl's suite for estimators that compare episodes of one game."""

import statistics

import pytest
import torch
from helpers import make_turns

from hiper_fast import estimators
from hiper_fast.config import AdvantageConfig


def advantages(name, rewards, group):
    turns = make_turns(rewards, group=group)
    [level] = estimators.find(name)(turns, None, AdvantageConfig()).levels
    return level.advantages


def test_returns_that_hardly_differ():
    """1 and 1.00001: 5e-6 from their mean, over a standard deviation of 7.07e-6 and 1e-6."""
    found = advantages("grpo", [[1.0], [1.00001], [2.0], [2.00001]], [0, 0, 1, 1])
    rounded = torch.tensor([1.0, 1.00001, 2.0, 2.00001]).double()  # as float32 has them
    for a, b in ((0, 1), (2, 3)):
        half = float(rounded[b] - rounded[a]) / 2
        expected = half / (half * 2**0.5 + 1e-6)
        assert found[[a, b]].tolist() == pytest.approx([-expected, expected], rel=1e-5)


@pytest.mark.parametrize("episodes, groups, seed", [(64, 5, 0), (128, 8, 1), (512, 10, 2)])
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_groups_of_unequal_sizes(name, episodes, groups, seed):
    """Every group of two or more; episodes of up to six turns."""
    g = torch.Generator().manual_seed(seed)
    rest = torch.randint(0, groups, (episodes - 2 * groups,), generator=g)
    group = torch.cat([torch.arange(groups).repeat(2), rest])[torch.randperm(episodes, generator=g)]
    rewards = [
        torch.randn(int(torch.randint(1, 7, (1,), generator=g)), generator=g).tolist()
        for _ in range(episodes)
    ]
    group, returns, expected = group.tolist(), [sum(one) for one in rewards], []
    for i, own in enumerate(returns):
        mates = [returns[j] for j in range(episodes) if group[j] == group[i]]
        others = [returns[j] for j in range(episodes) if group[j] == group[i] and j != i]
        if name == "grpo":
            value = (own - statistics.fmean(mates)) / (statistics.stdev(mates) + 1e-6)
        else:
            value = own - statistics.fmean(others)
        expected += [value] * len(rewards[i])
    torch.testing.assert_close(
        advantages(name, rewards, group), torch.tensor(expected), atol=1e-5, rtol=1e-5
    )
