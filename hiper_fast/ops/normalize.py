"""Normalisation of advantages over the turns that carry a role."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hiper_fast.ops import _library
from hiper_fast.ops._library import FLOATS, check_vector, widen
from hiper_fast.ops._numbers import check_above


@torch.no_grad()
def _run_torch(values: Tensor, mask: Tensor, eps: float, group=None) -> Tensor:
    def total(x: Tensor) -> Tensor:
        if group is not None:
            dist.all_reduce(x, group=group)
        return x

    count = total(mask.sum(dtype=torch.float64)).clamp(min=1)
    centred = torch.where(mask, values.double(), 0.0)
    centred = torch.where(mask, centred - total(centred.sum()) / count, 0.0)
    std = (total(centred.square().sum()) / count).sqrt()
    return (centred / (std + eps)).to(widen(values.dtype))


def _check(values, mask, eps):
    check_vector("values", values, None, FLOATS, None)
    check_vector("mask", mask, values.shape[0], (torch.bool,), values.device)
    check_above("eps", eps, 0)


_op = _library.define(
    "normalize(Tensor values, Tensor mask, float eps) -> Tensor",
    check=_check,
    plain=_run_torch,
    cuda=True,
    fake=lambda values, mask, eps: values.new_empty(values.shape, dtype=widen(values.dtype)),
)


def normalize(
    values: Tensor, mask: Tensor, eps: float = 1e-8, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """(values - mean) / (std + eps) on the mask and 0 off it, with mean and population std over the mask.

    Args:
        values: [turns] float32, float64, bfloat16 or float16.
        mask: bool [turns], the turns that carry the role.
        eps: above 0.
        group: a torch.distributed process group; the moments are then those of all its ranks together.

    Returns:
        [turns], float32 or (for float64) float64, detached from autograd; zeros where the mask holds fewer
        than two different values.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
    """
    if group is None:
        return _op(values, mask, eps)
    _check(values, mask, eps)
    return _run_torch(values, mask, eps, group)
