"""How runs stop and go on: signals, locks, files that were changed or broken, another way from an earlier update."""

import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import configure
from test_train import arguments, failure, rows

from hiper_fast import stopping, train
from hiper_fast.runs import checkpoint, folder, lock

pytestmark = pytest.mark.timeout(600)
STOPS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
KILLS = int(os.environ.get("HIPER_FAST_KILLS", 4))  # random moments


@pytest.fixture(scope="module", autouse=True)
def no_data():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ALFWORLD_DATA", raising=False)
        yield


@pytest.fixture(scope="module", autouse=True)
def preloaded():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hiper_fast.train", __name__])
    first = context.Process(target=int)
    first.start()
    first.join()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, preloaded):
    """A run that nothing disturbed, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("runs")
    began = time.monotonic()
    assert begin(arguments(folder, name="whole"))[0] == 0
    return folder / "whole", time.monotonic() - began


def resume(folder, name, *more):
    return ["--resume", "--name", name, f"--run.folder={folder}", *more]


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to go on with."""
    return Path(shutil.copytree(finished[0], tmp_path / "whole"))


# Runs in processes of their own, that have what they need imported.


def hear_all():
    """Also where whoever began the tests ignores some, as `nohup` and a shell's `&` do."""
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def heard():
    former = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    hear_all()
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def work(argv, err, change, told):
    hear_all()
    os.dup2(os.open(err, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    if change:
        change(told)
    os._exit(train.main(argv))


def begin(argv, act=None, change=None):
    """A run; `act(process, told)` disturbs it, after `change(told)` in the process. Its exit status and its stderr."""
    context = multiprocessing.get_context("forkserver")
    told = context.Event()
    err = (
        Path(argv[0].partition("=")[2] or argv[3].partition("=")[2]).parent
        / f"err-{time.time_ns()}"
    )
    process = context.Process(target=work, args=(argv, str(err), change, told))
    process.start()
    if act:
        act(process, told)
    process.join(200)
    assert process.exitcode is not None
    return process.exitcode, err.read_text()


def tell_at(module, name, call, told, wait=0.0):
    """Sets `told` at the `call`th call of a function, and gives the signal time to come in it."""
    module, calls = importlib.import_module(module), itertools.count(1)
    original = getattr(module, name)

    def telling(*args, **kwargs):
        if next(calls) == call:
            told.set()
            until = time.monotonic() + wait
            while time.monotonic() < until:
                time.sleep(0.01)
        return original(*args, **kwargs)

    setattr(module, name, telling)


def send(*signals, apart=0.0):
    def act(process, told):
        assert told.wait(100)
        for name in signals:
            os.kill(process.pid, getattr(signal, name))
            time.sleep(apart)

    return act


def at(module, name, call, wait=0.5):
    return functools.partial(tell_at, f"hiper_fast.{module}", name, call, wait=wait)


@pytest.mark.parametrize(
    "name, moment, saved",
    [
        (
            "SIGTERM",
            at("rollout.play", "awake", 5),
            2,
        ),  # the third rollout, after two evaluations, is given up
        ("SIGHUP", at("train", "update", 3), 3),  # an update is finished
        ("SIGINT", at("train", "evaluate", 2), 2),  # and so is an evaluation
    ],
)
def test_a_signal_saves_what_was_done_and_the_run_goes_on_exactly(
    finished, tmp_path, name, moment, saved
):
    whole, _ = finished
    argv = arguments(tmp_path, name="stopped", **{"run.save_every": 100, "eval.every": 2})
    status, err = begin(argv, send(name), moment)
    assert status == STOPS[name] and "Traceback" not in err
    run = tmp_path / "stopped"
    assert checkpoint.step_of(checkpoint.latest(run / "checkpoints")) == saved
    line = err.splitlines()[-1]
    assert line.startswith(f"{name}: stopped; update {saved} is saved; go on with: ")
    command = shlex.split(line.partition("python -m hiper_fast.train ")[2])
    assert train.main(command) == 0
    assert rows(run) == rows(whole)
    for file in ("model.safetensors", "critic.safetensors", "optimizer.safetensors"):
        last = f"checkpoints/step-000005/{file}"
        assert (run / last).read_bytes() == (whole / last).read_bytes(), file


@pytest.mark.parametrize("moment", [at("learn.warm_start", "add_gradients", 2)])
def test_a_stopped_warm_start_says_that_it_begins_anew(finished, tmp_path, moment):
    status, err = begin(arguments(tmp_path, name="warm"), send("SIGTERM"), moment)
    assert status == 143
    told = "SIGTERM: stopped before its first checkpoint; it begins anew with: python -m hiper_fast"
    assert err.count("\n") == 1 and err.startswith(told)
    assert train.main(resume(tmp_path, "warm")) == 0
    assert rows(tmp_path / "warm") == rows(finished[0])


def test_after_the_warm_start_it_is_kept(finished, tmp_path):
    argv = arguments(tmp_path, name="warm")
    status, err = begin(argv, send("SIGTERM"), at("train", "evaluate", 1))
    assert status == 143 and "update 0 is saved" in err
    assert train.main(resume(tmp_path, "warm")) == 0
    assert rows(tmp_path / "warm") == rows(finished[0])


def test_before_the_run_has_a_folder_nothing_is_written(tmp_path):
    moment = at("session", "load_agent", 1)
    status, err = begin(arguments(tmp_path / "runs", name="none"), send("SIGINT"), moment)
    assert status == 130 and err == "SIGINT: stopped before the run began; nothing was written\n"
    assert not (tmp_path / "runs").exists()


def test_a_second_signal_stops_at_once(finished, tmp_path):
    moment = at("train", "update", 2, wait=60)
    began = time.monotonic()
    argv = arguments(tmp_path, name="hasty")
    status, err = begin(argv, send("SIGTERM", "SIGTERM", apart=1.3), moment)
    assert status == 143 and time.monotonic() - began < 40
    first, second = err.splitlines()
    assert first.startswith("SIGTERM: stopping when this update is saved; once more")
    assert second == "stopped at once; what was saved is whole"
    assert train.main(resume(tmp_path, "hasty")) == 0
    assert rows(tmp_path / "hasty") == rows(finished[0])


def test_handlers_are_put_back_ignored_signals_stay_ignored_and_twice_in_a_second_is_once(heard):
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.Stopping() as signals:
            assert signal.getsignal(signal.SIGTERM) not in before
            os.kill(os.getpid(), signal.SIGHUP)  # as under nohup
            assert not signals.asked
            with pytest.raises(stopping.Stop), signals.at_once():
                os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(stopping.Stop), signals.at_once():
                pytest.fail("it was asked before")
            os.kill(
                os.getpid(), signal.SIGTERM
            )  # as `timeout` does, to the process and to its group
            assert signals.asked == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, former)
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


def test_a_forked_worker_ends_by_the_signal_as_if_nobody_listened(heard):
    with stopping.Stopping() as signals:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.write(writer, b"here")
            time.sleep(60)
            os._exit(0)
        os.read(reader, 4)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not signals.asked


def one_of_two(rank, port, argv, told):
    """A process of a run, as torchrun would have started it."""
    told_by = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told_by.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    hear_all()
    tell_at("hiper_fast.train", "update", 2, told, wait=0.5)
    os._exit(train.main(argv))


def test_many_processes_stop_after_the_same_update_whichever_was_asked(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    told = context.Event()
    argv = arguments(tmp_path, name="two", **{"run.save_every": 100, "warm_start.enabled": "no"})
    pair = [context.Process(target=one_of_two, args=(rank, port, argv, told)) for rank in (0, 1)]
    for process in pair:
        process.start()
    send("SIGTERM")(pair[1], told)
    for process in pair:
        process.join(200)
    assert [process.exitcode for process in pair] == [143, 143]
    assert checkpoint.latest(tmp_path / "two" / "checkpoints").name == "step-000002"
    assert train.main(resume(tmp_path, "two", "--updates", "3")) == 0, "one goes on with it"
    assert [row["step"] for row in rows(tmp_path / "two") if row["stage"] == "train"] == [1, 2, 3]


# The command itself.


def start(*argv, **options):
    command = [sys.executable, "-m", "hiper_fast.train", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["preexec_fn"] = hear_all
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes | options)


@pytest.mark.parametrize("name, status", STOPS.items())
def test_in_the_first_seconds_it_is_one_line(tmp_path, name, status):
    process = start(*arguments(tmp_path / "runs", name="early"))
    time.sleep(0.7)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and out == ""
    assert err.startswith(name if "(" not in err else "stopped") and err.count("\n") == 1, err
    assert "nothing was" in err


def test_a_terminal_that_hangs_up_stops_the_run_with_its_state_saved(tmp_path):
    """A panel, whose terminal is gone when the run next writes to it."""
    argv = arguments(tmp_path, name="panel", run__display="panel", updates=500, train__episodes=8)
    child, terminal = pty.fork()
    if not child:
        hear_all()
        os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
        os.execv(sys.executable, [sys.executable, "-m", "hiper_fast.train", *argv])
    run = tmp_path / "panel"
    deadline = time.monotonic() + 100
    while not any(row["step"] > 0 for row in rows(run) if row["stage"] == "train"):
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 2**16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    last = [row["step"] for row in rows(run) if row["stage"] == "train"][-1]
    assert checkpoint.step_of(checkpoint.latest(run / "checkpoints")) == last < 500


# Kills at random moments.


@pytest.mark.timeout(200 * KILLS)
def test_killed_at_random_moments_a_run_ends_up_as_if_nothing_had_been(finished, tmp_path):
    """Every signal and kill -9, until there were HIPER_FAST_KILLS of them; a run that ends gives way to another."""
    whole, seconds = finished
    rng, kills, number = random.Random(KILLS), 0, 0
    names = [*STOPS, "SIGKILL"]
    while kills < KILLS:
        name = f"killed-{number}"
        run, number, ended = tmp_path / name, number + 1, False
        while not ended:
            kill, delay = names[kills % 4], rng.uniform(0.05, 0.7) * seconds
            begun = (run / "config.yaml").exists()
            argv = resume(tmp_path, name) if begun else arguments(tmp_path, name=name)
            act = functools.partial(disturb, kill, delay if kills < KILLS else None)
            status, err = begin(argv, act)
            assert "Traceback" not in err, err
            ended = status == 0
            assert ended or status in (STOPS.get(kill), -signal.SIGKILL, -getattr(signal, kill)), (
                err
            )
            kills += not ended
        assert rows(run) == rows(whole)
        for file in ("model.safetensors", "critic.safetensors", "optimizer.safetensors"):
            last = f"checkpoints/step-000005/{file}"
            assert (run / last).read_bytes() == (whole / last).read_bytes(), file


def disturb(name, delay, process, told):
    if delay is not None:
        process.join(delay)
        if process.is_alive():
            os.kill(process.pid, getattr(signal, name))


def test_a_run_is_saved_by_the_clock_too(tmp_path):
    options = {"run.save_every": 100, "eval.every": 100, "run.keep": 9, "warm_start.enabled": "no"}
    for minutes, steps in ((1e-6, [0, 1, 2]), (0, [0, 2])):
        argv = arguments(tmp_path, name=str(minutes), updates=2, **options)
        assert train.main([*argv, f"--run.save_minutes={minutes}"]) == 0
        assert checkpoint.list_steps(tmp_path / str(minutes) / "checkpoints") == steps


# Two runs in one folder.


def test_a_second_run_in_a_folder_is_refused_by_the_first_ones_name(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    with lock.hold(run, "run", ""):
        err = failure(capsys, resume(run.parent, "whole", "--updates", "9"))
    assert re.search(
        rf"{run}: another run is at work here \(host \S+, process {os.getpid()}, since 20.*\); stop it, or",
        err,
    )
    assert (run / "metrics.jsonl").read_bytes() == before
    assert train.main(resume(run.parent, "whole", "--updates", "6")) == 0, "it was given back"


def hold_for_ever(folder, told):
    with lock.hold(folder, "run", ""):
        told.set()
        time.sleep(600)


@pytest.mark.parametrize("locks", [True, False])
def test_the_lock_of_a_killed_run_is_taken_over(tmp_path, monkeypatch, locks):
    """Also on a file system without locks, where its name decides."""
    context = multiprocessing.get_context("forkserver")
    told = context.Event()
    owner = context.Process(target=hold_for_ever, args=(tmp_path, told))
    owner.start()
    assert told.wait(60)
    if not locks:
        monkeypatch.setattr(
            lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "no"))
        )
    with (
        pytest.raises(ValueError, match=f"another run .*process {owner.pid}, "),
        lock.hold(tmp_path, "run", ""),
    ):
        pytest.fail("it has an owner")
    owner.kill()
    owner.join()
    with lock.hold(tmp_path, "run", ""):
        assert json.loads((tmp_path / lock.LOCK).read_text())["process"] == os.getpid()
    assert (tmp_path / lock.LOCK).read_text() == ""


def test_without_locks_an_owner_on_another_host_is_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "no")))
    (tmp_path / lock.LOCK).write_text('{"host": "elsewhere", "process": 1, "since": "2026"}')
    with pytest.raises(ValueError, match="host elsewhere, .*if that is gone, remove .*lock"):
        lock.hold(tmp_path, "run", "").__enter__()


