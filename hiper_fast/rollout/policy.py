"""What plays: the agent with its weights, or how to speak with an engine that has weights of its own."""

from __future__ import annotations

from hiper_fast.agent.agent import Agent
from hiper_fast.agent.loading import load_agent, load_speaker
from hiper_fast.agent.speaker import Speaker
from hiper_fast.config import Config
from hiper_fast.options import ConfigError
from hiper_fast.rollout import engines


def load_policy(config: Config, seed: int) -> Agent | Speaker:
    """What the configured engine answers with; of `model.path` only what it needs is read."""
    if has_own_weights(config):
        return load_speaker(config.model, config.agent)
    return load_agent(config.model, seed, speech=config.agent)


def has_own_weights(config: Config) -> bool:
    """Whether the engine answers from weights that are not the agent's."""
    return getattr(engines.find(config.rollout.engine), "own_weights", False)


def refuse_own_weights(config: Config) -> None:
    """ConfigError for an engine that cannot train."""
    if has_own_weights(config):
        raise ConfigError(
            f"rollout.engine: {config.rollout.engine} answers from weights of its own, which take no update and "
            "give no log-probs to train on; it is for eval and play"
        )
