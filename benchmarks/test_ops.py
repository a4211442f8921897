"""Each op beside what one would use in its place, on one thread, and only after the two were found to agree.

Beside the time stand the bytes that must at least be moved (inputs read once, results written once) or the operations
that must be made, and what this machine reached in the same run when copying and when multiplying matrices, so that
`benchmarks/report.py` can tell shares of the roofline. HIPER_FAST_BENCH=tiny makes it small enough to test the
benchmarks themselves. On a machine with other work, --benchmark-timer=time.process_time leaves that out.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hiper_fast import bench, ops

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this one
import peak_memory
import token_draws
from peak_memory import torch_ppo_loss

TINY = bench.choose_size() == "tiny"
STEPS = (
    {"1,280 x 290": (128, 10, 290), "6,400 x 512": (128, 50, 512)}
    if not TINY
    else {"20 x 40": (4, 5, 40)}
)
ROWS = (
    {"128 x 50": (128, 50), "1,024 x 50": (1024, 50), "8,192 x 128": (8192, 128)}
    if not TINY
    else {"4 x 9": (4, 9)}
)
COUNTS = {"6,400": 6_400, "1,856,000": 1_856_000} if not TINY else {"50": 50}
HEADS = {"1,024 x 128 x 4,096": (1024, 128, 4096), "256 x 1,536 x 151,936": (256, 1536, 151_936)}
HEADS = HEADS if not TINY else {"5 x 8 x 50": (5, 8, 50)}
# Sequences, the queries of each and the fewest tokens behind them (the most: 1,500 in all), heads, heads of keys, d.
ATTENTION = {
    "decoding, 2 heads of 64": (128, 1, 60, 2, 2, 64),
    "decoding, 12 heads, 2 of keys, of 128": (128, 1, 60, 12, 2, 128),
    "400 tokens, 2 heads of 64": (8, 400, 0, 2, 2, 64),
    "700 tokens, 12 heads, 2 of keys, of 128": (4, 700, 0, 12, 2, 128),
}
ATTENTION = ATTENTION if not TINY else {"tiny": (3, 2, 5, 4, 2, 8)}

TOKENS = {"8,192 x 128": (8192, 128), "2,048 x 1,536": (2048, 1536)}
TOKENS = TOKENS if not TINY else {"5 x 64": (5, 64)}
LOGITS = {"64 x 4,096": (64, 4096), "256 x 1,000": (256, 1000), "32 x 151,936": (32, 151_936)}
LOGITS = LOGITS if not TINY else {"5 x 50": (5, 50)}
HEAD = 64  # dimensions of an attention head


@dataclass
class Case:
    calls: dict[str, Callable[[], object]]  # by whom; "hiper_fast" is the op
    bytes: int = 0
    operations: int = 0
    rounds: int = 20
    rtol: float = 1e-4
    check: Callable[[object], None] | None = None  # of results that need not be the op's


def step_inputs(size: str):
    return bench.make_inputs(bench.Size(*STEPS[size], 8, 8, 50))


def find_roles(size: str) -> Case:
    x = step_inputs(size)
    calls = {"hiper_fast": lambda: ops.find_roles(x.token_ids, x.cu_tokens, x.pieces)}
    if len(x.token_ids) < 1_000_000:
        calls["reference"] = lambda: ops.reference.find_roles(x.token_ids, x.cu_tokens, x.pieces)
    return Case(calls, bytes=x.token_ids.nbytes + len(x.token_ids))


def hae(size: str) -> Case:
    x = step_inputs(size)
    calls = {
        "hiper_fast": lambda: bench.run_hae(ops, x),
        "reference": lambda: bench.run_hae(ops.reference, x),
    }
    return Case(calls, bytes=len(x.rewards) * (4 * 4 + 1 + 6 * 4 + 1))


def scatter_advantages(size: str) -> Case:
    x = step_inputs(size)
    calls = {"hiper_fast": lambda: ops.scatter_advantages(x.levels, x.roles, x.cu_tokens)}
    # A gather per role, as one would write it in torch.
    turn = torch.arange(len(x.rewards)).repeat_interleave(x.cu_tokens.diff())

    def gathers():
        high = torch.where(x.levels.boundary, x.levels.advantages_high, 0)
        columns = x.levels.advantages_low, high, x.levels.advantages_switch
        carries = [(x.roles & bit) > 0 for bit in (1, 2, 4)]
        advantages = sum(torch.where(c, a[turn], 0) for c, a in zip(carries, columns, strict=True))
        return advantages, carries[0] | carries[1] & x.levels.boundary[turn] | carries[2]

    return Case(calls | {"torch": gathers}, bytes=len(x.roles) * (1 + 4 + 1))


def normalize_and_scatter(size: str) -> Case:
    x = step_inputs(size)
    turn = torch.arange(len(x.rewards)).repeat_interleave(x.cu_tokens.diff())

    def separately():
        """Which turns carry which role in torch, then an op for each step."""
        carried = [
            torch.zeros_like(x.switch).index_fill_(0, turn[(x.roles & bit) > 0], True)
            for bit in (1, 2, 4)
        ]
        levels = x.levels._replace(
            advantages_low=ops.normalize(x.levels.advantages_low, carried[0]),
            advantages_high=ops.normalize(x.levels.advantages_high, carried[1] & x.levels.boundary),
            advantages_switch=ops.normalize(x.levels.advantages_switch, carried[2]),
        )
        return ops.scatter_advantages(levels, x.roles, x.cu_tokens)

    calls = {"hiper_fast": lambda: ops.normalize_and_scatter(x.levels, x.roles, x.cu_tokens)[:2]}
    return Case(calls | {"separate ops": separately}, bytes=len(x.roles) * (1 + 4 + 1))


def pipeline(size: str) -> Case:
    """From token ids and values to each token's advantage: find_roles, hae, scatter_advantages."""
    x = step_inputs(size)

    def run(which):
        roles, switch, _, _ = which.find_roles(x.token_ids, x.cu_tokens, x.pieces)
        levels = which.hae(x.rewards, x.values_low, x.values_high, switch, x.terminated, x.cu_turns)
        return which.scatter_advantages(levels, roles, x.cu_tokens)

    calls = {"hiper_fast": lambda: run(ops)}
    if len(x.token_ids) < 1_000_000:
        calls["reference"] = lambda: run(ops.reference)
    return Case(calls, bytes=x.token_ids.nbytes + len(x.token_ids) * (1 + 1 + 4 + 1))