def test_runs_that_begin_in_one_moment_get_folders_of_their_own(tmp_path, monkeypatch):
    find, faster = folder.find_run_folder, iter([True, True, False, True])

    def overtaken(config):
        found = find(config)
        if next(faster):
            found.mkdir(parents=True)
        return found

    monkeypatch.setattr(folder, "find_run_folder", overtaken)
    made = folder.make_run_folder(configure(run__folder=str(tmp_path)))
    assert made.name == "household-seed0-3" and made.is_dir()
    with pytest.raises(ValueError, match="--name: the run .*mine exists"):
        folder.make_run_folder(configure(run__folder=str(tmp_path), run__name="mine"))


# Another way from an earlier update.


def test_a_run_goes_another_way_from_an_earlier_update_and_loses_nothing(finished, run):
    whole, _ = finished
    before = rows(run)
    step = 4
    later = {f"step-{s:06d}" for s in checkpoint.list_steps(run / "checkpoints") if s > step}
    argv = resume(run.parent, "whole")
    assert train.main([*argv, "--run.resume_from", str(step)]) == 0
    assert rows(run) == before, "the same way: the same end"
    kept = run / "until-000005"
    assert rows(kept) == before
    assert {path.name for path in (kept / "checkpoints").iterdir()} == later
    for name in later:
        file = f"checkpoints/{name}/model.safetensors"
        assert (kept / file).read_bytes() == (whole / file).read_bytes()
    assert train.main([*argv, "--run.resume_from", str(step), "--train.lr", "0"]) == 0
    assert rows(run) != before and rows(run / "until-000005-2") == before
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["resume_from"] is None


