"""benchmarks/gpu.py's figures of a step's ops, a model's layers and packed attention, beside torch and peers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import token_draws
import torch
from gpu_timing import Case, assert_near, assert_near_in_norm, differentiate
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from hiper_fast import bench, ops
from hiper_fast.agent import attention, varlen
from hiper_fast.ops._ppo import ppo_terms

HEADS, KV_HEADS, HEAD_SIZE, EPS = 12, 2, 128, 1e-6  # of Qwen2.5-1.5B


def normalised_credit(x: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """(advantages, loss_mask) of the tokens, each level normalised over the turns that train it, by single ops."""
    hae = bench.run_hae(ops, x)
    low, high, switch = (find_carried(x.roles, bit, x.cu_tokens) for bit in (1, 2, 4))
    hae = hae._replace(
        advantages_low=ops.normalize(hae.advantages_low, low),
        advantages_high=ops.normalize(hae.advantages_high, high & hae.boundary),
        advantages_switch=ops.normalize(hae.advantages_switch, switch),
    )
    return ops.scatter_advantages(hae, x.roles, x.cu_tokens)


def fused_credit(x: SimpleNamespace) -> tuple[Tensor, Tensor]:
    return ops.normalize_and_scatter(bench.run_hae(ops, x), x.roles, x.cu_tokens)[:2]


def find_carried(roles: Tensor, bit: int, cu_tokens: Tensor) -> Tensor:
    """bool [turns]: the turn has a token of that role."""
    turns = len(cu_tokens) - 1
    turn = torch.arange(turns, device=roles.device).repeat_interleave(cu_tokens.diff())
    return torch.zeros(turns, dtype=torch.bool, device=roles.device).index_fill_(
        0, turn[(roles & bit) > 0], True
    )


def step_cases(size: bench.Size, device: str) -> list[Case]:
    """Roles, scans, scatter, the engine's attention and the policy loss over one step's turns and tokens."""
    x, cpu = bench.make_inputs(size, device), bench.make_inputs(size, "cpu")
    turns, tokens = len(x.rewards), len(x.token_ids)
    calls, calls_on_cpu = bench.make_calls(x), bench.make_calls(cpu)

    def ours(name: str, least_bytes: int = 0) -> Case:
        def check():
            assert_near(calls[name](ops), calls_on_cpu[name](ops))

        return Case(name, "ours", lambda: calls[name](ops), check, bytes=least_bytes, graph=True)

    def peer(name: str, which: str, call: Callable, least_bytes: int) -> Case:
        def check():
            assert_near(call(), calls_on_cpu[name](ops))

        return Case(name, which, call, check, least_bytes, graph=True, compared_with=name)

    pools, compiled = x.key_pool.nbytes + x.value_pool.nbytes, torch.compile(ppo_terms)
    return [
        ours("find_roles"),
        ours("hae", 12 * 4 * turns),
        ours("gae", 4 * 4 * turns),
        peer("gae", "torch", lambda: loop_gae(x), 4 * 4 * turns),
        ours("scatter_advantages", 6 * tokens),
        peer("scatter_advantages", "torch", lambda: scatter_by_masks(x), 6 * tokens),
        Case(
            "hae + normalise + scatter", "ours", lambda: fused_credit(x),
            lambda: assert_near(fused_credit(x), normalised_credit(cpu)),
            bytes=10 * 4 * turns + 6 * tokens, graph=True,
        ),
        ours("paged_attention", pools),
        peer("paged_attention", "torch", lambda: attend_to_gathered(x), pools),
        ours("ppo_loss", 27 * tokens),
        peer("ppo_loss", "torch", lambda: torch_ppo(x, ppo_terms), 27 * tokens),
        peer("ppo_loss", "torch.compile", lambda: torch_ppo(x, compiled), 27 * tokens),
        ours("value_loss", 17 * turns),
    ]  # fmt: skip


def loop_gae(x: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """A step of torch operations for each turn, of trajectories of one length."""
    shape = len(x.terminated), -1
    rewards, values = x.rewards.view(shape), x.values_low.view(shape)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas, carried = rewards + bench.GAMMA * following - values, torch.zeros_like(rewards[:, 0])
    found = []
    for delta in deltas.unbind(1)[::-1]:
        carried = delta + bench.GAMMA * 0.9 * carried
        found.append(carried)
    advantages = torch.stack(found[::-1], dim=1)
    return advantages.flatten(), (advantages + values).flatten()


def scatter_by_masks(x: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Each level gathered to the tokens, and added where the token has its role."""
    places = torch.arange(len(x.roles), device=x.roles.device, dtype=torch.int32)
    turn = torch.searchsorted(x.cu_tokens[1:], places, right=True)
    roles = x.roles & torch.where(x.levels.boundary[turn], 7, 5).to(x.roles.dtype)
    levels = x.levels.advantages_low, x.levels.advantages_high, x.levels.advantages_switch
    parts = [torch.where((roles & 1 << i) > 0, x[turn], 0.0) for i, x in enumerate(levels)]
    return sum(parts), roles > 0


