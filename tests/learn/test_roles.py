"""Metrics of each role against plain loops over tokens, and what an update gives them."""

import copy
import math
import random

import pytest
import torch
from helpers import make_tiny
from test_update import build, give, make_agent, scored, settings, trained

from hiper_fast.distributed import ALONE
from hiper_fast.learn.roles import ROLES, measure_roles

BITS = {"action": 1, "subgoal": 2, "switch": 4}  # docs/hiper.md


@pytest.fixture(scope="module")
def played():
    return build(make_tiny())


@pytest.fixture
def agent():
    return make_agent()


def draw(played, seed, length):
    """Trajectories and targets of `length` random tokens, their old and new log-probs."""
    g = torch.Generator().manual_seed(seed)
    t, targets = copy.copy(played), copy.copy(TARGETS)
    t.old_logprobs = -torch.rand(length, generator=g) * 3
    t.roles = torch.randint(0, 8, (length,), generator=g).to(torch.uint8)  # overlaps too
    targets.advantages = torch.randn(length, generator=g).round(decimals=0)
    targets.loss_mask = (t.roles > 0) & (torch.rand(length, generator=g) < 0.7)
    targets.ref_logprobs = t.old_logprobs + torch.randn(length, generator=g)
    clipped = torch.randint(0, 2, (length,), generator=g).float()
    clipped[torch.rand(length, generator=g) < 0.2] = math.nan  # another process's
    return t, targets, clipped


class Targets:
    advantages = loss_mask = ref_logprobs = None


TARGETS = Targets()


def plain(t, targets, clipped):
    """Token after token, in python's float64."""
    found = {}
    for name, bit in BITS.items():
        tokens = [
            i for i, role in enumerate(t.roles.tolist()) if role & bit and targets.loss_mask[i]
        ]
        old, ref = t.old_logprobs.double(), targets.ref_logprobs
        if tokens:
            found[f"policy/entropy_{name}"] = -sum(old[i].item() for i in tokens) / len(tokens)
        if tokens and ref is not None:
            d = [ref[i].item() - old[i].item() for i in tokens]
            found[f"policy/kl_{name}"] = sum(min(math.exp(x) - x - 1, 10) for x in d) / len(tokens)
        seen = [clipped[i].item() for i in tokens if not math.isnan(clipped[i])]
        if seen:
            found[f"policy/clip_fraction_{name}"] = sum(seen) / len(seen)
    return found


@pytest.mark.parametrize("length", [0, 1, 2, 500])
@pytest.mark.parametrize("seed", range(3))
def test_against_plain_loops(played, seed, length):
    t, targets, clipped = draw(played, seed, length)
    found = measure_roles(t, targets, clipped, ALONE)
    assert found == pytest.approx(plain(t, targets, clipped), rel=1e-5)
    assert found.keys() == plain(t, targets, clipped).keys()
    targets.ref_logprobs = None
    left = {name for name in found if "/kl_" not in name}
    assert measure_roles(t, targets, clipped, ALONE).keys() == left


def test_by_hand(played):
    """Four tokens: a switch, a subgoal, an action, and one over two tags, which counts in both."""
    t, targets = copy.copy(played), Targets()
    t.old_logprobs = torch.tensor([-0.5, -1.0, -2.0, -4.0])
    t.roles = torch.tensor([4, 2, 1, 3], dtype=torch.uint8)
    targets.advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    targets.loss_mask = torch.tensor([True, True, True, True])
    targets.ref_logprobs = t.old_logprobs + torch.tensor([0.0, math.log(2), 0.0, 9.0])
    found = measure_roles(t, targets, torch.tensor([0.0, 1.0, 0.0, 1.0]), ALONE)
    assert found == pytest.approx(
        {
            "policy/entropy_switch": 0.5, "policy/entropy_subgoal": 2.5, "policy/entropy_action": 3.0,
            # 2 - ln 2 - 1 = 0.3069; e^9 - 10 is held at 10.
            "policy/kl_switch": 0.0, "policy/kl_subgoal": (1 - math.log(2) + 10) / 2, "policy/kl_action": 5.0,
            "policy/clip_fraction_switch": 0.0, "policy/clip_fraction_subgoal": 1.0,
            "policy/clip_fraction_action": 0.5,
        },
        abs=1e-6,
    )  # fmt: skip
    assert list(ROLES) == ["switch", "subgoal", "action"]


