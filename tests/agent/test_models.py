"""Whatever is sampled is what is trained, for every architecture; or it is refused at load, with the reason."""

import copy
import re

import models
import pytest
import torch
import transformers
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from hiper_fast.agent import attention, lora
from hiper_fast.agent.head import Head, measure
from hiper_fast.agent.loading import load_agent, prepare
from hiper_fast.agent.rotary import check_rotary
from hiper_fast.config import ModelConfig
from hiper_fast.options import ConfigError
from hiper_fast.packing import microbatches, prefix_sums

CLOSE = 1e-5  # nats; log-probs are float32, whatever the model computes in
EXPERTS = {"qwen2_moe", "deepseek_v3", "gpt_oss"}  # whose grouped product has no float64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}


def load(model, **options):
    """(the agent of a copy, the model as it came), in float64: what differs then is no rounding."""
    config = ModelConfig(device="cpu", **options)
    if config.lora_rank:
        lora.add_lora(model, config, seed=0)
        nudge(model)
    model.double()
    return prepare(copy.deepcopy(model), models.TOKENIZER, config), model


@torch.no_grad()
def nudge(module):
    generator = torch.Generator().manual_seed(5)
    for name, p in module.named_parameters():
        if any(word in name for word in ("lora_B", "lora_embedding", "modules_to_save")):
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)


# Architectures.


def need(name):
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if name == "nemotron" and transformers.__version__.startswith("5.10."):
        pytest.skip("its attention is code of its own in transformers 5.10")


@pytest.mark.parametrize(
    "name",
    [
        "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gemma4_text", "granite", "cohere", "phi3",
        "phi", "qwen2_moe", "gpt2", "opt", "modernbert-decoder", "deepseek_v3", "granite_swa", "gpt_oss", "nemotron",
        "electra", "whisper",
    ],
)  # fmt: skip
def test_what_is_sampled_is_what_is_trained(name):
    need(name)
    outcome = models.check(name, torch.float32 if name in EXPERTS else torch.float64)
    assert outcome.kind == "works", outcome.reason
    assert outcome.difference <= CLOSE


@pytest.mark.parametrize(
    "name, reason",
    [
        ("mamba", "layers of type (linear_attention|mamba),"),
        ("rwkv", "recurrent"),
        ("llama4_text", "layers of type chunked_attention"),
        ("deepseek_v32", "layers of type (indexed_attention|deepseek_sparse_attention),"),
        ("minimax_m3_vl_text", "index"),
        ("gptj", "token mixing other than plain attention"),
        ("bart", "when its sequences are packed into one"),
    ],
)
def test_what_would_differ_is_refused_in_one_line(name, reason):
    need(name)
    outcome = models.check(name)
    assert outcome.kind == "refused" and re.search(reason, outcome.reason)
    assert outcome.reason.startswith("model.path: ") and "\n" not in outcome.reason


def test_an_encoder_and_a_decoder_is_refused(tmp_path):
    config = transformers.T5Config(
        vocab_size=len(models.TOKENIZER), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    models.TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="^model.path: cannot load .*T5Config"):
        load_agent(ModelConfig(path=str(tmp_path), device="cpu"), seed=0)


def test_a_model_that_reads_both_ways_is_refused():
    with pytest.raises(ConfigError, match="^model.path: .*attention in both directions"):
        load(models.build("bert", is_decoder=False))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_or_not(name, tied):
    agent, model = load(models.build(name, tie_word_embeddings=tied))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert models.compare(model, agent) <= CLOSE


class Squashed(LlamaForCausalLM):
    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = out.logits + out.logits.tanh()
        return out


class Cooling(LlamaForCausalLM):
    def forward(self, input_ids, *, position_ids=None, logits_to_keep=0, **options):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        out = super().forward(input_ids, position_ids=position_ids, **options)
        out.logits = (out.logits / (1 + position_ids[..., None]))[:, -logits_to_keep:]
        return out


class Placeless(GPT2LMHeadModel):  # rotary positions are relative: a Llama could do without
    def forward(self, *args, position_ids=None, **options):
        return super().forward(*args, **options)


class Breaking(LlamaForCausalLM):
    def forward(self, input_ids, **options):
        return super().forward(input_ids, **options) if input_ids.shape[1] < 3 else 1 / 0