def attend_to_gathered(x: SimpleNamespace) -> Tensor:
    """Blocks gathered into sequences, of one length, and scaled_dot_product_attention."""
    length = x.blocks.shape[1] * x.key_pool.shape[1]
    key, value = (p[x.blocks].flatten(1, 2).transpose(1, 2) for p in (x.key_pool, x.value_pool))
    seen = (torch.arange(length, device=key.device) < x.lengths[:, None])[:, None, None]
    return scaled_dot_product_attention(x.asked[:, :, None], key, value, attn_mask=seen)[:, :, 0]


def torch_ppo(x: SimpleNamespace, terms: Callable) -> tuple[Tensor, ...]:
    loss = terms(
        x.logprobs, x.old_logprobs, x.advantages, x.loss_mask, x.ref_logprobs, x.entropy,
        0.2, 0.2, 3.0, 0.01, 0.001, None, False,
    )[0]  # fmt: skip
    return loss, *torch.autograd.grad(loss, (x.logprobs, x.entropy))


def sample_cases(rows: int, vocabulary: int, device: str) -> list[Case]:
    """A token of each running response, of the head's logits as it makes them."""
    g, dtype = torch.Generator(device).manual_seed(0), half_on_gpu(device)
    logits = (3 * torch.randn(rows, vocabulary, generator=g, device=device)).to(dtype)
    uniform = torch.rand(rows, generator=g, device=device, dtype=torch.float64)
    given = logits, uniform, torch.ones(rows, device=device)
    compiled = torch.compile(token_draws.invert)
    calls = {
        "ours": lambda: ops.sample(*given),
        "torch": lambda: token_draws.invert(*given),
        "torch.compile": lambda: compiled(*given),
        "torch.multinomial": lambda: token_draws.multinomial(given[0], given[2]),
    }
    return [
        Case(
            "sample", which, call, lambda call=call: token_draws.check(call(), given[0], given[2]),
            logits.nbytes, graph=True, compared_with="" if which == "ours" else "sample",
        )
        for which, call in calls.items()
    ]  # fmt: skip


