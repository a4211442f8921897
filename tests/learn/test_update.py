"""The algorithm on packed episodes: shaping, values, advantages and updates against plain computations."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import configure, make_tiny, play_tasks
from torch.utils._python_dispatch import TorchDispatchMode

from hiper_fast import estimators, ops, response
from hiper_fast.config import AdvantageConfig, RewardConfig
from hiper_fast.estimators import HIGH, LOW, SWITCH, Values
from hiper_fast.learn import score as score_module
from hiper_fast.learn import update as update_module
from hiper_fast.learn.credit import give_credit
from hiper_fast.learn.score import Scores, score
from hiper_fast.learn.shaping import shape_rewards, train_malformed
from hiper_fast.learn.update import Step, measure_critic, shuffle, split_minibatches, update
from hiper_fast.rollout.trajectory import Episode, pack

K, S = "KEEP", "SWITCH"


def say(switch, subgoal, action="look"):
    return f"<switch>{switch}</switch><subgoal>{subgoal}</subgoal><action>{action}</action>"


SCRIPTS = [  # (responses, terminated)
    (
        [
            say(S, "find mug"),
            say(K, "find mug"),
            say(K, "take mug"),
            say(S, "heat mug"),
            say(K, "heat mug"),
        ],
        True,
    ),
    ([say(K, "find egg"), say("MAYBE", "cool egg"), "what now", say(K, "cool egg")], False),
    ([say(S, "use desklamp", "go to desk 1 and a good deal more than that")], True),
    (["<switch>KEEP</switch>", "<subgoal>find pan</subgoal>", "界", say(K, "")], False),
    ([say(K, "find cup")], False),
]


def build(agent, scripts=SCRIPTS, seed=0, nested=False):
    """Episodes with random prompts, rewards and the policy's own log-probs, packed; nested: one prompt's beginnings."""
    generator = torch.Generator().manual_seed(seed)
    longest = torch.randint(2, 700, (40,), generator=generator).tolist()

    def prompt():
        length = int(torch.randint(3, 40, (1,), generator=generator))
        other = torch.randint(2, 700, (length,), generator=generator).tolist()
        return longest[:length] if nested else other

    episodes = []
    for texts, terminated in scripts:
        ids = [agent.tokenizer(text, add_special_tokens=False)["input_ids"] + [1] for text in texts]
        episode = Episode("task", "type", won=terminated, terminated=terminated, responses=ids)
        episode.prompts = [prompt() for _ in range(len(texts) + (not terminated))]
        episode.rewards = torch.randn(len(texts), generator=generator).tolist()
        episode.logprobs = [
            token_logprobs(agent.model, p, r).tolist()
            for p, r in zip(episode.prompts, ids, strict=False)
        ]
        episode.states = [0] * len(texts)
        episodes.append(episode)
    return pack(episodes, agent.find_roles)


@torch.no_grad()
def token_logprobs(model, prompt, response_ids, temperature=1.0):
    """Log-probs of a response by a forward of one sequence alone, the head included."""
    logits = model(torch.tensor([prompt + response_ids]), use_cache=False).logits[
        0, len(prompt) - 1 : -1
    ]
    return torch.log_softmax(logits / temperature, -1).gather(
        -1, torch.tensor(response_ids)[:, None]
    )[:, 0]


def make_agent(critic="separate"):
    agent = make_tiny(critic=critic)
    agent.freeze_reference()
    with torch.no_grad():  # so that KL is not zero
        generator = torch.Generator().manual_seed(1)
        for p in agent.reference.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    agent.add_critic()
    with torch.no_grad():  # heads start at zero
        agent.critic.heads.weight.normal_(0, 0.1, generator=generator)
        agent.critic.heads.bias.normal_(0, 0.1, generator=generator)
    return agent


@pytest.fixture(scope="module", params=["separate", "shared"])
def agent(request):
    return make_agent(request.param)


@pytest.fixture
def fresh():
    """An agent a test may train."""
    return make_agent()


def settings(**train):
    config = configure()
    for name, value in {"minibatches": 1, "grad_clip": 0.0, **train}.items():
        setattr(config.train, name, value)
    config.agent.temperature = 1.0
    config.advantage = AdvantageConfig(
        gamma=0.9, lambda_turn=0.8, lambda_segment=0.7, bootstrap="next_state"
    )
    return config


def turn_texts(scripts=SCRIPTS):
    return [[response.parse(text) for text in texts] for texts, _ in scripts]


def bounds(cu):
    return list(zip(cu.tolist(), cu.tolist()[1:], strict=False))


# Shaping.


def shaped_by_hand(t, config, scripts):
    """The rules of shaping as plain loops over parsed responses; subgoal text stands for its tokens."""
    rewards = t.rewards.tolist()
    for (begin, end), turns, (texts, _) in zip(
        bounds(t.cu_turns), turn_texts(scripts), scripts, strict=True
    ):
        for i, turn in enumerate(turns):
            keeps, size = not turn.switch, end - begin
            if not turn.valid:
                rewards[begin + i] += config.invalid
            if keeps and config.keep_mode == "fixed":
                rewards[begin + i] += config.keep
            if keeps and config.keep_mode == "normalized" and size > 1:
                number = sum(not other.switch for other in turns)
                rewards[begin + i] += config.keep * (number / size) / number
            if keeps and i > 0 and turn.subgoal_span and turns[i - 1].subgoal_span:
                now, last = (texts[j].encode()[slice(*turns[j].subgoal_span)] for j in (i, i - 1))
                if now != last:
                    rewards[begin + i] += config.consistency
    return torch.tensor(rewards)


@pytest.mark.parametrize(
    "config",
    [
        RewardConfig(invalid=0.0),
        RewardConfig(invalid=-0.1),
        RewardConfig(invalid=0.0, keep=-0.3, keep_mode="fixed"),
        RewardConfig(invalid=0.0, keep=-0.3, keep_mode="normalized"),
        RewardConfig(invalid=0.0, consistency=-0.7),
        RewardConfig(invalid=-0.1, keep=-3.5, keep_mode="normalized", consistency=-0.3),
    ],
)
def test_shaping_equals_its_rules_in_plain_loops(agent, config):
    t = build(agent)
    before = t.rewards.clone()
    shaped = shape_rewards(t, config)
    torch.testing.assert_close(shaped, shaped_by_hand(t, config, SCRIPTS))
    assert torch.equal(t.rewards, before), "the stored rewards are left alone"
    assert shaped.dtype == torch.float32 and shaped.shape == (t.turns,)


def test_shaping_by_numbers(agent):
    scripts = [
        ([say(K, "a"), say(K, "b"), say(S, "c"), say(K, "c")], True),  # 3 KEEP turns of 4
        ([say(K, "a")], True),  # T = 1
    ]
    t = build(agent, scripts)
    t.rewards = torch.zeros(5)

    def shaped(**options):
        return shape_rewards(t, RewardConfig(**{"invalid": 0.0, **options})).tolist()

    assert shaped(keep=-1.0, keep_mode="normalized") == pytest.approx(
        [-0.25, -0.25, 0.0, -0.25, 0.0]
    )
    assert shaped(keep=-1.0, keep_mode="fixed") == pytest.approx([-1.0, -1.0, 0.0, -1.0, -1.0])
    assert shaped(consistency=-1.0) == pytest.approx([0.0, -1.0, 0.0, 0.0, 0.0])


def test_consistency_needs_both_subgoals_and_never_crosses_episodes(agent):
    none = "<switch>KEEP</switch><action>look</action>"
    scripts = [([say(K, "a"), none, say(K, "b")], True), ([say(K, "c"), say(K, "c")], True)]
    t = build(agent, scripts)
    t.rewards = torch.zeros(5)
    assert shape_rewards(t, RewardConfig(invalid=0.0, consistency=-1.0)).tolist() == [0.0] * 5


# Values and log-probs.


def test_malformed_turns_train_whole_when_asked(agent):
    """Tokens of no block carry loss only where the turn is invalid: the end token of a valid turn stays out."""
    t = build(agent)
    before, cu = t.roles.clone(), bounds(t.cu_tokens)
    train_malformed(t)
    stray = 0
    for (start, end), valid in zip(cu, t.valid.tolist(), strict=True):
        if valid:
            assert torch.equal(t.roles[start:end], before[start:end])
        else:
            stray += int((before[start:end] == 0).sum())
            assert (t.roles[start:end] > 0).all()
            kept = before[start:end] > 0
            assert torch.equal(t.roles[start:end][kept], before[start:end][kept])
    assert stray


def test_explained_variance_by_numbers(agent):
    t = build(agent)
    config = settings()
    config.advantage = AdvantageConfig()
    targets = give(t, score(agent, t, settings()), config)
    mask = targets.value_mask
    perfect = measure_critic(replace(targets, old_values=targets.returns))
    constant = measure_critic(replace(targets, old_values=torch.full_like(targets.returns, 3.0)))
    half = measure_critic(replace(targets, old_values=targets.returns / 2))
    assert list(perfect) == [
        "value/explained_low",
        "value/explained_high",
        "value/explained_switch",
    ]
    assert [*perfect.values()] == pytest.approx([1, 1, 1])
    assert [*constant.values()] == pytest.approx([0, 0, 0], abs=1e-5)
    assert [*half.values()] == pytest.approx([0.75] * 3)
    flat = replace(targets, returns=torch.ones_like(targets.returns), value_mask=mask)
    assert [*measure_critic(flat).values()] == [0, 0, 0], "nothing varies, so nothing is explained"


def value_positions(agent, t):
    """The value positions by hand, as indices into each turn's sequence: low, high, switch."""
    rows = []
    for (p0, p1), (r0, r1) in zip(bounds(t.cu_prompts), bounds(t.cu_tokens), strict=True):
        starts, text = [], b""
        for i in t.response_ids[r0:r1].tolist():
            starts.append(len(text))
            text += agent.pieces[i]
        parsed = response.parse(text)
        low = 0
        for span in (parsed.subgoal_span, parsed.switch_span):
            after = [i for i, s in enumerate(starts) if span and s >= span[1]]
            if after:
                low = after[0]
                break
        prompt = p1 - p0
        rows.append((prompt + low - 1, prompt - 1, prompt - 1))
    return rows


