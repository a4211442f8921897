"""The stages of an update of the embedded default, in tokens a second: rollout, score, estimate, update.

32 episodes, a quarter of the default's update. The tiny model has random weights, so episodes run to the turn limit and
responses to the token limit: turns at their longest. Beside the update in microbatches of like length stands the same
one with every sequence padded to 512 tokens, timed once their losses were found equal; beside the trunk's forward and
backward stands this machine's own rate of float32 matrix products. HIPER_FAST_BENCH=tiny makes it all small enough to
test the benchmarks themselves.
"""

import copy

import pytest
import torch
from torch.nn.functional import pad

from hiper_fast import bench, hiper
from hiper_fast.batch import Microbatch, microbatches
from hiper_fast.config import Config, prompt_style
from hiper_fast.games import Games
from hiper_fast.policy import load
from hiper_fast.prompt import Prompter
from hiper_fast.rollout import Play, rollout, sampled
from hiper_fast.trajectory import pack

TINY = bench.default_size() == "tiny"
LENGTH = 256 if TINY else 512  # of a padded sequence
SQUARE = 128 if TINY else 1024  # of the matrices whose product is the roofline


@pytest.fixture(scope="module")
def config():
    config = Config()
    config.env.name, config.model.device = "household", "cpu"
    config.train.episodes = 2 if TINY else 32
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
    agent = load(config.model, seed=0)
    agent.freeze_reference()
    agent.add_critic()
    return agent


@pytest.fixture(scope="module")
def play(agent, config):
    """Plays a batch of episodes from their resets on."""
    games, prompter = Games(config), Prompter(agent.tokenizer, config.agent, prompt_style(config))
    tasks = games.training("benchmark", config.train.episodes)
    envs = games.make(len(tasks))

    def play():
        plays = [Play(env, task, config) for env, task in zip(envs, tasks, strict=True)]
        respond = sampled(agent, config, config.agent.temperature, seed=0)
        return pack(rollout(plays, prompter, respond, agent.decode), agent.find_roles)

    return play


@pytest.fixture(scope="module")
def t(play):
    return play()


@pytest.fixture(scope="module")
def scores(agent, t, config):
    return hiper.score(agent, t, config)


@pytest.fixture(scope="module")
def targets(t, scores, config):
    return hiper.estimate(t, *scores, config.advantage)


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
    benchmark.extra_info["sampled_tokens_per_second"] = round(t.response_ids.numel() / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="score")
def test_score(benchmark, agent, t, config, scores):
    again = benchmark.pedantic(hiper.score, (agent, t, config), rounds=2 if TINY else 1)
    torch.testing.assert_close(again, scores)
    note_rate(benchmark, all_tokens(t))


@pytest.mark.benchmark(group="estimate")
def test_estimate(benchmark, t, scores, config):
    """HAE, normalisation and scatter."""
    estimated = benchmark.pedantic(hiper.estimate, (t, *scores, config.advantage), rounds=20, warmup_rounds=2)
    assert estimated.advantages.isfinite().all() and estimated.loss_mask.any()
    note_rate(benchmark, t.response_ids.numel())


def fixed_length(ids, cu_seqlens, token_budget, index):
    """`microbatches` the reference's way: in the order given, every sequence padded to LENGTH."""
    lengths = cu_seqlens.diff().long()
    sequences = ids.split(lengths.tolist())
    for part in index.split(token_budget // LENGTH):
        padded = torch.stack([pad(sequences[i], (0, LENGTH - len(sequences[i]))) for i in part])
        yield Microbatch(part, padded, lengths[part])


def learner(agent, config):
    """A copy of the agent and its optimisers: every update starts from the same weights."""
    agent = copy.deepcopy(agent)
    policy, critic = agent.model.parameters(), agent.critic.parameters()
    c = config.train
    return agent, {
        "policy": torch.optim.AdamW(policy, lr=c.lr, betas=(0.9, 0.99), weight_decay=c.weight_decay),
        "critic": torch.optim.AdamW(critic, lr=c.critic_lr, betas=(0.9, 0.99), weight_decay=c.weight_decay),
    }


@pytest.mark.benchmark(group="update")
@pytest.mark.parametrize("layout", [microbatches, fixed_length])
def test_update(benchmark, agent, t, targets, config, layout, monkeypatch):
    def first_losses(layout):
        monkeypatch.setattr(hiper, "microbatches", layout)
        return hiper.step(*learner(agent, config), t, targets, torch.arange(min(64, t.turns)), config, True)

    expected = first_losses(microbatches)
    assert expected and first_losses(layout) == pytest.approx(expected, rel=1e-3, abs=1e-5)

    def fresh():
        return (*learner(agent, config), t, targets, config, torch.Generator().manual_seed(0)), {}

    losses = benchmark.pedantic(hiper.update, setup=fresh, rounds=2 if TINY else 1)
    assert losses["optim/skipped_steps"] == 0
    note_rate(benchmark, all_tokens(t))
    batches = layout(*t.sequences(), config.train.microbatch_tokens, torch.arange(t.turns))
    computed = sum(batch.input_ids.numel() for batch in batches)
    benchmark.extra_info["padding_share"] = round(1 - all_tokens(t) / computed, 3)  # the turns taken all at once


@pytest.mark.benchmark(group="trunk")
def test_trunk(benchmark, agent, t, config):
    """Forward and backward of one microbatch, against the roofline: a square float32 matrix product."""
    batches = list(microbatches(*t.sequences(), config.train.microbatch_tokens))
    ids = batches[len(batches) // 2].input_ids

    def forward_and_backward():
        agent.trunk(ids).sum().backward()
        agent.model.zero_grad(set_to_none=True)

    benchmark.pedantic(forward_and_backward, rounds=5, warmup_rounds=1)
    note_rate(benchmark, ids.numel())
    rate = trunk_flops(agent.model, ids) / benchmark.stats.stats.median
    roofline = matmul_rate()
    benchmark.extra_info["gflops"] = round(rate / 1e9, 2)
    benchmark.extra_info["roofline_gflops"] = round(roofline / 1e9, 2)
    benchmark.extra_info["roofline_share"] = round(rate / roofline, 3)


def trunk_flops(model, ids):
    """Forward and backward: 6 a weight and token, and causal attention's two products over half the length."""
    layers, length = model.base_model.layers, ids.shape[1]
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    return ids.numel() * (6 * weights + 6 * len(layers) * model.config.hidden_size * length)


def matmul_rate():
    """Float32 operations a second of the product of two square matrices, on as many threads as the rest."""
    a, b = torch.randn(2, SQUARE, SQUARE)
    return 2 * SQUARE**3 / bench.measure(lambda: a @ b, "cpu")
