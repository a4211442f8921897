"""swiglu against the reference and by hand."""

import math

import pytest
import torch

from hiper_fast import ops


def random_case(shape, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    gate, up, grad = (3 * torch.randn(3, *shape, dtype=torch.float64, generator=g)).to(dtype)
    return gate.requires_grad_(), up.requires_grad_(), grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 7), (2, 5, 33), (64, 128)])
def test_equals_the_reference_with_gradients(shape, dtype):
    gate, up, grad = random_case(shape, dtype)
    out, expected = ops.swiglu(gate, up), ops.reference.swiglu(gate, up)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, (gate, up), grad), torch.autograd.grad(expected, (gate, up), grad)
    )


def test_by_hand():
    out = ops.swiglu(torch.tensor([0.0, math.log(3), -200.0, 200.0]), torch.tensor([5.0, 2, 1, 1]))
    torch.testing.assert_close(out, torch.tensor([0.0, 1.5 * math.log(3), 0.0, 200.0]))


def test_gradients_are_those_of_differences():
    assert torch.autograd.gradcheck(ops.swiglu, random_case((3, 5))[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_less_exact_than_torch(dtype):
    gate, up, grad = random_case((40, 32), dtype)
    truth = ops.reference.swiglu(gate.double(), up.double())
    ours, torchs = ops.swiglu(gate, up), torch.nn.functional.silu(gate) * up
    wanted = truth, *torch.autograd.grad(truth, (gate, up), grad.double())
    mine = ours, *torch.autograd.grad(ours, (gate, up), grad)
    others = torchs, *torch.autograd.grad(torchs, (gate, up), grad)
    for x, y, z in zip(mine, others, wanted, strict=True):
        assert x.dtype == dtype
        assert (x - z).abs().max() <= 1.2 * (y - z).abs().max()


def test_what_is_not_a_number_is_not_hidden():
    gate = torch.tensor([math.nan, 1.0], requires_grad=True)
    out = ops.swiglu(gate, torch.tensor([1.0, math.nan]))
    assert out.isnan().all()
    assert torch.autograd.grad(out.sum(), gate)[0].isnan().all()


def test_strides_are_those_of_any_tensor():
    both = torch.randn(6, 16)
    gate, up = both.chunk(2, -1)
    torch.testing.assert_close(ops.swiglu(gate, up), ops.reference.swiglu(gate, up))


def test_threads_change_nothing(monkeypatch):
    gate, up, grad = random_case((9001, 67), torch.float32)

    def run():
        out = ops.swiglu(gate, up)
        return out, *torch.autograd.grad(out, (gate, up), grad)

    alone = run()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for a, b in zip(alone, run(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name, bad",
    [
        ("gate", None),
        ("gate", torch.ones(2, dtype=torch.int64)),
        ("up", torch.ones(3)),
        ("up", torch.ones(2, dtype=torch.float64)),
        ("up", torch.ones(2, device="meta")),
    ],
)
def test_bad_arguments_are_named(name, bad):
    with pytest.raises(ValueError, match=name):
        ops.swiglu(**({"gate": torch.ones(2), "up": torch.ones(2)} | {name: bad}))
