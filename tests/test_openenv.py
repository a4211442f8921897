"""Our games through an OpenEnv server, by the package's own client, and another's games through one."""

import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import configure

pytest.importorskip("openenv", reason="needs openenv-core: pip install 'hiper_fast[openenv]'")

import uvicorn  # noqa: E402
from openenv.core import GenericEnvClient  # noqa: E402
from openenv.core.env_server import create_fastapi_app  # noqa: E402
from openenv.core.env_server.interfaces import Environment  # noqa: E402
from openenv.core.env_server.types import Action, Observation, State  # noqa: E402

from hiper_fast import envs, serve, train  # noqa: E402
from hiper_fast.envs.family import FIRST_SEEDS, families  # noqa: E402
from hiper_fast.envs.openenv import OpenEnvSession, ServerError  # noqa: E402
from hiper_fast.openenv import Games, TextAction, TextEnvironment  # noqa: E402
from hiper_fast.options import ConfigError  # noqa: E402
from hiper_fast.rollout.games import Games as TrainingGames  # noqa: E402
from hiper_fast.runs.metrics import read_metrics  # noqa: E402

TEST = FIRST_SEEDS["test"]


@pytest.fixture(scope="module")
def url():
    """Household games, served by the command."""
    command = [sys.executable, "-m", "hiper_fast.serve", "household", "--port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--sessions=5"], **pipes) as server:
        line = server.stdout.readline()
        yield re.search("http://[0-9.]+:[0-9]+", line).group()
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0 and server.stderr.read() == ""
    assert "household at" in line and "test 4096" in line


class Served:
    """An app at a free port, or at one that it had before, until the block ends."""

    def __init__(self, app, port=0):
        self.socket = serve.listen("127.0.0.1", port)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


class GuessAction(Action):
    message: str
    channel: int = 0


class Seen(Observation):
    heard: str
    tried: int


class Guess(Environment):
    """A game of another's making: no commands, no task, nothing but a text and a reward."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None):
        self.word, self.tried = f"word{seed}", 0
        return Seen(heard="Say it.", tried=0)

    def step(self, action, timeout_s=None):
        self.tried += 1
        right = action.message == self.word
        return Seen(heard="Yes." if right else "No.", tried=self.tried, done=right, reward=right)

    @property
    def state(self):
        return State()


class Chatty(Guess):
    def reset(self, seed=None, episode_id=None):
        return Said(heard="a", shown="b")


class Said(Observation):
    heard: str
    shown: str


def make_guess(env=Guess, action=GuessAction, seen=Seen, sessions=8):
    return create_fastapi_app(env, action, seen, max_concurrent_envs=sessions)


def test_the_packages_own_client_plays_our_games(url):
    env = envs.make("household")
    with GenericEnvClient(url).sync() as client:
        for seed in (3, TEST + 5):
            seen, (text, info) = client.reset(seed=seed), env.reset(seed=seed)
            assert seen.observation == {"text": text, "score": None, **info} and not seen.done
            while not info["won"]:
                command = next_command(env, info)
                text, reward, terminated, _, info = env.step(command)
                seen = client.step({"command": command})
                assert seen.observation == {"text": text, "score": None, **info}
                assert (seen.reward, seen.done) == (reward, terminated)
            assert seen.done and seen.reward == 10 and seen.observation["won"]
        state = client.state()
        assert state["seed"] == TEST + 5 and state["step_count"] > 0
        drawn = {client.reset().observation["text"] for _ in range(4)}
        assert len(drawn) > 1, "without a seed each is drawn"


def next_command(env, info):
    """The walkthrough's next command that is possible: each stands where it was left."""
    rest = getattr(env, "rest", None)
    if not rest or rest[0] is not env.content:
        env.rest = rest = [env.content, list(env.content["walkthrough"])]
    return rest[1].pop(0)


def test_sessions_play_each_its_own_and_the_server_says_when_it_is_full(url):
    with GenericEnvClient(url).sync() as one, GenericEnvClient(url).sync() as other:
        first, second = one.reset(seed=1), other.reset(seed=2)
        assert first.observation["text"] != second.observation["text"]
        command = first.observation["admissible_commands"][0]
        moved = one.step({"command": command}).observation["text"]
        assert other.step({"command": "look"}).observation["text"] != moved
        with pytest.raises(RuntimeError, match="is past the panel test, which has 4096 games"):
            one.reset(seed=TEST + 4096)
        sessions = [OpenEnvSession(url) for _ in range(4)]
        with pytest.raises(ServerError, match="at capacity|room for another session") as told:
            for session in sessions:
                session.reset(seed=0)
        assert "\n" not in str(told.value)


def test_an_environment_that_is_forgotten_leaves_its_session(url):
    for _ in range(12):  # of 5 that there may be
        env = OpenEnvSession(url)
        env.reset(seed=0)
        del env


