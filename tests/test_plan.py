"""The plan: what it counts against what real models hold, what it refuses, and what it advises."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import HOUSEHOLD
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from hiper_fast import plan, session, train
from hiper_fast.agent import attention, footprint, layers, lora
from hiper_fast.agent.agent import Critic, run_trunk
from hiper_fast.agent.decoding import Entering
from hiper_fast.agent.head import Head
from hiper_fast.config import Config
from hiper_fast.configure import list_recipes, resolve
from hiper_fast.distributed import ALONE
from hiper_fast.learn import optim
from hiper_fast.options import ConfigError
from hiper_fast.packing import microbatches, prefix_sums
from hiper_fast.plan import GIB, HOST, KEPT, ROLLOUT, UPDATE
from hiper_fast.rollout.draws import uniforms
from hiper_fast.rollout.engines.paged import Engine

SIZES = dict(
    hidden_size=64,
    intermediate_size=160,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
)
MODELS = {
    "qwen2": Qwen2Config(**SIZES, num_hidden_layers=6, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES, num_hidden_layers=5, tie_word_embeddings=False),
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    """A model's folder without weights: a plan needs none."""
    MODELS[request.param].save_pretrained(tmp_path)
    return tmp_path


def settings(path, **options) -> Config:
    return resolve(
        [], {"model.path": str(path), "env.name": "household", "model.device": "cpu"} | options
    )


def model(config: Config):
    made = AutoModelForCausalLM.from_config(
        plan_architecture(config), dtype=plan.find_dtype(config)
    )
    attention.use(made)
    return made


def plan_architecture(config: Config):
    return footprint.find_architecture(config.model.path, HOUSEHOLD.tokenizer, True)


def sizes(config: Config, machine: plan.Machine | None = None) -> dict[tuple[str, str], float]:
    """(stage, name) -> bytes of what is planned, by default for a GPU that has room for all."""
    parts = plan.list_parts(config, machine or gpu(1e15, plan.count_processes(config)))
    return {(part.when, part.name): part.size for part in parts}


def gpu(memory: float, gpus: int = 1, host: float = 0.0) -> plan.Machine:
    """A GPU with `memory` bytes to give."""
    whole = (memory + plan.RESERVE_BYTES) / (1 - plan.RESERVE_SHARE)
    return plan.Machine("a GPU", "cuda", gpus, whole, host, 1e14, 1e12, 1e-5, "as given")


def cpu(memory: float) -> plan.Machine:
    return plan.Machine("a CPU", "cpu", 1, memory, memory, 1e11, 1e10, 1e-6, "as given")


# Counts against real models.


@pytest.mark.parametrize(
    "name, weights",
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B-Base", 1_720_574_976),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
    ],
)
def test_well_known_models_have_the_published_number_of_weights_without_network(
    name, weights, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert footprint.measure_model(name, HOUSEHOLD.tokenizer).total == weights


def test_an_unknown_model_is_refused_with_two_ways_out():
    with pytest.raises(
        ConfigError,
        match="model.path: some/model is no folder .*Qwen2.5-7B.*local_files_only=false",
    ):
        footprint.measure_model("some/model", HOUSEHOLD.tokenizer)


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize(
    "dtype, optimizer, masters",
    [
        ("float32", "adamw", True),
        ("bfloat16", "adamw", True),
        ("bfloat16", "adamw", False),
        ("bfloat16", "adamw8bit", True),
        ("bfloat16", "adamw8bit", False),
    ],
)
def test_weights_gradients_and_states_to_the_byte(folder, critic, dtype, optimizer, masters):
    if optimizer == "adamw8bit":
        pytest.importorskip("torchao")
    config = settings(
        folder,
        **{
            "model.dtype": dtype,
            "model.critic": critic,
            "train.optimizer": optimizer,
            "train.master_weights": masters,
        },
    )
    policy_model = model(config)
    trunk = model(config).base_model if critic == "separate" else None
    agent = SimpleNamespace(
        model=policy_model, critic=Critic(trunk, 64, torch.device("cpu")), world=ALONE
    )
    optimizers = optim.build_optimizers(agent, config)
    planned = sizes(config)
    for name, module in (("policy", agent.model), ("critic", agent.critic)):
        parameters = list(module.parameters())
        for p in parameters:
            p.grad = torch.zeros_like(p, dtype=getattr(p, "grad_dtype", None) or p.dtype)
        assert planned[UPDATE, f"{name}: gradients"] == nbytes(p.grad for p in parameters)
        optimizers[name].step()
        kept = {"weights": nbytes(parameters), "master weights": 0, "optimiser states": 0}
        for entries in optimizers[name].state_dict()["state"].values():
            for key, value in entries.items():
                if key.startswith("exp_avg"):
                    kept["optimiser states"] += value.nbytes
                elif key == "master" and dtype == "bfloat16" and masters:
                    kept["master weights"] += value.nbytes
        if (
            dtype == "bfloat16" and masters
        ):  # the heads are float32 and so are their own masters, but kept apart too
            kept["master weights"] = sum(
                4 * p.numel() for p in parameters if p.dtype == torch.bfloat16
            )
        assert {key: planned[KEPT, f"{name}: {key}"] for key in kept} == kept
    assert planned[KEPT, "reference model"] == nbytes(policy_model.parameters())


def nbytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)


