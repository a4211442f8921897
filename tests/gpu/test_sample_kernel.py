"""sample on the device against the exact distribution function, wherever rows begin."""

import math

import pytest
import torch
from test_sample import LAST, assert_drawn, draws, impossible_but_in_the_middle

pytest.importorskip("triton")

from hiper_fast.kernels import raise_pending
from hiper_fast.kernels.sample import sample

pytestmark = pytest.mark.gpu


@pytest.fixture
def run(device):
    def run_kernel(logits, *vectors):
        tokens, logprobs = sample(logits.to(device), *(x.to(device) for x in vectors))
        return tokens.cpu(), logprobs.cpu()

    return run_kernel


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize(
    "n, v", [(0, 3), (1, 1), (9, 2), (30, 17), (5, 4096), (5, 4097), (3, 9001)]
)
def test_is_drawn_by_the_distribution(run, n, v, dtype):
    given = draws(n, v, dtype=dtype)
    assert_drawn(run(*given), *given)


def test_of_a_usual_vocabulary(run):
    given = draws(2, 151_936)
    assert_drawn(run(*given), *given)


def test_of_more_blocks_than_the_usual_ones(run, monkeypatch):
    monkeypatch.setattr("hiper_fast.kernels.sample._BLOCK", 16)
    given = draws(4, 16 * 130 + 5)
    assert_drawn(run(*given), *given)


@pytest.mark.parametrize("first", range(1, 9))
def test_rows_begin_anywhere(run, device, dtype, first):
    """Slices of wider rows, of an odd pitch: what lies around them is not a number."""
    logits, uniform, temperature = draws(7, 5000, dtype=dtype)
    wide = torch.full((7, 5013), math.nan, dtype=dtype, device=device)
    inside = wide[:, first : first + 5000]
    inside.copy_(logits)
    assert_drawn(run(inside, uniform, temperature), logits, uniform, temperature)
    columns = logits.T.contiguous().T
    assert_drawn(run(columns, uniform, temperature), logits, uniform, temperature)


@pytest.mark.parametrize("v", [3, 4096, 9000])
@pytest.mark.parametrize("number", [0.0, LAST])
def test_the_first_and_the_last_number_draw_what_is_possible(run, v, number):
    """Impossible tokens at both ends, of whole blocks too."""
    logits, possible = impossible_but_in_the_middle(v)
    token, logprob = run(logits, torch.tensor([number], dtype=torch.float64), torch.ones(1))
    assert token.item() == (possible[0] if number == 0 else possible[-1])
    assert logprob.item() == pytest.approx(-math.log(len(possible)), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.0, 1e-30])
def test_extreme_logits(run, temperature):
    lowest = torch.finfo(torch.float32).min
    logits = torch.zeros(4, 9000)
    logits[0, 8999] = 1e4
    logits[1] = 1e30
    logits[2], logits[2, 5000] = lowest, -3.0
    logits[3], logits[3, :5000] = lowest, -math.inf
    uniform = torch.full((4,), 0.501, dtype=torch.float64)
    tokens, logprobs = run(logits, uniform, torch.full((4,), temperature))
    drawn = temperature > 0
    assert tokens.tolist() == [8999, 4509 * drawn, 5000, 5000 + 2004 * drawn]
    expected = torch.tensor([0.0, -math.log(9000), 0.0, -math.log(4000)])
    torch.testing.assert_close(logprobs, expected)


def test_the_highest_temperature_makes_all_that_is_possible_alike(run):
    logits = torch.tensor([[-math.inf, 0.0, 5.0, -math.inf]])
    uniform = torch.tensor([0.6], dtype=torch.float64)
    token, logprob = run(logits, uniform, torch.tensor([3e38]))
    assert token.item() == 2 and logprob.item() == pytest.approx(-math.log(2))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_without_a_distribution(run, temperature):
    logits = torch.zeros(4, 5000)
    logits[0, 4500], logits[1], logits[2, -1] = math.nan, -math.inf, math.inf
    uniform = torch.full((4,), 0.501, dtype=torch.float64)
    tokens, logprobs = run(logits, uniform, torch.full((4,), temperature))
    assert tokens.tolist() == [0, 0, 0, 2505 if temperature else 0]
    assert logprobs[:3].isnan().all()
    assert logprobs[3].item() == pytest.approx(-math.log(5000), abs=1e-6)


@pytest.mark.parametrize("v", [5000, 5001])
def test_a_row_is_drawn_alone(run, v):
    """Of an odd size rows begin elsewhere when they are among others."""
    given = draws(20, v)
    together = run(*given)
    for row in (0, 7, 19):
        alone = run(*(x[row : row + 1] for x in given))
        assert [x.item() for x in alone] == [x[row].item() for x in together]


@pytest.mark.parametrize(
    "name, number", [("uniform", 1.0), ("uniform", math.nan), ("temperature", -1.0)]
)
def test_bad_numbers_are_reported(run, name, number):
    logits, uniform, temperature = draws(3, 5)
    (uniform if name == "uniform" else temperature)[1] = number
    tokens, _ = run(logits, uniform, temperature)
    assert ((tokens >= 0) & (tokens < 5)).all()
    with pytest.raises(ValueError, match=f"^sample: {name} must"):
        raise_pending()
