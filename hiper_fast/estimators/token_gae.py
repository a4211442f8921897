"""Generalised advantage estimation over tokens (arXiv 1506.02438): PPO as RLHF has it, a level for all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from hiper_fast import ops
from hiper_fast.config import AdvantageConfig
from hiper_fast.estimators import EVERY_ROLE, HIGH, Credit, Level, Turns, Values, requires


@requires(tokens=True)
def estimate(turns: Turns, values: Values, config: AdvantageConfig) -> Credit:
    """`ops.gae` of V_high with `advantage.lambda_segment`, a step a token, as verl has it.

    The steps of a trajectory are the tokens of its responses, one after the other: what stands between
    them, prompts and observations, is skipped. A turn's reward is that of its last token. Gamma and lambda
    apply between tokens, so that 1 is the usual gamma. V_high learns at every token.
    """
    advantages, returns = ops.gae(
        place_rewards(turns),
        values.tokens[:, HIGH],
        turns.terminated,
        turns.cu_tokens[turns.cu_turns.long()],
        bootstrap=values.bootstrap,
        gamma=config.gamma,
        lambda_=config.lambda_segment,
    )
    every = torch.ones_like(returns, dtype=torch.bool)  # [tokens]
    level = Level("token", EVERY_ROLE, advantages, every, returns, every, HIGH, per_token=True)
    return Credit((level,))


def place_rewards(turns: Turns) -> Tensor:
    """The turns' rewards at their last tokens, float32 [tokens].

    That of an empty response goes to the token before it, of an earlier turn; where there is none, nowhere.
    """
    last = turns.cu_tokens[1:].long() - 1  # [turns]
    first = turns.cu_tokens[turns.cu_turns[:-1].long()]  # [trajectories]
    first = first.repeat_interleave(turns.cu_turns.diff().long())  # [turns]
    earned = last >= first
    rewards = torch.zeros(int(turns.cu_tokens[-1]))
    return rewards.index_add(0, last[earned], turns.rewards[earned])
