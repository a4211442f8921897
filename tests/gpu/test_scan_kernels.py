"""hae, gae, normalize and scatter_advantages on the device against the reference in float64."""

from fractions import Fraction

import pytest
import torch

from hiper_fast.ops import reference

pytest.importorskip("triton")

import triton.language as tl

from hiper_fast.kernels import _moments, _scan, raise_pending
from hiper_fast.kernels.gae import gae
from hiper_fast.kernels.hae import hae
from hiper_fast.kernels.normalize import normalize
from hiper_fast.kernels.scatter_advantages import normalize_and_scatter, scatter_advantages

pytestmark = pytest.mark.gpu

# The tile is 64, 256 or 1024 turns by their mean number: one block, several blocks, blocks of unequal trajectories.
LENGTHS = [[], [0], [1], [3, 0, 4], [1, 70, 2, 0, 130], [300], [600, 500], [2100, 1]]
FACTORS = [
    (1.0, 1.0, 0.96875),
    (0.75, 0.5, 0.25),
    (0.0, 1.0, 1.0),
]  # exact in float32, as the interpreter has them


def prefix_sum(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def trajectories(lengths, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    turns, n = sum(lengths), len(lengths)
    rewards, low, high, values_switch = torch.randn(4, turns, dtype=torch.float64, generator=g).to(
        dtype
    )
    bootstrap_low, bootstrap_high = torch.randn(2, n, dtype=torch.float64, generator=g).to(dtype)
    switch, terminated = torch.rand(turns, generator=g) < 0.2, torch.rand(n, generator=g) < 0.5
    return (
        rewards,
        low,
        high,
        values_switch,
        switch,
        terminated,
        prefix_sum(lengths),
        bootstrap_low,
        bootstrap_high,
    )


def double(tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]


def assert_close(result, expected, dtype):
    tolerance = {
        torch.float64: 1e-10,
        torch.float32: 2e-6,
        torch.float16: 2e-6,
        torch.bfloat16: 2e-6,
    }[dtype]
    torch.testing.assert_close(result.cpu().double(), expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_hae(device, lengths, dtype):
    if dtype != torch.float32 and sum(lengths) > 100:
        pytest.skip("only its loads differ from float32")
    factors = FACTORS[len(lengths) % 3]
    case = trajectories(lengths, dtype)
    rewards, low, high, values_switch, switch, ended, cu, boot_low, boot_high = double(case)
    options = dict(zip(("gamma", "lambda_turn", "lambda_segment"), factors, strict=True))
    for with_options in (True, False):
        given = [
            x.to(device) if with_options or i not in (3, 7, 8) else None for i, x in enumerate(case)
        ]
        levels, boundary = hae(*given, *factors)
        if with_options:
            options |= {
                "values_switch": values_switch,
                "bootstrap_low": boot_low,
                "bootstrap_high": boot_high,
            }
        else:
            options |= {"values_switch": None, "bootstrap_low": None, "bootstrap_high": None}
        expected = reference.hae(rewards, low, high, switch, ended, cu, **options)
        assert levels.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(boundary.cpu(), expected.boundary)
        for result, wanted in zip(levels.unbind(0), expected[:-1], strict=True):
            assert_close(result, wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", LENGTHS[:6], ids=str)
def test_gae(device, lengths, dtype):
    case = trajectories(lengths, dtype, seed=1)
    rewards, values, _, _, _, ended, cu, bootstrap, _ = double(case)
    r, v, _, _, _, t, c, b, _ = (x.to(device) for x in case)
    expected = reference.gae(
        rewards, values, ended, cu, bootstrap=bootstrap, gamma=0.75, lambda_=0.5
    )
    assert_close(gae(r, v, t, c, b, 0.75, 0.5), torch.stack(expected), dtype)
    expected = reference.gae(rewards, values, ended, cu)
    assert_close(gae(r, v, t, c, None, 1.0, 1.0), torch.stack(expected), dtype)


def test_several_trajectories_in_a_tile(device, interpreted, monkeypatch):
    lengths = [1, 0, 2, 70, 3, 130] if interpreted else [1, 0, 2, 70, 3, 130] * 200
    assert _scan.choose_shape(1200, 1200) == (4, 64)  # what is launched for so many
    monkeypatch.setattr(_scan, "choose_shape", lambda *_: (4, 64))
    case = trajectories(lengths, torch.float32)
    rewards, low, high, values_switch, switch, ended, cu, boot_low, boot_high = double(case)
    levels, boundary = hae(*(x.to(device) for x in case), 0.75, 0.5, 0.25)
    expected = reference.hae(
        rewards, low, high, switch, ended, cu, values_switch=values_switch, bootstrap_low=boot_low,
        bootstrap_high=boot_high, gamma=0.75, lambda_turn=0.5, lambda_segment=0.25,
    )  # fmt: skip
    assert torch.equal(boundary.cpu(), expected.boundary)
    for result, wanted in zip(levels.unbind(0), expected[:-1], strict=True):
        assert_close(result, wanted, torch.float32)


def test_values_high_off_boundaries_are_not_read_and_nothing_leaks(device):
    lengths = [4, 70]
    case = [x.to(device) for x in trajectories(lengths, torch.float32)]
    rewards, low, high, values_switch, switch, *rest = case
    plain = hae(rewards, low, high, values_switch, switch, *rest, 1.0, 1.0, 1.0)
    broken = torch.where(plain[1], high, torch.nan)
    torch.testing.assert_close(
        hae(rewards, low, broken, values_switch, switch, *rest, 1.0, 1.0, 1.0), plain
    )
    poisoned = rewards.clone()
    poisoned[:4] = torch.nan
    levels, _ = hae(poisoned, low, high, values_switch, switch, *rest, 1.0, 1.0, 1.0)
    torch.testing.assert_close(levels[:, 4:], plain[0][:, 4:])


def test_strided_inputs(device):
    case = [x.to(device) for x in trajectories([5, 9], torch.float32)]
    strided = [torch.stack([x, x], 1)[:, 0] for x in case]
    assert not strided[0].is_contiguous()
    expected = hae(*case, 1.0, 1.0, 0.5)
    assert torch.equal(hae(*strided, 1.0, 1.0, 0.5)[0], expected[0])


def test_affine_maps_compose_associatively():
    """The GPU combines in a tree, the interpreter in order: only this can tell a wrong combine from a right one."""
    compose = _scan.compose.fn
    maps = [(Fraction(a), Fraction(b)) for a, b in ((2, 3), (-1, 5), (0, 7), (3, -4), (1, 0))]
    for p in maps:
        for q in maps:
            for r in maps:
                assert compose(*compose(*p, *q), *r) == compose(*p, *compose(*q, *r))
    # And it is what it says: first the later turn's map, then this turn's.
    assert compose(2, 3, 5, 7) == (10, 5 * 3 + 7)


def test_moments_merge_associatively(monkeypatch):
    monkeypatch.setattr(_moments, "about", _moments.about.fn)
    merge = _moments.merge.fn
    # (count, a mean that is not exact, what is left of the deviations from it, their squares)
    a, b, c = (tuple(map(Fraction, part)) for part in ((2, 3, 1, 3), (1, -4, -1, 1), (5, 2, 0, 7)))
    assert merge(*merge(*a, *b), *c) == merge(*a, *merge(*b, *c))
    empty = (Fraction(0),) * 4
    assert merge(*empty, *a) == a == merge(*a, *empty) and merge(*empty, *empty) == empty


@pytest.mark.parametrize("turns", [0, 1, 2, 1025, 3000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normalize(device, turns, dtype):
    g = torch.Generator().manual_seed(turns)
    values = 1000 + torch.randn(turns, generator=g, dtype=torch.float64).to(
        dtype
    )  # a mean far above the deviations
    for share in (0.0, 0.6, 1.0):
        mask = torch.rand(turns, generator=g) < share
        result = normalize(torch.where(mask, values, torch.nan).to(device), mask.to(device), 1e-8)
        assert_close(result, reference.normalize(values.double(), mask), dtype)


def test_more_blocks_than_parts_are_merged(device, monkeypatch):
    monkeypatch.setattr("hiper_fast.kernels.normalize.MOST_PARTS", tl.constexpr(2))
    g = torch.Generator().manual_seed(0)
    values = 1000 + torch.randn(5000, generator=g)
    mask = torch.rand(5000, generator=g) < 0.6
    result = normalize(values.to(device), mask.to(device), 1e-8)
    assert_close(result, reference.normalize(values.double(), mask), torch.float32)

    given = [x.to(device) for x in tokens([3] * 70)]
    expected = normalize_and_scatter(*given)
    monkeypatch.setattr("hiper_fast.kernels.scatter_advantages.MOST_PARTS", tl.constexpr(1))
    torch.testing.assert_close(normalize_and_scatter(*given), expected)


def test_equal_values_are_normalised_to_zero(device):
    values, mask = torch.full((2000,), 0.1), torch.ones(2000, dtype=torch.bool)
    assert normalize(values.to(device), mask.to(device), 1e-8).abs().max() < 1e-6


def test_slices_may_begin_anywhere(device):
    x = torch.randn(1100, device=device)
    mask = x > -0.5
    assert torch.equal(
        normalize(x[1:], mask[1:], 1e-8), normalize(x[1:].clone(), mask[1:].clone(), 1e-8)
    )


def tokens(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    turns = len(lengths)
    low, high, switch = torch.randn(3, turns, generator=g)
    roles = torch.randint(0, 8, (sum(lengths),), generator=g, dtype=torch.uint8)
    return low, high, switch, torch.rand(turns, generator=g) < 0.5, roles, prefix_sum(lengths)


@pytest.mark.parametrize("lengths", [[], [0], [3], [5, 0, 7, 1, 70], [300, 3], [9] * 40], ids=str)
def test_scatter_with_and_without_normalisation(device, lengths):
    case = tokens(lengths)
    low, high, switch, boundary, roles, cu = case
    given = [x.to(device) for x in case]

    def expected(low, high, switch):
        return reference.scatter_advantages(
            reference.HAE(low, low, high, high, switch, switch, boundary), roles, cu
        )

    advantages, mask = expected(low.double(), high.double(), switch.double())
    result = scatter_advantages(*given)
    assert torch.equal(result[1].cpu(), mask)
    assert_close(result[0], advantages, torch.float32)

    turn = torch.arange(len(lengths)).repeat_interleave(cu.diff())
    carried = [
        torch.zeros(len(lengths)).bool().index_fill_(0, turn[(roles & bit) > 0], True)
        for bit in (1, 2, 4)
    ]
    carried[1] &= boundary
    levels = [
        reference.normalize(x.double(), m)
        for x, m in zip((low, high, switch), carried, strict=True)
    ]
    result = normalize_and_scatter(*given)
    assert torch.equal(result[1].cpu(), mask)
    assert_close(result[0], expected(*levels)[0], torch.float32)
    assert_close(result[2], torch.stack(levels), torch.float32)


@pytest.mark.parametrize(
    "cu", [[0, 2, 9], [0, 4, 3], [1, 2, 5], [0, 2, 4], [-3, 2, 5], [0, -7, 5]], ids=str
)
def test_bad_prefix_sums_are_reported_and_nothing_outside_is_touched(device, cu):
    x, cu = torch.zeros(5, device=device), torch.tensor(cu, dtype=torch.int32, device=device)
    ended = torch.zeros(2, dtype=torch.bool, device=device)
    gae(x, x, ended, cu, None, 1.0, 1.0)
    with pytest.raises(ValueError, match="gae: cu_turns"):
        raise_pending()
    raise_pending()  # once
    hae(x, x, x, None, x > 0, ended, cu, None, None, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="hae: cu_turns"):
        raise_pending()
    scatter_advantages(x[:2], x[:2], x[:2], ended, (x > 1).to(torch.uint8), cu)
    if device.type == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ValueError, match="scatter_advantages: cu_tokens"):
        gae(x, x, ended, cu, None, 1.0, 1.0)  # the next op tells, whichever it is


def test_results_never_change_from_run_to_run(device):
    given = [x.to(device) for x in tokens([9] * 40)]
    first = normalize_and_scatter(*given)
    for x, y in zip(first, normalize_and_scatter(*given), strict=True):
        assert torch.equal(x, y)
