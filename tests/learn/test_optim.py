"""Optimisers: what float32 masters keep, and that every kind resumes exactly."""

import math

import pytest
import torch
from helpers import make_tiny
from test_train import arguments
from torch import nn

from hiper_fast import train
from hiper_fast.config import Config, TrainConfig
from hiper_fast.learn import optim
from hiper_fast.options import ConfigError
from hiper_fast.runs import checkpoint
from hiper_fast.runs.tensors import read_tensors

BETAS = (0.9, 0.99)


def weights(dtype=torch.bfloat16, seed=0):
    """A matrix of 8-bit states' size and a small vector."""
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in ((64, 128), (5,))
    ]


def adamw(parameters, lr=1e-3, **options):
    optimizer = optim.build_adamw(parameters, TrainConfig(**options), BETAS)
    optim.set_lr(optimizer, lr)
    return optimizer


def steps(optimizer, parameters, count, seed=1):
    """`count` steps on float32 gradients that do not depend on the weights."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.fixture(params=["adamw", "adamw8bit", "offload"])
def kind(request):
    if request.param == "adamw8bit":
        pytest.importorskip("torchao")
        with torch.compiler.set_stance("force_eager"):
            yield request.param
    else:
        yield request.param


@pytest.mark.parametrize("master_weights", [True, False])
def test_an_update_of_a_millionth_is_kept_by_masters_and_lost_without(master_weights):
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = adamw([weight], lr=1e-6, weight_decay=0.0, master_weights=master_weights)
    for _ in range(4000):
        weight.grad = torch.ones(3, dtype=torch.float32 if master_weights else torch.bfloat16)
        optimizer.step()
    expected = 1 - 4000 * 1e-6 if master_weights else 1.0
    assert weight.tolist() == pytest.approx([expected] * 3, abs=2**-9)
    if master_weights:
        assert optimizer.state_dict()["state"][0]["master"].tolist() == pytest.approx(
            [expected] * 3, abs=1e-4
        )


def test_traces_of_gradients_move_nothing_as_far_as_gradients_do():
    """With AdamW's usual epsilon a row whose gradients are a thousandth moves as far as the others."""
    agent = make_tiny()
    agent.add_critic()
    config = Config()
    config.train.weight_decay = 0.0

    def moved(eps):
        config.train.eps = eps
        optimizer = optim.build_optimizers(agent, config)["policy"]
        optim.set_lr(optimizer, 1e-3)
        weight = agent.model.get_input_embeddings().weight
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, 1e-3)
        weight.grad[7] = 1e-6
        optimizer.step()
        return [(before - weight.detach())[row].mean().item() for row in (6, 7)]

    usual, trace = moved(1e-8)
    assert trace == pytest.approx(usual, rel=0.02)
    usual, trace = moved(1e-4)
    assert usual == pytest.approx(1e-3 / 1.1, rel=0.01) and trace < 0.02 * usual


@pytest.mark.parametrize("name", ["adamw", "offload"])
def test_masters_are_what_float32_training_would_have(name):
    half, full = weights(), [nn.Parameter(p.detach().float()) for p in weights()]
    for parameters in (half, full):
        steps(adamw(parameters, optimizer=name), parameters, 5)
    for p, q in zip(half, full, strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, q.bfloat16())
    plain = [nn.Parameter(p.detach().float()) for p in weights()]
    steps(torch.optim.AdamW(plain, lr=1e-3, betas=BETAS, weight_decay=0.01), plain, 5)
    for q, r in zip(full, plain, strict=True):
        torch.testing.assert_close(q, r, rtol=1e-6, atol=1e-7)


def test_gradients_of_microbatches_add_up_in_float32():
    (weight, _), (coarse, _) = weights(), weights()
    adamw([weight])
    adamw([coarse], master_weights=False)
    for p in (weight, coarse):
        for scale in [1.0] + [1e-3] * 100:
            (p.float() * scale).sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad[0, 0].item() == pytest.approx(
        1.1, rel=1e-3
    )
    assert coarse.grad.dtype == torch.bfloat16 and coarse.grad[0, 0].item() == 1.0


def test_float32_weights_need_no_masters_and_frozen_ones_no_states():
    parameters = weights(torch.float32)
    parameters[1].requires_grad_(False)
    optimizer = adamw(parameters)
    assert (
        type(optimizer) is torch.optim.AdamW
        and optimizer.param_groups[0]["params"] == parameters[:1]
    )


