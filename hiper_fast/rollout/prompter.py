"""Prompts as token ids, through the tokenizer's chat template, within a limit that never raises."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from hiper_fast.agent.tiny import cuts_before_blanks
from hiper_fast.config import AgentConfig
from hiper_fast.envs.family import Family
from hiper_fast.envs.prompts import State, Style
from hiper_fast.options import ConfigError
from hiper_fast.rollout import chat

WORD = re.compile(r"[^ \n]+|[ \n][^ \n]*")
MOST_WORDS = 2**15  # that are remembered


class Prompter:
    """States -> token ids, through the tokenizer's chat template where it has one, else behind its own BOS, if any.

    With a context, they are the new ones: what follows the last response, from its end token on if that is not sampled.
    ConfigError for a chat template that cannot make such prompts, or cannot read `agent.chat_template`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: AgentConfig,
        style: Style,
    ):
        chat.check(tokenizer, config)
        self.tokenizer, self.config, self.style = tokenizer, config, style
        self.opening = find_opening(tokenizer)
        self.words = Words(tokenizer) if cuts_before_blanks(tokenizer) else None
        self.special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    def check_room(self) -> None:
        """ConfigError where prompts may not even be as long as one that shows nothing."""
        empty = State("", "", [], plans=self.config.subgoals)
        needed, limit = len(self.encode([empty])[0]), self.config.max_prompt_tokens
        if needed >= limit:
            raise ConfigError(
                f"agent.max_prompt_tokens: {limit} leave nothing to read a game by: instructions and format alone are "
                f"{needed} tokens of this model; give more (prompts that were cut are counted in "
                "rollout/truncated_prompts)"
            )

    def __call__(self, states: list[State]) -> list[tuple[list[int], bool]]:
        """Per state (ids, truncated). A prompt over the limit loses its history, then its observation's tail.

        A context counts with its prompt. What does not fit behind one is cut to the room of the response as well: no
        turn can be played from there, but the state can be valued.
        """
        limit = self.config.max_prompt_tokens
        if self.style.simplify:
            states = [self.style.simplify(state) for state in states]
        recent = [replace(state, history=self.take_recent(state)) for state in states]
        prompts = []
        for state, ids in zip(states, self.encode(recent), strict=True):
            truncated = len(state.context) + len(ids) > limit
            ids = self.shorten(state, self.measure_room(state)) if truncated else ids
            prompts.append((ids, truncated))
        return prompts

    def take_recent(self, state: State) -> list[tuple[str, str]]:
        return state.history[-self.config.history :] if self.config.history else []

    def measure_room(self, state: State) -> int:
        limit, used = self.config.max_prompt_tokens, len(state.context)
        return max(0, limit + self.config.max_response_tokens - used) if used else limit

    def encode(self, states: list[State]) -> list[list[int]]:
        prompts = self.tokenize([self.write(state) for state in states])
        for state, ids in zip(states, prompts, strict=True):
            if state.context:
                del ids[: self.measure_end(ids, state.context[-1])]
            elif self.tokenizer.chat_template is None:
                ids[:0] = self.opening
        return prompts

    def measure_end(self, ids: list[int], last: int) -> int:
        """How many of the `ids` after a response say again that it has ended, which its `last` token said."""
        if last not in self.special or last not in ids:
            return 0
        place = ids.index(last)
        return 0 if self.tokenizer.decode(ids[:place]).strip() else place + 1

    def write(self, state: State) -> str:
        text = self.style.render(state)
        if self.tokenizer.chat_template is None:
            return f"{self.tokenizer.eos_token or ''}\n{text}" if state.context else text
        write = chat.go_on if state.context else chat.render
        return write(self.tokenizer, self.config.chat_template, text)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.words.tokenize(texts) if self.words else tokenize(self.tokenizer, texts)

    def shorten(self, state: State, limit: int) -> list[int]:
        bare = replace(state, history=[])
        [ids], [words] = self.encode([bare]), self.tokenize([state.observation])
        while (
            len(ids) > limit and words
        ):  # again and again, for a style may render less than it is given
            words = words[: max(0, len(words) - (len(ids) - limit))]
            text = self.tokenizer.decode(words, clean_up_tokenization_spaces=False)
            [ids] = self.encode([replace(bare, observation=text)])
        opening = list(takewhile(self.special.__contains__, ids))[:limit]
        return opening + ids[max(len(opening), len(ids) - limit + len(opening)) :]


class Words:
    """Texts by a tokenizer that `cuts_before_blanks`, which is asked for each word once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        split = [WORD.findall(text) for text in texts]
        if len(self.known) > MOST_WORDS:
            self.known.clear()
        new = list({word for words in split for word in words} - self.known.keys())
        self.known.update(zip(new, tokenize(self.tokenizer, new), strict=True))
        return [[id for word in words for id in self.known[word]] for words in split]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def make_prompter(
    tokenizer: PreTrainedTokenizerBase, config: AgentConfig, family: Family
) -> Prompter:
    """That of an environment in the configured style, whose prompts have room to show something."""
    prompter = Prompter(tokenizer, config, family.styles[config.style])
    prompter.check_room()
    return prompter


def find_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text: BOS, where the model was trained with it."""
    whole, text = (tokenizer("a", add_special_tokens=s)["input_ids"] for s in (True, False))
    places = (i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    return whole[: next(places, 0)]
