"""paged_attention: the op against the reference in float64, and against figures worked out by hand."""

import itertools
import math
import sys

import pytest
import torch

from hiper_fast import ops
from hiper_fast.ops import _library

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-12}


def paged(own, past, *, heads=2, kv_heads=1, d=8, d_v=None, block=3, dtype=torch.float32, seed=0):
    """Sequences with `own` queries behind `past` tokens, their blocks in any order among others -> the arguments.

    Behind a sequence's last block stands rubbish.
    """
    g = torch.Generator().manual_seed(seed)
    lengths = [a + b for a, b in zip(own, past, strict=True)]
    counts = [math.ceil(length / block) for length in lengths]
    order = torch.randperm(sum(counts) + 2, generator=g).to(torch.int32)  # two belong to nobody
    blocks = torch.full((len(own), max(counts, default=0) + 2), 2**31 - 1, dtype=torch.int32)
    for row, part in zip(blocks, order.split([*counts, 2]), strict=False):
        row[: len(part)] = part

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=g).to(dtype)

    return (
        draw(sum(own), heads, d),
        draw(len(order), block, kv_heads, d),
        draw(len(order), block, kv_heads, d if d_v is None else d_v),
        blocks,
        int32(0, *itertools.accumulate(own)),
        int32(*lengths),
    )


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def exact(arguments):
    return [x.double() if x.is_floating_point() else x for x in arguments]


def assert_exact(arguments, **options):
    """No further from float64's truth than the reference in the inputs' own dtype, but for an epsilon."""
    truth = ops.reference.paged_attention(*exact(arguments), **options)
    result = ops.paged_attention(*arguments, **options)
    torchs = ops.reference.paged_attention(*arguments, **options)
    assert result.dtype == arguments[0].dtype and result.shape == truth.shape
    if truth.numel():
        allowed = 1.2 * (torchs - truth).abs().max() + 0.1 * DTYPES[result.dtype]
        assert (result - truth).abs().max() <= allowed


SEQUENCES = {
    "none": ([], []),
    "no queries": ([0, 0], [4, 0]),
    "one token": ([1], [0]),
    "decoding": ([1, 1, 1, 1], [0, 6, 63, 200]),
    "prompts": ([40, 5], [0, 0]),
    "both": ([1, 17, 0, 1, 2], [64, 50, 9, 0, 127]),
}
SINKS = torch.tensor([0.5, -2.0])
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "itself": {"window": 1},
    "window": {"window": 40},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": SINKS},
    "all": {"scale": 2.0, "window": 70, "softcap": 3.0, "sinks": SINKS},
}


@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_reference(sequences, options):
    assert_exact(paged(*sequences), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (2, 2), (6, 2), (40, 1)])
@pytest.mark.parametrize("d, d_v", [(64, 64), (5, 3), (24, 80), (1, 0)])
def test_heads_and_sizes(dtype, heads, kv_heads, d, d_v):
    shape = dict(heads=heads, kv_heads=kv_heads, d=d, d_v=d_v, dtype=dtype)
    assert_exact(paged([1, 7], [12, 60], **shape))


@pytest.mark.parametrize("block", [1, 3, 16, 256])
def test_blocks_of_every_size(block):
    assert_exact(paged(*SEQUENCES["both"], block=block))


@pytest.mark.parametrize("implementation", [ops.paged_attention, ops.reference.paged_attention])
def test_by_hand(implementation):
    """A prompt of two tokens in blocks 2 and 0: scores of ln 3 and 0, and the sink's 0."""
    result = implementation(
        torch.ones(2, 1, 1),
        torch.tensor([0.0, 9.0, math.log(3)]).view(3, 1, 1, 1),
        torch.tensor([8.0, 9.0, 4.0]).view(3, 1, 1, 1),
        int32(2, 0)[None],
        int32(0, 2),
        int32(2),
        scale=1.0,
        sinks=torch.tensor([0.0]),
    )
    # 3 * 4 / (3 + 1), and (3 * 4 + 1 * 8) / (3 + 1 + 1)
    torch.testing.assert_close(result.flatten(), torch.tensor([3.0, 4.0]))


