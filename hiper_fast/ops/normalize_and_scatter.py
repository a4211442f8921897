"""From turns to tokens in one op, each level first normalised over the turns that train it."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.ops import _library, reference
from hiper_fast.ops._library import make_plain, widen
from hiper_fast.ops._numbers import check_above
from hiper_fast.ops.reference import HAE
from hiper_fast.ops.scatter_advantages import check_turns_and_tokens


def _run_reference(
    advantages_low, advantages_high, advantages_switch, boundary, roles, cu_tokens, eps
):
    _library.check_prefix_sum("cu_tokens", cu_tokens, roles.shape[0])
    low, high, switch = (
        make_plain(advantages_low),
        make_plain(advantages_high),
        make_plain(advantages_switch),
    )
    hae = HAE(low, None, high, None, switch, None, boundary)
    advantages, loss_mask, levels = reference.normalize_and_scatter(hae, roles, cu_tokens, eps)
    normalised = levels.advantages_low, levels.advantages_high, levels.advantages_switch
    return advantages, loss_mask, torch.stack(normalised)  # [3, turns]


def _fake(advantages_low, advantages_high, advantages_switch, boundary, roles, cu_tokens, eps):
    dtype = widen(advantages_low.dtype)
    return (
        advantages_low.new_empty(roles.shape, dtype=dtype),
        roles.new_empty(roles.shape, dtype=torch.bool),
        advantages_low.new_empty((3, advantages_low.shape[0]), dtype=dtype),
    )


def _check(*arguments):
    check_turns_and_tokens(*arguments[:-1])
    check_above("eps", arguments[-1], 0)


_op = _library.define(
    "normalize_and_scatter(Tensor advantages_low, Tensor advantages_high, Tensor advantages_switch, "
    "Tensor boundary, Tensor roles, Tensor cu_tokens, float eps) -> (Tensor, Tensor, Tensor)",
    check=_check,
    plain=_run_reference,
    fake=_fake,
    module="scatter_advantages",
)


def normalize_and_scatter(
    hae: HAE, roles: Tensor, cu_tokens: Tensor, eps: float = 1e-8
) -> tuple[Tensor, Tensor, HAE]:
    """`normalize` for each level over the turns that train it, then `scatter_advantages`.

    A turn trains a level if one of its tokens has the level's role and, for the high level, if it is a
    boundary.

    Args:
        hae, roles, cu_tokens: as in `scatter_advantages`.
        eps: as in `normalize`.

    Returns:
        advantages [tokens], loss_mask bool [tokens]: as of `scatter_advantages`.
        hae: with its three advantages normalised, 0 at turns that do not train the level.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or values do not fit.
    """
    given = hae.advantages_low, hae.advantages_high, hae.advantages_switch, hae.boundary
    advantages, loss_mask, levels = _op(*given, roles, cu_tokens, eps)
    low, high, switch = levels.unbind(0)
    return (
        advantages,
        loss_mask,
        hae._replace(advantages_low=low, advantages_high=high, advantages_switch=switch),
    )
