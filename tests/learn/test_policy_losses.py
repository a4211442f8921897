"""The policy loss by its options: plain loops in float64, figures by hand and of other suites, the fused op."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from helpers import configure, make_tiny

from hiper_fast.config import TrainConfig
from hiper_fast.learn import loss as loss_module
from hiper_fast.learn.loss import Counts, LossTokens, is_fused, plain_loss, policy_loss
from hiper_fast.options import ConfigError

RATIOS, AGGREGATIONS = ("token", "turn", "sequence"), ("token", "sequence", "constant")
EVERY = [*product(("ppo", "cispo"), RATIOS, AGGREGATIONS)]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def make_tokens(
    old_logprobs, advantages, turn=None, sequence=None, ref_logprobs=None, ids=None
) -> LossTokens:
    """One turn and one sequence, where none are given."""
    one = [0] * len(old_logprobs)
    turn, sequence = (torch.tensor(x if x is not None else one) for x in (turn, sequence))
    ref = None if ref_logprobs is None else tensor(ref_logprobs)
    return LossTokens(
        ids, tensor(old_logprobs), tensor(advantages), ref, turn.long(), sequence.long()
    )


def count(tokens, longest=16):
    sequences = len(tokens.sequence.unique())
    return Counts(len(tokens.turn), sequences, sequences + 1, longest)  # one holds no loss token


def draw(seed, n=60, spread=0.6):
    """Random tokens of 12 turns in 5 sequences, with all that the loss may need."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.randint(0, 12, (n,), generator=g).sort().values
    logprobs = -3 * torch.rand(n, generator=g, dtype=torch.float64)
    old, ref, advantages = (torch.randn(3, n, generator=g, dtype=torch.float64)).unbind(0)
    entropy = torch.rand(n, generator=g, dtype=torch.float64)
    tokens = LossTokens(
        None, logprobs + spread * old, 2 * advantages, logprobs + spread * ref, turn, turn * 5 // 12
    )
    return logprobs, entropy, tokens


def by_hand(logprobs, entropy, tokens, counts, c):
    """(loss, its derivatives by each log-prob and each entropy, clipped tokens), a token at a time."""
    lp, old, adv = (x.tolist() for x in (logprobs, tokens.old_logprobs, tokens.advantages))
    n, turn, sequence = len(lp), tokens.turn.tolist(), tokens.sequence.tolist()
    owner = {"token": list(range(n)), "turn": turn, "sequence": sequence}[c.ratio]
    total, grad, grad_entropy, clips = 0.0, [0.0] * n, [0.0] * n, 0
    for i in range(n):
        mates = [j for j in range(n) if owner[j] == owner[i]]
        r = math.exp(math.fsum(lp[j] - old[j] for j in mates) / len(mates))
        low, high = 1 - c.clip_low, 1 + c.clip_high
        near = min(max(r, low), high)
        if c.loss == "cispo":
            term, slope, clipped = -near * adv[i] * lp[i], -near * adv[i], near != r
        else:
            clipped = -adv[i] * near > -adv[i] * r
            term, slope = max(-adv[i] * r, -adv[i] * near), 0.0 if clipped else -adv[i] * r
            if adv[i] < 0 and term > -adv[i] * c.dual_clip:
                term, slope = -adv[i] * c.dual_clip, 0.0
        if tokens.ref_logprobs is not None:
            d = float(tokens.ref_logprobs[i]) - lp[i]
            term += c.kl_coef * (math.exp(d) - d - 1)
            slope += c.kl_coef * (1 - math.exp(d))
        if entropy is not None:
            term -= c.entropy_coef * entropy[i].item()
        weight = {
            "token": 1 / counts.tokens,
            "sequence": 1 / counts.trained / sum(s == sequence[i] for s in sequence),
            "constant": 1 / (counts.sequences * counts.longest),
        }[c.aggregation]
        total, clips = total + weight * term, clips + clipped
        grad[i], grad_entropy[i] = weight * slope, -weight * c.entropy_coef
    return total, tensor(grad), tensor(grad_entropy), clips


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss, ratio, aggregation", EVERY)
def test_loops(loss, ratio, aggregation, seed):
    c = TrainConfig(
        loss=loss,
        ratio=ratio,
        aggregation=aggregation,
        kl_coef=0.03,
        entropy_coef=0.02,
        clip_low=0.05,
        clip_high=0.08,
        dual_clip=1.5,
    )
    logprobs, entropy, tokens = draw(seed)
    counts = count(tokens)
    logprobs.requires_grad_(), entropy.requires_grad_()
    found, metrics, *_ = plain_loss(logprobs, entropy, tokens, counts, c)
    expected, grad, grad_entropy, clips = by_hand(
        logprobs.detach(), entropy.detach(), tokens, counts, c
    )
    found.backward()
    assert float(found) == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logprobs.grad, grad, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(entropy.grad, grad_entropy, rtol=1e-11, atol=1e-13)
    assert 0 < clips and float(metrics["clip_fraction"]) == pytest.approx(clips / 60)
    d = tokens.ref_logprobs - logprobs
    assert float(metrics["kl"]) == pytest.approx(float((d.exp() - d - 1).mean()))
    assert float(metrics["entropy"]) == pytest.approx(float(entropy.mean()))
    assert not any(x.requires_grad for x in metrics.values())


