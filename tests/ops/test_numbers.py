"""The ops' numbers: each has its range, and what lies outside is refused by the argument's name."""

import inspect
import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from hiper_fast import ops

TURNS = {
    "rewards": torch.randn(4), "terminated": torch.tensor([True, False]),
    "cu_turns": torch.tensor([0, 2, 4], dtype=torch.int32),
}  # fmt: skip
SWITCH = torch.tensor([True, False, True, False])
LEVELS = ops.HAE(*[torch.randn(4)] * 6, SWITCH)
ROLES = {
    "roles": torch.tensor([1, 2, 4, 1], dtype=torch.uint8),
    "cu_tokens": torch.arange(5, dtype=torch.int32),
}
HEAD = {
    "hidden": torch.randn(2, 3), "weight": torch.randn(5, 3), "targets": torch.tensor([0, 4]),
}  # fmt: skip
ROWS = {"old_logprobs": torch.randn(2), "advantages": torch.randn(2)}
TOKENS = dict.fromkeys(["logprobs", "old_logprobs", "advantages"], torch.randn(4))

CALLS = {
    "hae": partial(
        ops.hae, **TURNS, values_low=torch.randn(4), values_high=torch.randn(4), switch=SWITCH
    ),
    "gae": partial(ops.gae, **TURNS, values=torch.randn(4)),
    "normalize": partial(ops.normalize, values=torch.randn(4), mask=SWITCH),
    "normalize_and_scatter": partial(ops.normalize_and_scatter, hae=LEVELS, **ROLES),
    "linear_logprobs": partial(ops.linear_logprobs, **HEAD),
    "linear_ppo": partial(ops.linear_ppo, **HEAD, **ROWS),
    "ppo_loss": partial(ops.ppo_loss, **TOKENS, loss_mask=SWITCH),
    "value_loss": partial(
        ops.value_loss, **dict.fromkeys(["values", "old_values", "returns"], torch.randn(4)), mask=SWITCH
    ),
}  # fmt: skip

FRACTION, POSITIVE, NOT_NEGATIVE = (
    ((-0.01, 1.01), (0, 1)),
    ((0, -1.0), (1e-9, 9)),
    ((-1e-9,), (0, 9)),
)
RANGES = {  # argument -> (refused, accepted)
    "gamma": FRACTION, "lambda_": FRACTION, "lambda_turn": FRACTION, "lambda_segment": FRACTION,
    "clip_low": FRACTION, "clip_high": NOT_NEGATIVE, "clip": NOT_NEGATIVE, "dual_clip": ((1, 0.5, -3), (1.001,)),
    "kl_coef": ((), (-1, 0, 5)), "entropy_coef": ((), (-1, 0, 5)),
    "temperature": POSITIVE, "softcap": POSITIVE, "eps": POSITIVE, "denominator": POSITIVE,
}  # fmt: skip
ARGUMENTS = [
    (op, name) for op, call in CALLS.items() for name in inspect.signature(call).parameters if name in RANGES
]  # fmt: skip
for_every_number = pytest.mark.parametrize("op, name", ARGUMENTS)
HALF = 0.5


def test_every_number_of_an_op_has_a_range():
    for op in CALLS:
        for name, parameter in inspect.signature(getattr(ops, op)).parameters.items():
            is_number = "float" in str(parameter.annotation)
            assert not is_number or (op, name) in ARGUMENTS, (op, name)


@for_every_number
def test_what_lies_outside_is_named(op, name):
    for value in (*RANGES[name][0], math.inf, -math.inf, math.nan, np.float32("nan")):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            CALLS[op](**{name: value})


@for_every_number
def test_what_is_no_number_is_named(op, name):
    tensors = () if name == "denominator" else (torch.tensor(HALF),)
    for value in (True, np.bool_(True), "0.5", [HALF], np.array(HALF), 1j, *tensors):
        with pytest.raises(
            ValueError, match=f"^{name} must be a number, .* got {type(value).__name__}"
        ):
            CALLS[op](**{name: value})


@for_every_number
def test_the_range_is_accepted_as_any_real_number(op, name):
    for value in RANGES[name][1]:
        CALLS[op](**{name: value})
    number = 2 if name == "dual_clip" else 1
    kinds = int, np.float64, np.float32, np.float16, np.int64, Fraction
    expected = CALLS[op](**{name: float(number)})
    for kind in kinds:
        torch.testing.assert_close(CALLS[op](**{name: kind(number)}), expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["linear_ppo", "ppo_loss", "value_loss"])
def test_a_tensor_as_denominator(op):
    for value in (0, -2.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="^denominator must be above 0"):
            CALLS[op](denominator=torch.tensor(value))
    for tensor in (torch.ones(1), torch.tensor(True), torch.tensor(1j)):
        with pytest.raises(ValueError, match="^denominator must be a number or a real tensor"):
            CALLS[op](denominator=tensor)
    loss = CALLS[op](denominator=torch.tensor(2))[0]
    torch.testing.assert_close(loss, CALLS[op](denominator=2)[0])


def test_a_tensor_that_is_not_read_makes_nan():
    """As on a GPU, where reading it would wait for all that is queued."""
    run = torch.compile(CALLS["value_loss"], fullgraph=True, backend="eager")
    for value in (0, -2.0, math.nan):
        loss, metrics = run(denominator=torch.tensor(value))
        assert loss.isnan() and all(metric.isnan() for metric in metrics.values())
    loss = run(denominator=torch.tensor(2.0))[0]
    torch.testing.assert_close(loss, CALLS["value_loss"](denominator=2)[0])


@pytest.mark.parametrize("size", [-1, 2.5, True, "7"])
def test_the_size_of_token_pieces(size):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="^size must be"):
        ops.TokenPieces(tokenizer, size)
    assert len(ops.TokenPieces(tokenizer, np.int64(7))) == 7
