"""Drawing tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, uniform: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, v], uniform float64 [n], temperature float32 [n] -> (tokens int64 [n], logprobs float32 [n]).

    A draw inverts the distribution function; log-probs are those of the tempered distribution. Temperature 0 is greedy,
    with the log-prob under temperature 1.
    """
    greedy = temperature == 0
    logprobs = torch.log_softmax(logits.float() / temperature.masked_fill(greedy, 1.0)[:, None], -1)
    cdf = logprobs.double().exp().cumsum(-1)  # [n, v]
    drawn = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
    tokens = torch.where(greedy, logprobs.argmax(-1), drawn.clamp_max(logits.shape[-1] - 1))
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
