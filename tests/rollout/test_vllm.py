"""vLLM, where it is installed (docs/engines.md): it samples by the weights that train, whatever becomes of them."""

import importlib.util
import random
import sys

import numpy as np
import pytest
import torch
import transformers
from helpers import HOUSEHOLD, answer_all, configure, make_tiny

from hiper_fast import train
from hiper_fast.agent import tiny
from hiper_fast.agent.loading import load_agent
from hiper_fast.distributed import World
from hiper_fast.options import ConfigError
from hiper_fast.rollout.engines import Request, vllm
from hiper_fast.runs.metrics import read_metrics

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
LONG = [9, 11] * 80  # more than a block of the prefix cache
REQUESTS = [
    Request([5, 6, 7], seed=1, temperature=0.0),
    Request(LONG, seed=2, temperature=1.0),
    Request([*LONG, 8], seed=3, temperature=1.0),
    Request([8], seed=2**63 - 1, temperature=1.0),
]


def check_logprobs(agent, requests, answers):
    for request, said in zip(requests, answers, strict=True):
        known = vllm.score(agent, request.ids, said.ids)
        torch.testing.assert_close(torch.tensor(said.logprobs), known, atol=3e-5, rtol=0)


def move(model):
    """Another policy: every trained weight changes."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight)


def sample_greedily(agent, ids, count):
    ids = torch.tensor([ids])
    with torch.no_grad():
        said = agent.model.generate(
            ids, max_new_tokens=count, do_sample=False, min_new_tokens=count
        )
    return said[0, ids.shape[1] :].tolist()


@pytest.fixture
def start():
    """Starts the engine of an agent; it is closed in the end."""
    started = []

    def start(agent, **options):
        config = configure(rollout__engine="vllm", agent__max_response_tokens=12, **options)
        started.append(vllm.Engine(agent, config))
        return started[0]

    yield start
    for engine in started:
        engine.close()


@needs_vllm
def test_answers_are_those_of_the_present_weights(start):
    agent = make_tiny()
    move(agent.model)  # no bias is zero
    engine = start(agent)
    before = answer_all(engine, REQUESTS)
    check_logprobs(agent, REQUESTS, before)
    assert [said.ids for said in answer_all(engine, REQUESTS)] == [said.ids for said in before]

    move(agent.model)
    with pytest.raises(AssertionError):
        check_logprobs(agent, REQUESTS, before)
    after = answer_all(engine, REQUESTS)
    check_logprobs(agent, REQUESTS, after)
    assert after[0].ids == sample_greedily(agent, REQUESTS[0].ids, len(after[0].ids))


@needs_vllm
def test_draws_are_those_of_the_seed_and_end_with_a_stop_token(start):
    agent = make_tiny()
    agent.stop_ids = tuple(range(100, 200))
    engine = start(agent, agent__batch_tokens=500, agent__max_prompt_tokens=384)
    requests = [Request([seed + 5] * 90, seed=seed, temperature=1.0) for seed in range(20)]
    together, alone = answer_all(engine, requests), answer_all(engine, requests[3:4])
    assert alone[0].ids == together[3].ids
    assert len({tuple(said.ids) for said in together}) > 10
    ended = [said.ids for said in together if len(said.ids) < 12]
    assert ended and all(ids[-1] in agent.stop_ids for ids in ended)
    assert not any(set(said.ids[:-1]) & set(agent.stop_ids) for said in together)


@needs_vllm
def test_a_request_is_forgotten(start):
    agent = make_tiny()
    engine = start(agent)
    engine.wake()
    engine.update()
    engine.submit(0, REQUESTS[0])
    engine.submit(1, REQUESTS[1])
    engine.cancel(0)
    engine.cancel(7)
    engine.submit(0, REQUESTS[2])
    answers = {}
    while len(answers) < 2:
        answers |= dict(engine.collect())
    check_logprobs(agent, REQUESTS[1:3], [answers[1], answers[0]])
    engine.submit(0, REQUESTS[0])
    engine.sleep()
    assert engine.collect() == []


@needs_vllm
@pytest.mark.parametrize("targets", [None, ["q_proj", "lm_head"], ["embed_tokens"]])
def test_adapters_and_rows_beyond_the_tokenizer(start, tmp_path, targets):
    """A tied model with more rows than tokens, which adapters untie; the model that trains stays as it is."""
    pytest.importorskip("peft")
    tokenizer = tiny.load_tokenizer(HOUSEHOLD.tokenizer)
    sizes = tiny.SIZES | {"vocab_size": len(tokenizer) + 60, "num_key_value_heads": 1}
    config = transformers.Qwen2Config(
        **sizes,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {"model__path": str(tmp_path), "model__lora_rank": 2, "agent__max_prompt_tokens": 384}
    agent = load_agent(configure(**options, model__lora_targets=targets).model, 0)
    move(agent.model)
    weights = {name: weight.clone() for name, weight in agent.model.state_dict().items()}
    check_logprobs(agent, REQUESTS, answer_all(start(agent, **options), REQUESTS))
    for name, weight in agent.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@needs_vllm
def test_the_process_stays_as_it_was(start):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    threads = torch.get_num_threads(), torch.set_num_threads
    start(make_tiny())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert (torch.get_num_threads(), torch.set_num_threads) == threads


@needs_vllm
def test_a_run(tmp_path):
    """What is sampled is what is trained: the first step of the first update finds ratios of 1."""
    given = {
        "rollout.engine": "vllm",
        "run.folder": tmp_path,
        "run.display": "none",
        "updates": 2,
        "train.episodes": 4,
        "train.critic_updates": 0,
        "train.minibatches": 1,
        "env.max_turns": 3,
        "agent.max_response_tokens": 8,
        "warm_start.episodes": 6,
        "eval.episodes": 5,
    }
    train.main([f"--{option}={value}" for option, value in given.items()])
    [run] = tmp_path.iterdir()
    updates = [row for row in read_metrics(run / "metrics.jsonl") if "loss/policy" in row]
    assert [row["loss/clip_fraction"] for row in updates] == [0, 0]


@needs_vllm
def test_a_model_that_it_computes_otherwise_is_refused(start, monkeypatch):
    agent = make_tiny()
    move(agent.model)
    monkeypatch.setattr(vllm, "name_architecture", lambda model: type(model).__name__)
    with pytest.raises(ConfigError, match="rollout.engine: vLLM gives other log-probs than Qwen3"):
        start(agent).update()


@needs_vllm
def test_a_model_that_it_does_not_have_is_refused(start, monkeypatch):
    monkeypatch.setattr(vllm, "name_architecture", lambda model: "AbacusForCausalLM")
    with pytest.raises(ConfigError, match="rollout.engine: vLLM cannot play Qwen3ForCausalLM here"):
        start(make_tiny())


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="rollout.engine: vllm is not installed.*pip install"):
        vllm.Engine(make_tiny(), configure(rollout__engine="vllm"))


@pytest.mark.parametrize("option", ["agent.temperature", "eval.temperature"])
def test_temperatures_that_it_would_raise(option):
    config = configure(rollout__engine="vllm", **{option: 0.005})
    with pytest.raises(ConfigError, match=f"{option}: vLLM samples at 0.01 or more"):
        vllm.Engine(make_tiny(), config)


def test_many_processes():
    agent = make_tiny()
    agent.world = World(1, 2)
    with pytest.raises(ConfigError, match="rollout.engine: vllm plays in one process"):
        vllm.Engine(agent, configure(rollout__engine="vllm"))
