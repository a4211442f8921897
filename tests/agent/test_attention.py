"""Packed attention against every sequence alone through transformers' own sdpa, in float64, gradients too."""

import copy
import functools
import random

import pytest
import torch
import transformers
from torch.nn.functional import rms_norm

from hiper_fast.agent import attention
from hiper_fast.agent.agent import run_trunk
from hiper_fast.options import ConfigError
from hiper_fast.packing import microbatches, prefix_sums

SIZES = dict(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, eos_token_id=1, pad_token_id=0, bos_token_id=None, initializer_range=0.2,
)  # fmt: skip
MODELS = {
    "qwen2": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2 untied": (transformers.Qwen2Config, dict(tie_word_embeddings=False)),
    "qwen2 sliding": (
        transformers.Qwen2Config,
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3": (transformers.Qwen3Config, dict(tie_word_embeddings=True)),
    "qwen3 untied": (transformers.Qwen3Config, dict(tie_word_embeddings=False)),
    "llama": (transformers.LlamaConfig, dict(tie_word_embeddings=True, attention_bias=True)),
    "llama untied": (transformers.LlamaConfig, dict(tie_word_embeddings=False)),
    "mistral sliding": (transformers.MistralConfig, dict(sliding_window=5)),
    "olmo2": (transformers.Olmo2Config, {}),
}
LENGTHS = {
    "mixed": [7, 1, 12, 5, 1, 30, 2, 11],
    "one sequence": [9],
    "one token": [1],
    "ones": [1, 1, 1],
}


def build(name, dtype=torch.float64):
    """(the model with packed attention, the same one as transformers made it)."""
    config_class, options = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**SIZES | options)).to(dtype)
    plain = copy.deepcopy(model)
    attention.use(model)
    return model, plain


def build_exact(name):
    """As `build`; norms too are in float64, so that gradients of a token add up before one as behind it."""

    def normalize(norm, x):
        return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    models = build(name)
    for module in (module for model in models for module in model.modules()):
        if hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(normalize, module)
    return models


def sequences(lengths):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 60, (sum(lengths),), generator=generator), prefix_sums(lengths)


def gradients(model, hidden, direction):
    """Of a loss that reads every hidden state through the head, like the log-probs do."""
    logits = model.get_output_embeddings()(hidden)
    grads = torch.autograd.grad(
        (logits.softmax(-1) * direction).sum(), list(model.parameters()), allow_unused=True
    )
    return [torch.zeros(()) if g is None else g for g in grads]


