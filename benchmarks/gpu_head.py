"""benchmarks/gpu.py's figures of the head: linear_ppo beside torch and peers, its memory, and where its time goes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_timing import Case, assert_near_in_norm, milliseconds
from torch import Tensor

from hiper_fast import ops
from hiper_fast.ops._ppo import ppo_terms

CHECKED = 1024  # rows that results are compared on: with all logits of all rows torch takes 50 GB

Call = Callable[[], tuple[Tensor, ...]]


class Rows:
    """A microbatch of n loss rows at a head of width h over v tokens; `clipped`: that share is beyond the clip."""

    def __init__(self, n: int, h: int, v: int, device: str, clipped: float = 0.0):
        g = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=g, device=device)).to(dtype)

        self.n, self.h, self.v, self.device, self.clipped = n, h, v, device, clipped
        self.hidden = normal(n, h).requires_grad_()
        self.weight = normal(v, h, scale=2 / h**0.5).requires_grad_()
        self.targets = torch.randint(0, v, (n,), generator=g, device=device)
        now = ops.linear_logprobs(self.hidden.detach(), self.weight.detach(), self.targets)
        noise = torch.randn(n, generator=g, device=device)
        self.ref = now + 0.1 * noise
        # Advantages above 0, so that a ratio of e is clipped and one of exp(±0.05) is not.
        self.advantages = 0.5 + torch.rand(n, generator=g, device=device)
        is_clipped = torch.arange(n, device=device) < clipped * n
        order = torch.randperm(n, generator=g, device=device)
        self.old = torch.where(is_clipped[order], now - 1, now + 0.05 * noise)

    def few(self) -> Rows:
        return Rows(min(self.n, CHECKED), self.h, self.v, self.device, self.clipped)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.weight))

    def loss(
        self, logprobs: Tensor, entropy: Tensor | None, kl_coef: float, entropy_coef: float
    ) -> Tensor:
        mask = torch.ones_like(self.targets, dtype=torch.bool)
        ref = self.ref if kl_coef else None
        return ppo_terms(
            logprobs, self.old, self.advantages, mask, ref, entropy,
            0.2, 0.2, 3.0, kl_coef, entropy_coef, None, False,
        )[0]  # fmt: skip


def list_implementations(rows: Rows, kl_coef: float, entropy_coef: float) -> dict[str, Call]:
    """Ours, torch with all logits at once, and the peers, all with this loss, forward and backward."""
    given = rows.hidden, rows.weight, rows.targets

    def ours():
        ref = rows.ref if kl_coef else None
        coefficients = {"kl_coef": kl_coef, "entropy_coef": entropy_coef}
        loss, _ = ops.linear_ppo(
            *given, rows.old, rows.advantages, ref_logprobs=ref, **coefficients
        )
        return rows.gradients(loss)

    def materialised():
        log_p = torch.log_softmax((rows.hidden @ rows.weight.T).float(), dim=1)
        logprobs = log_p.gather(1, rows.targets[:, None]).squeeze(1)
        entropy = -(log_p.exp() * log_p).sum(dim=1) if entropy_coef else None
        return rows.loss(logprobs, entropy, kl_coef, entropy_coef)

    compiled = torch.compile(materialised)

    def by_scaled_entropy(head: str, *options):
        from liger_kernel.ops import fused_linear_scaled_cross_entropy as liger

        apply = getattr(liger, head).apply
        result = apply(*given, 1.0, -100, *options, entropy_coef != 0)
        nll, entropy = result if entropy_coef else (result, None)
        return rows.gradients(rows.loss(-nll, entropy, kl_coef, entropy_coef))

    def cut_cross_entropy():
        from cut_cross_entropy import linear_cross_entropy

        nll = linear_cross_entropy(*given, reduction="none")
        return rows.gradients(rows.loss(-nll.float(), None, kl_coef, entropy_coef))

    calls = {
        "ours": ours,
        "torch": lambda: rows.gradients(materialised()),
        "torch.compile": lambda: rows.gradients(compiled()),
        "liger": lambda: by_scaled_entropy("LigerFusedLinearScaledCrossEntropyFunction", 1),
        "verl's fused torch": lambda: by_scaled_entropy("_FusedLinearPPOFallbackFunction"),
    }
    return calls if entropy_coef else calls | {"cut-cross-entropy": cut_cross_entropy}


def head_cases(rows: Rows, kl_coef: float, entropy_coef: float, name: str) -> list[Case]:
    """Checked on few rows: losses to 1 %, gradients to 3 % of their norm, as peers round logits to bfloat16."""
    few = list_implementations(rows.few(), kl_coef, entropy_coef)

    def check(implementation: str) -> Callable[[], None]:
        return lambda: assert_near_in_norm(few[implementation](), few["torch"]())

    return [
        Case(
            name, implementation, call, check(implementation), flops=6 * rows.n * rows.h * rows.v,
            compared_with="" if implementation == "ours" else name,
        )
        for implementation, call in list_implementations(rows, kl_coef, entropy_coef).items()
    ]  # fmt: skip


def memory_beyond_gradients(rows: Rows) -> float:
    """Megabytes (10^6) that forward and backward take beside the gradients, the weight's in float32 as the op makes it.

    Backward rounds that to the weight's dtype, which counts.
    """
    given = rows.hidden, rows.weight, rows.targets, rows.old, rows.advantages

    def run() -> int:
        before = torch.cuda.memory_allocated()
        loss = ops.linear_ppo(*given, ref_logprobs=rows.ref)[0] / 3
        rows.gradients(loss)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    run()  # cuBLAS's workspace is taken once
    torch.cuda.reset_peak_memory_stats()
    return (run() - rows.hidden.nbytes - 4 * rows.weight.numel()) / 1e6


def parts_of_linear_ppo(rows: Rows) -> dict[str, float]:
    """Where its time goes: each kind of product and row kernel alone, all chunks of one call; milliseconds."""
    from hiper_fast.kernels import _head

    given = rows.hidden.detach(), rows.weight.detach()
    head = _head.Head(*given, None, rows.targets, 1.0, None, (True, True, False))
    logprobs, slope, entropy, entropy_slope = head.logits.new_zeros(4, rows.n).unbind(0)
    chunks, fillings = rows.n / head.chunk, rows.n / len(head.rows)
    part, logits = slice(0, head.chunk), head.logits[:, : rows.v]
    gradient, hidden = head.rows[:, : rows.v], head.hidden[: len(head.rows)]

    def kernel():
        head.pending = 0
        head.gradient(part, entropy, slope, entropy_slope)

    def grad_hidden():
        _head.product(head.grad_hidden[: len(head.rows)], gradient, head.weight)

    def grad_weight():
        _head.product(head.grad_weight, gradient.T, hidden, beta=1.0)

    calls = {
        "logits": (lambda: _head.product(logits, head.hidden[part], head.weight.T), chunks),
        "statistics": (lambda: head.statistics(part, logprobs, entropy), chunks),
        "gradient": (kernel, chunks),
        "grad_hidden": (grad_hidden, fillings),
        "grad_weight": (grad_weight, fillings),
    }
    return {"chunk": head.chunk, "filling": len(head.rows)} | {
        name: milliseconds(call, "cuda") * times for name, (call, times) in calls.items()
    }
