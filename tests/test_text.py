"""Text that is no plain text: cleaned once on each way to a model, a file and the terminal."""

import io
import json
import random
import sys
import time
import unicodedata

import pytest
from helpers import configure, make_tiny
from products import asked, product

from hiper_fast import envs, play
from hiper_fast.envs import webshop
from hiper_fast.envs.base import GameError
from hiper_fast.envs.family import Family
from hiper_fast.options import ConfigError
from hiper_fast.rollout.engines import Answer
from hiper_fast.rollout.episode import Play
from hiper_fast.rollout.prompter import Prompter
from hiper_fast.runs.metrics import Logger
from hiper_fast.runs.tensors import CheckpointError
from hiper_fast.text import clean, replace_surrogates, strip_all, strip_controls

EVIL = "\x1b]0;title\x07\x1b[31mred\x1b[0m\x00\x9b2J\u202e\u200f\u2066\ud800é漢🎁"


def is_plain(text):
    kinds = {unicodedata.category(c) for c in text if c not in "\n\t"}
    return not kinds & {"Cc", "Cs"} and not set(text) & set("\u202e\u200f\u2066\u061c")


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("plain, é漢🎁\n\ta", "plain, é漢🎁\n\ta"),
        (EVIL, "red?é漢🎁"),
        ("a\r\nb\rc\x0bd\x0ce", "a\nb c d e"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]never ended", "]never ended"[1:]),
        ("\x1bPq#0\x1b\\after\x1b(B\x1bc!", "after!"),
        ("\x1b", ""),
        ("\x1b[", ""),
        ("\ud83d\ude00 \ud83d", "?? ?"),
        (
            "soft\xad hyphen, zero\u200bwidth, joiner\u200d",
            "soft\xad hyphen, zero\u200bwidth, joiner\u200d",
        ),
    ],
)
def test_clean(text, cleaned):
    assert clean(text) == cleaned and clean(cleaned) == cleaned


def test_any_text_comes_out_plain_and_bidirectional_marks_stay_where_they_are_content():
    rng = random.Random(0)
    pool = [*map(chr, range(256)), *"\x1b\x1b\x1b[[]]\\m;\x9b\u202e\u200e\ud800\udfff\u2028é漢"]
    for _ in range(3000):
        text = "".join(rng.choices(pool, k=rng.randrange(30)))
        assert is_plain(clean(text))
        for fit in (clean, strip_controls, replace_surrogates):
            fit(text).encode()
    assert strip_controls("a\u200eb\x00") == "a\u200eb"
    assert strip_all({"a\x00": ["b\x1b[m", {"c": None}, 3]}) == {"a": ["b", {"c": None}, 3]}


@pytest.mark.parametrize(
    "text", ["\x1b]" * 50_000, "\x1b[" + "0" * 100_000, "\x1bP" + "x" * 100_000]
)
def test_no_text_takes_long(text):
    started = time.process_time()
    clean(text)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("error", [GameError, CheckpointError, webshop.DataError])
def test_errors_are_told_clean(error):
    assert str(error(f"{EVIL}: wrong")) == "red?é漢🎁: wrong"


def test_options_are_repeated_escaped():
    told = str(ConfigError(f"{EVIL}: wrong"))
    assert told.isprintable() and told == clean(told) and told.endswith("é漢🎁: wrong")


# A foreign environment that says anything.


class Rude:
    """Won by the command that looks like `press red?é漢🎁`, whatever it is made of."""

    def reset(self, *, seed=None, options=None):
        return f"A room of {EVIL}.", self.tell(False)

    def step(self, command):
        won = command == f"press {EVIL}"
        return f"You did {command}: {EVIL}.", 0.0, won, False, self.tell(won)

    def tell(self, won):
        task, commands = f"Press {EVIL}.", ["look", f"press {EVIL}"]
        return {"admissible_commands": commands, "won": won, "task": task, "task_type": EVIL}


class RudeFamily(Family):
    environment = Rude


