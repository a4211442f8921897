"""What stands for the reward that a truncated episode misses: `advantage.bootstrap`, beside loops of its own."""

from dataclasses import replace

import pytest
import torch
from helpers import make_turns

from hiper_fast import estimators
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import HIGH, LOW, SWITCH, Values
from hiper_fast.ops import reference as plain

HALF = AdvantageConfig(bootstrap="reference", gamma=0.5, lambda_turn=1.0, lambda_segment=0.5)


def give(turns, values, config, estimator="hae"):
    """Name -> (advantages, returns) of each level."""
    levels = estimators.find(estimator)(turns, values, config).levels
    return {level.name: (level.advantages, level.returns) for level in levels}


def make_values(low, high, switch=None, bootstrap=(0.0,)):
    columns = low, high, [0.0] * len(low) if switch is None else switch
    return Values(torch.tensor(columns).T.contiguous(), torch.tensor(bootstrap))


# By hand: gamma 1/2, lambda_turn 1, lambda_segment 1/2.


def test_an_episode_truncated_in_its_second_segment():
    turns = make_turns([[1.0, 2.0, 4.0]], [[True, False, True]], terminated=[False])
    values = make_values([10.0, 20.0, 30.0], [100.0, -7.0, 200.0], [1.0, 2.0, 3.0])
    found = give(turns, values, HALF)
    # low: 4 + 30/2 - 30; 2 + 200/2 - 20; 1 + 20/2 - 10 and half of 82
    assert found["low"][0].tolist() == [42.0, 82.0, -11.0]
    assert found["low"][1].tolist() == [52.0, 102.0, 19.0]
    # high: 4 + 200/2 - 200; 1 + 2/2 + 200/4 - 100 and an eighth of -96
    assert found["high"][0].tolist() == [-60.0, 0.0, -96.0]
    assert found["high"][1].tolist() == [40.0, 0.0, 104.0]
    # switch: 4 + 200/2; 2 + 200/2; 1 + 102/2
    assert found["switch"][1].tolist() == [52.0, 102.0, 104.0]
    assert found["switch"][0].tolist() == [51.0, 100.0, 101.0]


def test_an_episode_truncated_in_its_first_segment():
    """High and switch go back to the segment's start, the low level to the last turn."""
    turns = make_turns([[1.0, 2.0]], [[False, False]], terminated=[False])
    found = give(turns, make_values([10.0, 20.0], [100.0, -7.0]), HALF)
    assert found["low"][0].tolist() == [-3.0, -8.0]  # 2 + 20/2 - 20; 1 + 20/2 - 10 and half of -8
    assert found["high"][0].tolist() == [-73.0, 0.0]  # 1 + 2/2 + 100/4 - 100
    assert found["switch"][1].tolist() == [27.0, 52.0]  # 2 + 100/2; 1 + 52/2


def test_an_episode_of_one_turn():
    turns = make_turns([[3.0]], terminated=[False])
    found = give(turns, make_values([10.0], [100.0], [7.0]), HALF)
    assert [found[name][1].item() for name in ("low", "high", "switch")] == [8.0, 53.0, 53.0]
    assert [found[name][0].item() for name in ("low", "high", "switch")] == [-2.0, -47.0, 46.0]


def test_none_takes_nothing_and_next_state_the_value_that_it_is_given():
    turns = make_turns([[3.0]], terminated=[False])
    low = {
        name: give(turns, make_values([10.0], [100.0], bootstrap=[given]), replace(HALF, bootstrap=name))
        for name, given in (("none", 0.0), ("next_state", 40.0))
    }  # fmt: skip
    assert [low["none"][name][1].item() for name in ("low", "high", "switch")] == [3.0] * 3
    assert [low["next_state"][name][1].item() for name in ("low", "high", "switch")] == [23.0] * 3


def test_a_malformed_last_turn_stands_for_itself_by_what_it_is_measured_against():
    """With `advantage.malformed` that is V_switch: V_low knows that the turn has failed."""
    turns = make_turns([[3.0]], terminated=[False])
    turns = replace(turns, roles=torch.tensor([plain.ACTION], dtype=torch.uint8))
    values = make_values([10.0], [100.0], [6.0])
    assert give(turns, values, HALF)["low"][0].item() == 3.0 + 6.0 / 2 - 6.0
    as_paper = give(turns, values, replace(HALF, malformed=False))
    assert as_paper["low"][0].item() == 3.0 + 10.0 / 2 - 10.0


# Beside plain loops.


