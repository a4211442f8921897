"""The built-in engine, against the same model without a cache."""

import contextlib
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import answer_all
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from hiper_fast.agent import attention, decoding
from hiper_fast.agent.head import measure
from hiper_fast.config import Config
from hiper_fast.options import ConfigError
from hiper_fast.rollout.draws import mix, uniforms
from hiper_fast.rollout.engines import Request
from hiper_fast.rollout.engines.paged import Engine, Options, count_free

VOCABULARY = 61
FAMILIES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig, "gpt2": GPT2Config}
SLIDING = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
MIXED = (3, 120, 1, 47, 120, 2)


def build(family="llama", **options):
    """A random model sharp enough that its greedy choices are no ties; gpt2's positions are absolute."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    if family != "gpt2":
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 48}
    if family == "qwen3":
        sizes["head_dim"] = 8
    config = FAMILIES[family](vocab_size=VOCABULARY, initializer_range=0.3, **sizes, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    attention.use(model)
    return model


@pytest.fixture(scope="module", params=[*FAMILIES, "sliding"])
def model(request):
    return build("qwen2", **SLIDING) if request.param == "sliding" else build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build()


def make_engine(model, limit=8, stop_ids=(0, 1), vocabulary=VOCABULARY, **options):
    config = Config(rollout=Options(slots=options.pop("slots", 64)))
    config.agent.max_response_tokens, config.agent.max_prompt_tokens = limit, 300
    config.agent.batch_tokens = options.pop("batch_tokens", 8192)
    for name, value in options.items():
        setattr(config.rollout, name, value)
    agent = SimpleNamespace(
        model=model, head=measure(model, vocabulary), stop_ids=stop_ids, device=model.device,
        eager=contextlib.nullcontext,
    )  # fmt: skip
    return Engine(agent, config)


def prompts_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def run(model, prompts, temperature=1.0, seed=0, **options):
    requests = [Request(ids, mix(seed, i), temperature) for i, ids in enumerate(prompts)]
    return answer_all(make_engine(model, **options), requests)


@torch.no_grad()
def full_logprobs(model, prompt, response, temperature=1.0):
    """Log-probs of a response by one forward pass of the whole sequence, alone and without a cache."""
    logits = model(torch.tensor([prompt + response]), use_cache=False).logits[
        0, len(prompt) - 1 : -1
    ]
    logprobs = torch.log_softmax(logits.float() / temperature, -1)
    return logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0]


@torch.no_grad()
def greedy(model, prompt, limit, stop_ids):
    ids = list(prompt)
    for _ in range(limit):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


@contextlib.contextmanager
def watching(model):
    """The number of tokens of each pass."""
    read = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append((args or [kwargs["input_ids"]])[0].numel()),
        with_kwargs=True,
    )
    try:
        yield read
    finally:
        hook.remove()


def test_greedy_is_the_argmax_of_each_step(model):
    prompts = prompts_of(*MIXED)
    answers = run(model, prompts, temperature=0.0, stop_ids=tuple(range(8)), limit=12)
    expected = [greedy(model, p, 12, range(8)) for p in prompts]
    assert [answer.ids for answer in answers] == expected
    assert len({len(ids) for ids in expected}) > 1, "some stop early, or the test says little"
    for prompt, answer in zip(prompts, answers, strict=True):
        logprobs = full_logprobs(model, prompt, answer.ids)
        torch.testing.assert_close(torch.tensor(answer.logprobs), logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.5])
def test_logprobs_are_those_of_a_full_forward(model, temperature):
    prompts = prompts_of(*MIXED)
    for prompt, answer in zip(prompts, run(model, prompts, temperature=temperature), strict=True):
        expected = full_logprobs(model, prompt, answer.ids, temperature)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{"slots": 1}, {"slots": 4}, {"batch_tokens": 1}, {}])
def test_answers_do_not_depend_on_what_is_answered_beside_them(llama, options):
    prompts = prompts_of(*MIXED, *MIXED, seed=3)
    alone = [run(llama, [p], seed=i)[0] for i, p in enumerate(prompts)]
    requests = [Request(ids, mix(i, 0), 1.0) for i, ids in enumerate(prompts)]
    together = answer_all(make_engine(llama, **options), requests)
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]


def test_a_seed_gives_its_answers(llama):
    prompts = prompts_of(*MIXED)
    assert run(llama, prompts, seed=3) == run(llama, prompts, seed=3)
    assert run(llama, prompts, seed=3) != run(llama, prompts, seed=4)


def test_the_global_generator_is_left_alone(llama):
    before = torch.get_rng_state()
    run(llama, prompts_of(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_responses_end_at_a_stop_id_or_at_the_limit(llama):
    stop_ids = tuple(range(12))
    answers = run(llama, prompts_of(*[5] * 24), stop_ids=stop_ids, limit=6)
    ends = [answer.ids[-1] in stop_ids for answer in answers]
    assert any(ends) and not all(ends)
    for answer, ended in zip(answers, ends, strict=True):
        assert len(answer.ids) == len(answer.logprobs) <= 6
        assert not set(answer.ids[:-1]) & set(stop_ids)
        assert ended or len(answer.ids) == 6


@pytest.mark.parametrize("limit", [1, 5])
def test_without_stop_ids_every_response_fills_its_limit(llama, limit):
    answers = run(llama, prompts_of(3, 9), stop_ids=(), limit=limit)
    assert [len(answer.ids) for answer in answers] == [limit, limit]


def test_ids_beyond_the_vocabulary_are_never_drawn(llama):
    answers = run(llama, prompts_of(*[5] * 30), vocabulary=9, temperature=3.0)
    assert max(i for answer in answers for i in answer.ids) == 8


def test_nothing_to_answer(llama):
    engine = make_engine(llama)
    engine.wake()
    assert engine.collect() == []


# What a pass reads.


def test_finished_responses_leave_and_waiting_ones_come_at_once(llama):
    """The reference kept finished ones generating: here a pass holds what still runs, and what has just come."""
    engine = make_engine(llama, stop_ids=tuple(range(12)), limit=10, slots=4)
    with watching(llama) as read:
        answers = answer_all(
            engine, [Request(p, i, 1.0) for i, p in enumerate(prompts_of(*[5] * 9))]
        )
    lengths = [len(answer.ids) for answer in answers]
    assert sum(read) == 9 * 5 + sum(lengths) - 9
    assert len(read) < sum(lengths) / 2


def test_what_prompts_share_is_read_once(llama):
    shared = prompts_of(50)[0]
    prompts = [shared + own for own in prompts_of(7, 9, 1, seed=2)]
    engine = make_engine(llama, limit=1)
    with watching(llama) as read:
        answer_all(engine, [Request(ids, 0, 1.0) for ids in prompts])
    assert read == [50 + 7 + (50 - 48 + 9) + (50 - 48 + 1)], "blocks of 8: six of them are shared"


def test_a_turn_reads_its_new_tokens_only(llama):
    engine, [context] = make_engine(llama, stop_ids=(), limit=4), prompts_of(100)
    engine.wake()
    engine.submit(0, Request(context, 1, 1.0, conversation=5))
    while not (done := engine.collect()):
        pass
    context = context + done[0][1].ids + [7, 8, 9]
    with watching(llama) as read:
        engine.submit(1, Request(context, 2, 1.0, conversation=5))
        engine.collect()
    assert read == [107 - 96], "103 tokens were read before, of which 96 fill blocks"


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_turns_that_go_on_equal_a_full_forward_of_the_whole(model, batch_tokens):
    """Also where turns end early or at the limit, episodes leave, and one new token stands beside many."""
    engine = make_engine(model, stop_ids=tuple(range(12)), batch_tokens=batch_tokens)
    engine.wake()
    contexts = prompts_of(*MIXED)
    for turn, news in enumerate([(1, 40, 3, 1, 12, 90), (5, 1, 1, 2, 30), (70, 1, 1)]):
        for key, context in enumerate(contexts):
            engine.submit(key, Request(context, mix(turn, key), 1.0, conversation=key))
        answers = {}
        while len(answers) < len(contexts):
            answers |= dict(engine.collect())
        for key, answer in answers.items():
            expected = full_logprobs(model, contexts[key], answer.ids)
            torch.testing.assert_close(
                torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=1e-4
            )
        contexts = [
            contexts[key] + answers[key].ids + new
            for key, new in enumerate(prompts_of(*news, seed=turn + 1))
        ]


def test_an_update_forgets_what_was_read_with_other_weights(llama):
    import copy

    model, [prompt] = copy.deepcopy(llama), prompts_of(90)
    engine = make_engine(model, stop_ids=(), limit=1)
    request = Request(prompt, 0, 1.0)
    engine.wake()

    def ask():
        engine.submit(0, request)
        return engine.collect()[0][1].logprobs

    ask()
    with torch.no_grad():
        model.base_model.embed_tokens.weight.mul_(1.5)
    engine.update()
    engine.submit(0, request)
    [(_, answer)] = engine.collect()
    expected = full_logprobs(model, prompt, answer.ids)
    torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)


def test_a_cancelled_request_leaves_its_place(llama):
    engine = make_engine(llama, stop_ids=(), slots=1)
    engine.wake()
    for key, prompt in enumerate(prompts_of(5, 6, 7)):
        engine.submit(key, Request(prompt, key, 1.0))
    engine.collect()
    engine.cancel(0)  # running
    engine.cancel(1)  # waiting
    engine.cancel(9)
    answers = []
    while not answers:
        answers = engine.collect()
    assert [key for key, _ in answers] == [2] and not engine.running


def test_memory_for_less_than_one_response(llama):
    engine = make_engine(llama, cache_gb=1e-6)
    with pytest.raises(ConfigError, match="rollout.cache_gb: one response needs .* can be had"):
        engine.wake()


def test_with_little_memory_requests_wait(llama):
    most = -(-308 // 8) * 8
    engine = make_engine(llama, cache_gb=2.5 * most * 2 * 2 * 2 * 8 * 4 / 2**30)
    prompts = prompts_of(*[290] * 4)
    answers = answer_all(engine, [Request(p, i, 0.0) for i, p in enumerate(prompts)])
    assert [answer.ids for answer in answers] == [greedy(llama, p, 8, (0, 1)) for p in prompts]


# Many steps before the host looks, and batches of a few sizes, as on a GPU.


class Replayed(decoding.Graphs):
    """Steps that are captured as functions: what a CUDA graph would do, one call at a time."""

    def capture(self, size):
        static = torch.full((size,), self.nobody)
        self.captured[size] = static, lambda: self.step(static)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_steps_in_between_change_nothing(llama, steps):
    prompts, options = prompts_of(*MIXED, *MIXED, seed=4), {"stop_ids": tuple(range(12))}
    expected = run(llama, prompts, **options)
    engine = make_engine(llama, slots=5, **options)
    engine.steps = steps
    engine.wake()
    engine.decoder.graphs = Replayed(engine.decoder.step, engine.decoder.nobody)
    engine.wake = lambda: None
    requests = [Request(ids, mix(0, i), 1.0) for i, ids in enumerate(prompts)]
    answers = answer_all(engine, requests)
    assert [answer.ids for answer in answers] == [answer.ids for answer in expected]
    for one, other in zip(answers, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_step_reads_nothing_back_and_has_shapes_of_its_rows_alone(llama):
    engine = make_engine(llama)
    engine.wake()
    rows = torch.zeros(4, dtype=torch.int64)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        engine.decoder.step(rows)
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::nonzero", "aten::item", "aten::_local_scalar_dense"}


def test_where_a_step_cannot_be_captured_it_runs_as_it_is(monkeypatch):
    ran = []
    graphs = decoding.Graphs(lambda rows: ran.append(rows.tolist()), nobody=9)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: (_ for _ in ()).throw(RuntimeError("no")))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch, "full", lambda size, value, device: torch.ones(size) * value)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        graphs.run([1, 2, 3])
        graphs.run([1])
    assert ran == [[1, 2, 3, 9], [1]] and len(told) == 1


def test_graphs_share_the_memory_of_the_first(monkeypatch):
    """One that had its own would hold a batch's logits for good, for each of dozens of sizes."""
    given, replayed = [], []

    class Graph:
        def pool(self):
            return "the first's"

        def replay(self):
            replayed.append(self)

    def capture(graph, pool, capture_error_mode):
        given.append(pool)
        return contextlib.nullcontext()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": Graph}
    fakes |= {"stream": lambda stream: contextlib.nullcontext(), "graph": capture}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda size, value, device: full(size, value))
    graphs = decoding.Graphs(lambda rows: None, nobody=9)
    for rows in ([1, 2, 3], [1, 2], [3], [0, 1, 2]):
        graphs.run(rows)
    assert given == [None, "the first's", "the first's"]
    assert len(set(replayed)) == 3 and replayed[0] is replayed[3]


def test_what_torch_keeps_of_an_update_is_free_for_the_cache(monkeypatch):
    """Else a cache would shrink to nothing after the first update, whose memory torch does not give back."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert count_free(torch.device("cuda")) == 65


# The draws' numbers.


def test_numbers_of_a_seed():
    numbers = uniforms(5, 10_000)
    assert (numbers >= 0).all() and (numbers < 1).all() and abs(numbers.mean() - 0.5) < 0.01
    assert (uniforms(5, 3) == numbers[:3]).all() and (uniforms(6, 3) != numbers[:3]).all()
    assert (
        abs(float(torch.corrcoef(torch.from_numpy(np.stack([numbers, uniforms(6, 10_000)])))[0, 1]))
        < 0.03
    )


def test_seeds_differ_in_every_number_they_are_made_of():
    seeds = {mix(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125 and all(0 <= seed < 2**63 for seed in seeds)
    assert mix(2**63 - 1) != mix(0)
