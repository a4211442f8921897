"""The kernels of flash-attn and torch, by stand-ins that hold callers to their rules and compute what they would."""

import copy
import inspect
import re
import sys
import types

import pytest
import torch
import transformers
from helpers import make_tiny
from torch.nn.attention import varlen as torch_varlen

from hiper_fast.agent import attention, varlen
from hiper_fast.agent.agent import run_trunk
from hiper_fast.agent.runtime import describe_computing
from hiper_fast.config import ModelConfig
from hiper_fast.packing import microbatches, prefix_sums, trace

LENGTHS = [7, 1, 12, 5]
COMMON = [0, 0, 1, 4]  # tokens that a sequence has from the one before, where they share
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A recent one to ask about; what was found before, or will be here, is forgotten."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    varlen.choose_kernel.cache_clear()
    yield
    varlen.choose_kernel.cache_clear()


def attend_by_hand(query, key, value, cu_q, cu_k, scale, reach, softcap=0.0):
    """reach: how many tokens before its own a token sees; below 0: all. The last query stands at the last key."""
    outs, shared = [], query.shape[1] // key.shape[1]
    parts = (x.split(cu.diff().tolist()) for x, cu in ((query, cu_q), (key, cu_k), (value, cu_k)))
    for q, k, v in zip(*parts, strict=True):
        before = len(k) - len(q)
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(before)
        seen = seen.triu(before - reach) if reach >= 0 else seen
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        scores = q @ k.repeat_interleave(shared, 0).mT * scale
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append((weights @ v.repeat_interleave(shared, 0)).transpose(0, 1))
    return torch.cat(outs)


