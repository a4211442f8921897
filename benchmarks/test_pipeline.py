"""The stages of an update of the embedded default, in tokens a second: rollout, score, estimate, update.

32 episodes, a quarter of the default's update. The tiny model has random weights, so episodes run to the turn limit and
responses to the token limit: turns at their longest. Then one policy update on turns as long as ALFWorld's, packed and
in the reference's padded layout, timed once their gradients were found equal. Beside the trunk's forward and backward
stands this machine's own rate of float32 matrix products. HIPER_FAST_BENCH=tiny makes it all small enough to test the
benchmarks themselves.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hiper_fast import bench, estimators
from hiper_fast.agent.loading import load_agent
from hiper_fast.configure import resolve
from hiper_fast.envs.family import families
from hiper_fast.learn.credit import give_credit
from hiper_fast.learn.score import score
from hiper_fast.learn.update import update
from hiper_fast.packing import microbatches
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import Draw, open_rollouts
from hiper_fast.rollout.prompter import Prompter

sys.path.insert(0, str(Path(__file__).parent))  # for policy_update.py
import policy_update

TINY = bench.choose_size() == "tiny"
ESTIMATE = estimators.find("hae")
SQUARE = 128 if TINY else 1024  # of the matrices whose product is the roofline


@pytest.fixture(scope="module")
def config():
    given = {"env.name": "household", "model.device": "cpu", "train.episodes": 2 if TINY else 32}
    config = resolve(given=given)
    if TINY:
        config.env.max_turns, config.agent.max_response_tokens = 3, 8
    return config


@pytest.fixture(scope="module", autouse=True)
def denormals_as_zero():
    """As training has it."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def agent(config):
    agent = load_agent(config.model, 0, families.find("household").tokenizer)
    agent.freeze_reference()
    agent.add_critic()
    return agent


@pytest.fixture(scope="module")
def play(agent, config):
    """Plays a batch of episodes from their resets on."""
    games = Games(config)
    prompter = Prompter(agent.tokenizer, config.agent, games.family.styles[config.agent.style])
    tasks = games.draw("benchmark", config.train.episodes)
    with open_rollouts(agent, games.family, prompter, config) as rollouts:
        yield lambda: rollouts.play(Draw(tasks, config.agent.temperature, seed=0))


@pytest.fixture(scope="module")
def t(play):
    return play()


@pytest.fixture(scope="module")
def scores(agent, t, config):
    return score(agent, t, config)


@pytest.fixture(scope="module")
def targets(t, scores, config):
    return give_credit(t, scores, ESTIMATE, config.advantage)


def note_rate(benchmark, tokens):
    benchmark.extra_info["tokens_per_second"] = round(tokens / benchmark.stats.stats.median)
    benchmark.extra_info["threads"] = torch.get_num_threads()


def all_tokens(t):
    return t.prompt_ids.numel() + t.response_ids.numel()


@pytest.mark.benchmark(group="rollout")
def test_rollout(benchmark, play, t):
    again = benchmark.pedantic(play, rounds=1)
    assert torch.equal(again.response_ids, t.response_ids)
    note_rate(benchmark, all_tokens(t))
    benchmark.extra_info["turns_per_second"] = round(t.turns / benchmark.stats.stats.median)
    benchmark.extra_info["sampled_tokens_per_second"] = round(
        t.response_ids.numel() / benchmark.stats.stats.median
    )


SHARING = pytest.mark.parametrize("share", [True, False], ids=["shared", "whole"])


def with_sharing(config, share):
    """What prompts begin with is read once, or in every turn."""
    config = copy.deepcopy(config)
    config.train.share_prefixes = share
    return config


@SHARING
@pytest.mark.benchmark(group="score")
def test_score(benchmark, agent, t, config, scores, share):
    arguments = agent, t, with_sharing(config, share)
    again = benchmark.pedantic(score, arguments, rounds=2 if TINY else 1)
    benchmark.extra_info |= again.metrics
    torch.testing.assert_close(again.values.turns, scores.values.turns)
    torch.testing.assert_close(again.values.bootstrap, scores.values.bootstrap)
    torch.testing.assert_close(again.ref_logprobs, scores.ref_logprobs)
    note_rate(benchmark, all_tokens(t))


@pytest.mark.benchmark(group="estimate")
def test_estimate(benchmark, t, scores, config):
    """HAE, normalisation and scatter."""
    arguments = t, scores, ESTIMATE, config.advantage
    estimated = benchmark.pedantic(give_credit, arguments, rounds=20, warmup_rounds=2)
    assert estimated.advantages.isfinite().all() and estimated.loss_mask.any()
    note_rate(benchmark, t.response_ids.numel())


