from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hiper_fast.runs import checkpoint, tensors
from hiper_fast.runs.checkpoint import CheckpointError

transformers = pytest.importorskip("transformers")


def make_policy(hidden: int = 16, seed: int = 0):
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=20, hidden_size=hidden, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<unk>", "<eos>", "go", "to", "shelf", "1"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>"
    )


class Training:
    """A policy, a critic and their optimizers, with a step that uses the global random states."""

    def __init__(self, seed: int = 0, hidden: int = 16):
        self.policy = make_policy(hidden, seed)
        self.tokenizer = make_tokenizer()
        self.critic = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 3))
        decayed, plain = nn.ParameterList(), nn.ParameterList()
        for parameter in self.policy.parameters():
            (decayed if parameter.ndim > 1 else plain).append(parameter)
        groups = [{"params": list(decayed)}, {"params": list(plain), "weight_decay": 0.0}]
        self.optimizers = {
            "policy": torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)),
            "critic": torch.optim.AdamW(self.critic.parameters(), lr=3e-2),
        }

    def step(self) -> float:
        ids = torch.randint(0, 20, (2, 5 + random.randrange(3)))
        loss = self.policy(input_ids=ids, labels=ids).loss + float(np.random.rand())
        loss = loss + self.critic(torch.randn(4, self.critic[0].in_features)).square().mean()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss.item()

    def save(self, folder: Path, step: int, **options) -> Path:
        return checkpoint.save(
            folder, step, policy=self.policy, tokenizer=self.tokenizer, critic=self.critic,
            optimizers=self.optimizers, **{"state": {"episodes": 7 * step}, **options},
        )  # fmt: skip

    def load(self, path: Path) -> dict:
        return checkpoint.load(
            path, policy=self.policy, critic=self.critic, optimizers=self.optimizers
        )

    def weights(self) -> dict[str, torch.Tensor]:
        modules = {"policy": self.policy, "critic": self.critic}
        return {
            f"{m}.{name}": t.clone() for m in modules for name, t in modules[m].state_dict().items()
        }


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(tmp_path):
    training = Training()
    for _ in range(3):
        training.step()
    path = training.save(tmp_path, 3)
    expected = [training.step() for _ in range(3)]

    resumed = Training(seed=1)
    state = resumed.load(path)
    assert state == {"step": 3, "episodes": 21}
    assert [resumed.step() for _ in range(3)] == expected
    assert_same_weights(resumed.weights(), training.weights())
    for name, optimizer in training.optimizers.items():
        ours, theirs = resumed.optimizers[name].state_dict(), optimizer.state_dict()
        assert ours["param_groups"] == theirs["param_groups"]
        for parameter, entries in theirs["state"].items():
            for key, value in entries.items():
                restored = ours["state"][parameter][key]
                assert restored.dtype == value.dtype and torch.equal(restored, value), (
                    name,
                    parameter,
                    key,
                )
    path = resumed.save(tmp_path, 6, state=state)
    assert resumed.load(path)["step"] == 6, "a state that was once loaded holds an older step"


def test_the_folder_is_a_hugging_face_model_without_pickles(tmp_path):
    # Llama, because AutoTokenizer replaces the pre-tokenizer of Qwen2-type models by Qwen2's own.
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    training = Training()
    training.policy = transformers.LlamaForCausalLM(config)
    path = training.save(tmp_path, 10)
    assert path == tmp_path / "step-000010"
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(model.lm_head.weight, training.policy.lm_head.weight)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert (
        tokenizer("go to shelf 1")["input_ids"] == training.tokenizer("go to shelf 1")["input_ids"]
    )
    assert {file.suffix for file in path.rglob("*")} <= {".json", ".safetensors", ".jinja", ".txt"}


def test_without_critic_and_before_the_first_optimizer_step(tmp_path):
    training = Training()
    path = checkpoint.save(
        tmp_path,
        0,
        policy=training.policy,
        tokenizer=training.tokenizer,
        critic=None,
        optimizers={},
        state={},
    )
    assert not (path / "critic.safetensors").exists()
    assert checkpoint.load(path, policy=make_policy(seed=3)) == {"step": 0}
    path = training.save(tmp_path, 1)
    expected = training.step()
    resumed = Training(seed=2)
    resumed.load(path)
    assert resumed.step() == expected