def test_offloaded_states_are_on_the_cpu(folder):
    config = settings(
        folder, **{"model.dtype": "bfloat16", "train.optimizer": "offload", "plan.gpu": "a100"}
    )
    planned, count = sizes(config), plan.find_footprint(config).total
    assert planned[KEPT, "policy: optimiser states"] == planned[KEPT, "policy: master weights"] == 0
    assert (
        planned[HOST, "policy: masters and states"] == 16 * count
    )  # master, its gradient, two moments
    assert (planned[KEPT, "policy: weights"], planned[UPDATE, "policy: gradients"]) == (
        2 * count,
        4 * count,
    )


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_adapters_are_counted_as_peft_makes_them(folder, targets):
    pytest.importorskip("peft")
    config = settings(folder, **{"model.lora_rank": 4, "model.lora_targets": targets})
    adapted = model(config)
    lora.add_lora(adapted, config.model, seed=0)
    trained = [p.numel() for p in adapted.parameters() if p.requires_grad]
    assert sum(plan.find_footprint(config).adapters(4, targets)) == sum(trained)
    planned = sizes(config)
    assert planned[UPDATE, "policy: gradients"] == 4 * sum(trained)
    assert planned[KEPT, "policy: weights"] == nbytes(adapted.parameters())
    assert (KEPT, "reference model") not in planned, "it is the policy without its adapters"


def test_shards_divide_what_is_trained_and_what_is_kept(folder):
    one, four = (
        sizes(settings(folder, **{"model.dtype": "float32", "plan.gpus": n})) for n in (1, 4)
    )
    for name in ("policy: weights", "critic: optimiser states", "reference model"):
        assert four[KEPT, name] == one[KEPT, name] / 4
    assert four[UPDATE, "critic: gradients"] == one[UPDATE, "critic: gradients"] / 4
    assert four[ROLLOUT, "whole policy"] == one[KEPT, "policy: weights"], (
        "each process generates by itself"
    )


def wake_engine(config: Config) -> Engine:
    network = model(config)
    agent = SimpleNamespace(
        model=network, head=Head(SIZES["vocab_size"]), stop_ids=(0,), device=network.device
    )
    engine = Engine(agent, config)
    engine.wake()
    return engine


ROLLOUTS = {"rollout.slots": 7, "agent.max_prompt_tokens": 95, "agent.max_response_tokens": 5}


