"""Scripted episodes and their imitation."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import configure, make_tiny

from hiper_fast.envs.player import Move
from hiper_fast.learn.warm_start import demonstrate, imitate, warm_start, write_response
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.prompter import Prompter


def settings(**options):
    config = configure(env__max_turns=30)
    config.agent.max_prompt_tokens = 4000
    for name, value in {
        "episodes": 12,
        "epochs": 1,
        "batch_turns": 16,
        "noise": 0.0,
        "imitate_noise": "no",
        **options,
    }.items():
        setattr(config.warm_start, name, value)
    return config


@pytest.fixture
def agent():
    return make_tiny()


def show(agent, config):
    return demonstrate(agent, *play_with(agent, config), config)


def play_with(agent, config):
    games = Games(config)
    return games, Prompter(agent.tokenizer, config.agent, games.family.styles["compact"])


def test_a_response_switches_when_the_subgoal_changes():
    move = Move("find mug", "go to desk 1")
    assert write_response(move, None).startswith(
        "<switch>SWITCH</switch><subgoal>find mug</subgoal>"
    )
    assert write_response(move, "find mug").startswith("<switch>KEEP</switch>")
    assert write_response(move, "take mug").endswith("<action>go to desk 1</action>")


@pytest.mark.parametrize("kind", ["search", "listed", "walkthrough"])
def test_demonstrations_keep_the_format_and_mostly_win(agent, kind):
    t, own = show(agent, settings(demonstrations=kind))
    assert t.valid.all() and own.all() and len(own) == t.turns
    assert t.switch[t.cu_turns[:-1].long()].all(), "the first turn names its subgoal"
    assert int(t.won.sum()) >= (12 if kind == "walkthrough" else 10)
    ends = t.response_ids[t.cu_tokens[1:].long() - 1]
    assert (ends == agent.stop_ids[0]).all(), "a response learns to end"
    for episode in t.episodes:
        for turn in episode.turns:
            assert f"<subgoal>{turn.subgoal}</subgoal>" in turn.response


def test_the_same_seed_shows_the_same_episodes(agent):
    config = settings(noise=0.3)
    first, own = show(agent, config)
    again, own_again = show(agent, config)
    assert torch.equal(first.response_ids, again.response_ids) and torch.equal(own, own_again)
    config.run.seed = 1
    assert not torch.equal(show(agent, config)[0].response_ids[:50], first.response_ids[:50])


def test_a_share_of_the_turns_is_disturbed_and_marked(agent):
    t, own = show(agent, settings(noise=0.3, episodes=30))
    same, every = show(agent, settings(noise=0.3, episodes=30, imitate_noise="yes"))
    assert every.all() and torch.equal(same.response_ids, t.response_ids), (
        "the mark only tells what is imitated"
    )
    assert 0.2 < 1 - own.float().mean() < 0.4
    assert t.valid.all(), "whatever it does, it keeps the format"
    mine = iter(own.tolist())
    for episode in t.episodes:
        results = [turn.observation for turn in episode.turns[1:]]
        for is_own, result in zip([next(mine) for _ in episode.turns], [*results, ""], strict=True):
            assert not is_own or result != "Nothing happens.", (
                "the expert's own commands are admissible"
            )
    assert t.won.float().mean() > 0.5, "it finds its way back"


def test_imitation_learns_and_says_how_far_it_is(agent):
    config = settings(episodes=8, epochs=3, batch_turns=8)
    t, own = show(agent, config)
    steps = list(imitate(agent, t, own, config))
    count = 3 * math.ceil(t.turns / 8)
    assert [number for number, *_ in steps] == list(range(1, count + 1))
    assert {total for _, total, *_ in steps} == {count}
    losses = [loss for *_, loss, _ in steps]
    assert losses[0] == pytest.approx(math.log(len(agent.tokenizer)), rel=0.1), (
        "at first all tokens are alike"
    )
    assert losses[-1] < 0.7 * losses[0]
    assert 0 <= steps[0][-1] < steps[-1][-1] <= 1


def test_a_loss_that_is_not_finite_ends_it(agent):
    config = settings(episodes=2)
    t, own = show(agent, config)
    torch.nn.init.constant_(agent.model.get_input_embeddings().weight, math.nan)
    with pytest.raises(FloatingPointError, match="became nan in step 1; lower warm_start.lr"):
        next(imitate(agent, t, own, config))


def test_disturbed_turns_are_not_imitated(agent):
    config = settings(batch_turns=1000, episodes=4)
    t, own = show(agent, config)
    own[: int(t.cu_turns[1])] = False
    before = {name: p.clone() for name, p in agent.model.state_dict().items()}
    [(_, _, loss, _)] = imitate(agent, t, own, config)
    agent.model.load_state_dict(before)
    t.response_ids = t.response_ids.clone()
    t.response_ids[: int(t.cu_tokens[t.cu_turns[1].long()])] = 5
    [(_, _, spoiled, _)] = imitate(agent, t, own, config)
    assert spoiled == pytest.approx(loss, rel=1e-6)


def test_the_warm_start_tells_what_it_does_and_changes_the_policy(agent):
    config = settings(episodes=2)
    before = [p.clone() for p in agent.model.parameters()]
    rows, messages = [], []
    logger = SimpleNamespace(
        stage=lambda name: nullcontext(), log=lambda *row: rows.append(row), message=messages.append
    )
    warm_start(agent, *play_with(agent, config), config, logger)
    changed = any(
        not torch.equal(a, b) for a, b in zip(before, agent.model.parameters(), strict=True)
    )
    assert changed and rows and messages
