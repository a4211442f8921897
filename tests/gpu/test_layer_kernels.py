"""rms_norm, rope and swiglu on the device against the references' results and gradients in float64."""

import pytest
import torch
from gpu_timing import differentiate_exactly

from hiper_fast.ops import reference

pytest.importorskip("triton")

from hiper_fast.kernels import rms_norm as norms
from hiper_fast.kernels.rms_norm import rms_norm, rms_norm_backward
from hiper_fast.kernels.rope import rope
from hiper_fast.kernels.swiglu import swiglu, swiglu_backward

pytestmark = pytest.mark.gpu

EPS = 2.0**-10  # exact in float32, as the interpreter has it
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def draw(dtype, *shape):
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=g).to(dtype)


def assert_near(found, wanted, dtype):
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == dtype and x.shape == y.shape
        scale = max(1.0, float(y.abs().max())) if y.numel() else 1.0
        assert ((x.cpu().double() - y).abs() <= TOLERANCE[dtype] * scale).all()


@pytest.mark.parametrize("rows, width", [(0, 4), (1, 1), (5, 7), (300, 64), (3, 100), (2, 3000)])
def test_rms_norm(device, rows, width, dtype):
    x, weight, grad = draw(dtype, rows, width), draw(dtype, width), draw(dtype, rows, width) / 2
    given = [t.to(device) for t in (grad, x, weight)]
    found = [rms_norm(*given[1:], EPS), *rms_norm_backward(*given, EPS, True, True)]
    wanted = differentiate_exactly(lambda x, w: reference.rms_norm(x, w, EPS), [grad], x, weight)
    assert_near(found, wanted, dtype)
    for needs in ((True, False), (False, True)):
        alone = rms_norm_backward(*given, EPS, *needs)
        for need, part, both in zip(needs, alone, found[1:], strict=True):
            assert torch.equal(part, both if need else both.new_empty(0))


def test_rms_norm_of_more_rows_than_programs(device, monkeypatch):
    monkeypatch.setattr(norms, "_PROGRAMS", 3)
    x, weight, grad = (
        draw(torch.float32, 333, 64),
        draw(torch.float32, 64),
        draw(torch.float32, 333, 64),
    )
    found = rms_norm_backward(*(t.to(device) for t in (grad, x, weight)), EPS, True, True)
    wanted = differentiate_exactly(lambda x, w: reference.rms_norm(x, w, EPS), [grad], x, weight)
    assert_near(found, wanted[1:], torch.float32)


def test_rms_norm_of_two_dtypes(device):
    x, weight = draw(torch.float16, 3, 32).to(device), draw(torch.float32, 32).to(device)
    out = rms_norm(x, weight, EPS)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.cpu(), reference.rms_norm(x.cpu(), weight.cpu(), EPS))
    grads = rms_norm_backward(out, x, weight, EPS, True, True)
    assert [g.dtype for g in grads] == [torch.float16, torch.float32]


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 9), (40, 64)])
def test_swiglu(device, shape, dtype):
    gate, up, grad = 3 * draw(dtype, *shape), draw(dtype, *shape) / 2, draw(dtype, *shape) - 1
    given = [t.to(device) for t in (grad, gate, up)]
    found = [swiglu(*given[1:]), *swiglu_backward(*given, True, True)]
    assert_near(found, differentiate_exactly(reference.swiglu, [grad], gate, up), dtype)


def test_swiglu_at_the_edges(device):
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4, torch.nan], device=device)
    ones = torch.ones_like(gate)
    assert swiglu(gate, ones).cpu()[:4].tolist() == [0, 0, 100, 1e4]
    of_gate, of_up = (g.cpu() for g in swiglu_backward(ones, gate, ones, True, True))
    assert of_gate[:4].tolist() == [0, 0, 1, 1] and of_up[:4].tolist() == [0, 0, 100, 1e4]
    assert of_gate[4].isnan() and of_up[4].isnan()


@pytest.mark.parametrize("d", [2, 6, 64])
@pytest.mark.parametrize(
    "batch, tokens, heads, key_heads, angles",
    [(1, 9, 4, 2, 1), (3, 4, 3, 3, 3), (3, 4, 5, 1, 1), (1, 2, 40, 8, 1), (2, 0, 2, 2, 2)],
)
def test_rope(device, batch, tokens, heads, key_heads, angles, d, dtype):
    query, key = (draw(dtype, batch, tokens, n, d).transpose(1, 2) for n in (heads, key_heads))
    cos, sin = draw(dtype, 2, angles, tokens, d)
    grads = [x.roll(1, -1) / 2 for x in (query, key)]
    given = [t.to(device) for t in (query, key, cos, sin)]
    outs = rope(*given, False)
    assert all(x.transpose(1, 2).is_contiguous() for x in outs)
    found = [*outs, *rope(*(g.to(device) for g in grads), *given[2:], True)]
    angles = cos.double(), sin.double()
    wanted = differentiate_exactly(lambda q, k: reference.rope(q, k, *angles), grads, query, key)
    assert_near(found, wanted, dtype)


def test_rope_of_any_strides(device):
    both = draw(torch.float32, 2, 5, 6, 8)  # as of one projection
    query, key = (x.transpose(1, 2) for x in both.split([4, 2], 2))
    cos, sin = draw(torch.float32, 2, 2, 5, 8)
    odd = query.transpose(2, 3).contiguous().transpose(2, 3)
    for q in (query, odd):
        found = rope(*(t.to(device) for t in (q, key, cos, sin)), False)
        for x, y in zip(found, reference.rope(q, key, cos, sin), strict=True):
            torch.testing.assert_close(x.cpu(), y)