def gae(size: str) -> Case:
    n, length = ROWS[size]
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, n, length, generator=g)
    terminated, bootstrap = torch.rand(n, generator=g) < 0.5, torch.randn(n, generator=g)
    cu_turns = torch.arange(n + 1, dtype=torch.int32) * length
    flat = rewards.reshape(-1), values.reshape(-1), terminated, cu_turns
    after = torch.where(terminated, 0.0, bootstrap)

    def loop():
        """The usual loop over time, all trajectories at once."""
        advantages, carried, following = torch.empty_like(rewards), 0.0, after
        for t in reversed(range(length)):
            carried = rewards[:, t] + 0.99 * following - values[:, t] + 0.99 * 0.95 * carried
            advantages[:, t] = carried
            following = values[:, t]
        return advantages.flatten(), (advantages + values).flatten()

    calls = {
        "hiper_fast": lambda: ops.gae(*flat, bootstrap=bootstrap, gamma=0.99, lambda_=0.95),
        "torch": loop,
        "torch.compile": compiled(loop),
    }
    next_values = torch.cat([values[:, 1:], after[:, None]], 1)[..., None]
    done, terminal = torch.zeros(2, n, length, 1, dtype=torch.bool)
    done[:, -1] = True

    def torchrl():
        vectorised = peer("torchrl.objectives.value.functional").vec_generalized_advantage_estimate
        columns = values[..., None], next_values, rewards[..., None]
        return tuple(
            x.flatten() for x in vectorised(0.99, 0.95, *columns, done=done, terminated=terminal)
        )

    ends_with_bootstrap = rewards.clone()
    ends_with_bootstrap[:, -1] += 0.99 * after
    every = torch.ones_like(rewards)

    def verl():
        """It bootstraps nothing and whitens its advantages, so these are taken from the returns."""
        estimate = peer("verl.trainer.ppo.core_algos").compute_gae_advantage_return
        returns = estimate(ends_with_bootstrap, values, every, 0.99, 0.95)[1]
        return (returns - values).flatten(), returns.flatten()

    calls |= {"torchrl": torchrl, "verl": verl}
    return Case(calls, bytes=4 * 4 * n * length)


