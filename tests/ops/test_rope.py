"""rope against the reference, by hand, and as transformers computes it."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hiper_fast import ops


def random_case(batch, tokens, d, dtype=torch.float64, angles=None):
    """query and key as layers make them, [batch, tokens, heads, d] transposed; cos and sin of any numbers."""
    g = torch.Generator().manual_seed(d)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=g).to(dtype)

    query, key = (draw(batch, tokens, heads, d).requires_grad_() for heads in (4, 2))
    cos, sin = draw(2, angles or batch, tokens, d)
    return query, key, cos, sin


def run(rotate, query, key, *angles):
    outs = rotate(query.transpose(1, 2), key.transpose(1, 2), *angles)
    return *outs, *torch.autograd.grad(outs, (query, key), [x.detach().square() for x in outs])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("d", [2, 6, 16, 70])
@pytest.mark.parametrize("batch, tokens, angles", [(1, 9, 1), (3, 4, 3), (3, 4, 1), (2, 0, 2)])
def test_equals_the_reference_with_gradients(batch, tokens, angles, d, dtype):
    case = random_case(batch, tokens, d, dtype, angles)
    torch.testing.assert_close(run(ops.rope, *case), run(ops.reference.rope, *case))


def test_by_hand():
    """A quarter turn of the pairs (1, 3) and (2, 4), a half's own sine and cosine each."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([[[0.0, 0.5, 0.0, 0.25]], [[1.0, 2.0, 1.0, 4.0]]]).split(1)
    turned, _ = ops.rope(x, x, cos, sin)
    assert turned.flatten().tolist() == [-3.0, 0.5 * 2 - 2 * 4, 1.0, 0.25 * 4 + 4 * 2]


def test_gradients_are_those_of_differences():
    query, key, cos, sin = random_case(2, 3, 4)
    assert torch.autograd.gradcheck(
        lambda q, k: ops.rope(q, k, cos, sin), (query.transpose(1, 2), key.transpose(1, 2))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_transformers(dtype):
    case = random_case(2, 5, 32, dtype)
    tolerance = 0.02 if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(
        run(ops.rope, *case), run(apply_rotary_pos_emb, *case), rtol=tolerance, atol=4 * tolerance
    )


def test_strides_are_those_of_any_tensor():
    query, key, cos, sin = (x.detach() for x in random_case(2, 5, 8))
    parts = torch.cat([query, key], 2).split([4, 2], 2)  # as of one projection
    for dim in (2, 3):
        odd = [x.transpose(1, 2).transpose(dim, 3).contiguous().transpose(dim, 3) for x in parts]
        angles = cos.mT.contiguous().mT, sin
        torch.testing.assert_close(ops.rope(*odd, *angles), ops.reference.rope(*odd, *angles))
    views = [x.transpose(1, 2) for x in parts]
    torch.testing.assert_close(ops.rope(*views, cos, sin), ops.reference.rope(*views, cos, sin))


def test_threads_change_nothing(monkeypatch):
    case = random_case(3, 700, 64, torch.float32)
    alone = run(ops.rope, *case)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(alone, run(ops.rope, *case), strict=True))


@pytest.mark.parametrize(
    "name, change",
    [
        ("query", lambda x: x[0]),
        ("query", lambda x: x[..., :3]),
        ("query", lambda x: x.long()),
        ("key", lambda x: x[:, :, :2]),
        ("key", lambda x: x.float()),
        ("key", lambda x: x.to("meta")),
        ("cos", lambda x: x[..., :2]),
        ("cos", lambda x: x.float()),
        ("cos", lambda x: x.clone().requires_grad_()),
        ("sin", lambda x: x[:1]),
        ("sin", lambda x: None),
    ],
)
def test_bad_arguments_are_named(name, change):
    query, key, cos, sin = random_case(2, 3, 4)
    given = {"query": query.transpose(1, 2), "key": key.transpose(1, 2), "cos": cos, "sin": sin}
    with pytest.raises(ValueError, match=name):
        ops.rope(**(given | {name: change(given[name])}))
