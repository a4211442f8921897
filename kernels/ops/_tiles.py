"""The head on Hopper by one persistent kernel: products in tiles, of which only what a row needs goes to memory.

    of a tile of x [128 rows, 256 columns], by halves, in float32, from the accumulator:
        peak = max x,  total = sum exp((x - peak) / temperature),  moment = sum exp(…) (x - peak)
        share = exp((x - peak) / temperature), of the inputs' dtype, where a gradient is wanted
    of a row, merged over its tiles:  peak, log_sum, logprob, entropy, as in _head.py; x[target] by a product of its own
    in place of the shares:  p = share exp((the tile's peak - peak) / temperature - log_sum), and the gradient

A share keeps its dtype's relative precision whatever the logit, which itself, stored in bfloat16, would at 20 be off by
0.06 and p by as many hundredths. At a tile's largest logit the share is 1, so that 1 - p is exact where p is
near 1. Gradients are rounded twice, where _head.py rounds once, and log-probs and entropies not at all.

Tensor descriptors load and store the tiles (TMA), `tl.dot` multiplies them (wgmma). Programs go through a chunk's row
tiles first: those that run at once share the same few tiles of the weight, which is read from memory once a chunk.
"""

import os
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hiper_fast.kernels import _errors, _head
from hiper_fast.kernels._head import _LOWEST, Head, _target
from hiper_fast.kernels._launch import count_processors, on_device
from hiper_fast.kernels._tuning import constants

HEAD = os.environ.get("HIPER_FAST_HEAD", "auto")
if HEAD not in ("auto", "cublas", "tma"):
    raise ValueError(f"HIPER_FAST_HEAD in the environment must be auto, cublas or tma, got {HEAD}")
_LOG2_E = tl.constexpr(1.4426950408889634)
_PROCESSORS = 2  # where there is no GPU: each goes on from tile to tile there too
_MOST_ROWS = 2048  # of a chunk: their hidden states stay in the cache


