"""Whatever is typed or written ends as a configuration, or in one line that says what is wrong and harms no terminal.

By hand, for more of them: python tests/test_fuzz_options.py COUNT [SEED], and a tenth as many files
"""

import contextlib
import io
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hiper_fast import configure
from hiper_fast.config import SHORT, Config
from hiper_fast.configure import list_recipes, resolve
from hiper_fast.envs.family import families
from hiper_fast.options import ConfigError, list_options
from hiper_fast.runs.folder import format_config

COMMANDS, FILES = 300, 150
LONGEST, SLOWEST = 400, 20.0  # characters of a message; seconds, on a busy machine
FAMILIES = ("household", "alfworld", "webshop")
KINDS = [families.find(name).Options for name in FAMILIES]
OPTIONS = {
    name: option for kind in KINDS for name, option in list_options(Config(env=kind())).items()
}
NASTY = [
    *("", " ", "none", "null", "nan", "-nan", "inf", "-inf", "1e999", "-1", "0", "1", "1.5", "-0.0", "1e-400", "0x10"),
    *("9" * 30, "9" * 5000, "1_000", "٣", "½", "true", "yes", "NO", "auto", "tiny", "hae", "household", "grpo", "ppo"),
    *("1,2,3", "1,,3", ",", "1,inf,1", "a,b,c", "[1]", "{}", "../x", "/etc/passwd", ".", "..", "a/b", "a\\b", "~"),
    *("\n", "\r\n", "\t", "\0", "\x1b[2J", "\x1b]0;owned\x07", "\x9b31m", "\u202egnp", "\u2028", "\ud800", "\ufeff"),
    *("é界🧑", "x" * 5000, "ü" * 300, "-", "--", "---", "=", "%s", "%(default)s", "{0}", "$HOME", "*", "'\"", "#"),
    *("no.such:Thing", ":", ":x", "x:", ".x:y", "a..b:c", "os:path", "os.path:join", "sys:exit", "cuda:99", "meta"),
]  # fmt: skip
SNIPPETS = [
    *("\t", "\n", "\r", "  ", ":", ": ", "- ", "{", "}", "[", "]", ",", "#", "&a ", "*a", "<<: *a", "!!int ", "!"),
    *("? ", "| ", "> ", "'", '"', "---\n", "...\n", "%YAML 9.9\n", "null", "~", ".inf", ".nan", "0x" + "f" * 6000),
    *("2001-01-01", "2001-13-45", "1:2:3", "!!binary x", "!!timestamp x", "!!set ", "!!omap ", "!!bool x", "\0"),
    *("\x1b[31m", "\u202e", "\ufeff", "base: ", "base: alfworld\n", "train:\n", "env: ", "5: ", "true: "),
    *("!!python/object:os.system ", "[" * 3000, "{a: " * 3000),
]  # fmt: skip


def mutate(rng, text, pieces):
    """Some places of a text cut, doubled, moved, or with a nasty piece in them."""
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:a] + text[min(b, a + 9) :]
        elif kind == 1:
            text = text[:b] + text[a:b][:40] + text[b:]
        elif kind == 2:
            text = (
                text[:a] + chr(rng.choice([rng.randrange(128), rng.randrange(0x3000)])) + text[a:]
            )
        elif kind == 3:
            text = text[:a] + rng.choice(pieces) + text[a:]
        else:
            text = text[:a] + text[a:b][::-1][:12] + text[b:]
    return text


def draw_command(rng):
    argv = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice([*OPTIONS, *SHORT, "config"])
        value = draw_value(rng, SHORT.get(name, name))
        name = mutate(rng, name, NASTY) if rng.random() < 0.2 else name
        name = name.rpartition(".")[2] if rng.random() < 0.1 else name
        dashes = rng.choice(["--"] * 9 + ["-", "", "—"])
        argv += [f"{dashes}{name}={value}"] if rng.random() < 0.7 else [f"{dashes}{name}", value]
    return argv


def draw_value(rng, name):
    """One that the option might have, or that nothing should have, or one of them changed."""
    option = OPTIONS.get(name)
    usual = [option.default, *option.choices, *option.bounds.values()] if option else list_recipes()
    value = str(rng.choice([*usual, *usual, rng.choice(NASTY)]))
    return mutate(rng, value, NASTY) if rng.random() < 0.3 else value


def draw_file(rng):
    """A recipe, an environment's settings, or all of a run's, changed here and there."""
    files = [*list_recipes().values(), *(families.find(name).defaults for name in FAMILIES)]
    texts = [
        *(file.read_text() for file in files),
        *(format_config(Config(env=e())) for e in KINDS),
    ]
    return mutate(rng, rng.choice(texts), SNIPPETS)


def judge_command(argv):
    """What is wrong with how a command line ends, or nothing."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            config = configure.parse(argv, program="train", description="Trains.")
        return "" if isinstance(config, Config) else f"{config!r}"
    except SystemExit as stopped:
        if stopped.code == 0 and out.getvalue().startswith("usage"):
            return ""
        return judge_message(err.getvalue().removesuffix("\n")) or (
            stopped.code != 2 and "exit status"
        )
    except Exception as error:
        return repr(error)[:300]


def judge_file(path):
    try:
        return "" if isinstance(resolve([path]), Config) else "no configuration"
    except ConfigError as error:
        return judge_message(str(error))
    except Exception as error:
        return repr(error)[:300]


def judge_message(text):
    if not text or not text.isprintable() or len(text) > LONGEST:
        return f"{len(text)} characters: {text[:500]!r}"
    return ""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)


def fuzz_commands(count, seed=0):
    """(number, what was drawn, what is wrong) of those that end otherwise."""
    wrong = []
    for i in range(count):
        rng = random.Random(f"command {seed} {i}")
        argv = draw_command(rng)
        started = time.perf_counter()
        fault = judge_command(argv)
        if fault or time.perf_counter() - started > SLOWEST:
            wrong.append((i, [argument[:60] for argument in argv], fault or "slow"))
    return wrong


def fuzz_files(count, folder, seed=0):
    """(number, what is wrong) of those that end otherwise."""
    wrong, file = [], folder / "fuzzed.yaml"
    for i in range(count):
        rng = random.Random(f"file {seed} {i}")
        content = draw_file(rng).encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            content += bytes(rng.randrange(256) for _ in range(9))
        file.write_bytes(content)
        started = time.perf_counter()
        fault = judge_file(file)
        if fault or time.perf_counter() - started > SLOWEST:
            wrong.append((i, fault or "slow"))
    return wrong


def test_fuzzed_command_lines():
    assert fuzz_commands(COMMANDS) == []


def test_fuzzed_files(tmp_path):
    assert fuzz_files(FILES, tmp_path) == []


def test_the_fuzz_is_neither_all_taken_nor_all_refused():
    taken = 0
    for i in range(100):
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            configure.parse(draw_command(random.Random(i)), program="train", description="")
            taken += 1
    assert 10 < taken < 90


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        number, first = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else 0
        print(*fuzz_commands(number, first), *fuzz_files(number // 10, Path(name), first), sep="\n")
