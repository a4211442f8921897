"""linear_logprobs and linear_ppo on the device: no less exact than torch in the same dtype, in chunks of any size."""

import pytest
import torch

from hiper_fast.ops import reference

pytest.importorskip("triton")

from hiper_fast.kernels import _head, _launch, _tiles, _tuning, raise_pending
from hiper_fast.kernels.linear_logprobs import linear_logprobs, linear_logprobs_backward
from hiper_fast.kernels.linear_ppo import linear_ppo

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("product_on_the_cpu")]

PPO = {"clip_low": 0.25, "clip_high": 0.125, "dual_clip": 3.0}


@pytest.fixture(params=[480_000_000, 7000], ids=["at once", "in chunks"])
def scratch(request, monkeypatch):
    monkeypatch.setattr(_head, "SCRATCH_BYTES", request.param)


@pytest.fixture(params=[torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


def random_case(n, h, v, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*s, dtype=torch.float64, generator=g).to(dtype) for s in ((n, h), (v, h), (v,))
    )
    return hidden, weight, bias, torch.randint(0, v, (n,), generator=g)


def assert_as_exact(ours, torchs, truth, floor=2e-6):
    """Our error against float64 is no larger than torch's in the same dtype, and an epsilon of the values' size."""
    for x, y, exact in zip(ours, torchs, truth, strict=True):
        if exact.numel():
            error, allowed = (
                (x.cpu().double() - exact).abs().max(),
                (y.double() - exact).abs().max(),
            )
            assert error <= 1.5 * allowed + floor * max(1.0, exact.abs().max()), (error, allowed)


def through_autograd(dtype, case, bias, temperature, softcap, entropy, grads):
    leaves = [x.to(dtype).requires_grad_() for x in case[:3]]
    result = reference.linear_logprobs(
        leaves[0],
        leaves[1],
        case[3],
        temperature=temperature,
        bias=leaves[2] if bias else None,
        softcap=softcap,
        entropy=True,
    )
    used = [(x, g.to(x.dtype)) for x, g in zip(result, grads, strict=True)][: 2 if entropy else 1]
    total = sum((x * g).sum() for x, g in used) + 0 * leaves[2].sum()
    return [x.detach() for x, _ in used], [
        x.float() if dtype != torch.float64 else x for x in torch.autograd.grad(total, leaves)
    ]


@pytest.mark.parametrize("n, h, v", [(0, 3, 5), (1, 1, 1), (7, 5, 17), (3, 4, 4100)])
@pytest.mark.parametrize(
    "bias, temperature, softcap, entropy",
    [(True, 1.0, None, True), (False, 0.5, None, False), (True, 0.5, 2.0, True)],
)
def test_linear_logprobs_with_gradients(
    device, scratch, dtype, n, h, v, bias, temperature, softcap, entropy
):
    case = random_case(n, h, v, dtype)
    grads = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads[0, ::3] = 0  # rows that need no gradient
    hidden, weight, offset, targets = (x.to(device) for x in case)
    offset = offset if bias else None
    options = temperature, softcap
    logprobs, entropies = linear_logprobs(hidden, weight, offset, targets, *options, entropy)
    wide = torch.promote_types(dtype, torch.float32)
    grad = grads.to(wide).to(device)
    gradients = linear_logprobs_backward(
        grad[0],
        grad[1] if entropy else grad[1, :0],
        hidden,
        weight,
        offset,
        targets,
        *options,
        True,
        True,
        bias,
    )
    assert logprobs.dtype == gradients[1].dtype == wide and gradients[0].dtype == dtype
    truth = through_autograd(torch.float64, case, bias, *options, entropy, grads)
    torchs = through_autograd(dtype, case, bias, *options, entropy, grads)
    assert_as_exact([logprobs, entropies] if entropy else [logprobs], torchs[0], truth[0])
    floor = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(
        dtype, 2e-6
    )  # gradients of logits are of the inputs' dtype
    count = 3 if bias else 2
    assert_as_exact(gradients[:count], torchs[1][:count], truth[1][:count], floor)


@pytest.mark.parametrize("n, h, v", [(0, 3, 5), (1, 2, 3), (9, 5, 17)])
@pytest.mark.parametrize(
    "kl_coef, entropy_coef, with_ref, denominator, softcap",
    [
        (0.0625, 0.125, True, None, None),
        (0.0, 0.0, True, 4.0, None),
        (0.5, 0.0, False, None, None),
        (0.5, 0.0, True, None, None),
        (0.5, 0.125, True, None, 3.0),
        (0.0, 0.0, False, None, 3.0),
    ],
)
def test_linear_ppo(
    device, scratch, dtype, n, h, v, kl_coef, entropy_coef, with_ref, denominator, softcap
):
    case = random_case(n, h, v, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    g = torch.Generator().manual_seed(1)
    near = reference.linear_logprobs(
        *(x.double() for x in case[:2]),
        case[3],
        temperature=0.5,
        bias=case[2].double(),
        softcap=softcap,
    )
    old, ref = (near + 0.5 * torch.randn(n, generator=g) for _ in range(2))
    advantages = torch.randn(n, generator=g).double()
    advantages[::2] = 0
    vectors = [x.to(wide).to(device) for x in (old, advantages, ref)]
    coefficients = {"kl_coef": kl_coef, "entropy_coef": entropy_coef}
    hidden, weight, bias, targets = (x.to(device) for x in case)
    result = linear_ppo(
        hidden, weight, bias, targets, vectors[0], vectors[1], vectors[2] if with_ref else None,
        0.5, softcap, *PPO.values(), kl_coef, entropy_coef, denominator, True, True, True,
    )  # fmt: skip

    def autograd(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in case[:3]]
        wide = torch.promote_types(dtype, torch.float32)
        loss = reference.linear_ppo(
            leaves[0], leaves[1], case[3], *(x.cpu().to(wide) for x in vectors[:2]), bias=leaves[2], temperature=0.5,
            softcap=softcap, ref_logprobs=vectors[2].cpu().to(wide) if with_ref else None, denominator=denominator,
            **PPO, **coefficients,
        ) + 0 * leaves[0].sum()  # fmt: skip
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [loss.detach()], [
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)
        ]

    truth, torchs = autograd(torch.float64), autograd(dtype)
    assert_as_exact([result[0]], torchs[0], truth[0], floor=1e-5)
    own = linear_logprobs(hidden, weight, bias, targets, 0.5, softcap, False)[0]
    torch.testing.assert_close(result[2], own, rtol=0, atol=0)
    floor = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, 5e-6)
    assert_as_exact(result[3:], torchs[1], truth[1], floor)
    unneeded = linear_ppo(
        hidden,
        weight,
        None,
        targets,
        *vectors,
        1.0,
        softcap,
        *PPO.values(),
        kl_coef,
        entropy_coef,
        None,
        False,
        False,
        False,
    )
    assert [len(x) for x in unneeded[3:]] == [0, 0, 0]


