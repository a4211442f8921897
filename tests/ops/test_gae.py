"""gae: the C++ kernel against the reference and against figures worked out by hand."""

import pytest
import torch

from hiper_fast import ops


def random_case(lengths, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), dtype=dtype, generator=g)
    terminated = torch.rand(len(lengths), generator=g) < 0.5
    cu_turns = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return (rewards, values, terminated, cu_turns), torch.randn(
        len(lengths), dtype=dtype, generator=g
    )


@pytest.mark.parametrize("lengths", [[], [0], [1], [4, 0, 9], [31] * 5], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("gamma, lambda_", [(1.0, 1.0), (0.9, 0.8), (0.0, 0.0)])
@pytest.mark.parametrize("bootstrapped", [True, False])
def test_equals_the_reference(lengths, dtype, tolerance, gamma, lambda_, bootstrapped):
    arguments, bootstrap = random_case(lengths, dtype)
    options = {"gamma": gamma, "lambda_": lambda_, "bootstrap": bootstrap if bootstrapped else None}
    result, expected = ops.gae(*arguments, **options), ops.reference.gae(*arguments, **options)
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", [ops.gae, ops.reference.gae])
def test_by_hand(implementation):
    advantages, returns = implementation(
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([0.5, 1.0, 2.0]),
        torch.tensor([True, False]),
        torch.tensor([0, 2, 3], dtype=torch.int32),
        bootstrap=torch.tensor([100.0, 4.0]),
        gamma=0.5,
        lambda_=0.5,
    )
    # 2 - 1 = 1; 1 + .5*1 - .5 + .25*1 = 1.25; 3 + .5*4 - 2 = 3
    torch.testing.assert_close(advantages, torch.tensor([1.25, 1.0, 3.0]))
    torch.testing.assert_close(returns, torch.tensor([1.75, 2.0, 5.0]))


def test_hae_with_one_turn_per_segment_is_gae_at_the_high_level():
    (rewards, values, terminated, cu_turns), bootstrap = random_case([5, 3], torch.float64)
    always = torch.ones_like(rewards, dtype=torch.bool)
    high = ops.hae(
        rewards,
        values,
        values,
        always,
        terminated,
        cu_turns,
        bootstrap_high=bootstrap,
        gamma=0.9,
        lambda_segment=0.7,
    )
    advantages, returns = ops.gae(
        rewards, values, terminated, cu_turns, bootstrap=bootstrap, gamma=0.9, lambda_=0.7
    )
    torch.testing.assert_close(high.advantages_high, advantages)
    torch.testing.assert_close(high.returns_high, returns)


def test_opcheck_and_strides():
    (rewards, values, terminated, cu_turns), bootstrap = random_case([4, 4], torch.float32)
    torch.library.opcheck(
        torch.ops.hiper_fast.gae.default,
        (rewards, values, terminated, cu_turns, bootstrap, 1.0, 1.0),
    )
    strided = torch.stack([values, values], 1)[:, 1]
    assert torch.equal(
        ops.gae(rewards, strided, terminated, cu_turns)[0],
        ops.gae(rewards, values, terminated, cu_turns)[0],
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("rewards", torch.zeros(5, dtype=torch.int64)),
        ("values", torch.zeros(4)),
        ("terminated", torch.zeros(1, dtype=torch.bool)),
        ("cu_turns", torch.tensor([0, 3, 1], dtype=torch.int32)),
        ("bootstrap", torch.zeros(2, dtype=torch.float64)),
    ],
)
def test_bad_arguments_are_named(name, value):
    arguments, bootstrap = random_case([2, 3], torch.float32)
    given = dict(zip(("rewards", "values", "terminated", "cu_turns"), arguments, strict=True))
    with pytest.raises(ValueError, match=name):
        ops.gae(**(given | {"bootstrap": bootstrap, name: value}))
