"""Every op in plain torch, to be read: this is the specification, and what runs where no kernel was built.

Written apart from the kernels and checked against them; it takes its time and its memory. Arguments are as in
the public functions of the same names, and are not validated here. Scans are computed in double precision.
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
    r, v_low, v_high = rewards.tolist(), values_low.tolist(), values_high.tolist()
    v_switch = [0.0] * turns if values_switch is None else values_switch.tolist()
    boundary = switch.tolist()
    a_low, a_high, a_switch = [0.0] * turns, [0.0] * turns, [0.0] * turns
    ret_low, ret_high, ret_switch = [0.0] * turns, [0.0] * turns, [0.0] * turns

    for n, (begin, end) in enumerate(_segments(cu_turns)):
        if begin == end:
            continue
        boundary[begin] = True
        starts = [t for t in range(begin, end) if boundary[t]] + [end]
        # What stands for the rewards after the last turn.
        alive = not terminated[n]
        final_low = float(bootstrap_low[n]) if alive and bootstrap_low is not None else 0.0
        final_high = float(bootstrap_high[n]) if alive and bootstrap_high is not None else 0.0

        a_next_segment = 0.0
        for b, b_next in reversed(list(zip(starts, starts[1:], strict=False))):
            v_next_segment = final_high if b_next == end else v_high[b_next]

            # Low level: nothing is carried over the segment's end.
            carried = 0.0
            for t in reversed(range(b, b_next)):
                if t + 1 == end:
                    v_next = final_low
                elif t + 1 == b_next:
                    v_next = v_high[t + 1]
                else:
                    v_next = v_low[t + 1]
                delta = r[t] + gamma * v_next - v_low[t]
                a_low[t] = delta + gamma * lambda_turn * carried
                ret_low[t] = a_low[t] + v_low[t]
                carried = a_low[t]

            # High level: the whole segment is one step of length d.
            d = b_next - b
            reward = sum(gamma**j * r[b + j] for j in range(d))
            delta = reward + gamma**d * v_next_segment - v_high[b]
            a_high[b] = delta + gamma**d * lambda_segment * a_next_segment
            ret_high[b] = a_high[b] + v_high[b]
            a_next_segment = a_high[b]

            # Switch decision: the discounted return to the segment's end, then the next state's value.
            g = v_next_segment
            for t in reversed(range(b, b_next)):
                g = r[t] + gamma * g
                a_switch[t] = g - v_switch[t]
                ret_switch[t] = g

    levels = (a_low, ret_low, a_high, ret_high, a_switch, ret_switch)
    return HAE(
        *(rewards.new_tensor(x) for x in levels),
        torch.tensor(boundary, dtype=torch.bool, device=switch.device),
    )


def gae(rewards, values, terminated, cu_turns, *, bootstrap=None, gamma=1.0, lambda_=1.0) -> tuple[Tensor, Tensor]:
    r, v = rewards.tolist(), values.tolist()
    advantages, returns = [0.0] * len(r), [0.0] * len(r)
    for n, (begin, end) in enumerate(_segments(cu_turns)):
        v_next = float(bootstrap[n]) if bootstrap is not None and not terminated[n] else 0.0
        carried = 0.0
        for t in reversed(range(begin, end)):
            delta = r[t] + gamma * v_next - v[t]
            carried = delta + gamma * lambda_ * carried
            advantages[t], returns[t] = carried, carried + v[t]
            v_next = v[t]
    return rewards.new_tensor(advantages), rewards.new_tensor(returns)


def normalize(values, mask, eps=1e-8) -> Tensor:
    chosen = values[mask].double()
    out = torch.zeros_like(values)
    if len(chosen):
        out[mask] = ((chosen - chosen.mean()) / (chosen.std(correction=0) + eps)).to(values.dtype)
    return out


def find_roles(token_ids, cu_tokens, pieces) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`pieces` is anything that gives a token's bytes for its id."""
    ids = token_ids.tolist()
    roles, switch, value_index, valid = [0] * len(ids), [], [], []
    for begin, end in _segments(cu_tokens):
        text, spans = b"", []  # each token's bytes within the text
        for token in ids[begin:end]:
            spans.append((len(text), len(text) + len(pieces[token])))
            text += pieces[token]
        parsed = response.parse(text)

        blocks = ((SWITCH, parsed.switch_span), (SUBGOAL, parsed.subgoal_span), (ACTION, parsed.action_span))
        for i, (start, stop) in enumerate(spans):
            for role, block in blocks:
                # At least one of the token's bytes lies in the block.
                if block is not None and max(start, block[0]) < min(stop, block[1]):
                    roles[begin + i] |= role
            if parsed.action_span is None:
                roles[begin + i] |= ACTION

        low = 0
        for block in (parsed.subgoal_span, parsed.switch_span):
            after = [i for i, (start, _) in enumerate(spans) if block is not None and start >= block[1]]
            if after:
                low = after[0]
                break
        switch.append(parsed.switch)
        value_index.append([low, 0, 0])
        valid.append(parsed.valid)

    def tensor(values, dtype):
        return torch.tensor(values, dtype=dtype, device=token_ids.device)

    return (
        tensor(roles, torch.uint8),
        tensor(switch, torch.bool),
        tensor(value_index, torch.int32).reshape(-1, 3),
        tensor(valid, torch.bool),
    )