def test_an_update_without_a_checkpoint_is_refused(run, capsys):
    err = failure(capsys, resume(run.parent, "whole", "--run.resume_from", "77"))
    assert "run.resume_from" in err and "no checkpoint of update 77; it has those of" in err


def test_a_finished_run_says_so_and_how_it_goes_further(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train.main(resume(run.parent, "whole")) == 0
    out = capsys.readouterr().out
    assert f"{run} is finished, after 5 updates" in out and out.count("\n") == 1
    assert "--resume --name whole" in out and out.rstrip().endswith("--updates 10")
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= {"report.html"}


# Options that changed.

ANOTHER = {
    "env.max_turns": 5, "run.seed": 1, "agent.style": "reference", "agent.subgoals": "no",
    "advantage.estimator": "gae", "warm_start.lr": 1, "model.path": "other", "model.dtype": "bfloat16",
    "model.critic": "shared", "model.lora_rank": 4, "train.optimizer": "offload",
    "train.master_weights": "no",
}  # fmt: skip


@pytest.mark.parametrize("name, value", ANOTHER.items())
def test_an_option_that_makes_another_run_is_refused(run, capsys, name, value):
    err = failure(capsys, resume(run.parent, "whole", f"--{name}={value}", "--updates=9"))
    assert f"{name}: the run {run} has " in err and "which would make it another" in err
    assert f"--model {run / 'checkpoints' / 'step-000005'}" in err


def test_the_other_options_that_changed_are_named(run, capsys):
    options = ["--train.lr=1e-4", "--eval.every=3", "--run.display=plain", "--updates=6"]
    assert train.main(resume(run.parent, "whole", *options)) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "resumed" in line]
    assert line == (
        "resumed with train.updates 6 instead of 5, train.lr 0.0001 instead of 0.0015, eval.every 3 instead of 2"
    )