@pytest.mark.parametrize("loss, ratio, aggregation", EVERY)
def test_no_tokens_and_one(loss, ratio, aggregation):
    c = TrainConfig(loss=loss, ratio=ratio, aggregation=aggregation)
    logprobs = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    found, metrics, *_ = plain_loss(logprobs, None, make_tokens([], []), Counts(3, 2, 2, 9), c)
    found.backward()
    assert float(found) == 0 and metrics.keys() == {"clip_fraction"}
    logprobs = tensor([-1.0]).requires_grad_()
    found, *_ = plain_loss(logprobs, None, make_tokens([-1.0], [2.0]), Counts(1, 1, 1, 1), c)
    found.backward()
    assert float(found) == pytest.approx(2.0 if loss == "cispo" else -2.0)
    assert logprobs.grad.tolist() == pytest.approx([-2.0])


# The fused op.


def through_a_head(seed, fused, monkeypatch, **options):
    """(loss, metrics, gradients of hidden states and head) of random tokens, in float64."""
    agent, g = make_tiny(), torch.Generator().manual_seed(seed)
    agent.model.double()
    logprobs, _, tokens = draw(seed)
    weight = agent.model.get_output_embeddings().weight
    ids = torch.randint(0, len(weight), (60,), generator=g)
    hidden = 3 * torch.randn(60, weight.shape[1], generator=g, dtype=torch.float64)
    old = agent.logprobs(hidden, ids, 0.7).detach() + tokens.old_logprobs - logprobs
    ref = None if options.get("kl_coef") == 0 else old + 0.3 * tokens.advantages
    tokens = LossTokens(ids, old, tokens.advantages, ref, tokens.turn, tokens.sequence)
    hidden.requires_grad_()
    config = configure(**{f"train__{key}": value for key, value in options.items()})
    config.agent.temperature = 0.7
    monkeypatch.setattr(loss_module, "is_fused", lambda _: fused)
    found, metrics, clipped, _ = policy_loss(agent, hidden, tokens, count(tokens), config)
    found.backward()
    return found.detach(), metrics, clipped, hidden.grad, weight.grad


@pytest.mark.parametrize("aggregation", ["token", "constant"])
@pytest.mark.parametrize("coefs", [{}, {"kl_coef": 0.0}, {"entropy_coef": 0.0}])
def test_the_fused_op_is_the_plain_loss(monkeypatch, aggregation, coefs):
    options = {"aggregation": aggregation, "dual_clip": 1.5, "clip_high": 0.28, **coefs}
    assert is_fused(configure(train__aggregation=aggregation).train)
    one, other = (through_a_head(3, fused, monkeypatch, **options) for fused in (True, False))
    torch.testing.assert_close(one[0], other[0], rtol=1e-11, atol=0)
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=1e-11, atol=0)
    assert torch.equal(one[2], other[2]) and 0 < one[2].sum() < len(one[2])
    for mine, its in zip(one[3:], other[3:], strict=True):
        assert mine.abs().max() > 1e-5
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-14)


def test_what_the_op_cannot_say_is_not_fused():
    fused = [
        (loss, ratio, aggregation)
        for loss, ratio, aggregation in EVERY
        if is_fused(TrainConfig(loss=loss, ratio=ratio, aggregation=aggregation))
    ]
    assert fused == [("ppo", "token", "token"), ("ppo", "token", "constant")]


# Ratios (GSPO, arXiv 2507.18071).


@pytest.mark.parametrize("loss", ["ppo", "cispo"])
def test_the_ratio_of_a_pool_is_the_geometric_mean(loss):
    """Ratios 2 and 8 of one turn, 1 of the other: 4, 4 and 1; and cubic root of 16 for all of the sequence."""
    old, logprobs = [-3.0, -3.0, -1.0], tensor([-3.0 + math.log(2), -3.0 + math.log(8), -1.0])
    tokens = make_tokens(old, [1.0, 1.0, 1.0], turn=[0, 0, 1])
    for ratio, expected in (("turn", [4, 4, 1]), ("sequence", [16 ** (1 / 3)] * 3)):
        leaf = logprobs.clone().requires_grad_()
        c = TrainConfig(loss=loss, ratio=ratio, clip_high=9.0)
        plain_loss(leaf, None, tokens, Counts(1, 1, 1, 1), c)[0].backward()
        assert (-leaf.grad).tolist() == pytest.approx(expected)


