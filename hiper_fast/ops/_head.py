"""What the linear ops share: the head's logits, a chunk of rows at a time, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hiper_fast.ops import _library
from hiper_fast.ops._library import FLOATS, check_vector
from hiper_fast.ops._numbers import check_above

# What is held beside arguments, results and gradients: one chunk of logits, and for a weight of half precision a tile
# of it in float32.
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29}
TILE_BYTES = 2**24
# The C++ kernels read and write logits by blocks, a tile of the vocabulary for some rows, which stay in the caches from
# one product to the next. More rows would make blocks too narrow for the products.
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

    @property
    def needs_any(self) -> bool:
        return any(x is not None for x in (self.grad_hidden, self.grad_weight, self.grad_bias))

    def iterate_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows with their logits [rows, v], which the caller may overwrite.

        All lie in one scratch buffer, of at most CHUNK_BYTES or one row. There is always a first chunk,
        where the sums of the gradients begin: without rows it is empty.
        """
        vocabulary = self.weight.shape[0]
        parts = self._deal_rows(self._count_chunk_rows())
        scratch = self._make_scratch(count_rows(parts), vocabulary)
        for part in parts:
            logits = find_matrix(scratch, part.stop - part.start, vocabulary)
            rows = cast(take(self.hidden, part), self.dtype)
            for tile in self.iterate_tiles(vocabulary):
                self.multiply(rows, tile, take(logits, tile, dim=1))
            yield part, logits

    def iterate_blocks(self, *, keep: bool) -> Iterator[Blocks]:
        """Blocks of all logits, some rows after the other.

        Where they need not be kept until the next rows they lie in one scratch buffer, of at most BLOCK_BYTES or one
        column. Else those of all rows lie in the weight's gradient, each where its own is summed to in the end, if that
        is wanted and has room for them; or in a scratch buffer, of at most CHUNK_BYTES or one row.
        """
        (n, h), vocabulary = self.hidden.shape, self.weight.shape[0]
        inside = keep and self.grad_weight is not None and n <= h
        most = min(BLOCK_ROWS, self._count_chunk_rows()) if keep else BLOCK_ROWS
        parts = self._deal_rows(n if inside else most)
        rows = count_rows(parts)
        width = min(vocabulary, max(1, BLOCK_BYTES // (max(1, rows) * self.dtype.itemsize)))
        if inside:
            room, pitch = self.grad_weight.view(-1), h
        elif keep:
            room, pitch = self._make_scratch(rows, vocabulary), rows
        else:
            room, pitch = self._make_scratch(rows, width), 0
        for part in parts:
            yield Blocks(self, part, width, room, pitch)

    def _count_chunk_rows(self) -> int:
        allowed = CHUNK_BYTES.get(self.hidden.device.type, CHUNK_BYTES["cpu"])
        return allowed // (self.weight.shape[0] * self.dtype.itemsize)

    def _deal_rows(self, most: int) -> list[slice]:
        """Slices of at most `most` rows, or one, as even as can be, the last being the longest."""
        rows = self.hidden.shape[0]
        count = max(1, math.ceil(rows / max(1, most)))
        return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]

    def _make_scratch(self, rows: int, columns: int) -> Tensor:
        return self.hidden.new_empty(rows * columns, dtype=self.dtype)

    def multiply(self, rows: Tensor, tile: slice, logits: Tensor) -> None:
        """rows [rows, h] by a tile of the vocabulary, into `logits` [rows, columns]."""
        weight = self._take_weight(tile)
        if self.bias is None:
            torch.mm(rows, weight.T, out=logits)
        else:
            torch.addmm(take(self.bias, tile), rows, weight.T, out=logits)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def add_gradients(
        self, part: slice, live: Tensor | None, width: int, differentiate: Callable[[slice], Tensor]
    ) -> None:
        """Adds what some rows give: `differentiate` makes the gradient [k, columns] of the product, before the cap, by
        a tile of up to `width` of the vocabulary, of `part`'s rows `live` [k] (None: of all of them); the other rows
        have none."""
        rows = cast(take(self.hidden, part), self.dtype)
        if live is not None:
            rows = rows[live]
        grad_rows = self._find_grad_rows(part, live, rows)
        for tile in self.iterate_tiles(width):
            gradient = differentiate(tile)
            if grad_rows is not None:
                grad_rows.addmm_(gradient, self._take_weight(tile), beta=int(tile.start > 0))
            if self.grad_bias is not None:
                take(self.grad_bias, tile).add_(gradient.sum(dim=0))
            if self.grad_weight is not None:
                take(self.grad_weight, tile).addmm_(gradient.T, rows, beta=int(part.start > 0))
        if grad_rows is None:
            return
        out = take(self.grad_hidden, part)
        if live is not None:
            out.zero_()[live] = grad_rows.to(out.dtype)
        elif out.dtype != self.dtype:
            out.copy_(grad_rows)

    def add_chunk_gradients(self, part: slice, gradient: Tensor) -> None:
        """The same with the gradient [rows, v] of all of a chunk's logits."""
        self.add_gradients(
            part, None, self.weight.shape[0], lambda tile: take(gradient, tile, dim=1)
        )

    def _find_grad_rows(self, part: slice, live: Tensor | None, rows: Tensor) -> Tensor | None:
        """Where those rows' gradient is summed: their place in grad_hidden, or a scratch buffer."""
        if self.grad_hidden is None:
            return None
        whole = live is None and self.grad_hidden.dtype == self.dtype
        return take(self.grad_hidden, part) if whole else torch.empty_like(rows)

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

    def iterate_tiles(self, most: int) -> Iterator[slice]:
        """Up to `most` rows of the weight at a time, or fewer where they must be copied to be of self.dtype."""
        v, h = self.weight.shape
        if self.weight.dtype != self.dtype:
            most = max(1, min(most, TILE_BYTES // (max(1, h) * self.dtype.itemsize)))
        for start in range(0, v, most):
            yield slice(start, min(start + most, v))

    def _take_weight(self, tile: slice) -> Tensor:
        return cast(take(self.weight, tile), self.dtype)


class Blocks:
    """The logits of `part`, some rows of a head, by tiles of the vocabulary: each block [rows, columns] contiguous,
    `pitch` numbers for a column further on in `room` (0: all in one place)."""

    def __init__(self, head: Head, part: slice, width: int, room: Tensor, pitch: int):
        self.head, self.part, self.width, self.room, self.pitch = head, part, width, room, pitch
        self.rows = part.stop - part.start

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Makes one after the other."""
        rows = cast(take(self.head.hidden, self.part), self.head.dtype)
        for tile in self.head.iterate_tiles(self.width):
            logits = self.take(tile)
            self.head.multiply(rows, tile, logits)
            yield tile, logits

    def take(self, tile: slice) -> Tensor:
        columns = tile.stop - tile.start
        return find_matrix(self.room, self.rows, columns, first=tile.start * self.pitch)


def count_rows(parts: list[slice]) -> int:
    """The most that a part has: the last one is the longest."""
    return parts[-1].stop - parts[-1].start


def find_matrix(vector: Tensor, rows: int, columns: int, first: int = 0) -> Tensor:
    """[rows, columns], contiguous, of the elements of a vector from `first` on."""
    return take(vector, slice(first, first + rows * columns)).view(rows, columns)


def take(tensor: Tensor, part: slice, dim: int = 0) -> Tensor:
    """The part of a tensor; itself where that is all, since a view costs half a small product."""
    size = part.stop - part.start
    return tensor if size == tensor.shape[dim] else tensor.narrow(dim, part.start, size)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), which takes as long as a view where nothing changes."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def compute_statistics_cpp(
    blocks: Blocks, targets: Tensor, temperature: float, logprobs: Tensor, entropy: Tensor | None
) -> Tensor:
    """Writes each row's log-prob of its target, at most 0, and entropy, block by block; returns what the gradient of
    its logits needs to know of all of them, float64 [rows, 4], the last of it the log-prob."""
    sums = logprobs.new_empty((blocks.rows, 4), dtype=torch.float64)
    kernel = _library.find_kernel("linear_logprobs", blocks.head.dtype)
    vocabulary, threads = blocks.head.weight.shape[0], torch.get_num_threads()
    for tile, logits in blocks:
        kernel(
            logits.data_ptr(), targets.data_ptr(), *logits.shape, tile.start, vocabulary, temperature, sums.data_ptr(),
            logprobs.data_ptr(), _library.find_address(entropy), threads,
        )  # fmt: skip
    return sums


def add_gradients_cpp(
    blocks: Blocks,
    targets: Tensor,
    temperature: float,
    sums: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """Adds to the head's gradients what those of each row's log-prob and entropy [rows] make of them; rows without any
    are left out of the products."""
    head, live = blocks.head, None
    moves = (
        grad_logprobs != 0 if grad_entropy is None else (grad_logprobs != 0) | (grad_entropy != 0)
    )
    if not moves.all():
        live = moves.nonzero().squeeze(1)
    kept = blocks.rows if live is None else len(live)
    scratch = sums.new_empty(kept * blocks.width, dtype=head.dtype)
    kernel = _library.find_kernel("linear_logprobs_backward", head.dtype)

    def differentiate(tile: slice) -> Tensor:
        out = find_matrix(scratch, kept, tile.stop - tile.start)
        kernel(
            blocks.take(tile).data_ptr(), targets.data_ptr(), _library.find_address(live), *out.shape, tile.start,
            temperature, head.softcap, sums.data_ptr(), grad_logprobs.data_ptr(), _library.find_address(grad_entropy),
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    head.add_gradients(blocks.part, live, blocks.width, differentiate)


def check_targets_cpp(targets: Tensor, vocabulary: int) -> Tensor:
    """Contiguous; all of them lie in [0, vocabulary)."""
    targets = targets.contiguous()
    _library.extension.check_targets(targets.data_ptr(), targets.shape[0], vocabulary)
    return targets


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
