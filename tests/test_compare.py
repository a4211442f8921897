"""Studies: how files are read, warm starts shared, runs made, killed and resumed; results and clear errors."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hiper_fast import train
from hiper_fast.compare import main
from hiper_fast.configure import resolve
from hiper_fast.options import ConfigError
from hiper_fast.runs.metrics import read_metrics
from hiper_fast.study import read_study

pytest.importorskip("scipy")
pytestmark = pytest.mark.timeout(900)  # twelve small runs, perhaps on a busy machine

SMALL = {
    "env": {"name": "household", "max_turns": 3},
    "train": {"updates": 2, "episodes": 8, "critic_updates": 1, "minibatches": 2, "lr": 8e-4},
    "warm_start": {"episodes": 16},
    "eval": {"episodes": 8, "every": 1},
    "run": {"save_every": 1},
    "model": {"device": "cpu"},
}
ARMS = {"HAE": {}, "flat GAE": {"advantage": {"estimator": "gae"}}}
BROKEN = "def estimate(turns, values, config):\n    raise RuntimeError('no credit today')\n"
RUNS = [f"{arm}-seed{seed}" for seed in (0, 1) for arm in ("hae", "flat-gae")]


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)


def write(path: Path, **content) -> Path:
    content = {"base": SMALL, "arms": ARMS, "seeds": 2} | content
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def begin(*arguments, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "hiper_fast.compare", *map(str, arguments)]
    path = os.pathsep.join([str(folder), str(Path(train.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("ALFWORLD_DATA", None)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def rows_of(run: Path) -> list[dict]:
    """The metrics of updates and evaluations, without what the clock says."""
    return [
        {key: value for key, value in row.items() if not key.startswith("time/")}
        for row in read_metrics(run / "metrics.jsonl")
        if row["stage"] != "warm_start"
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A study of two arms and two seeds, made at one go."""
    folder = tmp_path_factory.mktemp("whole")
    process = begin(write(folder / "study.yaml"), "--jobs", 2, folder=folder)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert "0 of 4 runs are finished; 6 to make" in out and not err
    return folder / "runs" / "study"


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The same, killed once its first arm has saved something."""
    folder = tmp_path_factory.mktemp("killed")
    process = begin(write(folder / "study.yaml"), "--jobs", 1, folder=folder)
    study = folder / "runs" / "study"
    while not list(study.glob("hae-seed0/checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return study


def test_a_killed_comparison_leaves_no_run_behind(killed):
    with (killed / "logs" / "hae-seed0.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # it waits for the run's own
    before = rows_of(killed / "hae-seed0")
    assert not (killed / "flat-gae-seed0").exists() and not (killed / "results.json").exists()
    time.sleep(1)
    assert rows_of(killed / "hae-seed0") == before


def test_a_killed_study_goes_on_to_the_same_results(killed, whole):
    """And grows meanwhile, by an arm that fails: the others are none the worse for it."""
    folder = killed.parents[1]
    (folder / "broken.py").write_text(BROKEN)
    arms = ARMS | {"broken": {"advantage": {"estimator": "broken:estimate"}}}
    study = write(folder / "study.yaml", arms=arms)
    process = begin(study, "--jobs", 2, folder=folder)
    out, err = process.communicate()
    assert process.returncode == 1
    for seed in (0, 1):
        log = Path("runs", "study", "logs", f"broken-seed{seed}.log")
        assert f"broken, seed {seed}: failed (exit status 1): RuntimeError: no credit today" in err
        assert f"(log: {log})" in err and "no credit today" in (folder / log).read_text()
    assert [rows_of(killed / run) for run in RUNS] == [rows_of(whole / run) for run in RUNS]
    ours, theirs = (json.loads((run / "results.json").read_text()) for run in (killed, whole))
    assert ours["unfinished"] == ["broken, seed 0", "broken, seed 1"] and list(
        ours["arms"]
    ) == list(ARMS)
    for arm in ARMS:
        assert drop_times(ours["arms"][arm]) == drop_times(theirs["arms"][arm])


def drop_times(value):
    if isinstance(value, dict):
        return {key: drop_times(entry) for key, entry in value.items() if key != "minutes"}
    return [drop_times(entry) for entry in value] if isinstance(value, list) else value


def test_finished_runs_are_left_alone(whole, capsys):
    before = {file: file.stat().st_mtime_ns for file in whole.glob("*seed*/**/*") if file.is_file()}
    assert main(["--folder", str(whole)]) == 0
    assert "4 of 4 runs are finished; 0 to make" in capsys.readouterr().out
    after = {file: file.stat().st_mtime_ns for file in whole.glob("*seed*/**/*") if file.is_file()}
    assert after == before


def test_an_arm_is_as_if_trained_at_one_go(whole, tmp_path):
    """From the shared warm start: the same metrics to the last digit."""
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(SMALL))
    options = f"--run.folder {tmp_path} --run.threads 1 --run.display none --seed 1 --name run"
    command = [sys.executable, "-m", "hiper_fast.train", "--config", str(tmp_path / "own.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *options.split()], check=True, env=environment)
    assert rows_of(tmp_path / "run") == rows_of(whole / "hae-seed1")
    loss = [row["loss/value"] for row in rows_of(tmp_path / "run") if row["stage"] == "train"]
    assert len(set(loss)) == 2 and loss != [
        row["loss/value"] for row in rows_of(whole / "hae-seed0") if row["stage"] == "train"
    ]


def test_results(whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["seeds"] == [0, 1] and results["unfinished"] == []
    assert results["panel"]["panel"] == "test" and results["panel"]["episodes"] == 8
    assert results["options"]["flat GAE"]["advantage.estimator"] == "gae"
    assert {"machine", "torch", "scipy", "hiper_fast"} <= results["made_with"].keys()
    evaluations = results["arms"]["HAE"]["runs"][1]["evaluations"]
    assert [evaluation["update"] for evaluation in evaluations] == [0, 1, 2]
    assert [evaluation["turns"] for evaluation in evaluations][0] == 0 < evaluations[1]["turns"]
    assert sum(len(games) for games in evaluations[0]["won"].values()) == 8
    for name in ("report.html", "results.md"):
        assert "flat GAE against HAE" in (whole / name).read_text()


def test_only_report(whole, capsys):
    for name in ("results.json", "report.html", "results.md"):
        (whole / name).unlink()
    options = "--only-report --against".split() + ["flat GAE", "--measure", "tail", "--tail", "1"]
    assert main(["--folder", str(whole), *options]) == 0
    assert capsys.readouterr().out == f"report: {whole / 'report.html'}\n"
    results = json.loads((whole / "results.json").read_text())
    assert (results["reference"], results["measure"], results["tail"]) == ("flat GAE", "tail", 1)
    assert "against" in results["arms"]["HAE"] and "against" not in results["arms"]["flat GAE"]
    assert "flat GAE against HAE" not in (whole / "results.md").read_text()


# What a study is.


def make(tmp_path, seeds=1, **content):
    return read_study({"base": SMALL, "arms": ARMS, "seeds": seeds} | content, "file", tmp_path)


def test_layers(tmp_path):
    (tmp_path / "more.yaml").write_text("train: {lr: 0.5, episodes: 4, group: 2}\n")
    study = read_study(
        {
            "config": str(tmp_path / "more.yaml"),
            "base": {"env": {"name": "household"}, "train": {"episodes": 6}},
            "arms": {"A": None, "B": {"train": {"episodes": 8, "lr": 0.1}}},
        },
        "file",
        tmp_path,
        [("command line", "train.lr", 0.7)],
    )
    trained = [(c.train.lr, c.train.episodes, c.train.group) for c in study.arms.values()]
    assert trained == [(0.7, 6, 2), (0.7, 8, 2)] and study.seeds == [0]
    assert {config.run.threads for config in study.arms.values()} == {1}


def test_runs_of_a_study(tmp_path):
    runs = make(tmp_path, seeds=[5, 3]).list_runs()
    names = ["hae-seed5", "flat-gae-seed5", "hae-seed3", "flat-gae-seed3"]
    assert [run.folder for run in runs] == [tmp_path / name for name in names]
    assert [run.config.run.seed for run in runs] == [5, 5, 3, 3]
    for run in runs:
        assert run.config.warm_start.enabled == "no" and run.config.agent.style == "compact"
        assert Path(run.config.model.path) == run.start.folder / "checkpoints" / "step-000000"
        start = run.start.config
        assert (start.model.path, start.warm_start.enabled, start.train.updates) == (
            "tiny",
            "yes",
            0,
        )
        assert start.run.seed == run.config.run.seed and start.env == run.config.env


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ({"reward": {"success": 10}}, True),
        ({"train": {"lr": 0.1, "group": 8}, "advantage": {"estimator": "grpo"}}, True),
        ({"agent": {"temperature": 0.5}, "model": {"critic": "shared"}}, True),
        ({"agent": {"history": 2}}, False),
        ({"agent": {"style": "reference"}}, False),
        ({"env": {"max_turns": 4}}, False),
        ({"warm_start": {"noise": 0.1}}, False),
        ({"train": {"weight_decay": 0.3}}, False),
        ({"model": {"dtype": "bfloat16"}}, False),
    ],
)
def test_who_shares_a_warm_start(tmp_path, options, shared):
    one, other = make(tmp_path, arms={"A": {}, "B": options}).list_runs()
    assert (one.start.folder == other.start.folder) == shared


def test_without_a_warm_start_there_is_none(tmp_path):
    base = SMALL | {"warm_start": {"enabled": False}}
    assert [run.start for run in make(tmp_path, base=base).list_runs()] == [None, None]
    assert make(tmp_path, base=base).list_runs()[0].config.model.path == "tiny"


def test_arms_by_name_get_a_group_where_they_need_one(tmp_path, capsys):
    options = ["--env", "household", "--seeds", "1,4", "--only-report", "--folder", str(tmp_path)]
    assert main(["--arms", "hae,grpo", *options]) == 2
    assert "no run of 'hae' is finished yet" in capsys.readouterr().err
    assert main(["--arms", "hae,grpo", *options, "--train.group", "5"]) == 2
    assert "128 episodes (train.episodes)" in capsys.readouterr().err


def test_a_changed_study_is_refused_and_a_grown_one_is_not(tmp_path, whole, capsys):
    def report(*options, **content):
        file = write(tmp_path / "study.yaml", **content)
        status = main([str(file), "--folder", str(whole), "--only-report", *options])
        return status, capsys.readouterr().err

    assert report() == (0, "")
    assert report(seeds=3) == (0, "")
    assert (
        report(arms=ARMS | {"GRPO": {"advantage": {"estimator": "grpo"}, "train": {"group": 4}}})[0]
        == 0
    )
    for options, content, told in [
        (["--train.lr", "0.5"], {}, "arm HAE: train.lr was 0.0008, is 0.5 and 1 more;"),
        ([], {"seeds": 1}, "seed 1 is gone;"),
        ([], {"arms": {"HAE": {}}}, "arm flat GAE is gone;"),
        ([], {"arms": ARMS | {"HAE": {"reward": {"keep": -0.3}}}}, "arm HAE: reward.keep was 0.0, is -0.3;"),
    ]:  # fmt: skip
        status, err = report(*options, **content)
        assert status == 2 and err.startswith("python -m hiper_fast.compare: ")
        assert f"{whole} holds another study: {told}" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"arms": {"A": {"train": {"updatez": 3}}}}, "file: arm A: unknown option 'train.updatez'; did you mean"),
        ({"base": {"train": {"lr": -1}}}, "file: base: train.lr: must be at least 0, got -1"),
        ({"arms": {"A": {"advantage": {"estimator": "hea"}}}}, "arm A: advantage.estimator: there is no estimator"),
        ({"arms": {"A": {"advantage": {"estimator": "grpo"}}}}, "file: arm A: train.group: grpo"),
        ({"arms": {"A": {"run": {"seed": 3}}}}, "file: arm A: run.seed is not for a study to give"),
        ({"arms": {"A": 3}}, "file: arm A: expected sections"),
        ({"arms": {}}, "file: arms: expected a name and options"),
        ({"arms": ["hae"]}, "file: arms: expected a name and options"),
        ({"armz": {}}, "file: unknown key 'armz'; did you mean arms?"),
        ({"arms": {"A b": {}, "a-B": {}}}, "file: arm 'A b': its runs need a folder name of their own"),
        ({"arms": {"warm start": {}}}, "need a folder name of their own"),
        ({"arms": {"A": {}, "B": {"eval": {"episodes": 9}}}}, "file: arm B: eval: arms are compared on one panel"),
        ({"seeds": 0}, "file: seeds: expected how many, or a list of different ones, got 0"),
        ({"seeds": [1, 1]}, "file: seeds:"),
        ({"seeds": "two"}, "file: seeds:"),
        ({"config": "nothing.yaml"}, "--config nothing.yaml: cannot be read"),
    ],
)  # fmt: skip
def test_errors_of_a_file_name_the_place(tmp_path, content, told):
    with pytest.raises(ConfigError) as error:
        make(tmp_path, **content)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "give a study's file, --arms A,B or the --folder of an old study"),
        ("nothing.yaml", "nothing.yaml: there is no such study"),
        ("STUDY --arms HEA", "--arms: STUDY has no arm 'HEA'; did you mean HAE?"),
        ("STUDY --seeds x", "--seeds: expected a number, or some (0,1,2), got 'x'"),
        ("STUDY --jobs 0", "--jobs: must be at least 1"),
        ("STUDY --against HEA", "--against: the study has no arm 'HEA'; did you mean HAE?"),
        ("STUDY --tail 0", "--tail: must be at least 1"),
        ("STUDY --threshold 40", "--threshold: a share of games from 0 to 1"),
        ("STUDY --seed 3", "command line: run.seed is not for a study to give; leave it out"),
        ("STUDY --train.updatez 3", "command line: unknown option 'train.updatez'"),
        ("STUDY other.yaml", "command line: unexpected argument 'other.yaml'"),
        ("--arms hae,gea", "there is no estimator 'gea'; did you mean gae?"),
    ],
)
def test_errors_of_a_command_line(tmp_path, capsys, arguments, told):
    file = str(write(tmp_path / "study.yaml"))
    folder = ["--folder", str(tmp_path / "runs")] if "STUDY" in arguments else []
    assert main([*arguments.replace("STUDY", file).split(), *folder]) == 2
    captured = capsys.readouterr()
    assert told.replace("STUDY", file) in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and not (tmp_path / "runs").exists()


def test_two_comparisons_in_one_folder_are_refused(whole, capsys):
    with (whole / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["--folder", str(whole)]) == 2
    assert f"{whole}: another comparison is at work here" in capsys.readouterr().err


def test_what_a_study_records_reads_back(whole):
    recorded = yaml.safe_load((whole / "study.yaml").read_text())
    again = read_study(recorded, "record", whole)
    assert list(again.arms) == list(ARMS) and again.seeds == [0, 1]
    run = resolve([whole / "hae-seed0" / "config.yaml"])
    assert run.train == again.arms["HAE"].train and run.agent == again.arms["HAE"].agent


def test_help_names_both_kinds_of_options(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "--against" in shown and "--train.updates" in shown
