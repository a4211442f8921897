"""The public ops on CUDA tensors: the CPU's results, without waiting for the GPU, compiled; and their errors."""

import functools

import pytest
import torch

from hiper_fast import bench, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

SIZE = bench.Size(trajectories=4, turns=6, tokens=40, rows=20, width=16, vocabulary=70)
NAMES = tuple(bench.make_calls(bench.make_inputs(SIZE)))


@pytest.fixture(scope="module")
def inputs():
    return bench.make_inputs(SIZE), bench.make_inputs(SIZE, "cuda")


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def test_all_are_triton():
    assert {op: devices["cuda"] for op, devices in ops.implementations().items()} == dict.fromkeys(
        NAMES, "triton"
    )


@pytest.mark.parametrize("name", NAMES)
def test_as_on_the_cpu(inputs, name):
    cpu, cuda = inputs
    for x, y in zip(
        flat(bench.make_calls(cuda)[name](ops)), flat(bench.make_calls(cpu)[name](ops)), strict=True
    ):
        assert x.is_cuda and x.dtype == y.dtype
        torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("linear")])
def test_nothing_waits_for_the_gpu(inputs, name):
    call = bench.make_calls(inputs[1])[name]
    call(ops)  # compilation and the pieces' copy to the GPU may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(ops)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_the_head_waits_only_to_leave_rows_out(inputs, entropy_coef):
    x = inputs[1]
    call = functools.partial(
        ops.linear_ppo,
        x.hidden,
        x.weight,
        x.targets,
        x.row_old,
        x.row_advantages,
        kl_coef=0.0,
        entropy_coef=entropy_coef,
    )
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if entropy_coef:
            call()
        else:
            with pytest.raises(RuntimeError, match="synchroniz"):
                call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_in_a_cuda_graph(inputs, name):
    call = bench.make_calls(inputs[1])[name]
    expected = [x.clone() for x in flat(call(ops))]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = flat(call(ops))
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_a_call_that_leaves_rows_out_compiles_nothing_in_a_cuda_graph(inputs):
    x = inputs[1]
    rows = x.hidden, x.weight, x.targets, x.row_old, x.row_advantages
    call = functools.partial(ops.linear_ppo, *rows, kl_coef=0.0, entropy_coef=0.0)
    expected = torch.autograd.grad(call()[0], (x.hidden, x.weight))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = torch.autograd.grad(call()[0], (x.hidden, x.weight))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(result, expected)


def test_compiled_without_a_break(inputs):
    x = inputs[1]

    def step(rewards, hidden, weight):
        roles, switch, _, _ = ops.find_roles(x.token_ids, x.cu_tokens, x.pieces)
        hae = ops.hae(rewards, x.values_low, x.values_high, switch, x.terminated, x.cu_turns)
        advantages, _ = ops.scatter_advantages(hae, roles, x.cu_tokens)
        loss, _ = ops.linear_ppo(hidden, weight, x.targets, x.row_old, advantages[: len(x.targets)])
        return loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [f(x.rewards, x.hidden, x.weight) for f in (compiled, step)]
    torch.testing.assert_close(*results)
    leaves = (x.hidden, x.weight)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in results))


def test_opcheck(inputs):
    x = inputs[1]
    registered = torch.ops.hiper_fast
    vectors = [v.detach() for v in (x.row_old, x.row_old, x.row_advantages)]
    rows = (x.hidden.detach(), x.weight.detach(), None, x.targets)
    pieces = x.pieces.on(x.token_ids.device)
    turns = (
        x.rewards,
        x.values_low,
        x.values_high,
        None,
        x.switch,
        x.terminated,
        x.cu_turns,
        None,
        None,
    )
    checks = {
        registered.hae: (*turns, 1.0, 1.0, 0.95),
        registered.gae: (x.rewards, x.values_low, x.terminated, x.cu_turns, None, 1.0, 1.0),
        registered.normalize: (x.rewards, x.switch, 1e-8),
        registered.find_roles: (x.token_ids, x.cu_tokens, *pieces),
        registered.sample: (x.logits, x.uniform, x.temperature),
        registered.linear_logprobs: (*rows, 1.0, 2.0, True),
        registered.linear_ppo: (
            *rows,
            *vectors,
            1.0,
            2.0,
            0.2,
            0.2,
            3.0,
            0.01,
            0.001,
            None,
            True,
            True,
            False,
        ),
    }
    for op, arguments in checks.items():
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_shapes_and_devices_are_told_at_once(inputs):
    cpu, cuda = inputs
    with pytest.raises(ValueError, match="values_low"):
        ops.hae(
            cuda.rewards,
            cpu.values_low,
            cuda.values_high,
            cuda.switch,
            cuda.terminated,
            cuda.cu_turns,
        )
    with pytest.raises(ValueError, match="targets"):
        ops.linear_logprobs(cuda.hidden, cuda.weight, cuda.targets[:-1])


def test_values_are_told_by_a_later_call(inputs):
    x = inputs[1]
    bad = x.targets.clone()
    bad[3] = SIZE.vocabulary
    assert (
        ops.linear_logprobs(x.hidden, x.weight, bad).shape == x.targets.shape
    )  # no device-side assertion
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="targets"):
        ops.normalize(x.rewards, x.switch)
    ops.gae(x.rewards, x.values_low, x.terminated, x.cu_turns.flip(0))
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="cu_turns"):
        ops.hae(x.rewards, x.values_low, x.values_high, x.switch, x.terminated, x.cu_turns)
    ops.linear_logprobs(x.hidden, x.weight, x.targets)  # and all goes on