def normalize(size: str) -> Case:
    count = COUNTS[size]
    g = torch.Generator().manual_seed(0)
    values, mask = torch.randn(count, generator=g), torch.rand(count, generator=g) < 0.6

    def usual():
        chosen = values[mask]
        return torch.where(mask, (values - chosen.mean()) / (chosen.std(correction=0) + 1e-8), 0)

    calls = {"hiper_fast": lambda: ops.normalize(values, mask), "torch": usual}
    return Case(calls, bytes=count * (4 + 1 + 4))


def ppo_loss(size: str) -> Case:
    count = COUNTS[size]
    g = torch.Generator().manual_seed(0)
    old, advantages, ref, entropy = torch.randn(4, count, generator=g)
    logprobs = (old + 0.2 * torch.randn(count, generator=g)).requires_grad_()
    ref = (old + 0.1 * ref).requires_grad_(False)
    entropy.requires_grad_()
    mask = torch.ones(count, dtype=torch.bool)

    def run(loss):
        return lambda: bench.add_gradients(loss(), logprobs, entropy)

    usual = functools.partial(torch_ppo_loss, logprobs, old, advantages, ref, entropy)
    return Case(
        {
            "hiper_fast": run(
                lambda: ops.ppo_loss(
                    logprobs, old, advantages, mask, ref_logprobs=ref, entropy=entropy
                )
            ),
            "torch": run(usual),
            "torch.compile": run(compiled(usual)),
        },
        bytes=count * (5 * 4 + 1 + 2 * 4),
    )


def value_loss(size: str) -> Case:
    count = COUNTS[size]
    g = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, count, generator=g)
    values.requires_grad_()
    mask = torch.rand(count, generator=g) < 0.7

    def usual():
        clipped = values.clamp(old - 0.5, old + 0.5)
        worst = torch.maximum((values - returns).square(), (clipped - returns).square())
        return torch.where(mask, worst, 0).sum() / mask.sum()

    def run(loss):
        return lambda: bench.add_gradients(loss(), values)

    return Case(
        {
            "hiper_fast": run(lambda: ops.value_loss(values, old, returns, mask)),
            "torch": run(usual),
            "torch.compile": run(compiled(usual)),
        },
        bytes=count * (3 * 4 + 1 + 4),
    )


def linear_logprobs(size: str) -> Case:
    """Log-probs without gradient, as old and reference log-probs are made."""
    n, h, v = HEADS[size]
    x = peak_memory.head_inputs(n, h, v)

    @torch.no_grad()
    def usual():
        return (
            torch.log_softmax(x.hidden @ x.weight.T, dim=1).gather(1, x.targets[:, None]).squeeze(1)
        )

    @torch.no_grad()
    def cut_cross_entropy():
        """What it has for a CPU: logits made whole, compiled."""
        linear_cross_entropy = peer("cut_cross_entropy").linear_cross_entropy
        return -linear_cross_entropy(
            x.hidden, x.weight, x.targets, reduction="none", impl="torch_compile"
        )

    calls = {
        "hiper_fast": torch.no_grad()(lambda: ops.linear_logprobs(x.hidden, x.weight, x.targets)),
        "torch": usual,
        "torch.compile": compiled(usual),
        "liger-kernel": torch.no_grad()(lambda: liger(x)[0]),
        "cut-cross-entropy": unless_it_cannot_compile(cut_cross_entropy),
    }
    return Case(calls, operations=2 * n * h * v, rounds=5 if n * h * v < 1e9 else 2)


def linear_ppo(size: str) -> Case:
    n, h, v = HEADS[size]
    x = peak_memory.head_inputs(n, h, v)

    def run(loss):
        return lambda: bench.add_gradients(loss(), x.hidden, x.weight)

    def liger_loss():
        logprobs, entropy = liger(x)
        return torch_ppo_loss(logprobs, x.old, x.advantages, x.ref, entropy)

    calls = {
        "hiper_fast": run(functools.partial(peak_memory.loss, "op", x)),
        "torch": run(functools.partial(peak_memory.loss, "materialised", x)),
        "torch.compile": run(compiled(functools.partial(peak_memory.loss, "materialised", x))),
        "liger-kernel": run(liger_loss),
    }
    return Case(calls, operations=3 * 2 * n * h * v, rounds=5 if n * h * v < 1e9 else 2, rtol=1e-3)


