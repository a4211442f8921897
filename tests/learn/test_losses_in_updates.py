"""Policy losses through whole updates in float64: however cut, of turns and transcripts; weights of importance."""

import copy

import pytest
import torch
from test_policy_losses import by_hand
from test_transcript import joined, whole
from test_update import build, give, make_agent, settings

from hiper_fast.learn.loss import Counts, LossTokens
from hiper_fast.learn.score import score
from hiper_fast.learn.update import update


def prepared(agent, t, **train):
    """(config, targets) in float64, the old log-probs off the present ones."""
    config = settings(**{"kl_coef": 0.03, "entropy_coef": 0.02, "dual_clip": 1.5, **train})
    targets = give(t, score(agent, t, config), config)
    g = torch.Generator().manual_seed(2)
    t.old_logprobs = t.old_logprobs.double() + 0.3 * torch.randn(
        len(t.old_logprobs), generator=g, dtype=torch.float64
    )
    targets.advantages, targets.ref_logprobs = (
        targets.advantages.double(),
        targets.ref_logprobs.double(),
    )
    agent.model.double()
    return config, targets


def step(agent, t, targets, config):
    """(losses, the policy's parameters) after an update of a copy by plain gradient steps."""
    agent = copy.copy(agent)
    agent.model, agent.critic = copy.deepcopy((agent.model, agent.critic))
    optimizers = {
        "policy": torch.optim.SGD(agent.model.parameters(), lr=0.01),
        "critic": torch.optim.SGD(agent.critic.parameters(), lr=0.0),
    }
    losses = update(agent, optimizers, t, targets, config, torch.Generator().manual_seed(0))
    return losses, list(agent.model.parameters())


def read_tokens(model, t):
    """Log-probs and entropies of all response tokens, each episode or turn read alone through transformers."""
    logprobs, entropies = [], []
    for episode in t.episodes:
        prompts, responses = episode.prompts, episode.responses
        if t.continued:
            rows = [(*whole(episode), responses)]
        else:
            pairs = zip(prompts, responses, strict=False)
            rows = [(torch.tensor(p + r), [len(p)], [r]) for p, r in pairs]
        for ids, starts, parts in rows:
            out = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
            for start, part in zip(starts, parts, strict=True):
                every = out[start - 1 : start - 1 + len(part)]
                logprobs.append(
                    every.gather(1, torch.tensor(part, dtype=torch.int64)[:, None])[:, 0]
                )
                entropies.append(-(every.exp() * every).sum(1))
    return torch.cat(logprobs), torch.cat(entropies)


