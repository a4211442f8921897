"""From an estimator's credit to tokens: the fused op and plain torch give the same; levels of every kind."""

from dataclasses import replace

import pytest
import torch

from hiper_fast.estimators import HIGH, LOW, SWITCH, Credit, Level
from hiper_fast.learn import credit as credit_module
from hiper_fast.learn.credit import is_fused, scatter
from hiper_fast.packing import prefix_sums

ROLES = (1, 2, 4)


def draw(seed, turns=40):
    """Random roles and three levels; some turns have no tokens."""
    g = torch.Generator().manual_seed(seed)
    cu_tokens = prefix_sums(torch.randint(0, 9, (turns,), generator=g))
    roles = torch.randint(0, 8, (int(cu_tokens[-1]),), generator=g, dtype=torch.uint8)
    boundary = torch.rand(turns, generator=g) < 0.4
    every = torch.ones(turns, dtype=torch.bool)
    levels = [
        Level(
            name, role, torch.randn(turns, generator=g), carried, torch.zeros(turns), carried, head
        )
        for name, role, carried, head in zip(
            ("low", "high", "switch"),
            ROLES,
            (every, boundary, every),
            (LOW, HIGH, SWITCH),
            strict=True,
        )
    ]
    return Credit(tuple(levels)), roles, cu_tokens


def by_hand(credit, roles, cu_tokens, normalize):
    advantages, mask = [0.0] * len(roles), [False] * len(roles)
    bounds = cu_tokens.tolist()
    ranges = list(zip(bounds, bounds[1:], strict=False))
    for level in credit.levels:
        turns = [
            turn
            for turn, (a, b) in enumerate(ranges)
            if level.carried[turn] and any(role & level.roles for role in roles[a:b].tolist())
        ]
        values = level.advantages.double()
        if normalize and level.raw:
            chosen = values[turns]
            values = (values - chosen.mean()) / (chosen.std(correction=0) + 1e-8)
        for turn in turns:
            for token in range(*ranges[turn]):
                if int(roles[token]) & level.roles:
                    advantages[token] += float(values[turn])
                    mask[token] = True
    return torch.tensor(advantages), torch.tensor(mask)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_fused_and_plain_scatter_are_the_loops(monkeypatch, normalize, seed):
    credit, roles, cu_tokens = draw(seed)
    assert is_fused(credit, normalize)
    expected, mask = by_hand(credit, roles, cu_tokens, normalize)
    for fused in (True, False):
        monkeypatch.setattr(credit_module, "is_fused", lambda *_, fused=fused: fused)
        advantages, loss_mask, told = scatter(credit, roles, cu_tokens, normalize)
        torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(loss_mask, mask)
        for level in told.levels:
            carrying = [
                bool((roles[a:b] & level.roles).any())
                for a, b in zip(cu_tokens.tolist(), cu_tokens.tolist()[1:], strict=False)
            ]
            chosen = level.advantages[torch.tensor(carrying) & level.carried]
            assert not normalize or abs(float(chosen.mean())) < 1e-5


def test_what_is_not_the_ops_case_takes_the_plain_way():
    credit, *_ = draw(0)
    low, high, switch = credit.levels
    assert not is_fused(Credit((low, high)), True)
    assert not is_fused(Credit((high, low, switch)), True)
    assert not is_fused(Credit((replace(low, carried=high.carried), high, switch)), True)
    assert not is_fused(Credit((replace(low, raw=False), high, switch)), True)
    assert is_fused(Credit((replace(low, raw=False), high, switch)), False)


def test_one_level_gives_a_token_of_several_roles_its_advantage_once():
    advantages = torch.tensor([2.0, 5.0])
    level = Level("turn", 7, advantages, torch.tensor([True, True]), raw=False)
    roles, cu_tokens = torch.tensor([7, 0, 3, 4], dtype=torch.uint8), prefix_sums([3, 1])
    scattered, mask, _ = scatter(Credit((level,)), roles, cu_tokens, True)
    assert scattered.tolist() == [2.0, 0.0, 2.0, 5.0] and mask.tolist() == [True, False, True, True]


def test_a_level_that_carries_nothing_and_no_levels():
    roles, cu_tokens = torch.tensor([1, 2], dtype=torch.uint8), prefix_sums([2])
    level = Level("turn", 7, torch.tensor([3.0]), torch.tensor([False]))
    for credit in (Credit((level,)), Credit(())):
        advantages, mask, _ = scatter(credit, roles, cu_tokens, True)
        assert advantages.tolist() == [0.0, 0.0] and not mask.any()
