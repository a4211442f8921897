"""Every op in plain torch, to be read: the specification, and what runs where no kernel was built.

Written apart from the kernels and checked against them; it takes its time and its memory. Arguments are
as in the public functions of the same names, and are not validated here. Scans are computed in double
precision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hiper_fast import response

ACTION, SUBGOAL, SWITCH = 1, 2, 4  # the bits of a role


class HAE(NamedTuple):
    """Advantages and returns of the three levels, each [turns]; the high level is 0 off boundaries."""

    advantages_low: Tensor
    returns_low: Tensor
    advantages_high: Tensor
    returns_high: Tensor
    advantages_switch: Tensor
    returns_switch: Tensor
    boundary: Tensor  # bool


def hae(
    rewards,
    values_low,
    values_high,
    switch,
    terminated,
    cu_turns,
    *,
    values_switch=None,
    bootstrap_low=None,
    bootstrap_high=None,
    gamma=1.0,
    lambda_turn=1.0,
    lambda_segment=0.95,
) -> HAE:
    turns = len(rewards)
    reward, value_low, value_high = rewards.tolist(), values_low.tolist(), values_high.tolist()
    value_switch = [0.0] * turns if values_switch is None else values_switch.tolist()
    boundary = switch.tolist()
    low, high, decision = (_Level([0.0] * turns, [0.0] * turns) for _ in range(3))
    for trajectory, (begin, end) in enumerate(_pair_bounds(cu_turns)):
        if begin == end:
            continue
        boundary[begin] = True
        starts = [turn for turn in range(begin, end) if boundary[turn]]
        segments = list(zip(starts, [*starts[1:], end], strict=True))
        final_low = _find_final(bootstrap_low, terminated, trajectory)
        final_high = _find_final(bootstrap_high, terminated, trajectory)
        next_high = [
            *(value_high[start] for start in starts[1:]),
            final_high,
        ]  # past each segment's end
        _fill_low(
            low, segments, reward, value_low, [*next_high[:-1], final_low], gamma, lambda_turn
        )
        _fill_high(high, segments, reward, value_high, next_high, gamma, lambda_segment)
        _fill_switch(decision, segments, reward, value_switch, next_high, gamma)

    levels = (*low, *high, *decision)
    return HAE(
        *(rewards.new_tensor(level) for level in levels),
        torch.tensor(boundary, dtype=torch.bool, device=switch.device),
    )


class _Level(NamedTuple):
    advantages: list[float]
    returns: list[float]


def _find_final(bootstrap, terminated, trajectory) -> float:
    """What stands for the rewards after the last turn."""
    return 0.0 if bootstrap is None or terminated[trajectory] else float(bootstrap[trajectory])


def _fill_low(level, segments, reward, value, next_values, gamma, lambda_turn) -> None:
    """One step per turn; nothing is carried over a segment's end."""
    for (begin, end), value_next in zip(segments, next_values, strict=True):
        carried = 0.0
        for turn in reversed(range(begin, end)):
            delta = reward[turn] + gamma * value_next - value[turn]
            carried = delta + gamma * lambda_turn * carried
            level.advantages[turn] = carried
            level.returns[turn] = carried + value[turn]
            value_next = value[turn]


def _fill_high(level, segments, reward, value, next_values, gamma, lambda_segment) -> None:
    """The whole segment is one step of its length."""
    carried = 0.0
    for (begin, end), value_next in reversed(list(zip(segments, next_values, strict=True))):
        length = end - begin
        gained = sum(gamma**step * reward[begin + step] for step in range(length))
        delta = gained + gamma**length * value_next - value[begin]
        carried = delta + gamma**length * lambda_segment * carried
        level.advantages[begin] = carried
        level.returns[begin] = carried + value[begin]


def _fill_switch(level, segments, reward, value, next_values, gamma) -> None:
    """The discounted return to the segment's end, then the next state's value."""
    for (begin, end), value_next in zip(segments, next_values, strict=True):
        discounted = value_next
        for turn in reversed(range(begin, end)):
            discounted = reward[turn] + gamma * discounted
            level.advantages[turn] = discounted - value[turn]
            level.returns[turn] = discounted


def gae(
    rewards, values, terminated, cu_turns, *, bootstrap=None, gamma=1.0, lambda_=1.0
) -> tuple[Tensor, Tensor]:
    reward, value = rewards.tolist(), values.tolist()
    level = _Level([0.0] * len(reward), [0.0] * len(reward))
    for trajectory, bounds in enumerate(_pair_bounds(cu_turns)):
        final = _find_final(bootstrap, terminated, trajectory)
        _fill_low(level, [bounds], reward, value, [final], gamma, lambda_)
    return rewards.new_tensor(level.advantages), rewards.new_tensor(level.returns)


