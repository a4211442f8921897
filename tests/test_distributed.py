"""Two processes of a gloo group against one: the same losses, weights and checkpoints, however the work is dealt."""

import copy
import functools
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import traceback

import pytest
import test_update
import torch
import torch.distributed as dist
from helpers import HOUSEHOLD, configure, play_tasks
from test_train import arguments, rows
from torch import nn

from hiper_fast import estimators, train
from hiper_fast.agent.loading import load_agent
from hiper_fast.config import ModelConfig
from hiper_fast.distributed import ALONE, World
from hiper_fast.learn.credit import give_credit
from hiper_fast.learn.optim import build_optimizers, set_lr
from hiper_fast.learn.score import score
from hiper_fast.learn.update import update
from hiper_fast.runs import checkpoint
from hiper_fast.runs.checkpoint import CheckpointError

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", autouse=True)
def preloaded():
    """Processes start as copies of one that has imported everything once."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "hiper_fast.train"])


@pytest.fixture
def together(tmp_path):
    """Calls a function with the world of two processes, and arguments; returns what each of them returned."""
    numbers = itertools.count()
    context = multiprocessing.get_context("forkserver")

    def run(function, *arguments):
        store = tmp_path / f"store-{next(numbers)}"
        ends = [context.Pipe(duplex=False) for _ in range(2)]
        workers = [
            context.Process(target=joined, args=(send, store, rank, function, *arguments))
            for rank, (_, send) in enumerate(ends)
        ]
        for worker, (_, send) in zip(workers, ends, strict=True):
            worker.start()
            send.close()  # the other end is the worker's: when it dies, nothing more is waited for
        try:
            return [
                answer(receive, worker) for (receive, _), worker in zip(ends, workers, strict=True)
            ]
        finally:
            for worker in workers:
                worker.kill()

    return run


def joined(send, store, rank, function, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        send.send((True, function(World(rank, 2), *arguments)))
        dist.destroy_process_group()
    except BaseException:
        send.send((False, traceback.format_exc()))


def answer(receive, worker):
    assert receive.poll(PATIENCE), f"nothing came from {worker}"
    returned, value = receive.recv()
    assert returned, value
    return value


PATIENCE = 600


# The parts of a world.


def parts(world):
    items = list(range(7))
    total = world.sum(torch.tensor([world.rank, 1.0])).tolist()
    rank = world.first(lambda: world.rank)
    return world.share(items), world.gather(world.share(items)), world.deal(items, -1), total, rank


def test_shares_are_the_whole_and_all_get_as_many(together):
    (share, *same), (other, *same_there) = together(parts)
    assert share + other == list(range(7))
    assert same[0] == same_there[0] == list(range(7))
    assert sorted(same[1] + same_there[1]) == [-1, *range(7)] and len(same[1]) == len(same_there[1])
    assert same[2:] == same_there[2:] == [[1.0, 2.0], 0]


def test_a_world_of_one_has_all():
    assert parts(ALONE) == (list(range(7)), list(range(7)), list(range(7)), [0.0, 1.0], 0)


# Training.


def make_agent(world, critic="separate", tied=True, continued=False, **options):
    """As in test_update, of the tiny model, its head tied to its embeddings or not, its turns continued or not."""
    model = ModelConfig(device="cpu", critic=critic, **options)
    agent = load_agent(model, 0, HOUSEHOLD.tokenizer, world=world)
    if not tied:
        agent.model.config.tie_word_embeddings = False
        agent.model.lm_head.weight = nn.Parameter(agent.model.lm_head.weight.detach() * 0.9)
    assert (agent.model.lm_head.weight is agent.model.model.embed_tokens.weight) == tied
    t = test_update.build(agent)
    t.continued = continued
    generator = torch.Generator().manual_seed(1)
    trained = copy.deepcopy(agent.model.state_dict())
    with torch.no_grad():
        for p in agent.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    agent.freeze_reference()
    agent.model.load_state_dict(trained)
    heads = torch.randn(3, agent.model.config.hidden_size, generator=generator) / 10
    agent.add_critic()
    world.load_state_dict(agent.critic.heads, {"weight": heads, "bias": heads[:, 0]})
    agent.shard()
    return agent, t


def settings(estimator="hae", **train):
    config = test_update.settings(
        **{"minibatches": 2, "grad_clip": 1.0, "lr": 1e-3, "critic_lr": 1e-3, **train}
    )
    config.advantage.estimator = estimator
    config.run.threads = 1
    return config


def training(agent, t, config, optimizers, updates, losses=()):
    """Updates on the same trajectories: the metrics of each."""
    for number in updates:
        fresh = copy.copy(t)
        scores = score(agent, fresh, config)
        estimate = estimators.find(config.advantage.estimator)
        targets = give_credit(fresh, scores, estimate, config.advantage)
        for name, rate in (("policy", config.train.lr), ("critic", config.train.critic_lr)):
            set_lr(optimizers[name], rate)
        generator = torch.Generator().manual_seed(number)
        step = update(agent, optimizers, fresh, targets, config, generator, train_policy=number > 0)
        losses = [*losses, step]
    return losses


def weights(agent):
    """Policy's and critic's, whole; of many processes only the first has them."""
    world = agent.world
    states = {"policy": world.state_dict(agent.model)}
    states["heads"] = world.state_dict(agent.critic.heads)
    if agent.critic.trunk is not None:
        states["trunk"] = world.state_dict(agent.critic.trunk)
    return {
        f"{part}.{name}": x.numpy().copy()
        for part, state in states.items()
        for name, x in state.items()
    }


def trained(world, model, options):
    agent, t = make_agent(world, **model)
    config = settings(**options)
    optimizers = build_optimizers(agent, config)
    if config.train.lr == SGD:
        optimizers = {
            name: torch.optim.SGD(o.param_groups[0]["params"]) for name, o in optimizers.items()
        }
    losses = training(agent, t, config, optimizers, range(3))
    return losses, weights(agent)


SGD = 0.1  # a learning rate for it, at which 1e-5 of a weight is 1e-4 of a gradient whose norm is 1


def assert_same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        assert abs(found[name] - expected[name]).max() <= tolerance, name


def assert_same_metrics(found, expected):
    """To 1e-5; explained variance to ten times that, for it divides by the small variance of a few returns: there
    values that agree to 1e-5 move it by 2e-5 * sqrt(1 - explained) / std(returns)."""
    explained = {name for name in expected if name.startswith("value/explained")}
    for names, tolerance in ((expected.keys() - explained, 1e-5), (explained, 1e-4)):
        assert {n: found[n] for n in names} == pytest.approx(
            {n: expected[n] for n in names}, rel=tolerance, abs=tolerance
        )
    assert found.keys() == expected.keys()


@pytest.mark.parametrize(
    "model, options",
    [
        ({}, {"microbatch_tokens": 90}),
        ({"tied": False}, {"microbatch_tokens": 200, "old_logprobs": "recomputed"}),
        (
            {"gradient_checkpointing": True},
            {"microbatch_tokens": 200, "lr": 1e-4, "critic_lr": 1e-4},
        ),
        ({"critic": "shared"}, {"microbatch_tokens": 120}),
        ({"continued": True}, {"microbatch_tokens": 200, "old_logprobs": "recomputed"}),
        # Pools of turns and of episodes, means over them, a value a token.
        (
            {},
            {"microbatch_tokens": 90, "ratio": "turn", "aggregation": "sequence", "loss": "cispo"},
        ),
        (
            {"continued": True},
            {
                "microbatch_tokens": 200,
                "ratio": "sequence",
                "aggregation": "sequence",
                "estimator": "token_gae",
            },
        ),
        # One microbatch a minibatch: the second process has no row at all.
        (
            {"critic": "shared", "tied": False},
            {"microbatch_tokens": 8192, "aggregation": "sequence", "estimator": "token_gae"},
        ),
        ({"critic": "shared", "tied": False}, {"microbatch_tokens": 8192}),
    ],
)
def test_two_processes_learn_what_one_does(together, model, options):
    options = {"lr": SGD, "critic_lr": SGD, **options}
    losses, after = trained(ALONE, model, options)
    (losses_0, after_0), (losses_1, after_1) = together(trained, model, options)
    assert losses_0 == losses_1 and not after_1
    assert_same(after_0, after)
    for ours, theirs in zip(losses_0, losses, strict=True):
        assert_same_metrics(ours, theirs)
    start = weights(make_agent(ALONE, **model)[0])
    for part in {name.split(".")[0] for name in after}:
        assert (
            max(abs(x - start[name]).max() for name, x in after.items() if name.startswith(part))
            > 1e-4
        ), part


# Rollouts.


def played(world):
    """The responses of five games, of two rollouts, by a model that is spread over the processes."""
    agent = load_agent(ModelConfig(device="cpu"), 0, HOUSEHOLD.tokenizer, world=world)
    agent.add_critic()
    agent.shard()
    config = configure(env__max_turns="3", agent__max_response_tokens="6")
    tasks = [{"seed": seed} for seed in range(5)]
    batches = [play_tasks(agent, config, tasks, seed=seed) for seed in (1, 2)]
    return [[episode.responses for episode in t.episodes] for t in batches]


def test_two_processes_play_what_one_does(together):
    alone = played(ALONE)
    assert together(played) == [alone, alone] and alone[0] != alone[1]


# Checkpoints.


def saved(world, folder):
    """One update, a checkpoint, and another update: its losses, and the weights that were saved."""
    agent, t = make_agent(world)
    config = settings(microbatch_tokens=200)
    optimizers = build_optimizers(agent, config)
    training(agent, t, config, optimizers, [1])
    checkpoint.save(
        folder, 1, policy=agent.model, tokenizer=agent.tokenizer, critic=agent.critic, optimizers=optimizers,
        state={"skipped": 0}, improved=True, world=world,
    )  # fmt: skip
    stored = weights(agent)
    return training(agent, t, config, optimizers, [2]), stored


def resumed(world, folder):
    """The weights after a load, and the losses of the update that follows."""
    agent, t = make_agent(world)
    config = settings(microbatch_tokens=200)
    optimizers = build_optimizers(agent, config)
    path = checkpoint.latest(folder)
    state = checkpoint.load(
        path, policy=agent.model, critic=agent.critic, optimizers=optimizers, world=world
    )
    assert state == {"step": 1, "skipped": 0}
    loaded = weights(agent)
    return training(agent, t, config, optimizers, [2]), loaded


def test_any_number_of_processes_resumes_a_checkpoint(together, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    losses, stored = saved(ALONE, alone)
    (losses_of_both, stored_by_both), _ = together(saved, both)
    files = {
        path.relative_to(both / "step-000001").parent.name
        for path in both.glob("*/*/*.safetensors")
    }
    assert files == {"critic", "optimizer"} and len(list(both.glob("*/*/*.safetensors"))) == 4
    for folder, expected, before in (
        (alone, losses, stored),
        (both, losses_of_both, stored_by_both),
    ):
        (again, by_both), _ = together(resumed, folder)
        again_alone, by_one = resumed(ALONE, folder)
        assert_same(by_both, before, 0.0)
        assert_same(by_one, before, 0.0)
        for found in (again, again_alone):
            assert_same_metrics(found[0], expected[0])
    assert checkpoint.best(both) == both / "step-000001"


def test_a_checkpoint_of_two_is_a_hugging_face_folder_without_pickles(together, tmp_path):
    from transformers import AutoModelForCausalLM

    (_, stored), _ = together(saved, tmp_path)
    path = checkpoint.latest(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert type(model) is type(make_agent(ALONE)[0].model) and model.config.tie_word_embeddings
    assert_same({f"policy.{name}": x.numpy() for name, x in model.state_dict().items()},
                {name: x for name, x in stored.items() if name.startswith("policy.")}, 0.0)  # fmt: skip
    assert {file.suffix for file in path.rglob("*.*")} <= {
        ".json",
        ".safetensors",
        ".jinja",
        ".txt",
    }
    next((path / "optimizer").iterdir()).unlink()
    with pytest.raises(
        CheckpointError, match="optimizer/shard.* is missing; use another checkpoint"
    ):
        resumed(ALONE, tmp_path)


def masters(optimizers):
    """The float32 weights that train, of MasterWeights or whole from their shards."""
    return {
        f"{name}/{i}": getattr(p, "full_tensor", lambda p=p: p)().detach().numpy().copy()
        for name, optimizer in optimizers.items()
        for i, p in enumerate(getattr(optimizer, "masters", optimizer.param_groups[0]["params"]))
    }


def in_bfloat16(world, folder, saves):
    """Masters of bfloat16 weights, after an update that is then saved, or after a load of what was."""
    agent, t = make_agent(world, dtype="bfloat16")
    config = settings(microbatch_tokens=400)
    optimizers = build_optimizers(agent, config)
    networks = {
        "policy": agent.model,
        "critic": agent.critic,
        "optimizers": optimizers,
        "world": world,
    }
    if saves:
        training(agent, t, config, optimizers, [1])
        checkpoint.save(folder, 1, **networks, tokenizer=agent.tokenizer, state={})
    else:
        checkpoint.load(checkpoint.latest(folder), **networks)
    return masters(optimizers)


def test_masters_of_bfloat16_weights_pass_between_one_process_and_two(together, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    stored = in_bfloat16(ALONE, alone, True)
    assert_same(together(in_bfloat16, alone, False)[0], stored, 0.0)
    stored, _ = together(in_bfloat16, both, True)
    assert_same(in_bfloat16(ALONE, both, False), stored, 0.0)
    assert any((x != torch.from_numpy(x).bfloat16().float().numpy()).any() for x in stored.values())


# Whole runs.


def one_of_two(rank, port, arguments, dies=False):
    """Its part of a run, as torchrun would have started it; the first process may die while step 2 is saved."""
    for name, value in {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_PORT": port,
    }.items():
        os.environ[name] = str(value)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    put_in_place = checkpoint._put_in_place

    def deadly(temporary, target):
        if dies and target.name == "step-000002":
            os.kill(os.getpid(), signal.SIGKILL)
        put_in_place(temporary, target)

    checkpoint._put_in_place = deadly
    os._exit(train.main(arguments))


def run_of_two(arguments, dies=False):
    """Runs `arguments` in two processes; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    workers = [
        context.Process(target=one_of_two, args=(rank, port, arguments, dies)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    workers[0].join(PATIENCE)
    if dies:
        workers[1].kill()  # as torchrun does when a process is lost
    workers[1].join(PATIENCE)
    return [worker.exitcode for worker in workers]


SHORT = {
    "updates": 3,
    "eval.episodes": 4,
    "train.episodes": 5,
    "run.save_every": 1,
    "run.keep": 9,
    "eval.every": 2,
}


def test_two_processes_resume_after_a_kill_as_if_nothing_had_been(tmp_path):
    folder = functools.partial(arguments, tmp_path, **SHORT)
    assert run_of_two(folder(name="whole")) == [0, 0]
    whole = rows(tmp_path / "whole")
    assert [(row["stage"], row["step"]) for row in whole if row["stage"] != "warm_start"] == [
        ("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3)]  # fmt: skip
    assert all(row["eval/episodes"] == 4 for row in whole if row["stage"] == "eval")

    first, second = run_of_two(folder(name="killed"), dies=True)
    assert first == -signal.SIGKILL and second != 0
    assert checkpoint.latest(tmp_path / "killed" / "checkpoints").name == "step-000001"
    again = ["--resume", "--name", "killed", f"--run.folder={tmp_path}"]
    assert run_of_two(again) == [0, 0]
    assert rows(tmp_path / "killed") == whole
    last = "checkpoints/step-000003/model.safetensors"
    assert (tmp_path / "killed" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()

    assert train.main([*again, "--updates", "4"]) == 0, "one process goes on with what two began"
    assert rows(tmp_path / "killed")[-1]["step"] == 4


def test_torchrun_starts_a_run_that_logs_once(tmp_path):
    options = {
        **SHORT,
        "updates": 1,
        "warm_start.enabled": "no",
        "run.display": "plain",
        "name": "run",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    result = subprocess.run(
        [*command, "-m", "hiper_fast.train", *arguments(tmp_path, **options)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(set(lines)) == len(lines)
    told = [line.split()[0] for line in lines if not line.startswith("warning:")]
    assert told == ["eval", "train", "eval", "report:"]
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 1]
    card = (tmp_path / "run" / "checkpoints" / "step-000001" / "README.md").read_text()
    alone = load_agent(ModelConfig(device="cpu"), 0, HOUSEHOLD.tokenizer).model.num_parameters()
    assert f"| parameters | {alone:,} |" in card


@pytest.mark.parametrize("size, late", [("1", True), ("2", False)])
def test_one_of_many_leaves_at_once_and_loses_nothing_it_said(size, late):
    code = "import atexit; atexit.register(print, 'late'); print('said')\n"
    code += "from hiper_fast.distributed import leave; leave(3)"
    environment = os.environ | {"WORLD_SIZE": size}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 3 and result.stdout.split() == ["said"] + ["late"] * late


def test_fewer_episodes_than_processes(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert train.main(arguments(tmp_path, **{"train.episodes": 7})) == 2
    assert "train.episodes" in capsys.readouterr().err
    options = {"train.episodes": 8, "eval.episodes": 8, "train.optimizer": "offload"}
    assert train.main(arguments(tmp_path, **options)) == 2

    assert "train.optimizer" in capsys.readouterr().err