@pytest.mark.parametrize("options", [{}, {"rollout.cache_gb": 5e-4}, {"model.dtype": "bfloat16"}])
def test_what_the_engine_holds_to_the_byte(folder, options):
    config = settings(folder, **ROLLOUTS | options)
    decoder, planned = wake_engine(config).decoder, sizes(config, cpu(GIB))
    pools = (pool for pair in decoder.cache.pools for pool in pair)
    assert planned[ROLLOUT, "KV cache"] == nbytes(pools)
    assert planned[ROLLOUT, "responses under way"] == nbytes(footprint.list_state(decoder))
    asked = plan.measure_pool(settings(folder, **ROLLOUTS), cpu(GIB)).blocks
    assert (plan.measure_pool(config, cpu(GIB)).blocks < asked) == ("rollout.cache_gb" in options)


def test_a_cache_takes_half_of_what_a_gpu_has_free_and_has_room_for_one_response(folder):
    config = settings(folder, **ROLLOUTS)
    kept = plan.sum_bytes(plan.list_parts(config, gpu(GIB)), KEPT)
    block, each = 16 * plan.count_token(config), 7
    for free, blocks in ((1e9, 7 * each), (2 * 20.5 * block, 20), (0, each)):
        assert plan.measure_pool(config, gpu(kept + free)).blocks == blocks


@pytest.mark.parametrize("lengths", [[], [200, 300]])
def test_a_pass_of_the_engine_is_what_a_real_one_takes(folder, lengths):
    """A token for each of four rows, beside prompts or not."""
    config = settings(folder, **{"agent.max_prompt_tokens": 300, "agent.max_response_tokens": 20})
    engine = wake_engine(config)
    decoder, room = engine.decoder, engine.blocks

    def enter(row: int, length: int) -> Entering:
        ids = torch.randint(300, (length,)).tolist()
        blocks, held = room.take(ids, length + 20)
        return Entering(row, ids, held, blocks, uniforms(row, 20), 1.0)

    decoder.read([enter(row, 10) for row in range(4)], [])
    entering = [enter(row, length) for row, length in enumerate(lengths, 4)]
    pools = [pool for pair in decoder.cache.pools for pool in pair]
    network = engine.agent.model
    outside = [*network.parameters(), *network.buffers(), *footprint.list_state(decoder), *pools]
    with footprint.Held(outside) as held:
        decoder.read(entering, range(4))
    planned = footprint.count_sampling(
        plan.find_footprint(config), torch.float32, 4, prompt=sum(lengths)
    )
    assert planned.peak == pytest.approx(held.peak, rel=0.15)
    assert planned.moved == pytest.approx(held.moved, rel=0.15)
    assert planned.operations == pytest.approx(held.operations, rel=0.15)


def packed(lengths: list[int]):
    lengths = torch.tensor(lengths)
    ids = torch.randint(300, (int(lengths.sum()),))
    return next(microbatches(ids, prefix_sums(lengths), int(lengths.sum())))


def test_activations_are_what_the_forward_pass_keeps(folder):
    """All that autograd saved in a real pass over packed sequences, each storage once."""
    config = settings(folder)
    trunk, kept = model(config).base_model, {}
    weights = {p.untyped_storage().data_ptr() for p in trunk.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    batch = packed([400, 300, 324])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run_trunk(trunk, batch)
    real = sum(storage.nbytes() for storage in kept.values())
    planned = footprint.count_pass(
        plan.find_footprint(config), 1024, torch.float32, train=True
    ).peak
    assert planned == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_real_forward_and_backward(folder, checkpointing):
    config = settings(folder, **{"model.gradient_checkpointing": checkpointing})
    trunk = model(config).base_model
    if checkpointing:
        layers.recompute(trunk)
    for p in trunk.parameters():
        p.grad = torch.zeros_like(p)
    kept = [*trunk.parameters(), *(p.grad for p in trunk.parameters())]
    batch = packed([500, 512, 524])
    with footprint.Held(kept) as held:
        hidden = run_trunk(trunk, batch)
        hidden.backward(torch.ones_like(hidden))
    planned = footprint.count_pass(
        plan.find_footprint(config), 1536, torch.float32, train=True, checkpointing=checkpointing
    ).peak
    assert planned == pytest.approx(held.peak, rel=0.15)


def test_activations_grow_with_tokens_not_with_their_square(folder):
    f = plan.find_footprint(settings(folder))
    one, two, four = (
        footprint.count_pass(f, n, torch.bfloat16, train=True).peak for n in (4096, 8192, 16384)
    )
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)


