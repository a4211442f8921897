"""The C++ kernels by instruction set: all that run here agree with the references; threads change nothing."""

import math
import shutil

import pytest
import torch
from test_sample import assert_drawn, draws

from hiper_fast import bench, ops
from hiper_fast.ops import _head, _library

if _library.extension is None:
    pytest.skip(_library.why_no_extension, allow_module_level=True)

SETS = [s for s in ("portable", "avx2", "avx512") if hasattr(_library.extension, s)]


def test_kernels_of_other_sources_are_not_used(tmp_path):
    """Those of a checkout since changed, that is; an installed package has none beside it."""
    assert _library.load_extension() == (_library.extension, "")
    assert _library.load_extension(tmp_path / "csrc") == (_library.extension, "")
    sources = shutil.copytree(_library.SOURCES, tmp_path / "csrc")
    assert _library.load_extension(sources) == (_library.extension, "")
    (sources / "hae.cpp").write_text("")
    extension, why = _library.load_extension(sources)
    assert extension is None and "run `pip install -e .` again" in why


@pytest.fixture(params=SETS)
def instructions(request, monkeypatch):
    """The vectorised kernels are those of one instruction set."""
    kernels = getattr(_library.extension, request.param)
    for name in set(dir(kernels)) & set(dir(_library.extension)):
        if not name.startswith("__"):
            monkeypatch.setattr(_library.extension, name, getattr(kernels, name))
    monkeypatch.setattr(
        _library, "find_kernel", _library.find_kernel.__wrapped__
    )  # it remembers those it has given
    return kernels


