"""The seam: the engine that the documentation shows, against the built-in one and the trainer."""

import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import answer_all, configure, make_tiny, play_tasks

from hiper_fast.learn.rows import Rows
from hiper_fast.options import ConfigError
from hiper_fast.packing import microbatches
from hiper_fast.rollout import engines
from hiper_fast.rollout.engines import Answer, Request

DOCS = Path(__file__).parents[2] / "docs" / "engines.md"


@pytest.fixture(scope="module")
def agent():
    return make_tiny()


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """The module that docs/engines.md shows."""
    [code] = [
        block
        for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
        if "class Engine" in block
    ]
    assert len(code.splitlines()) <= 60
    (tmp_path / "shown_engine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield "shown_engine:Engine"
    sys.modules.pop("shown_engine", None)


def play(agent, engine, **options):
    config = configure(
        env__max_turns=3, agent__max_response_tokens=6, rollout__engine=engine, **options
    )
    return play_tasks(agent, config, [{"seed": seed // 2} for seed in range(4)], group=2)


@pytest.mark.parametrize("style", ["compact", "transcript"])
def test_the_engine_of_the_documentation_samples_what_is_trained(agent, shown, style):
    trajectories = play(agent, shown, agent__style=style, agent__max_prompt_tokens=2000)
    sequences = trajectories.sequences()
    with torch.no_grad():
        for batch in microbatches(sequences.ids, sequences.cu_seqlens, 500):
            rows = Rows(sequences, batch, torch.ones_like(trajectories.roles, dtype=torch.bool))
            hidden = agent.trunk(batch)[rows.token_rows]
            logprobs = agent.logprobs(hidden, trajectories.response_ids[rows.tokens], 1.0)
            torch.testing.assert_close(
                logprobs, trajectories.old_logprobs[rows.tokens], atol=1e-5, rtol=0
            )


def test_answers_do_not_depend_on_the_engine_or_on_what_is_answered_beside_them(agent, shown):
    config = configure(agent__max_response_tokens=7)
    prompts = [[5, 6, 7], [9] * 40, [8], [5, 6, 7]]
    requests = [Request(ids, 10 + i, float(i % 3)) for i, ids in enumerate(prompts)]
    paged, other = (engines.find(name)(agent, config) for name in ("paged", shown))
    answers = answer_all(paged, requests)
    alone = [answer_all(paged, [request])[0] for request in requests]
    for found in (alone, answer_all(other, requests)):
        assert [answer.ids for answer in found] == [answer.ids for answer in answers]
        for one, another in zip(found, answers, strict=True):
            assert one.logprobs == pytest.approx(another.logprobs, abs=1e-5)


@pytest.mark.parametrize("style", ["compact", "transcript"])
def test_episodes_do_not_depend_on_the_engine(agent, shown, style):
    episodes = [
        play(agent, name, agent__style=style, agent__max_prompt_tokens=2000).response_ids.tolist()
        for name in ("paged", shown)
    ]
    assert episodes[0] == episodes[1]


def test_episodes_of_a_game_know_their_group_and_the_states_they_share(agent):
    trajectories = play(agent, "paged")
    assert trajectories.group.tolist() == [0, 0, 1, 1]
    first = trajectories.state[trajectories.cu_turns[:-1].long()].tolist()
    assert first[0] == first[1] != first[2] == first[3]
    assert trajectories.state.shape == (trajectories.turns,)


def test_an_engine_that_is_not_there():
    with pytest.raises(
        ConfigError, match="rollout.engine: there is no engine 'page'; did you mean paged"
    ):
        engines.find("page")


@pytest.mark.parametrize(
    "answers, told",
    [
        ([(7, Answer([1], [0.0]))], "Odd answers request 7, which is not under way"),
        ([(0, Answer([1, 2], [0.0]))], "Odd gives 1 log-probs for 2 tokens"),
    ],
)
def test_an_engine_that_answers_what_it_should_not_is_named(agent, monkeypatch, answers, told):
    class Odd(engines.find("paged")):
        def collect(self):
            return answers

    monkeypatch.setitem(engines._plugins.registered, "odd", Odd)
    with pytest.raises(ConfigError, match=told):
        play(agent, "odd")


def test_an_engine_that_lacks_something_is_refused_at_once(agent, monkeypatch):
    class Half:
        def __init__(self, agent, config):
            self.submit = self.collect = self.wake = self.sleep = print

    monkeypatch.setitem(engines._plugins.registered, "half", Half)
    with pytest.raises(ConfigError, match="half has no update, cancel, close, capacity, at least"):
        play(agent, "half")