def layer_cases(tokens: int, width: int, device: str) -> list[Case]:
    """Norm, gated layer and rotation of one microbatch, forward and backward."""
    g, dtype = torch.Generator(device).manual_seed(0), half_on_gpu(device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(dtype)

    inner = width * 35 // 6
    x, weight, gate, up = draw(tokens, width), draw(width), draw(tokens, inner), draw(tokens, inner)
    turned = [
        draw(1, tokens, heads, HEAD_SIZE).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KV_HEADS)
    ]
    angles = draw(1, tokens, HEAD_SIZE // 2).float().repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    inputs = {"rms_norm": (x, weight), "swiglu": (gate, up), "rope": turned}
    grads = {"rms_norm": x.clone(), "swiglu": gate.clone(), "rope": [t.detach() for t in turned]}
    functions = list_layers(cos, sin)
    moved = {"rms_norm": 5 * x.nbytes, "swiglu": 8 * gate.nbytes}
    moved["rope"] = 4 * sum(t.nbytes for t in turned)

    def call(name: str, which: str) -> Callable:
        leaves = [t.requires_grad_() for t in inputs[name]]
        return lambda: differentiate(functions[name][which], grads[name], *leaves)

    def check(name: str, which: str) -> Callable:
        return lambda: assert_near_in_norm(call(name, which)(), call(name, "torch")())

    return [
        Case(
            name, which, call(name, which), check(name, which), moved[name], graph=True,
            compared_with="" if which == "ours" else name,
        )
        for name, implementations in functions.items()
        for which in implementations
    ]  # fmt: skip


def half_on_gpu(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def list_layers(cos: Tensor, sin: Tensor) -> dict[str, dict[str, Callable]]:
    """Layer -> implementation -> function."""

    def norm(x, weight):
        return rms_norm(x, weight.shape, weight, EPS)

    def gated(gate, up):
        return silu(gate) * up

    def rotate(query, key):
        def turn(x):
            first, second = x.chunk(2, dim=-1)
            return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

        return turn(query), turn(key)

    def liger_norm(x, weight):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)

    def liger_gated(gate, up):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)

    def liger_rotate(query, key):
        from liger_kernel.ops.rope import LigerRopeFunction

        # It writes into query and key.
        return LigerRopeFunction.apply(query.clone(), key.clone(), cos, sin)

    torchs = {"rms_norm": norm, "swiglu": gated, "rope": rotate}
    ours = {
        "rms_norm": lambda x, weight: ops.rms_norm(x, weight, EPS),
        "swiglu": ops.swiglu,
        "rope": lambda query, key: ops.rope(query, key, cos, sin),
    }
    ligers = {"rms_norm": liger_norm, "swiglu": liger_gated, "rope": liger_rotate}
    return {
        name: {
            "ours": ours[name],
            "torch": function,
            "torch.compile": torch.compile(function),
            "liger": ligers[name],
        }
        for name, function in torchs.items()
    }


def attention_cases(sequences: int, length: int, device: str) -> list[Case]:
    """Causal attention of packed sequences, forward and backward: both kernels', and by groups of one length."""
    g, dtype = torch.Generator(device).manual_seed(0), half_on_gpu(device)
    shapes = [(sequences * length, heads, HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    leaves = [torch.randn(s, generator=g, device=device).to(dtype) for s in shapes]
    leaves = [x.requires_grad_() for x in leaves]
    grad, scale = leaves[0].detach(), HEAD_SIZE**-0.5
    cu = torch.arange(sequences + 1, dtype=torch.int32, device=device) * length
    groups = attention.group_lengths(cu)

    def in_groups():
        def attend(*states):
            return attention.attend_in_groups(*states, groups, scale, None)

        return differentiate(attend, grad, *leaves)

    def by(find: Callable) -> Callable:
        def run():
            kernel, why = find()
            if kernel is None:
                raise RuntimeError(why)

            def attend(*states):
                return varlen.call(kernel, *states, (cu, cu), (length, length), scale, None)

            return differentiate(attend, grad, *leaves)

        return run

    calls = {"torch's varlen": by(varlen.find_varlen), "flash-attn": by(varlen.find_flash)}
    calls["torch in groups"] = in_groups
    # Of each pair of a query and a key it sees: 2 products forward, 5 backward.
    flops = 7 * 2 * HEADS * HEAD_SIZE * sequences * length * length // 2
    return [
        Case(
            "packed attention", name, call,
            lambda call=call: assert_near_in_norm(call(), in_groups()), flops=flops,
        )
        for name, call in calls.items()
    ]  # fmt: skip