@pytest.mark.parametrize("n, v", [(9, 1), (40, 17), (60, 1000), (9, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_of_every_size(instructions, n, v, dtype):
    given = draws(n, v, dtype=dtype)
    assert_drawn(ops.sample(*given), *given)


def vectors(count, dtype, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return lambda: (scale * torch.randn(count, generator=g, dtype=torch.float64)).to(dtype)


def exact(*tensors):
    return [x.detach().double() if x is not None and x.is_floating_point() else x for x in tensors]


def test_exp_is_within_two_units_in_the_last_place(instructions):
    x = torch.cat(
        [
            torch.linspace(-87.3, 88, 400_003),
            torch.linspace(-1, 1, 100_001),
            torch.tensor([0.0, -0.0]),
        ]
    )
    out = torch.empty_like(x)
    instructions.exp(x.data_ptr(), len(x), out.data_ptr())
    truth = x.double().exp()
    unit = torch.nextafter(truth.float(), torch.tensor(math.inf)).double() - truth.float().double()
    assert ((out.double() - truth).abs() / unit).max() <= 2
    assert (out[x == 0] == 1).all()


def test_exp_at_the_edges(instructions):
    x = torch.tensor(
        [-math.inf, -1e4, -88.0, math.nan, 3.0]
    )  # an odd number: the last vector is not full
    out = torch.empty_like(x)
    instructions.exp(x.data_ptr(), len(x), out.data_ptr())
    assert out[:3].tolist() == [0, 0, 0] and out[3].isnan()
    torch.testing.assert_close(out[4], x[4].exp())


@pytest.mark.parametrize(
    "op",
    [
        "gae",
        "scatter_advantages",
        "normalize_and_scatter",
        "linear_logprobs",
        "ppo_loss",
        "value_loss",
        "linear_ppo",
        "paged_attention",
        "sample",
        "rms_norm",
        "swiglu",
        "rope",
    ],
)
def test_agrees_with_the_reference(instructions, op):
    inputs = bench.make_inputs(bench.Size(3, 19, 40, 37, 8, 203))
    call = bench.make_calls(inputs)[op]
    mine, reference = call(ops), call(ops.reference)
    for x, y in zip(mine, reference, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 511, 512, 513, 520, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalize_of_every_length(instructions, length, dtype):
    """Means far from 0, and off the mask what must not be touched."""
    values = vectors(length, dtype)() + 30
    mask = torch.rand(length, generator=torch.Generator().manual_seed(length)) < 0.7
    values[~mask] = math.nan
    result = ops.normalize(values, mask)
    truth = ops.reference.normalize(values.double(), mask)
    assert (result - truth).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12)
    assert (result[~mask] == 0).all()


@pytest.mark.parametrize("length", [1, 3, 7, 8, 9, 16, 31, 1000])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.99, 0.95), (0.0, 0.5)])
def test_gae_of_every_length(instructions, length, factors):
    lengths = torch.tensor([0, length, 2, length + 5])
    cu = lengths.cumsum(0).to(torch.int32)
    make = vectors(int(cu[-1]), torch.float32)
    rewards, values, bootstrap = make(), make(), torch.randn(3)
    terminated = torch.tensor([False, True, False])
    arguments = dict(bootstrap=bootstrap, gamma=factors[0], lambda_=factors[1])
    result = ops.gae(rewards, values, terminated, cu, **arguments)
    truth = ops.reference.gae(*exact(rewards, values), terminated, cu, **arguments)
    for x, y in zip(result, truth, strict=True):
        assert (x - y).abs().max() <= 1e-6 * max(1.0, float(y.abs().max()))


def head_case(n, v, dtype, logits=None):
    """Hidden states and a weight whose product is `logits` where given (then h = n), else random."""
    g = torch.Generator().manual_seed(n + v)
    if logits is not None:
        hidden, weight = torch.eye(n, dtype=dtype), logits.T.contiguous().to(dtype)
    else:
        hidden, weight = (
            torch.randn(rows, 16, dtype=torch.float64, generator=g).to(dtype) for rows in (n, v)
        )
    targets = torch.randint(0, v, (n,), generator=g)
    old, advantages, ref = torch.randn(3, n, dtype=torch.float64, generator=g).to(
        _library.widen(dtype)
    )
    return [hidden, weight, targets, old - 2, advantages, ref - 2]


def weight_size(case):
    return float(case[1].abs().max())


def gradients(function, case, **options):
    hidden, weight, targets, old, advantages, ref = case
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    result = function(*leaves, targets, old, advantages, ref_logprobs=ref, **options)
    loss = result[0] if isinstance(result, tuple) else result
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n, v", [(1, 1), (3, 2), (5, 1023), (7, 1024), (9, 1025), (4, 3001)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.4, "entropy_coef": 0.3, "kl_coef": 0.5},
        {"temperature": 0.4, "softcap": 3.0, "entropy_coef": 0.3},
    ],
)
def test_linear_ppo_is_no_less_exact_than_torch(instructions, dtype, n, v, options):
    case = head_case(n, v, dtype)
    truth = gradients(ops.reference.linear_ppo, exact(*case), **options)
    ours, torchs = (
        gradients(ops.linear_ppo, case, **options),
        gradients(ops.reference.linear_ppo, case, **options),
    )
    for x, y, z in zip(ours, torchs, truth, strict=True):
        assert (x - z).abs().max() <= 1.2 * (y - z).abs().max() + 1e-6 * max(
            1.0, float(z.abs().max())
        )


@pytest.mark.parametrize(
    "kind", ["one far above", "one far below", "all far below", "alternating", "equal"]
)
def test_extreme_logits(instructions, kind):
    n, v = 6, 2100
    logits = torch.randn(n, v)
    logits[:, 1500] += {"one far above": 1e4, "one far below": -1e4}.get(kind, 0)
    logits += {"all far below": -1e4}.get(kind, 0)
    if kind == "alternating":
        logits = torch.where(torch.arange(v) % 2 == 0, 1e4, -1e4).expand(n, v)
    if kind == "equal":
        logits = torch.full((n, v), 1e4)
    case = head_case(n, v, torch.float32, logits)
    case[2] = torch.tensor([0, 1, 1500, 1500, 2099, 1024])
    logprobs, entropy = ops.linear_logprobs(*case[:3], entropy=True)
    truth, true_entropy = ops.reference.linear_logprobs(*exact(*case[:3]), entropy=True)
    assert (logprobs <= 0).all() and logprobs.isfinite().all() and entropy.isfinite().all()
    torch.testing.assert_close(logprobs.double(), truth, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), true_entropy, rtol=1e-6, atol=2e-5)
    case[3] = truth.float() + 0.1  # ratios near 1, so that all rows have gradients
    case[5] = truth.float() - 0.1
    ours, expected = (
        gradients(ops.linear_ppo, case),
        gradients(ops.reference.linear_ppo, exact(*case)),
    )
    # A hidden state's gradient is a sum of weights, which are as large as the logits.
    for x, y, size in zip(ours, expected, (1, weight_size(case), 1), strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x.double(), y, rtol=2e-3, atol=1e-5 * size)


