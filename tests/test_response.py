"""The parser of one response."""

import dataclasses
import random

import pytest

from hiper_fast.response import command, parse

FULL = "<switch>SWITCH</switch> <subgoal> find a mug </subgoal>\n<action>go to desk 1</action>"


def test_a_full_response():
    parsed = parse(FULL)
    assert (parsed.switch, parsed.valid) == (True, True)
    assert (parsed.subgoal, parsed.action) == ("find a mug", "go to desk 1")
    cut = [
        FULL[slice(*span)] for span in (parsed.switch_span, parsed.subgoal_span, parsed.action_span)
    ]
    assert cut == [
        "<switch>SWITCH</switch>",
        "<subgoal> find a mug </subgoal>",
        "<action>go to desk 1</action>",
    ]
    assert parse(FULL.encode()) == parsed
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed.switch = False


@pytest.mark.parametrize(
    "word, switch, valid",
    [
        ("SWITCH", True, True),
        ("switch", True, True),
        (" \n Switch\t", True, True),
        ("KEEP", False, True),
        ("kEeP ", False, True),
        ("", False, False),
        ("  \t ", False, False),
        ("maybe", True, False),
        ("KEEP SWITCH", True, False),
        ("ke ep", True, False),
        ("KE P", True, False),
        ("KEEP\u3000", True, False),  # only ASCII whitespace is stripped
    ],
)
def test_the_switch_text(word, switch, valid):
    parsed = parse(f"<switch>{word}</switch><subgoal>a</subgoal><action>b</action>")
    assert (parsed.switch, parsed.valid) == (switch, valid)


@pytest.mark.parametrize(
    "text, subgoal, action",
    [
        ("", None, None),
        ("<subgoal>a", None, None),
        ("a</subgoal>", None, None),
        ("</subgoal>x<subgoal>a</subgoal>", "a", None),
        ("<subgoal>a</subgoal><subgoal>b</subgoal>", "a", None),
        ("<subgoal>a<subgoal>b</subgoal>", "a<subgoal>b", None),
        ("<subgoal>a<action>b</action></subgoal>", "a<action>b</action>", "b"),
        ("<subgoal></subgoal><action>  </action>", "", ""),
        ("<Action>a</Action>< action>b</ action>", None, None),
    ],
)
def test_blocks(text, subgoal, action):
    parsed = parse(text)
    assert (parsed.subgoal, parsed.action) == (subgoal, action)
    assert not parsed.valid and not parsed.switch


def test_validity_needs_all_three_blocks_and_no_cjk():
    blocks = ["<switch>KEEP</switch>", "<subgoal>a</subgoal>", "<action>b</action>"]
    assert parse("".join(blocks)).valid
    assert parse("".join(blocks[::-1])).valid  # in any order
    for missing in range(3):
        assert not parse("".join(blocks[:missing] + blocks[missing + 1 :])).valid
    for character, valid in [
        ("\u4dff", True), ("\u4e00", False), ("\u6c34", False), ("\u9fff", False), ("\ua000", True),
        ("é", True), ("あ", True), ("😀", True),
    ]:  # fmt: skip
        assert parse("".join(blocks) + character).valid is valid, character


def test_spans_count_bytes():
    text = "é😀<action>naïve</action>"
    start, end = parse(text).action_span
    assert start == 6 and text.encode()[start:end].decode() == "<action>naïve</action>"


def test_command():
    assert command("x<action>  go to desk 1\n</action>") == "go to desk 1"
    assert command("<action></action>") == ""
    assert command("é" * 40) == "é" * 30
    assert command("é" * 40, fallback=20) == "é" * 20
    assert command("short <action>open", fallback=20) == "short <action>open"
    assert command("anything", fallback=0) == ""
    assert command(b"\xff" + b"go") == "\ufffdgo"


def test_no_text_raises():
    random.seed(0)
    for _ in range(300):
        text = (
            b"<switch>"
            + random.randbytes(20)
            + b"</switch><action>"
            + random.randbytes(9)
            + b"</action>"
        )
        assert isinstance(parse(text).action, str) and isinstance(command(text), str)
    assert parse("<action>\ud800</action>").action == "\ufffd" * 3