def learner(agent, config):
    """A copy of the agent and its optimisers: every update starts from the same weights."""
    agent = copy.deepcopy(agent)
    policy, critic = agent.model.parameters(), agent.critic.parameters()
    c = config.train
    return agent, {
        "policy": torch.optim.AdamW(
            policy, lr=c.lr, betas=(0.9, 0.99), weight_decay=c.weight_decay
        ),
        "critic": torch.optim.AdamW(
            critic, lr=c.critic_lr, betas=(0.9, 0.99), weight_decay=c.weight_decay
        ),
    }


@SHARING
@pytest.mark.benchmark(group="update")
def test_update(benchmark, agent, t, targets, config, share):
    config = with_sharing(config, share)

    def fresh():
        return (*learner(agent, config), t, targets, config, torch.Generator().manual_seed(0)), {}

    losses = benchmark.pedantic(update, setup=fresh, rounds=2 if TINY else 1)
    assert losses["optim/skipped_steps"] == 0
    benchmark.extra_info["update/shared_tokens"] = losses["update/shared_tokens"]
    note_rate(benchmark, all_tokens(t))


@pytest.fixture(scope="module")
def policy_updates():
    """What the layouts measured so far gave."""
    size, gradients, read = policy_update.SIZES["tiny"], {}, {}
    for name, layout in policy_update.LAYOUTS.items():
        x = policy_update.inputs(size, torch.float64)
        _, read[name] = layout(x, size)
        gradients[name] = [p.grad for p in x.model.parameters()]
    packed = gradients["packed"]
    torch.testing.assert_close(gradients["padded"], packed, rtol=1e-9, atol=1e-13)
    # A token's gradients are summed before a norm, which transformers rounds to float32.
    torch.testing.assert_close(gradients["shared"], packed, rtol=1e-4, atol=1e-9)
    assert read["shared"] < read["packed"] < read["padded"]
    return []


@pytest.mark.benchmark(group="policy update")
@pytest.mark.parametrize("layout", policy_update.LAYOUTS)
def test_policy_update(benchmark, layout, policy_updates):
    """A process of its own, whose start the timer includes; `seconds` are the update's processor time."""
    command = [sys.executable, policy_update.__file__, layout, "tiny" if TINY else "alfworld"]
    run = benchmark.pedantic(
        subprocess.run, (command,), {"capture_output": True, "check": True}, rounds=1
    )
    benchmark.extra_info |= (result := json.loads(run.stdout))
    policy_updates.append([result["loss"], result["grad_norm"]])
    assert policy_updates[0] == pytest.approx(policy_updates[-1], rel=1e-4), "layouts disagree"


@pytest.mark.benchmark(group="trunk")
def test_trunk(benchmark, agent, t, config):
    """Forward and backward of one microbatch, against the roofline: a square float32 matrix product."""
    sequences = t.sequences()
    batches = list(
        microbatches(sequences.ids, sequences.cu_seqlens, config.train.microbatch_tokens)
    )
    batch = batches[len(batches) // 2]

    def forward_and_backward():
        agent.trunk(batch).sum().backward()
        agent.model.zero_grad(set_to_none=True)

    benchmark.pedantic(forward_and_backward, rounds=5, warmup_rounds=1)
    note_rate(benchmark, batch.input_ids.numel())
    rate = trunk_flops(agent.model, batch) / benchmark.stats.stats.median
    roofline = matmul_rate()
    benchmark.extra_info["gflops"] = round(rate / 1e9, 2)
    benchmark.extra_info["roofline_gflops"] = round(roofline / 1e9, 2)
    benchmark.extra_info["roofline_share"] = round(rate / roofline, 3)


def trunk_flops(model, batch):
    """Forward and backward: 6 a weight and token, and causal attention's two products over half of each length."""
    layers, lengths = model.base_model.layers, batch.cu_seqlens.diff().long()
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    attention = 6 * len(layers) * model.config.hidden_size * int((lengths**2).sum())
    return batch.input_ids.numel() * 6 * weights + attention


def matmul_rate():
    """Float32 operations a second of the product of two square matrices, on as many threads as the rest."""
    a, b = torch.randn(2, SQUARE, SQUARE)
    return 2 * SQUARE**3 / bench.measure(lambda: a @ b, "cpu")