@pytest.mark.parametrize("budget", [1, 70, 100_000])
@torch.no_grad()
def test_scores_equal_a_forward_of_each_turn_alone(agent, budget):
    t, config = build(agent), settings(microbatch_tokens=budget)
    config.agent.temperature = 0.7
    scores = score(agent, t, config)
    values, bootstrap, ref_logprobs = (
        scores.values.turns,
        scores.values.bootstrap,
        scores.ref_logprobs,
    )
    sequences = t.sequences()
    ids, cu = sequences.ids, sequences.cu_seqlens
    trunk = agent.critic.trunk or agent.model.base_model
    for turn, ((a, b), positions) in enumerate(
        zip(bounds(cu), value_positions(agent, t), strict=True)
    ):
        heads = agent.critic.heads(trunk(input_ids=ids[None, a:b]).last_hidden_state[0])
        expected = torch.stack([heads[positions[head], head] for head in (LOW, HIGH, SWITCH)])
        torch.testing.assert_close(values[turn], expected, atol=1e-5, rtol=1e-4)
    for (p0, p1), (r0, r1) in zip(bounds(t.cu_prompts), bounds(t.cu_tokens), strict=True):
        prompt, ids = t.prompt_ids[p0:p1].tolist(), t.response_ids[r0:r1].tolist()
        mask = t.roles[r0:r1] > 0
        expected = token_logprobs(agent.reference, prompt, ids, 0.7)
        torch.testing.assert_close(ref_logprobs[r0:r1][mask], expected[mask], atol=1e-4, rtol=0)
    for i, (a, b) in enumerate(bounds(t.cu_final)):
        expected = 0.0
        if a < b:
            expected = float(
                agent.critic.heads(
                    trunk(input_ids=t.final_ids[None, a:b]).last_hidden_state[0, -1]
                )[HIGH]
            )
        assert float(bootstrap[i]) == pytest.approx(expected, abs=1e-5)
    assert (bootstrap[t.terminated] == 0).all() and (bootstrap[~t.terminated] != 0).all()
    assert len(set(values[:, LOW].tolist())) == t.turns