def normalize(values, mask, eps=1e-8) -> Tensor:
    chosen = values[mask].double()
    out = torch.zeros_like(values)
    if len(chosen):
        out[mask] = ((chosen - chosen.mean()) / (chosen.std(correction=0) + eps)).to(values.dtype)
    return out


def find_roles(token_ids, cu_tokens, pieces) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`pieces` is anything that gives a token's bytes for its id."""
    ids = token_ids.tolist()
    roles, switch, value_index, valid = [], [], [], []
    for begin, end in _pair_bounds(cu_tokens):
        text, spans = b"", []  # each token's bytes within the text
        for token in ids[begin:end]:
            spans.append((len(text), len(text) + len(pieces[token])))
            text += pieces[token]
        parsed = response.parse(text)
        roles += [_find_role(span, parsed) for span in spans]
        switch.append(parsed.switch)
        value_index.append([_find_low_index(spans, parsed), 0, 0])
        valid.append(parsed.valid)

    def tensor(values, dtype):
        return torch.tensor(values, dtype=dtype, device=token_ids.device)

    return (
        tensor(roles, torch.uint8),
        tensor(switch, torch.bool),
        tensor(value_index, torch.int32).reshape(-1, 3),
        tensor(valid, torch.bool),
    )


def _find_role(span, parsed) -> int:
    """At least one of the token's bytes lies in the block."""
    start, stop = span
    role = ACTION if parsed.action_span is None else 0
    blocks = (
        (SWITCH, parsed.switch_span),
        (SUBGOAL, parsed.subgoal_span),
        (ACTION, parsed.action_span),
    )
    for bit, block in blocks:
        if block is not None and max(start, block[0]) < min(stop, block[1]):
            role |= bit
    return role


def _find_low_index(spans, parsed) -> int:
    """The first token that starts at or after the end of the subgoal, else of the switch, else 0."""
    for block in (parsed.subgoal_span, parsed.switch_span):
        for index, (start, _) in enumerate(spans):
            if block is not None and start >= block[1]:
                return index
    return 0


def scatter_advantages(hae, roles, cu_tokens) -> tuple[Tensor, Tensor]:
    low, high = hae.advantages_low.tolist(), hae.advantages_high.tolist()
    switch, boundary = hae.advantages_switch.tolist(), hae.boundary.tolist()
    role_of = roles.tolist()
    advantages, loss_mask = [0.0] * len(role_of), [False] * len(role_of)
    for turn, (begin, end) in enumerate(_pair_bounds(cu_tokens)):
        for token in range(begin, end):
            if role_of[token] & ACTION:
                advantages[token] += low[turn]
                loss_mask[token] = True
            if role_of[token] & SUBGOAL and boundary[turn]:
                advantages[token] += high[turn]
                loss_mask[token] = True
            if role_of[token] & SWITCH:
                advantages[token] += switch[turn]
                loss_mask[token] = True
    return hae.advantages_low.new_tensor(advantages), torch.tensor(
        loss_mask, dtype=torch.bool, device=roles.device
    )


def normalize_and_scatter(hae, roles, cu_tokens, eps=1e-8) -> tuple[Tensor, Tensor, HAE]:
    def carries(bit):
        carried = [bool((roles[begin:end] & bit).any()) for begin, end in _pair_bounds(cu_tokens)]
        return torch.tensor(carried, dtype=torch.bool, device=roles.device)  # [turns]

    levels = hae._replace(
        advantages_low=normalize(hae.advantages_low, carries(ACTION), eps),
        advantages_high=normalize(hae.advantages_high, carries(SUBGOAL) & hae.boundary, eps),
        advantages_switch=normalize(hae.advantages_switch, carries(SWITCH), eps),
    )
    return *scatter_advantages(levels, roles, cu_tokens), levels


def linear_logprobs(
    hidden, weight, targets, *, temperature=1.0, bias=None, softcap=None, entropy=False
):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    chosen = log_p.gather(1, targets[:, None]).squeeze(1)
    return (chosen, -(log_p.exp() * log_p).sum(dim=-1)) if entropy else chosen


