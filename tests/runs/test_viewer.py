"""Recorded episodes: what trained is what the report colours, to the token, also where the format fails."""

import json

import pytest
import torch
from helpers import Page, configure, make_tiny

from hiper_fast import estimators
from hiper_fast.estimators import Values
from hiper_fast.learn.credit import give_credit
from hiper_fast.learn.score import Scores
from hiper_fast.learn.shaping import shape
from hiper_fast.rollout.trajectory import Episode, Turn, pack
from hiper_fast.runs import report
from hiper_fast.runs.viewer import write_episodes

GOOD = "<switch>SWITCH</switch><subgoal>find mug</subgoal><action>look</action>"
KEEP = "<switch>KEEP</switch><subgoal>find mug</subgoal><action>look</action>"
SAID = [
    GOOD,
    KEEP,
    f"well {KEEP} so",
    "<switch>KEEP</switch> é漢 <action>look</action> look",
    "<switch>KEEP</switch><subgoal>find mug</subgoal> look",
    "<switch>MAYBE</switch><subgoal>find mug</subgoal><action>look</action> and <action>",
    "look about",
    "é",
]
ROLES = {"switch": "switch", "subgoal": "high", "action": "low"}


@pytest.fixture(scope="module")
def agent():
    return make_tiny()


def make_batch(agent, plans=True):
    episode = Episode("find a mug", "look", plans=plans, won=True, terminated=True)
    for text in SAID:
        ids = agent.tokenizer(text, add_special_tokens=False)["input_ids"] + [agent.stop_ids[0]]
        episode.prompts.append([5, 6])
        episode.responses.append(ids)
        episode.logprobs.append([0.0] * len(ids))
        episode.rewards.append(1.0)
        episode.states.append(0)
        episode.turns.append(
            Turn("a room", agent.decode(ids).decode(errors="replace"), "find mug", "look")
        )
    return pack([episode], agent.find_roles)


@pytest.mark.parametrize("plans", [True, False])
@pytest.mark.parametrize("malformed", [True, False])
@pytest.mark.parametrize("estimator", ["hae", "gae"])
def test_every_token_that_trained_is_coloured_and_no_other(
    agent, tmp_path, estimator, malformed, plans
):
    config = configure(advantage__estimator=estimator, advantage__malformed=malformed)
    t = make_batch(agent, plans)
    shape(t, config)
    values = Values(torch.zeros(t.turns, 3), torch.zeros(1))
    targets = give_credit(t, Scores(values, None), estimators.find(estimator), config.advantage)
    write_episodes(tmp_path / "episodes", 1, "train", t, targets.credit, decode=agent.decode)
    page = Page(report.build(tmp_path).read_text())
    [shown] = page.data[0]["episodes"]
    bounds = t.cu_tokens.tolist()
    assert [turn["number"] for turn in shown["turns"]] == list(range(1, len(SAID) + 1))
    for turn, text, begin, end in zip(shown["turns"], SAID, bounds[:-1], bounds[1:], strict=True):
        assert "".join(piece for piece, _ in turn["blocks"]) == text
        coloured = [
            bool(block) and turn["advantage"][block] is not None
            for piece, block in turn["blocks"]
            for _ in piece.encode()
        ]
        trained = [
            bool(targets.loss_mask[i])
            for i in range(begin, end)
            for _ in agent.decode([int(t.response_ids[i])])
        ]
        # Bytes of one character that are several tokens train alike here.
        assert coloured == trained, text
    if malformed and plans:
        invalid = [turn for turn in shown["turns"] if not turn["valid"]]
        assert len(invalid) == 5 and all(block for turn in invalid for _, block in turn["blocks"])


def test_records_without_pieces_are_still_shown(agent, tmp_path):
    write_episodes(tmp_path / "episodes", 1, "eval", make_batch(agent))
    [line] = (tmp_path / "episodes" / "step-000001.jsonl").read_text().splitlines()
    assert "pieces" not in json.loads(line)["turns"][0]
    [shown] = Page(report.build(tmp_path).read_text()).data[0]["episodes"]
    assert [block for _, block in shown["turns"][0]["blocks"]] == ["switch", "subgoal", "action"]


@pytest.mark.parametrize(
    "pieces", [3, "text", [3], [["a"]], [["a", ["b"]], ["c", "evil"]], {}, None]
)
def test_foreign_pieces_break_nothing(tmp_path, pieces):
    (tmp_path / "episodes").mkdir()
    episode = {"step": 1, "stage": "train", "turns": [{"response": "go", "pieces": pieces}]}
    (tmp_path / "episodes" / "step-000001.jsonl").write_text(json.dumps(episode) + "\n")
    [shown] = Page(report.build(tmp_path).read_text()).data[0]["episodes"]
    assert all(block in ("", "action") for _, block in shown["turns"][0]["blocks"])