def paged_attention(size: str) -> Case:
    """Decoded tokens, each behind another number of tokens, or whole prompts; blocks of 16 in any order."""
    sequences, own, past, heads, kv_heads, d = ATTENTION[size]
    g = torch.Generator().manual_seed(0)
    more = torch.randint(past, 1500 if past else 1, (sequences,), generator=g)
    lengths = more + own
    counts = ((lengths + 15) // 16).tolist()
    parts = torch.randperm(sum(counts), generator=g).split(counts)
    blocks = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).int()
    query = torch.randn(sequences * own, heads, d, generator=g)
    keys, values = torch.randn(2, sum(counts), 16, kv_heads, d, generator=g)
    cu_query = torch.arange(sequences + 1, dtype=torch.int32) * own
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    queries = [q.transpose(0, 1) for q in query.split(own)]  # [heads, own, d]
    masks = [torch.ones(own, n, dtype=torch.bool).tril(n - own) for n in lengths]

    def gather():
        return [
            [pool[part].flatten(0, 1)[:n].transpose(0, 1) for pool in (keys, values)]
            for part, n in zip(parts, lengths.tolist(), strict=True)
        ]

    def one_by_one(states):
        given = zip(queries, states, masks, strict=True)
        outs = [attend(q[None], k[None], v[None], attn_mask=m)[0] for q, (k, v), m in given]
        return torch.cat([out.transpose(0, 1) for out in outs])

    gathered = gather()
    padded = [
        torch.nn.utils.rnn.pad_sequence([s[i].transpose(0, 1) for s in gathered], batch_first=True)
        for i in range(2)
    ]  # [sequences, longest, kv_heads, d]
    longest = max(lengths.tolist())
    mask = torch.stack([torch.nn.functional.pad(m, (0, longest - m.shape[1])) for m in masks])
    stacked = torch.stack(queries)

    def all_at_once():
        states = (x.transpose(1, 2) for x in padded)
        return attend(stacked, *states, attn_mask=mask[:, None]).transpose(1, 2).flatten(0, 1)

    calls = {
        "hiper_fast": lambda: ops.paged_attention(
            query, keys, values, blocks, cu_query, lengths.int()
        ),
        "torch": lambda: one_by_one(gather()),
        "torch, gathered before": lambda: one_by_one(gathered),
        "torch, padded before": all_at_once,
    }
    seen = sum(int(m.sum()) for m in masks)
    read = 2 * int(lengths.sum()) * kv_heads * d * 4 if own == 1 else 0
    return Case(calls, bytes=read, operations=0 if read else 4 * seen * heads * d)


def sample(size: str) -> Case:
    """Logits at temperature 1, as most rollouts have it."""
    n, v = LOGITS[size]
    g = torch.Generator().manual_seed(0)
    logits, temperature = 3 * torch.randn(n, v, generator=g), torch.ones(n)
    uniform = torch.rand(n, generator=g, dtype=torch.float64)
    usual = functools.partial(token_draws.invert, logits, uniform, temperature)
    calls = {
        "hiper_fast": lambda: ops.sample(logits, uniform, temperature),
        "torch": usual,
        "torch.compile": compiled(usual),
        "torch.multinomial": lambda: token_draws.multinomial(logits, temperature),
    }
    check = functools.partial(token_draws.check, logits=logits, temperature=temperature)
    return Case(calls, bytes=logits.nbytes + n * (8 + 4 + 8 + 4), check=check)


def layer(op: Callable, usual: Callable, inputs: list[torch.Tensor], moved: int) -> Case:
    """A layer's op with the gradients of `inputs`, beside the same in torch; `moved`: floats read and written."""
    op, usual = functools.partial(op, *inputs), functools.partial(usual, *inputs)
    grads = [torch.randn_like(out) for out in as_list(usual())]

    def run(function):
        def call():
            outs = as_list(function())
            return *outs, *torch.autograd.grad(outs, inputs, grads)

        return call

    calls = {"hiper_fast": run(op), "torch": run(usual), "torch.compile": run(compiled(usual))}
    return Case(calls, bytes=4 * moved)