def test_mixed_precisions_share_an_optimizer():
    """A bfloat16 trunk below float32 heads."""
    trunk, heads = weights()[0], weights(torch.float32)[1]
    alone = nn.Parameter(heads.detach().clone())
    steps(adamw([trunk, heads]), [trunk, heads], 3)
    assert (
        heads.dtype == torch.float32
        and heads.grad_dtype == torch.float32
        and not torch.equal(heads, alone)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kind_descends(kind, dtype):
    parameters = weights(dtype)
    optimizer = adamw(parameters, lr=3e-2, optimizer=kind)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = sum(p.float().square().sum() for p in parameters)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_kind_resumes_bit_for_bit(kind, dtype, tmp_path):
    def build(seed):
        agent = make_tiny(seed=seed, dtype=dtype)
        agent.add_critic()
        config = Config()
        config.train.optimizer = kind
        return agent, optim.build_optimizers(agent, config)

    def go_on(agent, optimizers, count):
        for optimizer in optimizers.values():
            optim.set_lr(optimizer, 1e-3)
        parameters = [*agent.model.parameters(), *agent.critic.parameters()]
        for number in range(count):
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            (sum(p.float().square().sum() for p in parameters) * (1 + number)).backward()
            for optimizer in optimizers.values():
                optimizer.step()
        return parameters

    def saved(folder, agent, optimizers):
        return checkpoint.save(
            folder,
            1,
            policy=agent.model,
            tokenizer=agent.tokenizer,
            critic=agent.critic,
            optimizers=optimizers,
            state={},
        )

    agent, optimizers = build(0)
    go_on(agent, optimizers, 2)
    path = saved(tmp_path, agent, optimizers)
    expected = go_on(agent, optimizers, 3)
    other, restored = build(1)
    checkpoint.load(path, policy=other.model, critic=other.critic, optimizers=restored)
    for ours, theirs in zip(go_on(other, restored, 3), expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    again = saved(tmp_path / "again", other, restored)
    first = saved(tmp_path / "first", agent, optimizers)
    for file in (
        "optimizer.safetensors",
        "optimizer.json",
        "model.safetensors",
        "critic.safetensors",
    ):
        assert (again / file).read_bytes() == (first / file).read_bytes(), file


def test_a_run_in_bfloat16_resumes_exactly(tmp_path):
    options = {"model__dtype": "bfloat16", "train__final_lr": 1, "eval__every": 9}
    assert train.main(arguments(tmp_path, name="whole", **options | {"updates": 4})) == 0
    assert train.main(arguments(tmp_path, name="parts", **options | {"updates": 2})) == 0
    assert (
        train.main([*arguments(tmp_path, name="parts", **options | {"updates": 4}), "--resume"])
        == 0
    )
    for file in ("model.safetensors", "critic.safetensors", "optimizer.safetensors"):
        whole, parts = (
            tmp_path / name / "checkpoints" / "step-000004" / file for name in ("whole", "parts")
        )
        assert whole.read_bytes() == parts.read_bytes(), file
    stored = read_tensors(
        tmp_path / "whole" / "checkpoints" / "step-000004" / "optimizer.safetensors"
    )
    assert stored["policy/0/master"].dtype == torch.float32 and math.isfinite(
        stored["policy/0/master"].sum()
    )


def test_8_bit_without_torchao_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(
        ConfigError, match=r"train.optimizer: adamw8bit needs torchao.*hiper_fast\[8bit\]"
    ):
        adamw(weights(), optimizer="adamw8bit")


@pytest.mark.parametrize(
    "dtype, from_scratch", [("float32", True), ("bfloat16", True), ("float32", False)]
)
def test_the_warm_start_steps_every_weight_once_and_muon_only_matrices_from_scratch(
    dtype, from_scratch
):
    agent = make_tiny(dtype=dtype)
    agent.tiny = from_scratch
    stepped = [
        (type(optimizer), p)
        for optimizer, _ in optim.build_imitation_optimizers(agent, TrainConfig())
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert sorted(id(p) for _, p in stepped) == sorted(id(p) for p in agent.model.parameters())
    layers = agent.model.base_model.layers
    matrices = {id(p) for p in layers.parameters() if p.ndim == 2}
    expected = matrices if (dtype, from_scratch) == ("float32", True) else set()
    assert {id(p) for kind, p in stepped if kind is torch.optim.Muon} == expected
