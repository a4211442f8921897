"""Episodes as one sequence each: how they are played, cut, scored and learned from, against plain forwards."""

import copy
import math

import pytest
import torch
from helpers import HOUSEHOLD, configure, play_script
from test_prompter import CHAT
from test_rollout import Lines, begin
from test_update import HIGH, LOW, SCRIPTS, SWITCH, bounds, build, give, make_agent, settings
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from hiper_fast.agent import tiny
from hiper_fast.agent.agent import Agent
from hiper_fast.config import ModelConfig
from hiper_fast.envs.household import Household
from hiper_fast.learn import update as update_module
from hiper_fast.learn.rows import Rows
from hiper_fast.learn.score import score
from hiper_fast.learn.update import update
from hiper_fast.learn.warm_start import demonstrate, imitate
from hiper_fast.packing import microbatches
from hiper_fast.rollout.engines import Answer
from hiper_fast.rollout.engines.paged import Engine
from hiper_fast.rollout.games import Games
from hiper_fast.rollout.play import Sampled, Seats, Stage
from hiper_fast.rollout.prompter import Prompter
from hiper_fast.rollout.summary import summarise
from hiper_fast.rollout.trajectory import pack


@pytest.fixture(scope="module", params=["separate", "shared"])
def agent(request):
    return make_agent(request.param)


def joined(agent, scripts=SCRIPTS):
    """Random episodes whose turns continue each other; one has an empty response."""
    episodes = build(agent, scripts).episodes
    for episode in episodes:
        episode.continued = True
    silent = episodes[1]
    silent.responses[2], silent.logprobs[2] = [], []
    return pack(episodes, agent.find_roles)


def whole(episode, final=False):
    """An episode's tokens, and where each of its responses starts, by hand."""
    ids, starts = [], []
    for prompt, response in zip(episode.prompts, episode.responses, strict=False):
        ids += prompt
        starts.append(len(ids))
        ids += response
    return torch.tensor(ids + (episode.prompts[-1] if final else [])), starts


# Sequences.


def test_a_trajectory_is_one_sequence_with_each_token_once(agent):
    t = joined(agent)
    plain, final = t.sequences(), t.sequences(final=True)
    for sequences, with_final in ((plain, False), (final, True)):
        assert len(sequences) == len(t.episodes)
        for (a, b), episode in zip(bounds(sequences.cu_seqlens), t.episodes, strict=True):
            ids, _ = whole(episode, with_final and not episode.terminated)
            assert torch.equal(sequences.ids[a:b], ids)
        assert torch.equal(sequences.ids[sequences.token_index], t.response_ids)
    assert len(final.ids) == len(plain.ids) + len(t.final_ids)


def test_episodes_of_turns_are_cut_by_turn_as_before(agent):
    t = build(agent)
    assert len(t.sequences()) == len(t.sequences(final=True)) == t.turns


# Scores and losses.