def scatter_advantages(hae, roles, cu_tokens) -> tuple[Tensor, Tensor]:
    low, high, switch = (x.tolist() for x in (hae.advantages_low, hae.advantages_high, hae.advantages_switch))
    boundary, role_of = hae.boundary.tolist(), roles.tolist()
    advantages, loss_mask = [0.0] * len(role_of), [False] * len(role_of)
    for turn, (begin, end) in enumerate(_segments(cu_tokens)):
        for i in range(begin, end):
            if role_of[i] & ACTION:
                advantages[i] += low[turn]
                loss_mask[i] = True
            if role_of[i] & SUBGOAL and boundary[turn]:
                advantages[i] += high[turn]
                loss_mask[i] = True
            if role_of[i] & SWITCH:
                advantages[i] += switch[turn]
                loss_mask[i] = True
    return hae.advantages_low.new_tensor(advantages), torch.tensor(loss_mask, dtype=torch.bool, device=roles.device)


def normalize_and_scatter(hae, roles, cu_tokens, eps=1e-8) -> tuple[Tensor, Tensor, HAE]:
    carried = [[bool((roles[a:b] & bit).any()) for a, b in _segments(cu_tokens)] for bit in (ACTION, SUBGOAL, SWITCH)]
    low, high, switch = (torch.tensor(x, dtype=torch.bool, device=roles.device) for x in carried)
    levels = hae._replace(
        advantages_low=normalize(hae.advantages_low, low, eps),
        advantages_high=normalize(hae.advantages_high, high & hae.boundary, eps),
        advantages_switch=normalize(hae.advantages_switch, switch, eps),
    )
    return *scatter_advantages(levels, roles, cu_tokens), levels


def linear_logprobs(hidden, weight, targets, *, temperature=1.0, bias=None, entropy=False):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    chosen = log_p.gather(1, targets[:, None]).squeeze(1)
    return (chosen, -(log_p.exp() * log_p).sum(dim=-1)) if entropy else chosen


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
    entropy_coef=0.001,
    **options,
) -> Tensor:
    logprobs, entropy = linear_logprobs(hidden, weight, targets, temperature=temperature, bias=bias, entropy=True)
    every_row = torch.ones_like(targets, dtype=torch.bool)
    return ppo_loss(
        logprobs, old_logprobs, advantages, every_row, entropy=entropy, entropy_coef=entropy_coef, **options
    )


def _segments(cu) -> list[tuple[int, int]]:
    bounds = cu.tolist()
    return list(zip(bounds, bounds[1:], strict=False))
