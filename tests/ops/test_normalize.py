"""normalize: zero mean and unit population deviation over the mask, zero off it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hiper_fast import ops


@pytest.mark.parametrize("turns", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_equals_the_reference(turns, dtype, tolerance):
    g = torch.Generator().manual_seed(turns)
    values = 3 * torch.randn(turns, dtype=dtype, generator=g) + 100
    mask = torch.rand(turns, generator=g) < 0.6
    result = ops.normalize(values, mask)
    torch.testing.assert_close(
        result, ops.reference.normalize(values, mask), rtol=tolerance, atol=tolerance
    )
    assert (result[~mask] == 0).all()


def test_by_hand():
    values, mask = torch.tensor([1.0, 9.0, 3.0]), torch.tensor([True, False, True])
    torch.testing.assert_close(ops.normalize(values, mask), torch.tensor([-1.0, 0.0, 1.0]))


@pytest.mark.parametrize("chosen", [0, 1, 3])
def test_without_spread_all_is_zero(chosen):
    mask = torch.arange(4) < chosen
    values = torch.where(mask, 5.0, torch.nan)
    assert ops.normalize(values, mask).tolist() == [0.0] * 4


def _rank(rank, path, values, mask, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    half = slice(0, 3) if rank == 0 else slice(3, None)
    results[half] = ops.normalize(values[half], mask[half], group=dist.group.WORLD)
    dist.destroy_process_group()


def test_moments_over_a_group(tmp_path):
    values, mask = (
        torch.randn(8, dtype=torch.float64),
        torch.tensor([1, 1, 0, 1, 0, 1, 1, 1], dtype=torch.bool),
    )
    results = torch.zeros_like(values).share_memory_()
    mp.spawn(_rank, (tmp_path / "store", values, mask, results), nprocs=2)
    torch.testing.assert_close(results, ops.normalize(values, mask))


def test_opcheck():
    torch.library.opcheck(
        torch.ops.hiper_fast.normalize.default,
        (torch.randn(5), torch.tensor([1, 0, 1, 1, 0]).bool(), 1e-8),
    )


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="mask"):
        ops.normalize(torch.zeros(3), torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="values"):
        ops.normalize(torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.bool))