def test_of_equal_advantages_the_gradient_is_that_of_the_pooled_ratio():
    """GSPO-token is GSPO where a sequence has one advantage: through the mean itself, nothing detached."""
    logprobs, _, tokens = draw(4)
    advantages = tokens.advantages[tokens.sequence]
    tokens = LossTokens(None, tokens.old_logprobs, advantages, None, tokens.turn, tokens.sequence)
    ours, theirs = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    c = TrainConfig(ratio="sequence", aggregation="sequence", dual_clip=1e9)
    plain_loss(ours, None, tokens, count(tokens), c)[0].backward()
    total = 0.0
    for s in tokens.sequence.unique():
        at = tokens.sequence == s
        r, a = (theirs - tokens.old_logprobs)[at].mean().exp(), advantages[at][0]
        total = total - torch.minimum(r * a, r.clamp(1 - c.clip_low, 1 + c.clip_high) * a)
    (total / len(tokens.sequence.unique())).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-13)


def test_pools_of_one_token_have_the_ratio_of_tokens():
    logprobs, entropy, tokens = draw(5)
    own = torch.arange(60)
    tokens = LossTokens(None, tokens.old_logprobs, tokens.advantages, tokens.ref_logprobs, own, own)
    found = [
        float(plain_loss(logprobs, entropy, tokens, count(tokens), TrainConfig(ratio=ratio))[0])
        for ratio in RATIOS
    ]
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-12)


# Aggregations.


def test_aggregations_by_numbers():
    """Losses -1 (three times) and -5 (once): means of tokens, of sequences, and over 2 sequences of 8 at most."""
    tokens = make_tokens([-1.0] * 4, [1.0, 1.0, 1.0, 5.0], sequence=[0, 0, 0, 1])
    found = [
        float(plain_loss(tensor([-1.0] * 4), None, tokens, Counts(4, 2, 2, 8),
                         TrainConfig(aggregation=aggregation))[0])
        for aggregation in AGGREGATIONS
    ]  # fmt: skip
    assert found == [-2.0, -3.0, -0.5]


def test_of_sequences_of_one_length_the_means_are_one():
    logprobs, entropy, tokens = draw(6)
    sequence = torch.arange(60) // 12
    tokens = LossTokens(
        None, tokens.old_logprobs, tokens.advantages, tokens.ref_logprobs, tokens.turn, sequence
    )
    counts = Counts(60, 5, 5, 12)
    found = [
        float(plain_loss(logprobs, entropy, tokens, counts, TrainConfig(aggregation=a))[0])
        for a in AGGREGATIONS
    ]
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-12)


@pytest.mark.parametrize("loss, ratio, aggregation", EVERY)
def test_parts_of_whole_sequences_add_up(loss, ratio, aggregation):
    c = TrainConfig(loss=loss, ratio=ratio, aggregation=aggregation)
    logprobs, entropy, tokens = draw(7)
    whole = plain_loss(logprobs, entropy, tokens, count(tokens), c)
    sums = dict.fromkeys(["loss", *whole[1]], 0.0)
    for at in (tokens.sequence < 2, tokens.sequence >= 2):
        columns = (getattr(tokens, name) for name in LossTokens.__slots__[1:])
        part = LossTokens(None, *(x[at] for x in columns))
        found, metrics, *_ = plain_loss(logprobs[at], entropy[at], part, count(tokens), c)
        for name, value in {"loss": found, **metrics}.items():
            sums[name] += float(value)
    expected = {"loss": whole[0], **whole[1]}
    assert sums == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-12)


# Advantages carry weights: the terms are homogeneous in them.


@pytest.mark.parametrize("loss", ["ppo", "cispo"])
def test_a_weighted_advantage_is_a_weighted_loss(loss):
    logprobs, _, tokens = draw(8)
    weight = 3 * torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c = TrainConfig(loss=loss, dual_clip=1.5)
    r = (logprobs - tokens.old_logprobs).exp()
    terms = getattr(loss_module, f"{loss}_terms")
    plain, clipped = terms(r, logprobs, tokens.advantages, c)
    weighted, clipped_too = terms(r, logprobs, weight * tokens.advantages, c)
    torch.testing.assert_close(weighted, weight * plain, rtol=1e-12, atol=0)
    assert torch.equal(clipped, clipped_too)


# Figures of other suites.

