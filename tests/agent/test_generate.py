"""Sampling with a cache, against the same model without one."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from hiper_fast.agent.generate import generate, sample

VOCABULARY = 61
FAMILIES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig, "gpt2": GPT2Config}


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
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build()


def prompts_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


MIXED = (3, 120, 1, 47, 120, 2)


def run(model, prompts, **options):
    defaults = {"max_new_tokens": 8, "temperature": 1.0, "stop_ids": (0, 1), "batch_tokens": 8192}
    seed = options.pop("seed", 0)
    return generate(
        model, prompts, generator=torch.Generator().manual_seed(seed), **{**defaults, **options}
    )


@torch.no_grad()
def full_logprobs(model, prompt, response, temperature=1.0):
    """Log-probs of a response by one forward pass of the whole sequence, alone and without a cache."""
    logits = model(torch.tensor([prompt + response]), use_cache=False).logits[
        0, len(prompt) - 1 : -1
    ]
    logprobs = torch.log_softmax(logits.float() / temperature, -1)
    return logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0]


@torch.no_grad()
def greedy(model, prompt, max_new_tokens, stop_ids):
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


def test_greedy_is_the_argmax_of_each_step(model):
    prompts = prompts_of(*MIXED)
    results = run(model, prompts, temperature=0, stop_ids=tuple(range(8)), max_new_tokens=12)
    expected = [greedy(model, p, 12, range(8)) for p in prompts]
    assert [ids for ids, _ in results] == expected
    assert len({len(ids) for ids in expected}) > 1, "some stop early, or the test says little"
    for prompt, (ids, logprobs) in zip(prompts, results, strict=True):
        torch.testing.assert_close(
            torch.tensor(logprobs), full_logprobs(model, prompt, ids), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.5])
def test_logprobs_are_those_of_a_full_forward(model, temperature):
    prompts = prompts_of(*MIXED)
    for prompt, (ids, logprobs) in zip(
        prompts, run(model, prompts, temperature=temperature), strict=True
    ):
        expected = full_logprobs(model, prompt, ids, temperature)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_never_matters(attention):
    """A short prompt beside a long one is answered as if alone, in each attention implementation."""
    model = build(attn_implementation=attention)
    prompts = prompts_of(2, 200)
    together = run(model, prompts, temperature=0)
    alone = [run(model, [p], temperature=0)[0] for p in prompts]
    assert [ids for ids, _ in together] == [ids for ids, _ in alone]
    for (_, a), (_, b) in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-4, rtol=0)


def test_the_same_seed_gives_the_same_answers(llama):
    prompts = prompts_of(*MIXED)
    assert run(llama, prompts, seed=3) == run(llama, prompts, seed=3)
    assert run(llama, prompts, seed=3) != run(llama, prompts, seed=4)


def test_the_global_generator_is_left_alone(llama):
    before = torch.get_rng_state()
    run(llama, prompts_of(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_responses_end_at_a_stop_id_or_at_the_limit(llama):
    stop_ids = tuple(range(12))
    results = run(llama, prompts_of(*[5] * 24), stop_ids=stop_ids, max_new_tokens=6)
    ends = [ids[-1] in stop_ids for ids, _ in results]
    assert any(ends) and not all(ends)
    for (ids, logprobs), ended in zip(results, ends, strict=True):
        assert len(ids) == len(logprobs) <= 6
        assert not set(ids[:-1]) & set(stop_ids)
        assert ended or len(ids) == 6


def test_one_new_token(llama):
    assert [len(ids) for ids, _ in run(llama, prompts_of(3, 9), max_new_tokens=1)] == [1, 1]


def test_without_stop_ids_every_response_fills_its_limit(llama):
    assert [len(ids) for ids, _ in run(llama, prompts_of(3, 9), stop_ids=(), max_new_tokens=5)] == [
        5,
        5,
    ]


def test_no_prompts(llama):
    assert run(llama, []) == []


def test_finished_sequences_leave_the_batch(llama):
    """The reference kept finished ones generating: here a forward's batch is only what still runs."""
    sizes = []
    hook = llama.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        results = run(llama, prompts_of(*[5] * 16), stop_ids=tuple(range(12)), max_new_tokens=10)
    finally:
        hook.remove()
    lengths = [len(ids) for ids, _ in results]
    assert sizes == [(16, 5)] + [
        (sum(n > step for n in lengths), 1) for step in range(1, max(lengths))
    ]
    assert sizes[-1][0] < 16


