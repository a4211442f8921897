"""From turns to tokens: each token's advantage is the sum over the roles it trains."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _library, reference
from hiper_fast.ops._library import FLOATS, check_cu, check_vector, make_plain, widen
from hiper_fast.ops.reference import HAE


def check_turns_and_tokens(
    advantages_low, advantages_high, advantages_switch, boundary, roles, cu_tokens
):
    check_vector("roles", roles, None, (torch.uint8,), None)
    device = roles.device
    turns = check_cu("cu_tokens", cu_tokens, device)
    check_vector("hae.advantages_low", advantages_low, turns, FLOATS, device)
    dtype = (advantages_low.dtype,)
    check_vector("hae.advantages_high", advantages_high, turns, dtype, device)
    check_vector("hae.advantages_switch", advantages_switch, turns, dtype, device)
    check_vector("hae.boundary", boundary, turns, (torch.bool,), device)


def _run_reference(advantages_low, advantages_high, advantages_switch, boundary, roles, cu_tokens):
    _library.check_prefix_sum("cu_tokens", cu_tokens, roles.shape[0])
    hae = HAE(
        make_plain(advantages_low), None, advantages_high, None, advantages_switch, None, boundary
    )
    return reference.scatter_advantages(hae, roles, cu_tokens)


def _fake(advantages_low, advantages_high, advantages_switch, boundary, roles, cu_tokens):
    dtype = widen(advantages_low.dtype)
    return advantages_low.new_empty(roles.shape, dtype=dtype), roles.new_empty(
        roles.shape, dtype=torch.bool
    )


_op = _library.define(
    "scatter_advantages(Tensor advantages_low, Tensor advantages_high, Tensor advantages_switch, "
    "Tensor boundary, Tensor roles, Tensor cu_tokens) -> (Tensor, Tensor)",
    check=check_turns_and_tokens,
    plain=_run_reference,
    fake=_fake,
)


def scatter_advantages(hae: HAE, roles: Tensor, cu_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's advantage: A_low for the action role, A_high for the subgoal role on boundary
    turns, A_switch for the switch role, added where a token has several.

    Args:
        hae: the result of `ops.hae`; its advantages may have been replaced by normalised ones.
        roles: uint8 [tokens], of `ops.find_roles`.
        cu_tokens: int32 [turns + 1], exclusive prefix sum of each response's tokens.

    Returns:
        advantages: [tokens], dtype of hae.advantages_low (float32 for half precision), 0 off the mask.
        loss_mask: bool [tokens], the tokens that train a level.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or values do not fit.
    """
    return _op(
        hae.advantages_low,
        hae.advantages_high,
        hae.advantages_switch,
        hae.boundary,
        roles,
        cu_tokens,
    )
