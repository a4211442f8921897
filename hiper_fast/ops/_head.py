"""What the linear ops share: the head's logits, a chunk of rows at a time, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hiper_fast.ops import _library
from hiper_fast.ops._library import FLOATS, check_vector
from hiper_fast.ops._numbers import check_above

# What is held beside arguments, results and gradients: one chunk of logits, which its own gradient
# replaces, and for a weight of half precision a tile of it in float32.
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29}
TILE_BYTES = 2**24
# Without gradients a block of logits, which stays in the caches between the product and what reads it. More rows
# would make it too narrow for the product.
BLOCK_BYTES, BLOCK_ROWS = 2**22, 1024


class Head:
    """logits = hidden @ weight.T + bias, soft-capped where asked, and the product's gradients summed over
    chunks; both in at least float32.

    Every product writes to a tensor that is given, which autocast leaves alone.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None = None,
        need_hidden=False,
        need_weight=False,
        need_bias=False,
    ):
        self.dtype = _library.widen(hidden.dtype)
        self.hidden, self.weight = hidden, weight  # [n, h], [v, h]
        self.bias = None if bias is None else cast(bias, self.dtype)  # [v]
        self.softcap = softcap
        self.grad_hidden = hidden.new_empty(hidden.shape) if need_hidden else None  # [n, h]
        self.grad_weight = (
            weight.new_empty(weight.shape, dtype=self.dtype) if need_weight else None
        )  # [v, h]
        self.grad_bias = (
            weight.new_zeros(weight.shape[0], dtype=self.dtype) if need_bias else None
        )  # [v]

    def iterate_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows with their logits [rows, v], which the caller may overwrite.

        All lie in one scratch buffer, of at most CHUNK_BYTES or one row. There is always a first chunk,
        where the sums of the gradients begin: without rows it is empty.
        """
        vocabulary = self.weight.shape[0]
        allowed = CHUNK_BYTES.get(self.hidden.device.type, CHUNK_BYTES["cpu"])
        parts = self._deal_rows(allowed // (vocabulary * self.dtype.itemsize))
        scratch = self._make_scratch(parts, vocabulary)
        for part in parts:
            logits = reshape(scratch, part, vocabulary)
            rows = cast(take(self.hidden, part), self.dtype)
            for tile, weight in self._iterate_tiles(vocabulary):
                self._multiply(rows, tile, weight, take(logits, tile, dim=1))
            yield part, logits

    def iterate_blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Slices of rows and of the vocabulary with their logits [rows, columns], which the caller may
        overwrite: for some rows all of the vocabulary in order, then for the next rows.

        All lie in one scratch buffer, of at most BLOCK_BYTES or one column.
        """
        parts = self._deal_rows(BLOCK_ROWS)
        most = max(1, parts[-1].stop - parts[-1].start)
        width = max(1, BLOCK_BYTES // (most * self.dtype.itemsize))
        scratch = self._make_scratch(parts, min(width, self.weight.shape[0]))
        for part in parts:
            rows = cast(take(self.hidden, part), self.dtype)
            for tile, weight in self._iterate_tiles(width):
                logits = reshape(scratch, part, tile.stop - tile.start)
                self._multiply(rows, tile, weight, logits)
                yield part, tile, logits

    def _deal_rows(self, most: int) -> list[slice]:
        """Slices of at most `most` rows, or one, as even as can be; the last is the longest."""
        rows = self.hidden.shape[0]
        count = max(1, math.ceil(rows / max(1, most)))
        return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]

    def _make_scratch(self, parts: list[slice], columns: int) -> Tensor:
        size = (parts[-1].stop - parts[-1].start) * columns
        return self.hidden.new_empty(size, dtype=self.dtype)

    def _multiply(self, rows: Tensor, tile: slice, weight: Tensor, logits: Tensor) -> None:
        if self.bias is None:
            torch.mm(rows, weight.T, out=logits)
        else:
            torch.addmm(take(self.bias, tile), rows, weight.T, out=logits)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def add_gradients(self, part: slice, live: Tensor | None, gradient: Tensor) -> None:
        """Adds what one chunk gives: `gradient` [k, v] is that of the product, before the cap, of `part`'s
        rows `live` [k] (None: of all of them); the other rows have none."""
        rows = cast(take(self.hidden, part), self.dtype)
        if live is not None:
            rows = rows[live]
        if self.grad_hidden is not None:
            self._write_grad_hidden(take(self.grad_hidden, part), live, gradient)
        if self.grad_bias is not None:
            self.grad_bias += gradient.sum(dim=0)
        if self.grad_weight is not None:
            self.grad_weight.addmm_(gradient.T, rows, beta=int(part.start > 0))

    def _write_grad_hidden(self, out: Tensor, live: Tensor | None, gradient: Tensor) -> None:
        whole = live is None and out.dtype == self.dtype
        grad_rows = (
            out if whole else out.new_empty((gradient.shape[0], out.shape[1]), dtype=self.dtype)
        )  # [k, h]
        for tile, weight in self._iterate_tiles(self.weight.shape[0]):
            grad_rows.addmm_(take(gradient, tile, dim=1), weight, beta=int(tile.start > 0))
        if live is not None:
            out.zero_()[live] = grad_rows.to(out.dtype)
        elif not whole:
            out.copy_(grad_rows)

    def collect_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden, weight and bias; empty where not needed."""
        found = (
            (self.grad_hidden, self.hidden.dtype),
            (self.grad_weight, self.dtype),
            (self.grad_bias, self.dtype),
        )
        return tuple(
            self.hidden.new_empty(0, dtype=dtype) if grad is None else grad for grad, dtype in found
        )

    def _iterate_tiles(self, most: int) -> Iterator[tuple[slice, Tensor]]:
        """Up to `most` rows of the weight at a time, in self.dtype: as they are, or fewer and a copy."""
        v, h = self.weight.shape
        if self.weight.dtype != self.dtype:
            most = max(1, min(most, TILE_BYTES // (max(1, h) * self.dtype.itemsize)))
        for start in range(0, v, most):
            tile = slice(start, min(start + most, v))
            yield tile, cast(take(self.weight, tile), self.dtype)


def reshape(scratch: Tensor, part: slice, columns: int) -> Tensor:
    """[rows of the part, columns], contiguous, at the beginning of a vector."""
    rows = part.stop - part.start
    return take(scratch, slice(0, rows * columns)).view(rows, columns)


def take(tensor: Tensor, part: slice, dim: int = 0) -> Tensor:
    """The part of a tensor; itself where that is all, since a view costs half a small product."""
    size = part.stop - part.start
    return tensor if size == tensor.shape[dim] else tensor.narrow(dim, part.start, size)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), which takes as long as a view where nothing changes."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def turn_into_gradient(
    scaled: Tensor,
    log_p: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    entropy: Tensor,
) -> None:
    """scaled = logits / temperature [rows, v], whose log-softmax is log_p, becomes the gradient of the
    product, before the cap, given those of each row's results; overwrites log_p."""
    # With p = softmax(z): d logprob / dz = onehot - p, d entropy / dz = -p (log p + entropy).
    factor = grad_logprobs[:, None]
    if grad_entropy is not None:
        factor = factor + grad_entropy[:, None] * (log_p + entropy[:, None])
    gradient = log_p.exp_().mul_(-factor)
    gradient.scatter_add_(1, targets[:, None], grad_logprobs[:, None]).div_(temperature)
    if softcap is None:
        scaled.copy_(gradient)
    else:  # d softcap tanh(x / softcap) / dx = 1 - (logits / softcap)^2
        scaled.mul_(temperature / softcap).square_().neg_().add_(1).mul_(gradient)