def add(sums, grads):
    return grads if sums is None else [a + b for a, b in zip(sums, grads, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_unpacked(name):
    check_packed_equals_unpacked(name, LENGTHS["mixed"], 40)


@pytest.mark.parametrize("budget", [3, 1000])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_packed_equals_unpacked_at_the_edges(lengths, budget):
    check_packed_equals_unpacked("qwen2", lengths, budget)


def check_packed_equals_unpacked(name, lengths, budget, checkpointing=False):
    model, plain = build(name)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    check_equals_alone(model, plain, *sequences(lengths), budget)


def check_equals_alone(model, plain, ids, cu, budget, share=False):
    """Returns how many tokens were read."""
    direction = torch.randn(
        len(ids), 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    spans = list(zip(cu.tolist(), cu.tolist()[1:], strict=False))
    packed = alone = None
    read = 0
    for batch in microbatches(ids, cu, budget, share=share):
        hidden = run_trunk(model.base_model, batch)
        read += len(hidden)
        hidden = hidden[batch.rows]
        parts = [slice(*spans[i]) for i in batch.index.tolist()]
        for part, rows in zip(parts, hidden.split(batch.cu_whole.diff().tolist()), strict=True):
            expected = plain.base_model(input_ids=ids[None, part]).last_hidden_state[0]
            torch.testing.assert_close(rows, expected, atol=1e-12, rtol=1e-12)
            alone = add(alone, gradients(plain, expected, direction[part]))
        packed = add(
            packed, gradients(model, hidden, torch.cat([direction[part] for part in parts]))
        )
    assert sum(float(g.abs().sum()) for g in packed) > 0.1
    for mine, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-11, rtol=1e-10)
    return read


def nested(lengths, seed=0):
    """Sequences that begin as others do, some as whole ones, some twice there; shuffled: (ids, cu_seqlens)."""
    rng, made = random.Random(seed), [[]]
    for length in lengths:
        start = rng.choice(made)
        start = start[: rng.randint(0, min(len(start), length))]
        made.append(start + rng.choices(range(2, 60), k=length - len(start)))
    made[0] = list(made[-1])
    rng.shuffle(made)
    return torch.tensor(sum(made, [])), prefix_sums([len(s) for s in made])


@pytest.mark.parametrize("name", MODELS)
def test_what_sequences_begin_with_is_read_once(name):
    model, plain = build_exact(name)
    ids, cu = nested([7, 12, 5, 30, 2, 11, 1, 1, 19, 28])
    assert check_equals_alone(model, plain, ids, cu, 1000, share=True) < 0.8 * len(ids)


@pytest.mark.parametrize("budget", [3, 25, 60])
@pytest.mark.parametrize("seed", range(3))
def test_what_sequences_begin_with_is_read_once_in_each_microbatch(budget, seed):
    model, plain = build_exact("mistral sliding")
    ids, cu = nested([7, 12, 5, 30, 2, 11, 1, 1], seed)
    assert check_equals_alone(model, plain, ids, cu, budget, share=True) <= len(ids)


@pytest.mark.parametrize("name", ["qwen2", "mistral sliding"])
def test_sharing_is_told_to_models_that_hand_on_the_mask_alone(name, monkeypatch):
    whole = attention.describe_packing
    monkeypatch.setattr(
        attention, "describe_packing", lambda batch: whole(batch) | {"packing": None}
    )
    model, plain = build_exact(name)
    ids, cu = nested([7, 12, 5, 30])
    assert check_equals_alone(model, plain, ids, cu, 100, share=True) < len(ids)


def test_sharing_with_gradient_checkpointing():
    model, plain = build_exact("llama")
    model.gradient_checkpointing_enable()
    model.train()
    ids, cu = nested([7, 12, 5, 30])
    assert check_equals_alone(model, plain, ids, cu, 100, share=True) < len(ids)


def test_gradients_of_what_is_taken_often_are_summed_in_float32():
    states = torch.ones(2, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.tensor([0] * 1000 + [1])
    attention.select(states, rows).sum().backward()
    assert states.grad.flatten().tolist() == [1000, 1], "in bfloat16 a sum of ones ends at 256"


@pytest.mark.parametrize("name", ["qwen2", "qwen3 untied", "llama"])
def test_packed_equals_unpacked_with_gradient_checkpointing(name):
    check_packed_equals_unpacked(name, LENGTHS["mixed"], 40, checkpointing=True)


def test_a_sequence_sees_nothing_of_its_neighbours():
    model, _ = build("llama")
    ids, cu = sequences([6, 5, 7])
    other = ids.clone()
    other[6:11] = (ids[6:11] + 1) % 60
    (a,), (b,) = (list(microbatches(x, cu, 100)) for x in (ids, other))
    before, after = (run_trunk(model.base_model, x) for x in (a, b))
    changed = ((before - after).abs().amax(1) > 0).split(a.cu_seqlens.diff().tolist())
    assert [bool(x.any()) for x in changed] == [i == 1 for i in a.index.tolist()]


def test_groups_hold_little_padding_and_lead_back():
    lengths = torch.randint(1, 200, (300,), generator=torch.Generator().manual_seed(0))
    cu = prefix_sums(lengths)
    groups = attention.group_lengths(cu)
    assert torch.equal(groups.rows[groups.places], torch.arange(int(cu[-1]))), (
        "each token stands where it is sought"
    )
    places = sum(n * longest for n, longest in groups.shapes)
    assert len(groups.rows) == places <= (1 + attention.PADDING) * int(cu[-1])
    assert len(groups.shapes) < 40, "few calls"


def test_unpacked_calls_are_transformers_own():
    model, plain = build("mistral sliding", torch.float32)
    ids = torch.arange(2, 26).view(2, 12)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-4)


def test_exported_configuration_does_not_name_our_attention(tmp_path):
    model, _ = build("llama")
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()


def test_models_that_mix_tokens_otherwise_are_refused():
    bloom = transformers.BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2)
    mamba = transformers.MambaConfig(
        vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=1
    )
    conv = transformers.Lfm2Config(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], bos_token_id=None, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    cases = (
        (bloom, "other than plain attention"),
        (mamba, "layers of type (linear_attention|mamba),"),
        (conv, "type conv"),
    )
    for config, match in cases:
        with pytest.raises(ConfigError, match=f"^model.path: .*{match}"):
            attention.use(transformers.AutoModelForCausalLM.from_config(config))


def test_attention_with_dropout_is_refused():
    ids, cu = sequences([4, 3])
    (batch,) = microbatches(ids, cu, 10)
    dropping = transformers.Qwen2Config(**SIZES, attention_dropout=0.1)
    model = transformers.AutoModelForCausalLM.from_config(dropping).train()
    attention.use(model)
    with pytest.raises(ConfigError, match="^model.path: .*attention_dropout"):
        run_trunk(model.base_model, batch)


def attend_alone(query, key, value, scale, window, softcap, sinks):
    """One sequence, query by query: [tokens, heads, d]."""
    out, shared = torch.empty_like(query), query.shape[1] // key.shape[1]
    for i in range(len(query)):
        seen = slice(max(0, i + 1 - window) if window else 0, i + 1)
        for head in range(query.shape[1]):
            scores = key[seen, head // shared] @ query[i, head] * scale
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            weights = scores.exp()
            rest = 0 if sinks is None else sinks[head].exp()
            out[i, head] = weights @ value[seen, head // shared] / (weights.sum() + rest)
    return out


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0, 0.5, 2.0, 0.0]).double()])
def test_capped_scores_and_sinks_are_computed_as_written(window, softcap, sinks):
    lengths = [7, 1, 12, 5]
    query, key, value = (
        torch.randn(25, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    inputs = [query, key, value] + ([] if sinks is None else [sinks.requires_grad_()])
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    expected = torch.cat([attend_alone(*part, 0.3, window, softcap, sinks) for part in parts])
    mask = prefix_sums(lengths).view(1, 1, 1, -1)
    states = (x.transpose(0, 1)[None] for x in (query, key, value))
    out, _ = attention.attend(
        None, *states, mask, scaling=0.3, sliding_window=window, softcap=softcap, s_aux=sinks
    )
    torch.testing.assert_close(out[0], expected)
    direction = torch.randn_like(expected)
    for mine, other in zip(
        *(torch.autograd.grad((x * direction).sum(), inputs) for x in (out[0], expected)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_padded_rows_of_capped_scores_spread_no_nan():
    """Unpacked, as rollouts call: left padding sees nothing."""
    states = [torch.randn(2, heads, 5, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    mask = attention.make_mask(5, 5, None, torch.device("cpu")).repeat(2, 1, 1, 1)
    mask[1, :, :, :3] = False
    out, _ = attention.attend(None, *states, mask, scaling=0.3, softcap=0.7)
    whole, _ = attention.attend(None, *states, None, scaling=0.3, softcap=0.7)
    alone = attend_alone(*(x[1, :, 3:].transpose(0, 1) for x in states), 0.3, None, 0.7, None)
    torch.testing.assert_close(out[1, 3:], alone)
    torch.testing.assert_close(out[0], whole[0])
    assert out.isfinite().all()


def test_the_window_is_felt():
    model, plain = build("mistral sliding")
    ids, cu = sequences([20])
    (batch,) = microbatches(ids, cu, 100)
    hidden = run_trunk(model.base_model, batch)
    torch.testing.assert_close(hidden, plain.base_model(input_ids=ids[None]).last_hidden_state[0])
    model.config.sliding_window = None
    for layer in model.base_model.layers:
        layer.self_attn.sliding_window = None
    assert not torch.allclose(hidden, run_trunk(model.base_model, batch)), (
        "the window is felt at all"
    )
