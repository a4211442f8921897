"""Batched sampling with a KV cache, by any causal LM; finished sequences leave the batch."""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

# Keys and values of one sequence's tokens, each [tokens, heads, d], of every layer that keeps some.
Past = dict[int, tuple[Tensor, Tensor]]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_ids: tuple[int, ...],
    generator: torch.Generator,
    batch_tokens: int = 8192,
    pasts: list[Past | None] | None = None,
    vocabulary: int | None = None,
) -> list[tuple[list[int], list[float]]]:
    """Samples a response to every prompt.

    prompts: token ids, none empty. Returns per prompt (ids, log-probs), the stopping token
    included, at most `max_new_tokens` long. Log-probs are float32, of the tempered distribution
    the token was drawn from; temperature 0 is greedy and reports the log-prob under temperature 1.
    Prompts of like length run together, at most `batch_tokens` prompt tokens at once.

    pasts: per prompt that of its first tokens, which then count as read, or None. In its place
    comes that of the prompt and its response but for the last token, for a prompt that goes on
    from there.

    vocabulary: only ids below it are drawn, and have a probability; None: all of the model's.
    """
    unread = [len(prompt) for prompt in prompts]
    for row, past in enumerate(pasts or ()):
        unread[row] -= 0 if past is None else count_read(past)
    order = sorted(range(len(prompts)), key=lambda row: unread[row], reverse=True)
    stop = torch.tensor(stop_ids, device=model.device)
    results: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    while order:
        width = unread[order[0]]
        size = max(1, batch_tokens // width)
        batch, order = Batch(model, prompts, order[:size], width, pasts), order[size:]
        for step in range(max_new_tokens):
            tokens, logprobs = sample(batch.read()[:, :vocabulary], temperature, generator)
            drawn = zip(batch.rows, tokens.tolist(), logprobs.tolist(), strict=True)
            for row, token, logprob in drawn:
                results[row][0].append(token)
                results[row][1].append(logprob)
            ended = torch.isin(tokens, stop) | (step + 1 == max_new_tokens)
            if pasts is not None:
                batch.store_pasts(ended, pasts)
            if ended.all():
                break
            batch.go_on(tokens, ended)
    return results


class Batch:
    """Prompts that are answered in step, left-padded; those whose response has ended leave."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        rows: list[int],
        width: int,
        pasts: list[Past | None] | None,
    ):
        """Reads the last `width` tokens of each of `rows` first.

        Where fewer are unread, some of the past are read again: so all rows end together and
        padding is on the left alone.
        """
        self.model, self.rows = model, rows  # batch row -> prompt
        chosen = [prompts[row] for row in rows]
        padded = [[0] * (width - len(prompt)) + prompt[-width:] for prompt in chosen]
        lengths = [len(prompt) for prompt in chosen]
        with torch.device(model.device):
            self.ids = torch.tensor(padded)  # [rows, width]
            places = torch.arange(max(lengths))
            self.mask = places >= max(lengths) - torch.tensor(lengths)[:, None]  # [rows, longest]
        self.position_ids = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -width:]  # [rows, width]
        if pasts is None:
            self.cache = make_cache(model)
        else:
            self.cache = join_pasts(
                [(pasts[row], max(0, len(prompts[row]) - width)) for row in rows]
            )
            for row in rows:
                pasts[row] = None

    def read(self) -> Tensor:
        """Logits [rows, v] after the tokens not read yet."""
        out = self.model(
            input_ids=self.ids,
            attention_mask=self.mask.long(),
            position_ids=self.position_ids,
            logits_to_keep=1,
            **{name_cache(type(self.model)): self.cache},
        )
        return out.logits[:, -1]

    def store_pasts(self, ended: Tensor, pasts: list[Past | None]) -> None:
        lengths = self.mask.sum(1).tolist()
        for place in ended.nonzero()[:, 0].tolist():
            pasts[self.rows[place]] = take_past(self.cache, place, lengths[place])

    def go_on(self, tokens: Tensor, ended: Tensor) -> None:
        """Leaves the rows that have not ended, their `tokens` [rows] to be read."""
        if ended.any():
            kept = (~ended).nonzero()[:, 0]
            self.cache.batch_select_indices(kept)
            self.mask, self.position_ids = self.mask[kept], self.position_ids[kept]
            self.rows = [self.rows[place] for place in kept.tolist()]
            tokens = tokens[kept]
        self.ids, self.position_ids = tokens[:, None], self.position_ids[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], 1)


@functools.cache
def name_cache(model: type) -> str:
    """What `forward` calls its KV cache; transformers 5.24 has renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def make_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty one, whose layers forget what their windows have left behind."""
    slides = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    # Without a window it finds its layers by itself: a decoder that was cut from an encoder's side
    # has a configuration that counts the encoder's.
    return DynamicCache(config=model.config if slides else None)


def join_pasts(pasts: list[tuple[Past | None, int]]) -> DynamicCache:
    """One cache, left-padded, of the first so many tokens of each past."""
    cache = DynamicCache()  # whole layers, also where the window slides: a past may be cut anywhere
    known = next((past for past, length in pasts if length), {})
    for layer in known:
        states = []
        for kind in (0, 1):  # keys, values
            rows = [(past or known)[layer][kind][:length] for past, length in pasts]
            padded = pad_sequence(rows, batch_first=True, padding_side="left")
            states.append(padded.transpose(1, 2))  # [rows, heads, tokens, d]
        cache.update(*states, layer)
    return cache


def count_read(past: Past) -> int:
    """The tokens that it is of."""
    keys, _ = next(iter(past.values()))
    return len(keys)


def take_past(cache: DynamicCache, row: int, length: int) -> Past:
    """What a left-padded cache holds of one row's `length` tokens."""

    def take(states: Tensor) -> Tensor:
        return states[row, :, -length:].transpose(0, 1).clone()

    layers = enumerate(cache.layers)
    return {
        i: (take(layer.keys), take(layer.values)) for i, layer in layers if layer.keys is not None
    }


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """logits [n, v] -> (tokens int64 [n], logprobs float32 [n]).

    Draws are by the inverse of the distribution function, one uniform number a row.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
        cdf = logprobs.double().exp().cumsum(-1)  # [n, v]
        drawn = uniform.to(logits.device) * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, drawn, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
