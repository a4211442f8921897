"""Models from folders, LoRA, recomputed and compiled layers: the same numbers as the plain path."""

import shutil
import sys

import pytest
import torch
import transformers
from helpers import HOUSEHOLD, make_tiny, name_cache
from test_train import SMALL
from transformers import AutoModelForCausalLM

from hiper_fast import eval as evaluation
from hiper_fast import train
from hiper_fast.agent import tiny
from hiper_fast.agent.loading import load_agent
from hiper_fast.config import Config, ModelConfig
from hiper_fast.learn import optim
from hiper_fast.options import ConfigError
from hiper_fast.packing import microbatches, prefix_sums
from hiper_fast.runs import checkpoint

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def save_model(folder, kind="qwen2", tied=True, dtype=torch.float32):
    """A random model and the household tokenizer as a folder, as a user would have one."""
    tokenizer = tiny.load_tokenizer(HOUSEHOLD.tokenizer)
    extra = {"head_dim": 8} if kind == "qwen3" else {}
    config = CONFIGS[kind](
        vocab_size=len(tokenizer) + 1,  # transformers adds a token where it takes it for Qwen2's
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        **SIZES,
        **extra,
    )
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(folder, "llama")
    return folder


def load(folder, **options):
    return load_agent(ModelConfig(path=str(folder), device="cpu", **options), seed=0)


def hidden(base_model, ids):
    return base_model(input_ids=ids, use_cache=False).last_hidden_state


IDS = torch.tensor([[5, 9, 300, 41, 7, 8, 12]])


# Loading.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_loads_from_its_folder(tmp_path, kind, tied):
    saved = save_model(tmp_path, kind, tied)
    agent = load(tmp_path)
    assert type(agent.model) is type(saved) and agent.stop_ids == (1,)
    assert agent.decode(agent.tokenizer("go to desk 1")["input_ids"]) == b"go to desk 1"
    with torch.no_grad():
        logits = saved(input_ids=IDS[:, :-1]).logits[0, :, : len(agent.tokenizer)]
        expected = torch.log_softmax(logits, -1).gather(1, IDS[0, 1:, None])[:, 0]
        found = agent.logprobs(hidden(agent.model.base_model, IDS[:, :-1])[0], IDS[0, 1:], 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    shared = agent.model.get_output_embeddings().weight is agent.model.get_input_embeddings().weight
    assert shared == tied
    path = checkpoint.save(tmp_path / "saved", 1, policy=agent.model, tokenizer=agent.tokenizer, critic=None,
                           optimizers={}, state={})  # fmt: skip
    again = load(path)
    for name, p in agent.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], p), name


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_folders_of_any_precision_load_in_the_one_asked_for(tmp_path, stored, asked):
    saved = save_model(tmp_path, dtype=stored)
    agent = load(tmp_path, dtype=asked)
    for name, p in saved.state_dict().items():
        ours = agent.model.state_dict()[name]
        assert ours.dtype == getattr(torch, asked) and torch.equal(ours, p.to(ours.dtype)), name


# LoRA.


def trained_lora(folder, **options):
    """Adapters off their zero start."""
    agent = load(folder, lora_rank=2, **options)
    nudge(agent.model)
    return agent


