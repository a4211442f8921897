"""Compiles every kernel in every configuration that its op can launch, for a GPU that need not be here.

    python tests/gpu/builds.py 90                  # compute capability 9.0; prints one JSON object a build
    python tests/gpu/builds.py 90 | python tests/gpu/builds.py table     # docs/kernels.md's table of them

The launches are taken from the ops themselves: they are called with small CPU tensors, while Triton's launcher only
writes down what it would compile. Registers and stack are read from the machine code by the wheel's own cuobjdump, the
bytes of each access of global memory from the PTX.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import hiper_fast.kernels._head as head
import hiper_fast.kernels._tiles as tiles
from hiper_fast.kernels.find_roles import find_roles
from hiper_fast.kernels.gae import gae
from hiper_fast.kernels.hae import hae
from hiper_fast.kernels.linear_logprobs import linear_logprobs, linear_logprobs_backward
from hiper_fast.kernels.linear_ppo import linear_ppo
from hiper_fast.kernels.normalize import normalize
from hiper_fast.kernels.paged_attention import paged_attention
from hiper_fast.kernels.ppo_loss import ppo_loss
from hiper_fast.kernels.rms_norm import rms_norm, rms_norm_backward
from hiper_fast.kernels.rope import rope
from hiper_fast.kernels.sample import sample
from hiper_fast.kernels.scale_gradients import scale_gradients
from hiper_fast.kernels.scatter_advantages import normalize_and_scatter, scatter_advantages
from hiper_fast.kernels.swiglu import swiglu, swiglu_backward
from hiper_fast.kernels.value_loss import value_loss

POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
NOT_OPTIONS = {"grid", "warmup"}
ACCESS = re.compile(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\s")
COLUMNS = ["kernel", "warps", "registers", "spills", "shared", "loads", "stores"]
COPY = re.compile(r"\bcp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)")


class Launches:
    """What JITFunction.run was asked to launch: kernel, signature, constants and options, each once."""

    def __init__(self):
        self.found: dict[str, tuple] = {}

    def run(self, kernel: JITFunction, *arguments, **keywords) -> None:
        names = [p.name for p in kernel.params]
        bound = dict(zip(names, arguments, strict=False)) | {
            k: v for k, v in keywords.items() if k in names
        }
        options = {k: v for k, v in keywords.items() if k not in names and k not in NOT_OPTIONS}
        signature, constants, aligned = {}, {}, []
        for i, parameter in enumerate(kernel.params):
            value = bound[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, TensorDescriptor):
                element = POINTERS[value.base.dtype].removeprefix("*")
                signature[parameter.name] = f"tensordesc<{element}{value.block_shape}>"
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                if not parameter.do_not_specialize_on_alignment:
                    aligned.append(i)
            elif parameter.annotation_type:
                signature[parameter.name] = parameter.annotation_type
            else:
                assert isinstance(value, int), (
                    f"{kernel.__name__}: {parameter.name} is a {type(value)}"
                )
                signature[parameter.name] = "i32"
                if not parameter.do_not_specialize:
                    assert value % 16 == 0, (
                        f"{kernel.__name__}: {parameter.name} = {value} would be built apart"
                    )
                    aligned.append(i)
        key = f"{kernel.module}.{kernel.__name__} {list(signature.values())} {constants} {options}"
        self.found[key] = (kernel, signature, constants, aligned, options)


@contextlib.contextmanager
def recording() -> Iterator[Launches]:
    """Within, ops launch nothing and multiply nothing: what they would launch is written down."""
    launches, found = Launches(), (JITFunction.run, head.product, head.Head._multiply)
    JITFunction.run = lambda self, *arguments, **keywords: launches.run(
        self, *arguments, **keywords
    )
    head.product = lambda *arguments, **keywords: None
    head.Head._multiply = lambda self: None
    try:
        yield launches
    finally:
        JITFunction.run, head.product, head.Head._multiply = found


def launch_all() -> None:
    """Every op in every combination that gives another kernel."""
    for dtype in (torch.float32, torch.float64):
        for turns, trajectories in ((100, 10), (2000, 2000), (200, 1), (2000, 1)):
            x = torch.zeros(turns, dtype=dtype)
            ended, cu_turns = (
                torch.zeros(trajectories).bool(),
                torch.zeros(trajectories + 1, dtype=torch.int32),
            )
            hae(x, x, x, None, x > 0, ended, cu_turns, None, x, 1.0, 1.0, 1.0)
            gae(x, x, ended, cu_turns, None, 1.0, 1.0)
        x, mask = torch.zeros(2**20, dtype=dtype), torch.zeros(2**20).bool()
        for turns in (5, 2**20):
            normalize(x[:turns], mask[:turns], 1e-8)
        cu_tokens, roles = torch.zeros(9000, dtype=torch.int32), torch.zeros(9, dtype=torch.uint8)
        for turns in (5, 8999):
            arguments = (*(x[:turns],) * 3, mask[:turns], roles, cu_tokens[: turns + 1])
            scatter_advantages(*arguments)
            normalize_and_scatter(*arguments)
        for tokens, ref, entropy, denominator in itertools.product(
            (0, 3), (True, False), (True, False), (None, 2.0)
        ):
            y, terms = x[:tokens], (x[:tokens] if ref else None, x[:tokens] if entropy else None)
            ppo_loss(y, y, y, mask[:tokens], *terms, 0.2, 0.2, 3.0, 0.01, 0.01, denominator, True)
        value_loss(x[:3], x[:3], x[:3], mask[:3], 0.5, None, True)
        scale_gradients([x[:16]], x[0])

    for dtype, with_bias, softcap in itertools.product(
        (torch.float32, torch.float64, torch.bfloat16, torch.float16), (True, False), (None, 30.0)
    ):
        x = torch.zeros(3, dtype=torch.promote_types(dtype, torch.float32))
        hidden, weight, targets = (
            torch.zeros(3, 4, dtype=dtype),
            torch.zeros(5, 4, dtype=dtype),
            torch.zeros(3).long(),
        )
        bias = torch.zeros(5, dtype=dtype) if with_bias else None
        for entropy in (True, False):
            linear_logprobs(hidden, weight, bias, targets, 1.0, softcap, entropy)
            linear_logprobs_backward(
                x,
                x if entropy else x[:0],
                hidden,
                weight,
                bias,
                targets,
                1.0,
                softcap,
                True,
                True,
                with_bias,
            )
            for kl_coef, ref in ((0.1, x), (0.0, None)):
                head = (hidden, weight, bias, targets, x, x, ref, 1.0, softcap)
                options = (0.2, 0.2, 3.0, kl_coef, 0.01 if entropy else 0.0, None)
                linear_ppo(*head, *options, True, True, with_bias)
    halves = [torch.zeros(16, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]
    scale_gradients(halves, torch.zeros(()))
    for ids in (torch.int32, torch.int64):
        cu_tokens, offsets = (
            torch.tensor([0, 3], dtype=torch.int32),
            torch.tensor([0, 1], dtype=torch.int32),
        )
        byte = torch.tensor([60], dtype=torch.uint8)
        find_roles(torch.zeros(3, dtype=ids), cu_tokens, byte, offsets, byte)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, uniform = torch.zeros(3, 5, dtype=dtype), torch.zeros(3, dtype=torch.float64)
        sample(logits, uniform, torch.zeros(3))
    launch_attention()


def launch_attention() -> None:
    """Qwen2.5-1.5B's heads and wider ones: one sequence decoded, its keys split; many; prompts."""
    for dtype, (d, with_all) in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), ((128, False), (128, True), (256, False))
    ):
        pool = torch.zeros(2, 16, 2, d, dtype=dtype)
        options = (0.5, 9, 30.0, torch.zeros(12, dtype=dtype)) if with_all else (None,) * 4
        for sequences, own in ((1, 1), (264, 1), (264, 20)):
            query = torch.zeros(sequences * own, 12, d, dtype=dtype)
            lengths = torch.full((sequences,), own, dtype=torch.int32)
            blocks = torch.zeros(sequences, 32, dtype=torch.int32)
            cu_query = torch.arange(sequences + 1, dtype=torch.int32) * own
            paged_attention(query, pool, pool, blocks, cu_query, lengths, *options)


