"""What a tokenizer must have in common with its model and with the format of responses, before anything is played."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hiper_fast.agent.tiny import TAGS
from hiper_fast.config import AgentConfig
from hiper_fast.ops import TokenPieces
from hiper_fast.options import ConfigError
from hiper_fast.response import parse

ACTION = "click[mug 1]"
RESPONSE = f"<switch>SWITCH</switch><subgoal>find mug</subgoal><action>{ACTION}</action>"


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id + 1, added tokens included; where ids are missing, more than the tokenizer has tokens."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """ConfigError for a tokenizer with ids that the model's embedding, of so many rows, does not have."""
    size = vocabulary_size(tokenizer)
    if size > num_embeddings:
        raise ConfigError(
            f"model.path: its tokenizer has ids up to {size - 1}, its embedding {num_embeddings} rows; save the "
            f"tokenizer that belongs to the model, or the model after resize_token_embeddings({size})"
        )


def list_pieces(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> TokenPieces:
    """The bytes of every row of the model's embedding; ConfigError where they cannot be known, or are too few."""
    check_tokenizer(tokenizer, num_embeddings)
    try:
        return TokenPieces(tokenizer, num_embeddings)
    except ValueError as error:
        raise ConfigError(f"model.path: {error}; use a model with another tokenizer") from error


def check_tags(
    tokenizer: PreTrainedTokenizerBase, pieces: TokenPieces, config: AgentConfig
) -> None:
    """ConfigError where even a perfect response, as token ids, would read as another or as one out of format."""

    def read(text: str) -> bytes:
        return b"".join(pieces[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"])

    parsed = parse(read(RESPONSE), plans=config.subgoals)
    if parsed.valid and parsed.action == ACTION:
        return
    tags = TAGS if config.subgoals else TAGS[-2:]
    lost = [tag for tag in tags if tag.encode() not in read(tag)]
    added = tokenizer.added_tokens_decoder.values()
    known = {token.content for token in added if token.special}.union(tokenizer.all_special_tokens)
    special = [tag for tag in lost if tag in known]
    if special:
        raise ConfigError(
            f"model.path: {' '.join(special)} are special tokens of its tokenizer, which are no part of a response's "
            'text; make them ordinary ones ("special": false in tokenizer.json and tokenizer_config.json, and out '
            "of the lists of special tokens)"
        )
    raise ConfigError(
        f"model.path: its tokenizer cannot write {' '.join(lost) or 'commands'}: of {RESPONSE!r} it makes "
        f"{read(RESPONSE).decode(errors='replace')!r}; use a model whose tokenizer keeps text as it is"
    )


def check_length(model: PreTrainedConfig, config: AgentConfig) -> None:
    """ConfigError where a sequence, of a turn or of a whole transcript, can outgrow the model's positions.

    Both are at most a prompt and a response at their limits long: a transcript is bounded as its prompt is.
    """
    text = model.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    prompt, response = config.max_prompt_tokens, config.max_response_tokens
    if limit is None or getattr(text, "alibi", False) or prompt + response <= limit:
        return
    mend = (
        f"lower agent.max_prompt_tokens to {limit - response}" if limit > response else "lower both"
    )
    raise ConfigError(
        f"agent.max_prompt_tokens, agent.max_response_tokens: {prompt} + {response} tokens are more than the model "
        f"has positions for (max_position_embeddings: {limit}); {mend}"
    )