@pytest.mark.parametrize(
    "kind, reason",
    [
        (Squashed, "changes its logits by more than a factor and a soft cap"),
        (Cooling, "packed into one sequence"),
        (Placeless, "packed into one sequence"),
        (Breaking, "ZeroDivisionError"),
    ],
)
def test_a_wrong_model_is_refused(kind, reason):
    right = models.build("gpt2" if issubclass(kind, GPT2LMHeadModel) else "llama")
    load(right)
    wrong = kind(right.config).eval()
    wrong.load_state_dict(right.state_dict())
    with pytest.raises(ConfigError, match=f"^model.path: {kind.__name__} .*{reason}"):
        load(wrong)


def test_a_model_that_cannot_share_is_read_whole(monkeypatch):
    def forget(cls, batch):
        return cls(batch.cu_seqlens, batch.cu_seqlens, None)

    monkeypatch.setattr(attention.Packing, "of", classmethod(forget))
    with pytest.warns(UserWarning, match="turns are read whole, slower: LlamaForCausalLM"):
        agent, _ = load(models.build("llama"))
    assert not agent.shares_prefixes
    monkeypatch.undo()
    agent, _ = load(models.build("llama"))
    assert agent.shares_prefixes


def test_a_model_that_knows_nothing_yet_is_no_wrong_one():
    model = models.build("llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e-5
    load(model)


def test_windows_are_what_they_were_after_the_probe():
    agent, model = load(models.build("mistral"))
    assert agent.model.config.sliding_window == model.config.sliding_window == models.WINDOW


def test_ids_beyond_the_tokenizer_have_no_probability():
    model = models.build("phi")  # whose head has a bias
    known = len(models.TOKENIZER)
    with torch.no_grad():
        model.lm_head.bias[known:] = 50.0
    agent, _ = load(model)
    assert agent.head.vocabulary == known < len(model.lm_head.weight)
    for answer in models.sample(models.wake_engine(agent), [[5, 6, 7], [8]]):
        assert max(answer.ids) < known and min(answer.logprobs) > -20
    hidden = torch.randn(32, dtype=torch.float64).expand(known, -1)
    total = agent.logprobs(hidden, torch.arange(known), 0.7).exp().sum()
    torch.testing.assert_close(total, torch.ones_like(total))
    with pytest.raises(ValueError, match="targets"):
        agent.logprobs(hidden[:1], torch.tensor([known]), 0.7)
    assert models.compare(model, agent) <= CLOSE


# The head.


class Both(LlamaForCausalLM):
    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = 7 * torch.tanh(out.logits * 0.25 / 7)
        return out


def test_the_head_is_measured():
    known = len(models.TOKENIZER)
    rows = known + models.PADDING
    assert measure(models.build("llama"), 10_000) == Head(rows)
    assert measure(models.build("llama"), known) == Head(known)
    granite = measure(models.build("granite", logits_scaling=8.0), known)
    assert granite == Head(known, scale=0.125)
    cohere = measure(models.build("cohere", logit_scale=0.0625), known)
    assert cohere == Head(known, scale=0.0625)
    capped = measure(models.build("gemma2", final_logit_softcapping=30.0), known)
    assert capped == Head(known, softcap=30.0)
    both = measure(Both(models.build("llama").config), known)
    assert (both.scale, both.softcap) == (pytest.approx(0.25), pytest.approx(7))


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_factor_and_cap_are_those_of_the_model(temperature):
    model = Both(models.build("llama").config).double()
    models.scatter(model)
    head, hidden = measure(model, 10_000), torch.randn(5, 32, dtype=torch.float64)
    product = hidden @ model.lm_head.weight.T
    options = head.temper(temperature)
    cap = options["softcap"]
    found = cap * torch.tanh(product / cap) / options["temperature"]
    torch.testing.assert_close(found, 7 * torch.tanh(product * 0.25 / 7) / temperature)


# LoRA.


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


TARGETS = {
    "trunk": ["q_proj", "down_proj"],
    "trunk and head": ["q_proj", "down_proj", "lm_head"],
    "head": ["lm_head"],
    "embedding and head": ["embed_tokens", "lm_head"],
    "embedding": ["embed_tokens"],
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
def test_adapters_are_sampled_and_trained_alike(peft, targets, tied):
    model = models.build("qwen2", tie_word_embeddings=tied)
    agent, model = load(model, lora_rank=3, lora_targets=targets)
    assert models.compare(model, agent) <= CLOSE
    check_gradients(agent, model)


def check_gradients(agent, model):
    """Of packed log-probs through the fused head, against peft's own forward of each sequence, in float64."""
    lengths = [9, 4, 7]
    ids = torch.randint(len(models.TOKENIZER), (sum(lengths),))
    direction = torch.randn(len(ids), dtype=torch.float64)
    (batch,) = microbatches(ids, prefix_sums(lengths), 100)
    targets = batch.input_ids.roll(-1)
    found = agent.logprobs(agent.trunk(batch), targets, 0.7)
    sizes = batch.cu_seqlens.diff().tolist()
    alone = []
    for part, wanted in zip(batch.input_ids.split(sizes), targets.split(sizes), strict=True):
        logits = model(input_ids=part[None], use_cache=False).logits[0, :, : agent.head.vocabulary]
        alone.append((logits / 0.7).log_softmax(-1).gather(1, wanted[:, None])[:, 0])
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-12, atol=1e-12)
    gradients = []
    for module, logprobs in ((agent.model, found), (model, torch.cat(alone))):
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad((logprobs * direction).sum(), named.values())
        gradients.append(dict(zip(named, grads, strict=True)))
    mine, theirs = gradients
    assert mine.keys() == theirs.keys() and mine
    for name, gradient in mine.items():
        assert theirs[name].any(), name
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-10, atol=1e-10, msg=name)