def test_a_logit_of_minus_infinity_counts_for_nothing(instructions):
    logits = torch.randn(3, 50)
    without = logits[:, :40].contiguous()
    logits[:, 40:] = -math.inf
    rows, targets = {}, torch.tensor([0, 7, 39])
    for name, z in (("with", logits), ("without", without)):
        rows[name] = torch.empty(2, 3)
        sums = torch.empty(3, 4, dtype=torch.float64)
        instructions.linear_logprobs_float32(
            z.data_ptr(), targets.data_ptr(), *z.shape, 0, z.shape[1], 1.0,
            sums.data_ptr(), rows[name][0].data_ptr(), rows[name][1].data_ptr(), 1,
        )  # fmt: skip
    torch.testing.assert_close(rows["with"], rows["without"])


def test_what_is_not_a_number_is_not_hidden(instructions):
    hidden, weight, targets, old, advantages, ref = head_case(3, 20, torch.float32)
    hidden[1, 2] = math.nan
    leaf = hidden.requires_grad_()
    loss, metrics = ops.linear_ppo(leaf, weight, targets, old, advantages, ref_logprobs=ref)
    assert loss.isnan() and metrics["kl"].isnan() and metrics["entropy"].isnan()
    assert torch.autograd.grad(loss, leaf)[0][1].isnan().all()
    logprobs = torch.tensor([0.0, math.nan, -1.0])
    every = torch.ones(3, dtype=torch.bool)
    assert ops.ppo_loss(logprobs, torch.zeros(3), torch.ones(3), every)[0].isnan()
    assert ops.value_loss(logprobs, torch.zeros(3), torch.ones(3), every)[0].isnan()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 2**27], ids=["row by row", "at once"])
def test_rows_without_gradient_are_left_out(instructions, chunk, softcap, monkeypatch):
    """Those of a whole chunk too, the first one among them."""
    monkeypatch.setitem(_head.CHUNK_BYTES, "cpu", chunk)
    hidden, weight, targets, old, advantages, _ = head_case(40, 30, torch.float64)
    advantages[::3] = 0  # and others are clipped
    options = {"entropy_coef": 0.0, "softcap": softcap}
    result = gradients(ops.linear_ppo, [hidden, weight, targets, old, advantages, None], **options)
    expected = gradients(
        ops.reference.linear_ppo, [hidden, weight, targets, old, advantages, None], **options
    )
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)
    assert (result[1][::3] == 0).all() and not (result[1] == 0).all()
    nothing = gradients(
        ops.linear_ppo, [hidden, weight, targets, old, torch.zeros(40).double(), None], **options
    )
    assert all((x == 0).all() for x in nothing)


def test_threads_change_nothing(monkeypatch):
    size = bench.Size(64, 40, 290, 700, 4, 1000)  # large enough for threads to be worth it
    inputs = bench.make_inputs(size)
    calls = bench.make_calls(inputs)
    for op in ("find_roles", "scatter_advantages", "linear_ppo"):
        alone = calls[op](ops)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        together = calls[op](ops)
        monkeypatch.undo()
        for x, y in zip(alone, together, strict=True):
            assert torch.equal(x, y), op


def test_errors_in_threads_reach_the_caller(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    ids = torch.zeros(2_000_000, dtype=torch.int64)
    ids[1_900_000] = 7
    cu_tokens = torch.arange(20_001, dtype=torch.int32) * 100
    with pytest.raises(ValueError, match="token_ids: 7"):
        ops.find_roles(ids, cu_tokens, ops.TokenPieces.from_bytes([b"a"]))
