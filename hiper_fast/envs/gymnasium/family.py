"""Gymnasium's text environments as `hiper_fast` trains on them."""

from __future__ import annotations

from dataclasses import dataclass

from hiper_fast.options import ConfigError, option

from .. import family
from ..foreign import ForeignOptions
from .environment import GymnasiumText


@dataclass(slots=True)
class Options(ForeignOptions):
    id: str | None = option(None, "the environment, as gymnasium.make knows it: MyText-v0")
    module: str | None = option(None, "the module that registers it, if none has")
    kwargs: dict = option({}, "what else gymnasium.make is given, as '{size: 4}'")
    actions: list[str] | None = option(
        None, "names of a Discrete space's actions, in their order; a Text space has none"
    )


class Family(family.Family):
    Options = Options
    environment = GymnasiumText

    def make(self) -> GymnasiumText:
        if self.options.id is None:
            raise ConfigError("env.id: say which environment is played: --env.id MyText-v0")
        return super().make()