def test_another_runs_options_are_refused(run, capsys):
    """Those in config.yaml count as little as the command line's, against what the checkpoint knows."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["run"]["seed"] = 7
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert "run.seed: the run" in failure(capsys, resume(run.parent, "whole", "--updates=9"))


# Files that are missing, cut short, empty or another's.


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def scribble(file):
    file.write_bytes(b'{"state": [1], "step": 5, "rng": {}, "policy": 3, "critic": []}\n\xff')


def go_on(run, capsys):
    capsys.readouterr()
    before = (run / "metrics.jsonl").read_bytes() if (run / "metrics.jsonl").exists() else None
    err = failure(capsys, resume(run.parent, "whole", "--updates=9"))
    if before is not None:
        assert (run / "metrics.jsonl").read_bytes() == before, "a refusal changes nothing"
    return err


IN_CHECKPOINT = {
    *("model.safetensors", "config.json", "critic.safetensors", "optimizer.safetensors"),
    *("optimizer.json", "state.json", "hiper_fast.yaml"),
}


@pytest.mark.parametrize(
    "name, damage",
    [*zip(sorted(IN_CHECKPOINT), itertools.cycle([cut, empty, scribble]), strict=False)],
)
def test_a_broken_file_of_a_checkpoint_is_named_with_a_way_out(run, capsys, name, damage):
    damage(run / "checkpoints" / "step-000005" / name)
    err = go_on(run, capsys)
    assert "step-000005" in err and "use another checkpoint, as with --run.resume_from 4" in err


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_a_broken_reference_is_an_error(finished, run, capsys, damage):
    damage(run / "reference.safetensors")
    err = go_on(run, capsys)
    assert str(run / "reference.safetensors") in err and "--train.kl_coef 0" in err
    if damage is cut:
        assert train.main(resume(run.parent, "whole", "--updates=6", "--train.kl_coef=0")) == 0


def test_another_runs_reference_is_an_error(run, capsys):
    model = run / "checkpoints" / "step-000005" / "model.safetensors"
    shutil.copy(model, run / "reference.safetensors")
    assert "reference.safetensors is not as the run wrote it" in go_on(run, capsys)


@pytest.mark.parametrize("damage", [Path.unlink, cut, empty, scribble])
def test_a_broken_config_is_named_with_its_copies(run, capsys, damage):
    damage(run / "config.yaml")
    assert "hiper_fast.yaml" in go_on(run, capsys)
    shutil.copy(run / "checkpoints" / "step-000005" / "hiper_fast.yaml", run / "config.yaml")
    assert train.main(resume(run.parent, "whole", "--updates=5")) == 0


@pytest.mark.parametrize("damage", [cut, empty, scribble])
def test_broken_metrics_are_named_and_kept(run, capsys, damage):
    damage(run / "metrics.jsonl")
    err = go_on(run, capsys)
    assert f"{run / 'metrics.jsonl'}: " in err and "put a copy of it back" in err
    if damage is cut:
        (run / "metrics.jsonl").unlink()
        assert train.main(resume(run.parent, "whole", "--updates=6")) == 0, "as the error says"


def test_a_line_in_the_middle_of_the_metrics_that_is_none_is_named(run, capsys):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], "{]", *lines[2:]]) + "\n")
    assert "line 3 is no row of metrics" in go_on(run, capsys)


def test_files_of_another_checkpoint_are_refused(run, capsys):
    checkpoints = run / "checkpoints"
    shutil.copy(checkpoints / "step-000004" / "state.json", checkpoints / "step-000005")
    assert "state.json is of step 4; use another checkpoint" in go_on(run, capsys)


@pytest.mark.parametrize("name", ["model.safetensors", "critic.safetensors", "optimizer.json"])
def test_a_file_of_another_checkpoint_is_refused(run, capsys, name):
    checkpoints = run / "checkpoints"
    content = (checkpoints / "step-000004" / name).read_bytes()
    if name.endswith("json"):
        content = content.replace(b"0.99", b"0.98", 1)
    (checkpoints / "step-000005" / name).write_bytes(content)
    assert f"{name} is not as it was written; use another checkpoint" in go_on(run, capsys)


def test_a_state_that_no_run_has_is_named(run, capsys):
    file = run / "checkpoints" / "step-000005" / "state.json"
    content = json.loads(file.read_text())
    content["state"]["best"] = "high"
    file.write_text(json.dumps(content))
    assert f"{file} is corrupt: best is no number; use another checkpoint" in go_on(run, capsys)
