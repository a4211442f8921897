"""Time of each op beside its reference, on one thread, and only after the two were found to agree.

The inputs are those of `python -m hiper_fast.bench`: one HiPER step, 128 trajectories of 50 turns, 290 tokens a
response. HIPER_FAST_BENCH=tiny makes it small enough to test the benchmarks themselves.
"""

import pytest
import torch

from hiper_fast import bench, ops

SIZE = bench.SIZES[bench.default_size()]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs():
    return bench.step_inputs(SIZE)


def pipeline(which, x):
    """From token ids and values to each token's advantage."""
    roles, switch, _, _ = which.find_roles(x.token_ids, x.cu_tokens, x.pieces)
    hae = which.hae(x.rewards, x.values_low, x.values_high, switch, x.terminated, x.cu_turns)
    return which.scatter_advantages(hae, roles, x.cu_tokens)


def numpy_gae(rewards, values, terminated, gamma, lambda_):
    """The usual loop over time, all trajectories (of one length) at once."""
    rewards, values = (x.reshape(SIZE.trajectories, SIZE.turns) for x in (rewards, values))
    advantages, carried, following = rewards.copy(), 0.0, 0.0
    for t in reversed(range(SIZE.turns)):
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
def test_op(benchmark, inputs, op, which):
    run = (bench.calls(inputs) | {"pipeline": lambda which: pipeline(which, inputs)})[op]
    benchmark.group = op
    if which is ops:
        assert_agree(run(ops), run(ops.reference))
        benchmark.pedantic(run, (ops,), rounds=30, warmup_rounds=3)
    else:
        benchmark.pedantic(run, (ops.reference,), rounds=1)


def test_numpy_gae(benchmark, inputs):
    arrays = inputs.rewards.numpy(), inputs.values_low.numpy(), inputs.terminated.numpy(), 0.99, 0.9
    benchmark.group = "gae"
    assert_agree(bench.calls(inputs)["gae"](ops), numpy_gae(*arrays))
    benchmark.pedantic(numpy_gae, arrays, rounds=30, warmup_rounds=3)


@pytest.mark.parametrize("which", [ops, ops.reference], ids=["op", "reference"])
def test_linear_logprobs(benchmark, inputs, which):
    """Forward and backward; the op trades some time for never holding [n, v]."""
    run = bench.calls(inputs)["linear_logprobs"]
    benchmark.group = "linear_logprobs"
    assert_agree(run(ops), run(ops.reference))
    benchmark.pedantic(run, (which,), rounds=5, warmup_rounds=1)
