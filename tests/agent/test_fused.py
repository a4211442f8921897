"""Which modules run by the fused ops, and that a model computes what it did."""

import copy

import pytest
import torch
from helpers import make_tiny
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from hiper_fast.agent import fused, tiny
from hiper_fast.config import ModelConfig

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


def build(config=LlamaConfig, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES, **options)).to(dtype)
    for p in model.parameters():
        p.data.normal_(std=0.3)
    return model


def list_fused(model):
    return {name.split(".")[-1] for name, m in model.named_modules() if "forward" in vars(m)}


def read(model):
    """Log-probs of two sequences and the gradients of all parameters."""
    ids = torch.arange(1, 25).view(2, 12)
    result = model(ids).logits.float().log_softmax(-1)
    loss = result.gather(-1, ids[..., None]).sum()
    return result, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


NORMS = {"input_layernorm", "post_attention_layernorm", "norm"}
KINDS = {
    LlamaConfig: NORMS | {"mlp", "self_attn"},
    Qwen2Config: NORMS | {"mlp", "self_attn"},
    Phi3Config: NORMS | {"self_attn"},  # gate and up are one projection
    Gemma2Config: {"self_attn"},  # weights count from 1, gates are of another shape
    CohereConfig: {"mlp"},  # means are taken off, pairs lie side by side
}


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.model_type)
def test_a_model_computes_what_it_did(config):
    model = build(config)
    expected = read(model)
    fused.use(model)
    assert list_fused(model) == KINDS[config]
    torch.testing.assert_close(read(model), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_rounds_as_the_model_does():
    model = build(dtype=torch.bfloat16)
    expected, _ = read(model)
    fused.use(model)
    assert list_fused(model) == KINDS[LlamaConfig]
    torch.testing.assert_close(read(model)[0], expected, rtol=0.02, atol=0.3)


def test_in_double_precision_norms_that_round_to_float32_are_left_alone():
    model = build(dtype=torch.float64)
    expected = read(model)
    fused.use(model)
    assert list_fused(model) == {"mlp", "self_attn"}
    torch.testing.assert_close(read(model), expected, rtol=1e-9, atol=1e-9)


def test_the_tiny_model_is_fused_unless_it_is_compiled():
    agent = make_tiny()
    assert list_fused(agent.model) == NORMS | {"mlp", "self_attn", "q_norm", "k_norm"}
    plain = tiny.build_model(agent.tokenizer, 0)
    assert not list_fused(plain)
    torch.testing.assert_close(read(agent.model), read(plain), rtol=1e-3, atol=1e-4)
    agent = type(agent)(plain, agent.tokenizer, ModelConfig(compile=True), tiny=True)
    assert not list_fused(agent.model)


def test_a_copy_is_fused_and_has_its_own_weights():
    model = build()
    fused.use(model)
    copied = copy.deepcopy(model)
    assert list_fused(copied) == list_fused(model)
    expected = read(model)[0]
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(read(model)[0], expected, rtol=0, atol=0)
    assert not torch.allclose(read(copied)[0], expected)
    plain = build()
    plain.load_state_dict(copied.state_dict())
    torch.testing.assert_close(read(copied)[0], read(plain)[0], rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_read_without(tmp_path):
    model = build()
    fused.use(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not list_fused(again)
    torch.testing.assert_close(read(again)[0], read(model)[0], rtol=1e-4, atol=1e-4)


def test_adapters_in_a_fused_layer_are_trained():
    peft = pytest.importorskip("peft")
    model = build()
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * ("lora_B" in name))
    expected = read(model)
    fused.use(model)
    assert "mlp" in list_fused(model)
    torch.testing.assert_close(read(model), expected, rtol=1e-4, atol=1e-4)
    assert any(gradient.any() for gradient in expected[1])


class Residual(nn.Module):
    """A norm with something beside it."""

    def __init__(self, width=8, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return x + nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class OtherEps(Residual):
    """A norm whose eps is not a number that it holds."""

    def forward(self, x):
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, 2 * self.eps)


class Limited(LlamaMLP):
    def forward(self, x):
        gate = self.gate_proj(x).clamp(max=20)
        return self.down_proj(nn.functional.silu(gate) * self.up_proj(x))


def make_mlp(kind, activation="silu"):
    return kind(LlamaConfig(**SIZES, hidden_act=activation))


@pytest.mark.parametrize(
    "module, known",
    [
        (LlamaRMSNorm(8), True),
        (nn.RMSNorm(8, eps=1e-5), True),
        (GemmaRMSNorm(8), False),
        (nn.LayerNorm(8, bias=False), False),
        (Residual(), False),
        (OtherEps(), False),
        (nn.PReLU(), False),
        (nn.Linear(8, 8, bias=False), False),
        (make_mlp(LlamaMLP), True),
        (make_mlp(LlamaMLP, "gelu"), False),
        (make_mlp(Limited), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_module_is_measured(module, known):
    fused.use(module)
    assert ("forward" in vars(module)) is known


def test_rotations_of_a_part_are_the_models_own(monkeypatch):
    model = build(Phi3Config, partial_rotary_factor=0.5)
    expected = read(model)
    fused.use(model)
    assert "self_attn" in list_fused(model)
    monkeypatch.delattr(fused.ops, "rope")
    torch.testing.assert_close(read(model), expected, rtol=1e-4, atol=1e-4)