def test_bfloat16_round_trip(tmp_path):
    policy = make_policy().to(torch.bfloat16)
    path = checkpoint.save(
        tmp_path, 1, policy=policy, tokenizer=make_tokenizer(), critic=None, optimizers={}, state={}
    )
    other = make_policy(seed=5).to(torch.bfloat16)
    checkpoint.load(path, policy=other)
    assert all(
        torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True)
    )


def test_rng_round_trip_through_json():
    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.randn(3).tolist(),
            torch.randn(3).tolist(),
        )

    random.gauss(0, 1), np.random.randn()  # leaves a cached second value in both
    rng = json.loads(json.dumps(checkpoint.capture_rng()))
    first = draw()
    draw()
    checkpoint.restore_rng(rng)
    assert draw() == first


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    training = Training()
    assert checkpoint.latest(tmp_path) is None and checkpoint.best(tmp_path / "nowhere") is None
    training.save(tmp_path, 1, improved=True)
    for step in (2, 3, 4):
        training.save(tmp_path, step)
    assert names(tmp_path) == ["step-000001", "step-000003", "step-000004"]
    assert checkpoint.best(tmp_path) == tmp_path / "step-000001"
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000004"
    training.save(tmp_path, 4, improved=True)
    training.save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-000004", "step-000005"]


def test_resume_finds_a_best_checkpoint_that_is_alone(tmp_path):
    Training().save(tmp_path, 6, improved=True)
    assert checkpoint.latest(tmp_path) == checkpoint.best(tmp_path) == tmp_path / "step-000006"


def test_step_of():
    assert checkpoint.step_of("runs/a/checkpoints/step-001234") == 1234
    with pytest.raises(CheckpointError, match="step-000010"):
        checkpoint.step_of("runs/a/checkpoints/best")


def test_saving_a_step_again_replaces_it(tmp_path):
    training = Training()
    training.save(tmp_path, 2)
    training.step()
    path = training.save(tmp_path, 2)
    resumed = Training(seed=1)
    resumed.load(path)
    assert_same_weights(resumed.weights(), training.weights())
    assert names(tmp_path) == ["step-000002"]


@pytest.mark.parametrize(
    ("module", "victim"),
    [(tensors, "save_file"), (checkpoint, "_fsync"), (checkpoint, "_put_in_place")],
)
def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, module, victim):
    training = Training()
    training.step()
    training.save(tmp_path, 1)
    before = training.weights()
    training.step()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(module, victim, full)
        with pytest.raises(
            CheckpointError, match=r"step-000002.*No space left.*free some disk space"
        ):
            training.save(tmp_path, 2)
        with pytest.raises(CheckpointError):
            training.save(tmp_path, 1)
    assert names(tmp_path) == ["step-000001"]
    resumed = Training(seed=1)
    resumed.load(checkpoint.latest(tmp_path))
    assert_same_weights(resumed.weights(), before)