def test_held_forgets_what_was_freed():
    x = torch.zeros(1000)
    with footprint.Held([x]) as held:
        for _ in range(3):
            x + 1  # noqa: B018
        y = (x * 2).view(10, 100)
    assert (held.now, held.peak) == (4000, 4000) and y.shape == (10, 100)


def test_the_sizes_of_attention_are_those_of_attention():
    shapes = (1, 4, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16)
    query, key, value = (torch.randn(s) for s in shapes)
    real = scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    assert footprint.attend_flash(None, query, key, value, None)[0].shape == real.shape


# Refusing, and what would mend it.


def needs(config: Config) -> float:
    """Bytes of the smallest GPU that it fits."""
    least, most = 0.0, 1e13
    while most - least > 1e7:
        middle = (least + most) / 2
        short = plan.find_shortage(config, gpu(middle, plan.count_processes(config)))
        least, most = (middle, most) if short else (least, middle)
    return most


def with_options(config: Config, changes) -> Config:
    return plan.apply_changes(config, gpu(0), tuple(changes))[0]


def single_changes(config: Config) -> list:
    return list(itertools.chain.from_iterable(plan.list_changes(config, gpu(0))))


LARGE = {"model.path": "Qwen/Qwen2.5-1.5B-Instruct", "plan.gpu": "a100", "agent.max_prompt_tokens": 1500,
         "agent.batch_tokens": 65536, "train.microbatch_tokens": 65536, "plan.prompt_tokens": 500}  # fmt: skip
CASES = [  # options that leave only this change, or this one first, to be the smallest; the change
    ({"model.dtype": "bfloat16"}, ("model.gradient_checkpointing", True)),
    ({"model.dtype": "bfloat16", "model.gradient_checkpointing": True}, ("train.microbatch_tokens", 32768)),
    ({"model.dtype": "float32", "model.gradient_checkpointing": True, "train.microbatch_tokens": 2048,
      "agent.batch_tokens": 98304}, ("model.dtype", "bfloat16")),
    ({"model.dtype": "bfloat16", "model.gradient_checkpointing": True, "train.microbatch_tokens": 2048},
     ("train.optimizer", "adamw8bit")),
    ({"model.dtype": "bfloat16", "model.gradient_checkpointing": True, "train.microbatch_tokens": 2048},
     ("train.optimizer", "offload")),
    ({"model.dtype": "bfloat16", "model.gradient_checkpointing": True, "train.microbatch_tokens": 2048,
      "train.optimizer": "offload"}, ("model.lora_rank", 32)),
    ({"model.dtype": "bfloat16", "model.gradient_checkpointing": True, "train.microbatch_tokens": 2048,
      "model.lora_rank": 256, "train.optimizer": "offload"}, ("model.critic", "shared")),
    ({"model.dtype": "bfloat16", "model.gradient_checkpointing": True, "train.microbatch_tokens": 2048,
      "model.critic": "shared", "train.optimizer": "offload", "model.lora_rank": 1}, ("agent.batch_tokens", 32768)),
    ({"model.dtype": "bfloat16", "model.gradient_checkpointing": True, "train.microbatch_tokens": 2048,
      "model.critic": "shared", "agent.batch_tokens": 1500}, ("plan.gpus", 2)),
]  # fmt: skip


@pytest.mark.parametrize(
    "options, change", CASES, ids=lambda x: f"{x[0]}={x[1]}" if isinstance(x, tuple) else ""
)
def test_the_first_single_change_that_fits_is_named(options, change):
    config = resolve([], LARGE | options)
    room = needs(with_options(config, [change])) * 1.001
    assert needs(config) > room, "else there is nothing to mend"
    with pytest.raises(
        ConfigError, match=r"Qwen2.5-1.5B-Instruct does not fit: [\d.]+ GiB are needed in"
    ) as caught:
        plan.check(config, gpu(room))
    chosen = plan.find_smallest_change(config, gpu(room))
    assert len(chosen) == 1 and plan.describe_change(*chosen[0]) in str(caught.value)
    every = single_changes(config)
    fitting = [
        c for c in every if not plan.find_shortage(*plan.apply_changes(config, gpu(room), (c,)))
    ]
    assert (
        change in fitting
        and chosen[0] == fitting[0]
        and every.index(change) >= every.index(chosen[0])
    )
    if options.get("train.optimizer") != "offload" and change[0] != "plan.gpus":
        assert chosen[0] == change
    plan.check(*plan.apply_changes(config, gpu(room), chosen))