@torch.no_grad()
def nudge(module):
    generator = torch.Generator().manual_seed(5)
    for name, p in module.named_parameters():
        if "lora_B" in name:
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def test_lora_trains_adapters_of_the_trunk_alone(base, peft):
    agent = load(base, lora_rank=2)
    trained = [name for name, p in agent.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * SIZES["num_hidden_layers"] and all(
        "lora_" in name for name in trained
    )
    some = load(base, lora_rank=2, lora_targets=["q_proj", "v_proj"])
    assert (
        sum(p.requires_grad for p in some.model.parameters()) == 2 * 2 * SIZES["num_hidden_layers"]
    )
    first, again = (load(base, lora_rank=2).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first), (
        "the seed decides the adapters"
    )
    with pytest.raises(ConfigError, match="model.lora_targets"):
        load(base, lora_rank=2, lora_targets=["nothing"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_of_lora_is_the_base_model_without_a_copy(base, peft, dtype):
    agent, plain = load(base, lora_rank=2, dtype=dtype), load(base, dtype=dtype)
    agent.freeze_reference()
    own = {id(p) for p in agent.model.parameters()}
    assert all(
        id(p) in own for name, p in agent.reference.named_parameters() if "lora_" not in name
    )
    nudge(agent.model)
    expected = hidden(plain.model.base_model, IDS)
    assert torch.equal(hidden(agent.reference.base_model, IDS), expected)
    assert not torch.allclose(hidden(agent.model.base_model, IDS), expected, atol=1e-3)
    assert torch.equal(
        agent.logprobs(expected[0], IDS[0], 1.0, reference=True),
        plain.logprobs(expected[0], IDS[0], 1.0),
    )


@torch.no_grad()
def test_adapters_trained_before_belong_to_the_reference(base, peft):
    """After a warm start the KL term is to the warm-started policy."""
    agent = trained_lora(base)
    before = hidden(agent.model.base_model, IDS)
    agent.freeze_reference()
    nudge(agent.model)
    assert torch.equal(hidden(agent.reference.base_model, IDS), before)
    assert not torch.equal(hidden(agent.model.base_model, IDS), before)


def test_the_critic_has_adapters_of_its_own_on_the_shared_base(base, peft):
    agent = trained_lora(base)
    critic = agent.add_critic()
    own = {id(p) for p in agent.model.parameters()}
    shared = [p for p in critic.parameters() if id(p) in own]
    mine = [p for p in critic.parameters() if id(p) not in own]
    assert all(not p.requires_grad for p in shared) and all(p.requires_grad for p in mine)
    assert sum(p.numel() for p in mine) < 0.2 * sum(p.numel() for p in shared)
    assert torch.equal(hidden(critic.trunk, IDS), hidden(agent.model.base_model, IDS))
    (hidden(critic.trunk, IDS).sum() + critic.heads.weight.sum()).backward()
    assert all(p.grad is None for p in agent.model.parameters()), (
        "the value loss leaves the policy alone"
    )
    assert all(p.grad is not None for p in mine if p is not critic.heads.bias)


def test_checkpoints_of_lora_are_adapter_folders_that_resume_and_merge(base, peft, tmp_path):
    config = Config()

    def build():
        agent = load(base, lora_rank=2, dtype="bfloat16")
        agent.add_critic()
        return agent, optim.build_optimizers(agent, config)

    def step(agent, optimizers, count):
        for _ in range(count):
            for optimizer in optimizers.values():
                optim.set_lr(optimizer, 1e-2)
                optimizer.zero_grad()
            (hidden(agent.model.base_model, IDS).float().square().mean()
             + agent.critic(hidden(agent.critic.trunk, IDS)).sub(1).square().mean()).backward()  # fmt: skip
            for optimizer in optimizers.values():
                optimizer.step()

    agent, optimizers = build()
    step(agent, optimizers, 2)
    path = checkpoint.save(tmp_path, 2, policy=agent.model, tokenizer=agent.tokenizer, critic=agent.critic,
                           optimizers=optimizers, state={})  # fmt: skip
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert (
        not (path / "model.safetensors").exists()
        and size < 4 * (base / "model.safetensors").stat().st_size
    )
    with torch.no_grad():
        expected = agent.model(input_ids=IDS).logits
    again = load(path, dtype="bfloat16", lora_rank=2)
    assert torch.equal(again.model(input_ids=IDS).logits, expected)
    assert any(p.requires_grad for p in again.model.parameters()), (
        "a folder of adapters can be trained further"
    )
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert torch.equal(plain(input_ids=IDS).logits, expected)
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(
        path, dtype=torch.float32
    ).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected.float(), rtol=0.05, atol=0.02)

    step(agent, optimizers, 2)
    other, restored = build()
    checkpoint.load(path, policy=other.model, critic=other.critic, optimizers=restored)
    step(other, restored, 2)
    for ours, theirs in ((other.model, agent.model), (other.critic, agent.critic)):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)
    wrong = load(base, lora_rank=3, dtype="bfloat16")
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"adapter_model.safetensors.*resume with the run's own config",
    ):
        checkpoint.load(path, policy=wrong.model)


