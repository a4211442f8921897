"""Values and advantages of tokens: read, credited and learned from, against plain forwards and loops."""

import math

import pytest
import torch
from test_transcript import joined, whole
from test_update import bounds, build, give, make_agent, settings, sgd, weights

from hiper_fast.estimators import HIGH, Credit, Level
from hiper_fast.learn.credit import scatter
from hiper_fast.learn.score import score
from hiper_fast.learn.update import measure_critic, update
from hiper_fast.packing import prefix_sums
from hiper_fast.play import value_turn
from hiper_fast.rollout.engines import Answer
from hiper_fast.runs.viewer import build_record


@pytest.fixture(scope="module", params=["separate", "shared"])
def agent(request):
    return make_agent(request.param)


def options(**train):
    config = settings(**train)
    config.advantage.estimator = "token_gae"
    return config


def plain_values(agent, t):
    """V [tokens, 3] before each response token: each turn, or trajectory, read alone."""
    trunk, values = agent.critic.trunk or agent.model.base_model, []
    for episode in t.episodes:
        pairs = zip(episode.prompts, episode.responses, strict=False)
        rows = [(torch.tensor(p + r), [len(p)], [r]) for p, r in pairs]
        if t.continued:
            rows = [(*whole(episode), episode.responses)]
        for ids, starts, responses in rows:
            heads = agent.critic.heads(trunk(input_ids=ids[None]).last_hidden_state[0])
            values += [
                heads[start - 1 : start - 1 + len(response)]
                for start, response in zip(starts, responses, strict=True)
            ]
    return torch.cat(values)


@pytest.mark.parametrize("make", [build, joined])
@pytest.mark.parametrize("budget", [1, 150, 100_000])
@torch.no_grad()
def test_scores_are_values_before_each_token(agent, make, budget):
    t = make(agent)
    values = score(agent, t, options(microbatch_tokens=budget)).values
    assert values.turns is None and values.tokens is values.places
    torch.testing.assert_close(values.tokens, plain_values(agent, t), atol=1e-5, rtol=1e-4)
    of_turns = score(agent, t, settings(microbatch_tokens=budget)).values
    assert of_turns.tokens is None
    torch.testing.assert_close(values.bootstrap, of_turns.bootstrap)
    some = t.cu_tokens.diff() > 0
    first = values.tokens[t.cu_tokens[:-1].long()[some], HIGH]
    torch.testing.assert_close(first, of_turns.turns[some, HIGH])


def gae_by_hand(t, values, bootstrap, gamma, lambda_):
    """V_high and rewards of all tokens of each trajectory, backwards."""
    advantages = [0.0] * len(values)
    turns = bounds(t.cu_tokens)
    for i, (first, last) in enumerate(bounds(t.cu_turns)):
        after, carried = float(bootstrap[i]), 0.0
        for turn in reversed(range(first, last)):
            reward = float(t.rewards[turn])
            for token in reversed(range(*turns[turn])):
                error = reward + gamma * after - float(values[token])
                carried = error + gamma * lambda_ * carried
                advantages[token], after, reward = carried, float(values[token]), 0.0
    return torch.tensor(advantages)


@pytest.mark.parametrize("normalize", [False, True])
def test_targets_are_gae_over_tokens(agent, normalize):
    t, config = build(agent), options()
    config.advantage.normalize = normalize
    scores = score(agent, t, config)
    targets = give(t, scores, config)
    values = scores.values.tokens[:, HIGH]
    advantages = gae_by_hand(t, values, scores.values.bootstrap, 0.9, 0.7)
    torch.testing.assert_close(targets.returns[:, HIGH], advantages + values, atol=1e-5, rtol=1e-5)
    trained = t.roles > 0
    assert targets.per_token and torch.equal(targets.loss_mask, trained)
    assert targets.value_mask.tolist() == [[False, True, False]] * len(values), (
        "the head learns at every token, as the end token, which no role trains"
    )
    assert not trained.all()
    if normalize:
        chosen = advantages[trained].double()
        advantages = (advantages - chosen.mean()) / chosen.std(correction=0)
    expected = torch.where(trained, advantages.float(), 0.0)
    torch.testing.assert_close(targets.advantages, expected, atol=1e-5, rtol=1e-5)
    [level] = targets.credit.levels
    for turn, (a, b) in enumerate(bounds(t.cu_tokens)):
        mean = expected[a:b][trained[a:b]].mean()
        assert float(level.advantages[turn]) == pytest.approx(float(mean), abs=1e-5)