def by_sums(rewards, low, high, switch, opens, terminated, gamma, lambda_turn, lambda_segment):
    """One episode's nine lists in float64, each advantage as the sum of what is discounted, not by recursion."""
    count = len(rewards)
    starts = [t for t in range(count) if t == 0 or opens[t]]
    ends = [*starts[1:], count]
    after_high = [*(high[start] for start in starts[1:]), 0.0 if terminated else high[starts[-1]]]
    after_low = [*after_high[:-1], 0.0 if terminated else low[-1]]
    deltas_high = [
        sum(gamma**j * r for j, r in enumerate(rewards[b:e])) + gamma ** (e - b) * v - high[b]
        for b, e, v in zip(starts, ends, after_high, strict=True)
    ]
    a_low, a_high, g = [0.0] * count, [0.0] * count, [0.0] * count
    for k, (begin, end) in enumerate(zip(starts, ends, strict=True)):
        a_high[begin] = sum(
            lambda_segment ** (i - k) * gamma ** (starts[i] - begin) * deltas_high[i]
            for i in range(k, len(starts))
        )
        follows = [*low[begin + 1 : end], after_low[k]]
        deltas = [
            r + gamma * v - own
            for r, v, own in zip(rewards[begin:end], follows, low[begin:end], strict=True)
        ]
        for t in range(begin, end):
            rest = range(t, end)
            a_low[t] = sum((gamma * lambda_turn) ** (i - t) * deltas[i - begin] for i in rest)
            g[t] = sum(gamma ** (i - t) * rewards[i] for i in rest)
            g[t] += gamma ** (end - t) * after_high[k]
    returns_high = [a_high[t] + high[t] if t in starts else 0.0 for t in range(count)]
    return {
        "low": (a_low, [a + v for a, v in zip(a_low, low, strict=True)]),
        "high": (a_high, returns_high),
        "switch": ([x - v for x, v in zip(g, switch, strict=True)], g),
    }


def draw(seed, lengths, terminated=None):
    g = torch.Generator().manual_seed(seed)
    rewards = [torch.randn(n, generator=g).tolist() for n in lengths]
    opens = [(torch.rand(n, generator=g) < 0.4).tolist() for n in lengths]
    if terminated is None:
        terminated = (torch.rand(len(lengths), generator=g) < 0.5).tolist()
    turns = make_turns(rewards, opens)
    turns = replace(turns, terminated=torch.tensor(terminated, dtype=torch.bool))
    values = torch.randn(sum(lengths), 3, generator=g)
    return turns, Values(values, torch.zeros(len(lengths))), rewards, opens, terminated


LENGTHS = [[1], [7], [1, 1, 1], [3, 1, 8, 2, 5, 1, 13], [0, 4, 0, 1, 0], []]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("gamma, lambda_turn, lambda_segment", [(1, 1, 0.95), (0.9, 0.8, 0.7), (0, 0, 0)])  # fmt: skip
def test_it_is_plain_loops_in_float64(lengths, gamma, lambda_turn, lambda_segment):
    factors = {"gamma": gamma, "lambda_turn": lambda_turn, "lambda_segment": lambda_segment}
    config = AdvantageConfig(bootstrap="reference", **factors)
    for seed in range(5):
        turns, values, rewards, opens, terminated = draw(seed, lengths)
        found, begin = give(turns, values, config), 0
        for i, length in enumerate(lengths):
            own = values.turns[begin : begin + length].double()
            columns = (own[:, head].tolist() for head in (LOW, HIGH, SWITCH))
            expected = by_sums(rewards[i], *columns, opens[i], terminated[i], **factors) if length else {}  # fmt: skip
            for name, pair in expected.items():
                for got, want in zip(found[name], pair, strict=True):
                    got = got[begin : begin + length].double()
                    torch.testing.assert_close(got, torch.tensor(want).double(), atol=2e-5, rtol=1e-5)  # fmt: skip
            begin += length


def test_where_all_terminated_it_changes_nothing():
    turns, values, *_ = draw(0, [3, 1, 8], terminated=[True] * 3)
    none = give(turns, values, AdvantageConfig(bootstrap="none"))
    found = give(turns, values, AdvantageConfig(bootstrap="reference"))
    for name in ("low", "high", "switch"):
        assert all(torch.equal(a, b) for a, b in zip(none[name], found[name], strict=True))


def test_it_changes_only_what_leads_to_a_truncated_end():
    turns, values, *_ = draw(1, [4, 4], terminated=[True, False])
    none = give(turns, values, AdvantageConfig(bootstrap="none"))
    found = give(turns, values, AdvantageConfig(bootstrap="reference"))
    for name in ("low", "high", "switch"):
        moved = none[name][1] != found[name][1]
        assert not moved[:4].any() and moved[4:].any()


# Other estimators.


def test_without_the_switch_level_it_is_the_same():
    turns, values, *_ = draw(2, [3, 5], terminated=[False, False])
    whole, less = (give(turns, values, HALF, name) for name in ("hae", "hae_no_switch"))
    assert list(less) == ["low", "high"]
    for name in less:
        assert all(torch.equal(a, b) for a, b in zip(whole[name], less[name], strict=True))


def test_flat_gae_bootstraps_nothing_then_as_the_reference_implementations():
    turns, values, *_ = draw(3, [3, 1], terminated=[False, False])
    found = give(turns, values, HALF, "gae")
    none = give(turns, values, replace(HALF, bootstrap="none"), "gae")
    assert torch.equal(found["turn"][0], none["turn"][0])
    last = turns.cu_turns[1:].long() - 1
    torch.testing.assert_close(found["turn"][1][last], turns.rewards[last])