def launch_layers() -> None:
    """The smallest, a usual and the largest tile of each, and every switch."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        widths = (
            (16, 2048) if dtype == torch.float64 else (16, 2048, 8192)
        )  # none so wide is trained
        for width in widths:
            x, weight = torch.zeros(5, width, dtype=dtype), torch.zeros(width, dtype=dtype)
            rms_norm(x, weight, 1e-6)
            for needs in ((True, True), (True, False), (False, True)):
                rms_norm_backward(x, x, weight, 1e-6, *needs)
        swiglu(x, x)
        swiglu_backward(x, x, x, True, True)
        for batch, heads, key_heads, d, back in (
            (1, 2, 2, 64, True), (2, 12, 2, 128, False), (1, 40, 8, 128, False), (2, 40, 8, 256, True),
        ):  # fmt: skip
            states = (torch.zeros(batch, 16, n, d, dtype=dtype) for n in (heads, key_heads))
            angles = torch.zeros(2, 1, 16, d, dtype=dtype)
            rope(*(x.transpose(1, 2) for x in states), *angles, back)


def launch_tiles() -> None:
    """The tiled head over a usual vocabulary, with gradients and without."""
    tiles.HEAD = "tma"
    targets, grads = torch.zeros(3).long(), torch.zeros(3)
    for dtype in (torch.bfloat16, torch.float16):
        hidden, weight = (torch.zeros(n, 16, dtype=dtype) for n in (3, 151_936))
        given = hidden, weight, None, targets, 1.0, None
        linear_logprobs(*given, False)
        linear_logprobs_backward(grads, grads, *given, True, True, False)
    tiles.HEAD = "auto"


def build(launch: tuple, capability: int, whole: bool) -> dict:
    """Compile one launch; `whole`: with all pointers aligned to 16 bytes, as whole tensors are, else with none."""
    kernel, signature, constants, aligned, options = launch
    pointers = [i for i in aligned if list(signature.values())[i].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if whole or i not in pointers}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {
        name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)
    }
    dtypes = sorted({t for t in signature.values() if t.startswith(("*fp", "*bf", "tensordesc"))})
    return {
        "kernel": f"{kernel.module.rsplit('.', 1)[-1]}.{kernel.__name__}",
        "dtypes": dtypes,
        "double": "*fp64" in dtypes and "*fp32" not in dtypes,  # sums are float64 also for float32
        "constants": {list(signature)[i]: v for (i,), v in constants.items()},
        "aligned": whole,
        "warps": options.get("num_warps", 4),
        "registers": used["REG"],
        "stack": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
        **count_accesses(compiled.asm["ptx"]),
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "tma": compiled.asm["ptx"].count("cp.async.bulk.tensor"),
    }


def count_accesses(ptx: str) -> dict[str, dict[int, int]]:
    """Loads (asynchronous copies too) and stores of global memory: bytes of one thread's access -> how many."""
    found = {"loads": collections.Counter(), "stores": collections.Counter()}
    for kind, vector, bits in ACCESS.findall(ptx):
        found["loads" if kind == "ld" else "stores"][int(vector or 1) * int(bits) // 8] += 1
    found["loads"].update(int(size, 0) for size in COPY.findall(ptx))
    return {kind: dict(sorted(sizes.items(), reverse=True)) for kind, sizes in found.items()}


def make_table(builds: list[dict]) -> list[str]:
    """A Markdown row a kernel: of its builds without float64 vectors, on aligned pointers, that of most registers."""
    chosen = {}
    for build in builds:
        other = chosen.get(build["kernel"])
        single = build["aligned"] and not build["double"]
        if single and (other is None or build["registers"] > other["registers"]):
            chosen[build["kernel"]] = build
    rows = [
        [f"`{name}`", *(str(build[key]) for key in ("warps", "registers", "stack", "shared")),
         *(", ".join(f"{n} x {size}" for size, n in build[key].items()) for key in ("loads", "stores"))]
        for name, build in sorted(chosen.items())
    ]  # fmt: skip
    return [f"| {' | '.join(cells)} |" for cells in [COLUMNS, ["---"] * len(COLUMNS), *rows]]


def main(capability: int) -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    with recording() as launches:
        launch_all()
        launch_layers()
        if capability >= 90:
            launch_tiles()
    unaligned = {}  # slices of tensors begin anywhere: one such build for each kernel
    for launch in launches.found.values():
        if launch[0].module not in (head.__name__, tiles.__name__):  # of rows in their own buffers
            unaligned.setdefault(launch[0], launch)
        print(json.dumps(build(launch, capability, whole=True), default=str), flush=True)
    for launch in unaligned.values():
        print(json.dumps(build(launch, capability, whole=False), default=str), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "table":
        print(*make_table([json.loads(line) for line in sys.stdin]), sep="\n")
    else:
        main(int(sys.argv[1]))
