"""A session with an OpenEnv server as `base.Environment`."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
import weakref
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from hiper_fast.options import ConfigError, show_name
from hiper_fast.text import PlainError

from ..base import Info, check_command, check_options
from ..foreign import Wordings, complete

HERE = "127.0.0.1", "localhost", "::1"  # hosts that no proxy stands before
NOT_READ = "task", "task_type"  # texts of observations that have a place of their own


class ServerError(PlainError, ConnectionError):
    """A server that cannot be reached, has gone, or refuses what is asked; the message is one line."""


class OpenEnvSession:
    """Games on an OpenEnv server, one after the other, through the package's own client; connected at the first.

    The server's action has one field for a text, `action`, and its observation one that is read, `text`; both are
    found where there is no choice. Of the other fields of an observation it takes `admissible_commands`, `won`,
    `task`, `task_type` and `score`; without them every text is a command, an episode is won that ends with a reward
    above 0, and `task` is as given. After an error the next `reset` connects anew.

    Raises ServerError, and ConfigError where a field is not told from others.
    """

    free_text = True

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        action: str | None = None,
        text: str | None = None,
        task: str = "",
        timeout: float = 60.0,
    ):
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"env.url: {show_name(url)} is no address of a server; give http://HOST:PORT"
            )
        self.url, self.timeout = url.rstrip("/"), timeout
        self.action, self.text, self.task = action, text, task
        self.wordings, self.client, self.over = Wordings(), None, None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        check_options(options, set())
        given = {} if seed is None else {"seed": seed}
        result = self.ask("reset", **given)
        return self.read(result)

    def step(self, command: str) -> tuple[str, float, bool, bool, Info]:
        """Whatever ends an episode there terminates it: OpenEnv does not tell a turn limit apart."""
        if self.client is None:
            raise RuntimeError("call reset before step")
        said = self.wordings.find(check_command(command))
        result = self.ask("step", {self.action: said})
        text, info = self.read(result)
        return text, float(result.reward or 0.0), bool(result.done), False, info

    def count_games(self, panel: str) -> int | None:
        """How many evaluation games the server has; None if it does not say."""
        panels = self.ask("state").get("panels")
        return panels.get(panel, 0) if isinstance(panels, dict) else None

    def ask(self, call: str, *given: Any, **named: Any) -> Any:
        """What the client's `call` returns."""
        with self.telling():
            if self.client is None:
                self.connect()
            return getattr(self.client, call)(*given, **named)

    def connect(self) -> None:
        try:
            from openenv.core import GenericEnvClient
        except ImportError as error:
            raise ConfigError(
                f"env.name: openenv needs openenv-core ({error}); pip install 'hiper_fast[openenv]'"
            ) from None
        self.action = find_action(read_schema(self.url, self.timeout), self.action, self.url)
        client = GenericEnvClient(self.url, message_timeout_s=self.timeout).sync()
        self.over = weakref.finalize(self, leave, client)
        self.over.atexit = False  # where there is no time to wait for a server
        client.connect()
        self.client = client

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Within, whatever fails leaves the session and is told in one line."""
        try:
            yield
        except ConfigError:
            self.close()
            raise
        except RuntimeError as error:  # as the client tells what the server refuses
            self.close()
            raise ServerError(f"env.url: {self.url}: {error}") from error
        except Exception as error:  # of sockets, HTTP, WebSockets, JSON
            self.close()
            reason = str(error) or type(error).__name__
            raise ServerError(
                f"env.url: {self.url} does not answer as an OpenEnv server ({reason}); is one there, with "
                "room for another session?"
            ) from error

    def read(self, result: Any) -> tuple[str, Info]:
        seen = result.observation
        self.text = self.text or find_text(seen, self.url)
        if not isinstance(seen.get(self.text), str):
            raise ConfigError(
                f"env.text: {show_name(self.text)} is no text of {self.url}'s observations, which have "
                f"{list_names(seen)}"
            )
        commands = self.wordings.list(seen.get("admissible_commands"))
        won = bool(result.done) and (result.reward or 0) > 0
        info = complete(seen, commands, task=self.task, task_type="openenv", won=won)
        return seen[self.text], info

    def close(self) -> None:
        if self.over:
            self.over()
        self.client = self.over = None


def leave(client: Any) -> None:
    with contextlib.suppress(Exception):  # a server that is gone
        client.close()


def read_schema(url: str, timeout: float) -> dict[str, Any]:
    """What a server says of its actions and observations."""
    proxies = {} if urlsplit(url).hostname in HERE else None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    with opener.open(f"{url}/schema", timeout=timeout) as answer:
        return json.load(answer)


def find_action(schema: dict[str, Any], named: str | None, url: str) -> str:
    """The field of an action that takes a text."""
    fields = {
        name: kind for name, kind in schema["action"]["properties"].items() if name != "metadata"
    }
    texts = [name for name, kind in fields.items() if kind.get("type") == "string"]
    if named in texts:
        return named
    if named is None and len(texts) == 1:
        return texts[0]
    raise ConfigError(
        f"env.action: actions of {url} have the texts {list_names(texts)} (fields: {list_names(fields)}); name the one "
        "that takes the command"
    )


def find_text(seen: dict[str, Any], url: str) -> str:
    """The field of an observation that is read."""
    texts = [
        name for name, value in seen.items() if isinstance(value, str) and name not in NOT_READ
    ]
    if "text" in texts or len(texts) == 1:
        return "text" if "text" in texts else texts[0]
    raise ConfigError(
        f"env.text: observations of {url} have the texts {list_names(texts)} (fields: {list_names(seen)}); name the "
        "one that is read"
    )


def list_names(names: Any) -> str:
    return ", ".join(map(show_name, names)) or "none"
