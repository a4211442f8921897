"""rms_norm against the reference, by hand, and as transformers' layers compute it."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hiper_fast import ops

SHAPES = [(0, 4), (1, 1), (3, 7), (2, 5, 33), (300, 64), (4, 0)]


def random_case(shape, dtype=torch.float64):
    g = torch.Generator().manual_seed(len(shape))
    draw = (torch.randn(s, dtype=torch.float64, generator=g) for s in (shape, shape[-1:], shape))
    x, weight, grad = (tensor.to(dtype) for tensor in draw)
    return x.requires_grad_(), weight.requires_grad_(), grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference_with_gradients(shape, dtype):
    x, weight, grad = random_case(shape, dtype)
    out, expected = ops.rms_norm(x, weight, 1e-5), ops.reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, (x, weight), grad),
        torch.autograd.grad(expected, (x, weight), grad),
    )


def test_by_hand():
    out = ops.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)


def test_gradients_are_those_of_differences():
    x, weight, _ = random_case((3, 5))
    assert torch.autograd.gradcheck(ops.rms_norm, (x, weight, 1e-3))


def test_one_gradient_alone():
    x, weight, grad = random_case((300, 5))
    both = torch.autograd.grad(ops.rms_norm(x, weight), (x, weight), grad)
    (of_x,) = torch.autograd.grad(ops.rms_norm(x, weight.detach()), x, grad)
    (of_weight,) = torch.autograd.grad(ops.rms_norm(x.detach(), weight), weight, grad)
    assert torch.equal(of_x, both[0]) and torch.equal(of_weight, both[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_where_llama_rounds(dtype):
    x, weight, grad = random_case((5, 32), dtype)
    llama = LlamaRMSNorm(32, 1e-6).to(dtype)
    llama.weight.data = weight.detach().clone()
    out = ops.rms_norm(x, weight, 1e-6)
    assert torch.equal(out, llama(x))
    truth = ops.reference.rms_norm(x.double(), weight.double(), 1e-6)
    wanted = torch.autograd.grad(truth, (x, weight), grad.double())
    for gradient, true in zip(torch.autograd.grad(out, (x, weight), grad), wanted, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, true.to(dtype), rtol=0.02, atol=0.02)


def test_a_weight_of_higher_precision_widens_the_result():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    out = ops.rms_norm(x, weight)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, ops.reference.rms_norm(x, weight))


def test_strides_are_those_of_any_tensor():
    x, weight = torch.randn(6, 5, 8).transpose(0, 1), torch.randn(16)[::2]
    torch.testing.assert_close(ops.rms_norm(x, weight), ops.reference.rms_norm(x, weight))


def test_threads_change_nothing(monkeypatch):
    x, weight, grad = random_case((9000, 64), torch.float32)

    def run():
        out = ops.rms_norm(x, weight)
        return out, *torch.autograd.grad(out, (x, weight), grad)

    alone = run()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(alone, run(), strict=True))


@pytest.mark.parametrize(
    "name, bad",
    [
        ("x", 1.0),
        ("x", torch.ones(2, 4, dtype=torch.int32)),
        ("x", torch.tensor(1.0)),
        ("weight", torch.ones(3)),
        ("weight", torch.ones(1, 4)),
        ("weight", torch.ones(4, device="meta")),
        ("eps", -1.0),
        ("eps", float("nan")),
    ],
)
def test_bad_arguments_are_named(name, bad):
    given = {"x": torch.ones(2, 4), "weight": torch.ones(4), "eps": 1e-6}
    with pytest.raises(ValueError, match=name):
        ops.rms_norm(**(given | {name: bad}))
