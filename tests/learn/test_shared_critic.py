"""A critic of three heads on the policy's own trunk: its gradients, value clip and positions against plain loops."""

import copy

import pytest
import torch
from test_update import bounds, build, give, make_agent, settings, value_positions

from hiper_fast.config import AdvantageConfig
from hiper_fast.learn import optim
from hiper_fast.learn.score import score
from hiper_fast.learn.update import update
from hiper_fast.runs import checkpoint
from hiper_fast.runs.tensors import read_tensors


@pytest.fixture(scope="module")
def agent():
    return make_agent("shared")


def prepared(agent, **train):
    """Targets whose old values lie off the present ones, so that some values are clipped."""
    config = settings(**train)
    t = build(agent)
    scores, config.advantage = score(agent, t, config), AdvantageConfig()
    targets = give(t, scores, config)
    targets.old_values = targets.old_values + torch.randn(
        t.turns, 3, generator=torch.Generator().manual_seed(7)
    )
    t.old_logprobs = t.old_logprobs + 0.3 * torch.randn(
        t.old_logprobs.shape, generator=torch.Generator().manual_seed(8)
    )
    return config, t, targets


def plain_loss(agent, t, targets, c):
    """The loss of all turns as one minibatch: each turn alone through transformers, the head's logits in full."""
    ids, cu = t.sequences().ids, t.sequences().cu_seqlens
    loss, tokens = 0.0, int(targets.loss_mask.sum())
    counts = targets.value_mask.sum(0)
    ranges = zip(bounds(cu), bounds(t.cu_tokens), value_positions(agent, t), strict=True)
    for turn, ((a, b), (r0, r1), positions) in enumerate(ranges):
        out = agent.model(input_ids=ids[None, a:b], use_cache=False, output_hidden_states=True)
        logits = torch.log_softmax(out.logits[0, b - a - (r1 - r0) - 1 : -1], -1)
        logprobs = logits.gather(1, t.response_ids[r0:r1, None])[:, 0]
        ratio, advantage = (logprobs - t.old_logprobs[r0:r1]).exp(), targets.advantages[r0:r1]
        pg = torch.maximum(
            -advantage * ratio, -advantage * ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
        )
        pg = torch.where(advantage < 0, torch.minimum(pg, -advantage * c.dual_clip), pg)
        d = targets.ref_logprobs[r0:r1] - logprobs
        per_token = (
            pg
            + c.kl_coef * (d.exp() - d - 1).clamp(-10, 10)
            + c.entropy_coef * (logits.exp() * logits).sum(1)
        )
        loss = loss + (per_token * targets.loss_mask[r0:r1]).sum() / tokens
        values = agent.critic.heads(out.hidden_states[-1][0])
        for head in range(3):
            if targets.value_mask[turn, head]:
                value, target = values[positions[head], head], targets.returns[turn, head]
                old = targets.old_values[turn, head]
                clipped = old + (value - old).clamp(-c.value_clip, c.value_clip)
                larger = torch.maximum((value - target) ** 2, (clipped - target) ** 2)
                loss = loss + c.value_coef[head] * larger / counts[head]
    return loss


@pytest.mark.parametrize("value_coef", [[0.3, 0.7, 0.2], [0.0, 0.0, 0.0]])
def test_the_trunk_takes_the_gradients_of_both_losses(agent, value_coef):
    config, t, targets = prepared(agent, value_coef=value_coef, microbatch_tokens=300)
    ours, plain = copy.copy(agent), copy.copy(agent)
    for each in (ours, plain):
        each.model, each.critic = copy.deepcopy((agent.model, agent.critic))
    parameters = [*plain.model.parameters(), *plain.critic.parameters()]
    plain_loss(plain, t, targets, config.train).backward()
    optimizers = {
        "policy": torch.optim.SGD(ours.model.parameters(), lr=1.0),
        "critic": torch.optim.SGD(ours.critic.parameters(), lr=1.0),
    }
    before = [p.detach().clone() for p in (*ours.model.parameters(), *ours.critic.parameters())]
    update(ours, optimizers, t, targets, config, torch.Generator())
    after = [*ours.model.parameters(), *ours.critic.parameters()]
    for p, b, q in zip(after, before, parameters, strict=True):
        expected = torch.zeros_like(b) if q.grad is None else q.grad
        torch.testing.assert_close(b - p.detach(), expected, rtol=2e-3, atol=2e-6)
    assert (after[-1] == before[-1]).all() == (value_coef == [0.0, 0.0, 0.0])


def test_the_value_clip_is_at_work(agent):
    """In the loss above at least one value is past its clip and decides the loss."""
    config, t, targets = prepared(agent)
    with torch.no_grad():
        near = plain_loss(agent, t, targets, config.train)
        config.train.value_clip = 100.0
        assert float(near) > float(plain_loss(agent, t, targets, config.train)) + 1e-3


def test_the_critic_alone_leaves_the_trunk(agent):
    config, t, targets = prepared(agent)
    ours = copy.copy(agent)
    ours.model, ours.critic = copy.deepcopy((agent.model, agent.critic))
    optimizers = optim.build_optimizers(ours, config)
    update(ours, optimizers, t, targets, config, torch.Generator(), train_policy=False)
    assert all(p.grad is None for p in ours.model.parameters())
    assert not torch.equal(ours.critic.heads.weight, agent.critic.heads.weight)


def test_its_checkpoint_holds_heads_alone_and_resumes(agent, tmp_path):
    config, t, targets = prepared(agent)

    def copied():
        ours = copy.copy(agent)
        ours.model, ours.critic = copy.deepcopy((agent.model, agent.critic))
        return ours, optim.build_optimizers(ours, config)

    def step(ours, optimizers):
        for optimizer in optimizers.values():
            optim.set_lr(optimizer, 1e-3)
        update(ours, optimizers, t, targets, config, torch.Generator().manual_seed(1))

    first, optimizers = copied()
    step(first, optimizers)
    path = checkpoint.save(tmp_path, 1, policy=first.model, tokenizer=first.tokenizer, critic=first.critic,
                           optimizers=optimizers, state={})  # fmt: skip
    assert sorted(read_tensors(path / "critic.safetensors")) == ["heads.bias", "heads.weight"]
    step(first, optimizers)
    second, restored = copied()
    checkpoint.load(path, policy=second.model, critic=second.critic, optimizers=restored)
    step(second, restored)
    for module in ("model", "critic"):
        for p, q in zip(
            getattr(first, module).parameters(), getattr(second, module).parameters(), strict=True
        ):
            assert torch.equal(p, q)
