"""linear_logprobs: no less exact than torch in the same dtype, in chunks, with its gradients."""

import math
import sys

import pytest
import torch

from hiper_fast import ops
from hiper_fast.ops import _head


def random_case(n, h, v, dtype=torch.float64, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, dtype=torch.float64, generator=g).to(dtype)
    weight = torch.randn(v, h, dtype=torch.float64, generator=g).to(dtype)
    offset = torch.randn(v, dtype=torch.float64, generator=g).to(dtype) if bias else None
    return hidden, weight, torch.randint(0, v, (n,), generator=g), offset


def gradients(function, hidden, weight, targets, bias, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    given = dict(zip(("hidden", "weight", "bias"), leaves, strict=False))
    logprobs, entropy = function(
        given["hidden"], given["weight"], targets, bias=given.get("bias"), entropy=True, **options
    )
    g = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(len(x), dtype=torch.float64, generator=g)).sum()
        for x in (logprobs, entropy)
    )
    return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.fixture(params=[1, 400, 2**27], ids=["row by row", "some rows", "at once"])
def chunk(request, monkeypatch):
    monkeypatch.setitem(_head.CHUNK_BYTES, "cpu", request.param)
    monkeypatch.setattr(_head, "TILE_BYTES", request.param)
    monkeypatch.setattr(_head, "BLOCK_BYTES", request.param)
    monkeypatch.setattr(_head, "BLOCK_ROWS", max(1, request.param // 40))


@pytest.fixture(params=[False, True], ids=["cpp", "plain torch"])
def plain(request, monkeypatch):
    """Plain torch: what runs without the extension, and on a GPU without Triton."""
    if request.param:
        module = sys.modules["hiper_fast.ops.linear_logprobs"]
        monkeypatch.setattr(module, "_op", module._run_torch)
        monkeypatch.setattr(module, "_op_backward", module._run_torch_backward)


@pytest.mark.parametrize("n, h, v", [(0, 3, 5), (1, 1, 1), (1, 4, 7), (7, 5, 17), (33, 8, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.4, None), (0.4, 1.5)])
def test_equals_the_reference_with_gradients(chunk, plain, n, h, v, bias, temperature, softcap):
    case = random_case(n, h, v, bias=bias)
    options = {"temperature": temperature, "softcap": softcap}
    result = gradients(ops.linear_logprobs, *case, **options)
    expected = gradients(ops.reference.linear_logprobs, *case, **options)
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_softcap_by_hand(plain):
    """In Python's floats, one logit at a time: one far above the cap, and minus infinity, which it makes finite."""
    logits, temperature, cap = [0.0, 3.0, -40.0, 1e4, -math.inf], 0.5, 5.0
    z = [cap * math.tanh(x / cap) for x in logits]
    assert z[3:] == [cap, -cap]
    total = sum(math.exp(x / temperature) for x in z)
    log_p = [x / temperature - math.log(total) for x in z]
    bias = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(5, 2, dtype=torch.float64)
    options = {"temperature": temperature, "softcap": cap, "entropy": True}
    logprobs, entropy = ops.linear_logprobs(nothing, nothing, torch.arange(5), bias=bias, **options)
    torch.testing.assert_close(logprobs, bias.new_tensor(log_p))
    spread = -sum(math.exp(x) * x for x in log_p)
    torch.testing.assert_close(entropy, bias.new_tensor([spread] * 5))
    gradient = torch.autograd.grad(logprobs[1], bias)[0]
    by_hand = [
        ((k == 1) - math.exp(log_p[k])) / temperature / math.cosh(min(abs(x), 1e3) / cap) ** 2
        for k, x in enumerate(logits)
    ]
    torch.testing.assert_close(gradient, bias.new_tensor(by_hand))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64_is_no_larger_than_torchs(chunk, dtype, softcap):
    case = random_case(40, 16, 50, dtype)
    wide = [x.double() if x.is_floating_point() else x for x in case]
    truth = gradients(ops.reference.linear_logprobs, *wide, softcap=softcap)
    ours = gradients(ops.linear_logprobs, *case, softcap=softcap)
    torchs = gradients(ops.reference.linear_logprobs, *case, softcap=softcap)
    assert ours[0].dtype == torch.float32 and ours[2].dtype == dtype
    for x, y, exact in zip(ours, torchs, truth, strict=True):
        error, allowed = (x - exact).abs().max(), (y - exact).abs().max()
        assert error <= 1.2 * allowed + 1e-6


@pytest.mark.parametrize(
    "rows, count, held", [(0, 1, 0), (3, 1, 3), (10, 3, 4), (12, 3, 4), (13, 4, 4)]
)
def test_chunks_share_one_scratch_buffer(monkeypatch, rows, count, held):
    """The first as the others, where the weight's gradient is wanted too; it is no larger than it must be."""
    monkeypatch.setitem(_head.CHUNK_BYTES, "cpu", 4 * 7 * 8)  # 4 rows of 7 logits
    hidden, weight, *_ = random_case(rows, 64, 7)
    head = _head.Head(hidden, weight, None, need_weight=True)
    parts, buffers = [], set()
    for part, logits in head.iterate_chunks():
        parts += range(rows)[part]
        storage = logits.untyped_storage()
        buffers.add((storage.data_ptr(), storage.nbytes()))
        torch.testing.assert_close(logits, hidden[part] @ weight.T)
        head.add_chunk_gradients(part, logits)
        count -= 1
    assert count == 0 and parts == list(range(rows))
    assert [size for _, size in buffers] == [held * 7 * 8]
    torch.testing.assert_close(head.grad_weight, (hidden @ weight.T).T @ hidden)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 10])