@pytest.mark.parametrize("budget", [1, 130, 10_000])
def test_the_budget_splits_the_batch_and_keeps_the_order(llama, budget):
    prompts, shapes = prompts_of(*MIXED), []
    hook = llama.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        results = run(llama, prompts, temperature=0, batch_tokens=budget, stop_ids=())
    finally:
        hook.remove()
    assert all(rows * length <= max(budget, 120) for rows, length in shapes)
    assert [ids for ids, _ in results] == [greedy(llama, p, 8, ()) for p in prompts]


# Turn after turn, with what was read kept.


@pytest.mark.parametrize("budget", [1, 60, 10_000])
@pytest.mark.parametrize("family", [*FAMILIES, "sliding"])
def test_turns_that_go_on_equal_a_full_forward_of_the_whole(family, budget):
    """Also where turns end early or at the limit, episodes leave, and one new token stands beside many."""
    sliding = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    model = (build("qwen2", **sliding) if family == "sliding" else build(family)).double()
    contexts, pasts = prompts_of(*MIXED), [None] * len(MIXED)
    for turn, news in enumerate([(1, 40, 3, 1, 12, 90), (5, 1, 1, 2, 30), (70, 1, 1)]):
        results = run(
            model, contexts, pasts=pasts, batch_tokens=budget, stop_ids=tuple(range(12)), seed=turn
        )
        for i, (ids, logprobs) in enumerate(results):
            torch.testing.assert_close(
                torch.tensor(logprobs), full_logprobs(model, contexts[i], ids), atol=1e-5, rtol=1e-5
            )
            known = {len(states) for layer in pasts[i].values() for states in layer}
            assert known == {len(contexts[i]) + len(ids) - 1}
            contexts[i] = contexts[i] + ids
        assert len({len(ids) for ids, _ in results}) > 1
        contexts = [
            c + new for c, new in zip(contexts, prompts_of(*news, seed=turn + 1), strict=False)
        ]
        pasts = pasts[: len(news)]


def test_a_turn_computes_its_new_tokens_only(llama):
    contexts, pasts, shapes = prompts_of(100, 100, 100), [None] * 3, []
    results = run(llama, contexts, pasts=pasts, stop_ids=(), max_new_tokens=4)
    contexts = [
        c + ids + new
        for c, (ids, _), new in zip(contexts, results, prompts_of(7, 9, 5), strict=True)
    ]
    hook = llama.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        run(llama, contexts, pasts=pasts, stop_ids=(), max_new_tokens=3)
    finally:
        hook.remove()
    assert shapes == [(3, 10), (3, 1), (3, 1)], "the last sampled token was not read before"


# Drawing one token.


def test_sampling_follows_the_tempered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -30.0]).expand(20_000, 4)
    tokens, logprobs = sample(logits, 0.5, torch.Generator().manual_seed(0))
    expected = torch.softmax(logits[0] / 0.5, -1)
    share = tokens.bincount(minlength=4) / len(tokens)
    torch.testing.assert_close(share, expected, atol=0.012, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1000, 5), float("-inf"))
    logits[:, 2] = 0.0
    tokens, logprobs = sample(logits, 1.0, torch.Generator().manual_seed(0))
    assert (tokens == 2).all() and (logprobs == 0).all()


def test_half_precision_logits_give_float32_logprobs():
    tokens, logprobs = sample(torch.randn(4, 50).bfloat16(), 1.0, torch.Generator().manual_seed(0))
    assert logprobs.dtype == torch.float32 and tokens.dtype == torch.int64