def test_a_head_saved_as_a_whole_beside_adapters(peft):
    model = models.build("qwen2", tie_word_embeddings=False)
    model.add_adapter(peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    nudge(model)
    agent, model = load(model)
    assert models.compare(model, agent) <= CLOSE
    check_gradients(agent, model)


def test_adapters_of_another_kind_on_the_head_are_refused(peft):
    """DoRA scales the rows of the sum: no columns beside the weight do that."""
    model = models.build("qwen2", tie_word_embeddings=False)
    model.add_adapter(peft.LoraConfig(r=3, target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ConfigError, match="^model.path: .*gives other log-probs"):
        load(model)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", [True, False])
def test_the_reference_reads_without_adapters(peft, saved, tied):
    base = models.build("qwen2", tie_word_embeddings=tied)
    model = copy.deepcopy(base)
    adapted = {"modules_to_save": ["lm_head"]} if saved else {}
    targets = ["q_proj"] + ([] if saved else ["lm_head"])
    model.add_adapter(peft.LoraConfig(r=3, target_modules=targets, **adapted))
    agent, _ = load(model)
    agent.freeze_reference()
    nudge(agent.model)
    ids = torch.arange(40, 60)
    (batch,) = microbatches(ids, prefix_sums([12, 8]), 100)
    hidden = agent.trunk(batch, reference=True)
    base.double()
    found = agent.logprobs(hidden, ids.roll(-1), models.TEMPERATURE, reference=True)
    expected = torch.cat(
        models.read_alone(base, agent.head.vocabulary, [ids[:12].tolist(), ids[12:].tolist()])
    )
    torch.testing.assert_close(
        torch.cat([found[:11], found[12:19]]).float(), expected, rtol=0, atol=CLOSE
    )
    changed = agent.logprobs(agent.trunk(batch), ids.roll(-1), models.TEMPERATURE)
    assert (changed - found).abs().max() > 0.1


# Rotary frequencies.


@pytest.mark.parametrize(
    "name, rope",
    [("phi3", LONGROPE | {"original_max_position_embeddings": 20}), ("llama", DYNAMIC)],
)
def test_frequencies_that_change_with_length_are_refused_where_lengths_reach_them(
    monkeypatch, name, rope
):
    fields = {"rope_parameters": rope, "max_position_embeddings": 20}
    if name == "phi3":
        fields["original_max_position_embeddings"] = 20
    agent, model = load(models.build(name, **fields))
    assert models.compare(model, agent) > 0.1, "25 tokens: they change, and it matters"
    check_rotary(model.config, 20)
    with pytest.raises(ConfigError, match=f"^model.path: .*{rope['rope_type']}.* beyond 20 .*21"):
        check_rotary(model.config, 21)
    monkeypatch.setattr(models, "LENGTHS", (2, 1))  # with two responses and a question between, 20
    agent, model = load(models.build(name, **fields))
    assert models.compare(model, agent) <= CLOSE


def test_other_frequencies_stay():
    for name in ("llama", "gemma3_text", "gpt2", "gemma4"):
        check_rotary(models.build(name).config, 10**6)
