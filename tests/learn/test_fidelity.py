"""Sampler against trainer: the metrics by plain loops, what updates give them, and what a wrong sampler is told."""

import math

import pytest
import torch
from helpers import configure, make_tiny
from test_update import build, give, make_agent, settings, trained

from hiper_fast.distributed import ALONE
from hiper_fast.learn import update as update_module
from hiper_fast.learn.fidelity import TOLERANCE, measure_fidelity
from hiper_fast.learn.score import score
from hiper_fast.ops import reference
from hiper_fast.rollout.trajectory import Episode, pack
from hiper_fast.runs.health import HELD, Health

NAMES = "logprob_mean_abs", "logprob_max_abs", "kl", "outside_clip"


@pytest.fixture(scope="module")
def agent():
    return make_agent()


def by_hand(differences, low=0.2, high=0.2):
    """Of the trainer's log-probs minus the sampler's, token after token."""
    sizes = [abs(d) for d in differences]
    kl = [math.exp(d) - d - 1 for d in differences]
    outside = [not 1 - low <= math.exp(d) <= 1 + high for d in differences]
    n = len(differences)
    return [sum(sizes) / n, max(sizes), sum(kl) / n, sum(outside) / n]


def select(metrics):
    return [metrics[f"fidelity/{name}"] for name in NAMES]


@pytest.mark.parametrize("seed", range(3))
def test_the_metrics_are_those_of_a_plain_loop(agent, seed):
    t, g = build(agent), torch.Generator().manual_seed(seed)
    ratio = 0.2 * torch.randn(len(t.old_logprobs), generator=g)
    ratio[torch.rand(len(ratio), generator=g) < 0.3] = math.nan  # another process's
    config = settings(clip_low=0.1, clip_high=0.3)
    known = [d for d in ratio.tolist() if not math.isnan(d)]
    found = measure_fidelity(t, ratio, config, ALONE)
    assert select(found) == pytest.approx(by_hand(known, 0.1, 0.3))
    assert 0 < found["fidelity/outside_clip"] < 1
    assert measure_fidelity(t, torch.full_like(ratio, math.nan), config, ALONE) == {}


def test_differences_far_below_a_floats_resolution_of_one_are_seen(agent):
    t = build(agent)
    found = measure_fidelity(t, torch.full_like(t.old_logprobs, 1e-6), settings(), ALONE)
    assert found["fidelity/logprob_mean_abs"] == pytest.approx(1e-6, rel=1e-3)
    assert found["fidelity/kl"] == pytest.approx(0.5e-12, rel=1e-3)


def spoil(t, seed=0):
    """Trajectories whose sampler was off by so much at each token."""
    error = 0.2 * torch.randn(len(t.old_logprobs), generator=torch.Generator().manual_seed(seed))
    t.old_logprobs = t.old_logprobs + error
    return error


@pytest.mark.parametrize(
    "minibatches, options", [(1, {}), (3, {}), (3, {"ratio": "turn"}), (2, {"loss": "cispo"})]
)
def test_an_update_measures_its_first_step_alone(agent, minibatches, options):
    config = settings(minibatches=minibatches, **options)
    t = build(agent)
    targets = give(t, score(agent, t, config), config)
    error = spoil(t)
    order = torch.randperm(t.turns, generator=torch.Generator().manual_seed(0))
    first = torch.zeros(t.turns, dtype=torch.bool)
    first[order.tensor_split(minibatches)[0]] = True
    first = first.repeat_interleave(t.cu_tokens.diff()) & targets.loss_mask
    assert first.sum() < targets.loss_mask.sum() or minibatches == 1
    losses, _, _ = trained(agent, t, targets, config)
    assert select(losses) == pytest.approx(by_hand((-error[first]).tolist()), abs=1e-5)


@pytest.mark.parametrize("train_policy", [True, False])
def test_recomputed_log_probs_measure_every_token_with_a_role(agent, train_policy):
    config = settings(old_logprobs="recomputed", minibatches=3)
    t = build(agent)
    error = spoil(t)
    targets = give(t, score(agent, t, config), config)
    losses, _, _ = trained(agent, t, targets, config, train_policy=train_policy)
    assert select(losses) == pytest.approx(by_hand((-error[t.roles > 0]).tolist()), abs=1e-5)


