"""The environments as Gymnasium knows them; to import this registers `hiper_fast/household-v0` and its sisters.

import gymnasium, hiper_fast.gymnasium
env = gymnasium.make("hiper_fast/household-v0", size="medium")
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from string import ascii_letters, digits
from typing import Any

import gymnasium
from gymnasium import spaces
from gymnasium.error import CustomSpaceError
from gymnasium.vector.utils import create_shared_memory

from hiper_fast import envs
from hiper_fast.envs.base import Info

NAMES = ("alfworld", "household", "webshop")
MOST_SEEN, MOST_SAID = 1 << 15, 1 << 10  # characters of an observation, of an action
SEEDS = 2**31  # below it are the games of training
TYPED = ascii_letters + digits + " []'"


class Characters(Sequence):
    """All of Unicode, in order."""

    def __len__(self) -> int:
        return sys.maxunicode + 1

    def __getitem__(self, code: int) -> str:
        return chr(code)

    def __contains__(self, character: Any) -> bool:
        return isinstance(character, str) and len(character) == 1


class AnyText(spaces.Text):
    """Any text of at most `max_length` characters; samples are of `TYPED` ones."""

    character_set = character_list = Characters()
    characters = "Unicode"

    def __init__(self, max_length: int, *, seed: int | None = None):
        super().__init__(max_length, min_length=0, charset=TYPED, seed=seed)

    def character_index(self, char: str) -> int:
        return ord(char)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        length, _ = mask or probability or (None, None)
        if length is None:
            length = self.np_random.integers(self.max_length + 1)
        return "".join(self.np_random.choice(list(TYPED), size=length))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyText) and self.max_length == other.max_length


@create_shared_memory.register(AnyText)
def refuse_shared_memory(space: AnyText, *_: Any, **__: Any) -> None:
    """`AsyncVectorEnv` reads a text from shared memory once and never again: it says what to do instead."""
    raise CustomSpaceError("texts do not go through shared memory")


class TextEnv(gymnasium.Env[str, str]):
    """`envs.make(name, **config)` as a `gymnasium.Env`; it pickles, also in the middle of an episode.

    `reset()` without a seed draws a game from `np_random`, so one seed fixes all that follow. An
    observation of more than 32,768 characters is cut there; `render_mode="ansi"` renders it. An
    `AsyncVectorEnv` of these needs `shared_memory=False`.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(self, name: str, render_mode: str | None = None, **config: Any):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode: {render_mode!r} is none of ansi, None")
        self.env = envs.make(name, **config)
        self.render_mode = render_mode
        self.observation_space, self.action_space = AnyText(MOST_SEEN), AnyText(MOST_SAID)
        self.seen = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        super().reset(seed=seed)
        game = int(self.np_random.integers(SEEDS)) if seed is None else seed
        observation, info = self.env.reset(seed=game, options=options)
        self.seen = observation[:MOST_SEEN]
        return self.seen, info

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """TypeError for an action that is no text."""
        observation, *rest = self.env.step(action)
        self.seen = observation[:MOST_SEEN]
        return self.seen, *rest

    def render(self) -> str | None:
        return self.seen if self.render_mode == "ansi" else None

    def close(self) -> None:
        getattr(self.env, "close", lambda: None)()


for name in NAMES:
    gymnasium.register(
        f"hiper_fast/{name}-v0", entry_point="hiper_fast.gymnasium:TextEnv", kwargs={"name": name}
    )
