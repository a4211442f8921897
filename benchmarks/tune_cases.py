"""What benchmarks/tune.py tunes: the constants of each kernel's launch that it tries, and launches to try them on.

Each case is prepared at two sizes: `few` rows, with all of the kernel's options on, to be checked against the
reference, and as many as a step of Qwen2.5-1.5B has, to be timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from gpu_timing import differentiate_exactly
from torch import Tensor

from hiper_fast import bench
from hiper_fast.kernels._head import Head
from hiper_fast.kernels._tiles import TiledHead
from hiper_fast.kernels.find_roles import find_roles
from hiper_fast.kernels.gae import gae
from hiper_fast.kernels.hae import hae
from hiper_fast.kernels.linear_ppo import linear_ppo
from hiper_fast.kernels.normalize import normalize
from hiper_fast.kernels.paged_attention import paged_attention
from hiper_fast.kernels.ppo_loss import ppo_loss
from hiper_fast.kernels.rms_norm import rms_norm, rms_norm_backward
from hiper_fast.kernels.rope import rope
from hiper_fast.kernels.scale_gradients import scale_gradients
from hiper_fast.kernels.scatter_advantages import normalize_and_scatter
from hiper_fast.kernels.swiglu import swiglu, swiglu_backward
from hiper_fast.kernels.value_loss import value_loss
from hiper_fast.ops import HAE, reference

HIDDEN, INNER, VOCABULARY = 1536, 8960, 151_936  # of Qwen2.5-1.5B
HEADS, KV_HEADS, HEAD_SIZE = 12, 2, 128
TOKENS, CONTEXT, BLOCK = 8192, 768, 16  # of a microbatch; of a sequence; of a block of the pool
TURNS = 6400  # of a step
EPS, CAP, GAMMA = 2.0**-10, 32.0, 0.75


class Launch(NamedTuple):
    call: Callable[[], tuple[Tensor, ...]]
    expected: Callable[[], tuple[Tensor, ...]]  # the same in float64, by the reference


class Case(NamedTuple):
    kernel: str  # the table's name; behind a space, in which of its cases
    candidates: dict[str, tuple[int | bool, ...]]
    prepare: Callable[..., Launch]  # of (few, device, dtype)


class Draw:
    """Random tensors on a device, and in float64."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.to(dtype or self.dtype)

    def below(self, most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=self.generator, device=self.device)

    def prefix_sum(self, parts: int, each: int) -> Tensor:
        return torch.arange(parts + 1, dtype=torch.int32, device=self.device) * each


def differentiate(function: Callable, grads: tuple[Tensor, ...], *leaves: Tensor) -> tuple:
    """Gradients in float64."""
    return differentiate_exactly(function, grads, *leaves)[-len(leaves) :]


