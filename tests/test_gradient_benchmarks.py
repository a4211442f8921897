"""The scripts behind docs/hae.md: figures are those of the stored results, and statistics those worked out by hand."""

import json
from pathlib import Path
from xml.etree import ElementTree

import gradient_variance
import option_mdp
import pytest
import torch
from helpers import make_tiny

DOCS = Path(option_mdp.__file__).parents[1] / "docs"


def test_figures_are_drawn_from_the_stored_results():
    figures = option_mdp.draw_figures(json.loads(option_mdp.RESULTS.read_text()))
    assert sorted(figures) == ["hae-bias.svg", "hae-variance.svg"]
    for name, figure in figures.items():
        assert (DOCS / name).read_text(encoding="utf-8") == figure
        ElementTree.fromstring(figure)
        assert "nan" not in figure and "inf" not in figure
        assert name in (DOCS / "hae.md").read_text(encoding="utf-8")


def test_quartiles():
    assert option_mdp.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2.0, 3.0, 4.0]


def test_stored_biases_are_measured_again():
    """One process, one point of the curve: flat GAE's variance at lambda 1 is the unit, and nothing is biased."""
    scene = option_mdp.make_scene(0)
    found = option_mdp.measure(scene, "gae", scene.tables, (1.0, 1.0))
    assert found["bias"] < 1e-10
    row = option_mdp.average([found], sum(found["variance"]))
    assert row["variance"] == 1
    facts = option_mdp.find_bias_of_truncation(scene)
    assert facts["truncated, bootstrap V_switch"] < 1e-10 < facts["truncated, bootstrap V_high"]
    assert option_mdp.normalise(scene) < 1 - 1e-4


def test_noise_over_signal_of_gradients():
    found = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])
    told = gradient_variance.describe(found, found @ torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))
    # |g|^2: 2, 2, 1, on average 5/3; products of two: 0, 1, 1, on average 2/3; so variance 1 over signal 2/3
    assert told["relative_variance"] == pytest.approx(1.5)
    assert told["cosine"] == pytest.approx((0 + 2 * 2**-0.5) / 3, abs=1e-4)
    # leaving one out: cosines 2**-.5, 2**-.5, 0; their variance 1/9, times 2
    assert told["cosine_error"] == pytest.approx((2 / 9) ** 0.5, abs=1e-4)
    assert told["to_unbiased"] == pytest.approx(0)  # a quarter turn away
    opposed = gradient_variance.describe(
        torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.1]]), found
    )
    assert opposed["relative_variance"] is None and opposed["to_unbiased"] is None
    same = gradient_variance.describe(torch.ones(3, 4), 2 * torch.ones(3, 4))
    assert same == {
        "cosine": 1.0,
        "cosine_error": 0.0,
        "relative_variance": 0.0,
        "to_unbiased": 1.0,
    }


def test_gradients_of_the_levels_add_up_to_haes(monkeypatch):
    monkeypatch.setattr(gradient_variance, "warm_start", lambda *_: None)
    config = gradient_variance.resolve(given={
        "env.name": "household", "model.device": "cpu", "train.episodes": 3, "env.max_turns": 3,
        "train.kl_coef": 0, "train.entropy_coef": 0,
    })  # fmt: skip
    bench = gradient_variance.open_bench(config)
    played = bench.play("test", 0)
    found = gradient_variance.find_gradients(bench, played)
    whole = bench.find_gradient(played, bench.credit(played, "hae"))
    assert whole.norm() > 0 and whole.shape == (
        sum(p.numel() for p in make_tiny().model.parameters()),
    )
    torch.testing.assert_close(found["HAE"], whole, rtol=1e-3, atol=1e-5)