def test_the_bootstrap_is_of_the_state_after_the_last_turn(fresh):
    """The reference reused the last state's own value."""
    t, config = build(fresh), settings()
    found = score(fresh, t, config).values
    values, bootstrap = found.turns, found.bootstrap
    last = t.cu_turns[1:].long() - 1
    assert (bootstrap[~t.terminated] != values[last, HIGH][~t.terminated]).all()
    final = t.final_ids.clone()
    t.final_ids = (final + 1) % 700
    assert (
        score(fresh, t, config).values.bootstrap[~t.terminated] != bootstrap[~t.terminated]
    ).all()


@pytest.mark.parametrize("bootstrap", ["none", "reference"])
def test_without_bootstrap_and_without_reference(fresh, monkeypatch, bootstrap):
    """Only `next_state` has the states after the last turns read."""
    monkeypatch.setattr(score_module.ScoringPass, "read_end", None)
    t, config = build(fresh), settings(kl_coef=0.0)
    config.advantage.bootstrap, fresh.reference = bootstrap, None
    scores = score(fresh, t, config)
    assert scores.ref_logprobs is None and (scores.values.bootstrap == 0).all()
    targets = give(t, scores, config)
    losses = update(fresh, sgd(fresh), t, targets, config, torch.Generator())
    assert math.isfinite(losses["loss/policy"]) and losses["optim/skipped_steps"] == 0


# Advantages.


def scored(agent, config, scripts=SCRIPTS):
    t = build(agent, scripts)
    t.rewards = shape_rewards(t, config.reward)
    scores = score(agent, t, config)
    values = Values(
        scores.values.turns.clone(), scores.values.bootstrap.clone()
    )  # for tests to spoil
    return t, Scores(values, None if scores.ref_logprobs is None else scores.ref_logprobs.clone())


