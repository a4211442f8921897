"""The seam: the engine that the documentation shows, against the built-in one and the trainer."""

import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import HOUSEHOLD, configure, make_tiny

from hiper_fast.learn.rows import Rows
from hiper_fast.options import ConfigError
from hiper_fast.packing import microbatches
from hiper_fast.rollout import engines
from hiper_fast.rollout.engines import Request
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import play_tasks
from hiper_fast.rollout.prompter import Prompter

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
    games = Games(config)
    prompter = Prompter(agent.tokenizer, config.agent, HOUSEHOLD.styles[config.agent.style])
    tasks = [{"seed": seed // 2} for seed in range(4)]
    return play_tasks(
        agent,
        games.make(4),
        tasks,
        games.family,
        prompter,
        config,
        temperature=1.0,
        seed=0,
        group=2,
    )


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


def test_greedy_answers_do_not_depend_on_the_engine(agent, shown):
    requests = [Request([5, 6, 7]), Request([9] * 40), Request([8])]
    config = configure(agent__max_response_tokens=7)
    answers = [
        engines.find(name)(agent, config, temperature=0.0, seed=0).answer(requests)
        for name in ("batched", shown)
    ]
    assert [answer.ids for answer in answers[0]] == [answer.ids for answer in answers[1]]


def test_episodes_of_a_game_know_their_group_and_the_states_they_share(agent):
    trajectories = play(agent, "batched")
    assert trajectories.group.tolist() == [0, 0, 1, 1]
    first = trajectories.state[trajectories.cu_turns[:-1].long()].tolist()
    assert first[0] == first[1] != first[2] == first[3]
    assert trajectories.state.shape == (trajectories.turns,)


def test_an_engine_that_is_not_there():
    with pytest.raises(
        ConfigError, match="rollout.engine: there is no engine 'batch'; did you mean batched"
    ):
        engines.find("batch")


def test_an_engine_that_loses_an_answer_is_named(agent, monkeypatch):
    class Forgetful:
        def __init__(self, agent, config, *, temperature, seed):
            pass

        def answer(self, requests):
            return []

    monkeypatch.setitem(engines._plugins.registered, "forgetful", Forgetful)
    with pytest.raises(ConfigError, match="Forgetful gave 0 answers to 4 requests"):
        play(agent, "forgetful")
