"""benchmarks/gpu.py's figures of an update's gradients: a random Qwen2.5-1.5B on packed and padded turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import policy_update
import torch
from gpu_timing import attempt, count_launches, share_of_matmul
from policy_update import LAYOUTS, Update, draw_turns, packed
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from hiper_fast.agent import attention, fused
from hiper_fast.agent.footprint import find_architecture, measure_model
from hiper_fast.plan import count_products

MODEL = "Qwen/Qwen2.5-1.5B"
MICROBATCH = 10  # turns that fill one
# Dense bfloat16 products by the data sheets, TFLOP/s.
PEAKS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}


class Size(NamedTuple):
    model: str  # empty: a tiny one
    turns: policy_update.Size


SIZES = {
    "full": Size(MODEL, policy_update.Size(64, 2048, 512, 8192, 1536, 28, 151_936)),
    "tiny": Size("", policy_update.SIZES["tiny"]),
}


def run(name: str, device: str, ceiling: dict[str, float]) -> dict[str, object]:
    """Seconds, tokens and model FLOP utilisation of the layouts, of one model and the same turns."""
    size = SIZES[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    result = {"turns": size.turns.turns}
    one = dataclasses.replace(size.turns, turns=MICROBATCH)
    for layout, function in LAYOUTS.items():
        model = build_model(size, device, dtype)
        if layout != "padded":
            attention.use(model)
            fused.use(model)
        x = draw_turns(model, size.turns, torch.float32)
        result[layout] = attempt(
            lambda x=x, function=function: time_layout(x, size, function, device, ceiling)
        )
        if layout == "packed":
            x = draw_turns(model, one, torch.float32)
            launched = attempt(lambda x=x: count_launches(lambda: packed(x, one), device))
            result["launches_a_microbatch"] = launched
        del model, x
    return result


def build_model(size: Size, device: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    turns = size.turns
    config = Qwen2Config(
        vocab_size=turns.vocabulary, hidden_size=turns.hidden, intermediate_size=4 * turns.hidden,
        num_hidden_layers=turns.layers, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    if size.model:
        config = find_architecture(size.model, None, True)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def time_layout(
    x: Update, size: Size, function: Callable, device: str, ceiling: dict[str, float]
) -> dict[str, object]:
    """The second of two runs: the first compiles."""
    for _ in range(2):
        x.model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        loss, computed = function(x, size.turns)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    found = {"seconds": seconds, "computed_tokens": computed, "loss": loss}
    teraflops = count_flops(x, size) / seconds / 1e12
    found |= {"teraflops": teraflops} | share_of_matmul(teraflops, ceiling)
    peak = find_peak(device)
    return found | ({"mfu": teraflops / peak} if peak else {})


def count_flops(x: Update, size: Size) -> float:
    """What the update asks for, however it is laid out: forward and backward of real tokens, the head on responses."""
    if not size.model:
        count = sum(p.numel() for p in x.model.parameters())
        return 6.0 * count * (x.t.prompt_ids.numel() + x.t.response_ids.numel())
    footprint = measure_model(size.model, None)
    responses = x.t.response_ids.numel()
    tokens = x.t.prompt_ids.numel() + responses
    products = count_products(footprint, tokens / size.turns.turns) * tokens
    return 6.0 * (products + footprint.head * responses)


def find_peak(device: str) -> float | None:
    """TFLOP/s of this GPU's data sheet, if it is a known one."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for known, peak in PEAKS.items() if known in name), None)
