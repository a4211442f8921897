"""The policy loss straight from hidden states: the head's product, the softmax and the loss in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _head, _library
from hiper_fast.ops._autograd import find_needs, make_differentiable
from hiper_fast.ops._head import Head, take
from hiper_fast.ops._library import check_vector, find_address
from hiper_fast.ops._ppo import METRICS, check_options, name_metrics, ppo_terms


def _run(
    compute_rows, hidden, weight, bias, targets, old_logprobs, advantages, ref_logprobs, temperature,
    softcap, clip_low, clip_high, dual_clip, kl_coef, entropy_coef, denominator, *needs,
):  # fmt: skip
    """A chunk of logits at a time: `compute_rows` adds to the sums and turns the logits into their
    gradient, from which come those of hidden, weight and bias. A row's gradient needs nothing of
    the other rows, so it need not wait for backward and the product is not made twice."""
    head = Head(hidden, weight, bias, softcap, *needs)
    sums = hidden.new_zeros(1 + len(METRICS), dtype=torch.float64)  # [loss and METRICS]
    logprobs = hidden.new_empty(hidden.shape[0], dtype=head.dtype)  # [n]
    options = clip_low, clip_high, dual_clip, kl_coef, entropy_coef
    options = *options, float(targets.shape[0] or 1) if denominator is None else denominator
    want_gradient = any(needs)
    for part, logits in head.iterate_chunks():
        given = (targets, old_logprobs, advantages, ref_logprobs)
        data = (None if tensor is None else take(tensor, part) for tensor in given)
        results = sums, take(logprobs, part)
        live = compute_rows(logits, *data, temperature, softcap, *options, want_gradient, *results)
        if want_gradient:
            head.add_gradients(part, live, logits if live is None else logits[: len(live)])
    sums = sums.to(head.dtype)
    return sums[0].clone(), sums[1:].clone(), logprobs, *head.collect_gradients()


def _run_cpp(hidden, weight, bias, targets, old_logprobs, advantages, ref_logprobs, *options):
    targets, old_logprobs, advantages = (
        targets.contiguous(),
        old_logprobs.contiguous(),
        advantages.contiguous(),
    )
    ref_logprobs = ref_logprobs if ref_logprobs is None else ref_logprobs.contiguous()
    _library.extension.check_targets(targets.data_ptr(), targets.shape[0], weight.shape[0])
    return _run(
        _compute_rows_cpp,
        hidden,
        weight,
        bias,
        targets,
        old_logprobs,
        advantages,
        ref_logprobs,
        *options,
    )


def _compute_rows_cpp(
    logits, targets, old_logprobs, advantages, ref_logprobs, temperature, softcap, *options_and_results,
):  # fmt: skip
    *options, sums, out_logprobs = options_and_results
    live = torch.empty_like(targets)
    count = _library.find_kernel("linear_ppo", logits.dtype)(
        logits.data_ptr(), targets.data_ptr(), old_logprobs.data_ptr(), advantages.data_ptr(),
        find_address(ref_logprobs), *logits.shape, temperature, softcap, *options, sums.data_ptr(),
        out_logprobs.data_ptr(), live.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return None if count == live.shape[0] else live[:count]


def _run_torch(hidden, weight, bias, targets, *others):
    _head.check_targets(targets, len(weight))
    return _run(_compute_rows_torch, hidden, weight, bias, targets, *others)


def _compute_rows_torch(
    logits, targets, old_logprobs, advantages, ref_logprobs, temperature, softcap, *options_and_results,
):  # fmt: skip
    *options, want_gradient, sums, out_logprobs = options_and_results
    log_p, logprobs, entropy = _head.compute_statistics(logits, targets, temperature)
    out_logprobs.copy_(logprobs)
    every = torch.ones_like(targets, dtype=torch.bool)
    with_entropy = options[4] != 0
    loss, metrics, grad, grad_entropy = ppo_terms(
        logprobs, old_logprobs, advantages, every, ref_logprobs, entropy if with_entropy else None,
        *options, want_gradient,
    )  # fmt: skip
    sums += torch.cat([loss[None], metrics])
    if want_gradient:
        grad_entropy = grad_entropy if with_entropy else None
        grads = grad, grad_entropy, entropy
        _head.turn_into_gradient(logits, log_p, targets, temperature, softcap, *grads)


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
_call = make_differentiable("linear_ppo", _op, places=(0, 1, 2))


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
    the gradients it holds a chunk of logits, as `linear_logprobs` does.

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