def test_a_run_with_lora_resumes_and_evaluates_exactly(base, peft, tmp_path, capsys):
    def run(name, updates, *more, critic="separate"):
        options = SMALL | {
            "model": base, "model.lora_rank": 2, "model.dtype": "bfloat16", "model.critic": critic,
            "model.gradient_checkpointing": True, "train.final_lr": 1, "eval.every": 9, "agent.style": "compact",
            "agent.max_prompt_tokens": 500, "updates": updates, "name": name,
        }  # fmt: skip
        arguments = [
            f"--run.folder={tmp_path}",
            *(f"--{key}={value}" for key, value in options.items()),
        ]
        assert train.main([*arguments, *more]) == 0
        return tmp_path / name / "checkpoints" / f"step-{updates:06d}"

    whole = run("whole", 3)
    run("parts", 2)
    parts = run("parts", 3, "--resume")
    for file in ("adapter_model.safetensors", "critic.safetensors", "optimizer.safetensors"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file
    assert evaluation.main(["--checkpoint", str(whole)]) == 0
    assert "all " in capsys.readouterr().out
    run("shared", 2, critic="shared")


def test_lora_needs_peft_and_a_base(base, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="model.lora_rank: the tiny model"):
        make_tiny(lora_rank=2)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"model.lora_rank: LoRA needs peft.*hiper_fast\[lora\]"):
        load(base, lora_rank=2)
    shutil.copytree(base, tmp_path / "adapters")
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="model.path: LoRA needs peft"):
        load(tmp_path / "adapters")


# Recomputed and compiled layers.


def gradients(agent):
    """Of a scalar of the policy's and the critic's hidden states."""
    agent.add_critic()
    for trunk in (agent.model.base_model, agent.critic.trunk):
        states = hidden(trunk, IDS)
        weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
        (states.tanh() * weights).sum().backward()
    both = (*agent.model.base_model.named_parameters(), *agent.critic.trunk.named_parameters())
    return [p.grad for _, p in both if p.requires_grad]


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("kind", CONFIGS)
def test_recomputed_layers_give_the_same_gradients(tmp_path, monkeypatch, kind, lora_rank):
    if lora_rank:
        pytest.importorskip("peft")
    save_model(tmp_path, kind)

    def double(**options):
        agent = load(tmp_path, lora_rank=lora_rank, **options)
        nudge(agent.model)
        agent.model.double()
        return agent

    plain, recomputed = double(), double(gradient_checkpointing=True)
    calls = []
    mlp = recomputed.model.base_model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        generated = recomputed.model(input_ids=IDS, use_cache=True)
    cache = name_cache(recomputed.model)
    assert len(calls) == 1 and generated[cache].get_seq_length() == IDS.shape[1], (
        "caches stay usable"
    )
    calls.clear()
    for ours, expected in zip(gradients(recomputed), gradients(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 4, "policy and critic, each forward and again in the backward pass"
    with torch.no_grad():
        assert (
            recomputed.model(input_ids=IDS, use_cache=True)[cache].get_seq_length() == IDS.shape[1]
        )


def test_recomputing_keeps_fewer_activations(base):
    def kept(**options):
        agent, sizes = load(base, **options), []
        own = {p.untyped_storage().data_ptr() for p in agent.model.parameters()}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden(agent.model.base_model, IDS.repeat(1, 10))
        return sum(sizes)

    assert kept(gradient_checkpointing=True) < 0.25 * kept()


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)
def test_compiled_layers_give_the_same_gradients(base):
    compiled = load(base, compile=True)
    found = gradients(compiled)
    for ours, expected in zip(found, gradients(load(base)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted > 0, "nothing was compiled"
    with compiled.eager(), torch.inference_mode():
        compiled.model(input_ids=IDS, use_cache=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted, (
        "generation compiles nothing"
    )


def test_layers_compile_once_for_all_microbatches_and_models(base, monkeypatch):
    from torch._dynamo.utils import counters

    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compile_(self, backend="eager", **options),
    )
    torch._dynamo.reset()
    agent, plain = load(base, compile=True, gradient_checkpointing=True), load(base)
    agent.freeze_reference()
    agent.add_critic()
    graphs = []
    for sequences in (3, 5, 8):
        cu_seqlens = prefix_sums(3 + 7 * torch.arange(sequences))
        ids = torch.arange(int(cu_seqlens[-1])) % 700
        (batch,) = microbatches(ids, cu_seqlens, 1000)
        states = agent.trunk(batch)
        (states.sum() + agent.critic_hidden(batch).sum()).backward()
        with torch.no_grad():
            agent.trunk(batch, reference=True)
            torch.testing.assert_close(states.detach(), plain.trunk(batch))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1]


def test_without_a_compiler_the_option_is_refused(base, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match="model.compile: .*no C.. compiler found.*leave it false"):
        load(base, compile=True)
