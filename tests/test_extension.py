"""An estimator, an environment, an engine and an op from outside the package, which is left as it is."""

import json
import math
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from hiper_fast import envs, estimators, train
from hiper_fast.envs.family import families
from hiper_fast.options import ConfigError
from hiper_fast.runs.metrics import read_metrics

OUTSIDE = '''
import random
from dataclasses import dataclass

import torch

from hiper_fast.config import EnvConfig
from hiper_fast.envs.family import Family
from hiper_fast.envs.player import Move
from hiper_fast.estimators import Credit, Level, requires
from hiper_fast.ops import reference
from hiper_fast.options import option
from hiper_fast.rollout.engines import Answer


class Lights:
    """Two switches, up or down; won when both are as the task says."""

    def __init__(self, switches=2):
        self.switches = switches

    def reset(self, *, seed=None, options=None):
        rng = random.Random(seed)
        self.wanted = [rng.random() < 0.5 for _ in range(self.switches)]
        self.state = [not wanted for wanted in self.wanted]
        return "All is wrong.", self.info()

    def step(self, command):
        for i in range(self.switches):
            if command == f"press {i}":
                self.state[i] = not self.state[i]
        won = self.state == self.wanted
        return "Lit." if won else "Dark.", 0.0, won, False, self.info()

    def info(self):
        commands = [f"press {i}" for i in range(self.switches)]
        task = " ".join("on" if wanted else "off" for wanted in self.wanted)
        won = self.state == self.wanted
        return {"admissible_commands": commands, "won": won, "task": task, "task_type": "lights"}


class Presser:
    def __init__(self):
        self.turn = -1

    def observe(self, action, observation, commands):
        self.turn += 1

    def move(self, commands):
        return Move(f"switch {self.turn}", commands[self.turn % len(commands)])

    def stumble(self, move, commands, rng):
        return Move(move.subgoal, rng.choice(commands))


@dataclass(slots=True)
class Options(EnvConfig):
    switches: int = option(2, "how many switches", above=0)


class MyFamily(Family):
    Options = Options
    environment = Lights

    def make_player(self, kind, env, rng):
        return Presser()


class PlainFamily(Family):
    """The least that one can say."""

    environment = Lights


@requires(values=False, groups=True)
def estimate(turns, values, config):
    """The episode's return against the mean of its group."""
    assert values is None
    lengths = turns.cu_turns.diff().long()
    episode = torch.arange(len(lengths)).repeat_interleave(lengths)
    returns = torch.zeros(len(lengths)).index_add(0, episode, turns.rewards)
    groups = int(turns.group.max()) + 1
    count = torch.zeros(groups).index_add(0, turns.group, torch.ones_like(returns))
    mean = torch.zeros(groups).index_add(0, turns.group, returns) / count
    advantages = (returns - mean[turns.group])[episode]
    roles = reference.ACTION | reference.SUBGOAL | reference.SWITCH
    every = torch.ones_like(turns.switch)
    assert {len(set(turns.state[episode == i].tolist())) for i in range(2)} != {0}
    return Credit((Level("episode", roles, advantages, every, raw=False),))


class FixedEngine:
    """Says the same to everyone."""

    made = []

    capacity = 3

    def __init__(self, agent, config):
        self.made.append(config.rollout.engine)
        self.waiting = {}
        text = "<switch>SWITCH</switch><subgoal>a</subgoal><action>press 0</action>"
        self.ids = agent.tokenizer(text, add_special_tokens=False)["input_ids"]

    def submit(self, key, request):
        self.waiting[key] = request

    def collect(self):
        assert len(self.waiting) <= self.capacity
        key, _ = self.waiting.popitem()
        return [(key, Answer(list(self.ids), [-1.0] * len(self.ids)))]

    def cancel(self, key):
        del self.waiting[key]

    def wake(self):
        self.waiting.clear()

    sleep = update = close = wake
'''
SMALL = [
    *(
        "--updates=2",
        "--train.episodes=8",
        "--train.group=4",
        "--train.minibatches=2",
        "--train.critic_updates=1",
    ),
    *(
        "--env.max_turns=3",
        "--agent.max_response_tokens=40",
        "--warm_start.episodes=8",
        "--eval.episodes=4",
    ),
    *("--run.display=none", "--run.threads=1"),
]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A module that the package knows nothing of."""
    (tmp_path / "outside.py").write_text(textwrap.dedent(OUTSIDE))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("outside", None)


@pytest.fixture(autouse=True)
def as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def install(monkeypatch, folder, group, name, value):
    """A distribution with one entry point, as pip would leave it."""
    info = folder / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")


def run(folder, *options):
    status = train.main([*SMALL, f"--run.folder={folder}", "--name=run", *options])
    return status, read_metrics(folder / "run" / "metrics.jsonl")


def test_an_estimator_an_environment_and_an_engine_train_together(outside):
    status, rows = run(
        outside, "--env=outside:MyFamily", "--env.switches=1", "--advantage.estimator=outside:estimate",
        "--rollout.engine=outside:FixedEngine",
    )  # fmt: skip
    assert status == 0
    last = [row for row in rows if row["stage"] == "train"][-1]
    assert last["optim/skipped_steps"] == 0 and math.isfinite(last["loss/policy"])
    first = next(row for row in rows if row["stage"] == "train")
    assert first["optim/skipped_steps"] == 0, "without a critic nothing waits for it"
    assert "value/explained_high" not in last and last["loss/value"] == 0, "it has no critic"
    assert last["rollout/success"] == 1 and last["rollout/turns"] == 1, "one switch, pressed once"
    assert not (outside / "run/checkpoints/step-000002/critic.safetensors").exists()
    import outside as module

    assert module.FixedEngine.made == ["outside:FixedEngine"], "one lives as long as the run"
    lines = (outside / "run/episodes/step-000002.jsonl").read_text().splitlines()
    turn = next(e for e in map(json.loads, lines) if e["stage"] == "train")["turns"][0]
    assert turn["value_high"] is None and turn["advantage_low"] == turn["advantage_switch"] == 0


def test_it_resumes_without_a_critic(outside):
    options = [
        "--env=outside:MyFamily",
        "--advantage.estimator=outside:estimate",
        "--run.save_every=1",
    ]
    assert run(outside / "whole", *options)[0] == 0
    assert run(outside / "parts", *options, "--updates=1", "--train.final_lr=1")[0] == 0
    assert (
        train.main([f"--run.folder={outside / 'parts'}", "--name=run", "--resume", "--updates=2"])
        == 0
    )
    steps = [
        row["step"]
        for row in read_metrics(outside / "parts/run/metrics.jsonl")
        if row["stage"] == "train"
    ]
    assert steps == [1, 2]


def test_the_least_environment_trains_with_hae(outside):
    status, rows = run(
        outside, "--env=outside:PlainFamily", "--warm_start.enabled=no", "--agent.style=transcript"
    )
    assert status == 0 and rows[-1]["stage"] == "eval"
    assert math.isfinite(
        [row for row in rows if row["stage"] == "train"][-1]["value/explained_high"]
    )


def test_the_environment_that_the_documentation_shows_trains(tmp_path, monkeypatch):
    shown = Path(__file__).parents[1] / "docs" / "environments.md"
    code = re.search(r"```python\n(.*?)```", shown.read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) <= 40
    (tmp_path / "vault.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    command = re.search(r"python -m hiper_fast.train (--env vault.*)", shown.read_text())[1]
    try:
        status, rows = run(tmp_path, *command.split())
        env = envs.make("vault:MyFamily")
        env.reset(seed=1)
        ends = [env.step(f"use the {colour} key")[2:5:2] for colour in env.locks]
    finally:
        sys.modules.pop("vault", None)
    assert status == 0 and rows[-1]["stage"] == "eval"
    last = [row for row in rows if row["stage"] == "train"][-1]
    assert math.isfinite(last["loss/policy"]) and 2 <= last["rollout/turns"] <= 6
    assert [(over, info["won"]) for over, info in ends] == [(False, False), (True, True)]


def test_an_environment_without_a_player_says_so(outside, capsys):
    assert run(outside, "--env=outside:PlainFamily")[0] == 2
    err = capsys.readouterr().err
    assert "has no scripted player; use --warm_start.enabled no" in err and err.count("\n") == 1


BROKEN = """
import dataclasses
from outside import *

