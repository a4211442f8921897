"""HAE and flat GAE as estimators: the ops they call, and what they tell the update of their levels."""

import pytest
import torch
from helpers import make_turns

from hiper_fast import estimators, ops
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import HIGH, LOW, SWITCH, Values

CONFIG = AdvantageConfig(gamma=0.9, lambda_turn=0.8, lambda_segment=0.7)
REWARDS = [[0.0, 0.5, -1.0, 2.0], [1.0], [0.3, 0.1, 0.0]]
SWITCHES = [[True, False, True, False], [False], [False, False, True]]


def make(seed=0):
    turns = make_turns(REWARDS, SWITCHES, terminated=[True, False, False])
    g = torch.Generator().manual_seed(seed)
    bootstrap = torch.randn(3, generator=g).masked_fill(turns.terminated, 0)
    return turns, Values(torch.randn(8, 3, generator=g), bootstrap)


def test_hae_is_the_op():
    turns, values = make()
    found = ops.reference.hae(
        turns.rewards, values.turns[:, LOW], values.turns[:, HIGH], turns.switch, turns.terminated, turns.cu_turns,
        values_switch=values.turns[:, SWITCH], bootstrap_low=values.bootstrap, bootstrap_high=values.bootstrap,
        gamma=0.9, lambda_turn=0.8, lambda_segment=0.7,
    )  # fmt: skip
    low, high, switch = estimators.find("hae")(turns, values, CONFIG).levels
    for level, name in ((low, "low"), (high, "high"), (switch, "switch")):
        torch.testing.assert_close(level.advantages, getattr(found, f"advantages_{name}"))
        torch.testing.assert_close(level.returns, getattr(found, f"returns_{name}"))
        assert level.name == name and level.raw
    assert torch.equal(high.carried, found.boundary) and low.carried.all() and switch.carried.all()


def test_without_the_switch_level_the_others_stay():
    turns, values = make()
    low, high, _ = estimators.find("hae")(turns, values, CONFIG).levels
    levels = estimators.find("hae_no_switch")(turns, values, CONFIG).levels
    assert [level.name for level in levels] == ["low", "high"]
    assert torch.equal(levels[0].advantages, low.advantages)
    assert torch.equal(levels[1].advantages, high.advantages)


@pytest.mark.parametrize("lambda_", [1.0, 0.95, 0.0])
def test_gae_is_the_op_and_one_level(lambda_):
    turns, values = make()
    config = AdvantageConfig(gamma=0.9, lambda_segment=lambda_)
    [level] = estimators.find("gae")(turns, values, config).levels
    advantages, returns = ops.reference.gae(
        turns.rewards, values.turns[:, HIGH], turns.terminated, turns.cu_turns,
        bootstrap=values.bootstrap, gamma=0.9, lambda_=lambda_,
    )  # fmt: skip
    torch.testing.assert_close(level.advantages, advantages)
    torch.testing.assert_close(level.returns, returns)
    assert level.roles == 7 and level.head == HIGH and level.learned.all()


def test_all_switching_hae_is_gae_on_its_high_level():
    """Every turn a segment: the high level sees turns, and its values are those of states."""
    turns, values = make()
    turns = make_turns(REWARDS, [[True] * len(r) for r in REWARDS], terminated=[True, False, False])
    high = estimators.find("hae")(turns, values, CONFIG).levels[1]
    [flat] = estimators.find("gae")(turns, values, CONFIG).levels
    torch.testing.assert_close(high.advantages, flat.advantages)
