"""An OpenEnv server's games as `hiper_fast` trains on them."""

from __future__ import annotations

from dataclasses import dataclass

from hiper_fast.options import option

from .. import family
from ..foreign import ForeignOptions
from .environment import OpenEnvSession


@dataclass(slots=True)
class Options(ForeignOptions):
    url: str = option("http://127.0.0.1:8000", "where the server is")
    action: str | None = option(
        None, "the field of its actions that takes the command (default: the only text)"
    )
    text: str | None = option(
        None, "the field of its observations that is read (default: text, or the only text)"
    )
    timeout: float = option(60.0, "seconds that an answer may take", above=0)


class Family(family.Family):
    """Evaluation games are the seeds from 2^31 on; a server of `hiper_fast.serve` says how many it has."""

    Options = Options
    environment = OpenEnvSession

    def list_panel(self, panel: str, count: int) -> list[family.Task]:
        env = self.make()
        try:
            served = env.count_games(panel)
        finally:
            env.close()
        if served == 0:
            raise ValueError(f"{self.options.url} has no games of the panel {panel}")
        return super().list_panel(panel, count if served is None else min(count, served))