def test_in_a_capture_all_rows_are_kept_and_give_the_same(device, scratch, dtype, monkeypatch):
    case = (x.to(device) for x in random_case(9, 5, 17, dtype))
    hidden, weight, bias, targets = case
    grads = torch.randn(9, dtype=torch.promote_types(dtype, torch.float32), device=device)
    grads[::2] = 0
    arguments = grads, grads[:0], hidden, weight, bias, targets, 1.0, None, True, True, True
    expected = linear_logprobs_backward(*arguments)
    monkeypatch.setattr(_head, "is_capturing", lambda tensor: True)
    for x, y in zip(linear_logprobs_backward(*arguments), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_the_hidden_states_gradient_is_summed_in_float32(device, scratch, monkeypatch):
    """Parts of a sum over the vocabulary, which a product in half precision may add up as such."""
    outs, product = [], _head.product
    monkeypatch.setattr(
        _head, "product", lambda out, *a, **k: (outs.append(out.dtype), product(out, *a, **k))
    )
    hidden, weight, _, targets = (x.to(device) for x in random_case(4, 3, 6, torch.float16))
    grads = torch.ones(4, device=device)
    arguments = hidden, weight, None, targets, 1.0, None, True, True, False
    gradient = linear_logprobs_backward(grads, grads[:0], *arguments)[0]
    assert gradient.dtype == torch.float16 and set(outs) == {torch.float32}


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_rows_of_gradient_zero_are_left_out(device, softcap, monkeypatch):
    """Half of the rows are clipped: the products of the gradients get the other half."""
    hidden, weight, _, targets = (x.to(device) for x in random_case(8, 4, 6, torch.float32))
    now, _ = linear_logprobs(hidden, weight, None, targets, 1.0, softcap, False)
    old = now - torch.tensor([1.0, 0.0] * 4, device=device)
    multiplied, product = [], _head.product
    monkeypatch.setattr(
        _head,
        "product",
        lambda out, a, b, **k: (multiplied.append(a.shape[0]), product(out, a, b, **k)),
    )
    ones = torch.ones_like(now)
    arguments = (
        hidden,
        weight,
        None,
        targets,
        old,
        ones,
        None,
        1.0,
        softcap,
        *PPO.values(),
        0.0,
        0.0,
        None,
        True,
        False,
        False,
    )
    gradient = linear_ppo(*arguments)[3]
    assert multiplied == [8, 4]  # all rows' logits, half of the rows' gradients
    assert (gradient[0::2] == 0).all() and (gradient[1::2] != 0).any(dim=1).all()


def test_logprobs_never_exceed_zero_and_extreme_logits_stay_exact(device):
    hidden = torch.full((4, 2), 100.0)
    weight = torch.tensor(
        [[50.0, 50.0], [-50.0, -50.0], [50.0, 49.99], [0.0, 0.0]]
    )  # logits of 10,000, -10,000, 9,999, 0
    targets = torch.arange(4)
    logprobs, entropy = linear_logprobs(
        hidden.to(device), weight.to(device), None, targets.to(device), 1.0, None, True
    )
    exact = reference.linear_logprobs(hidden.double(), weight.double(), targets, entropy=True)
    assert (logprobs <= 0).all()
    torch.testing.assert_close(logprobs.cpu().double(), exact[0], rtol=1e-6, atol=2e-3)
    torch.testing.assert_close(entropy.cpu().double(), exact[1], rtol=1e-6, atol=2e-3)
    sure = torch.tensor([[300.0, 0.0]]).T.contiguous().to(device)
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    assert linear_logprobs(one, sure, None, zero, 1.0, None, False)[0] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_cap_is_exact_near_zero_and_far_from_it(device, dtype):
    """Differences of log-probs, which are those of logits, against torch's tanh in float64."""
    sizes = torch.tensor([0.0, 1e-9, 1e-4, 0.3, 0.4999, 0.5, 0.6, 2.0, 9.0, 50.0, 1e4, 1e30])
    logits = 8 * torch.cat([sizes, -sizes]).double()
    targets = torch.arange(len(logits))
    bias = logits.to(dtype).to(device)
    zeros = torch.zeros(len(logits), 1, dtype=dtype, device=device)
    result = linear_logprobs(zeros, zeros, bias, targets.to(device), 1.0, 8.0, False)[0].cpu()
    capped = 8 * torch.tanh(logits.to(dtype).double() / 8)
    expected = torch.log_softmax(capped, 0)
    tolerance = 8 * 4 * torch.finfo(dtype).eps
    assert (result.double() - expected).abs().max() <= tolerance


def test_a_cap_far_above_the_logits_changes_nothing(device):
    """tanh is then of numbers near 0, whose every digit counts."""
    hidden, weight, bias, targets = (x.to(device) for x in random_case(5, 8, 30, torch.float32))
    capped, free = (
        linear_logprobs(hidden, weight, bias, targets, 1.0, cap, True) for cap in (1e6, None)
    )
    torch.testing.assert_close(capped, free, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "of_hidden, of_weight",
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
    ],
)
def test_results_are_of_the_hidden_states_dtype(device, of_hidden, of_weight):
    """As the ops' fakes say: else a compiled caller would be given another dtype than it was compiled for."""
    hidden, weight, _, targets = (x.to(device) for x in random_case(5, 4, 7, torch.float64))
    wide = torch.promote_types(of_hidden, torch.float32)
    given = hidden.to(of_hidden), weight.to(of_weight), None, targets
    zeros = torch.zeros(5, dtype=wide, device=device)
    loss, metrics, logprobs, *gradients = linear_ppo(
        *given,
        zeros,
        zeros + 1,
        None,
        1.0,
        None,
        *PPO.values(),
        0.0,
        0.125,
        None,
        True,
        True,
        False,
    )
    back = linear_logprobs_backward(zeros + 1, zeros, *given, 1.0, None, True, True, False)
    results = loss, metrics, logprobs, *linear_logprobs(*given, 1.0, None, True)
    assert {x.dtype for x in results} == {wide}
    assert [x.dtype for x in (*gradients, *back)] == 2 * [of_hidden, wide, wide]
    expected = reference.linear_logprobs(given[0].double(), given[1].double(), targets)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)


