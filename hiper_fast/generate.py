"""Batched sampling with a KV cache: any causal LM of transformers, finished sequences leave the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache


@torch.inference_mode()
def generate(
    model,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_ids: tuple[int, ...],
    generator: torch.Generator,
    batch_tokens: int = 8192,
) -> list[tuple[list[int], list[float]]]:
    """Samples a response to every prompt.

    prompts: token ids, none empty. Returns per prompt (ids, log-probs), the stopping token included, at most
    `max_new_tokens` long. Log-probs are float32, of the tempered distribution the token was drawn from; temperature 0
    is greedy and reports the log-prob under temperature 1. Prompts of like length run together, at most `batch_tokens`
    prompt tokens at once.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    results: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    while order:
        size = max(1, batch_tokens // len(prompts[order[0]]))
        group, order = order[:size], order[size:]
        sample_group(model, prompts, group, results, max_new_tokens, temperature, stop_ids, generator)
    return results


def sample_group(model, prompts, group, results, max_new_tokens, temperature, stop_ids, generator) -> None:
    """Prefills the prompts of `group`, left-padded, then decodes them in step, appending to `results`."""
    device = model.device
    longest = len(prompts[group[0]])
    ids = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in group], device=device)
    lengths = torch.tensor([len(prompts[i]) for i in group], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    rows = list(group)  # batch row -> prompt
    stop = torch.tensor(stop_ids, device=device)
    cache = DynamicCache(config=model.config)

    for step in range(max_new_tokens):
        out = model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=position_ids,
            past_key_values=cache,
            logits_to_keep=1,
        )
        tokens, logprobs = sample(out.logits[:, -1], temperature, generator)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            results[row][0].append(token)
            results[row][1].append(logprob)
        going = ~torch.isin(tokens, stop)
        if step + 1 == max_new_tokens or not going.any():
            return
        if not going.all():
            kept = going.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            mask, tokens, position_ids = mask[kept], tokens[kept], position_ids[kept]
            rows = [rows[i] for i in kept.tolist()]
        ids, position_ids = tokens[:, None], position_ids[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """logits [n, v] -> (tokens int64 [n], logprobs float32 [n]); inverse-CDF draws, one uniform number a row."""
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
        cdf = logprobs.double().exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