def paged_attention(
    query,
    keys,
    values,
    blocks,
    cu_query,
    lengths,
    *,
    scale=None,
    window=None,
    softcap=None,
    sinks=None,
) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shared = query.shape[1] // keys.shape[2]  # heads that share a head of keys and values
    out = query.new_empty((*query.shape[:2], values.shape[3]))
    for sequence, (begin, end) in enumerate(_pair_bounds(cu_query)):
        length = int(lengths[sequence])
        key, value = (
            _read_blocks(pool, blocks[sequence], length).to(dtype).repeat_interleave(shared, 1)
            for pool in (keys, values)
        )  # [length, heads, d], [length, heads, d_v]
        for row in range(begin, end):
            last = length - end + row  # its own position
            first = 0 if window is None else max(0, last - window + 1)
            seen = slice(first, last + 1)
            scores = (key[seen] * query[row].to(dtype)).sum(-1) * scale  # [seen, heads]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks.to(dtype)[None]])
            weights = torch.softmax(scores, 0)[: last + 1 - first]
            out[row] = (weights[..., None] * value[seen]).sum(0).to(out.dtype)
    return out


def _read_blocks(pool, blocks, length) -> Tensor:
    """The first `length` tokens of the sequence that lies in `blocks` of the pool: [length, heads, d]."""
    size = pool.shape[1]
    used = blocks[: -(-length // size)].long()
    return pool[used].flatten(0, 1)[:length]


def sample(logits, uniform, temperature) -> tuple[Tensor, Tensor]:
    greedy = temperature == 0
    divisor = temperature.double().masked_fill(greedy, 1.0)[:, None]
    log_p = torch.log_softmax(logits.double() / divisor, dim=-1)
    sums = log_p.exp().cumsum(dim=-1)
    total = sums[:, -1:]
    drawn = torch.searchsorted(sums, uniform[:, None] * total, right=True)[:, 0]
    tokens = torch.where(greedy, log_p.argmax(dim=-1), drawn)
    tokens = torch.where(total[:, 0] > 0, tokens, 0)  # else there is no distribution
    return tokens, log_p.gather(1, tokens[:, None])[:, 0].float()


def ppo_loss(
    logprobs,
    old_logprobs,
    advantages,
    loss_mask,
    *,
    ref_logprobs=None,
    entropy=None,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=3.0,
    kl_coef=0.01,
    entropy_coef=0.001,
    denominator=None,
) -> Tensor:
    total = logprobs.new_zeros(())
    for i in torch.nonzero(loss_mask).flatten().tolist():
        a = advantages[i]
        r = torch.exp(logprobs[i] - old_logprobs[i])
        pg = torch.maximum(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
        if a < 0:
            pg = torch.minimum(pg, -a * dual_clip)
        total = total + pg
        if ref_logprobs is not None:
            d = ref_logprobs[i] - logprobs[i]
            total = total + kl_coef * (torch.exp(d) - d - 1).clamp(-10, 10)
        if entropy is not None:
            total = total - entropy_coef * entropy[i]
    return total / (max(int(loss_mask.sum()), 1) if denominator is None else denominator)


def value_loss(values, old_values, returns, mask, *, clip=0.5, denominator=None) -> Tensor:
    total = values.new_zeros(())
    for i in torch.nonzero(mask).flatten().tolist():
        clipped = torch.clamp(values[i], old_values[i] - clip, old_values[i] + clip)
        total = total + torch.maximum((values[i] - returns[i]) ** 2, (clipped - returns[i]) ** 2)
    return total / (max(int(mask.sum()), 1) if denominator is None else denominator)


def linear_ppo(
    hidden,
    weight,
    targets,
    old_logprobs,
    advantages,
    *,
    temperature=1.0,
    bias=None,
    softcap=None,
    entropy_coef=0.001,
    **options,
) -> Tensor:
    logprobs, entropy = linear_logprobs(
        hidden, weight, targets, temperature=temperature, bias=bias, softcap=softcap, entropy=True
    )
    every_row = torch.ones_like(targets, dtype=torch.bool)
    return ppo_loss(
        logprobs,
        old_logprobs,
        advantages,
        every_row,
        entropy=entropy,
        entropy_coef=entropy_coef,
        **options,
    )


def rms_norm(x, weight, eps=1e-6) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = (wide * wide).sum(dim=-1, keepdim=True) / x.shape[-1]
    return (wide / torch.sqrt(mean + eps)).to(x.dtype) * weight


def swiglu(gate, up) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def rope(query, key, cos, sin) -> tuple[Tensor, Tensor]:
    def turn(x):
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * cos[:, None] + turned * sin[:, None]  # one angle for all heads

    return turn(query), turn(key)


def _pair_bounds(cu) -> list[tuple[int, int]]:
    bounds = cu.tolist()
    return list(zip(bounds, bounds[1:], strict=False))