def test_nan_and_minus_infinity(device):
    hidden, weight, bias, targets = (x.to(device) for x in random_case(3, 4, 6, torch.float32))
    bias[5] = -torch.inf  # a token that is forbidden
    targets[:] = 0
    expected, spread = linear_logprobs(
        hidden, weight[:5], bias[:5].contiguous(), targets, 1.0, None, True
    )
    result = linear_logprobs(hidden, weight, bias, targets, 1.0, None, True)
    torch.testing.assert_close(result, (expected, spread))
    hidden[1, 2] = torch.nan
    for softcap in (None, 3.0):
        result = linear_logprobs(hidden, weight, bias, targets, 1.0, softcap, False)[0]
        assert result.isnan().tolist() == [False, True, False]


def test_strided_inputs(device):
    hidden, weight, bias, targets = (x.to(device) for x in random_case(6, 4, 9, torch.float32))
    expected = linear_logprobs(hidden, weight, bias, targets, 1.0, 2.0, False)[0]
    strided = hidden.T.contiguous().T, weight.T.contiguous().T, torch.stack([bias, bias], 1)[:, 0]
    result = linear_logprobs(*strided, torch.stack([targets, targets], 1)[:, 0], 1.0, 2.0, False)[0]
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("bad", [-1, 6, 2**40])
def test_bad_targets_are_reported(device, bad):
    hidden, weight, _, targets = (x.to(device) for x in random_case(3, 4, 6, torch.float32))
    targets[1] = bad
    linear_logprobs(hidden, weight, None, targets, 1.0, None, False)
    with pytest.raises(ValueError, match="targets"):
        raise_pending()