SKEWED = [-1.69315, -1.0, -0.69741]  # ratios 0.5, 1 and 10 to the old ones
OLD, ADVANTAGES = [-1.0, -1.0, -3.0], [1.0, -1.0, -4.0]


@pytest.mark.parametrize("loss, expected", [("ppo", 12.5 / 3), ("cispo", -0.99768266666)])
def test_dual_clip_and_cispo_as_skyrl_and_nemo_have_them(loss, expected):
    """-0.5, 1 and 12 with the dual clip; 0.8 * 1.69315, -1 and -4 * 1.2 * 0.69741 for CISPO."""
    tokens = make_tokens(OLD, ADVANTAGES)
    found, *_ = plain_loss(tensor(SKEWED), None, tokens, Counts(3, 1, 1, 3), TrainConfig(loss=loss))
    assert float(found) == pytest.approx(expected, abs=1e-4)


def test_cispo_as_slime_has_it():
    """Weights in [0, 1.5]: e is cut, and its token keeps a gradient all the same."""
    logprobs = tensor([0.0, 0.5, -1.0]).requires_grad_()
    tokens = make_tokens([0.0, -0.5, -1.0], [1.0, -2.0, 0.25])
    c = TrainConfig(loss="cispo", clip_low=1.0, clip_high=0.5)
    found, metrics, *_ = plain_loss(logprobs, None, tokens, Counts(3, 1, 1, 3), c)
    found.backward()
    assert float(found) == pytest.approx((0.0 + 1.5 * 2 * 0.5 + 0.25) / 3)
    assert logprobs.grad.tolist() == pytest.approx([-1 / 3, 1.0, -0.25 / 3])
    assert float(metrics["clip_fraction"]) == pytest.approx(1 / 3)


GSPO = SimpleNamespace(  # three responses of 5, 2 and 4 tokens
    logprobs=[0.2, -2.5, -0.3, 0.1, -1.8, 0.8, -0.2, -0.5, 0.3, -1.7, 0.4],
    advantages=[1.5, 2.0, 1.0, 0.8, 0.5, 3.0, 1.5, 0.5, 0.8, 1.2, 2.5],
    sequence=[0] * 5 + [1] * 2 + [2] * 4,
)


def test_gspo_on_skyrls_case():
    """Mean log-ratios 0.14, 1.3 and 0.625: the first is within the clip, the others are cut to 1.2; token by token
    eight of eleven ratios are cut, pooled six."""
    tokens = make_tokens([-1.0] * 11, GSPO.advantages, sequence=GSPO.sequence)
    counts, c = Counts(11, 3, 3, 8), TrainConfig(ratio="sequence", aggregation="sequence")
    found, metrics, *_ = plain_loss(tensor(GSPO.logprobs), None, tokens, counts, c)
    means = [1.16 * math.exp(0.14), 2.25 * 1.2, 1.25 * 1.2]
    assert float(found) == pytest.approx(-math.fsum(means) / 3, rel=1e-9)
    assert float(metrics["clip_fraction"]) == pytest.approx(6 / 11)
    _, metrics, *_ = plain_loss(tensor(GSPO.logprobs), None, tokens, counts, TrainConfig())
    assert float(metrics["clip_fraction"]) == pytest.approx(8 / 11)


def test_reductions_on_skyrls_case():
    """Where a mask leaves sequences of unequal lengths, means of tokens and of sequences differ."""
    logprobs, old = tensor([-1.5, -0.5, -1.2, -0.8]), [-1.0] * 4
    tokens = make_tokens(old, [2.0, 2.0, 2.0, 1.0], sequence=[0, 0, 0, 1])
    losses = [-2 * math.exp(-0.5), -2 * 1.2, -2 * math.exp(-0.2), -1.2]
    for aggregation, expected in (
        ("token", math.fsum(losses) / 4),
        ("sequence", (math.fsum(losses[:3]) / 3 + losses[3]) / 2),
        ("constant", math.fsum(losses) / (2 * 4)),
    ):
        c = TrainConfig(aggregation=aggregation)
        found, *_ = plain_loss(logprobs, None, tokens, Counts(4, 2, 2, 4), c)
        assert float(found) == pytest.approx(expected, rel=1e-9)


# Options.


def test_a_cap_needs_recomputed_logprobs():
    with pytest.raises(ConfigError, match=r"train\.importance_cap.*train\.old_logprobs"):
        configure(train__importance_cap=2.0)
    assert configure(train__importance_cap=2.0, train__old_logprobs="recomputed")


@pytest.mark.parametrize("name", ["loss", "ratio", "aggregation"])
def test_a_wrong_word_is_told_the_right_ones(name):
    with pytest.raises(ConfigError, match=rf"train\.{name}: 'mean' is none of"):
        configure(**{f"train__{name}": "mean"})
