"""Rotary frequencies that depend on how long the longest sequence of a pass is."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedConfig

from hiper_fast.options import ConfigError


def check_rotary(config: PreTrainedConfig, longest: int) -> None:
    """ConfigError if a sequence of up to `longest` tokens can reach the place where frequencies change.

    There a model of rope_type longrope or dynamic takes other frequencies for all tokens of a pass: a response that
    grows beyond it was sampled with those before, and a short sequence reads otherwise beside a long one.
    """
    for rope_type, limit in list_changes(config.get_text_config(decoder=True)):
        if longest > limit:
            raise ConfigError(
                f"model.path: this model's rotary frequencies (rope_type {rope_type}) change beyond {limit} tokens, so "
                f"longer sequences would not be read as they were sampled, and here they reach {longest}; lower "
                "agent.max_prompt_tokens or agent.max_response_tokens, or use another model"
            )


def list_changes(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """The type of each set of frequencies that changes, and the longest sequence before it does."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [
        value for value in rope.values() if isinstance(value, dict)
    ]  # one for each type of layer
    for parameters in nested or [rope]:
        rope_type = parameters.get("rope_type", "default")
        if rope_type == "longrope":
            yield rope_type, parameters["original_max_position_embeddings"]
        elif rope_type == "dynamic":
            yield rope_type, config.max_position_embeddings