def check_states(query, key, value, cu_q, cu_k, max_q, max_k):
    (tokens, heads, size), (keys, kv_heads, _) = query.shape, key.shape
    assert key.shape == value.shape == (keys, kv_heads, size) and heads % kv_heads == 0
    assert size <= 256 and all(x.stride(-1) == 1 for x in (query, key, value))
    for cu, count, longest in ((cu_q, tokens, max_q), (cu_k, keys, max_k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu.shape == cu_q.shape
        assert int(cu[0]) == 0 and int(cu[-1]) == count and longest == int(cu.diff().max())
    assert (cu_q.diff() <= cu_k.diff()).all()


class FlashAttn(types.ModuleType):
    """Of flash-attn 2.8; float64 where it takes half precision."""

    def __init__(self):
        super().__init__("flash_attn")
        self.calls = []

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        check_states(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert causal and dropout_p == 0 and window_size[1] <= 0
        self.calls.append(
            {"kv_heads": k.shape[1], "deterministic": deterministic, "softcap": softcap}
        )
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        cu = cu_seqlens_q, cu_seqlens_k
        return attend_by_hand(q, k, v, *cu, scale, window_size[0], softcap)


@pytest.fixture
def flash(monkeypatch):
    module = FlashAttn()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.fixture
def no_flash(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)


def make_packing(share=False):
    """Of sequences of LENGTHS, with COMMON."""
    whole = prefix_sums(LENGTHS)
    if not share:
        return attention.Packing(whole, whole, None)
    lengths, common = torch.tensor(LENGTHS), torch.tensor(COMMON)
    return attention.Packing(prefix_sums(lengths - common), whole, trace(lengths, common).rows)


def make_states(heads=4, kv_heads=2, size=8, value_size=None, share=False):
    tokens = sum(LENGTHS) - share * sum(COMMON)
    sizes = ((heads, size), (kv_heads, size), (kv_heads, value_size or size))
    return [torch.randn(tokens, *each, dtype=torch.float64, requires_grad=True) for each in sizes]


def call_kernel(kernel, states, packing, window, **options):
    query, key, value = states
    taken = query, packing.take(key), packing.take(value)
    return varlen.call(kernel, *taken, packing.cu, packing.longest, 0.3, window, **options)


def check_equals_groups(choice, window, *, share=False, size=8, **options):
    """A kernel's result and gradients against those of torch's operations."""
    packing, states = make_packing(share), make_states(size=size, share=share)
    out = call_kernel(choice.kernel, states, packing, window, **options)
    expected = attention.attend_in_groups(*states, packing.groups, 0.3, window, **options)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(expected)
    for mine, other in zip(
        *(torch.autograd.grad((x * direction).sum(), states) for x in (out, expected)), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_flash_attn_is_called_by_its_rules(flash, window, softcap, share):
    choice = varlen.choose_kernel("cuda", HALF, 8, softcap is not None)
    assert (choice.name, choice.why, str(choice)) == ("flash_attn", "", "flash_attn")
    capped = {"softcap": softcap} if softcap else {}
    check_equals_groups(choice, window, share=share, **capped)
    assert flash.calls == [{"kv_heads": 2, "deterministic": False, "softcap": softcap or 0.0}]


@pytest.mark.parametrize("warn_only", [False, True])
def test_flash_attn_is_told_to_be_deterministic(flash, warn_only):
    kernel = varlen.choose_kernel("cuda", HALF, 8).kernel
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        call_kernel(kernel, make_states(), make_packing(), None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash.calls[0]["deterministic"]


def test_a_model_reads_packed_sequences_by_flash_attn(flash, monkeypatch):
    config = transformers.MistralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=5, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    plain, ids = copy.deepcopy(model), torch.randint(60, (25,))
    attention.use(model)
    choice = varlen.choose_kernel("cuda", HALF, 8)
    monkeypatch.setattr(varlen, "choose", lambda *args: choice)
    (batch,) = microbatches(ids, prefix_sums(LENGTHS), 100)
    parts = run_trunk(model.base_model, batch).split(batch.cu_seqlens.diff().tolist())
    alone = ids.split(LENGTHS)
    for i, rows in zip(batch.index.tolist(), parts, strict=True):
        expected = plain.base_model(input_ids=alone[i][None]).last_hidden_state[0]
        torch.testing.assert_close(rows, expected)
    assert len(flash.calls) == config.num_hidden_layers


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    check_states(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    assert window_size[1] == 0 and query.shape[-1] % 8 == 0 and key.shape[1] < query.shape[1]
    return attend_by_hand(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0])


def torch_2_13(*args, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa
    return torch_2_11(*args, scale=scale, window_size=window_size)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False): ...


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("sizes", [(8, 8), (20, 20), (12, 8)])
@pytest.mark.parametrize("function", [torch_2_11, torch_2_13])
def test_torchs_kernel_is_called_by_its_versions_rules(
    no_flash, monkeypatch, function, sizes, window, share
):
    """Fewer heads of keys go in as they are, heads of sizes that it refuses padded."""
    monkeypatch.setattr(torch_varlen, "varlen_attn", function)
    choice = varlen.choose_kernel("cuda", HALF, max(sizes))
    assert str(choice) == f"torch's varlen_attn: {varlen.MISSING}"
    if sizes[0] == sizes[1]:
        return check_equals_groups(choice, window, share=share, size=sizes[0])
    packing = make_packing(share)
    query, key, value = make_states(size=sizes[0], value_size=sizes[1], share=share)
    out = call_kernel(choice.kernel, (query, key, value), packing, window)
    reach, taken = window - 1 if window else -1, (packing.take(key), packing.take(value))
    torch.testing.assert_close(out, attend_by_hand(query, *taken, *packing.cu, 0.3, reach))


def test_torchs_kernel_is_called_as_installed(no_flash):
    """By names that it has."""
    known = inspect.signature(torch_varlen.varlen_attn).parameters
    kernel = varlen.choose_kernel("cuda", HALF, 8).kernel
    assert (kernel is not None) == ({"scale", "window_size"} <= set(known))


@pytest.mark.parametrize(
    "kind, why",
    [
        (("cpu", HALF, 64), "scaled_dot_product_attention: .* a GPU's"),
        (("cuda", torch.float32, 64), "scaled_dot_product_attention: .* not float32"),
        (("cuda", HALF, 512), "scaled_dot_product_attention: heads of 512"),
        (("cuda", HALF, 64, False, True), "written-out scores: .* sinks"),
    ],
)
def test_what_no_kernel_can_is_said(flash, kind, why):
    choice = varlen.choose_kernel(*kind)
    assert choice.kernel is None
    assert re.match(why, str(choice))


def test_older_gpus_and_torch_have_no_kernel(no_flash, monkeypatch):
    assert "caps no scores" in varlen.choose_kernel("cuda", HALF, 64, capped=True).why
    monkeypatch.setattr(torch_varlen, "varlen_attn", torch_2_10)
    choice = varlen.choose_kernel("cuda", HALF, 128)
    assert choice.kernel is None and "before torch 2.11" in choice.why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert varlen.choose_kernel("cuda", HALF, 256).why == "the GPU is older than Ampere"


def test_a_broken_flash_attn_is_told_from_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    assert "flash_attn cannot be loaded" in varlen.choose_kernel("cuda", HALF, 64).why


def test_an_agent_tells_what_its_updates_attend_by(flash):
    agent = make_tiny()
    assert [str(choice) for choice in agent.find_attention()] == [
        str(varlen.choose_kernel("cpu", torch.float32, 64))
    ]
    config = transformers.Gemma2Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    agent.model = transformers.AutoModelForCausalLM.from_config(config)
    attention.use(agent.model)
    assert [choice.name for choice in agent.find_attention()] == ["written-out scores"]


@pytest.mark.parametrize(
    "dtype, tiny, precision, warned",
    [
        ("float32", False, "highest", True),
        ("float32", False, "high", False),
        ("float32", True, "highest", False),
        ("bfloat16", False, "highest", False),
    ],
)
def test_a_run_on_a_gpu_is_told_what_makes_it_slow(
    flash, monkeypatch, dtype, tiny, precision, warned
):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    agent = types.SimpleNamespace(
        device=torch.device("cuda"), config=ModelConfig(dtype=dtype), tiny=tiny,
        find_attention=lambda: [varlen.choose_kernel("cuda", getattr(torch, dtype), 64)],
    )  # fmt: skip
    attends, *warnings = describe_computing(agent)
    assert attends.startswith("attention: ") and ("flash_attn" in attends) == (dtype == "bfloat16")
    assert ["--model.dtype bfloat16" in text for text in warnings] == [True] * warned
    agent.device = torch.device("cpu")
    assert describe_computing(agent) == []