def prepare_swiglu(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    draw = Draw(device, dtype)
    gate, up = (draw.normal(9 if few else TOKENS, 80 if few else INNER) for _ in range(2))
    return Launch(
        lambda: (swiglu(gate, up),), lambda: (reference.swiglu(gate.double(), up.double()),)
    )


def prepare_swiglu_backward(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    draw = Draw(device, dtype)
    grad, *x = (draw.normal(9 if few else TOKENS, 80 if few else INNER) for _ in range(3))
    return Launch(
        lambda: swiglu_backward(grad, *x, True, True),
        lambda: differentiate(reference.swiglu, (grad,), *x),
    )


def prepare_norm(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    draw = Draw(device, dtype)
    x, weight = draw.normal(9 if few else TOKENS, HIDDEN), draw.normal(HIDDEN)
    return Launch(
        lambda: (rms_norm(x, weight, EPS),),
        lambda: (reference.rms_norm(x.double(), weight.double(), EPS),),
    )


def prepare_norm_backward(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    draw = Draw(device, dtype)
    grad, x = (draw.normal(9 if few else TOKENS, HIDDEN) for _ in range(2))
    weight = draw.normal(HIDDEN)
    return Launch(
        lambda: rms_norm_backward(grad, x, weight, EPS, True, True),
        lambda: differentiate(lambda x, w: reference.rms_norm(x, w, EPS), (grad,), x, weight),
    )


def prepare_rope(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    draw, tokens = Draw(device, dtype), 3 if few else TOKENS
    x = [draw.normal(1, tokens, heads, HEAD_SIZE).transpose(1, 2) for heads in (HEADS, KV_HEADS)]
    angles = [draw.normal(1, tokens, HEAD_SIZE) for _ in range(2)]
    return Launch(
        lambda: rope(*x, *angles, False),
        lambda: reference.rope(*(t.double() for t in (*x, *angles))),
    )


def prepare_statistics(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    head, x, bias = prepare_head(few, device, dtype)
    part = next(head.chunks())
    logprobs, entropy = head.logits.new_empty(2, len(head.targets)).unbind(0)

    def call():
        head.statistics(part, logprobs, entropy)
        return logprobs[part], entropy[part]

    def expected():
        inputs = (x[0][part].double(), x[1].double(), head.targets[part])
        return reference.linear_logprobs(*inputs, bias=bias, softcap=head.softcap, entropy=True)

    return Launch(call, expected)


def prepare_gradient(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    head, x, bias = prepare_head(few, device, dtype)
    part = next(head.chunks())
    slopes = Draw(device, head.logits.dtype).normal(2, len(head.targets)).unbind(0)
    logprobs, entropy = head.logits.new_empty(2, len(head.targets)).unbind(0)
    head.statistics(part, logprobs, entropy)

    def call():
        head.pending = 0
        head.gradient(part, entropy, *slopes)
        return (head.rows[: len(logprobs[part]), : head.vocabulary],)

    def from_logits(logits):
        identity = torch.eye(head.vocabulary, dtype=torch.float64, device=device)
        options = {"bias": bias, "softcap": head.softcap, "entropy": True}
        return reference.linear_logprobs(logits, identity, head.targets[part], **options)

    def expected():
        logits = x[0][part].double() @ x[1].double().T
        return differentiate(from_logits, tuple(slope[part] for slope in slopes), logits)

    return Launch(call, expected)


def prepare_head(few: bool, device: torch.device, dtype: torch.dtype):
    """A head of narrow hidden states, these and its weight, and its bias in float64; only few rows have one."""
    draw, rows, vocabulary = Draw(device, dtype), 5 if few else 512, 500 if few else VOCABULARY
    x = draw.normal(rows, 16), draw.normal(vocabulary, 16)
    bias, softcap = (draw.normal(vocabulary), CAP) if few else (None, None)
    targets = draw.below(vocabulary, rows)
    head = Head(*x, bias, targets, 1.0, softcap, (True, True, False))
    return head, x, bias if bias is None else bias.double()


def prepare_tiles(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    """The tiled head's product, and the gradient in its place: they share the tiles' width."""
    draw, rows = Draw(device, dtype), 9 if few else 1536
    vocabulary, width = (500, 16) if few else (VOCABULARY, HIDDEN)
    x = draw.normal(rows, width), draw.normal(vocabulary, width) / width**0.5
    targets, needs = draw.below(vocabulary, rows), (True, False, False)
    slopes = draw.normal(2, rows, dtype=torch.float32).unbind(0)

    def call():
        head = TiledHead(*x, None, targets, 1.0, None, needs)
        logprobs, entropy = head.peaks.new_empty(2, rows).unbind(0)
        for part in head.chunks():
            head.statistics(part, logprobs, entropy)
            head.gradient(part, entropy, *slopes)
        return logprobs, entropy, head.gradients()[0]

    def expected():
        def run(hidden):
            return reference.linear_logprobs(hidden, x[1].double(), targets, entropy=True)

        return *run(x[0].double()), *differentiate(run, slopes, x[0])

    return Launch(call, expected)


def prepare_scratch(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    draw, rows = Draw(device, dtype), 9 if few else TOKENS
    vocabulary, width = (500, 16) if few else (VOCABULARY, HIDDEN)
    hidden, weight = draw.normal(rows, width), draw.normal(vocabulary, width) / width**0.5
    targets = draw.below(vocabulary, rows)
    old, advantages = draw.normal(2, rows, dtype=torch.float32).unbind(0)

    def call():
        numbers = (1.0, None, 0.25, 0.25, 3.0, 0.0, 0.125, None)
        result = linear_ppo(
            hidden, weight, None, targets, old, advantages, None, *numbers, True, True, False
        )
        return result[0], *result[3:5]

    def expected():
        x = [t.double().requires_grad_() for t in (hidden, weight)]
        loss = reference.linear_ppo(
            *x, targets, old.double(), advantages.double(),
            clip_low=0.25, clip_high=0.25, dual_clip=3.0, kl_coef=0.0, entropy_coef=0.125,
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, x)

    return Launch(call, expected)


def prepare_attention(sequences: int, own: int) -> Callable[..., Launch]:
    """Of sequences of one length, `own` of whose tokens ask."""

    def prepare(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
        draw, count = Draw(device, dtype), 2 if few else sequences
        length = (288 if own == 1 else 48) if few else CONTEXT  # one token's keys are split
        asking, blocks = min(own, length), length // BLOCK
        query = draw.normal(count * asking, HEADS, HEAD_SIZE)
        pool = [draw.normal(count * blocks, BLOCK, KV_HEADS, HEAD_SIZE) for _ in range(2)]
        table = torch.randperm(count * blocks, generator=draw.generator, device=device)
        table = table.to(torch.int32).view(count, blocks)
        lengths = torch.full((count,), length, dtype=torch.int32, device=device)
        rest = table, draw.prefix_sum(count, asking), lengths

        def expected():
            given = (x.double() for x in (query, *pool))
            return (reference.paged_attention(*given, *rest),)

        return Launch(
            lambda: (paged_attention(query, *pool, *rest, None, None, None, None),), expected
        )

    return prepare


def prepare_scan(which: str, turns: int) -> Callable[..., Launch]:
    """Of trajectories of so many turns."""

    def prepare(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
        draw, trajectories = Draw(device, torch.float32), 2 if few else TURNS // turns
        rewards, low, high, of_switch = draw.normal(4, trajectories * turns).unbind(0)
        switch, ended = draw.normal(trajectories * turns) > 1, draw.normal(trajectories) > 0
        cu_turns = draw.prefix_sum(trajectories, turns)
        if which == "gae":
            inputs = rewards, low, ended, cu_turns
            return Launch(
                lambda: gae(*inputs, None, GAMMA, 0.5).unbind(0),
                lambda: reference.gae(*map(double, inputs), gamma=GAMMA, lambda_=0.5),
            )
        inputs = rewards, low, high, switch, ended, cu_turns
        options = {"gamma": GAMMA, "lambda_turn": 0.5, "lambda_segment": 0.5}

        def expected():
            found = reference.hae(*map(double, inputs), values_switch=of_switch.double(), **options)
            return found[:6]

        def call():
            given = (*inputs[:3], of_switch, *inputs[3:], None, None)
            return hae(*given, *options.values())[0].unbind(0)

        return Launch(call, expected)

    return prepare


def prepare_scatter(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    draw, turns, tokens = Draw(device, torch.float32), 20 if few else TURNS, 150 if few else 281
    levels, opens = draw.normal(3, turns), draw.normal(turns) > 1
    roles = 2 ** draw.below(3, turns * tokens).to(torch.uint8)
    rest = opens, roles, draw.prefix_sum(turns, tokens)

    def expected():
        low, high, switch = levels.double().unbind(0)
        credit = HAE(low, low, high, high, switch, switch, opens)
        return (reference.normalize_and_scatter(credit, *rest[1:])[0],)

    return Launch(lambda: (normalize_and_scatter(*levels, *rest)[0],), expected)


def double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def prepare_loss(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    draw, tokens = Draw(device, torch.float32), 50 if few else 1_800_000
    logprobs, old, advantages, ref, entropy = draw.normal(5, tokens).unbind(0)
    mask = draw.normal(tokens) > 0
    numbers = {
        "clip_low": 0.25, "clip_high": 0.25, "dual_clip": 3.0, "kl_coef": 0.125, "entropy_coef": 0.125,
    }  # fmt: skip

    def call():
        floats = logprobs, old, advantages, mask, ref, entropy
        loss, _, *grads = ppo_loss(*floats, *numbers.values(), 32.0, True)
        return loss, *grads

    def expected():
        leaves = [x.double().requires_grad_() for x in (logprobs, entropy)]
        loss = reference.ppo_loss(
            leaves[0], old.double(), advantages.double(), mask,
            ref_logprobs=ref.double(), entropy=leaves[1], **numbers, denominator=32.0,
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return Launch(call, expected)


def prepare_value_loss(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    draw, turns = Draw(device, torch.float32), 50 if few else TURNS
    values, old, returns = draw.normal(3, turns).unbind(0)
    mask = draw.normal(turns) > 0

    def call():
        loss, _, gradient = value_loss(values, old, returns, mask, 0.5, 32.0, True)
        return loss, gradient

    def expected():
        leaf, *given = (x.double() for x in (values, old, returns))
        leaf.requires_grad_()
        loss = reference.value_loss(leaf, *given, mask, clip=0.5, denominator=32.0)
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    return Launch(call, expected)


def prepare_normalize(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    draw, turns = Draw(device, torch.float32), 50 if few else TURNS
    values, mask = draw.normal(turns), draw.normal(turns) > 0
    return Launch(
        lambda: (normalize(values, mask, EPS),),
        lambda: (reference.normalize(values.double(), mask, EPS),),
    )


def prepare_roles(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    size = bench.SIZES["full"]._replace(
        **{"trajectories": 1, "turns": 1, "tokens": 40} if few else {}
    )
    ids, cu_tokens, pieces = bench.make_responses(size)
    given = ids.to(device), cu_tokens.to(device)
    return Launch(
        lambda: find_roles(*given, *pieces.on(device)),
        lambda: tuple(x.double() for x in reference.find_roles(*given, pieces)),
    )


def prepare_scaling(few: bool, device: torch.device, dtype: torch.dtype) -> Launch:
    """The head's gradient times -1, in place: any number of times."""
    draw = Draw(device, dtype)
    gradient, factor = (
        draw.normal(9008 if few else VOCABULARY * HIDDEN),
        -torch.ones((), device=device),
    )
    before = gradient[:9008].double()

    def call():
        scale_gradients([gradient], factor)
        return (gradient,)

    return Launch(call, lambda: (-before,))


TILES = {"BLOCK": (1024, 512, 2048, 4096), "num_warps": (4, 2, 8)}
ROWS = {"TILE": (2048, 4096, 8192), "OF_WARP": (512, 256, 1024)}
SCANS = {"1 x 64": 50, "1 x 256": 200, "1 x 1024": 800}  # turns of a trajectory

CASES = [
    Case("swiglu._forward_kernel", TILES, prepare_swiglu),
    Case("swiglu._backward_kernel", TILES, prepare_swiglu_backward),
    Case("rms_norm._forward_kernel", ROWS, prepare_norm),
    Case("rms_norm._backward_kernel", ROWS, prepare_norm_backward),
    Case("rms_norm.programs", {"PROGRAMS": (512, 256, 1024)}, prepare_norm_backward),
    Case("rope._kernel", {"HEADS": (16, 8, 4), "num_warps": (4, 1, 2, 8)}, prepare_rope),
    Case(
        "_head._statistics_kernel",
        {"BLOCK": (4096, 2048, 8192), "STAGES": (3, 2, 4), "num_warps": (8, 4, 16)},
        prepare_statistics,
    ),
    Case(
        "_head._gradient_kernel",
        {"BLOCK": (4096, 1024, 2048, 8192), "num_warps": (8, 4, 16)},
        prepare_gradient,
    ),
    Case("_head.scratch", {"SHARE": (3, 2, 4, 6)}, prepare_scratch),
    Case(
        "_tiles._tile_kernel",
        {"COLUMNS": (256, 128), "num_stages": (4, 2), "num_warps": (8, 4)},
        prepare_tiles,
    ),
    Case("_tiles._merge_kernel", {"num_warps": (4, 2, 8)}, prepare_tiles),
    Case("_tiles._gradient_kernel", {"TILES": (32, 16, 64), "num_warps": (8, 4)}, prepare_tiles),
    Case("_tiles.head", {"TMA": (False, True)}, prepare_scratch),
    Case(
        "paged_attention._kernel prompts",
        {"ROWS": (64, 32, 128), "KEYS": (64, 32, 128), "num_warps": (8, 4), "num_stages": (3, 2)},
        prepare_attention(8, CONTEXT),
    ),
    Case(
        "paged_attention._kernel steps",
        {"KEYS": (64, 32, 128), "num_warps": (4, 2, 8), "num_stages": (3, 2, 4)},
        prepare_attention(128, 1),
    ),
    Case("paged_attention.splits", {"LEAST_KEYS": (256, 128, 512)}, prepare_attention(8, 1)),
    Case("paged_attention._merge_kernel", {"num_warps": (4, 1, 2)}, prepare_attention(8, 1)),
    Case(
        "scatter_advantages._moments_kernel",
        {"TURNS": (32, 16, 64), "TOKENS": (128, 64, 256), "num_warps": (4, 2, 8)},
        prepare_scatter,
    ),
    Case(
        "scatter_advantages._scatter_kernel",
        {"TURNS": (8, 4, 16), "TOKENS": (128, 64, 256), "num_warps": (4, 2, 8)},
        prepare_scatter,
    ),
    Case("find_roles._kernel", {"BLOCK": (64, 32, 128), "num_warps": (1, 2)}, prepare_roles),
    Case("normalize._moments_kernel", TILES, prepare_normalize),
    Case("normalize._normalize_kernel", TILES, prepare_normalize),
    Case("_policy._terms_kernel", {"num_warps": (4, 2, 8)}, prepare_loss),
    Case("_total._finish_kernel", {"ROWS": (128, 64, 256, 512), "num_warps": (4, 8)}, prepare_loss),
    Case("value_loss._kernel", {"num_warps": (4, 2, 8)}, prepare_value_loss),
    Case(
        "scale_gradients._kernel",
        {"BLOCK": (4096, 2048, 8192), "PROGRAMS": (1024, 512, 2048), "num_warps": (8, 4)},
        prepare_scaling,
    ),
    *(
        Case(f"{which}._kernel {tile}", {"num_warps": warps}, prepare_scan(which, turns))
        for which in ("hae", "gae")
        for (tile, turns), warps in zip(SCANS.items(), ((1, 2), (2, 1, 4), (8, 4, 16)), strict=True)
    ),
]
