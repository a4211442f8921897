"""Time of each op beside its reference, on one thread, and only after the two were found to agree.

The size is that of one HiPER step: 128 trajectories of 50 turns, 290 tokens a response.
HIPER_FAST_BENCH=tiny makes it small enough to test the benchmarks themselves.
"""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hiper_fast import ops

TINY = os.environ.get("HIPER_FAST_BENCH") == "tiny"
TRAJECTORIES, TURNS, TOKENS = (4, 5, 40) if TINY else (128, 50, 290)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def step():
    """One step's turns, and responses cut as a byte-level vocabulary of Qwen's size cuts them."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", dtype=np.uint8)
    fragments = [b"<", b"switch", b">", b"KEEP", b"SW", b"ITCH", b"</", b"><", b"subgoal", b"action"]
    lengths = rng.integers(1, 9, size=151_000)
    pieces = fragments + [rng.choice(letters, size=n).tobytes() for n in lengths]
    id_of = {piece: i for i, piece in enumerate(fragments)}

    def response() -> np.ndarray:
        word = [b"KEEP"] if rng.random() < 0.7 else [b"SW", b"ITCH"]
        head = [b"<", b"switch", b">", *word, b"</", b"switch", b"><", b"subgoal", b">"]
        middle, tail = [b"</", b"subgoal", b"><", b"action", b">"], [b"</", b"action", b">"]
        ids = [id_of[x] for x in head], [id_of[x] for x in middle], [id_of[x] for x in tail]
        words = rng.integers(len(fragments), len(pieces), size=TOKENS)
        plain = TOKENS - sum(map(len, ids)) - 9
        return np.concatenate([words[:plain], ids[0], words[-9:-5], ids[1], words[-5:], ids[2]])

    turns = TRAJECTORIES * TURNS
    g = torch.Generator().manual_seed(0)
    rewards, low, high, switch_values = torch.randn(4, turns, generator=g)
    terminated = torch.rand(TRAJECTORIES, generator=g) < 0.5
    cu_turns = torch.arange(TRAJECTORIES + 1, dtype=torch.int32) * TURNS
    ids = torch.from_numpy(np.concatenate([response() for _ in range(turns)]))
    cu_tokens = torch.arange(turns + 1, dtype=torch.int32) * TOKENS
    pieces = ops.TokenPieces.from_bytes(pieces)
    roles, switch, _, _ = ops.find_roles(ids, cu_tokens, pieces)
    arguments = (rewards, low, high, switch, terminated, cu_turns)
    options = {"values_switch": switch_values, "gamma": 0.99, "lambda_turn": 0.9, "lambda_segment": 0.95}
    hae = ops.hae(*arguments, **options)
    return SimpleNamespace(
        hae=lambda which: which.hae(*arguments, **options),
        gae=lambda which: which.gae(rewards, low, terminated, cu_turns, gamma=0.99, lambda_=0.9),
        normalize=lambda which: which.normalize(rewards, switch),
        find_roles=lambda which: which.find_roles(ids, cu_tokens, pieces),
        scatter_advantages=lambda which: which.scatter_advantages(hae, roles, cu_tokens),
        pipeline=lambda which: pipeline(which, ids, cu_tokens, pieces, arguments, options),
        numpy_gae=lambda: numpy_gae(rewards.numpy(), low.numpy(), terminated.numpy(), 0.99, 0.9),
    )


def pipeline(which, ids, cu_tokens, pieces, arguments, options):
    """From token ids and values to each token's advantage."""
    roles, switch, _, _ = which.find_roles(ids, cu_tokens, pieces)
    rewards, low, high, _, terminated, cu_turns = arguments
    hae = which.hae(rewards, low, high, switch, terminated, cu_turns, **options)
    return which.scatter_advantages(hae, roles, cu_tokens)


def numpy_gae(rewards, values, terminated, gamma, lambda_):
    """The usual loop over time, all trajectories (of one length) at once."""
    rewards, values = rewards.reshape(TRAJECTORIES, TURNS), values.reshape(TRAJECTORIES, TURNS)
    advantages, carried, following = np.empty_like(rewards), 0.0, 0.0
    for t in reversed(range(TURNS)):
        carried = rewards[:, t] + gamma * following - values[:, t] + gamma * lambda_ * carried
        advantages[:, t] = carried
        following = values[:, t]
    return advantages.reshape(-1), (advantages + values).reshape(-1)


def assert_agree(result, expected):
    result, expected = ([x] if isinstance(x, torch.Tensor) else x for x in (result, expected))
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(x, torch.as_tensor(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["hae", "gae", "normalize", "find_roles", "scatter_advantages", "pipeline"])
@pytest.mark.parametrize("which", [ops, ops.reference], ids=["op", "reference"])
def test_op(benchmark, step, op, which):
    run = getattr(step, op)
    benchmark.group = op
    if which is ops:
        assert_agree(run(ops), run(ops.reference))
        benchmark.pedantic(run, (ops,), rounds=30, warmup_rounds=3)
    else:
        benchmark.pedantic(run, (ops.reference,), rounds=1)


def test_numpy_gae(benchmark, step):
    benchmark.group = "gae"
    assert_agree(step.gae(ops), step.numpy_gae())
    benchmark.pedantic(step.numpy_gae, rounds=30, warmup_rounds=3)


@pytest.mark.parametrize("which", [ops, ops.reference], ids=["op", "reference"])
def test_linear_logprobs(benchmark, which):
    """Forward and backward; the op trades some time for never holding [n, v]."""
    n, h, v = (16, 8, 50) if TINY else (1024, 128, 4096)
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(k, h, generator=g).requires_grad_() for k in (n, v))
    targets = torch.randint(0, v, (n,), generator=g)

    def run(which):
        logprobs, entropy = which.linear_logprobs(hidden, weight, targets, entropy=True)
        return torch.autograd.grad(logprobs.mean() + 0.001 * entropy.mean(), (hidden, weight))

    benchmark.group = "linear_logprobs"
    assert_agree(run(ops), run(ops.reference))
    benchmark.pedantic(run, (which,), rounds=5, warmup_rounds=1)
