"""One response, parsed: the only reader of the three blocks, used by rollout, masks and rewards alike.

    <switch>KEEP or SWITCH</switch><subgoal>…</subgoal><action>…</action>

A block is the first opening tag and the first closing tag after it; without both it is absent. All works on
UTF-8 bytes, so broken characters never raise: they read as U+FFFD. `ops.find_roles` does the same on tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Span = tuple[int, int]  # [start, end) in bytes, tags included

_SWITCH = (b"<switch>", b"</switch>")
_SUBGOAL = (b"<subgoal>", b"</subgoal>")
_ACTION = (b"<action>", b"</action>")
# One character of U+4E00..U+9FFF in UTF-8.
_CJK = re.compile(rb"\xe4[\xb8-\xbf][\x80-\xbf]|[\xe5-\xe9][\x80-\xbf]{2}")


@dataclass(frozen=True, slots=True)
class Response:
    """What one response says.

    switch: it opens a new segment, for its switch text is neither empty nor KEEP (in any case).
    valid: switch text KEEP or SWITCH (in any case), a subgoal block, an action block, no CJK character.
    subgoal, action: the blocks' texts, stripped of ASCII whitespace; None where the block is absent.
    *_span: each block's bytes `[start, end)`, tags included; None where the block is absent.
    """

    switch: bool
    valid: bool
    subgoal: str | None
    action: str | None
    switch_span: Span | None
    subgoal_span: Span | None
    action_span: Span | None


def parse(text: bytes | str, *, plans: bool = True) -> Response:
    """Parse a response; never raises on any text. Spans count bytes of its UTF-8 form.

    Of an agent that pursues no subgoals (`plans` False) an action block alone is valid.
    """
    data = _encode(text)
    switch_span, switch_text = _find(data, *_SWITCH)
    subgoal_span, subgoal = _find(data, *_SUBGOAL)
    action_span, action = _find(data, *_ACTION)
    word = (switch_text or b"").upper()
    planned = word in (b"KEEP", b"SWITCH") and subgoal_span is not None
    complete = action_span is not None and (planned or not plans)
    return Response(
        switch=word not in (b"", b"KEEP"),
        valid=complete and not _CJK.search(data),
        subgoal=None if subgoal is None else _decode(subgoal),
        action=None if action is None else _decode(action),
        switch_span=switch_span,
        subgoal_span=subgoal_span,
        action_span=action_span,
    )


def command(text: bytes | str, fallback: int = 30) -> str:
    """The action to send to the environment: the action block's text, else the last `fallback` characters."""
    data = _encode(text)
    span, action = _find(data, *_ACTION)
    if span is None:
        return _decode(data)[-fallback:] if fallback else ""
    return _decode(action)


def _find(data: bytes, opening: bytes, closing: bytes) -> tuple[Span | None, bytes | None]:
    start = data.find(opening)
    end = data.find(closing, start + len(opening)) if start >= 0 else -1
    if end < 0:
        return None, None
    return (start, end + len(closing)), data[start + len(opening) : end].strip()


def _encode(text: bytes | str) -> bytes:
    # A str may hold lone surrogates, which strict UTF-8 refuses.
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")
