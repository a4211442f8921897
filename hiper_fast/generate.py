"""Batched sampling with a KV cache: any causal LM of transformers, finished sequences leave the batch."""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

Past = tuple[Tensor, Tensor]  # keys and values of one sequence's tokens, each [layers, tokens, heads, d]


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
    pasts: list[Past | None] | None = None,
) -> list[tuple[list[int], list[float]]]:
    """Samples a response to every prompt.

    prompts: token ids, none empty. Returns per prompt (ids, log-probs), the stopping token included, at most
    `max_new_tokens` long. Log-probs are float32, of the tempered distribution the token was drawn from; temperature 0
    is greedy and reports the log-prob under temperature 1. Prompts of like length run together, at most `batch_tokens`
    prompt tokens at once.

    pasts: per prompt that of its first tokens, which then count as read, or None. In its place comes that of the prompt
    and its response but for the last token, for a prompt that goes on from there.
    """
    unread = [len(p) for p in prompts]
    if pasts is not None:
        unread = [n - (0 if past is None else past[0].shape[1]) for n, past in zip(unread, pasts, strict=True)]
    order = sorted(range(len(prompts)), key=lambda i: unread[i], reverse=True)
    results: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    while order:
        width = unread[order[0]]
        size = max(1, batch_tokens // width)
        group, order = order[:size], order[size:]
        sample_group(model, prompts, group, width, results, max_new_tokens, temperature, stop_ids, generator, pasts)
    return results


def sample_group(
    model, prompts, group, width, results, max_new_tokens, temperature, stop_ids, generator, pasts
) -> None:
    """Prefills the last `width` tokens of the prompts of `group`, then decodes them in step, appending to `results`.

    Where fewer are unread, some of the past are read again: so all rows end together and padding is on the left alone.
    """
    device = model.device
    longest = max(len(prompts[i]) for i in group)
    ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i][-width:] for i in group], device=device)
    lengths = torch.tensor([len(prompts[i]) for i in group], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)[:, -width:]
    rows = list(group)  # batch row -> prompt
    stop = torch.tensor(stop_ids, device=device)
    if pasts is None:
        cache = DynamicCache(config=model.config)
    else:
        cache = join([(pasts[i], max(0, len(prompts[i]) - width)) for i in group])
        for i in group:
            pasts[i] = None

    for step in range(max_new_tokens):
        out = model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=position_ids,
            logits_to_keep=1,
            **{cache_name(type(model)): cache},
        )
        tokens, logprobs = sample(out.logits[:, -1], temperature, generator)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            results[row][0].append(token)
            results[row][1].append(logprob)
        ended = torch.isin(tokens, stop) | (step + 1 == max_new_tokens)
        if pasts is not None:
            for place in ended.nonzero()[:, 0].tolist():
                pasts[rows[place]] = take(cache, place, len(prompts[rows[place]]) + step)
        if ended.all():
            return
        if ended.any():
            kept = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            mask, tokens, position_ids = mask[kept], tokens[kept], position_ids[kept]
            rows = [rows[i] for i in kept.tolist()]
        ids, position_ids = tokens[:, None], position_ids[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)


@functools.cache
def cache_name(model: type) -> str:
    """What `forward` calls its KV cache; transformers 5.24 has renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def join(pasts: list[tuple[Past | None, int]]) -> DynamicCache:
    """One cache, left-padded, of the first so many tokens of each past."""
    cache = DynamicCache()  # whole layers, also where the model's window slides: a past may be cut anywhere
    known = next((past for past, length in pasts if length), None)
    for layer in range(len(known[0]) if known else 0):
        keys, values = (
            pad_sequence(
                [(past or known)[kind][layer, :length] for past, length in pasts], batch_first=True, padding_side="left"
            ).transpose(1, 2)
            for kind in (0, 1)
        )
        cache.update(keys, values, layer)
    return cache


def take(cache: DynamicCache, row: int, length: int) -> Past:
    """What a left-padded cache holds of one row's `length` tokens."""
    return tuple(
        torch.stack([getattr(layer, name)[row, :, -length:].transpose(0, 1) for layer in cache.layers])
        for name in ("keys", "values")
    )


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
