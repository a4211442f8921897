"""Nothing compiles in the middle of a run: sizes and where a tensor begins make no other variant of a kernel."""

import collections

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from hiper_fast.kernels import _scan
from hiper_fast.kernels.find_roles import find_roles
from hiper_fast.kernels.gae import gae
from hiper_fast.kernels.hae import hae
from hiper_fast.kernels.normalize import normalize
from hiper_fast.kernels.ppo_loss import ppo_loss
from hiper_fast.kernels.sample import sample
from hiper_fast.kernels.scatter_advantages import normalize_and_scatter, scatter_advantages
from hiper_fast.kernels.value_loss import value_loss


@pytest.fixture
def variants(monkeypatch):
    """kernel -> what Triton would compile for the launches so far."""
    monkeypatch.setattr(_scan, "_compiled", set())
    backend = make_backend(GPUTarget("cuda", 90, 32))
    found = collections.defaultdict(set)

    def run(kernel, *arguments, grid, warmup, **keywords):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = bind(*arguments, debug=False, **keywords)
        found[f"{kernel.module.rsplit('.', 1)[-1]}.{kernel.__name__}"].add(
            f"{specialization} {options}"
        )

    monkeypatch.setattr(JITFunction, "run", run)
    return found


def place(tensor, unaligned):
    """The same, beginning one number after a multiple of 16 bytes if `unaligned`."""
    room = torch.empty(tensor.shape[0] + 16, dtype=tensor.dtype)
    first = next(i for i in range(16) if (room[i:].data_ptr() % 16 == 0))
    first = first + 1 if unaligned else first
    return room[first : first + tensor.shape[0]].copy_(tensor)


def launch_all(turns, unaligned):
    """Everything that an episode's length or a slice may change, in the one configuration."""

    def put(tensor):
        return place(tensor, unaligned)

    x, mask = put(torch.zeros(turns)), put(torch.zeros(turns).bool())
    ended, cu_turns = put(torch.zeros(1).bool()), put(torch.tensor([0, turns], dtype=torch.int32))
    hae(x, x, x, x, mask, ended, cu_turns, x[:1], x[:1], 1.0, 1.0, 1.0)
    gae(x, x, ended, cu_turns, x[:1], 1.0, 1.0)
    normalize(x, mask, 1e-8)
    cu_tokens = put(torch.arange(turns + 1, dtype=torch.int32))
    roles = put(torch.zeros(turns, dtype=torch.uint8))
    scatter_advantages(x, x, x, mask, roles, cu_tokens)
    normalize_and_scatter(x, x, x, mask, roles, cu_tokens)
    ppo_loss(x, x, x, mask, x, x, 0.2, 0.2, 3.0, 0.01, 0.01, 2.0, True)
    value_loss(x, x, x, mask, 0.5, 2.0, True)
    logits = put(torch.zeros(turns * 37)).view(turns, 37)
    sample(logits, put(torch.zeros(turns, dtype=torch.float64)), x)
    byte, ids = put(torch.full((3,), 60, dtype=torch.uint8)), put(torch.zeros(turns).int())
    find_roles(ids, cu_tokens, byte, put(torch.tensor([0, 1, 2, 3], dtype=torch.int32)), byte)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_scan_compiles_the_tiles_of_all_later_ones(variants, dtype):
    def scan(turns, trajectories):
        x, ended = torch.zeros(turns, dtype=dtype), torch.zeros(trajectories).bool()
        cu_turns = torch.zeros(trajectories + 1, dtype=torch.int32)
        hae(x, x, x, None, x > 0, ended, cu_turns, None, None, 1.0, 1.0, 1.0)
        gae(x, x, ended, cu_turns, None, 1.0, 1.0)

    scan(100, 2)
    once = {kernel: set(found) for kernel, found in variants.items()}
    assert {len(found) for found in once.values()} == {4} and len(once) == 2
    for turns, trajectories in ((200, 1), (5000, 2), (2000, 2000), (1, 1), (0, 3)):
        scan(turns, trajectories)
    assert variants == once


def test_sizes_and_places_make_no_variants(variants):
    launch_all(48, unaligned=False)
    once = {kernel: set(found) for kernel, found in variants.items()}
    assert len(once) == 12
    for turns, unaligned in ((48, True), (37, False), (1, False), (16, True)):
        launch_all(turns, unaligned)
    again = {kernel for kernel, found in variants.items() if found != once[kernel]}
    assert not again
