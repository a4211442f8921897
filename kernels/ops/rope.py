"""Rotary position embeddings of query and key in one launch: a program turns all heads of one token.

out = x cos + (-second, first) sin, the halves of x being first and second;   back: the transpose of that
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels._launch import on_device
from hiper_fast.kernels._tuning import constants


@triton.jit
def _turn(
    x, out, heads, head_stride, half, cos_first, cos_second, sin_first, sin_second,
    HEADS: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, HALF)[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & (i < half)
        first = tl.load(x + head * head_stride + i, mask=inside, other=0.0).to(DTYPE)
        second = tl.load(x + head * head_stride + half + i, mask=inside, other=0.0).to(DTYPE)
        to = out + head * 2 * half + i
        tl.store(to, (first * cos_first - second * sin_first).to(dtype), mask=inside)
        tl.store(to + half, (second * cos_second + first * sin_second).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["heads", "key_heads", "tokens"])
def _kernel(
    query, key, cos, sin, out, key_out, heads, key_heads, tokens, half,
    batch_stride, head_stride, token_stride, key_batch_stride, key_head_stride, key_token_stride,
    SHARED: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    sequence, token = place // tokens, place % tokens
    i = tl.arange(0, HALF)[None, :]
    angle = (token if SHARED else place) * 2 * half + i
    cos_first = tl.load(cos + angle, mask=i < half, other=0.0).to(DTYPE)
    cos_second = tl.load(cos + angle + half, mask=i < half, other=0.0).to(DTYPE)
    sin_first = tl.load(sin + angle, mask=i < half, other=0.0).to(DTYPE)
    sin_second = tl.load(sin + angle + half, mask=i < half, other=0.0).to(DTYPE)
    if BACK:
        sin_first, sin_second = -sin_second, -sin_first
    _turn(
        query + sequence * batch_stride + token * token_stride, out + place * heads * 2 * half,
        heads, head_stride, half, cos_first, cos_second, sin_first, sin_second, HEADS, HALF, DTYPE,
    )  # fmt: skip
    _turn(
        key + sequence * key_batch_stride + token * key_token_stride, key_out + place * key_heads * 2 * half,
        key_heads, key_head_stride, half, cos_first, cos_second, sin_first, sin_second, KEY_HEADS, HALF, DTYPE,
    )  # fmt: skip


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, tokens, d = query.shape
    outs = [x.new_empty(batch, tokens, x.shape[1], d) for x in (query, key)]
    if batch * tokens * d:
        tile = constants("rope._kernel", query.device, HEADS=16, num_warps=4)
        with on_device(query):
            _kernel[(batch * tokens,)](
                query, key, cos, sin, *outs, heads, key.shape[1], tokens, d // 2,
                *query.stride()[:3], *key.stride()[:3], SHARED=len(cos) < batch, BACK=back,
                HEADS=_heads_block(heads, tile["HEADS"]), KEY_HEADS=_heads_block(key.shape[1], tile["HEADS"]),
                HALF=triton.next_power_of_2(d // 2), num_warps=tile["num_warps"],
                DTYPE=tl.float64 if query.dtype == torch.float64 else tl.float32, enable_fp_fusion=True,
            )  # fmt: skip
    return tuple(out.transpose(1, 2) for out in outs)


def _heads_block(heads: int, most: int) -> int:
    return min(most, triton.next_power_of_2(max(1, heads)))