def test_a_bad_target_is_reported_by_its_own_call_where_asked(device, monkeypatch):
    monkeypatch.setattr(_launch, "SYNC_ERRORS", True)
    hidden, weight, _, targets = (x.to(device) for x in random_case(3, 4, 6, torch.float32))
    linear_logprobs(hidden, weight, None, targets, 1.0, None, False)
    with pytest.raises(ValueError, match="targets"):
        linear_logprobs(hidden, weight, None, targets + 6, 1.0, None, False)


@pytest.fixture
def tiles(device, interpreted, monkeypatch):
    """HIPER_FAST_HEAD=tma; interpreted in small tiles and chunks, of which there are then several."""
    if not interpreted and torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("the tiled head is for compute capability 9")
    monkeypatch.setattr(_tiles, "HEAD", "tma")
    if not interpreted:
        yield
        return
    monkeypatch.setattr(_tiles, "_MOST_ROWS", 32)
    with (
        _tuning.trying("_tiles._tile_kernel", ROWS=16, COLUMNS=32, DEPTH=16),
        _tuning.trying("_tiles._gradient_kernel", TILES=2),
    ):
        yield


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def half(request, bfloat16_products):
    return request.param


HALF_FLOORS = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # rounded twice


@pytest.mark.parametrize("n, h, v", [(0, 8, 5), (1, 8, 1), (37, 24, 150)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_tiled_head(device, tiles, half, n, h, v, temperature):
    case = random_case(n, h, v, half)
    grads = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden, weight, _, targets = (x.to(device) for x in case)
    given = hidden, weight, None, targets, temperature, None
    assert isinstance(_tiles.make_head(*given), _tiles.TiledHead) == (n > 0)
    results = linear_logprobs(*given, True)
    assert torch.equal(linear_logprobs(*given, False)[0], results[0])
    gradients = linear_logprobs_backward(*grads.float().to(device), *given, True, True, False)
    truth, torchs = (
        through_autograd(dtype, case, False, temperature, None, True, grads)
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_exact(results, torchs[0], truth[0])
    assert_as_exact(gradients[:2], torchs[1][:2], truth[1][:2], HALF_FLOORS[half])


@pytest.mark.parametrize("entropy_coef", [0.125, 0.0])
def test_linear_ppo_by_tiles_is_that_by_rows(device, tiles, half, entropy_coef, monkeypatch):
    hidden, weight, _, targets = (x.to(device) for x in random_case(37, 24, 150, half))
    old = linear_logprobs(hidden, weight, None, targets, 0.5, None, False)[0] + 0.1
    advantages = torch.randn(37, device=device)
    options = old, advantages, old - 0.3, 0.5, None, *PPO.values(), 0.25, entropy_coef, None
    arguments = hidden, weight, None, targets, *options, True, True, False
    by_tiles = linear_ppo(*arguments)
    monkeypatch.setattr(_tiles, "HEAD", "cublas")
    by_rows = linear_ppo(*arguments)
    torch.testing.assert_close(by_tiles[:3], by_rows[:3], rtol=1e-5, atol=1e-5)
    for x, y in zip(by_tiles[3:5], by_rows[3:5], strict=True):
        assert (x - y).abs().max() <= HALF_FLOORS[half] * y.abs().max()


def test_the_tiled_head_reads_rows_that_lie_apart(device, tiles, half):
    hidden, weight, _, targets = (x.to(device) for x in random_case(37, 24, 70, half))
    grads = torch.randn(2, 37, device=device)
    wide_hidden, wide_weight = (
        hidden.new_full((74, 24), torch.nan),
        weight.new_full((70, 48), torch.nan),
    )
    wide_hidden[::2], wide_weight[:, 8:32] = hidden, weight
    apart = wide_hidden[::2], wide_weight[:, 8:32]
    rest = None, targets, 1.0, None
    assert isinstance(_tiles.make_head(*apart, *rest), _tiles.TiledHead)
    expected, found = (
        (*linear_logprobs(*given, *rest, True), *linear_logprobs_backward(*grads, *given, *rest, True, True, False))
        for given in ((hidden, weight), apart)
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)


def test_the_tiled_head_in_a_cuda_graph(device, interpreted, tiles, half):
    if interpreted:
        pytest.skip("there are no CUDA graphs")
    hidden, weight, _, targets = (x.to(device) for x in random_case(300, 64, 1500, half))
    old, advantages = torch.randn(2, 300, device=device).unbind(0)
    arguments = (
        hidden,
        weight,
        None,
        targets,
        old,
        advantages,
        old - 0.3,
        1.0,
        None,
        *PPO.values(),
        0.25,
        0.125,
        None,
    )
    expected = [x.clone() for x in linear_ppo(*arguments, True, True, False)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = linear_ppo(*arguments, True, True, False)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(list(result), expected)


def test_the_tiled_heads_gradient_of_a_sure_token_is_not_that_of_a_rounded_share(
    device, tiles, half
):
    """1 - p of p = 0.9999, where the share has three digits."""
    hidden = torch.zeros(1, 8, dtype=half, device=device)
    weight = torch.zeros(64, 8, dtype=half, device=device)
    hidden[0, 0], weight[40, 0] = 1.0, 13.4
    target, one = torch.tensor([40], device=device), torch.ones(1, device=device)
    given = hidden, weight, None, target, 1.0, None
    gradient = linear_logprobs_backward(one, 0 * one, *given, False, True, False)[1]
    logits = (hidden.double() @ weight.double().T)[0]
    expected = 1 - torch.softmax(logits, 0)[40]
    torch.testing.assert_close(gradient[40, 0].double(), expected, rtol=1e-2, atol=0)


def test_the_tiled_head_with_nan_infinity_and_bad_targets(device, tiles, half):
    hidden, weight, _, targets = (x.to(device) for x in random_case(3, 8, 70, half))
    hidden[:, 0] = 1.0
    weight[32:64, 0] = -torch.inf  # tokens that are forbidden, in interpreted tiles a whole one
    targets[:] = 65
    allowed = torch.cat([torch.arange(32), torch.arange(64, 70)]).to(device)
    expected = reference.linear_logprobs(
        hidden.float(), weight[allowed].float(), targets - 32, entropy=True
    )
    given = hidden, weight, None, targets, 1.0, None
    torch.testing.assert_close(linear_logprobs(*given, True), expected, rtol=1e-5, atol=1e-5)
    hidden[1, 2] = torch.nan
    assert linear_logprobs(*given, False)[0].isnan().tolist() == [False, True, False]
    targets[2] = 70
    linear_logprobs(*given, False)
    with pytest.raises(ValueError, match="targets"):
        raise_pending()


def test_what_was_measured_chooses_the_head(device, tiles, half, monkeypatch):
    hidden, weight, _, targets = (x.to(device) for x in random_case(3, 8, 5, half))
    for choice, measured, kind in (
        ("auto", False, _head.Head), ("auto", True, _tiles.TiledHead), ("cublas", True, _head.Head),
    ):  # fmt: skip
        monkeypatch.setattr(_tiles, "HEAD", choice)
        with _tuning.trying("_tiles.head", TMA=measured):
            assert type(_tiles.make_head(hidden, weight, None, targets, 1.0, None)) is kind


@pytest.mark.parametrize("change", ["float32", "bias", "cap", "unaligned", "rows left out"])
def test_what_the_tiled_head_does_not_take_goes_to_the_other(device, tiles, change):
    hidden, weight, bias, targets = (x.to(device) for x in random_case(3, 9, 5, torch.float16))
    if change != "unaligned":
        hidden, weight = hidden[:, :8].contiguous(), weight[:, :8].contiguous()
    if change == "float32":
        hidden, weight = hidden.float(), weight.float()
    head = _tiles.make_head(
        hidden, weight, bias if change == "bias" else None, targets, 1.0, 2.0 if change == "cap" else None,
        compact=change == "rows left out",
    )  # fmt: skip
    assert type(head) is _head.Head


@pytest.mark.parametrize("v", [50, 151_936, 256_000, 2_000_000])
def test_what_the_tiled_head_holds_stays_below_its_bytes(v):
    for rows in (1, 16_384):
        hidden, weight = (torch.empty(n, 8, dtype=torch.bfloat16, device="meta") for n in (rows, v))
        targets = torch.empty(rows, dtype=torch.int64, device="meta")
        head = _tiles.TiledHead(hidden, weight, None, targets, 1.0, None, (True, True, False))
        held = head.rows.nbytes + sum(part.nbytes for part in head.parts)
        assert 1 <= head.chunk <= rows and held <= 1.05 * _head.SCRATCH_BYTES


@pytest.mark.parametrize("v", [50, 32_000, 151_936, 256_000, 2_000_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scratch_stays_below_its_bytes(v, dtype):
    for rows in (1, 100, 16_384, 2**20):
        chunk, capacity = _head.row_counts(rows, v, dtype, True)
        assert 1 <= chunk <= capacity <= max(rows, 1)
        assert (
            v * (chunk * max(4, dtype.itemsize) + capacity * dtype.itemsize) <= _head.SCRATCH_BYTES
        )
        chunk, capacity = _head.row_counts(rows, v, dtype, False)
        assert capacity == 0 and v * chunk * max(4, dtype.itemsize) <= _head.SCRATCH_BYTES