@pytest.mark.parametrize("budget", [1, 150, 100_000])
@torch.no_grad()
def test_scores_equal_a_forward_of_each_trajectory_alone(agent, budget):
    t, config = joined(agent), settings(microbatch_tokens=budget)
    scores = score(agent, t, config)
    values, bootstrap, ref_logprobs = (
        scores.values.turns,
        scores.values.bootstrap,
        scores.ref_logprobs,
    )
    trunk = agent.critic.trunk or agent.model.base_model
    for i, ((first, last), episode) in enumerate(zip(bounds(t.cu_turns), t.episodes, strict=True)):
        ids, starts = whole(episode, final=not episode.terminated)
        heads = agent.critic.heads(trunk(input_ids=ids[None]).last_hidden_state[0])
        logprobs = agent.reference(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        for turn, start in zip(range(first, last), starts, strict=True):
            offsets = t.value_index[turn].tolist()
            expected = [heads[start + offsets[head] - 1, head] for head in (LOW, HIGH, SWITCH)]
            torch.testing.assert_close(values[turn], torch.stack(expected), atol=1e-5, rtol=1e-4)
            a, b = t.cu_tokens[turn], t.cu_tokens[turn + 1]
            expected = logprobs[start - 1 : start - 1 + b - a].gather(1, t.response_ids[a:b, None])[
                :, 0
            ]
            mask = t.roles[a:b] > 0
            torch.testing.assert_close(ref_logprobs[a:b][mask], expected[mask], atol=1e-4, rtol=0)
        assert float(bootstrap[i]) == pytest.approx(
            0.0 if episode.terminated else float(heads[-1, HIGH]), abs=1e-5
        )
    assert (bootstrap[~t.terminated] != 0).all()


def plain_losses(agent, t, targets, c):
    """The policy's and the critic's loss of all turns as one minibatch: each trajectory alone, logits in full."""
    policy = value = 0.0
    tokens, counts = targets.loss_mask.sum(), targets.value_mask.sum(0)
    for (first, last), episode in zip(bounds(t.cu_turns), t.episodes, strict=True):
        ids, starts = whole(episode)
        out = agent.model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        heads = agent.critic.heads(agent.critic.trunk(input_ids=ids[None]).last_hidden_state[0])
        for turn, start in zip(range(first, last), starts, strict=True):
            a, b = t.cu_tokens[turn], t.cu_tokens[turn + 1]
            every = out[start - 1 : start - 1 + b - a]
            logprobs = every.gather(1, t.response_ids[a:b, None])[:, 0]
            ratio, advantage = (logprobs - t.old_logprobs[a:b]).exp(), targets.advantages[a:b]
            pg = torch.maximum(
                -advantage * ratio, -advantage * ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
            )
            pg = torch.where(advantage < 0, torch.minimum(pg, -advantage * c.dual_clip), pg)
            d = targets.ref_logprobs[a:b] - logprobs
            terms = (
                pg + c.kl_coef * (d.exp() - d - 1) + c.entropy_coef * (every.exp() * every).sum(1)
            )
            policy = policy + (terms * targets.loss_mask[a:b]).sum() / tokens
            for head, offset in enumerate(t.value_index[turn].tolist()):
                v, old, target = (
                    heads[start + offset - 1, head],
                    *(x[turn, head] for x in (targets.old_values, targets.returns)),
                )
                clipped = old + (v - old).clamp(-c.value_clip, c.value_clip)
                larger = torch.maximum((v - target) ** 2, (clipped - target) ** 2)
                value = (
                    value
                    + c.value_coef[head] * targets.value_mask[turn, head] * larger / counts[head]
                )
    return policy, value


@pytest.mark.parametrize("budget", [1, 150, 100_000])
def test_losses_and_gradients_equal_plain_forwards_of_each_trajectory(budget):
    """In float64."""
    agent = make_agent()
    t, config = joined(agent), settings(microbatch_tokens=budget)
    targets = give(t, score(agent, t, config), config)
    generator = torch.Generator().manual_seed(7)
    for owner, name in (
        (t, "old_logprobs"), (targets, "ref_logprobs"), (targets, "old_values"), (targets, "returns"),
        (targets, "advantages"),
    ):  # fmt: skip
        x = getattr(owner, name).double()
        setattr(
            owner, name, x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        )
    agent.model.double(), agent.critic.double()
    agent.critic.forward = agent.critic.heads.forward  # not rounded to float32
    ours, parameters = (
        copy.deepcopy((agent.model, agent.critic)),
        [*agent.model.parameters(), *agent.critic.parameters()],
    )
    policy, value = plain_losses(agent, t, targets, config.train)
    (policy + value).backward()
    agent.model, agent.critic = ours
    agent.critic.forward = agent.critic.heads.forward
    trained = [*agent.model.parameters(), *agent.critic.parameters()]
    before = [p.detach().clone() for p in trained]
    optimizers = {
        name: torch.optim.SGD(part.parameters(), lr=1.0)
        for name, part in zip(("policy", "critic"), ours, strict=True)
    }
    losses = update(agent, optimizers, t, targets, config, torch.Generator())
    assert losses["loss/policy"] == pytest.approx(policy.item(), rel=1e-10)
    assert losses["loss/value"] == pytest.approx(value.item(), rel=1e-10)
    for p, b, q in zip(trained, before, parameters, strict=True):
        torch.testing.assert_close(
            b - p.detach(), torch.zeros_like(b) if q.grad is None else q.grad, rtol=1e-9, atol=1e-12
        )
    assert any(q.grad.abs().max() > 1e-4 for q in parameters if q.grad is not None)


def test_minibatches_are_whole_trajectories(agent, monkeypatch):
    t, config = joined(agent), settings(minibatches=3)
    targets = give(t, score(agent, t, config), config)
    parts = []

    class Recorded:
        def __init__(
            self, agent, trajectories, sequences, targets, index, config, train_policy, clipped
        ):
            parts.append(index.tolist())

        def take(self, optimizers):
            return None

    monkeypatch.setattr(update_module, "Step", Recorded)
    update(agent, {}, t, targets, config, torch.Generator().manual_seed(0))
    assert sorted(map(len, parts)) == [1, 2, 2] and sorted(sum(parts, [])) == [0, 1, 2, 3, 4]


# Rollouts.

CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def random_agent(kind, template=None):
    """A random model over the tiny tokenizer that ends a response about every dozenth token."""
    tokenizer = tiny.load_tokenizer(HOUSEHOLD.tokenizer)
    tokenizer.chat_template = template
    config = CONFIGS[kind](
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    agent = Agent(model, tokenizer, ModelConfig(device="cpu"), tiny=False)
    agent.stop_ids = tuple(range(0, len(tokenizer), 12)) + (tokenizer.eos_token_id,)
    return agent


def transcripts(max_turns=5, **options):
    config = configure()
    config.env.max_turns, config.agent.style, config.advantage.bootstrap = (
        max_turns,
        "transcript",
        "next_state",
    )
    for name, value in {"max_prompt_tokens": 4000, "max_response_tokens": 10, **options}.items():
        setattr(config.agent, name, value)
    return config


def play(agent, config, envs, respond=None):
    plays = [begin(env, {"seed": i}, config) for i, env in enumerate(envs)]
    for number, one in enumerate(plays):
        one.number = number
    if respond:
        return play_script(plays, write(agent, config), respond, agent.decode)
    voice = sample(agent, config)
    Stage(Seats(None), write(agent, config), voice, agent.decode).run(plays, at_once=len(plays))
    return [one.episode for one in plays]


def sample(agent, config):
    engine = Engine(agent, config)
    engine.wake()
    return Sampled(engine, 1.0, 0)


def write(agent, config):
    return Prompter(agent.tokenizer, config.agent, HOUSEHOLD.styles["transcript"])


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_sampled_logprobs_are_those_of_the_packed_trunk(kind, template):
    agent, config = random_agent(kind, template), transcripts()
    t = pack(play(agent, config, [Household() for _ in range(4)]), agent.find_roles)
    assert t.continued and t.turns == 20
    ended = [r[-1] in agent.stop_ids for e in t.episodes for r in e.responses]
    assert any(ended) and not all(ended)
    sequences = t.sequences()
    for batch in microbatches(sequences.ids, sequences.cu_seqlens, 3000):
        rows = Rows(sequences, batch, torch.ones_like(t.roles, dtype=torch.bool))
        logprobs = agent.logprobs(
            agent.trunk(batch)[rows.token_rows], t.response_ids[rows.tokens], 1.0
        )
        torch.testing.assert_close(logprobs, t.old_logprobs[rows.tokens], atol=1e-5, rtol=1e-5)


def test_what_each_turn_reads_is_the_whole_conversation(monkeypatch):
    agent, config, read = random_agent("llama", CHAT), transcripts(), []
    submit = Engine.submit

    def watched(engine, key, request):
        read.append(request.ids)
        submit(engine, key, request)

    monkeypatch.setattr(Engine, "submit", watched)
    [episode] = play(agent, config, [Household()])
    ids = []
    for context, prompt, response in zip(read, episode.prompts, episode.responses, strict=False):
        ids += prompt
        assert context == ids
        ids += response
    assert len(episode.prompts) == len(episode.responses) + 1 == 6
    later = agent.tokenizer.decode(episode.prompts[3])
    assert later.startswith(("\n<|pad|>user\nObservation:", "<|end|>\n<|pad|>user\nObservation:"))
    assert later.endswith("<|pad|>assistant\n") and "task" not in later


def test_an_overruled_response_is_read_as_it_was_given():
    """What the cache holds of the model's own response is not taken for what a person put in its place."""
    agent, config = random_agent("llama"), transcripts(3)
    play_, prompter = begin(Household(), {"seed": 0}, config), write(agent, config)
    voice = sample(agent, config)
    for said in ([9, 10, 11], None):
        play_.see(*prompter([play_.state])[0])
        voice.ask(play_)
        while not (answers := voice.hear()):
            pass
        [(_, answer)] = answers
        context = list(play_.context)
        play_.step(Answer(said, [0.0] * 3) if said else answer, b"<action>look</action>")
    with torch.no_grad():
        logits = agent.model(torch.tensor([context + answer.ids]), use_cache=False).logits[
            0, len(context) - 1 : -1
        ]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-5, rtol=1e-5)


class Talker(Lines):
    """Says more and more."""

    def step(self, command):
        _, *others = super().step("wait")
        return "a mug 1 " * 3 ** len(self.told), *others


def test_a_conversation_that_outgrows_its_limit_ends_there(agent):
    config = transcripts(max_turns=20, max_prompt_tokens=600, max_response_tokens=12)
    episodes = play(
        agent,
        config,
        [Talker(), Lines()],
        lambda plays: [Answer([5, 1], [-0.5, -0.5])] * len(plays),
    )
    talk, quiet = episodes
    assert not talk.terminated and talk.truncated_prompts == 1 and 2 <= len(talk.responses) < 20
    assert len(quiet.responses) > len(talk.responses)
    for episode in episodes:
        assert len(episode.prompts) == len(episode.responses) + 1 == len(episode.rewards) + 1
        used = len(whole(episode)[0])
        assert used <= 600 + 12 and used + len(episode.prompts[-1]) <= 600 + 12
    t = pack(episodes, agent.find_roles)
    bootstrap = score(agent, t, settings()).values.bootstrap
    assert (bootstrap != 0).all() and not t.terminated.any()
    assert summarise(t)["rollout/truncated_prompts"] == sum(e.truncated_prompts for e in episodes)


@pytest.mark.parametrize("limit", [1, 40, 300])
def test_no_limit_is_too_small_and_an_over_long_first_observation_is_shortened(agent, limit):
    class Long(Lines):
        def reset(self, **options):
            return "a mug 1 " * 900, self.info(False)

    config = transcripts(max_prompt_tokens=limit, max_response_tokens=3)
    [episode] = play(agent, config, [Long()], lambda plays: [Answer([5, 1], [-0.5, -0.5])])
    assert (
        len(episode.prompts[0]) <= limit and len(episode.responses) == 1 and not episode.terminated
    )
    score(agent, pack([episode], agent.find_roles), settings())


# Imitation.


def test_imitation_learns_the_experts_own_turns_of_whole_trajectories(agent):
    config = transcripts(max_turns=20)
    config.train.microbatch_tokens = 5000
    for name, value in {
        "episodes": 6,
        "noise": 0.3,
        "imitate_noise": "no",
        "batch_turns": 1000,
    }.items():
        setattr(config.warm_start, name, value)
    prompter = write(agent, config)
    ours = copy.copy(agent)
    ours.model = copy.deepcopy(agent.model)
    t, own = demonstrate(ours, Games(config), prompter, config)
    assert t.continued and not own.all() and t.valid.all()
    [(_, steps, loss, _)] = imitate(ours, t, own, config)
    assert steps == 1
    total, tokens, mine = 0.0, 0, iter(own.tolist())
    for episode in t.episodes:
        ids, starts = whole(episode)
        with torch.no_grad():
            logprobs = agent.model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        for start, response in zip(starts, episode.responses, strict=True):
            if next(mine):
                total -= sum(
                    float(logprobs[start + j - 1, token]) for j, token in enumerate(response)
                )
                tokens += len(response)
    assert loss == pytest.approx(total / tokens, rel=1e-5)
    config.warm_start.batch_turns = math.ceil(int(own.sum()) / 3)
    assert [steps for _, steps, *_ in imitate(ours, t, own, config)] == [3] * 3
