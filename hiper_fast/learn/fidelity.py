"""How far the sampler of a rollout is from the policy that trains: the metrics under `fidelity/`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hiper_fast.config import Config
from hiper_fast.distributed import World
from hiper_fast.learn.loss import estimate_kl
from hiper_fast.rollout.trajectory import Trajectories

# Nats of mean |d| that rounding explains: more than any model was measured to have (docs/runs.md).
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.03}


def measure_fidelity(
    trajectories: Trajectories, log_ratio: Tensor, config: Config, world: World
) -> dict[str, float]:
    """Of sampled tokens: their log-probs by the trainer, at the weights that sampled them, against the sampler's.

    With d the former minus the latter: the mean and largest of |d|; the KL divergence of the trainer's policy from
    the sampler's, estimated by the mean of exp(d) - d - 1 (Schulman's k3); the share of tokens whose ratio exp(d) is
    outside [1 - clip_low, 1 + clip_high] before the policy has changed at all. All are 0 but for rounding where the
    sampler is exact; `tolerance` is what the dtype lets the first one be. k3 hardly sees a sampler that leaves tokens
    out (top-k, top-p), |d| does.

    Args:
        log_ratio: float32 [tokens], logprobs - old_logprobs in the first optimiser step; NaN where this process knows
            none. All processes call this together.

    Returns:
        the metrics, over these tokens, or all with a role where the trainer recomputed their log-probs; none where no
        process knows any.
    """
    d = log_ratio
    if trajectories.sampled_logprobs is not None:
        d = trajectories.old_logprobs - trajectories.sampled_logprobs
        d = d.masked_fill(trajectories.roles == 0, math.nan)
    d, train = d[d.isfinite()].double(), config.train
    ratio = d.exp()
    outside = (ratio < 1 - train.clip_low) | (ratio > 1 + train.clip_high)
    sums = torch.stack([d.abs().sum(), estimate_kl(d).sum(), outside.double().sum()])
    count = world.sum(torch.tensor(len(d))).item()
    largest = max(world.gather([d.abs().max().item() if len(d) else 0.0]))
    means = (world.sum(sums) / max(1, count)).tolist()
    if not count:
        return {}
    metrics = {
        "fidelity/logprob_mean_abs": means[0],
        "fidelity/logprob_max_abs": largest,
        "fidelity/kl": means[1],
        "fidelity/outside_clip": means[2],
    }
    if trajectories.updates_behind:  # older weights explain any distance
        return metrics
    return metrics | {"fidelity/tolerance": TOLERANCE[config.model.dtype]}
