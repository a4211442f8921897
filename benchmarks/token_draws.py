"""A token of each row of logits [n, v], and its log-prob, as one would draw it in torch: peers of ops.sample."""

from __future__ import annotations

import torch
from torch import Tensor


def invert(logits: Tensor, uniform: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """By the distribution function in float64, greedy at temperature 0."""
    greedy = temperature == 0
    divisor = temperature.masked_fill(greedy, 1.0)[:, None]
    logprobs = torch.log_softmax(logits.float() / divisor, -1)
    sums = logprobs.double().exp().cumsum(-1)
    drawn = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0]
    tokens = torch.where(greedy, logprobs.argmax(-1), drawn.clamp_max(logits.shape[-1] - 1))
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def multinomial(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """By torch's own random numbers, never greedy."""
    probabilities = torch.softmax(logits.float() / temperature[:, None], -1)
    tokens = torch.multinomial(probabilities, 1)
    return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0].log()


def check(result: tuple[Tensor, Tensor], logits: Tensor, temperature: Tensor) -> None:
    """The log-probs are those of the tokens; which tokens they are rounding, or other numbers, may change."""
    tokens, logprobs = result
    exact = torch.log_softmax(logits.double() / temperature[:, None], -1).gather(1, tokens[:, None])
    torch.testing.assert_close(logprobs, exact[:, 0].float(), rtol=1e-4, atol=1e-4)
