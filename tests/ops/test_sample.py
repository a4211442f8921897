"""sample: draws by the distribution function of softmax(logits / temperature), against the reference in float64."""

import math

import pytest
import torch

from hiper_fast import ops
from hiper_fast.ops import reference
from hiper_fast.ops.sample import _run_reference

LAST = math.nextafter(1.0, 0.0)
EDGE = 2e-6  # of a distribution function of float32 probabilities
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draws(n, v, *, dtype=torch.float32, scale=2.0, seed=0):
    """(logits, uniform, temperature): a third of the rows greedy, a tenth of the logits impossible."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, v, generator=g)
    logits[:, 1:].masked_fill_(torch.rand(n, v - 1, generator=g) < 0.1, -math.inf)
    uniform = torch.rand(n, generator=g, dtype=torch.float64)
    temperature = 0.3 + torch.rand(n, generator=g)
    temperature[torch.rand(n, generator=g) < 1 / 3] = 0.0
    return logits.to(dtype), uniform, temperature


def assert_drawn(result, logits, uniform, temperature, edge=EDGE):
    """Each uniform number lies in its token's interval of the exact distribution function, but for the rounding of its
    edges; a greedy row's token is the first of the largest; log-probs are the exact ones."""
    tokens, logprobs = result
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert tokens.shape == logprobs.shape == uniform.shape
    greedy = temperature == 0
    divisor = temperature.double().masked_fill(greedy, 1.0)[:, None]
    log_p = torch.log_softmax(logits.double() / divisor, -1)
    sums = log_p.exp().cumsum(-1)
    high, chosen = (x.gather(1, tokens[:, None])[:, 0] for x in (sums, log_p))
    low = high - chosen.exp()
    assert (chosen > -math.inf).all()
    assert (greedy | (low - edge <= uniform) & (uniform <= high + edge)).all()
    assert torch.equal(tokens[greedy], logits[greedy].double().argmax(-1))
    torch.testing.assert_close(logprobs, chosen.float(), rtol=1e-5, atol=1e-5)
    assert (logprobs <= 0).all()


def impossible_but_in_the_middle(v):
    """(logits [1, v], which tokens are possible, all alike)."""
    logits, possible = torch.zeros(1, v), [v // 2, v // 2 + 1] if v > 3 else [1]
    logits[0, : possible[0]] = logits[0, possible[-1] + 1 :] = -math.inf
    return logits, possible


SHAPES = [(0, 3), (1, 1), (5, 1), (40, 2), (1, 17), (60, 17), (30, 1000), (9, 4097), (3, 151_936)]


@pytest.mark.parametrize("n, v", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_of_every_shape(n, v, dtype):
    given = draws(n, v, dtype=dtype)
    assert_drawn(ops.sample(*given), *given)
    assert_drawn(_run_reference(*given), *given)


def test_by_hand():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(7, 4)
    uniform = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 0.61, LAST], dtype=torch.float64)
    for run in (ops.sample, reference.sample):
        tokens, logprobs = run(logits, uniform, torch.ones(7))
        assert tokens.tolist() == [0, 0, 1, 1, 2, 3, 3]
        torch.testing.assert_close(logprobs, logits[0, tokens])
        # At temperature 1/2 the probabilities' squares: 1, 4, 9 and 16 of 30.
        tokens, logprobs = run(logits, uniform, torch.full((7,), 0.5))
        assert tokens.tolist() == [0, 1, 1, 2, 2, 3, 3]
        torch.testing.assert_close(logprobs.exp(), (tokens + 1).float().square() / 30)


@pytest.mark.parametrize("run", [ops.sample, reference.sample], ids=["op", "reference"])
@pytest.mark.parametrize("v", [7, 3000])
def test_a_grid_of_numbers_draws_each_token_by_its_share(run, v):
    """Of n equidistant numbers each token gets n times its probability, to within one."""
    n = 20_000 if v < 100 else 3000
    logits = 2 * torch.randn(v, generator=torch.Generator().manual_seed(v))
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, _ = run(logits.expand(n, v), uniform, torch.full((n,), 0.7))
    expected = n * torch.softmax(logits.double() / 0.7, -1)
    assert (tokens.bincount(minlength=v) - expected).abs().max() <= 1 + n * EDGE


