"""From turns to tokens: each token's advantage is the sum over the roles it trains."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _library, reference
from hiper_fast.ops._library import FLOATS, address, check_cu, check_vector, contiguous
from hiper_fast.ops.reference import HAE


def _cpu(advantages_low, advantages_high, advantages_switch, boundary, roles, cu_tokens):
    tokens, turns = roles.shape[0], boundary.shape[0]
    if _library.extension is None:
        _library.check_prefix_sum("cu_tokens", cu_tokens, tokens)
        hae = HAE(advantages_low, None, advantages_high, None, advantages_switch, None, boundary)
        return reference.scatter_advantages(hae, roles, cu_tokens)
    tensors = [contiguous(t) for t in (advantages_low, advantages_high, advantages_switch, boundary, roles, cu_tokens)]
    advantages = advantages_low.new_empty(tokens)
    loss_mask = torch.empty(tokens, dtype=torch.bool)
    _library.kernel("scatter_advantages", advantages.dtype)(
        *map(address, tensors), tokens, turns, address(advantages), address(loss_mask)
    )
    return advantages, loss_mask


def _fake(advantages_low, advantages_high, advantages_switch, boundary, roles, cu_tokens):
    return advantages_low.new_empty(roles.shape), roles.new_empty(roles.shape, dtype=torch.bool)


_op = _library.define(
    "scatter_advantages(Tensor advantages_low, Tensor advantages_high, Tensor advantages_switch, "
    "Tensor boundary, Tensor roles, Tensor cu_tokens) -> (Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
)


@torch.no_grad()
def scatter_advantages(hae: HAE, roles: Tensor, cu_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's advantage: A_low for the action role, A_high for the subgoal role on boundary turns,
    A_switch for the switch role, added where a token has several.

    Args:
        hae: the result of `ops.hae`; its advantages may have been replaced by normalised ones.
        roles: uint8 [tokens], of `ops.find_roles`.
        cu_tokens: int32 [turns + 1], exclusive prefix sum of each response's tokens.

    Returns:
        advantages: [tokens], dtype of hae.advantages_low, 0 off the mask.
        loss_mask: bool [tokens], the tokens that train a level.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or values do not fit.
    """
    check_vector("roles", roles, None, (torch.uint8,), None)
    device = roles.device
    turns = check_cu("cu_tokens", cu_tokens, device)
    check_vector("hae.advantages_low", hae.advantages_low, turns, FLOATS, device)
    dtype = (hae.advantages_low.dtype,)
    check_vector("hae.advantages_high", hae.advantages_high, turns, dtype, device)
    check_vector("hae.advantages_switch", hae.advantages_switch, turns, dtype, device)
    check_vector("hae.boundary", hae.boundary, turns, (torch.bool,), device)
    return _op(hae.advantages_low, hae.advantages_high, hae.advantages_switch, hae.boundary, roles, cu_tokens)
