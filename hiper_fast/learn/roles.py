"""How each role's tokens fare in an update: the metrics under `policy/`."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast.config import TrainConfig
from hiper_fast.distributed import World
from hiper_fast.learn.credit import Targets
from hiper_fast.ops import reference
from hiper_fast.rollout.trajectory import Trajectories

ROLES = {
    "switch": reference.SWITCH,
    "subgoal": reference.SUBGOAL,
    "action": reference.ACTION,
}
MAX_KL = 10  # as in the loss


def measure_roles(
    trajectories: Trajectories,
    targets: Targets,
    new_logprobs: Tensor,
    config: TrainConfig,
    world: World,
) -> dict[str, float]:
    """Entropy, KL and clip fraction of each role's loss tokens; what cannot be known is left out.

    Entropy and KL are those of the policy that played, estimated from its own samples: the means of
    -old_logprobs, and of exp(d) - d - 1 with d = ref_logprobs - old_logprobs (Schulman's k3, the loss's
    own). The clip fraction is the share of tokens whose ratio exp(new_logprobs - old_logprobs) was
    clipped. A token of several roles, which only a response out of format has, or one token over two
    tags, counts in each.

    Args:
        new_logprobs: float32 [tokens], as each token's minibatch saw it before its step; NaN where this
            process saw none. All processes call this together.
    """
    old, ref = trajectories.old_logprobs, targets.ref_logprobs
    masks = {
        name: targets.loss_mask & ((trajectories.roles & role) > 0) for name, role in ROLES.items()
    }  # bool [tokens]
    means = {f"policy/entropy_{name}": take_mean(-old, mask) for name, mask in masks.items()}
    if ref is not None:
        kl = estimate_kl(old, ref)
        means |= {f"policy/kl_{name}": take_mean(kl, mask) for name, mask in masks.items()}
    seen = new_logprobs.isfinite()
    clipped = find_clipped(new_logprobs, old, targets.advantages, config)
    counts = [[(mask & which).sum() for mask in masks.values()] for which in (clipped, seen)]
    for name, part, whole in zip(masks, *world.sum(torch.tensor(counts)).tolist(), strict=True):
        means[f"policy/clip_fraction_{name}"] = part / whole if whole else None
    return {name: mean for name, mean in means.items() if mean is not None}


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(policy || reference), one sample a token: exp(d) - d - 1 with d = ref_logprobs - logprobs."""
    d = ref_logprobs - logprobs
    return (d.exp() - d - 1).clamp(max=MAX_KL)


def find_clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, config: TrainConfig
) -> Tensor:
    """bool [tokens]: where the clip holds the ratio back; never where a log-prob is NaN."""
    ratio = (logprobs - old_logprobs).exp()
    above = (advantages > 0) & (ratio > 1 + config.clip_high)
    return above | ((advantages < 0) & (ratio < 1 - config.clip_low))


def take_mean(values: Tensor, mask: Tensor) -> float | None:
    """Of what is finite; None where nothing is."""
    known = values[mask & values.isfinite()]
    return known.mean(dtype=torch.float64).item() if known.numel() else None
