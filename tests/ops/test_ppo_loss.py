"""ppo_loss against the reference and by hand; linear_ppo against the two ops it stands for."""

import math

import pytest
import torch

from hiper_fast import ops


def random_case(tokens, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    old, ref = -torch.rand(2, tokens, dtype=dtype, generator=g) * 5
    logprobs = old + 0.5 * torch.randn(tokens, dtype=dtype, generator=g)
    advantages = torch.randn(tokens, dtype=dtype, generator=g)
    mask = torch.rand(tokens, generator=g) < 0.7
    return logprobs, old, advantages, mask, ref, torch.rand(tokens, dtype=dtype, generator=g)


def one(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("tokens", [0, 1, 2, 50])
@pytest.mark.parametrize(
    "options",
    [{}, {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5, "kl_coef": 1.0, "denominator": 7.0}],
)
@pytest.mark.parametrize("terms", [True, False])
def test_equals_the_reference_with_gradients(tokens, options, terms):
    for seed in range(3):
        logprobs, old, advantages, mask, ref, entropy = random_case(tokens, seed)
        logprobs.requires_grad_()
        entropy.requires_grad_()
        given = options | ({"ref_logprobs": ref, "entropy": entropy} if terms else {})
        loss, metrics = ops.ppo_loss(logprobs, old, advantages, mask, **given)
        expected = ops.reference.ppo_loss(logprobs, old, advantages, mask, **given)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        assert ("kl" in metrics) is ("entropy" in metrics) is terms
        assert all(m.dim() == 0 and not m.requires_grad for m in metrics.values())
        if mask.any():
            leaves = (logprobs, entropy) if terms else (logprobs,)
            result, wanted = (
                torch.autograd.grad(loss, leaves),
                torch.autograd.grad(expected, leaves),
            )
            torch.testing.assert_close(result, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "ratio, advantage, expected, gradient",
    [
        (1.1, 2.0, -2.2, True),
        (1.5, 2.0, -2.4, False),  # clipped above
        (0.5, 2.0, -1.0, True),  # a good token that became rare is still pushed
        (0.5, -2.0, 1.6, False),  # clipped below
        (1.5, -2.0, 3.0, True),
        (5.0, -2.0, 6.0, False),  # dual clip
    ],
)
def test_the_policy_term_by_hand(ratio, advantage, expected, gradient):
    logprobs = one(math.log(ratio)).requires_grad_()
    loss, metrics = ops.ppo_loss(logprobs, one(0.0), one(advantage), torch.tensor([True]))
    torch.testing.assert_close(loss.detach(), torch.tensor(expected, dtype=torch.float64))
    assert bool(torch.autograd.grad(loss, logprobs)[0].abs() > 0) is gradient
    dual = advantage < 0 and ratio > 3
    assert metrics["dual_clip_fraction"] == dual
    assert metrics["clip_fraction"] == (not gradient and not dual)


def test_kl_and_entropy_by_hand():
    nothing = one(0.0)
    loss, metrics = ops.ppo_loss(
        one(-1.0), one(-1.0), nothing, torch.tensor([True]), ref_logprobs=one(-1.5), entropy=one(0.7),
        kl_coef=2.0, entropy_coef=0.1,
    )  # fmt: skip
    kl = math.exp(-0.5) + 0.5 - 1
    torch.testing.assert_close(metrics["kl"].item(), kl)
    torch.testing.assert_close(loss.item(), 2 * kl - 0.07)
    far = ops.ppo_loss(
        one(-200.0), one(-200.0), nothing, torch.tensor([True]), ref_logprobs=one(0.0)
    )[1]
    assert far["kl"] == 10


def test_masked_tokens_do_not_matter_whatever_they_hold():
    logprobs, old, advantages, mask, ref, entropy = random_case(20)
    expected = ops.ppo_loss(logprobs, old, advantages, mask, ref_logprobs=ref, entropy=entropy)[0]
    broken = [torch.where(mask, x, torch.nan) for x in (logprobs, old, advantages, ref, entropy)]
    leaf = broken[0].requires_grad_()
    loss = ops.ppo_loss(
        leaf, broken[1], broken[2], mask, ref_logprobs=broken[3], entropy=broken[4]
    )[0]
    torch.testing.assert_close(loss.detach(), expected)
    assert not torch.autograd.grad(loss, leaf)[0].isnan().any()


def test_extreme_ratios_keep_finite_gradients():
    logprobs = torch.tensor([0.0, 0.0, -500.0]).requires_grad_()
    loss, _ = ops.ppo_loss(
        logprobs, torch.tensor([-500.0, -500.0, 0.0]), torch.tensor([1.0, -1.0, 1.0]), torch.ones(3).bool(),
        ref_logprobs=torch.tensor([-500.0, 0.0, 0.0]),
    )  # fmt: skip
    assert loss.isfinite() and torch.autograd.grad(loss, logprobs)[0].isfinite().all()


def test_an_empty_mask_is_zero_and_differentiable():
    logprobs = torch.randn(4, requires_grad=True)
    loss, _ = ops.ppo_loss(logprobs, torch.zeros(4), torch.ones(4), torch.zeros(4).bool())
    loss.backward()
    assert loss == 0 and (logprobs.grad == 0).all()


def test_microbatches_over_one_denominator_add_up():
    logprobs, old, advantages, mask, *_ = random_case(30)
    whole, metrics = ops.ppo_loss(logprobs, old, advantages, mask)
    parts = [
        ops.ppo_loss(*(x[part] for x in (logprobs, old, advantages, mask)), denominator=mask.sum())
        for part in (slice(0, 7), slice(7, 30))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(m[name] for _, m in parts), value)


@pytest.mark.parametrize("n", [0, 1, 13])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5, "entropy_coef": 0.0, "denominator": 3.0},
        {"temperature": 0.5, "softcap": 1.5, "kl_coef": 0.3},
    ],
)
def test_linear_ppo_equals_its_parts(n, bias, options):
    g = torch.Generator().manual_seed(n)
    hidden, weight = (
        torch.randn(k, 6, dtype=torch.float64, generator=g).requires_grad_() for k in (n, 11)
    )
    offset = torch.randn(11, dtype=torch.float64, generator=g).requires_grad_() if bias else None
    targets = torch.randint(0, 11, (n,), generator=g)
    old, advantages, ref = torch.randn(3, n, dtype=torch.float64, generator=g)
    loss, metrics = ops.linear_ppo(
        hidden, weight, targets, old - 2, advantages, ref_logprobs=ref - 2, bias=offset, **options
    )
    expected = ops.reference.linear_ppo(
        hidden, weight, targets, old - 2, advantages, ref_logprobs=ref - 2, bias=offset, **options
    )
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    assert ("entropy" in metrics) is ("entropy_coef" not in options)
    of_head = {k: v for k, v in options.items() if k in ("temperature", "softcap")}
    own = ops.reference.linear_logprobs(hidden, weight, targets, bias=offset, **of_head)
    torch.testing.assert_close(metrics["logprobs"], own.detach(), rtol=1e-12, atol=1e-12)
    if n:
        leaves = [x for x in (hidden, weight, offset) if x is not None]
        result, wanted = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-12)


def test_linear_ppo_of_no_rows_has_gradients():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    none = torch.zeros(0)
    loss, metrics = ops.linear_ppo(hidden, weight, none.long(), none, none, denominator=3.0)
    assert metrics["logprobs"].shape == (0,)
    for_hidden, for_weight = torch.autograd.grad(loss, (hidden, weight))
    assert for_hidden.shape == (0, 4) and for_weight.shape == (7, 4) and not for_weight.any()


@pytest.mark.parametrize(
    "name", ["old_logprobs", "advantages", "loss_mask", "ref_logprobs", "entropy"]
)
def test_bad_arguments_are_named(name):
    logprobs, old, advantages, mask, ref, entropy = random_case(5)
    given = {
        "old_logprobs": old,
        "advantages": advantages,
        "loss_mask": mask,
        "ref_logprobs": ref,
        "entropy": entropy,
    }
    for bad in (given[name][:4], given[name].to(torch.float32), given[name].to("meta")):
        with pytest.raises(ValueError, match=name):
            ops.ppo_loss(logprobs, **(given | {name: bad}))
