"""The policy loss straight from hidden states: the head's product, the softmax and the loss in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _head, _library
from hiper_fast.ops._autograd import find_needs, make_differentiable
from hiper_fast.ops._head import Head, take
from hiper_fast.ops._library import check_vector
from hiper_fast.ops._ppo import METRICS, check_options, name_metrics, ppo_terms


class _Rows:
    """What linear_ppo gives, of some rows after others: their log-probs, and sums of the loss and METRICS.

    A row's gradient needs nothing of the other rows, so it need not wait for backward, and the product is not made
    twice.
    """

    def __init__(
        self, make_terms, head, old_logprobs, advantages, ref_logprobs,
        clip_low, clip_high, dual_clip, kl_coef, entropy_coef, denominator,
    ):  # fmt: skip
        n = head.hidden.shape[0]
        self.make_terms, self.head = make_terms, head
        self.data = old_logprobs, advantages, ref_logprobs
        denominator = float(n or 1) if denominator is None else denominator
        self.options = clip_low, clip_high, dual_clip, kl_coef, entropy_coef, denominator
        self.with_entropy = entropy_coef != 0
        self.logprobs = head.hidden.new_empty(n, dtype=head.dtype)  # [n]
        self.sums = head.hidden.new_zeros(1 + len(METRICS), dtype=torch.float64)

    def add(self, part: slice, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of `part`; the gradients of its log-probs and, if that counts, of the entropy [rows]."""
        old, advantages, ref = (None if x is None else take(x, part) for x in self.data)
        every = torch.ones_like(logprobs, dtype=torch.bool)
        given = logprobs, old, advantages, every, ref, entropy if self.with_entropy else None
        loss, metrics, grad, grad_entropy = self.make_terms(*given, *self.options, True)
        self.sums += torch.cat([loss[None], metrics])
        return grad, grad_entropy if self.with_entropy else None

    def collect(self) -> tuple[Tensor, ...]:
        sums = self.sums.to(self.head.dtype)
        return sums[0].clone(), sums[1:].clone(), self.logprobs, *self.head.collect_gradients()


def _run_cpp(hidden, weight, bias, targets, *others):
    *data, temperature, softcap = map(_library.make_plain, others[:5])
    *options, need_hidden, need_weight, need_bias = others[5:]
    targets = _head.check_targets_cpp(targets, weight.shape[0])
    head = Head(hidden, weight, bias, softcap, need_hidden, need_weight, need_bias)
    rows = _Rows(_make_terms_cpp, head, *data, *options)
    for blocks in head.iterate_blocks(keep=head.needs_any):
        chosen, into = take(targets, blocks.part), take(rows.logprobs, blocks.part)
        entropy = torch.empty_like(into)
        sums = _head.compute_statistics_cpp(blocks, chosen, temperature, into, entropy)
        grads = rows.add(blocks.part, sums[:, -1], entropy)
        if head.needs_any:
            _head.add_gradients_cpp(blocks, chosen, temperature, sums, *grads)
    return rows.collect()


def _make_terms_cpp(logprobs, old_logprobs, advantages, every, ref_logprobs, entropy, *options):
    """In float64, since far below 0 a log-prob rounded to float32 loses the digits of its ratio."""
    vectors = logprobs, old_logprobs, advantages, every, ref_logprobs, entropy
    exact = (x if x is None or x is every else x.double().contiguous() for x in vectors)
    loss, metrics, *grads = _library.extension.ppo_loss(torch.get_num_threads(), *exact, *options)
    return loss, metrics, *(grad.to(old_logprobs.dtype) for grad in grads)


