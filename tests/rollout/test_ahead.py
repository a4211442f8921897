"""A rollout that plays while an update learns."""

import copy
import threading

import pytest
import torch
from helpers import HOUSEHOLD, configure, make_tiny, play_tasks

from hiper_fast import train
from hiper_fast.distributed import ALONE
from hiper_fast.options import ConfigError
from hiper_fast.rollout import play
from hiper_fast.rollout.ahead import Ahead
from hiper_fast.rollout.play import Draw, Dropped
from hiper_fast.rollout.prompter import make_prompter
from hiper_fast.runs.metrics import read_metrics

WEIGHED = {"train__old_logprobs": "recomputed", "train__importance_cap": "2"}
TASKS = [{"seed": seed} for seed in range(3)]


def settings(**options):
    return configure(
        env__max_turns="3", agent__max_response_tokens="6", rollout__ahead="1", **WEIGHED, **options
    )


@pytest.fixture
def ahead():
    agent, config = make_tiny(), settings()
    prompter = make_prompter(agent.tokenizer, config.agent, HOUSEHOLD(config.env))
    ahead = Ahead(agent, HOUSEHOLD(config.env), prompter, config)
    yield ahead
    ahead.close()


@torch.no_grad()
def learn(agent):
    for p in agent.model.parameters():
        p.mul_(1.2)


def test_what_is_begun_ahead_is_of_the_weights_it_was_begun_with(ahead):
    agent, draws = ahead.agent, [Draw(TASKS, 1.0, seed) for seed in (1, 2)]
    before = copy.copy(agent)
    before.model = copy.deepcopy(agent.model)
    first = ahead.play_on(draws[0], draws[1])
    learn(agent)
    second = ahead.play_on(draws[1], None)
    assert (first.updates_behind, second.updates_behind) == (0, 1)
    for got, seed in ((first, 1), (second, 2)):
        expected = play_tasks(before, settings(), TASKS, seed=seed)
        assert torch.equal(got.response_ids, expected.response_ids)
    now = ahead.play(draws[1])
    assert torch.equal(now.response_ids, play_tasks(agent, settings(), TASKS, seed=2).response_ids)


def test_an_error_of_what_is_begun_ahead_is_raised_where_it_is_taken(ahead, monkeypatch):
    draw = Draw(TASKS, 1.0, 0)
    monkeypatch.setattr(play, "pack", lambda *_: 1 / 0)
    ahead.future = ahead.threads.submit(ahead.rollouts.play, draw)
    with pytest.raises(ZeroDivisionError):
        ahead.play_on(draw, None)


def test_closing_drops_what_is_being_played(ahead, monkeypatch):
    entered, collect = threading.Event(), type(ahead.rollouts.engine).collect

    def watched(engine):
        entered.set()
        return collect(engine)

    monkeypatch.setattr(type(ahead.rollouts.engine), "collect", watched)
    ahead.future = ahead.threads.submit(ahead.rollouts.play, Draw(TASKS * 20, 1.0, 0))
    assert entered.wait(20)
    future = ahead.future
    ahead.close()
    assert isinstance(future.exception(), Dropped)


@pytest.mark.parametrize(
    "options, told",
    [
        ({}, "add --train.old_logprobs recomputed --train.importance_cap 2"),
        (WEIGHED | {"model__compile": "true"}, "does not go with model.compile"),
    ],
)
def test_what_it_needs(options, told):
    config = configure(rollout__ahead="1", warm_start__enabled="no", **options)
    with pytest.raises(ConfigError, match=f"rollout.ahead: .*{told}"):
        train.train(config, ALONE)


def test_a_run_ahead(tmp_path):
    config = settings(
        run__folder=str(tmp_path), run__name="ahead", run__display="none", train__updates="3",
        train__episodes="4", train__minibatches="1", eval__every="2", eval__episodes="2", run__threads="1",
        warm_start__enabled="no",
    )  # fmt: skip
    before = set(threading.enumerate())
    train.train(config, ALONE)
    rows = [r for r in read_metrics(tmp_path / "ahead" / "metrics.jsonl") if r["stage"] == "train"]
    assert [row["rollout/updates_behind"] for row in rows] == [0, 1, 1]
    assert set(threading.enumerate()) <= before