def test_while_the_critic_trains_alone_nothing_is_known(agent):
    config = settings()
    t = build(agent)
    targets = give(t, score(agent, t, config), config)
    losses, _, _ = trained(agent, t, targets, config, train_policy=False)
    assert not any(name.startswith("fidelity/") for name in losses)


# Samplers.


@torch.no_grad()
def sample(agent, prompt, generator, temperature, top_k):
    """(ids, log-probs) of a response of 8 tokens."""
    ids, logprobs = [], []
    for _ in range(8):
        logits = agent.model(torch.tensor([prompt + ids]), use_cache=False).logits[0, -1]
        best, kept = (logits / temperature).topk(top_k)
        chances = best.log_softmax(0)
        place = int(torch.multinomial(chances.exp(), 1, generator=generator))
        ids.append(int(kept[place]))
        logprobs.append(float(chances[place]))
    return ids, logprobs


def play(agent, temperature=1.0, top_k=None):
    """Trajectories of sampled responses, all of whose tokens train, and the answers in their order."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = agent.model.config.vocab_size
    answers, episodes = [], []
    for _ in range(6):
        prompt = torch.randint(2, 700, (10,), generator=generator).tolist()
        ids, logprobs = sample(agent, prompt, generator, temperature, top_k or vocabulary)
        answers.append((ids, logprobs))
        episodes.append(
            Episode("task", "type", terminated=True, prompts=[prompt], responses=[ids],
                    logprobs=[logprobs], rewards=[1.0], states=[0])
        )  # fmt: skip
    t = pack(episodes, agent.find_roles)
    t.roles = torch.full_like(t.roles, reference.ACTION)
    return t, answers


@pytest.fixture(scope="module")
def sure():
    """An agent whose policy prefers some tokens."""
    agent = make_tiny()
    with torch.no_grad():
        agent.model.get_output_embeddings().weight.mul_(2)
    agent.add_critic()
    return agent


def judge(agent, t):
    """What three such updates are told of their sampler."""
    config = settings(kl_coef=0.0)
    losses, _, _ = trained(agent, t, give(t, score(agent, t, config), config), config)
    health = Health()
    rows = [{"step": step, "stage": "train", **losses} for step in range(1, HELD + 1)]
    said = [text for row in rows for text in health.read(row)]
    return losses, [text for text in said if "fidelity/" in text]


def test_an_exact_sampler_is_told_nothing(sure):
    t, _ = play(sure)
    losses, said = judge(sure, t)
    assert losses["fidelity/logprob_max_abs"] < 1e-4 and said == []


@pytest.mark.parametrize("wrong", [{"temperature": 0.9}, {"temperature": 1.1}, {"top_k": 500}])
def test_a_sampler_of_another_distribution_is_told_of(sure, wrong):
    t, _ = play(sure, **wrong)
    losses, said = judge(sure, t)
    assert losses["fidelity/logprob_mean_abs"] > 5 * TOLERANCE["float32"]
    assert any("mean_abs" in text and "agent.temperature" in text for text in said)


def test_the_stored_tokens_are_the_trained_ones(sure, monkeypatch):
    seen = []

    def spy(agent, hidden, tokens, counts, config):
        seen.extend(zip(tokens.ids.tolist(), tokens.old_logprobs.tolist(), strict=True))
        return policy_loss(agent, hidden, tokens, counts, config)

    policy_loss = update_module.policy_loss
    monkeypatch.setattr(update_module, "policy_loss", spy)
    t, answers = play(sure)
    config = settings(kl_coef=0.0, minibatches=2)
    trained(sure, t, give(t, score(sure, t, config), config), config)
    answered = [pair for ids, logprobs in answers for pair in zip(ids, logprobs, strict=True)]
    (trained_ids, theirs), (ids, ours) = (zip(*sorted(s), strict=True) for s in (seen, answered))
    assert trained_ids == ids and theirs == pytest.approx(ours)


def test_the_tolerance_is_that_of_the_dtype(agent):
    t = build(agent)
    for dtype, tolerance in TOLERANCE.items():
        config = configure(model__dtype=dtype)
        found = measure_fidelity(t, torch.zeros(len(t.old_logprobs)), config, ALONE)
        assert found["fidelity/tolerance"] == tolerance