def _run_torch(hidden, weight, bias, targets, *others):
    *data, temperature, softcap = others[:5]
    *options, need_hidden, need_weight, need_bias = others[5:]
    _head.check_targets(targets, len(weight))
    head = Head(hidden, weight, bias, softcap, need_hidden, need_weight, need_bias)
    rows = _Rows(ppo_terms, head, *data, *options)
    for part, logits in head.iterate_chunks():
        chosen = take(targets, part)
        log_p, logprobs, entropy = _head.compute_statistics(logits, chosen, temperature)
        take(rows.logprobs, part).copy_(logprobs)
        grads = rows.add(part, logprobs, entropy)
        if head.needs_any:
            _head.turn_into_gradient(logits, log_p, chosen, temperature, softcap, *grads, entropy)
            head.add_chunk_gradients(part, logits)
    return rows.collect()


def _check(hidden, weight, bias, targets, old_logprobs, advantages, ref_logprobs, *options):
    _head.check_linear(hidden, weight, bias, targets, *options)
    n, device, dtype = hidden.shape[0], hidden.device, (_library.widen(hidden.dtype),)
    check_vector("old_logprobs", old_logprobs, n, dtype, device)
    check_vector("advantages", advantages, n, dtype, device)
    if ref_logprobs is not None:
        check_vector("ref_logprobs", ref_logprobs, n, dtype, device)
    check_options(*options[2:7])


def _fake(hidden, weight, *others):
    dtype = _library.widen(hidden.dtype)
    shapes = (), (len(METRICS),), hidden.shape[:1]  # loss, metrics, log-probs
    results = (hidden.new_empty(shape, dtype=dtype) for shape in shapes)
    return *results, *_head.fake_gradients(hidden, weight, *others[-3:])


_op = _library.define(
    "linear_ppo(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor old_logprobs, Tensor advantages, "
    "Tensor? ref_logprobs, float temperature, float? softcap, float clip_low, float clip_high, float dual_clip, "
    "float kl_coef, float entropy_coef, float? denominator, bool need_hidden, bool need_weight, bool need_bias) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    cpp=_run_cpp,
    plain=_run_torch,
    cuda=True,
    fake=_fake,
)
_call = make_differentiable("linear_ppo", _op, places=(0, 1, 2), tensors=7)


def linear_ppo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    kl_coef: float = 0.01,
    entropy_coef: float = 0.001,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_loss(linear_logprobs(hidden, weight, targets), …)` where every row carries loss.

    Three matrix products instead of the four of the two ops: the gradients are made with the loss,
    from the same logits. Rows whose loss does not depend on their log-prob and entropy (clipped, or
    of advantage 0, with entropy_coef 0) are left out of the two products of the gradients. Beside
    the gradients it holds logits as the backward of `linear_logprobs` does.

    Args:
        hidden: [n, h] and weight: [v, h], targets: int64 [n], temperature, bias, softcap: as in
            `linear_logprobs`.
        old_logprobs, advantages, ref_logprobs: [n] float32, or float64 for float64 hidden.
        clip_low, clip_high, dual_clip, kl_coef, entropy_coef, denominator: as in `ppo_loss`.

    Returns:
        loss: 0-d, differentiable once in hidden, weight and bias; the weight's gradient is summed in
            float32.
        metrics: those of `ppo_loss`, entropy only where entropy_coef is not 0; and the log-probs of the
            targets, `logprobs` [n], which the loss was made of. None has a gradient.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or values do not fit.
        NotImplementedError: in forward mode, and for a second derivative.
    """
    fixed, divisor = _library.split_denominator(denominator)
    needs = find_needs("linear_ppo", hidden, weight, bias)
    run = _call if any(needs) else _op
    loss, metrics, logprobs, *_ = run(
        hidden, weight, bias, targets, old_logprobs, advantages, ref_logprobs, temperature,
        softcap, clip_low, clip_high, dual_clip, kl_coef, entropy_coef, fixed, *needs,
    )  # fmt: skip
    loss, metrics = _library.divide(divisor, loss, metrics)
    named = name_metrics(metrics, kl=ref_logprobs is not None, entropy=entropy_coef != 0)
    return loss, named | {"logprobs": logprobs}