def test_what_an_environment_says_is_read_clean_and_what_it_wants_is_sent_as_it_wants_it():
    config = configure("household")
    agent = make_tiny()
    family = RudeFamily(config.env)
    played = Play(Rude(), {"seed": 0}, family, config).begin()
    prompter = Prompter(agent.tokenizer, config.agent, family.styles["reference"])
    told = [played.state.task, played.state.observation, *played.state.commands]
    told.append(played.episode.task_type)
    assert all(map(is_plain, told)) and played.state.commands[1] == "press red?é漢🎁"
    [(ids, _)] = prompter([played.state])
    played.see(ids, False)
    played.step(Answer([1], [0.0]), "<action>press red?é漢🎁</action>".encode())
    assert played.over and played.episode.won and is_plain(played.state.observation)
    assert played.episode.rewards == [config.reward.success], "it was listed"


def test_the_terminal_gets_no_more_than_that(monkeypatch, capsys):
    typed = "look \x1b[2J\x07\u202e\npress red?é漢🎁\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    monkeypatch.setitem(sys.modules, "rude", type(sys)("rude"))
    sys.modules["rude"].Family = RudeFamily
    assert play.main(["rude:Family"]) == 0
    shown = capsys.readouterr()
    assert is_plain(shown.out) and "Won after 2 turns" in shown.out and not shown.err
    assert play.main(["household", "--checkpoint", "no\x1b[31m/such\u202e"]) == 2
    assert is_plain(capsys.readouterr().err)


def test_what_a_model_says_is_shown_clean():
    from rich.console import Console

    from hiper_fast.envs.prompts import State

    console = Console(file=io.StringIO(), width=100)
    for said in (EVIL, f"<switch>SWITCH</switch><subgoal>{EVIL}</subgoal><action>{EVIL}</action>"):
        thought = play.Thought(Answer([], []), said.encode(errors="replace"), None)
        console.print(play.show_thought(thought, State("", "", [])))
    assert "red" in console.file.getvalue() and is_plain(console.file.getvalue())


def test_a_runs_messages_are_clean(tmp_path, capsys):
    with Logger(tmp_path, display="plain", total_steps=1) as logger:
        logger.message(f"catalogue: {EVIL}.json")
    shown = "".join(capsys.readouterr())
    assert "red?é漢🎁.json" in shown and is_plain(shown)


# WebShop's own files.


def test_a_shops_texts_can_be_read_by_any_tokenizer_and_keep_their_marks(tmp_path):
    value = f"{EVIL} blue"
    item = product("B\x001", name=f"lamp {EVIL}", customization_options={EVIL: [{"value": value}]})
    (tmp_path / "items_shuffle.json").write_text(json.dumps([item]))
    (tmp_path / "items_ins_v2.json").write_text(
        json.dumps({"B\x001": asked(f"dimmable {EVIL}", instruction=f"a lamp {EVIL}")})
    )
    shop = webshop.Catalogue.load(tmp_path, cache=tmp_path / "cache", nouns="plain")
    env = webshop.WebShop(shop, "all")
    seen, info = env.reset(seed=0)
    texts = [seen, info["task"]]
    blue = "click[red\u202e\u200f\u2066?é漢🎁 blue]"
    for command in (
        f"search[{EVIL}]",
        "search[lamp \ud800]",
        "click[b1]",
        blue,
        "click[description]",
    ):
        seen, *_, info = env.step(command)
        texts += [seen, *info["admissible_commands"]]
    assert env.where == "sub-page" and env.options
    for text in texts:
        text.encode()
        assert "\x1b" not in text and "\x00" not in text
    assert any("\u202e" in text for text in texts), "as the original shows it"


def test_prices_beyond_all_numbers_are_an_error_at_the_start():
    with pytest.raises(webshop.DataError, match="product B1: 'pricing' is '.999"):
        webshop.Catalogue.from_items([product("B1", pricing="$" + "9" * 400)], {})


def test_the_embedded_games_are_plain():
    for name in ("household", "webshop"):
        env = envs.make(name)
        for seed in range(5):
            seen, info = env.reset(seed=seed)
            assert all(
                text == clean(text) for text in (seen, info["task"], *info["admissible_commands"])
            )