def as_list(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def rms_norm(size: str) -> Case:
    n, h = TOKENS[size]
    inputs = [torch.randn(n, h).requires_grad_(), torch.randn(h).requires_grad_()]

    def usual(x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    return layer(ops.rms_norm, usual, inputs, moved=5 * n * h)


def swiglu(size: str) -> Case:
    n, h = TOKENS[size]
    inputs = [torch.randn(n, 2 * h).requires_grad_() for _ in range(2)]

    def usual(gate, up):
        return torch.nn.functional.silu(gate) * up

    return layer(ops.swiglu, usual, inputs, moved=8 * n * 2 * h)


def rope(size: str) -> Case:
    """query and key as a layer has them: [1, tokens, heads, d] transposed."""
    n, h = TOKENS[size]
    states = (torch.randn(1, n, h // HEAD, HEAD).transpose(1, 2) for _ in range(2))
    cos, sin = torch.randn(2, 1, n, HEAD)

    def rotate_half(x):
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)

    def usual(query, key):
        return tuple(x * cos[:, None] + rotate_half(x) * sin[:, None] for x in (query, key))

    def fused(query, key):
        return ops.rope(query, key, cos, sin)

    return layer(fused, usual, [x.requires_grad_() for x in states], moved=8 * n * h + 4 * n * HEAD)


def liger(x) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropy by what Liger's fused head runs where its GPU kernels cannot."""
    head = peer(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    )._FusedLinearPPOFallbackFunction
    loss, entropy = head.apply(x.hidden, x.weight, x.targets, 1.0, -100, True)
    return -loss, entropy


def peer(module: str):
    """The module; skips where it is not installed."""
    return pytest.importorskip(
        module, reason=f"{module.split('.')[0]} is not installed", exc_type=ImportError
    )


def compiled(function: Callable) -> Callable:
    return unless_it_cannot_compile(torch.compile(function))


def unless_it_cannot_compile(function: Callable) -> Callable:
    """What compiles itself on its first call; skips where there is no compiler to compile with."""

    def run():
        if TINY:
            pytest.skip("HIPER_FAST_BENCH=tiny: to compile takes longer than all else")
        try:
            return function()
        except Exception as error:
            if "compiler" in str(error).lower():
                pytest.skip(f"torch.compile finds no C++ compiler ({str(error).splitlines()[0]})")
            raise

    return run


SIZES = {
    find_roles: STEPS,
    hae: STEPS,
    scatter_advantages: STEPS,
    pipeline: STEPS,
    gae: ROWS,
    normalize: COUNTS,
}
SIZES |= {
    normalize_and_scatter: STEPS,
    ppo_loss: COUNTS,
    value_loss: COUNTS,
    linear_logprobs: HEADS,
    linear_ppo: HEADS,
    paged_attention: ATTENTION,
    sample: LOGITS,
    rms_norm: TOKENS,
    rope: TOKENS,
    swiglu: TOKENS,
}
PEERS = {
    find_roles: ["reference"],
    hae: ["reference"],
    pipeline: ["reference"],
    scatter_advantages: ["torch"],
}
PEERS |= {normalize: ["torch"], gae: ["torch", "torch.compile", "torchrl", "verl"]}
PEERS |= {
    normalize_and_scatter: ["separate ops"],
    linear_ppo: ["torch", "torch.compile", "liger-kernel"],
}
PEERS |= {paged_attention: ["torch", "torch, gathered before", "torch, padded before"]}
PEERS |= {sample: ["torch", "torch.compile", "torch.multinomial"]}
PEERS |= {linear_logprobs: ["torch", "torch.compile", "liger-kernel", "cut-cross-entropy"]}
RUNS = [
    pytest.param(make, size, by, id=f"{make.__name__}-{size}-{by}".replace(", ", ""))
    for make, sizes in SIZES.items()
    for size in sizes
    for by in ("hiper_fast", *PEERS.get(make, ["torch", "torch.compile"]))
]


# What the ops were built to reach, by the best times of (op, size, by) in this run.
TARGETS = {
    "find_roles, hae and scatter_advantages of 6,400 turns of 512 tokens: at most 12 ms": (
        lambda t: t["pipeline", "6,400 x 512", "hiper_fast"] <= 12e-3
    ),
    "gae of 8,192 x 128: at most 0.6 ns a turn": (
        lambda t: t["gae", "8,192 x 128", "hiper_fast"] <= 0.6e-9 * 8192 * 128
    ),
    "gae of 8,192 x 128: at least 100 times as fast as torchrl's": (
        lambda t: 100 * t["gae", "8,192 x 128", "hiper_fast"] <= t["gae", "8,192 x 128", "torchrl"]
    ),
    "linear_ppo of 256 x 1,536 x 151,936: no slower than materialised logits in torch": (
        lambda t: (
            t["linear_ppo", "256 x 1,536 x 151,936", "hiper_fast"]
            <= t["linear_ppo", "256 x 1,536 x 151,936", "torch"]
        )
    ),
}


@functools.lru_cache(maxsize=1)
def case(make: Callable[[str], Case], size: str) -> tuple[Case, object]:
    """The case and what the op gives for it."""
    made = make(size)
    return made, made.calls["hiper_fast"]()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def best_times() -> dict[tuple[str, str, str], float]:
    """(op, size, by) -> seconds, of what has run."""
    return {}


@pytest.fixture(scope="session")
def roofline() -> dict[str, float]:
    """Bytes and operations a second on one thread: a copy between buffers beyond the caches, a matrix product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source, square = torch.ones(2**16 if TINY else 2**25), torch.ones(*[64 if TINY else 1024] * 2)
    target, product = torch.empty_like(source), torch.empty_like(square)
    rates = {
        "bytes": 2 * source.nbytes / best(lambda: target.copy_(source)),
        "operations": 2 * len(square) ** 3 / best(lambda: torch.mm(square, square, out=product)),
    }
    torch.set_num_threads(threads)
    return rates


def best(run: Callable[[], object], rounds: int = 5) -> float:
    def once():
        began = time.process_time()
        run()
        return time.process_time() - began

    return min(once() for _ in range(rounds + 1))


def assert_agree(result, expected, rtol: float) -> None:
    result, expected = ([x] if isinstance(x, torch.Tensor) else x for x in (result, expected))
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("make, size, by", RUNS)
def test_op(benchmark, roofline, best_times, make, size, by):
    torch.compiler.reset()  # after some eight sizes and ops it would compile no more, and peers run as they are
    made, expected = case(make, size)
    if by not in made.calls:
        pytest.skip("takes many seconds at this size")
    run = made.calls[by]
    if made.check:
        made.check(run())
    else:
        assert_agree(run(), expected, made.rtol)
    benchmark.group = f"{make.__name__} {size}"
    benchmark.extra_info |= {
        "op": make.__name__,
        "size": size,
        "by": by,
        "torch": torch.__version__,
    }
    benchmark.extra_info |= {
        "bytes": made.bytes,
        "operations": made.operations,
        "roofline": roofline,
    }
    benchmark.pedantic(run, rounds=1 if by == "reference" else made.rounds, warmup_rounds=1)
    best_times[make.__name__, size, by] = benchmark.stats.stats.min


@pytest.mark.parametrize("size", HEADS)
def test_peak_memory(benchmark, size):
    """linear_ppo holds at most a quarter of what the materialised logits take, where these are large."""
    benchmark.group = f"peak memory of linear_ppo {size}"
    held = {}
    for which in ("op", "materialised"):
        command = [sys.executable, peak_memory.__file__, which, *map(str, HEADS[size])]
        held[which] = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )
    benchmark.extra_info |= {"op": "linear_ppo", "size": size, "peak": held}
    benchmark.pedantic(lambda: None, rounds=1)
    if HEADS[size][2] > 100_000:
        assert held["op"]["beyond_gradients"] <= held["materialised"]["beyond_gradients"] / 4


@pytest.mark.parametrize("target", TARGETS)
def test_target(benchmark, best_times, target):
    benchmark.group = "targets"
    try:
        met = TARGETS[target](best_times)
    except KeyError as missing:
        pytest.skip(f"{' '.join(missing.args[0])} was not timed")
    benchmark.extra_info |= {"target": target, "met": met}
    benchmark.pedantic(lambda: None, rounds=1)
    assert met
