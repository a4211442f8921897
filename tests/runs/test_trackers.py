"""Where rows go beside metrics.jsonl: what each tracker is told, by stand-ins, and by the packages where they are."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from hiper_fast import train
from hiper_fast.options import ConfigError
from hiper_fast.runs.metrics import Logger, read_metrics
from hiper_fast.runs.trackers import check_installed

ROOT = Path(__file__).parents[2]
OPTIONS = {"train.lr": 0.1, "run.name": "mine", "model.lora_targets": None}
EVALUATION = {
    "eval/success": 0.5, "eval/low": 0.3, "eval/high": 0.7, "eval/episodes": 20, "eval/success/look": 0.5,
    "eval/episodes/look": 20, "eval/won/look": "01" * 10,
}  # fmt: skip
TABLE = [["look", 0.5, 20], ["all", 0.5, 20]]


class Standin(types.ModuleType):
    """Records what would be sent to a server; `wandb` and `trackio` alike."""

    def __init__(self, name):
        super().__init__(name)
        self.calls, self.broken = [], False

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    id = "abc123"

    def Settings(self, **options):
        return options

    def Table(self, columns, data):
        return {"columns": columns, "data": data}

    def define_metric(self, *args, **options):
        self.calls.append(("define", args, options))

    def log(self, values, step=None):
        if self.broken:
            raise RuntimeError("the server is gone")
        self.calls.append(("log", values, step))

    def finish(self, exit_code=0):
        self.calls.append(("finish", exit_code))

    def told(self, kind):
        return [call[1:] for call in self.calls if call[0] == kind]


@pytest.fixture
def standin(monkeypatch):
    def make(name):
        module = Standin(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    monkeypatch.delenv("WANDB_MODE", raising=False)
    return make


def log_run(folder, track, **options):
    with Logger(folder, display="none", track=track, options=OPTIONS, **options) as logger:
        logger.log(50, "warm_start", {"loss/imitation": 1.0, "warm_start/accuracy": 0.5})
        logger.log(1, "train", {"loss/kl": 0.25, "loss/value": None})
        logger.log(1, "eval", EVALUATION)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_rows_the_options_and_the_last_table(tmp_path, standin, name):
    module = standin(name)
    log_run(tmp_path / "mine", [name])
    [[begun]] = module.told("init")
    assert (
        begun["config"] == OPTIONS and begun["name"] == "mine" and begun["project"] == "hiper_fast"
    )
    *rows, (table, _) = module.told("log")
    warm, update, evaluation = [values for values, _ in rows]
    assert warm["warm_start/loss/imitation"] == 1.0 and warm["warm_start/accuracy"] == 0.5
    assert (
        update["loss/kl"] == 0.25
        and "loss/value" not in update
        and evaluation["eval/success"] == 0.5
    )
    assert not any(isinstance(value, str) for values, _ in rows for value in values.values())
    steps = [step for _, step in rows]
    if name == "wandb":
        steps = [warm["warm_start/step"], update["update"], evaluation["update"]]
    assert steps == [50, 1, 1]
    kept = table["eval/table"]
    assert [line[:3] for line in kept["data"]] == TABLE and len(kept["columns"]) == 5
    assert module.told("finish") == [(0,)]
    assert not (tmp_path / "mine" / "tensorboard").exists(), "only what was asked for"


def test_wandb_is_offline_unless_told_otherwise(tmp_path, standin, monkeypatch):
    module = standin("wandb")
    log_run(tmp_path / "a", ["wandb"])
    monkeypatch.setenv("WANDB_MODE", "online")
    log_run(tmp_path / "b", ["wandb"])
    assert [begun["mode"] for [begun] in module.told("init")] == ["offline", "online"]


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "resume")])
def test_a_resumed_run_goes_on_with_its_own(tmp_path, standin, name, key):
    module = standin(name)
    log_run(tmp_path, [name])
    log_run(tmp_path, [name], resume_step=1)
    log_run(tmp_path, [name])
    seen = [begun[key] for [begun] in module.told("init")]
    first, resumed = (None, "abc123") if name == "wandb" else ("never", "allow")
    assert seen == [first, resumed, first]


def test_a_run_that_stops_is_said_to_have_failed(tmp_path, standin):
    module = standin("wandb")
    with pytest.raises(KeyError), Logger(tmp_path, display="none", track=["wandb"]):
        raise KeyError
    assert module.told("finish") == [(1,)]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, standin, capsys):
    module = standin("wandb")
    with Logger(tmp_path, display="plain", track=["wandb", "tensorboard"]) as logger:
        module.broken = True
        logger.log(1, "eval", EVALUATION)
        logger.log(2, "eval", EVALUATION)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    out = capsys.readouterr().out
    assert (
        out.count("run.track: wandb failed, and the run goes on without it: the server is gone")
        == 1
    )
    assert (tmp_path / "tensorboard").exists()


def test_tensorboard_has_the_options_and_the_table_too(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_run(tmp_path, ["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    texts = {
        tag.removesuffix("/text_summary"): events.Tensors(tag)[-1]
        .tensor_proto.string_val[0]
        .decode()
        for tag in events.Tags()["tensors"]
    }
    assert yaml.safe_load(texts["config"]) == OPTIONS
    assert "| look | 50.0% | 20 |" in texts["eval/table"]


def test_what_is_not_installed_is_named_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            ConfigError, match=rf"run.track: {name} .*pip install 'hiper_fast\[{name}\]'"
        ):
            check_installed([name])
        argv = ["--run.track", f"tensorboard,{name}", "--run.folder", str(tmp_path / "runs")]
        assert train.main(argv) == 2
        err = capsys.readouterr().err
        assert f"hiper_fast[{name}]" in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_what_cannot_begin_is_named(tmp_path, standin):
    module = standin("wandb")
    module.init = lambda **options: 1 / 0
    with pytest.raises(ConfigError, match="run.track: wandb cannot begin: division by zero"):
        Logger(tmp_path, display="none", track=["wandb"])


def test_a_tracker_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        train.main(["--run.track", "tensorboard,mlflow"])
    assert "'mlflow' is none of tensorboard, wandb, trackio" in capsys.readouterr().err


# The packages themselves, where they are installed; no socket leaves this machine.

REAL = """
import socket, sys
real = socket.socket.connect
def connect(self, address):
    local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
    assert local, f"it reached for {address}"
    return real(self, address)
socket.socket.connect = connect
sys.path.insert(0, "tests/runs")
from test_trackers import log_run
log_run(sys.argv[1], sys.argv[2:])
log_run(sys.argv[1], sys.argv[2:], resume_step=1)
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_package_itself_offline(tmp_path, name):
    pytest.importorskip(name)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TRACKIO"))}
    environment |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    command = [sys.executable, "-c", REAL, str(tmp_path / "mine"), name]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    if name == "wandb":
        files = [*(tmp_path / "mine" / "wandb").glob("offline-run-*/run-*.wandb")]
        [own] = {file.stem for file in files}
        assert own == f"run-{(tmp_path / 'mine' / 'wandb-id').read_text().strip()}"
        [*tables] = (tmp_path / "mine" / "wandb").rglob("*.table.json")
        assert [line[:3] for line in json.loads(tables[0].read_text())["data"]] == TABLE
    else:
        assert [*(tmp_path / "trackio").rglob("*.db")]