def test_random_numbers_draw_by_the_distribution():
    """The chi-square of 20,000 draws of 8 tokens: above 24.3 in one of a thousand."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5, -0.5, -30.0])
    n, g = 20_000, torch.Generator().manual_seed(1)
    uniform = torch.rand(n, generator=g, dtype=torch.float64)
    tokens, _ = ops.sample(logits.expand(n, 8), uniform, torch.full((n,), 1.3))
    expected = n * torch.softmax(logits.double() / 1.3, -1)[:7]
    counts = tokens.bincount(minlength=8)
    assert counts[7] == 0
    assert ((counts[:7] - expected).square() / expected).sum() < 24.3


@pytest.mark.parametrize("v", [3, 1024, 2500])
@pytest.mark.parametrize("number", [0.0, LAST])
def test_the_first_and_the_last_number_draw_what_is_possible(v, number):
    """Impossible tokens at both ends, of whole blocks too."""
    logits, possible = impossible_but_in_the_middle(v)
    wanted = possible[0] if number == 0 else possible[-1]
    for temperature in (1.0, 1e-3, 50.0):
        uniform = torch.tensor([number], dtype=torch.float64)
        token, logprob = ops.sample(logits, uniform, torch.tensor([temperature]))
        assert token.item() == wanted
        assert logprob.item() == pytest.approx(-math.log(len(possible)), abs=1e-6)


@pytest.mark.parametrize("run", [ops.sample, _run_reference], ids=["op", "reference"])
def test_extreme_logits(run):
    """The largest at the end, far above or among many; what a mask of the lowest number leaves."""
    lowest = torch.finfo(torch.float32).min
    logits = torch.zeros(4, 2100)
    logits[0, 2099] = 1e4
    logits[1] = 1e30
    logits[2], logits[2, 1500] = lowest, -3.0
    logits[3], logits[3, :1100] = lowest, -math.inf
    uniform = torch.full((4,), 0.5, dtype=torch.float64)
    for temperature in (1.0, 0.0, 1.2e-38):
        given = logits, uniform, torch.full((4,), temperature)
        tokens, logprobs = run(*given)
        drawn = temperature > 0
        assert tokens.tolist() == [2099, 1050 * drawn, 1500, 1100 + 500 * drawn]
        expected = torch.tensor([0.0, -math.log(2100), 0.0, -math.log(1000)])
        torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize("run", [ops.sample, _run_reference], ids=["op", "reference"])
def test_the_highest_temperature_makes_all_that_is_possible_alike(run):
    logits = torch.tensor([[-math.inf, 0.0, 5.0, -math.inf]])
    uniform = torch.tensor([0.6], dtype=torch.float64)
    token, logprob = run(logits, uniform, torch.tensor([3e38]))
    assert token.item() == 2 and logprob.item() == pytest.approx(-math.log(2))


@pytest.mark.parametrize("run", [ops.sample, _run_reference], ids=["op", "reference"])
def test_greedy_takes_the_first_of_equals(run):
    logits = torch.zeros(3, 2500)
    logits[0, [7, 900, 2400]] = 1.0
    logits[1, [2047, 2048]] = 1.0
    uniform = torch.full((3,), 0.9, dtype=torch.float64)
    tokens, logprobs = run(logits, uniform, torch.zeros(3))
    assert tokens.tolist() == [7, 2047, 0]
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[range(3), tokens])


@pytest.mark.parametrize("run", [ops.sample, _run_reference], ids=["op", "reference"])
@pytest.mark.parametrize("v", [1, 17, 1500])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_without_a_distribution(run, v, temperature):
    """Beside one that has one, which is drawn as it would be alone."""
    logits = torch.zeros(4, v)
    logits[0, v // 2], logits[1], logits[2, -1] = math.nan, -math.inf, math.inf
    uniform = torch.full((4,), 0.5, dtype=torch.float64)
    tokens, logprobs = run(logits, uniform, torch.full((4,), temperature))
    assert tokens[:3].tolist() == [0, 0, 0] and logprobs[:3].isnan().all()
    assert tokens[3] == (v // 2 if temperature else 0)
    assert logprobs[3].item() == pytest.approx(-math.log(v), abs=1e-6)


def test_rows_that_lie_apart_and_columns_that_do():
    logits, uniform, temperature = draws(20, 130)
    expected = ops.sample(logits.contiguous(), uniform, temperature)
    wide = torch.full((20, 150), math.nan)
    wide[:, 3:133] = logits
    spread = torch.stack([uniform, uniform], 1)[:, 0], torch.stack([temperature] * 2, 1)[:, 0]
    for strided in (wide[:, 3:133], logits.T.contiguous().T, torch.stack([logits] * 3, 2)[..., 1]):
        for mine, its in zip(ops.sample(strided, *spread), expected, strict=True):
            assert torch.equal(mine, its)
    alike = ops.sample(logits[:1].expand(20, 130), uniform, temperature)
    assert_drawn(alike, logits[:1].expand(20, 130), uniform, temperature)


def test_a_row_is_drawn_alone(monkeypatch):
    """Whatever stands beside it, and however many threads there are."""
    given = draws(300, 3000)
    together = ops.sample(*given)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(map(torch.equal, together, ops.sample(*given)))
    monkeypatch.undo()
    for row in range(0, 300, 37):
        alone = ops.sample(*(x[row : row + 1] for x in given))
        assert [x.item() for x in alone] == [x[row].item() for x in together]


@pytest.mark.parametrize(
    "name, change",
    [
        ("logits", {"logits": [[0.0]]}),
        ("logits", {"logits": torch.zeros(5)}),
        ("logits", {"logits": torch.zeros(3, 0)}),
        ("logits", {"logits": torch.zeros(3, 5, dtype=torch.int64)}),
        ("uniform", {"uniform": torch.zeros(3)}),
        ("uniform", {"uniform": torch.zeros(2, dtype=torch.float64)}),
        ("uniform", {"uniform": torch.tensor([0, 1, 0.5], dtype=torch.float64)}),
        ("uniform", {"uniform": torch.tensor([0, -0.1, 0.5], dtype=torch.float64)}),
        ("uniform", {"uniform": torch.tensor([0, math.nan, 0.5], dtype=torch.float64)}),
        ("temperature", {"temperature": torch.ones(3, dtype=torch.float64)}),
        ("temperature", {"temperature": torch.ones(3, 1)}),
        ("temperature", {"temperature": torch.ones(3, device="meta")}),
        ("temperature", {"temperature": torch.tensor([1, 1, -1.0])}),
        ("temperature", {"temperature": torch.tensor([1, 1, math.inf])}),
        ("temperature", {"temperature": torch.tensor([1, 1, math.nan])}),
    ],
)
def test_names_what_is_wrong(name, change):
    given = {
        "logits": torch.zeros(3, 5),
        "uniform": torch.zeros(3, dtype=torch.float64),
        "temperature": torch.ones(3),
    } | change
    with pytest.raises(ValueError, match=f"^{name} must") as ours:
        ops.sample(**given)
    if "index" in str(ours.value):
        with pytest.raises(ValueError) as plain:
            _run_reference(**given)
        assert str(plain.value) == str(ours.value)


def test_no_gradient():
    logits, uniform, temperature = draws(3, 9)
    tokens, logprobs = ops.sample(logits.requires_grad_(), uniform, temperature)
    assert not tokens.requires_grad and not logprobs.requires_grad