@pytest.mark.parametrize("budget", [1, 150, 100_000])
def test_the_value_loss_is_a_mean_over_tokens(agent, budget):
    t, config = build(agent), options(microbatch_tokens=budget, value_coef=[9.0, 0.5, 9.0])
    scores = score(agent, t, config)
    targets = give(t, scores, config)
    losses = update(agent, sgd(agent, lr=0.0), t, targets, config, torch.Generator())
    errors = (targets.returns - scores.values.tokens)[:, HIGH]
    assert losses["loss/value"] == pytest.approx(0.5 * float(errors.square().mean()), rel=1e-4)
    spread = float(targets.returns[:, HIGH].var(correction=0))
    explained = 1 - float(errors.var(correction=0)) / spread
    assert losses["value/explained_high"] == pytest.approx(explained, rel=1e-4)
    assert measure_critic(targets).keys() == {"value/explained_high"}


@pytest.mark.parametrize("make", [build, joined])
def test_it_trains(make):
    agent = make_agent()
    t, config = make(agent), options(minibatches=3)
    targets = give(t, score(agent, t, config), config)
    before = weights(agent)
    losses = update(agent, sgd(agent), t, targets, config, torch.Generator())
    assert losses["optim/skipped_steps"] == 0 and weights(agent) != before
    assert all(math.isfinite(value) for value in losses.values())


def test_levels_of_tokens_and_of_turns_add_up():
    """Also for the report, which has the mean of a turn's trained tokens; an empty turn has none."""
    roles, cu_tokens = torch.tensor([1, 2, 0, 1], dtype=torch.uint8), prefix_sums([3, 0, 1])
    tokens = Level(
        "token", 7, torch.tensor([1.0, 2.0, 50.0, 4.0]), torch.tensor([True, True, True, True]),
        raw=False, per_token=True,
    )  # fmt: skip
    turns = Level("turn", 1, torch.tensor([10.0, 20.0, 30.0]), torch.ones(3).bool(), raw=False)
    advantages, mask, told = scatter(Credit((tokens, turns)), roles, cu_tokens, True)
    assert advantages.tolist() == [11.0, 2.0, 0.0, 34.0]
    assert mask.tolist() == [True, True, False, True]
    assert told.levels[0].advantages.tolist() == [1.5, 0.0, 4.0]
    assert told.levels[0].carried.tolist() == [True, False, True]
    assert told.levels[1] is turns


def test_a_token_level_is_normalised_over_the_tokens_it_trains():
    roles, cu_tokens = torch.tensor([1, 1, 0, 2], dtype=torch.uint8), prefix_sums([3, 1])
    every = torch.ones(4, dtype=torch.bool)
    level = Level("token", 1, torch.tensor([1.0, 3.0, 9.0, 9.0]), every, per_token=True)
    advantages, mask, _ = scatter(Credit((level,)), roles, cu_tokens, True)
    assert advantages.tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0])
    assert mask.tolist() == [True, True, False, False]


def test_the_report_and_play_show_values_where_turns_begin(agent):
    t, config = build(agent), options()
    for episode in t.episodes:
        episode.turns = []
    targets = give(t, score(agent, t, config), config)
    values = targets.turn_values(t.cu_tokens)
    assert torch.equal(values, targets.old_values[t.cu_tokens[:-1].long()])
    assert build_record(t, 0, targets.credit, values)["turns"] == []
    prompt, response = t.episodes[0].prompts[0], t.episodes[0].responses[0]
    answer = Answer(response, [0.0] * len(response))
    assert value_turn(agent, prompt, answer, config) == pytest.approx(values[0].tolist(), abs=1e-5)
