"""Text from outside made fit to be shown: names, files, games and models may hold anything."""

from __future__ import annotations

import re
from typing import Any

LONGEST = 600  # characters of an error

_ESCAPES = (
    r"\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # a string: a title, a link
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, the cursor
    r"|\x1b[ -/]*[0-~]?"
)
_SUSPECT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_CONTROLS = re.compile(
    _ESCAPES + r"|\r(?=\n)|(?P<blank>[\r\v\f])|(?P<surrogate>[\ud800-\udfff])"
    r"|[\x00-\x08\x0e-\x1f\x7f-\x9f]"
)
_DIRECTIONS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """What a terminal, a page or a log may be given: as of `strip_controls`, no bidirectional marks either."""
    return _DIRECTIONS.sub("", strip_controls(text))


def strip_controls(text: str) -> str:
    """`text` in which every character can be encoded, and none but new lines and tabs commands.

    A lone surrogate becomes `?`, another break a blank; escape sequences and control characters go.
    """
    return _CONTROLS.sub(_replace, text) if _SUSPECT.search(text) else text


def escape(text: str) -> str:
    """What cannot be printed, as Python would write it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shorten(text: str, most: int) -> str:
    """What is in the middle of a long text left out."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2) :]}"


def replace_surrogates(text: str) -> str:
    """`text` with a `?` for each lone surrogate: what can be encoded."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _replace(found: re.Match[str]) -> str:
    return {"surrogate": "?", "blank": " "}.get(found.lastgroup, "")


def strip_all(content: Any) -> Any:
    """JSON content with `strip_controls` done to every text in it, keys included."""
    if isinstance(content, str):
        return strip_controls(content)
    if isinstance(content, dict):
        return {strip_all(key): strip_all(value) for key, value in content.items()}
    if isinstance(content, list):
        return [strip_all(part) for part in content]
    return content


class PlainError(Exception):
    """An error whose message may quote what was read; it is told clean, in one line of readable length."""

    def __str__(self) -> str:
        return shorten(" ".join(clean(super().__str__()).split()), LONGEST)