def give(t, scores, config):
    return give_credit(t, scores, estimators.find(config.advantage.estimator), config.advantage)


def test_truncated_episodes_bootstrap_and_terminated_ones_do_not(agent):
    config = settings()
    config.advantage.normalize = False
    t, scores = scored(agent, config)
    raised = give(
        t,
        replace(scores, values=replace(scores.values, bootstrap=scores.values.bootstrap + 1.0)),
        config,
    )
    plain = give(t, scores, config)
    moved = (raised.returns - plain.returns).abs() > 1e-6
    for (begin, end), terminated in zip(bounds(t.cu_turns), t.terminated.tolist(), strict=True):
        assert moved[end - 1].tolist() == [
            not terminated,
            bool(moved[end - 1, HIGH]),
            not terminated,
        ]
        assert bool(moved[begin:end].any()) == (not terminated)


@pytest.mark.parametrize("malformed", [True, False])
def test_estimate_is_hae_normalised_per_level_and_scattered(agent, malformed):
    config = settings()
    config.advantage.malformed = malformed
    t, scores = scored(agent, config)
    values, bootstrap = scores.values.turns, scores.values.bootstrap
    before = values.clone()
    targets = give(t, scores, config)
    assert torch.equal(targets.old_values, before) and torch.equal(values, before)
    named = torch.tensor(
        [turn.subgoal_span is not None for turns in turn_texts() for turn in turns]
    )
    assert 0 < named.sum() < t.turns
    low = values[:, LOW].where(named, values[:, SWITCH]) if malformed else values[:, LOW]
    raw = ops.reference.hae(
        t.rewards, low, values[:, HIGH], t.switch, t.terminated, t.cu_turns,
        values_switch=values[:, SWITCH], bootstrap_low=bootstrap, bootstrap_high=bootstrap,
        gamma=0.9, lambda_turn=0.8, lambda_segment=0.7,
    )  # fmt: skip
    returns = torch.stack([raw.returns_low, raw.returns_high, raw.returns_switch], 1)
    torch.testing.assert_close(targets.returns, returns)
    assert torch.equal(targets.value_mask[:, HIGH], raw.boundary)
    assert targets.value_mask[:, SWITCH].all()
    assert torch.equal(targets.value_mask[:, LOW], named | (not malformed))
    levels = dict(
        zip(
            (1, 2, 4), (raw.advantages_low, raw.advantages_high, raw.advantages_switch), strict=True
        )
    )
    ranges, expected = bounds(t.cu_tokens), torch.zeros(t.response_ids.numel())
    expected_mask = torch.zeros_like(targets.loss_mask)
    for role, advantages in levels.items():
        carriers = [
            turn
            for turn, (a, b) in enumerate(ranges)
            if (t.roles[a:b] & role).any() and (role != 2 or raw.boundary[turn])
        ]
        chosen = advantages[carriers].double()
        normal = (chosen - chosen.mean()) / (chosen.std(correction=0) + 1e-8)
        for turn, advantage in zip(carriers, normal.tolist(), strict=True):
            a, b = ranges[turn]
            inside = (t.roles[a:b] & role) > 0
            expected[a:b] += advantage * inside
            expected_mask[a:b] |= inside
    torch.testing.assert_close(targets.advantages, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(targets.loss_mask, expected_mask)


def test_flat_gae(agent):
    config = settings()
    config.advantage = replace(config.advantage, estimator="gae", normalize=False)
    t, scores = scored(agent, config)
    values, bootstrap = scores.values.turns, scores.values.bootstrap
    targets = give(t, scores, config)
    advantages, returns = ops.reference.gae(
        t.rewards,
        values[:, HIGH],
        t.terminated,
        t.cu_turns,
        bootstrap=bootstrap,
        gamma=0.9,
        lambda_=0.7,
    )
    torch.testing.assert_close(targets.returns[:, HIGH], returns)
    assert targets.value_mask.tolist() == [[False, True, False]] * t.turns, "one value, one head"
    assert torch.equal(targets.loss_mask, t.roles > 0)
    for turn, (a, b) in enumerate(bounds(t.cu_tokens)):
        mask = targets.loss_mask[a:b]
        torch.testing.assert_close(
            targets.advantages[a:b][mask], advantages[turn].expand(int(mask.sum()))
        )
    config.advantage.normalize = True
    normal = give(t, scores, config)
    per_turn = torch.stack(
        [normal.advantages[a:b][normal.loss_mask[a:b]][0] for a, b in bounds(t.cu_tokens)]
    )
    torch.testing.assert_close(
        per_turn, (advantages - advantages.mean()) / advantages.std(correction=0)
    )


def test_flat_gae_trains(fresh):
    config = settings()
    config.advantage.estimator = "gae"
    t, scores = scored(fresh, config)
    before = weights(fresh)
    losses = update(fresh, sgd(fresh), t, give(t, scores, config), config, torch.Generator())
    assert losses["optim/skipped_steps"] == 0 and weights(fresh) != before


# Updates.


def sgd(agent, lr=0.1):
    return {
        "policy": torch.optim.SGD(agent.model.parameters(), lr=lr),
        "critic": torch.optim.SGD(agent.critic.parameters(), lr=lr),
    }


def weights(agent):
    modules = (agent.model, agent.critic)
    return [p.detach().clone().flatten().tolist()[:50] for m in modules for p in m.parameters()]


def flat(agent):
    return torch.cat(
        [p.detach().flatten() for m in (agent.model, agent.critic) for p in m.parameters()]
    )


def trained(agent, t, targets, config, seed=0, **options):
    """(losses, weights after, agent) of one update of a copy."""
    agent = copy.copy(agent)
    agent.model, agent.critic = copy.deepcopy((agent.model, agent.critic))
    losses = update(
        agent, sgd(agent), t, targets, config, torch.Generator().manual_seed(seed), **options
    )
    return losses, flat(agent), agent


@pytest.mark.parametrize("budget", [1, 90, 200])
def test_microbatches_add_up_to_one_big_batch(agent, budget):
    """Uneven ones too: the reference divided a short last one by the full count."""
    config = settings()
    t, scores = scored(agent, config)
    targets = give(t, scores, config)
    whole, after_whole, _ = trained(agent, t, targets, settings(microbatch_tokens=100_000))
    split, after_split, _ = trained(agent, t, targets, settings(microbatch_tokens=budget))
    step = (after_whole - flat(agent)).abs().max()
    assert step > 1e-4
    assert (after_split - after_whole).abs().max() < 1e-3 * step
    assert whole.keys() == split.keys()
    for key, value in whole.items():
        assert split[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("budget", [90, 200, 100_000])
def test_what_prompts_begin_with_is_read_once(agent, budget):
    """Scores and steps are those of whole sequences."""
    t = build(agent, nested=True)
    found = []
    for share in (False, True):
        config = settings(
            microbatch_tokens=budget, share_prefixes=share, minibatches=2, old_logprobs="recomputed"
        )
        scores = score(agent, copy.copy(t), config)
        losses, after, _ = trained(agent, t, give(t, scores, config), config)
        spared = scores.metrics.pop("scoring/shared_tokens"), losses.pop("update/shared_tokens")
        found.append((scores.values.turns, scores.values.bootstrap, scores.ref_logprobs, after))
        assert (min(spared) > 0.05) if share else spared == (0, 0)
        found[-1] += (torch.tensor([*losses.values()]),)
    for whole, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-5)
    assert (found[0][3] - flat(agent)).abs().max() > 1e-4, "a step was taken"


@pytest.mark.parametrize("budget", [1, 90, 100_000])
@pytest.mark.parametrize("minibatches", [1, 4])
def test_the_policy_gradient_is_that_of_plain_loops_in_float64(fresh, budget, minibatches):
    """Every turn alone through transformers, the loss by its formula, however the turns were cut into microbatches."""
    config = settings(microbatch_tokens=budget, minibatches=minibatches)
    t, scores = scored(fresh, config)
    targets = give(t, scores, config)
    fresh.model.double()
    t.old_logprobs = t.old_logprobs.double() + 0.3 * torch.randn(
        len(t.old_logprobs), dtype=torch.float64
    )
    targets.advantages, targets.ref_logprobs = (
        targets.advantages.double(),
        targets.ref_logprobs.double(),
    )
    order = torch.randperm(t.turns, generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(fresh.model)
    for part in order.tensor_split(minibatches):  # 15 turns: the minibatches are uneven
        logprobs, entropies, tokens = [], [], []
        for turn in part.tolist():
            (p0, p1), (r0, r1) = bounds(t.cu_prompts)[turn], bounds(t.cu_tokens)[turn]
            ids = torch.cat([t.prompt_ids[p0:p1], t.response_ids[r0:r1]])[None]
            log_p = torch.log_softmax(plain(ids, use_cache=False).logits[0, p1 - p0 - 1 : -1], -1)
            logprobs.append(log_p.gather(1, t.response_ids[r0:r1, None])[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(1))
            tokens.append(torch.arange(r0, r1))
        at = torch.cat(tokens)
        loss = ops.reference.ppo_loss(
            torch.cat(logprobs), t.old_logprobs[at], targets.advantages[at], targets.loss_mask[at],
            ref_logprobs=targets.ref_logprobs[at], entropy=torch.cat(entropies),
        )  # fmt: skip
        for p, g in zip(
            plain.parameters(), torch.autograd.grad(loss, list(plain.parameters())), strict=True
        ):
            p.data -= 0.1 * g
    _, _, after = trained(fresh, t, targets, config)
    for mine, expected in zip(after.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


def test_what_one_trunk_keeps_goes_before_the_others_comes(agent, monkeypatch):
    """A separate critic's pass begins when the policy's gradients are made; after the update none of them is held."""
    config = settings(minibatches=1)
    t, scores = scored(agent, config)
    targets = give(t, scores, config)
    agent = copy.copy(agent)
    agent.model, agent.critic = copy.deepcopy((agent.model, agent.critic))
    passes, critic_hidden = [], agent.critic_hidden

    def noted(batch, hidden=None):
        passes.append((hidden, all(p.grad is not None for p in agent.model.parameters())))
        return critic_hidden(batch, hidden)

    monkeypatch.setattr(agent, "critic_hidden", noted)
    update(agent, sgd(agent), t, targets, config, torch.Generator())
    separate = agent.critic.trunk is not None
    assert passes and all(
        (hidden is None, ready) == (separate, separate) for hidden, ready in passes[:1]
    )
    assert all(p.grad is None for m in (agent.model, agent.critic) for p in m.parameters())


class HostReads(TorchDispatchMode):
    """Within, numbers that the host reads from tensors are counted: a GPU is waited for at each."""

    count = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", ["ppo", "cispo"])
def test_the_host_reads_no_number_of_a_microbatch(fresh, monkeypatch, loss):
    config = settings(microbatch_tokens=100, loss=loss)
    t, scores = scored(fresh, config)
    targets, reads, calls = give(t, scores, config), HostReads(), []
    for name in ("policy_loss", "value_loss"):
        whole = getattr(Step, name)

        def watched(*args, whole=whole, name=name):
            calls.append(name)
            with reads:
                return whole(*args)

        monkeypatch.setattr(Step, name, watched)
    update(fresh, sgd(fresh), t, targets, config, torch.Generator())
    assert calls.count("policy_loss") == calls.count("value_loss") > 3
    assert reads.count == 0
    with reads:
        torch.ones(()).item()
    assert reads.count == 1


def test_a_minibatch_is_a_mean_over_its_own_tokens(fresh):
    """Two minibatches of 8 and 7 turns: each divides by what it holds."""
    config = settings(minibatches=2, kl_coef=0.0, entropy_coef=0.0, grad_clip=1e-12)
    t, scores = scored(fresh, config)
    targets = give(t, scores, config)
    order = torch.randperm(t.turns, generator=torch.Generator().manual_seed(0))
    expected = []
    for part in order.tensor_split(2):
        mask = torch.cat(
            [
                targets.loss_mask[a:b] & bool((part == i).any())
                for i, (a, b) in enumerate(bounds(t.cu_tokens))
            ]
        )
        expected.append(float(-targets.advantages[mask].mean()))
    losses, _, _ = trained(fresh, t, targets, config)
    assert losses["loss/policy"] == pytest.approx(sum(expected) / 2, abs=1e-4)


@pytest.mark.parametrize("minibatches", [1, 2, 4, 15])
def test_each_turn_is_used_exactly_once(fresh, monkeypatch, minibatches):
    config = settings(minibatches=minibatches, microbatch_tokens=150)
    t, scores = scored(fresh, config)
    used = []

    def recorded(*args):
        for batch in whole(*args):
            used.append(batch.index.tolist())
            yield batch

    whole = update_module.divide
    monkeypatch.setattr(update_module, "divide", recorded)
    targets = give(t, scores, config)
    update(fresh, sgd(fresh), t, targets, config, torch.Generator().manual_seed(3))
    assert sorted(i for batch in used for i in batch) == list(range(t.turns))


@pytest.mark.parametrize(
    "size, sizes", [(4, [4, 4, 4, 3]), (5, [5, 5, 5]), (1, [1] * 15), (256, [15])]
)
def test_minibatches_of_a_size(size, sizes):
    order = torch.randperm(15)
    parts = split_minibatches(order, settings(minibatch_size=size).train)
    assert [len(part) for part in parts] == sizes and torch.equal(torch.cat(parts), order)
    assert len(split_minibatches(order, settings(minibatches=4).train)) == 4


def test_minibatches_of_episodes_keep_their_turns_in_order(agent):
    t = build(agent, SCRIPTS)
    config, generator = settings(shuffle="episodes").train, torch.Generator().manual_seed(2)
    episodes = [list(range(begin, end)) for begin, end in bounds(t.cu_turns)]
    orders = [shuffle(t, t.sequences(), config, generator).tolist() for _ in range(20)]
    for order in orders:
        starts = sorted(range(len(episodes)), key=lambda e: order.index(episodes[e][0]))
        assert order == [turn for e in starts for turn in episodes[e]]
    assert len({tuple(order) for order in orders}) > 1
    drawn = [shuffle(t, t.sequences(), settings().train, generator).tolist() for _ in range(5)]
    assert all(sorted(order) == list(range(t.turns)) for order in orders + drawn)
    assert any(order not in orders for order in drawn)


def test_an_update_takes_the_order_that_is_asked_for(fresh, monkeypatch):
    config = settings(shuffle="episodes", minibatches=2)
    t, scores = scored(fresh, config)
    targets = give(t, scores, config)
    used, whole = [], update_module.divide

    def recorded(agent, config, ids, cu, index):
        used.append(index.tolist())
        return whole(agent, config, ids, cu, index)

    monkeypatch.setattr(update_module, "divide", recorded)
    update(fresh, sgd(fresh), t, targets, config, torch.Generator().manual_seed(3))
    expected = shuffle(t, t.sequences(), config.train, torch.Generator().manual_seed(3))
    assert [turn for index in used for turn in index] == expected.tolist()


def test_a_size_of_minibatches_takes_the_place_of_their_number(fresh):
    config = settings(minibatches=1)
    t, scores = scored(fresh, config)
    targets = give(t, scores, config)
    steps = []
    for options in ({"minibatches": 3}, {"minibatches": 1, "minibatch_size": 5}):
        steps.append(trained(fresh, t, targets, settings(**options))[:2])
    (three, after), (fives, after_fives) = steps  # 15 turns: thrice five
    assert three == fives and torch.equal(after, after_fives)


def test_more_minibatches_than_turns(fresh):
    config = settings(minibatches=4)
    t, scores = scored(fresh, config, [([say(S, "a", "look")], True)])
    targets = give(t, scores, config)
    one, _, _ = trained(fresh, t, targets, settings())
    four, _, _ = trained(fresh, t, targets, config)
    assert four["optim/skipped_steps"] == 0
    assert four["loss/value"] == pytest.approx(one["loss/value"], rel=1e-4), (
        "empty minibatches are no part of a mean"
    )


def test_the_order_depends_on_the_generator_alone(fresh):
    config = settings(minibatches=3)
    t, scores = scored(fresh, config)
    targets = give(t, scores, config)
    first, again, other = (trained(fresh, t, targets, config, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("where", ["advantages", "returns", "ref_logprobs"])
def test_a_loss_that_is_not_finite_is_skipped_and_counted(fresh, where):
    config = settings()
    t, scores = scored(fresh, config)
    targets = give(t, scores, config)
    getattr(targets, where).view(-1)[0] = float("nan")
    losses, after, _ = trained(fresh, t, targets, config)
    assert losses["optim/skipped_steps"] == 1
    assert torch.equal(after, flat(fresh)), "weights stay"
    assert all(math.isfinite(v) for v in losses.values())


def test_only_the_bad_minibatch_is_skipped(fresh):
    config = settings(minibatches=3)
    t, scores = scored(fresh, config)
    targets = give(t, scores, config)
    targets.advantages[0] = float("inf")
    losses, after, _ = trained(fresh, t, targets, config)
    assert losses["optim/skipped_steps"] == 1
    assert not torch.equal(after, flat(fresh)) and torch.isfinite(after).all()
    assert math.isfinite(losses["loss/policy"])


def test_adam_forgets_a_skipped_step(fresh):
    config = settings()
    t, scores = scored(fresh, config)
    bad = give(t, scores, config)
    bad.advantages[0] = float("nan")
    optimizers = {
        "policy": torch.optim.AdamW(fresh.model.parameters()),
        "critic": torch.optim.AdamW(fresh.critic.parameters()),
    }
    update(fresh, optimizers, t, bad, config, torch.Generator())
    assert not any(o.state_dict()["state"] for o in optimizers.values())
    good = give(t, scores, config)
    assert update(fresh, optimizers, t, good, config, torch.Generator())["optim/skipped_steps"] == 0
    assert torch.isfinite(flat(fresh)).all()


def test_the_critic_alone(agent):
    config = settings()
    t, scores = scored(agent, config)
    targets = give(t, scores, config)
    losses, _, after = trained(agent, t, targets, config, train_policy=False)
    for name, p in after.model.state_dict().items():
        assert torch.equal(p, agent.model.state_dict()[name]), name
    assert not torch.equal(after.critic.heads.weight, agent.critic.heads.weight)
    assert losses["loss/policy"] == 0 and losses["loss/value"] > 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_step_has_ratio_one(fresh, temperature):
    """What the rollout stored is what training computes, so the policy loss is minus the mean advantage."""
    config = settings(kl_coef=0.01, entropy_coef=0.001)
    config.agent.temperature = temperature
    t = build(fresh)
    t.old_logprobs = torch.cat(
        [
            token_logprobs(
                fresh.model, t.prompt_ids[a:b].tolist(), t.response_ids[c:d].tolist(), temperature
            )
            for (a, b), (c, d) in zip(bounds(t.cu_prompts), bounds(t.cu_tokens), strict=True)
        ]
    )
    scores = score(fresh, t, config)
    values, ref = scores.values.turns, scores.ref_logprobs
    targets = give(t, scores, config)
    losses, _, _ = trained(fresh, t, targets, config)
    mask = targets.loss_mask
    policy_gradient = (
        losses["loss/policy"] - 0.01 * losses["loss/kl"] + 0.001 * losses["loss/entropy"]
    )
    assert policy_gradient == pytest.approx(float(-targets.advantages[mask].mean()), abs=1e-5)
    assert losses["loss/clip_fraction"] == 0 and losses["loss/entropy"] > 1
    d = ref[mask] - t.old_logprobs[mask]
    assert losses["loss/kl"] == pytest.approx(
        float((d.exp() - d - 1).clamp(-10, 10).mean()), rel=1e-4
    )
    assert losses["loss/kl"] > 1e-4
    values_loss = sum(
        float(((values - targets.returns)[:, h] ** 2)[targets.value_mask[:, h]].mean())
        for h in range(3)
    )
    assert losses["loss/value"] == pytest.approx(values_loss, rel=1e-4)


def test_sampled_logprobs_are_those_of_training(fresh):
    """From real rollouts: the sampler's cache against training's packed pass."""
    config = settings(kl_coef=0.0, entropy_coef=0.0)
    config.env.max_turns, config.agent.max_response_tokens = 3, 10
    t = play_tasks(fresh, config, [{"seed": i} for i in range(4)])
    targets = give(t, score(fresh, t, config), config)
    losses, _, _ = trained(fresh, t, targets, config)
    assert losses["loss/policy"] == pytest.approx(
        float(-targets.advantages[targets.loss_mask].mean()), abs=1e-4
    )


def test_old_logprobs_may_be_recomputed(fresh):
    """A rollout whose numerics differ: its log-probs are off, the trainer's are not."""
    config = settings(old_logprobs="recomputed")
    t = build(fresh)
    exact, counts = t.old_logprobs.clone(), t.roles > 0
    t.old_logprobs += 0.05
    targets = give(t, score(fresh, t, config), config)
    torch.testing.assert_close(t.old_logprobs[counts], exact[counts], atol=1e-4, rtol=0)
    losses, _, _ = trained(fresh, t, targets, config)
    assert losses["loss/clip_fraction"] == 0


def test_without_an_entropy_term_no_entropy_is_reported(fresh):
    config = settings(entropy_coef=0.0)
    t, scores = scored(fresh, config)
    losses, _, _ = trained(fresh, t, give(t, scores, config), config)
    assert "loss/entropy" not in losses and losses["loss/kl"] > 0


def test_tokens_without_a_role_carry_nothing(fresh):
    """The end token, and a kept subgoal, train neither loss nor KL nor entropy."""
    config = settings()
    t, scores = scored(fresh, config)
    targets = give(t, scores, config)
    off = ~targets.loss_mask
    assert off.any()
    assert off[t.cu_tokens[1:].long() - 1][t.valid].all(), "the end token of a well-formed response"
    _, plain, _ = trained(fresh, t, targets, config)
    targets.advantages[off], targets.ref_logprobs[off], t.old_logprobs[off] = 1e3, -50.0, -50.0
    assert torch.equal(trained(fresh, t, targets, config)[1], plain)


def test_value_coefficients_weigh_the_heads(fresh):
    config = settings(value_coef=[0.0, 0.0, 1.0])
    t, scores = scored(fresh, config)
    targets = give(t, scores, config)
    _, _, after = trained(fresh, t, targets, config)
    moved = (after.critic.heads.weight - fresh.critic.heads.weight).abs().sum(1) > 0
    assert moved.tolist() == [False, False, True]


def test_gradients_are_clipped(fresh):
    config = settings(grad_clip=1e-3)
    t, scores = scored(fresh, config)
    targets = give(t, scores, config)
    losses, after, trained_agent = trained(fresh, t, targets, config)
    moved = torch.cat([(a - b).detach().flatten() for a, b in zip(
        trained_agent.model.parameters(), fresh.model.parameters(), strict=True)])  # fmt: skip
    assert float(moved.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-2)
    assert losses["optim/grad_norm"] > 1e-3, "the norm reported is the one before clipping"