class NotBelow:
    environment = Lights

class Nothing(Family):
    pass

class Keyless(Lights):
    def info(self):
        return {key: value for key, value in super().info().items() if key != self.key}

def family(environment, options=EnvConfig):
    class Made(Family):
        Options = options
    Made.environment = environment
    return Made

def without(key):
    return family(type("Without", (Keyless,), {"key": key}))

NoTask, NoWon, NoCommands, NoType = map(without, ("task", "won", "admissible_commands", "task_type"))
NoInfo = family(type("NoInfo", (Lights,), {"reset": lambda self, seed=None, options=None: "begun"}))
NoSeed = family(type("NoSeed", (Lights,), {"reset": lambda self: ("begun", {})}))
Four = family(type("Four", (Lights,), {"step": lambda self, command: ("", 0.0, False, self.info())}))
Bytes = family(type("Bytes", (Lights,), {"reset": lambda self, seed=None: (b"", {})}))

def declare(name, hint, default, decorate=True):
    made = type("Options", (EnvConfig,), {"__annotations__": {name: hint}, name: default, "__module__": __name__})
    return family(Lights, dataclasses.dataclass(made) if decorate else made)

Tuple = declare("pair", tuple[int, int], option((1, 2), "a pair"))
Unbounded = declare("size", int, option(3, "a size"))
Plain = declare("size", int, 3)
Undecorated = declare("size", int, option(3, "a size", above=0), False)
"""


@pytest.mark.parametrize(
    "name, told",
    [
        ("NotBelow", "no class below hiper_fast.envs.family.Family"),
        ("Nothing", "has no `environment`: say which class is played"),
        ("NoTask", "reset's info must have 'task', a str"),
        ("NoWon", "reset's info must have 'won', a bool"),
        ("NoCommands", "reset's info must have 'admissible_commands', a list"),
        ("NoType", "reset's info must have 'task_type', a str"),
        ("NoInfo", "reset must return (observation, info)"),
        ("NoSeed", "reset(seed=…) fails"),
        ("Four", "step must return (observation, reward, terminated, truncated, info)"),
        ("Bytes", "reset's observation must be str, got bytes"),
        ("Tuple", "env.pair: a type of options is int, float"),
        (
            "Unbounded",
            "env.size: a number needs a range (above, least, below, most) or unbounded=True",
        ),
        ("Plain", "Options.size: make it with hiper_fast.options.option"),
        ("Undecorated", "put @dataclass(slots=True) above the class"),
    ],
)
def test_mistakes_in_an_environment_are_named(outside, capsys, name, told):
    (outside / "broken.py").write_text(BROKEN)
    try:
        with pytest.raises(SystemExit) as stopped:
            raise SystemExit(run(outside, f"--env=broken:{name}", "--warm_start.enabled=no")[0])
    finally:
        sys.modules.pop("broken", None)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and told in err and err.count("\n") == 1, err


def test_the_tiny_models_words_are_those_of_the_games(outside):
    import outside as module

    words, openings = module.MyFamily(module.Options(switches=1)).list_words()
    assert {"press", "on", "off", "All", "wrong"} <= set(words) and openings == []


def test_an_installed_package_brings_names(outside, monkeypatch):
    install(monkeypatch, outside, "hiper_fast.families", "lights", "outside:MyFamily")
    import outside as module

    assert "lights" in families.names() and families.find("lights") is module.MyFamily
    assert isinstance(envs.make("lights", switches=3), module.Lights)
    with pytest.raises(ConfigError, match="did you mean lights"):
        families.find("light")


def test_an_estimator_is_registered_once(outside):
    import outside as module

    estimators.register("mean", module.estimate)
    try:
        assert estimators.find("mean") is module.estimate and "mean" in estimators.names()
        estimators.register("mean", module.estimate)
        for name in ("mean", "hae"):
            with pytest.raises(ValueError, match=f"'{name}' already"):
                estimators.register(name, lambda *_: None)
    finally:
        estimators._plugins.registered.clear()


def test_an_op_of_ones_own_beside_ours():
    """Ops are plain torch operators: another library's go with them under one compile."""
    library = torch.library.Library("outside_ops", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    torch.library.register_fake("outside_ops::twice", torch.empty_like, lib=library)
    from hiper_fast import ops

    mask = torch.tensor([True, True, False])
    values = torch.tensor([1.0, 3.0, 7.0])
    assert ops.normalize(torch.ops.outside_ops.twice(values), mask).tolist() == pytest.approx(
        [-1, 1, 0]
    )
