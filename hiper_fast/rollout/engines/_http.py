"""JSON over HTTP: a time limit for every exchange, and another try where one may help."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from hiper_fast.options import ConfigError, show, show_name
from hiper_fast.text import PlainError, shorten

DELAYS = 0.5, 1.0, 2.0, 4.0, 8.0  # seconds before each further try
LONGEST_DELAY = 60.0  # that a server may ask for
PASSING = {None, 200, 408, 425, 429, 500, 502, 503, 504}  # statuses that may pass
MOST_BYTES = 2**24  # of an answer
MOST_SAID = 160  # characters of why a server refuses

Read = TypeVar("Read")


class ServerError(PlainError, ConnectionError):
    """A server that cannot be reached (status None), refuses (HTTP's status), or answers what is no answer (200)."""

    def __init__(self, message: str, status: int | None = None, delay: float = 0.0):
        super().__init__(message)
        self.status, self.delay = status, delay


class Server:
    """What answers below `url`."""

    def __init__(self, url: str, *, timeout: float, key: str | None = None):
        """timeout: seconds of an exchange; key: sent as bearer. ConfigError for what is no address."""
        self.url, self.timeout = url.rstrip("/"), timeout
        self.connect, self.path = read_address(self.url)
        self.headers = {"Content-Type": "application/json", "Connection": "close"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.met, self.closed = False, threading.Event()

    def ask(
        self,
        path: str,
        content: Any = None,
        read: Callable[[Any], Read] = lambda found: found,
    ) -> Read:
        """What `read` makes of the JSON that is answered to `content`, or without it to a GET.

        What may pass is tried again after each of DELAYS, or later where the server says so: statuses such as 429 and
        500, lost connections, and answers that are no JSON or that `read` raises for; but not a server that has never
        answered. Then ServerError, in one line that names the address.
        """
        for delay in DELAYS:
            try:
                return self.exchange(path, content, read)
            except ServerError as error:
                final = error.status not in PASSING or not self.met
                if final or self.closed.wait(max(delay, error.delay)):
                    raise
        return self.exchange(path, content, read)

    def exchange(self, path: str, content: Any, read: Callable[[Any], Read]) -> Read:
        where = f"rollout.base_url: {self.url}{path}"
        try:
            reply, body = self.send(path, content)
        except TimeoutError:
            raise ServerError(
                f"{where} did not answer within {self.timeout:g} s (rollout.timeout)"
            ) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServerError(f"{where} cannot be reached ({show_name(why)})") from error
        self.met = True
        if reply.status != http.client.OK:
            said = f"{where} answers {reply.status}: {explain(body) or reply.reason}"
            raise ServerError(said, reply.status, read_delay(reply))
        try:
            return read(json.loads(body))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            said = f"{where} answers what is no answer: {show(body)}"
            raise ServerError(said, reply.status) from None

    def send(self, path: str, content: Any) -> tuple[http.client.HTTPResponse, bytes]:
        """The reply and its body."""
        ends, body = time.monotonic() + self.timeout, bytearray()
        connection = self.connect(timeout=self.timeout)
        try:
            method, data = ("GET", None) if content is None else ("POST", json.dumps(content))
            connection.request(method, self.path + path, data, self.headers)
            reply = connection.getresponse()
            while part := reply.read1():
                body += part
                if len(body) > MOST_BYTES:
                    raise http.client.HTTPException(f"more than {MOST_BYTES} bytes")
                if time.monotonic() > ends:
                    raise TimeoutError
        finally:
            connection.close()
        return reply, bytes(body)

    def close(self) -> None:
        """Ends the waiting for further tries."""
        self.closed.set()


def read_address(url: str) -> tuple[Callable[..., http.client.HTTPConnection], str]:
    """What connects to a server, and the path that all others there begin with; ConfigError for what is no address."""
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    try:
        parts = urlsplit(url)
        kind, host, port = kinds.get(parts.scheme), parts.hostname, parts.port
    except ValueError:  # of a port, or of brackets
        kind = host = None
    if not kind or not host or parts.query or parts.fragment:
        raise ConfigError(
            f"rollout.base_url: {show(url)} is no address of a server; give one as http://localhost:8000/v1"
        )
    if parts.username is not None:
        raise ConfigError(
            "rollout.base_url: leave name and password out of the address, which is shown and kept; a key is read from "
            "the environment variable that rollout.api_key_variable names"
        )
    return lambda **options: kind(host, port, **options), parts.path


def explain(body: bytes) -> str:
    """Why a server refuses, in its own words, on one line."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = body.decode(errors="replace")
    for name in ("error", "message", "detail"):
        found = found.get(name, found) if isinstance(found, dict) else found
    return shorten(" ".join(str(found).split()), MOST_SAID)


def read_delay(reply: http.client.HTTPResponse) -> float:
    """Seconds that the server asks to wait for; 0 if it names no number of them."""
    asked = reply.headers.get("Retry-After", "")
    return min(float(asked), LONGEST_DELAY) if asked.isascii() and asked.isdecimal() else 0.0