@triton.jit
def _store_half(
    x, shares, peaks, totals, moments, rows, row_start, column_start, vocabulary, tiles, sharpness,
    ENTROPY: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = x.shape[1]
    if column_start + COLUMNS > vocabulary:
        x = tl.where((column_start + tl.arange(0, COLUMNS) < vocabulary)[None, :], x, _LOWEST)
    peak = tl.maximum(tl.max(x, axis=1), _LOWEST)
    step = x - peak[:, None]
    share = tl.exp2(step * sharpness)
    row = row_start + tl.arange(0, x.shape[0])
    place = row * tiles + column_start // COLUMNS
    tl.store(peaks + place, peak, mask=row < rows)
    tl.store(totals + place, tl.sum(share, axis=1), mask=row < rows)
    if ENTROPY:
        finite = tl.maximum(step, _LOWEST)
        tl.store(moments + place, tl.sum(share * finite, axis=1), mask=row < rows)
    if KEEP:
        shares.store([row_start, column_start], share.to(shares.dtype))


@triton.jit(do_not_specialize=["first", "rows", "width", "vocabulary", "tiles"])
def _tile_kernel(
    hidden, weight, shares, peaks, totals, moments, first, rows, width, vocabulary, tiles,
    inverse_temperature: tl.float64, ENTROPY: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    sharpness = tl.full([], inverse_temperature * _LOG2_E, tl.float32)
    row_tiles = tl.cdiv(rows, ROWS)
    count = row_tiles * tl.cdiv(vocabulary, COLUMNS)
    # One loop with that over the width: a tile's first factors are on their way while the one before is finished.
    for tile in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
        row_start = tile % row_tiles * ROWS
        column_start = tile // row_tiles * COLUMNS
        x = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, width, DEPTH):
            rows_tile = hidden.load([first + row_start, k])
            x = tl.dot(rows_tile, weight.load([column_start, k]).T, x)
        # By halves, whose exponentials need fewer registers.
        halves = tl.reshape(x, [ROWS, 2, COLUMNS // 2]).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            _store_half(
                halves[half], shares, peaks, totals, moments, rows, row_start, column_start + half * (COLUMNS // 2),
                vocabulary, tiles, sharpness, ENTROPY, KEEP,
            )  # fmt: skip


@triton.jit
def _logit(hidden, weight, row, column, width, hidden_stride, weight_stride, BLOCK: tl.constexpr):
    hidden += row.to(tl.int64) * hidden_stride
    weight += column.to(tl.int64) * weight_stride
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        factor = tl.load(hidden + k, mask=k < width, other=0.0).to(tl.float32)
        total += factor * tl.load(weight + k, mask=k < width, other=0.0).to(tl.float32)
    x = tl.sum(total, axis=0)
    return tl.where(x < _LOWEST, _LOWEST, x)  # NaN stays NaN


@triton.jit(
    do_not_specialize=["first", "vocabulary", "tiles"],
    do_not_specialize_on_alignment=["targets", "logprobs", "entropies", "flags"],
)
def _merge_kernel(
    hidden, weight, tile_peaks, tile_totals, tile_moments, targets, peaks, log_sums, logprobs, entropies, flags,
    first, vocabulary, tiles, width, hidden_stride, weight_stride, inverse_temperature: tl.float64,
    ENTROPY: tl.constexpr, SLOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sharpness = tl.full([], inverse_temperature, tl.float32)
    tile = tl.arange(0, BLOCK)
    place = row * tiles + tile
    peak = tl.load(tile_peaks + place, mask=tile < tiles, other=_LOWEST)
    total = tl.load(tile_totals + place, mask=tile < tiles, other=0.0)
    highest = tl.max(peak, axis=0)
    step = peak - highest
    decay = tl.exp(step * sharpness)
    sum_all = tl.sum(total * decay, axis=0)
    log_sum = tl.log(sum_all)
    target = _target(targets, first + row, vocabulary, flags, SLOT)
    x = _logit(hidden, weight, first + row, target, width, hidden_stride, weight_stride, BLOCK)
    logprob = (x - highest) * sharpness - log_sum
    tl.store(peaks + row, highest)
    tl.store(log_sums + row, log_sum)
    # Rounding must not make a probability exceed 1: a positive log-prob can run away in PPO.
    tl.store(logprobs + first + row, tl.where(logprob > 0, 0.0, logprob))
    if ENTROPY:
        moment = tl.load(tile_moments + place, mask=tile < tiles, other=0.0)
        mean = tl.sum((moment + total * step) * decay, axis=0) / sum_all
        tl.store(entropies + first + row, log_sum - mean * sharpness)


@triton.jit(
    do_not_specialize=["first", "tiles"],
    do_not_specialize_on_alignment=["targets", "entropies", "grad_logprobs", "grad_entropies"],
)
def _gradient_kernel(
    shares, tile_peaks, targets, peaks, log_sums, entropies, grad_logprobs, grad_entropies,
    first, tiles, pitch, inverse_temperature: tl.float64,
    ENTROPY: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sharpness = tl.full([], inverse_temperature, tl.float32)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    place = shares + row.to(tl.int64) * pitch + column
    share = tl.load(place, mask=column < pitch, other=0.0).to(tl.float32)
    tile_peak = tl.load(tile_peaks + row * tiles + tile, mask=tile < tiles, other=_LOWEST)
    log_scale = (tile_peak - tl.load(peaks + row)) * sharpness - tl.load(log_sums + row)
    gradient = tl.load(grad_logprobs + first + row)
    slope = gradient
    if ENTROPY:
        log_p = tl.log(tl.maximum(share, 1e-30)) + log_scale[:, None]  # of 0 it is multiplied by 0
        slope += tl.load(grad_entropies + first + row) * (log_p + tl.load(entropies + first + row))
    at_target = tl.where(column == tl.load(targets + first + row), gradient, 0.0)
    result = at_target - share * tl.exp(log_scale)[:, None] * slope
    tl.store(place, (result * sharpness).to(shares.dtype.element_ty), mask=column < pitch)


class TiledHead(Head):
    """A Head whose chunks' gradients lie where their shares did, and are multiplied at once: no row is left out."""

    def _make_room(self, compact: bool) -> None:
        v, device, keep = self.vocabulary, self.hidden.device, any(self.needs)
        # With the factors of four steps on their way one program takes 225 of a processor's 227 KB of shared memory and
        # nearly all of its registers.
        self.tile = constants(
            "_tiles._tile_kernel", device, ROWS=128, COLUMNS=256, DEPTH=64, num_warps=8, num_stages=4,
        )  # fmt: skip
        fitting = _head.SCRATCH_BYTES // (self.pitch * self.hidden.element_size())
        most = min(_MOST_ROWS, fitting) if keep else _MOST_ROWS
        rows = self.tile["ROWS"]
        self.chunk = max(1, min(self.count, most // rows * rows or most))
        self.tiles = 2 * triton.cdiv(v, self.tile["COLUMNS"])  # halves
        self.rows = self.hidden.new_empty(self.chunk if keep else 0, self.pitch)
        numbers = self.hidden.new_empty(2 + 3 * self.tiles, self.chunk, dtype=torch.float32)
        self.peaks, self.log_sums = numbers[:2].unbind(0)
        self.parts = numbers[2:].view(3, self.chunk, self.tiles).unbind(0)

    def chunks(self) -> Iterator[slice]:
        """Slices of rows; their logits never are."""
        for start in range(0, self.count, self.chunk):
            yield slice(start, min(start + self.chunk, self.count))

    def statistics(self, part: slice, logprobs: Tensor, entropy: Tensor | None) -> None:
        """Writes logprobs[part] and entropy[part]."""
        rows, wanted = part.stop - part.start, {"ENTROPY": entropy is not None}
        count = triton.cdiv(rows, self.tile["ROWS"]) * self.tiles // 2
        of_merge = constants("_tiles._merge_kernel", self.hidden.device, num_warps=4)
        with on_device(self.peaks):
            _tile_kernel[(min(count, count_processors(self.hidden.device, _PROCESSORS)),)](
                *self._describe(), *self.parts,
                part.start, rows, self.hidden.shape[1], self.vocabulary, self.tiles, self.sharpness,
                KEEP=len(self.rows) > 0, **wanted, **self.tile, enable_fp_fusion=True,
            )  # fmt: skip
            _merge_kernel[(rows,)](
                self.hidden, self.weight, *self.parts, self.targets, self.peaks, self.log_sums,
                logprobs, entropy, _errors.flags(), part.start, self.vocabulary, self.tiles,
                self.hidden.shape[1], self.hidden.stride(0), self.weight.stride(0), self.sharpness,
                SLOT=_errors.TARGETS, BLOCK=triton.next_power_of_2(self.tiles), **wanted, **of_merge,
                enable_fp_fusion=True,
            )  # fmt: skip

    def _describe(self) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor | None]:
        """Tiles of the hidden states, the weight and the shares."""
        rows, columns, depth = (self.tile[name] for name in ("ROWS", "COLUMNS", "DEPTH"))
        shares = None
        if len(self.rows):
            shares = TensorDescriptor.from_tensor(self.rows, [rows, columns // 2])
        return (
            TensorDescriptor.from_tensor(self.hidden, [rows, depth]),
            TensorDescriptor.from_tensor(self.weight, [columns, depth]),
            shares,
        )

    def gradient(
        self,
        part: slice,
        entropy: Tensor | None,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        rows = part.stop - part.start
        # TILES: half tiles of a program.
        tile = constants("_tiles._gradient_kernel", self.hidden.device, TILES=32, num_warps=8)
        with on_device(self.peaks):
            _gradient_kernel[(rows, triton.cdiv(self.tiles, tile["TILES"]))](
                self.rows, self.parts[0], self.targets, self.peaks, self.log_sums, entropy,
                grad_logprobs, grad_entropy, part.start, self.tiles, self.pitch, self.sharpness,
                ENTROPY=grad_entropy is not None, COLUMNS=self.tile["COLUMNS"] // 2, **tile, enable_fp_fusion=True,
            )  # fmt: skip
        self.pending = rows
        self._multiply()


def make_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, softcap: float | None,
    needs: tuple[bool, bool, bool] = (False, False, False), scale: float = 1.0, compact: bool = False,
) -> Head:  # fmt: skip
    """A TiledHead where HIPER_FAST_HEAD, or else what was measured, asks for one and it can run; else a Head."""
    wanted = HEAD == "tma"
    if HEAD == "auto":
        wanted = constants("_tiles.head", hidden.device, TMA=False)["TMA"]
    plain = bias is None and softcap is None and not compact
    kind = TiledHead if wanted and plain and _fits(hidden, weight) else Head
    return kind(hidden, weight, bias, targets, temperature, softcap, needs, scale, compact)


def _fits(hidden: Tensor, weight: Tensor) -> bool:
    """Half precision, in rows that descriptors take, on Hopper: others have no wgmma, or too little shared memory."""
    hopper = not hidden.is_cuda or torch.cuda.get_device_capability(hidden.device)[0] == 9
    return hopper and hidden.dtype == weight.dtype and all(map(_is_described, (hidden, weight)))


def _is_described(matrix: Tensor) -> bool:
    in_half = matrix.dtype in (torch.bfloat16, torch.float16)
    in_rows = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] > 0
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 8 == 0
    return in_half and in_rows and aligned and len(matrix) > 0