def test_scores_far_apart_and_what_is_not_a_number():
    query, keys, *rest = paged([1, 20], [150, 0], d=4)
    far = (100 * query, keys, *rest)  # scores of 500, which float32 knows to 3e-5
    truth = ops.reference.paged_attention(*exact(far))
    torch.testing.assert_close(ops.paged_attention(*far).double(), truth, rtol=0, atol=1e-4)
    query[3] = math.nan
    seen = ops.paged_attention(query, keys, *rest).isnan()
    assert seen[3].all() and seen.sum() == seen[3].numel()


def test_what_no_query_sees_changes_nothing():
    """Later tokens of the last block, blocks of nobody."""
    query, keys, values, blocks, cu_query, lengths = paged([1, 4], [6, 0], block=16)
    expected = ops.paged_attention(query, keys, values, blocks, cu_query, lengths)
    unseen = torch.ones(keys.shape[:2], dtype=torch.bool)
    for row, length in zip(blocks, lengths, strict=True):
        unseen[row[0], :length] = False
    keys[unseen], values[unseen] = math.nan, math.inf
    assert torch.equal(
        ops.paged_attention(query, keys, values, blocks, cu_query, lengths), expected
    )


def test_opcheck_strides_and_no_gradient():
    query, *rest = paged([2, 1], [3, 9])
    raw = torch.ops.hiper_fast.paged_attention.default
    torch.library.opcheck(raw, (query, *rest, None, 4, 2.0, torch.zeros(2)))
    expected = ops.paged_attention(query, *rest)
    strided = torch.stack([query, query], -1)[..., 1].requires_grad_()
    assert not strided.is_contiguous()
    result = ops.paged_attention(strided, *rest)
    assert torch.equal(result, expected) and not result.requires_grad


@pytest.mark.skipif(_library.extension is None, reason="needs the extension")
def test_threads_change_nothing(monkeypatch):
    arguments = paged([1] * 40 + [300], [700] * 40 + [0], heads=4, kv_heads=2, d=32, block=16)
    alone = ops.paged_attention(*arguments)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(ops.paged_attention(*arguments), alone)
    arguments[3][17, 2] = -1
    with pytest.raises(ValueError, match="blocks must lie .* got -1 at index 17"):
        ops.paged_attention(*arguments)


@pytest.mark.parametrize("plain", [False, True], ids=["op", "plain"])
@pytest.mark.parametrize(
    "name, value",
    [
        ("query", torch.zeros(3, 2)),
        ("query", torch.zeros(3, 2, 8, dtype=torch.int64)),
        ("keys", torch.zeros(7, 3, 1, 9)),
        ("keys", torch.zeros(7, 3, 4, 8)),
        ("keys", torch.zeros(7, 3, 1, 16)[..., ::2]),
        ("keys", torch.zeros(7, 3, 1, 8, dtype=torch.float64)),
        ("values", torch.zeros(6, 3, 1, 8)),
        ("values", torch.zeros(7, 3, 1, 16)[..., ::2]),
        ("blocks", torch.zeros(2, 4)),
        ("blocks", torch.zeros(3, 4, dtype=torch.int32)),
        ("blocks", torch.full((2, 4), 7, dtype=torch.int32)),
        ("blocks", torch.full((2, 4), -1, dtype=torch.int32)),
        ("cu_query", int32(0, 3, 2)),
        ("cu_query", int32(0, 2, 2)),
        ("cu_query", int32(1, 2, 3)),
        ("cu_query", torch.tensor([0, 2, 3])),
        ("lengths", int32(5)),
        ("lengths", int32(1, 7)),
        ("lengths", int32(5, 13)),
        ("scale", math.nan),
        ("window", 0),
        ("window", 2.0),
        ("softcap", 0.0),
        ("sinks", torch.zeros(3)),
    ],
)
def test_bad_arguments_are_named(name, value, plain):
    given = {
        "query": torch.zeros(3, 2, 8), "keys": torch.zeros(7, 3, 1, 8), "values": torch.zeros(7, 3, 1, 8),
        "blocks": torch.zeros(2, 4, dtype=torch.int32), "cu_query": int32(0, 2, 3), "lengths": int32(5, 7),
        "scale": None, "window": None, "softcap": None, "sinks": None,
    } | {name: value}  # fmt: skip
    module = sys.modules["hiper_fast.ops.paged_attention"]
    with pytest.raises(ValueError, match=f"^{name} must"):
        if plain:
            module._check(*given.values())
            module._run_reference(*given.values())
        ops.paged_attention(**given)
