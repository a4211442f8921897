"""Gradients times that of the loss, in place: what backward does to those that were made with the loss."""

from __future__ import annotations

from hiper_fast.ops import _library


def _run_torch(gradients, factor):
    if factor.is_cpu and factor.item() == 1:
        return
    for gradient in gradients:
        gradient.mul_(factor)


scale_gradients = _library.define(
    "scale_gradients(Tensor(a!)[] gradients, Tensor factor) -> ()",
    check=lambda *_: None,
    cpp=_run_torch,
    plain=_run_torch,
    cuda=True,
    fake=lambda *_: None,
)