def test_a_pair_where_no_single_change_fits():
    config = resolve([], LARGE)
    singles = [with_options(config, [c]) for c in single_changes(config)]
    room = min(needs(c) for c in singles if c.train.optimizer == "adamw" or c.plan.gpus < 2) * 0.99
    chosen = plan.find_smallest_change(config, gpu(room))
    assert len(chosen) == 2
    with pytest.raises(ConfigError, match="it would with --.* .+"):
        plan.check(config, gpu(room))
    for fewer in itertools.combinations(chosen, 1):
        assert plan.find_shortage(*plan.apply_changes(config, gpu(room), fewer))
    plan.check(*plan.apply_changes(config, gpu(room), chosen))


def test_nothing_helps():
    with pytest.raises(ConfigError, match="no change of options would make it"):
        plan.check(
            resolve([], LARGE | {"agent.batch_tokens": 1500, "train.microbatch_tokens": 2048}),
            gpu(0.1 * GIB),
        )


def test_the_cpus_memory_is_checked_for_offloading():
    options = {
        "train.optimizer": "offload",
        "model.dtype": "bfloat16",
        "model.gradient_checkpointing": True,
    }
    config = resolve([], LARGE | options)
    plan.check(config, gpu(100 * GIB, host=64 * GIB))
    with pytest.raises(
        ConfigError, match="offloading needs 46.0 GiB of CPU memory, and there are 32.0"
    ):
        plan.check(config, gpu(100 * GIB, host=32 * GIB))


def test_without_a_critic_none_is_counted():
    free = {"advantage.estimator": "grpo", "train.group": 8}
    parts = {}
    for name, options in (("hae", {}), ("grpo", free)):
        config = resolve([], LARGE | options)
        parts[name] = sum(part.size for part in plan.list_trained(config) if "critic" in part.name)
        seconds = plan.estimate_seconds(config, plan.find_machine(config))
        assert (seconds["critic update"] == 0) == (name == "grpo")
    assert parts["grpo"] == 0 < parts["hae"]


def test_several_processes_take_adamw_alone():
    config = resolve([], LARGE | {"train.optimizer": "offload", "plan.gpus": 4})
    with pytest.raises(
        ConfigError, match="works in one process only; it would with --train.optimizer=adamw$"
    ):
        plan.check(config, gpu(1000 * GIB, gpus=4))


def test_a_full_fine_tuning_of_7b_on_24_gb_is_refused_with_a_mend():
    config = resolve(["alfworld", "qwen2.5-7b-1x24gb"], {"model.lora_rank": 0})
    with pytest.raises(ConfigError, match="Qwen2.5-7B-Instruct does not fit") as caught:
        plan.check(config, plan.find_machine(config))
    assert "--model.lora_rank=32" in str(caught.value)


# The recipes.