def compute_statistics(
    logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's log-softmax [rows, v], target's log-prob (at most 0) and entropy; divides `logits` by
    the temperature."""
    log_p = torch.log_softmax(logits.div_(temperature), dim=1)
    # Rounding must not make a probability exceed 1: a positive log-prob can run away in PPO.
    logprobs = log_p.gather(1, targets[:, None]).squeeze(1).clamp_(max=0)
    return log_p, logprobs, log_p.exp().mul_(log_p).sum(dim=1).neg_()


def fake_gradients(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
):
    dtype = _library.widen(hidden.dtype)
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0, dtype=dtype),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=dtype),
    )


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """All of `targets` lie in [0, vocabulary). On a GPU this waits for what is queued there."""
    if targets.numel():
        low, high = (int(x) for x in torch.aminmax(targets))
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"targets must lie in [0, {vocabulary}), got {low if low < 0 else high}"
            )


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    *_,
) -> None:
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if not isinstance(matrix, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(matrix).__name__}")
        if matrix.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {list(matrix.shape)}")
        if matrix.dtype not in FLOATS:
            raise ValueError(f"{name} must be of a floating dtype, got {matrix.dtype}")
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one row")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must have shape [v, {hidden.shape[1]}] like hidden, got {list(weight.shape)}"
        )
    if weight.device != hidden.device:
        raise ValueError(f"weight must be on {hidden.device} like hidden, got {weight.device}")
    check_vector("targets", targets, hidden.shape[0], (torch.int64,), hidden.device)
    if bias is not None:
        check_vector("bias", bias, weight.shape[0], FLOATS, hidden.device)
    check_above("temperature", temperature, 0)
    if softcap is not None:
        check_above("softcap", softcap, 0, ", or None for no cap")
