"""The language-model head, a chunk of rows at a time: logits, what each row needs of them, and the gradients back.

    x = hidden @ weight.T + bias,   with a cap x = softcap tanh((hidden @ weight.T + bias) / softcap)
    z = x / temperature;   per row peak = max z, log_sum = log sum exp(z - peak),
    log p = z - peak - log_sum,   logprob = log p[target],   entropy = -sum p log p
    d logprob / d z = onehot - p,   d entropy / d z = -p (log p + entropy),   d x / d product = 1 - (x / softcap)^2

The products are torch's (cuBLAS); what lies between them are two row kernels:

    logits [chunk, v], float32  --statistics-->  logprob, entropy  --the caller's loss-->  their gradients
                                --gradient-->    rows appended to [capacity, v] of the inputs' dtype
    when that is full: grad_hidden = rows @ weight, grad_weight += rows.T @ hidden (float32), grad_bias += rows.sum(0)

Logits are float32 also for half-precision inputs: rounded to bfloat16 a log-prob of -20 would be off by up to 0.06,
which PPO's ratio of two of them does not forgive. Gradients of logits are of the inputs' dtype. The second buffer is
the larger one, for grad_weight (float32, [v, h]) is read and written once each time that it is full.

Rows whose gradient is exactly 0 (with `compact`) are not appended: a prefix sum on the GPU gives each row its place.
The host learns how many there are when the buffer may be full, by the only wait for the GPU there is, one to four times
for each filling. Where rows cannot be 0, and under CUDA graph capture, the host knows the number and never waits; the
kernels are the same, so that a call before the capture has compiled all that it launches.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels import _errors
from hiper_fast.kernels._launch import is_capturing, on_device, wide
from hiper_fast.kernels._tuning import constants

SCRATCH_BYTES = 480_000_000  # both buffers together
_SHARE = 3  # one in so many of them for logits, where there are gradients
_LOWEST = tl.constexpr(
    -1e30
)  # stands for minus infinity, so that no infinity is subtracted from another


@triton.jit
def tanh(x):
    size = tl.abs(x)
    near = size < 0.5
    # By e^-2x alone it would lose its digits near 0. There: Lambert's continued fraction, exact to float64's last.
    y = tl.where(near, x, 0.0)
    s = y * y
    e = tl.exp(-2.0 * size)
    far = tl.where(x < 0, e - 1.0, 1.0 - e)
    above = tl.where(near, y * (135135.0 + s * (17325.0 + s * (378.0 + s))), far)
    below = tl.where(near, 135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0)), 1.0 + e)
    return above / below


@triton.jit
def _logits(
    logits, bias, column, vocabulary, pitch, softcap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr
):
    # The pitch is a multiple of 16, which makes the loads vectors; the vocabulary need not be one.
    x = tl.load(logits + column, mask=column < pitch, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=column < pitch, other=0.0)
    if CAPPED:
        cap = tl.full([], softcap, x.dtype)
        x = cap * tanh(x * (1.0 / cap))
    x = tl.where(column < vocabulary, x, _LOWEST)
    return tl.where(x < _LOWEST, _LOWEST, x)  # NaN stays NaN


@triton.jit
def _target(targets, row, vocabulary, flags, SLOT: tl.constexpr):
    target = tl.load(targets + row)
    if (target < 0) | (target >= vocabulary):
        tl.store(flags + SLOT, 1)
    return tl.minimum(tl.maximum(target, 0), vocabulary - 1)


# Each row's own numbers may lie anywhere, and nothing is to be compiled for where they do.
@triton.jit(
    do_not_specialize=["first", "vocabulary"],
    do_not_specialize_on_alignment=[
        "targets", "peaks", "log_sums", "logprobs", "entropies", "flags",
    ],
)  # fmt: skip
def _statistics_kernel(
    logits, bias, targets, peaks, log_sums, logprobs, entropies, flags, first, vocabulary, pitch,
    inverse_temperature: tl.float64, softcap: tl.float64,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr, SLOT: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * pitch
    dtype: tl.constexpr = logits.dtype.element_ty
    sharpness = tl.full([], inverse_temperature, dtype)
    # Each lane keeps its own peak, sum of exp(x - peak) and, for the entropy, sum of exp(x - peak) (x - peak).
    peak = tl.full([BLOCK], _LOWEST, dtype)
    total = tl.zeros([BLOCK], dtype)
    moment = tl.zeros([BLOCK], dtype)
    # From the last column to the first: the product wrote the last ones last, and the gradient begins with the first,
    # so that both find a part of their logits in the cache.
    blocks = tl.cdiv(vocabulary, BLOCK)
    for i in tl.range(0, blocks, num_stages=STAGES):
        column = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        x = _logits(logits, bias, column, vocabulary, pitch, softcap, HAS_BIAS, CAPPED)
        step = x - peak
        higher = step > 0
        decay = tl.exp(-tl.abs(step) * sharpness)
        if ENTROPY:
            moment = tl.where(higher, decay * (moment - total * step), moment + decay * step)
        total = tl.where(higher, total * decay + 1, total + decay)
        peak = tl.where(higher, x, peak)

    highest = tl.max(peak, axis=0)
    step = peak - highest
    decay = tl.exp(step * sharpness)
    sum_all = tl.sum(total * decay, axis=0)
    log_sum = tl.log(sum_all)
    target = _target(targets, first + row, vocabulary, flags, SLOT)
    chosen = _logits(logits, bias, target, vocabulary, pitch, softcap, HAS_BIAS, CAPPED)
    logprob = (chosen - highest) * sharpness - log_sum
    tl.store(peaks + row, highest)
    tl.store(log_sums + row, log_sum)
    # Rounding must not make a probability exceed 1: a positive log-prob can run away in PPO.
    tl.store(logprobs + first + row, tl.where(logprob > 0, 0.0, logprob))
    if ENTROPY:
        mean = tl.sum((moment + total * step) * decay, axis=0) / sum_all
        tl.store(entropies + first + row, log_sum - mean * sharpness)


@triton.jit(
    do_not_specialize=["compact", "first", "place", "vocabulary"],
    do_not_specialize_on_alignment=[
        "targets", "peaks", "log_sums", "entropies", "grad_logprobs", "grad_entropies", "places", "index", "flags",
    ],
)  # fmt: skip
def _gradient_kernel(
    logits, bias, targets, peaks, log_sums, entropies, grad_logprobs, grad_entropies, places, index, out, flags,
    compact, first, place, vocabulary, pitch, inverse_temperature: tl.float64, softcap: tl.float64,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
    SLOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    block = tl.program_id(1)
    gradient = tl.load(grad_logprobs + first + row)
    if (compact != 0) & (gradient == 0):
        return
    compacted = tl.load(places + row, mask=compact != 0, other=0) - 1
    place = tl.where(compact != 0, compacted, place + row)
    tl.store(index + place, (first + row).to(tl.int64), mask=(compact != 0) & (block == 0))
    logits += row.to(tl.int64) * pitch
    out += place.to(tl.int64) * pitch
    dtype: tl.constexpr = logits.dtype.element_ty
    sharpness = tl.full([], inverse_temperature, dtype)
    column = block * BLOCK + tl.arange(0, BLOCK)
    x = _logits(logits, bias, column, vocabulary, pitch, softcap, HAS_BIAS, CAPPED)
    log_p = (x - tl.load(peaks + row)) * sharpness - tl.load(log_sums + row)
    target = _target(targets, first + row, vocabulary, flags, SLOT)
    share = gradient
    if ENTROPY:
        share += tl.load(grad_entropies + first + row) * (log_p + tl.load(entropies + first + row))
    result = tl.where(column == target, gradient, 0.0) - tl.exp(log_p) * share
    if CAPPED:
        part = tl.where(column < vocabulary, x, 0.0) * (1.0 / tl.full([], softcap, dtype))
        result *= 1.0 - part * part
    tl.store(out + column, (result * sharpness).to(out.dtype.element_ty), mask=column < pitch)


def product(out: Tensor, a: Tensor, b: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> None:
    """out = beta out + alpha a @ b; a float32 `out` of half-precision factors is summed and written in float32."""
    into = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out, **into)


class Head:
    """Logits of chunks of rows, and the gradients of `scale` times a sum of a loss over the rows.

    Per slice of `chunks()` first `statistics`, then, if gradients are needed, `gradient`; in the end `gradients`.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        softcap: float | None, needs: tuple[bool, bool, bool] = (False, False, False), scale: float = 1.0,
        compact: bool = False,
    ):  # fmt: skip
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        self.hidden, self.weight, self.targets = (
            hidden.to(dtype),
            weight.to(dtype),
            targets.contiguous(),
        )
        self.given = hidden.dtype  # results are of it, whatever the weight's
        self.needs, self.scale, self.sharpness = needs, scale, 1.0 / temperature
        self.softcap = softcap
        self.compact = compact and not is_capturing(hidden)

        self.count, self.vocabulary = hidden.shape[0], weight.shape[0]
        self.pitch = triton.cdiv(self.vocabulary, 16) * 16  # aligned rows
        self.bias = None
        if bias is not None:
            self.bias = bias.new_zeros(self.pitch, dtype=wide(dtype))
            self.bias[: self.vocabulary] = bias
        self._make_room(compact)
        self.begun = False  # grad_weight holds a sum
        self.first = 0  # row of hidden of the first pending row
        self.pending = 0  # rows that wait for the products; with compact at most so many
        self.places = torch.zeros(
            1, dtype=torch.int32, device=hidden.device
        )  # its last: how many are pending

        need_hidden, need_weight, need_bias = needs
        new = torch.zeros_like if self.compact else torch.empty_like
        self.grad_hidden = new(self.hidden if need_hidden else hidden[:0, 0])
        self.grad_weight = weight.new_empty(weight.shape if need_weight else 0, dtype=wide(dtype))
        self.grad_bias = weight.new_zeros(self.vocabulary if need_bias else 0, dtype=wide(dtype))

    def _make_room(self, compact: bool) -> None:
        """For a chunk's logits, for its rows' numbers, and for the gradients that wait."""
        dtype = self.hidden.dtype
        share = constants("_head.scratch", self.hidden.device, SHARE=_SHARE)["SHARE"]
        self.chunk, capacity = row_counts(self.count, self.pitch, dtype, any(self.needs), share)
        self.logits = self.hidden.new_empty(self.chunk, self.pitch, dtype=wide(dtype))
        self.logits[:, self.vocabulary :] = 0  # read, though nothing depends on it
        self.peaks, self.log_sums = self.logits.new_empty(2, self.chunk).unbind(0)
        self.rows = self.hidden.new_empty(capacity, self.pitch)
        self.index = self.targets.new_empty(capacity if compact else 0)

    def chunks(self) -> Iterator[slice]:
        """Slices of rows, each after its logits were made."""
        for start in range(0, self.count, self.chunk):
            part = slice(start, min(start + self.chunk, self.count))
            logits = self.logits[: part.stop - part.start, : self.vocabulary]
            product(logits, self.hidden[part], self.weight.T)
            yield part

    def statistics(self, part: slice, logprobs: Tensor, entropy: Tensor | None) -> None:
        """Writes logprobs[part] and entropy[part]."""
        # STAGES: blocks of a row on their way at once.
        tile = self._tile("_head._statistics_kernel", BLOCK=4096, STAGES=3, num_warps=8)
        with on_device(self.logits):
            _statistics_kernel[(part.stop - part.start,)](
                self.logits, self.bias, self.targets, self.peaks, self.log_sums, logprobs, entropy, _errors.flags(),
                part.start, self.vocabulary, self.pitch, self.sharpness, self.softcap or 0.0,
                HAS_BIAS=self.bias is not None, CAPPED=self.softcap is not None, ENTROPY=entropy is not None,
                SLOT=_errors.TARGETS, **tile, enable_fp_fusion=True,
            )  # fmt: skip

    def gradient(
        self,
        part: slice,
        entropy: Tensor | None,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        """Takes in the gradients of part's log-probs and entropies; all vectors are over all rows."""
        rows = part.stop - part.start
        if self.pending + rows > len(self.rows):
            self.pending = self._pending()
        if self.pending + rows > len(self.rows):
            self._multiply()
        if self.compact:
            self.places = torch.cumsum(grad_logprobs[part] != 0, 0, dtype=torch.int32).add_(
                self.places[-1]
            )
        tile = self._tile("_head._gradient_kernel", BLOCK=4096, num_warps=8)
        with on_device(self.logits):
            _gradient_kernel[(rows, triton.cdiv(self.vocabulary, tile["BLOCK"]))](
                self.logits, self.bias, self.targets, self.peaks, self.log_sums, entropy, grad_logprobs, grad_entropy,
                self.places, self.index, self.rows, _errors.flags(),
                int(self.compact), part.start, self.pending, self.vocabulary, self.pitch,
                self.sharpness, self.softcap or 0.0,
                HAS_BIAS=self.bias is not None, CAPPED=self.softcap is not None, ENTROPY=grad_entropy is not None,
                SLOT=_errors.TARGETS, **tile, enable_fp_fusion=True,
            )  # fmt: skip
        self.pending += rows

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias; empty where not needed."""
        self.pending = self._pending()
        self._multiply()
        grad_weight, of_sums = self.grad_weight, wide(self.given)
        if not self.begun:
            grad_weight.zero_()
        return (
            self.grad_hidden.to(self.given),
            grad_weight.to(of_sums),
            self.grad_bias.to(of_sums),
        )

    def _tile(self, kernel: str, **defaults: int) -> dict[str, int]:
        """The kernel's constants; BLOCK is float32 logits, or as many bytes of float64 ones."""
        tile = constants(kernel, self.logits.device, **defaults)
        return tile | {"BLOCK": 4 * tile["BLOCK"] // self.logits.element_size()}

    def _pending(self) -> int:
        return int(self.places[-1]) if self.compact else self.pending

    def _multiply(self) -> None:
        count, (need_hidden, need_weight, need_bias) = self.pending, self.needs
        if not count:
            return
        rows = self.rows[:count, : self.vocabulary]
        chosen = slice(self.first, self.first + count)
        if self.compact:
            chosen = self.index[:count]
        if need_hidden:
            # Sums over the whole vocabulary, perhaps in several parts: those too are added in float32.
            grad_hidden = self.hidden.new_empty(count, self.hidden.shape[1], dtype=self.peaks.dtype)
            product(grad_hidden, rows, self.weight, alpha=self.scale)
            self.grad_hidden[chosen] = grad_hidden.to(self.grad_hidden.dtype)
        if need_weight:
            product(
                self.grad_weight, rows.T, self.hidden[chosen],
                beta=float(self.begun), alpha=self.scale,
            )  # fmt: skip
        if need_bias:
            self.grad_bias.add_(rows.sum(dim=0, dtype=self.grad_bias.dtype), alpha=self.scale)
        self.begun, self.first, self.pending = True, self.first + count, 0
        self.places = torch.zeros_like(self.places[-1:])


def row_counts(
    rows: int, pitch: int, dtype: torch.dtype, gradients: bool, share: int = _SHARE
) -> tuple[int, int]:
    """(rows of a chunk of logits, rows of the buffer of gradients): as many as SCRATCH_BYTES hold, at least one."""

    def fitting(room: int, row: int, step: int) -> int:
        most = max(1, room // row)
        return most - most % step if most > step else most

    logits = pitch * wide(dtype).itemsize
    chunk = fitting(SCRATCH_BYTES // share if gradients else SCRATCH_BYTES, logits, 128)
    capacity = (
        fitting(SCRATCH_BYTES - chunk * logits, pitch * dtype.itemsize, chunk) if gradients else 0
    )
    chunk = max(1, min(chunk, rows))
    return chunk, max(chunk, min(capacity, rows)) if gradients else 0