def expected_step(model, t, targets, config):
    """The same update, a token at a time: minibatches of sequences, each alone, gradients by `by_hand`."""
    c, losses = config.train, []
    turn = torch.arange(t.turns).repeat_interleave(t.cu_tokens.diff().long())
    trajectory = torch.arange(len(t.won)).repeat_interleave(t.cu_turns.diff().long())[turn]
    sequence = trajectory if t.continued else turn
    number = len(t.won) if t.continued else t.turns
    longest = config.agent.max_response_tokens * (config.env.max_turns if t.continued else 1)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    for part in order.tensor_split(c.minibatches):
        logprobs, entropy = read_tokens(model, t)
        at = (torch.isin(sequence, part) & targets.loss_mask).nonzero()[:, 0]
        data = (t.old_logprobs, targets.advantages, targets.ref_logprobs, turn, sequence)
        tokens = LossTokens(t.response_ids[at], *(x[at] for x in data))
        counts = Counts(len(at), len(sequence[at].unique()), len(part), longest)
        total, grad, grad_entropy, _ = by_hand(
            logprobs[at].detach(), entropy[at].detach(), tokens, counts, c
        )
        losses.append(total)
        surrogate = (grad * logprobs[at]).sum() + (grad_entropy * entropy[at]).sum()
        weights = list(model.parameters())
        for p, g in zip(weights, torch.autograd.grad(surrogate, weights), strict=True):
            p.data -= 0.01 * g
    return sum(losses) / len(losses), list(model.parameters())


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize(
    "loss, ratio, aggregation",
    [
        ("ppo", "token", "sequence"),
        ("ppo", "token", "constant"),
        ("ppo", "turn", "token"),
        ("ppo", "sequence", "sequence"),
        ("cispo", "token", "token"),
        ("cispo", "sequence", "constant"),
    ],
)
def test_updates_equal_tokens_one_by_one(continued, loss, ratio, aggregation):
    agent = make_agent()
    t = joined(agent) if continued else build(agent)
    options = {"loss": loss, "ratio": ratio, "aggregation": aggregation, "minibatches": 2}
    config, targets = prepared(agent, t, **options)
    total, weights = expected_step(copy.deepcopy(agent.model), t, targets, config)
    for budget in (150, 100_000):
        config.train.microbatch_tokens = budget
        losses, after = step(agent, t, targets, config)
        assert losses["loss/policy"] == pytest.approx(total, rel=1e-9)
        for mine, expected in zip(after, weights, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def test_a_sequence_is_a_turn_or_with_continued_prompts_an_episode():
    agent = make_agent()
    for t, same in ((build(agent), True), (joined(agent), False)):
        losses = []
        for ratio in ("turn", "sequence"):
            config, targets = prepared(agent, copy.copy(t), ratio=ratio)
            agent.model.float()
            g = torch.Generator().manual_seed(3)
            t.old_logprobs = t.old_logprobs + 0.1 * torch.randn(len(t.old_logprobs), generator=g)
            losses.append(step(agent, t, targets, config)[0]["loss/policy"])
            t.old_logprobs = build(agent).old_logprobs if same else joined(agent).old_logprobs
        assert (losses[0] == losses[1]) == same


@pytest.mark.parametrize("ratio", ["token", "turn", "sequence"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_metrics_mean_the_same_whatever_the_loss(ratio, aggregation):
    """KL, entropy and, of a token's own ratio, the clipped share are means over the loss tokens."""
    agent = make_agent()
    t = build(agent)
    config, targets = prepared(agent, t)
    plain, _ = step(agent, t, targets, config)
    config.train.ratio, config.train.aggregation = ratio, aggregation
    other, _ = step(agent, t, targets, config)
    names = ["loss/kl", "loss/entropy"] + ["loss/clip_fraction"] * (ratio == "token")
    assert plain["loss/clip_fraction"] > 0.05 and plain.keys() == other.keys()
    for name in names:
        assert other[name] == pytest.approx(plain[name], rel=1e-9), name


def test_without_an_entropy_term_none_is_computed_or_told():
    agent = make_agent()
    t = build(agent)
    config, targets = prepared(agent, t, entropy_coef=0.0, ratio="turn")
    losses, _ = step(agent, t, targets, config)
    assert "loss/entropy" not in losses and losses["loss/kl"] > 0


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_first_step_of_any_ratio_is_that_of_ratio_one(ratio):
    """Old log-probs are the present ones: the policy loss is minus the mean advantage."""
    agent = make_agent()
    t = build(agent)
    config = settings(ratio=ratio, kl_coef=0.0, entropy_coef=0.0)
    targets = give(t, score(agent, t, config), config)
    losses, _ = step(agent, t, targets, config)
    expected = -targets.advantages[targets.loss_mask].mean()
    assert losses["loss/policy"] == pytest.approx(float(expected), abs=1e-5)
    assert losses["loss/clip_fraction"] == 0


# Importance of what was sampled elsewhere.


def test_weights_of_importance_multiply_advantages_and_are_capped():
    """Log-probs that were sampled 0.5 too low, 0.5 too high and 1 too low: 1.6487, 0.6065 and, capped, 2."""
    agent = make_agent()
    config = settings(old_logprobs="recomputed", importance_cap=2.0)
    t = build(agent)
    exact, trained = t.old_logprobs.clone(), (t.roles > 0).nonzero()[:3, 0]
    t.old_logprobs[trained] -= torch.tensor([0.5, -0.5, 1.0])
    scores = score(agent, t, config)
    torch.testing.assert_close(
        scores.importance[trained], torch.tensor([1.6487, 0.6065, 2.0]), rtol=1e-4, atol=0
    )
    rest = torch.ones_like(exact, dtype=torch.bool).index_fill(0, trained, False)
    torch.testing.assert_close(
        scores.importance[rest], torch.ones(int(rest.sum())), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(t.old_logprobs, exact, atol=1e-4, rtol=0)
    weighted = give(t, scores, config)
    scores.importance = None
    plain = give(t, scores, config)
    factor = weighted.advantages[trained] / plain.advantages[trained]
    torch.testing.assert_close(factor, torch.tensor([1.6487, 0.6065, 2.0]), rtol=1e-4, atol=0)
    for mine, its in zip(weighted.credit.levels, plain.credit.levels, strict=True):
        assert torch.equal(mine.advantages, its.advantages), "the report shows what was estimated"


@pytest.mark.parametrize("train", [{}, {"old_logprobs": "recomputed"}])
def test_without_a_cap_nothing_is_weighted(train):
    agent = make_agent()
    assert score(agent, build(agent), settings(**train)).importance is None
