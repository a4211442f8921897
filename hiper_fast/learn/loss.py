"""The policy loss of a microbatch: what `train.loss`, `train.ratio` and `train.aggregation` make of its loss tokens.

    log r  = logprobs - old_logprobs; with `ratio` turn or sequence its mean over that one's loss tokens, whose
             gradient stays each token's own (GSPO-token, arXiv 2507.18071)
    ppo    = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), for A < 0 at most -A dual_clip
    cispo  = -A sg(clip(r, 1 - clip_low, 1 + clip_high)) logprobs (arXiv 2506.13585)

To either come kl_coef kl - entropy_coef entropy, as `ops.ppo_loss` has them; then the tokens are aggregated.
`ops.linear_ppo` computes what it can, straight from hidden states; plain torch the rest, from log-probs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hiper_fast.agent.agent import Agent
from hiper_fast.config import Config, TrainConfig
from hiper_fast.ops._ppo import MAX_EXPONENT, MAX_KL


@dataclass(frozen=True, slots=True)
class LossTokens:
    """The tokens of a microbatch that carry loss."""

    ids: Tensor  # int64 [n]
    old_logprobs: Tensor  # float32 [n]
    advantages: Tensor  # float32 [n]
    ref_logprobs: Tensor | None  # float32 [n]; None without a KL term
    turn: Tensor  # int64 [n]; equal: of one turn
    sequence: Tensor  # int64 [n]; equal: of one sequence


@dataclass(frozen=True, slots=True)
class Counts:
    """What the whole minibatch holds, in all processes."""

    tokens: int  # that carry loss
    trained: int  # sequences that hold such tokens
    sequences: int  # all of them
    longest: int  # response tokens that a sequence may have

    def choose_denominator(self, aggregation: str) -> int:
        """What the sum over the minibatch is divided by."""
        if aggregation == "token":
            return self.tokens
        return self.trained if aggregation == "sequence" else self.sequences * self.longest


class Loss(NamedTuple):
    """A microbatch's share of the policy loss, and what is told of it."""

    value: Tensor  # 0-d, differentiable
    metrics: dict[str, Tensor]  # 0-d, shares of means over the minibatch's loss tokens
    clipped: Tensor  # bool [n], whether the clip decides the token's loss
    log_ratio: Tensor  # float32 [n], logprobs - old_logprobs of each token, never pooled


def policy_loss(
    agent: Agent, hidden: Tensor, tokens: LossTokens, counts: Counts, config: Config
) -> Loss:
    """A microbatch's share of the policy loss, and of its metrics.

    Args:
        hidden: [n, h], the hidden states that predict the tokens.

    Returns:
        the loss, differentiable in hidden and the head's weights; its metrics, however it is aggregated:
        clip_fraction, and kl, entropy where these terms exist.
    """
    if is_fused(config.train):
        return fused_loss(agent, hidden, tokens, counts, config)
    with_entropy = config.train.entropy_coef > 0
    found = agent.logprobs(hidden, tokens.ids, config.agent.temperature, entropy=with_entropy)
    logprobs, entropy = found if with_entropy else (found, None)
    return plain_loss(logprobs, entropy, tokens, counts, config.train)


def is_fused(options: TrainConfig) -> bool:
    """Whether one op computes it: tokens that know nothing of each other, all of one weight."""
    return options.loss == "ppo" and options.ratio == "token" and options.aggregation != "sequence"


def fused_loss(
    agent: Agent, hidden: Tensor, tokens: LossTokens, counts: Counts, config: Config
) -> Loss:
    options = config.train
    denominator = counts.choose_denominator(options.aggregation)
    loss, parts = agent.ppo_loss(
        hidden,
        tokens.ids,
        tokens.old_logprobs,
        tokens.advantages,
        ref_logprobs=tokens.ref_logprobs,
        temperature=config.agent.temperature,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        dual_clip=options.dual_clip,
        kl_coef=options.kl_coef,
        entropy_coef=options.entropy_coef,
        denominator=denominator,
    )
    names = [name for name in ("kl", "entropy", "clip_fraction") if name in parts]
    metrics = {name: parts[name] * (denominator / counts.tokens) for name in names}
    log_ratio = parts["logprobs"] - tokens.old_logprobs
    plain, clipped = clip_terms(take_ratio(log_ratio), tokens.advantages, options)
    return Loss(loss, metrics, clipped > plain, log_ratio)


def plain_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    tokens: LossTokens,
    counts: Counts,
    options: TrainConfig,
) -> Loss:
    """Of log-probs and entropies, each [n]."""
    log_ratio = own = logprobs - tokens.old_logprobs  # [n]
    if options.ratio != "token":
        log_ratio = pool(log_ratio, tokens.turn if options.ratio == "turn" else tokens.sequence)
    ratio = take_ratio(log_ratio)
    make_terms = ppo_terms if options.loss == "ppo" else cispo_terms
    terms, clipped = make_terms(ratio, logprobs, tokens.advantages, options)
    metrics = {"clip_fraction": clipped.to(terms.dtype)}
    if tokens.ref_logprobs is not None:
        metrics["kl"] = estimate_kl(tokens.ref_logprobs - logprobs)
        terms = terms + options.kl_coef * metrics["kl"]
    if entropy is not None:
        metrics["entropy"] = entropy
        terms = terms - options.entropy_coef * entropy
    if options.aggregation == "sequence":
        _, place, count = tokens.sequence.unique(return_inverse=True, return_counts=True)
        terms = terms / count[place]
    loss = terms.sum() / counts.choose_denominator(options.aggregation)
    metrics = {name: x.detach().sum() / counts.tokens for name, x in metrics.items()}
    return Loss(loss, metrics, clipped, own.detach())


def pool(log_ratio: Tensor, owner: Tensor) -> Tensor:
    """The mean [n] over each `owner`'s tokens, the log of their ratios' geometric mean.

    Its gradient is that of each token's own log-ratio: of equal advantages the sum of the gradients is then
    that of the pooled ratio itself, and unequal ones keep to their tokens.
    """
    own = log_ratio.detach()
    _, place, count = owner.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(count), dtype=torch.float64, device=own.device)
    mean = total.index_add(0, place, own.double()) / count
    return mean[place].to(own.dtype) + (log_ratio - own)


def take_ratio(log_ratio: Tensor) -> Tensor:
    """Clamped as in the ops: nothing infinite gets into gradients."""
    return log_ratio.clamp(max=MAX_EXPONENT).exp()


def clip_terms(ratio: Tensor, advantages: Tensor, options: TrainConfig) -> tuple[Tensor, Tensor]:
    """PPO's two terms of each token [n]: with its ratio as it is, and with it clipped."""
    clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    return -advantages * ratio, -advantages * clipped


def ppo_terms(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, options: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Each token's loss [n], and whether the clip decides it [n]."""
    plain, clipped = clip_terms(ratio, advantages, options)
    bound = torch.where(advantages < 0, -advantages * options.dual_clip, torch.inf)
    return torch.minimum(torch.maximum(plain, clipped), bound), clipped > plain


def cispo_terms(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, options: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Each token's loss [n], and whether its weight is clipped [n]; every token keeps its gradient."""
    ratio = ratio.detach()
    weight = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    return -advantages * weight * logprobs, weight != ratio


def estimate_kl(d: Tensor) -> Tensor:
    """The low-variance estimator of d = ref_logprobs - logprobs [n], clamped as in the ops."""
    d = d.clamp(max=MAX_EXPONENT)
    return (d.exp() - d - 1).clamp(-MAX_KL, MAX_KL)