@pytest.mark.parametrize("task", ["alfworld", "webshop"])
@pytest.mark.parametrize("hardware", [name for name in list_recipes() if name.startswith("qwen")])
def test_every_task_fits_every_hardware_with_the_papers_hyperparameters(task, hardware):
    config = resolve([task, hardware], {})
    plan.check(config, plan.find_machine(config))
    size, place = hardware.removeprefix("qwen2.5-").split("-")
    gpus, memory = (int(n) for n in place.removesuffix("gb").split("x"))
    assert config.model.path == f"Qwen/Qwen2.5-{size.upper()}-Instruct" and config.plan.gpus == gpus
    assert 0.96 * memory < plan.find_machine(config).memory / GIB < memory
    c, a, r = config.train, config.agent, config.reward
    assert (c.episodes, c.updates, c.kl_coef, c.entropy_coef, c.dual_clip, c.grad_clip) == (
        128,
        150,
        0.01,
        0.001,
        3,
        1,
    )
    assert (c.clip_low, c.clip_high, c.value_clip, c.value_coef, c.weight_decay) == (
        0.2,
        0.2,
        0.5,
        [1, 1, 1],
        0.01,
    )
    scale = 10 if config.model.lora_rank else 1
    assert (c.lr, c.critic_lr) == pytest.approx(
        (scale * 1e-6, scale * 1e-5)
    ) and config.model.critic == "separate"
    assert (a.history, a.max_response_tokens, a.temperature, config.eval.temperature) == (
        2,
        512,
        1.0,
        0.4,
    )
    assert (r.success, r.invalid, r.keep_mode, r.consistency) == (10, -0.1, "normalized", -0.3)
    assert c.minibatch_size == 256
    assert plan.count_steps(config) == math.ceil(config.plan.turns / 256)


def test_there_is_a_recipe_for_each_hardware():
    names = {
        f"qwen2.5-{m}-{h}gb"
        for m in ("1.5b", "7b")
        for h in ("1x24", "1x80", "1x141", "4x80", "8x80")
    }
    assert names == {name for name in list_recipes() if name.startswith("qwen")}


# The command, and the start of a run.