def test_a_real_file_size_limit_is_reported_the_same_way(tmp_path):
    """RLIMIT_FSIZE makes the writers of safetensors and transformers fail, as a full disk would."""
    script = """
        import resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_checkpoint import Training
        from hiper_fast.runs import checkpoint
        folder = Path(sys.argv[1])
        training = Training()
        training.save(folder, 1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            training.save(folder, 2)
        except checkpoint.CheckpointError as error:
            print("clear:", error)
    """
    pytest.importorskip("resource")
    result = run_script(script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "clear: could not write checkpoint" in result.stdout
    assert names(tmp_path) == ["step-000001"]
    Training(seed=1).load(tmp_path / "step-000001")


def test_a_killed_save_is_swept_by_the_next_one(tmp_path):
    script = """
        import os, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_checkpoint import Training
        from hiper_fast.runs import checkpoint
        folder = Path(sys.argv[1])
        training = Training()
        training.save(folder, 1)
        checkpoint._put_in_place = lambda *arguments: os._exit(9)
        training.save(folder, 2)
    """
    assert run_script(script, tmp_path).returncode == 9
    assert names(tmp_path) == [".step-000002.tmp", "step-000001"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000001"
    training = Training(seed=1)
    training.load(tmp_path / "step-000001")
    assert names(tmp_path) == ["step-000001"]


def run_script(script: str, folder: Path) -> subprocess.CompletedProcess:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder), str(here)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    training = Training()
    path = training.save(tmp_path, 3)
    path.rename(tmp_path / ".step-000003.old")
    assert checkpoint.latest(tmp_path) == path
    Training(seed=1).load(path)


def dies_at(moment: int, folder: Path, act) -> bool:
    """Whether a child that does `act` comes to its `moment`th touch of `folder`: there it dies."""
    touches = iter(range(moment - 1))

    def kill(event, arguments):
        if (
            event in TOUCHES
            and str(arguments[0]).startswith(str(folder))
            and next(touches, None) is None
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        sys.addaudithook(kill)
        try:
            act()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    training = Training()
    training.step()
    training.save(tmp_path / "start", 1, improved=True)
    weights = {1: training.weights()}
    training.step()
    weights[2] = training.weights()
    found = []
    for moment in itertools.count(1):
        folder = tmp_path / f"{moment}"
        shutil.copytree(tmp_path / "start", folder)
        if not dies_at(
            moment, folder, lambda folder=folder: training.save(folder, 2, improved=True, keep=1)
        ):
            break
        path = checkpoint.latest(folder)
        resumed = Training(seed=1)
        found.append(resumed.load(path)["step"])
        assert_same_weights(resumed.weights(), weights[found[-1]])
        assert checkpoint.best(folder) == path, (
            "a checkpoint and that it is the best one appear together"
        )
        assert {name for name in names(folder) if name.startswith(".")} == set()
    assert len(found) > 20 and found == sorted(found) and set(found) == {1, 2}
    assert names(folder) == ["step-000002"]


def test_an_interrupt_cleans_up_and_passes_through(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_put_in_place", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Training().save(tmp_path, 1)
    assert names(tmp_path) == []


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "config.json",
        "critic.safetensors",
        "optimizer.safetensors",
        "optimizer.json",
        "state.json",
    ],
)
def test_a_missing_or_corrupt_file_is_named_and_nothing_is_half_loaded(tmp_path, file, damage):
    training = Training()
    training.step()
    path = training.save(tmp_path, 1)
    damage(path / file)
    other = Training(seed=1)
    before = other.weights()
    with pytest.raises(CheckpointError, match="step-000001.*use another checkpoint"):
        other.load(path)
    assert_same_weights(other.weights(), before)
    assert all(not optimizer.state for optimizer in other.optimizers.values())


JUNK = [None, 3, "x", [], {}, [[]], {"state": 1}, {"state": {"a": {}}, "param_groups": [{}]}]


def spoil(content: dict, rng: random.Random) -> None:
    """Puts something else in one place of it, at any depth."""
    place, key = content, rng.choice(list(content))
    while place[key] and isinstance(place[key], dict | list) and rng.random() < 0.7:
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    place[key] = rng.choice(JUNK)


@pytest.mark.parametrize("name", ["state.json", "optimizer.json"])
def test_json_of_another_shape_is_named_or_does_no_harm(tmp_path, name):
    training, rng = Training(), random.Random(0)
    training.step()
    path = training.save(tmp_path, 1)
    whole = (path / name).read_text()
    refused = 0
    for _ in range(40):
        content = json.loads(whole)
        spoil(content, rng)
        (path / name).write_text(json.dumps(content))
        other = Training(seed=1)
        before = other.weights()
        try:
            other.load(path)
            other.step()
        except CheckpointError as error:
            refused += 1
            assert "use another checkpoint" in str(error) or "own config" in str(error)
            assert_same_weights(other.weights(), before)
    assert refused > 10


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    path = Training(hidden=16).save(tmp_path, 1)
    other = Training(hidden=24)
    before = other.weights()
    with pytest.raises(CheckpointError, match=r"shape \(20, 16\), expected \(20, 24\)"):
        other.load(path)
    assert_same_weights(other.weights(), before)

    other = Training(seed=1)
    other.critic = nn.Linear(16, 3)
    with pytest.raises(CheckpointError, match="another model"):
        other.load(path)

    other = Training(seed=1)
    other.optimizers["policy"] = torch.optim.AdamW(other.policy.parameters())
    with pytest.raises(CheckpointError, match="per group"):
        other.load(path)

    other = Training(seed=1)
    other.optimizers["extra"] = torch.optim.AdamW(other.critic.parameters())
    with pytest.raises(CheckpointError, match="lacks extra"):
        other.load(path)


def test_load_names_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Training().load(tmp_path / "step-000001")


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        Training().save(tmp_path, 1, keep=0)
    with pytest.raises(ValueError, match="JSON-able"):
        Training().save(tmp_path, 1, state={"path": tmp_path})
    assert names(tmp_path) == []
