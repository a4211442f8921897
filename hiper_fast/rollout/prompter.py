"""Prompts as token ids, through the tokenizer's chat template, within a limit that never raises."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from hiper_fast.config import AgentConfig
from hiper_fast.envs.prompts import State, Style
from hiper_fast.options import ConfigError

# Stands for a response where a chat template is asked what follows one.
ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}"


class Prompter:
    """States -> token ids, through the tokenizer's chat template where it has one.

    With a context, they are the new ones: what follows the last response, from its end token on if that is not sampled.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: AgentConfig,
        style: Style,
    ):
        self.tokenizer, self.config, self.style = tokenizer, config, style
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
            if state.context and ids[0] == state.context[-1] and ids[0] in self.special:
                del ids[0]
        return prompts

    def write(self, state: State) -> str:
        text = self.style.render(state)
        if self.tokenizer.chat_template is None:
            return f"{self.tokenizer.eos_token or ''}\n{text}" if state.context else text
        messages = [{"role": "user", "content": text}]
        if state.context:
            before = {"role": "user", "content": "-"}, {"role": "assistant", "content": ANSWER}
            messages = [*before, *messages]
        template = self.tokenizer.apply_chat_template
        text = template(messages, tokenize=False, add_generation_prompt=True)
        return text.partition(ANSWER)[2] if state.context else text

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def shorten(self, state: State, limit: int) -> list[int]:
        bare = replace(state, history=[])
        [ids], [words] = self.encode([bare]), self.tokenize([state.observation])
        while (
            len(ids) > limit and words
        ):  # again and again, for a style may render less than it is given
            words = words[: max(0, len(words) - (len(ids) - limit))]
            [ids] = self.encode([replace(bare, observation=self.tokenizer.decode(words))])
        return ids[max(0, len(ids) - limit) :]