def test_the_shops_score_is_told_and_steps_need_a_game(monkeypatch):
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)
    config = configure("webshop")
    games = Games(families.find("webshop")(config.env))
    env = TextEnvironment(games)
    with pytest.raises(RuntimeError, match="call reset before step"):
        env.step(TextAction(command="search[tea]"))
    seen, command = env.reset(seed=TEST), None
    assert seen.task == games.panels["test"][0]["options"]["goal"]["instruction_text"]
    player = games.family.make_player("search", env.env, random.Random(0))
    while not seen.done:
        player.observe(command, seen.text, seen.admissible_commands)
        command = player.move(seen.admissible_commands).action
        seen = env.step(TextAction(command=command))
    assert seen.won and seen.score == 1 and seen.reward == 10 and env.state.step_count > 2
    assert env.state.panels["test"] == 500 and env.get_metadata().name == "hiper_fast/webshop"


def test_our_own_server_is_an_environment_that_plays_alike(url):
    config = configure("openenv", env__url=url, eval__episodes=4)
    games, plain = TrainingGames(config), TrainingGames(configure("household", eval__episodes=4))
    assert games.list_panel() == plain.list_panel()
    [env], [other] = games.make(1), plain.make(1)
    for task in (games.list_panel()[3], games.draw("update 1", 1)[0]):
        assert env.reset(**task) == other.reset(**task)
        for command in ("inventory", "look", "go to nowhere"):
            assert env.step(command) == other.step(command)
    env.close()
    assert not games.family.is_listed("fly", other.step("look")[-1]["admissible_commands"])


def test_anothers_game_is_played_in_free_text():
    with Served(make_guess()) as served:
        config = configure("openenv", env__url=served.url, env__task="guess")
        env = TrainingGames(config).make(1)[0]
        text, info = env.reset(seed=7)
        assert (text, env.action) == ("Say it.", "message")
        assert info == {
            "admissible_commands": [], "won": False, "task": "guess", "task_type": "openenv"
        }  # fmt: skip
        assert env.step("Word7")[:3] == ("No.", 0.0, False)
        text, reward, terminated, truncated, info = env.step("word7")
        assert (text, reward, terminated, truncated, info["won"]) == ("Yes.", 1, True, False, True)


def test_a_server_that_dies_is_told_in_one_line_and_found_again():
    with Served(make_guess()) as served:
        env = OpenEnvSession(served.url, timeout=5)
        env.reset(seed=1)
    with pytest.raises(ServerError, match=f"env.url: {served.url} does not answer") as told:
        env.step("word1")
    assert "\n" not in str(told.value)
    with pytest.raises(ServerError, match="refused"):
        env.reset(seed=1)
    with pytest.raises(RuntimeError, match="call reset before step"):
        env.step("word1")
    with Served(make_guess(), served.port):
        assert env.reset(seed=2)[0] == "Say it."
        assert env.step("word2")[2]


class TwoTexts(Action):
    say: str
    whisper: str = ""


class NoText(Action):
    number: int


@pytest.mark.parametrize(
    "app, options, told",
    [
        ({"action": TwoTexts}, {}, r"env.action: .* have the texts say, whisper"),
        ({"action": NoText}, {}, r"env.action: .* texts none \(fields: number\)"),
        ({}, {"action": "channel"}, "env.action: .* texts message"),
        ({"env": Chatty, "seen": Said}, {}, "env.text: .* have the texts heard, shown"),
        ({}, {"text": "tried"}, "env.text: tried is no text .* heard, tried"),
    ],
)
def test_what_cannot_be_told_apart_is_asked_for(app, options, told):
    with Served(make_guess(**app)) as served, pytest.raises(ConfigError, match=told):
        OpenEnvSession(served.url, **options).reset(seed=0)


def test_the_named_fields_are_taken():
    with Served(make_guess(Chatty, TwoTexts, Said)) as served:
        env = OpenEnvSession(served.url, action="say", text="shown")
        assert env.reset(seed=0)[0] == "b"


def test_a_run_trains_through_a_server(tmp_path):
    with Served(make_guess()) as served:
        status = train.main([
            "--env=openenv", f"--env.url={served.url}", "--env.max_turns=2", "--updates=1",
            "--train.episodes=4", "--train.minibatches=1", "--train.critic_updates=0",
            "--agent.max_response_tokens=4", "--eval.episodes=2", "--warm_start.enabled=no",
            "--run.display=none", "--run.threads=1", f"--run.folder={tmp_path}", "--name=run",
        ])  # fmt: skip
        assert status == 0
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert next(row for row in rows if row["stage"] == "train")["rollout/turns"] == 2


def test_where_no_server_is_a_run_says_so(tmp_path, capsys):
    with serve.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
    options = ["--env=openenv", f"--env.url=http://127.0.0.1:{port}", f"--run.folder={tmp_path}"]
    assert train.main([*options, "--warm_start.enabled=no"]) == 2
    told = capsys.readouterr().err
    assert "does not answer as an OpenEnv server" in told and told.count("\n") == 1