def test_blocks_cover_all_logits_in_order(monkeypatch, rows, keep):
    monkeypatch.setattr(_head, "BLOCK_BYTES", 4 * 3 * 8)  # 3 columns of 4 rows
    monkeypatch.setattr(_head, "BLOCK_ROWS", 4)
    hidden, weight, _, bias = random_case(rows, 5, 7)
    expected, seen = hidden @ weight.T + bias, []
    for blocks in _head.Head(hidden, weight, bias).iterate_blocks(keep=keep):
        assert blocks.room.nbytes <= 4 * (7 if keep else 3) * 8
        for tile, logits in blocks:
            assert logits.is_contiguous()
            torch.testing.assert_close(logits, expected[blocks.part, tile])
            seen.append((blocks.part.start, blocks.part.stop, tile.start))
        for tile in blocks.head.iterate_tiles(blocks.width) if keep else []:
            torch.testing.assert_close(blocks.take(tile), expected[blocks.part, tile])
    assert seen == sorted(seen)
    assert {row for begin, end, _ in seen for row in range(begin, end)} == set(range(rows))


@pytest.mark.parametrize("rows, inside", [(5, True), (6, False)])
def test_logits_lie_in_the_gradient_of_the_weight_where_there_is_room(monkeypatch, rows, inside):
    monkeypatch.setattr(_head, "BLOCK_BYTES", rows * 3 * 8)  # 3 columns
    hidden, weight, *_ = random_case(rows, 5, 7)
    head = _head.Head(hidden, weight, None, need_weight=True)
    (blocks,) = head.iterate_blocks(keep=True)
    logits = torch.cat([block.clone() for _, block in blocks], dim=1)
    assert (blocks.room.data_ptr() == head.grad_weight.data_ptr()) == inside
    head.add_gradients(blocks.part, None, blocks.width, lambda tile: logits[:, tile])
    torch.testing.assert_close(head.grad_weight, logits.T @ hidden)


def test_a_later_tile_with_a_far_larger_logit(monkeypatch):
    """The sums so far move to the new top, or vanish beside it; so does what masked logits left."""
    monkeypatch.setattr(_head, "BLOCK_BYTES", 2 * 4 * 3)  # 2 columns of 3 rows
    logits = torch.tensor([-math.inf, -math.inf, 0.0, 1.0, 300.0, -5.0, 301.0])
    nothing, targets = torch.zeros(3, 1), torch.tensor([4, 6, 2])
    logprobs, entropy = ops.linear_logprobs(
        nothing, torch.zeros(7, 1), targets, bias=logits, entropy=True
    )
    log_p = torch.log_softmax(logits.double(), 0)
    torch.testing.assert_close(logprobs, log_p[targets].float())
    p = log_p[[4, 6]].exp()  # of the others nothing is left
    torch.testing.assert_close(entropy, -(p * p.log()).sum().float().expand(3))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    hidden, weight, targets, bias = random_case(4, 3, 6)
    for x in (hidden, weight, bias):
        x.requires_grad_()

    def function(hidden, weight, bias):
        return ops.linear_logprobs(
            hidden, weight, targets, bias=bias, temperature=0.7, softcap=softcap, entropy=True
        )

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_gradient_of_one_input_alone():
    hidden, weight, targets, bias = random_case(4, 3, 6)
    expected = gradients(ops.linear_logprobs, hidden, weight, targets, bias)[0]
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()
        result = ops.linear_logprobs(hidden, weight, targets, bias=bias)
        torch.testing.assert_close(result.detach(), expected)
        assert torch.autograd.grad(result.sum(), leaf)[0].shape == leaf.shape
        leaf.requires_grad_(False)


def test_logprobs_never_exceed_zero():
    hidden = torch.full((50, 8), 30.0) + torch.rand(50, 8)
    weight = torch.stack([torch.full((8,), 30.0), *torch.randn(9, 8)])
    assert (ops.linear_logprobs(hidden, weight, torch.zeros(50, dtype=torch.int64)) <= 0).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_non_contiguous_inputs(softcap):
    hidden, weight, targets, _ = random_case(6, 4, 9)
    strided = hidden.T.contiguous().T, weight.T.contiguous().T
    result = ops.linear_logprobs(*strided, targets, softcap=softcap)
    torch.testing.assert_close(
        result, ops.linear_logprobs(hidden, weight, targets, softcap=softcap)
    )


@pytest.mark.parametrize(
    "name, change",
    [
        ("hidden", {"hidden": torch.zeros(3)}),
        ("hidden", {"hidden": torch.zeros(3, 4, dtype=torch.int64)}),
        ("weight", {"weight": torch.zeros(5, 3)}),
        ("weight", {"weight": torch.zeros(0, 4)}),
        ("weight", {"weight": torch.zeros(5, 4, device="meta")}),
        ("targets", {"targets": torch.tensor([0, 1])}),
        ("targets", {"targets": torch.tensor([0, 1, 2], dtype=torch.int32)}),
        ("targets", {"targets": torch.tensor([0, 5, 1])}),
        ("targets", {"targets": torch.tensor([0, -1, 1])}),
        ("bias", {"bias": torch.zeros(4)}),
        ("temperature", {"temperature": 0.0}),
        ("softcap", {"softcap": 0.0}),
        ("softcap", {"softcap": -30.0}),
        ("softcap", {"softcap": math.inf}),
        ("softcap", {"softcap": math.nan}),
    ],
)
def test_bad_arguments_are_named(name, change):
    given = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "targets": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(ValueError, match=name):
        ops.linear_logprobs(**(given | change))
