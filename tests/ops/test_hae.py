"""hae: the C++ kernel against the reference, the reference against figures worked out by hand."""

import pytest
import torch

from hiper_fast import ops

TRAJECTORIES = [[], [0], [1], [1, 1], [5], [3, 0, 4], [50] * 4, [1, 17, 2, 0, 33]]


def prefix_sum(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random_case(lengths, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    turns, n = sum(lengths), len(lengths)
    rewards, low, high, switch_value = torch.randn(4, turns, dtype=dtype, generator=g)
    boot_low, boot_high = torch.randn(2, n, dtype=dtype, generator=g)
    switch = torch.rand(turns, generator=g) < 0.3
    terminated = torch.rand(n, generator=g) < 0.5
    arguments = (rewards, low, high, switch, terminated, prefix_sum(lengths))
    return arguments, {
        "values_switch": switch_value,
        "bootstrap_low": boot_low,
        "bootstrap_high": boot_high,
    }


def assert_same(result, expected, tolerance):
    assert torch.equal(result.boundary, expected.boundary)
    for name in result._fields[:-1]:
        x, y = getattr(result, name), getattr(expected, name)
        torch.testing.assert_close(
            x, y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("lengths", TRAJECTORIES, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("factors", [(1.0, 1.0, 0.95), (0.9, 0.7, 0.5), (0.0, 1.0, 1.0)])
def test_equals_the_reference(lengths, dtype, tolerance, factors):
    gamma, lambda_turn, lambda_segment = factors
    for seed in range(5):
        arguments, options = random_case(lengths, dtype, seed)
        options |= {"gamma": gamma, "lambda_turn": lambda_turn, "lambda_segment": lambda_segment}
        result = ops.hae(*arguments, **options)
        assert result.advantages_low.dtype == dtype
        assert_same(result, ops.reference.hae(*arguments, **options), tolerance)


def test_equals_the_reference_without_options():
    arguments, _ = random_case([4, 7, 1])
    assert_same(ops.hae(*arguments), ops.reference.hae(*arguments), 1e-9)


@pytest.mark.parametrize("implementation", [ops.hae, ops.reference.hae])
def test_by_hand(implementation):
    """Two segments, turns 0-1 and 2, gamma 0.5, lambda_turn 0.5, lambda_segment 0.8, ended by a limit."""
    f64 = torch.float64
    result = implementation(
        torch.tensor([1.0, 2.0, 4.0], dtype=f64),
        torch.tensor([0.1, 0.2, 0.3], dtype=f64),
        torch.tensor([1.0, 99.0, 2.0], dtype=f64),
        torch.tensor([False, False, True]),  # turn 0 begins a segment all the same
        torch.tensor([False]),
        torch.tensor([0, 3], dtype=torch.int32),
        values_switch=torch.tensor([0.5, 0.5, 0.5], dtype=f64),
        bootstrap_low=torch.tensor([10.0], dtype=f64),
        bootstrap_high=torch.tensor([20.0], dtype=f64),
        gamma=0.5,
        lambda_turn=0.5,
        lambda_segment=0.8,
    )
    assert result.boundary.tolist() == [True, False, True]
    # low: 4 + .5*10 - .3 = 8.7; 2 + .5*V_high(2) - .2 = 2.8; 1 + .5*.2 - .1 + .25*2.8 = 1.7
    torch.testing.assert_close(result.advantages_low, torch.tensor([1.7, 2.8, 8.7], dtype=f64))
    # high: 4 + .5*20 - 2 = 12; (1 + .5*2) + .25*2 - 1 + .25*.8*12 = 3.9
    torch.testing.assert_close(result.advantages_high, torch.tensor([3.9, 0.0, 12.0], dtype=f64))
    torch.testing.assert_close(result.returns_high, torch.tensor([4.9, 0.0, 14.0], dtype=f64))
    # switch: G = 1 + .5*3 = 2.5; 2 + .5*2 = 3; 4 + .5*20 = 14
    torch.testing.assert_close(result.returns_switch, torch.tensor([2.5, 3.0, 14.0], dtype=f64))
    torch.testing.assert_close(result.advantages_switch, torch.tensor([2.0, 2.5, 13.5], dtype=f64))


def test_only_truncation_bootstraps():
    arguments, options = random_case([3, 3])
    *rest, cu_turns = arguments
    rest[4] = torch.tensor([True, False])
    ended = ops.hae(*rest, cu_turns, **options)
    without = ops.hae(*rest, cu_turns, values_switch=options["values_switch"])
    assert torch.equal(ended.advantages_low[:3], without.advantages_low[:3])
    assert not torch.isclose(ended.advantages_low[5], without.advantages_low[5])
    assert not torch.isclose(ended.advantages_high[3], without.advantages_high[3])


def test_one_trajectory_never_reaches_into_another():
    (rewards, low, high, switch, terminated, cu_turns), options = random_case([4, 5])
    both = ops.hae(rewards, low, high, switch, terminated, cu_turns, **options)
    options = {k: v[4:] if k == "values_switch" else v[1:] for k, v in options.items()}
    alone = ops.hae(
        rewards[4:], low[4:], high[4:], switch[4:], terminated[1:], prefix_sum([5]), **options
    )
    assert_same(ops.HAE(*(x[4:] for x in both)), alone, 1e-12)


def test_values_high_off_boundaries_are_not_read():
    (rewards, low, high, switch, terminated, cu_turns), options = random_case([9])
    expected = ops.hae(rewards, low, high, switch, terminated, cu_turns, **options)
    high[~expected.boundary] = torch.nan
    assert_same(ops.hae(rewards, low, high, switch, terminated, cu_turns, **options), expected, 0.0)


def test_non_contiguous_inputs():
    arguments, options = random_case([6, 2])
    expected = ops.hae(*arguments, **options)
    strided = [torch.stack([x, x], 1)[:, 0] for x in arguments]
    assert not strided[0].is_contiguous()
    assert_same(ops.hae(*strided, **options), expected, 0.0)


def test_no_gradient_flows():
    arguments, options = random_case([3])
    result = ops.hae(arguments[0], arguments[1].requires_grad_(), *arguments[2:], **options)
    assert not result.advantages_low.requires_grad


def test_opcheck():
    (rewards, low, high, switch, terminated, cu_turns), _ = random_case([3, 2])
    torch.library.opcheck(
        torch.ops.hiper_fast.hae.default,
        (rewards, low, high, None, switch, terminated, cu_turns, None, None, 1.0, 1.0, 0.95),
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("rewards", torch.zeros(2, 2)),
        ("rewards", torch.zeros(5, dtype=torch.int64)),
        ("values_low", torch.zeros(4, dtype=torch.float64)),
        ("values_high", torch.zeros(5, dtype=torch.float32)),
        ("switch", torch.zeros(5)),
        ("terminated", torch.zeros(3, dtype=torch.bool)),
        ("cu_turns", torch.tensor([0, 2, 5])),
        ("cu_turns", torch.tensor([], dtype=torch.int32)),
        ("cu_turns", torch.tensor([0, 2, 4], dtype=torch.int32)),
        ("cu_turns", torch.tensor([0, 6, 5], dtype=torch.int32)),
        ("cu_turns", torch.tensor([1, 2, 5], dtype=torch.int32)),
        ("values_switch", torch.zeros(1, dtype=torch.float64)),
        ("bootstrap_low", torch.zeros(3, dtype=torch.float64)),
        ("bootstrap_high", [0.0, 0.0]),
        ("values_low", torch.zeros(5, dtype=torch.float64, device="meta")),
    ],
)
def test_bad_arguments_are_named(name, value):
    arguments, options = random_case([2, 3])
    names = ("rewards", "values_low", "values_high", "switch", "terminated", "cu_turns")
    given = dict(zip(names, arguments, strict=True)) | options | {name: value}
    with pytest.raises(ValueError, match=name):
        ops.hae(**given)
