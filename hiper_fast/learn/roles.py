"""How each role's tokens fare in an update: the metrics under `policy/`."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.distributed import World
from hiper_fast.learn.credit import Targets
from hiper_fast.learn.loss import estimate_kl
from hiper_fast.ops import reference
from hiper_fast.rollout.trajectory import Trajectories

ROLES = {
    "switch": reference.SWITCH,
    "subgoal": reference.SUBGOAL,
    "action": reference.ACTION,
}


def measure_roles(
    trajectories: Trajectories,
    targets: Targets,
    clipped: Tensor,
    world: World,
) -> dict[str, float]:
    """Entropy, KL and clip fraction of each role's loss tokens; what cannot be known is left out.

    Entropy and KL are those of the policy that played, estimated from its own samples: the means of
    -old_logprobs, and of exp(d) - d - 1 with d = ref_logprobs - old_logprobs (Schulman's k3, the loss's
    own). The clip fraction is the share of tokens whose ratio the loss clipped. A token of several roles,
    which only a response out of format has, or one token over two tags, counts in each.

    Args:
        clipped: float32 [tokens], 1 where the loss clipped the token's ratio, else 0; NaN where this
            process saw none. All processes call this together.
    """
    old, ref = trajectories.old_logprobs, targets.ref_logprobs
    masks = {
        name: targets.loss_mask & ((trajectories.roles & role) > 0) for name, role in ROLES.items()
    }  # bool [tokens]
    means = {f"policy/entropy_{name}": take_mean(-old, mask) for name, mask in masks.items()}
    if ref is not None:
        kl = estimate_kl(ref - old)
        means |= {f"policy/kl_{name}": take_mean(kl, mask) for name, mask in masks.items()}
    which = clipped == 1, clipped.isfinite()
    counts = [[(mask & those).sum() for mask in masks.values()] for those in which]
    for name, part, whole in zip(masks, *world.sum(torch.tensor(counts)).tolist(), strict=True):
        means[f"policy/clip_fraction_{name}"] = part / whole if whole else None
    return {name: mean for name, mean in means.items() if mean is not None}


def take_mean(values: Tensor, mask: Tensor) -> float | None:
    """Of what is finite; None where nothing is."""
    known = values[mask & values.isfinite()]
    return known.mean(dtype=torch.float64).item() if known.numel() else None