def test_the_command_prints_the_plan_and_starts_nothing(tmp_path, capsys):
    assert (
        train.main(
            [
                "--plan",
                "--run.folder",
                str(tmp_path / "runs"),
                "--plan.tflops=1",
                "--plan.gb_per_s=5",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    for text in ("tiny", "policy: weights", "critic: optimiser states", "KV cache", "activations", "rollout: responses",
                 "policy update", "together", "From 1 TFLOP/s and 5 GB/s (as given)", "Assumed: 40% of"):  # fmt: skip
        assert text in out, text


def test_the_command_refuses_after_the_plan(capsys):
    argv = ["--config", "alfworld", "--plan", "--plan.gpu", "rtx4090"]
    assert train.main(argv) == 2
    out, err = capsys.readouterr()
    assert (
        "policy: weights" in out
        and "does not fit" in err
        and "it would with" in err
        and err.count("\n") == 1
    )
    assert "time of an update" not in out and " h\n" not in out, "what cannot run takes no time"


def test_a_run_that_would_take_years_is_refused_before_its_hours(capsys):
    argv = ["--config", "alfworld", "--model", "Qwen/Qwen2.5-0.5B-Instruct", "--plan"]
    argv += ["--model.device", "cpu", "--plan.memory_gb", "500", "--plan.tflops", "0.01"]
    argv += ["--plan.gpu", "here", "--plan.gb_per_s", "10"]
    assert train.main(argv) == 2
    out, err = capsys.readouterr()
    assert "policy: weights" in out and "time of an update" not in out
    assert "150 updates (train.updates) would take" in err and "years on this CPU" in err
    assert err.count("\n") == 1


def test_a_run_on_a_gpu_is_refused_before_anything_is_loaded(monkeypatch):
    """Also one whose recipe plans for a larger GPU than there is."""
    options = LARGE | {"model.dtype": "bfloat16", "model.device": "auto", "plan.gpu": "h200"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan.check_here(resolve([], options))  # no GPU: nothing to refuse
    properties = SimpleNamespace(total_memory=24 * GIB, major=8)
    for name, value in (("is_available", True), ("get_device_name", "small"), ("current_device", 0),
                        ("get_device_properties", properties)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(session, "Games", lambda config: pytest.fail("the run was started"))
    with pytest.raises(ConfigError, match="small has 21.8 to give"):
        train.train(resolve([], options), ALONE)


def test_rates_are_measured_where_there_is_a_device():
    flops, bandwidth, launch = plan.measure_rates("cpu")
    assert 1e8 < flops < 1e14 and 1e8 < bandwidth < 1e13 and 1e-8 < launch < 1e-2


@pytest.mark.parametrize(
    "option, value, stage, factor",
    [
        ("plan.turns", 2000, "rollout: prompts", 2),
        ("plan.gpus", 2, "scoring", 0.5),
        ("plan.utilisation", 0.2, "scoring", 2),
        ("model.critic", "shared", "scoring", 0.5),
        ("eval.every", 20, "evaluation, a share", 0.5),
        ("plan.shared_scoring", 0.5, "scoring", 0.5),
        ("plan.shared_scoring", 0.5, "rollout: prompts", 0.5),
        ("plan.shared_update", 0.5, "critic update", 0.5),
    ],
)
def test_times_follow_their_causes(option, value, stage, factor):
    base = LARGE | {"plan.turns": 1000, "model.dtype": "bfloat16", "eval.every": 10}
    base |= {"train.old_logprobs": "sampled"}  # the policy scores nothing
    machine = gpu(1e12)

    def seconds(options):
        config = resolve([], options)
        shared = plan.replace(machine, gpus=plan.count_processes(config))
        return plan.estimate_seconds(config, shared)[stage]

    assert seconds(base | {option: value}) == pytest.approx(factor * seconds(base), rel=0.15)


def test_episodes_wait_for_places_not_for_each_other():
    """As many as have a place take no longer than one; more take their turn after them."""
    base = LARGE | {"plan.turns": 1000, "env.max_turns": 20, "plan.prompt_tokens": 14}
    base |= {"plan.response_tokens": 10, "train.episodes": 100, "eval.episodes": 200}

    def seconds(episodes, **options):
        given = {name.replace("__", "."): value for name, value in options.items()}
        machine = plan.replace(gpu(1e12), flops=1e18, bandwidth=1e18)
        return plan.estimate_rollout(resolve([], base | given), machine, episodes)[1]

    one = seconds(1)  # of launches alone
    assert seconds(100) == seconds(200) == one
    assert seconds(100, rollout__slots=50) == pytest.approx(1.5 * one), "half of 20 turns more"
    assert seconds(200, rollout__slots=50) == pytest.approx(2.5 * one)
    little = {"rollout__cache_gb": 50 * (14 + 512) * 28 / 2**20}  # KiB a token: 50 at their limit
    assert seconds(100, **little) == pytest.approx(1.5 * one, rel=0.1)


def test_a_transcript_reads_its_new_tokens_and_attends_to_all():
    base = LARGE | {"plan.turns": 1280, "plan.prompt_tokens": 200, "agent.max_prompt_tokens": 4000}
    by_turns, whole = (
        resolve([], base | {"agent.style": style, "train.episodes": 128})
        for style in ("reference", "transcript")
    )
    response = plan.count_tokens(whole)[2]
    assert plan.count_context(by_turns) == 200
    assert plan.count_context(whole) == 10 * (200 + response) / 2
    prompts, longer = (plan.estimate_rollout(c, gpu(1e12), 128)[0] for c in (by_turns, whole))
    assert prompts < longer < 1.3 * prompts


def test_steps_are_counted_from_a_minibatchs_size():
    base = LARGE | {"plan.turns": 1000, "train.episodes": 128}
    steps = {"train.minibatches": 3}, {"train.minibatch_size": 256}, {"train.minibatch_size": 999}
    assert [plan.count_steps(resolve([], base | more)) for more in steps] == [3, 4, 2]
    whole = base | {"agent.style": "transcript", "train.minibatch_size": 50}
    assert plan.count_steps(resolve([], whole)) == 3


def test_recomputing_costs_a_third_of_the_passes():
    base = resolve(
        [], LARGE | {"plan.turns": 1000, "model.dtype": "bfloat16", "train.minibatches": 1}
    )
    again = with_options(base, [("model.gradient_checkpointing", True)])
    slow, fast = (plan.estimate_seconds(c, gpu(1e12))["critic update"] for c in (again, base))
    assert slow / fast == pytest.approx(4 / 3, rel=0.02)
