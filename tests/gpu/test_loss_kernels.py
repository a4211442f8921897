"""ppo_loss and value_loss on the device against the reference's loss and gradients in float64."""

import pytest
import torch

from hiper_fast.ops import reference

pytest.importorskip("triton")

from hiper_fast.kernels import scale_gradients as scale
from hiper_fast.kernels.ppo_loss import ppo_loss
from hiper_fast.kernels.value_loss import value_loss

pytestmark = pytest.mark.gpu

PPO = (0.25, 0.125, 3.0, 0.0625, 0.5)  # exact in float32, as the interpreter has them
NAMES = ("clip_low", "clip_high", "dual_clip", "kl_coef", "entropy_coef")


def random_case(tokens, dtype, seed=0, share=0.7):
    g = torch.Generator().manual_seed(seed)
    old, ref = (-5 * torch.rand(tokens, dtype=torch.float64, generator=g) for _ in range(2))
    logprobs = old + 0.7 * torch.randn(tokens, dtype=torch.float64, generator=g)
    advantages = torch.randn(tokens, dtype=torch.float64, generator=g)
    mask = torch.rand(tokens, generator=g) < share
    entropy = torch.rand(tokens, dtype=torch.float64, generator=g)
    return [
        x.to(dtype) if x.is_floating_point() else x
        for x in (logprobs, old, advantages, mask, ref, entropy)
    ]


def truth(function, leaves, *others, **options):
    leaves = [x.double().requires_grad_() for x in leaves]
    loss = function(
        leaves, *(x.double() if x.is_floating_point() else x for x in others), **options
    )
    return loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("tokens, share", [(0, 1.0), (1, 1.0), (50, 0.7), (2100, 0.7), (7, 0.0)])
