"""Every op on CUDA tensors gives what it gives on the CPU."""

import pytest
import torch

from hiper_fast import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]


def assert_same_on_the_gpu(run, *tensors):
    result, expected = run(*(t.cuda() for t in tensors)), run(*tensors)
    result, expected = ([x] if isinstance(x, torch.Tensor) else x for x in (result, expected))
    for x, y in zip(result, expected, strict=True):
        assert x.is_cuda
        torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-4)


def test_scans():
    rewards, values, high = torch.randn(3, 12)
    switch, terminated = torch.rand(12) < 0.5, torch.tensor([True, False])
    cu_turns = torch.tensor([0, 5, 12], dtype=torch.int32)
    assert_same_on_the_gpu(ops.hae, rewards, values, high, switch, terminated, cu_turns)
    assert_same_on_the_gpu(ops.gae, rewards, values, terminated, cu_turns)
    assert_same_on_the_gpu(ops.normalize, rewards, switch)
    with pytest.raises(ValueError, match="values_low"):
        ops.hae(rewards.cuda(), values, high.cuda(), switch.cuda(), terminated.cuda(), cu_turns.cuda())


def test_roles_and_scatter():
    pieces = ops.TokenPieces.from_bytes([b"<action>", b"y", b"</action>"])
    ids, cu_tokens = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 3, 4], dtype=torch.int32)
    assert_same_on_the_gpu(lambda ids, cu: ops.find_roles(ids, cu, pieces), ids, cu_tokens)
    roles = ops.find_roles(ids, cu_tokens, pieces)[0]
    low, high, switch = torch.randn(3, 2)
    assert_same_on_the_gpu(
        lambda low, high, switch, boundary, roles, cu: ops.scatter_advantages(
            ops.HAE(low, low, high, high, switch, switch, boundary), roles, cu
        ),
        low, high, switch, torch.tensor([True, False]), roles, cu_tokens,
    )  # fmt: skip


def test_losses():
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(0, 40, (9,))
    old, advantages, ref = torch.randn(3, 9)

    def run(hidden, weight, targets, old, advantages, ref):
        loss, _ = ops.linear_ppo(hidden, weight, targets, old - 3, advantages, ref_logprobs=ref - 3)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    assert_same_on_the_gpu(run, hidden, weight, targets, old, advantages, ref)
    assert_same_on_the_gpu(lambda *x: ops.value_loss(*x)[0], old, ref, advantages, targets > 20)
