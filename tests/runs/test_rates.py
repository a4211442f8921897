"""Learning rates that are far from what a model of its size is used to are told of before anything is played."""

import pytest
from helpers import configure

from hiper_fast.configure import list_recipes, resolve
from hiper_fast.runs.rates import find_usual_rate, judge_rates

TINY = 400_000
RECIPES = [name for name in list_recipes() if name.startswith("qwen")]


def test_the_usual_rate_meets_what_is_known_and_never_rises_with_the_size():
    assert find_usual_rate(TINY) == pytest.approx(8e-4, rel=0.05)
    assert find_usual_rate(1_500_000_000) == pytest.approx(1e-6)
    assert find_usual_rate(70_000_000_000) == pytest.approx(1e-6)
    assert find_usual_rate(7_000_000_000, lora=True) == pytest.approx(1e-5)
    rates = [find_usual_rate(10**power) for power in range(4, 12)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("name", ["household", "alfworld", "webshop"])
def test_the_defaults_are_usual(name):
    assert judge_rates(configure(name), TINY) == []
    assert judge_rates(configure(name, model__path="some/model"), 1_500_000_000) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_are_usual(recipe):
    config = resolve(["alfworld", recipe])
    weights = 7_600_000_000 if "7b" in recipe else 1_543_700_000
    assert judge_rates(config, weights, lora=config.model.lora_rank > 0) == []


def test_the_tiny_models_rates_on_a_large_model():
    config = configure(train__lr=8e-4, train__critic_lr=1e-5, warm_start__enabled="yes")
    first, second = judge_rates(config, 1_500_000_000)
    assert first == (
        "warning: train.lr is 0.0008, 800 times what models of 1,500.0 M weights are used to; about 1e-06 is usual"
    )
    assert second.startswith("warning: warm_start.lr is 0.0025, 500 times")


def test_a_large_models_rates_on_the_tiny_model():
    config = configure(train__lr=1e-6, train__critic_lr=1e-3)
    (text,) = judge_rates(config, TINY)
    assert "train.lr is 1e-06, 1/785 of what models of 0.4 M weights are used to" in text


def test_what_does_not_train_is_not_judged():
    options = {"advantage__estimator": "grpo", "train__group": 8, "train__critic_lr": 1}
    assert judge_rates(configure(**options), TINY) == []
    assert judge_rates(configure(train__lr=0), TINY) == []