@pytest.mark.parametrize(
    "with_ref, with_entropy, denominator", [(1, 1, None), (0, 0, 8.0), (1, 0, None), (0, 1, 4.0)]
)
def test_ppo_loss(device, tokens, share, dtype, with_ref, with_entropy, denominator):
    case = random_case(tokens, dtype, share=share)
    logprobs, old, advantages, mask, ref, entropy = case
    broken = [
        torch.where(mask, x, torch.nan).to(device)
        for x in (logprobs, old, advantages, ref, entropy)
    ]
    result = ppo_loss(
        *broken[:3], mask.to(device), broken[3] if with_ref else None, broken[4] if with_entropy else None,
        *PPO, denominator, True,
    )  # fmt: skip

    def loss(leaves, old, advantages, mask, ref):
        terms = {
            "ref_logprobs": ref if with_ref else None,
            "entropy": leaves[1] if with_entropy else None,
        }
        options = dict(zip(NAMES, PPO, strict=True)) | terms
        return (
            reference.ppo_loss(leaves[0], old, advantages, mask, denominator=denominator, **options)
            + 0 * leaves[0].nansum()
        )

    expected, (gradient, gradient_entropy) = truth(
        loss, (logprobs, entropy), old, advantages, mask, ref
    )
    tolerance = (
        {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    )
    torch.testing.assert_close(result[0].cpu().double(), expected, **tolerance)
    torch.testing.assert_close(result[2].cpu().double(), gradient, **tolerance)
    if with_entropy:
        wanted = torch.zeros_like(gradient) if gradient_entropy is None else gradient_entropy
        torch.testing.assert_close(result[3].cpu().double(), wanted, **tolerance)
    else:
        assert result[3].shape == (0,)


def test_ppo_metrics_by_hand(device):
    logprobs = torch.tensor([1.5, 0.5, 1.0, 5.0], dtype=torch.float64).log()
    zeros, ones = torch.zeros_like(logprobs), torch.ones(4, dtype=torch.bool)
    advantages = torch.tensor([2.0, -2.0, 1.0, -2.0], dtype=torch.float64)
    given = [x.to(device) for x in (logprobs, zeros, advantages, ones, zeros - 1, zeros + 0.5)]
    loss, metrics, gradient, _ = ppo_loss(*given, *PPO, None, True)
    policy = (-2 * 1.125 + 2 * 0.75 - 1 + 2 * 3) / 4
    kl = sum(min(d.exp() - d - 1, 10) for d in (-1 - logprobs)) / 4
    expected = [policy, -logprobs.mean(), 2 / 4, 1 / 4, kl, 0.5]
    torch.testing.assert_close(metrics.cpu(), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(loss.item(), policy + 0.0625 * kl.item() - 0.5 * 0.5)
    assert ppo_loss(*given, *PPO, None, False)[2].shape == (0,)


def test_extreme_ratios_stay_finite(device):
    logprobs, old = torch.tensor([0.0, 0.0, -500.0, 0.0]), torch.tensor([-500.0, -500.0, 0.0, 0.0])
    advantages, ref = torch.tensor([1.0, -1.0, 1.0, 0.0]), torch.tensor([-500.0, 500.0, 0.0, 0.0])
    given = [x.to(device) for x in (logprobs, old, advantages, torch.ones(4).bool(), ref)]
    loss, metrics, gradient, _ = ppo_loss(*given, None, *PPO, None, True)
    assert loss.isfinite() and metrics.isfinite().all() and gradient.isfinite().all()


def test_nan_is_not_hidden(device):
    given = [x.to(device) for x in random_case(5, torch.float32, share=1.0)]
    given[0][2] = torch.nan
    loss, _, gradient, _ = ppo_loss(*given, *PPO, None, True)
    assert loss.isnan() and gradient.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("turns", [0, 1, 50, 2100])
@pytest.mark.parametrize("denominator", [None, 4.0])
def test_value_loss(device, turns, dtype, denominator):
    values, old, returns, mask, *_ = random_case(turns, dtype, seed=1)
    broken = [torch.where(mask, x, torch.nan).to(device) for x in (values, old, returns)]
    loss, metrics, gradient = value_loss(*broken, mask.to(device), 0.5, denominator, True)

    def loss_of(leaves, old, returns, mask):
        return (
            reference.value_loss(leaves[0], old, returns, mask, clip=0.5, denominator=denominator)
            + 0 * leaves[0].sum()
        )

    expected, (wanted,) = truth(loss_of, (values,), old, returns, mask)
    tolerance = (
        {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    )
    torch.testing.assert_close(loss.cpu().double(), expected, **tolerance)
    torch.testing.assert_close(gradient.cpu().double(), wanted, **tolerance)
    assert metrics[0] == loss and (metrics[1] > 0 or turns < 2)


def test_slices_may_begin_anywhere(device):
    case = [x.to(device) for x in random_case(1100, torch.float32)]
    slices, copies = [x[1:] for x in case], [x[1:].clone() for x in case]
    for run in (
        lambda given: ppo_loss(*given, *PPO, None, True),
        lambda given: value_loss(*given[:4], 0.25, None, True),
    ):
        for x, y in zip(run(slices), run(copies), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("factor", [1.0, -0.375, float("nan")])
def test_scale_gradients(device, dtype, factor, monkeypatch):
    """Two programs, of which one has two blocks; and what lies behind the last stays as it is."""
    monkeypatch.setattr(scale, "_PROGRAMS", 2)
    kept = [torch.randn(n, dtype=dtype, device=device) for n in (0, 1, 2 * 4096 + 77)]
    made = [x.clone() for x in kept]
    by = torch.tensor(factor, dtype=torch.promote_types(dtype, torch.float32), device=device)
    scale.scale_gradients([made[0], made[1], made[2][:-7]], by)
    for x, y in zip(made[:2], kept[:2], strict=True):
        torch.testing.assert_close(x, y * by.to(dtype), equal_nan=True)
    torch.testing.assert_close(made[2][:-7], kept[2][:-7] * by.to(dtype), equal_nan=True)
    assert torch.equal(made[2][-7:], kept[2][-7:])