def test_what_is_not_finite_is_left_out(played):
    t, targets, clipped = draw(played, 0, 500)
    broken = copy.copy(targets)
    broken.ref_logprobs = targets.ref_logprobs.clone()
    broken.ref_logprobs[::3] = math.nan
    found = measure_roles(t, broken, clipped, ALONE)
    assert all(math.isfinite(value) for value in found.values())
    clipped[:] = math.nan
    assert not any("clip" in name for name in measure_roles(t, targets, clipped, ALONE))


def leave_out_overlaps(t, targets):
    """One token over two tags counts twice: without those the roles make up the whole."""
    assert (t.roles & (t.roles - 1)).any(), "some tokens have two roles"
    targets.loss_mask = targets.loss_mask & ((t.roles & (t.roles - 1)) == 0)


@pytest.mark.parametrize("minibatches", [1, 3])
def test_an_update_measures_every_loss_token(agent, minibatches):
    """The roles' clip fractions, weighted by their tokens, are the loss's, where it is of one step."""
    config = settings(minibatches=minibatches, kl_coef=0.01)
    t, scores = scored(agent, config)
    targets = give(t, scores, config)
    leave_out_overlaps(t, targets)
    torch.manual_seed(0)
    t.old_logprobs += 0.3 * torch.randn(len(t.old_logprobs))
    losses, _, _ = trained(agent, t, targets, config)
    masks = {n: targets.loss_mask & ((t.roles & bit) > 0) for n, bit in BITS.items()}
    if minibatches == 1:
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        clipped = sum(losses[f"policy/clip_fraction_{n}"] * count for n, count in counts.items())
        assert losses["loss/clip_fraction"] == pytest.approx(clipped / sum(counts.values()))
        assert 0 < losses["loss/clip_fraction"] < 1
    for name, mask in masks.items():
        assert losses[f"policy/entropy_{name}"] == pytest.approx(
            -t.old_logprobs[mask].mean().item()
        )
        assert losses[f"policy/kl_{name}"] > 0


def test_roles_before_any_step_make_up_the_losss_kl(agent):
    """At the sampled policy itself, whose log-probs are the old ones."""
    config = settings()
    t, scores = scored(agent, config)
    targets = give(t, scores, config)
    leave_out_overlaps(t, targets)
    losses, _, _ = trained(agent, t, targets, config)
    counts = {n: int((targets.loss_mask & ((t.roles & bit) > 0)).sum()) for n, bit in BITS.items()}
    kl = sum(losses[f"policy/kl_{name}"] * count for name, count in counts.items())
    assert losses["loss/kl"] == pytest.approx(kl / sum(counts.values()), rel=1e-3)
    assert losses["loss/kl"] > 1e-4


def test_the_critic_alone_clips_nothing(agent):
    config = settings(kl_coef=0.0)
    t, scores = scored(agent, config)
    losses, _, _ = trained(agent, t, give(t, scores, config), config, train_policy=False)
    assert not any(name.startswith(("policy/clip", "policy/kl")) for name in losses)
    assert all(losses[f"policy/entropy_{name}"] > 0 for name in BITS)


def test_the_mean_is_an_unbiased_estimate_of_the_entropy(played):
    """Of tokens drawn from a known distribution, within four standard errors."""
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125])
    entropy = -(weights * weights.log()).sum().item()  # 1.75 bits
    assert entropy == pytest.approx(1.75 * math.log(2))
    n = 20_000
    drawn = random.Random(0).choices(range(4), weights.tolist(), k=n)
    t, targets = copy.copy(played), Targets()
    t.old_logprobs = weights.log()[drawn]
    t.roles = torch.full((n,), 1, dtype=torch.uint8)
    targets.advantages, targets.loss_mask = torch.zeros(n), torch.ones(n, dtype=torch.bool)
    other = torch.tensor([0.25, 0.25, 0.25, 0.25])
    targets.ref_logprobs = other.log()[drawn]
    found = measure_roles(t, targets, torch.zeros(n), ALONE)
    error = t.old_logprobs.std().item() / math.sqrt(n)
    assert abs(found["policy/entropy_action"] - entropy) < 4 * error
    kl = (weights * (weights / other).log()).sum().item()
    assert found["policy/kl_action"] == pytest.approx(kl, abs=0.02)
