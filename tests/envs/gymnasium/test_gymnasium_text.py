"""Gymnasium's text environments as ours: texts said freely or listed, names for numbers, what is missing made up."""

import sys

import pytest
from helpers import configure

from hiper_fast import envs, train
from hiper_fast.envs.prompts import State, render_reference, render_transcript
from hiper_fast.options import ConfigError
from hiper_fast.rollout.games import Games
from hiper_fast.runs.metrics import read_metrics

gymnasium = pytest.importorskip("gymnasium")

OTHERS = '''
import gymnasium
import numpy as np
from gymnasium import spaces


class Echo(gymnasium.Env):
    """Won by saying the word of the seed. It tells nothing beside its texts."""

    observation_space = action_space = spaces.Text(99)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.word = f"W{self.np_random.integers(10)}"
        return f"Say {self.word}.", {}

    def step(self, action):
        right = action == self.word.lower()
        return f"You said {action}.", np.float64(right), np.bool_(right), False, {}


class Listed(Echo):
    """Lists what can be said, in its own case."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], self.tell()

    def step(self, action):
        right = action == self.word
        return "", float(right), right, False, self.tell()

    def tell(self):
        commands = [f"W{i}" for i in range(10)]
        return {"admissible_commands": commands, "won": False, "task": "speak", "task_type": "t"}


class Doors(gymnasium.Env):
    """Three doors, the last of them locked."""

    observation_space, action_space = spaces.Text(99), spaces.Discrete(3)

    def __init__(self, locked=True):
        self.mask = np.array([1, 1, not locked], dtype=np.int8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "Doors.", {"action_mask": self.mask}

    def step(self, action):
        return f"Door {action}.", 1.0, action == 1, False, {"action_mask": self.mask}


class Numbers(Doors):
    observation_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        return 1, {}


for kind in (Echo, Listed, Doors, Numbers):
    gymnasium.register(f"Others{kind.__name__}-v0", entry_point=kind, max_episode_steps=1)
'''


@pytest.fixture(autouse=True)
def others(tmp_path, monkeypatch):
    (tmp_path / "others_games.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("others_games", None)
    for name in [name for name in gymnasium.registry if name.startswith("Others")]:
        del gymnasium.registry[name]


def make(name, **options):
    return envs.make("gymnasium", id=f"Others{name}-v0", module="others_games", **options)


def test_a_text_space_is_spoken_to_freely_and_its_silence_is_filled():
    env = make("Echo", task="repeat")
    text, info = env.reset(seed=4)
    word = text[4:6]
    assert info == {
        "admissible_commands": [], "won": False, "task": "repeat", "task_type": "OthersEcho-v0"
    }  # fmt: skip
    assert env.step("nothing")[:4] == ("You said nothing.", 0.0, False, False)
    text, reward, terminated, truncated, info = env.step(word.lower())
    assert (reward, terminated, truncated, info["won"]) == (1.0, True, False, True)
    assert type(reward) is float and type(terminated) is bool, "and not numpy's"
    assert make("Echo").reset(seed=4)[0] == make("Echo").reset(seed=4)[0] == f"Say {word}."


def test_what_is_listed_is_said_in_its_own_case_and_what_is_told_counts():
    env = make("Listed", task="repeat")
    text, info = env.reset(seed=4)
    assert info["admissible_commands"][:2] == ["w0", "w1"]
    assert (info["task"], info["task_type"]) == ("speak", "t")
    *_, terminated, _, info = env.step(text[4:6].lower())
    assert terminated and not info["won"], "a reward, but it says that it is not won"


def test_numbers_have_names_and_a_mask():
    env = make("Doors", actions=["Left", "Middle", "Right"])
    assert env.reset(seed=0)[1]["admissible_commands"] == ["left", "middle"]
    assert env.step("right")[0] == env.step("fly")[0] == "Nothing happens."
    assert env.step("left")[:3] == ("Door 0.", 1.0, False)
    assert env.step("middle")[-1]["won"]
    env = make("Doors", actions=["a", "b", "c"], kwargs={"locked": False})
    assert env.reset(seed=0)[1]["admissible_commands"] == ["a", "b", "c"]


def test_our_own_games_come_back_as_they_went():
    name = {"id": "hiper_fast/household-v0", "module": "hiper_fast.gymnasium"}
    env, plain = envs.make("gymnasium", **name, kwargs={"size": "small"}), envs.make("household")
    assert env.reset(seed=2**31 + 3) == plain.reset(seed=2**31 + 3)
    for command in ("look", "inventory", "go to nowhere"):
        assert env.step(command) == plain.step(command)
    env.close()


@pytest.mark.parametrize(
    "options, told",
    [
        ({"id": "Nowhere-v0"}, "env.id: others_games:Nowhere-v0 cannot be made .*--env.module"),
        ({"id": "X-v0", "module": "no_such"}, "env.id: no_such:X-v0 cannot be made .*no_such"),
        ({"id": "OthersEcho-v0", "kwargs": {"size": 3}}, "cannot be made .*size"),
        ({"id": "OthersDoors-v0"}, r"env.actions: .* Discrete\(3\) and 0 names"),
        ({"id": "OthersDoors-v0", "actions": ["a"]}, "and 1 names are given"),
        ({"id": "OthersEcho-v0", "actions": ["a"]}, "Text space's none"),
    ],
)
def test_what_cannot_be_played_is_refused(options, told):
    with pytest.raises(ConfigError, match=told) as error:
        envs.make("gymnasium", **{"module": "others_games", **options})
    assert "\n" not in str(error.value)


def test_a_run_asks_for_a_name_and_for_texts():
    with pytest.raises(ConfigError, match="env.id: say which environment is played"):
        Games(configure("gymnasium"))
    given = {"env__id": "others_games:OthersNumbers-v0", "env__actions": ["a", "b", "c"]}
    with pytest.raises(ConfigError, match="are int, not texts; wrap it"):
        Games(configure("gymnasium", **given))


def test_prompts_of_free_text_list_nothing():
    for render in (render_reference, render_transcript):
        free, listed = (render(State("t", "o", commands)) for commands in ([], ["go"]))
        assert "dmissible" not in free and "<action>your action</action>" in free
        assert "Admissible actions:\n" in listed and "one admissible action" in listed


def test_free_text_trains(tmp_path):
    status = train.main([
        "--env=gymnasium", "--env.id=others_games:OthersEcho-v0", "--env.max_turns=2", "--updates=1",
        "--train.episodes=4", "--train.minibatches=1", "--train.critic_updates=0", "--run.threads=1",
        "--agent.max_response_tokens=4", "--eval.episodes=2", "--warm_start.enabled=no",
        "--run.display=none", f"--run.folder={tmp_path}", "--name=run",
    ])  # fmt: skip
    assert status == 0
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    trained = next(row for row in rows if row["stage"] == "train")
    assert trained["rollout/turns"] == 2, "Gymnasium's own limit of 1 is not in force"
    assert "You said " in next((tmp_path / "run/episodes").glob("*1.jsonl")).read_text()
