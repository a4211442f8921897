"""Log-probabilities of chosen tokens from hidden states, without ever holding all logits."""

from __future__ import annotations

from torch import Tensor

from hiper_fast.ops import _head, _library
from hiper_fast.ops._autograd import find_needs, make_recomputing
from hiper_fast.ops._head import Head, take


def _run_cpp(hidden, weight, bias, targets, temperature, softcap, want_entropy):
    targets = _head.check_targets_cpp(targets, weight.shape[0])
    head = Head(hidden, weight, bias, softcap)
    logprobs, entropy = _make_results(head, len(targets), want_entropy)
    for blocks in head.iterate_blocks(keep=False):
        chosen, into = take(targets, blocks.part), take(logprobs, blocks.part)
        wanted = take(entropy, blocks.part) if want_entropy else None
        _head.compute_statistics_cpp(blocks, chosen, temperature, into, wanted)
    return logprobs, entropy


def _make_results(head, n, want_entropy):
    logprobs = head.hidden.new_empty(n, dtype=head.dtype)
    return logprobs, logprobs.new_empty(n if want_entropy else 0)


def _run_cpp_backward(
    grad_logprobs, grad_entropy, hidden, weight, bias, targets, temperature, softcap, *needs
):
    targets, head = targets.contiguous(), Head(hidden, weight, bias, softcap, *needs)
    grads = grad_logprobs.contiguous(), grad_entropy.contiguous() if len(grad_entropy) else None
    for blocks in head.iterate_blocks(keep=True):
        chosen, into = take(targets, blocks.part), grad_logprobs.new_empty(blocks.rows)
        sums = _head.compute_statistics_cpp(blocks, chosen, temperature, into, None)
        given = [None if grad is None else take(grad, blocks.part) for grad in grads]
        _head.add_gradients_cpp(blocks, chosen, temperature, sums, *given)
    return head.collect_gradients()


def _run_torch(hidden, weight, bias, targets, temperature, softcap, want_entropy):
    _head.check_targets(targets, len(weight))
    head = Head(hidden, weight, bias, softcap)
    logprobs, entropy = _make_results(head, len(targets), want_entropy)
    for part, logits in head.iterate_chunks():
        _, found, entropies = _head.compute_statistics(logits, take(targets, part), temperature)
        take(logprobs, part).copy_(found)
        if want_entropy:
            take(entropy, part).copy_(entropies)
    return logprobs, entropy


def _run_torch_backward(
    grad_logprobs, grad_entropy, hidden, weight, bias, targets, temperature, softcap, *needs
):
    head = Head(hidden, weight, bias, softcap, *needs)
    for part, logits in head.iterate_chunks():
        chosen = take(targets, part)
        log_p, _, entropy = _head.compute_statistics(logits, chosen, temperature)
        grads = take(grad_logprobs, part), take(grad_entropy, part) if len(grad_entropy) else None
        _head.turn_into_gradient(logits, log_p, chosen, temperature, softcap, *grads, entropy)
        head.add_chunk_gradients(part, logits)
    return head.collect_gradients()


def _fake(hidden, weight, bias, targets, temperature, softcap, want_entropy):
    dtype, n = _library.widen(hidden.dtype), hidden.shape[0]
    return hidden.new_empty(n, dtype=dtype), hidden.new_empty(n if want_entropy else 0, dtype=dtype)


def _fake_backward(grad_logprobs, grad_entropy, hidden, weight, *others):
    return _head.fake_gradients(hidden, weight, *others[-3:])


_op = _library.define(
    "linear_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, "
    "float? softcap, bool want_entropy) -> (Tensor, Tensor)",
    check=_head.check_linear,
    cpp=_run_cpp,
    plain=_run_torch,
    cuda=True,
    fake=_fake,
)
_op_backward = _library.define(
    "linear_logprobs_backward(Tensor grad_logprobs, Tensor grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor targets, float temperature, float? softcap, bool need_hidden, bool need_weight, bool need_bias) -> "
    "(Tensor, Tensor, Tensor)",
    check=lambda *_: None,
    cpp=_run_cpp_backward,
    plain=_run_torch_backward,
    cuda=True,
    fake=_fake_backward,
    module="linear_logprobs",
)


def _differentiate(grad_logprobs, grad_entropy, *saved_and_options):
    *saved, _, need_hidden, need_weight, need_bias = saved_and_options  # without want_entropy
    return _op_backward(grad_logprobs, grad_entropy, *saved, need_hidden, need_weight, need_bias)


_call = make_recomputing("linear_logprobs", _op, _differentiate, tensors=4, wanted=3)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log_softmax(logits / temperature)[targets], without all logits at once.

    The logits are x = hidden @ weight.T + bias, or with `softcap` (Gemma 2's final one)
    softcap * tanh(x / softcap). A scale of the logits needs no option: divide the temperature by it, and
    softcap too where the scale comes before the cap.

    Differentiable once in hidden, weight and bias, through logprobs and entropy. Inputs of half
    precision are multiplied, summed and returned in float32. A log-prob never exceeds 0. Beside its
    results it holds 4 MiB of logits, and in backward also all those of up to 1,024 rows, at most 128
    MiB or one row, unless they fit the weight's gradient; on a GPU a chunk of them, at most 512 MiB or
    one row; and 16 MiB where the weight is of half precision.

    Args:
        hidden: [n, h] float32, float64, bfloat16 or float16.
        weight: [v, h] of such a dtype.
        targets: int64 [n], in [0, v).
        temperature: divides the logits, above 0 and finite.
        bias: [v] or None.
        softcap: the logits' bound, above 0 and finite, or None.
        entropy: also return each row's entropy, in nats.

    Returns:
        logprobs [n], or (logprobs [n], entropy [n]); float32, or float64 for float64 inputs.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or values do not fit.
        NotImplementedError: in forward mode, and for a second derivative.
    """
    needs = find_needs("linear_logprobs", hidden, weight, bias)
    run = _call if any(needs) else _op
    logprobs, entropies = run(hidden, weight, bias, targets, temperature, softcap, entropy)
    return (logprobs, entropies) if entropy else logprobs
