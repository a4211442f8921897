"""paged_attention on the device against the reference in float64: prompts and decoding, split and whole."""

import pytest
import torch
from test_paged_attention import SEQUENCES, exact, paged

from hiper_fast.ops import reference

pytest.importorskip("triton")

from hiper_fast.kernels import paged_attention as module
from hiper_fast.kernels import raise_pending

pytestmark = pytest.mark.gpu

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
NOTHING = dict(scale=None, window=None, softcap=None, sinks=None)


@pytest.fixture
def run(device):
    def run_kernel(arguments, **options):
        given = [x.to(device) for x in arguments]
        options = NOTHING | {
            k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()
        }
        return module.paged_attention(*given, *options.values()).cpu()

    return run_kernel


def assert_exact(run, arguments, **options):
    result, truth = (
        run(arguments, **options),
        reference.paged_attention(*exact(arguments), **options),
    )
    tolerance = TOLERANCES[result.dtype]
    torch.testing.assert_close(result.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request, bfloat16_products):
    return request.param


@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
def test_equals_the_reference(run, sequences, dtype):
    assert_exact(run, paged(*sequences, dtype=dtype))


@pytest.mark.parametrize(
    "options", [{"scale": 0.3}, {"window": 1}, {"window": 40}, {"softcap": 1.5}], ids=str
)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_options(run, options, with_sinks):
    sinks = torch.tensor([0.5, -2.0]) if with_sinks else None
    assert_exact(run, paged([1, 9], [90, 40]), **options, sinks=sinks)


@pytest.mark.parametrize(
    "heads, kv_heads, d, d_v", [(6, 2, 24, 80), (20, 1, 5, 3), (2, 2, 128, 64)]
)
@pytest.mark.parametrize("block", [1, 16])
def test_heads_sizes_and_blocks(run, heads, kv_heads, d, d_v, block):
    shape = dict(heads=heads, kv_heads=kv_heads, d=d, d_v=d_v, block=block)
    assert_exact(run, paged([1, 7, 0, 3], [12, 60, 5, 0], **shape))


@pytest.mark.parametrize("options", [{}, {"window": 300, "softcap": 2.0}], ids=str)
def test_keys_are_split_where_programs_are_few(run, options, monkeypatch):
    """Of the short sequence most splits are empty."""
    arguments = paged([1, 2, 1], [700, 350, 3], block=16)
    sinks = torch.tensor([0.5, -2.0]) if options else None
    assert_exact(run, arguments, **options, sinks=sinks)
    split = run(arguments, **options, sinks=sinks)
    monkeypatch.setattr(module, "_MOST_SPLITS", 1)
    whole = run(arguments, **options, sinks=sinks)
    torch.testing.assert_close(split, whole)
    assert not torch.equal(split, whole)  # sums of another order: they were split indeed


def find_pending():
    """All that kernels reported."""
    try:
        raise_pending()
    except ValueError as error:
        return [str(error), *find_pending()]
    return []


@pytest.mark.parametrize("name", ["cu_query", "lengths", "blocks"])
def test_bad_inputs_are_reported_and_nothing_outside_is_touched(run, name):
    query, keys, values, blocks, cu_query, lengths = paged([2, 1], [3, 6])
    if name == "cu_query":
        cu_query = cu_query.flip(0)
    elif name == "lengths":
        lengths += 1000
    else:
        blocks[1, 0] = len(keys)
    assert run((query, keys, values, blocks, cu_query, lengths)).shape == query.shape
    assert any(error.startswith(f"paged_attention: {name} must") for error in find_pending())
    assert not find_pending()
