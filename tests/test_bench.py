"""The bench command: every op in the table, figures in the file, clear errors; its calls agree with the reference."""

import json

import pytest
import torch

from hiper_fast import bench, ops

TINY = bench.SIZES["tiny"]


@pytest.fixture(scope="module")
def inputs():
    return bench.make_inputs(TINY)


def test_there_is_a_call_for_every_op(inputs):
    assert set(bench.make_calls(inputs)) == set(ops.implementations())


@pytest.mark.parametrize("op", ops.implementations())
def test_what_is_timed_is_right(inputs, op):
    call = bench.make_calls(inputs)[op]
    mine, reference = call(ops), call(ops.reference)
    mine, reference = ([x] if isinstance(x, torch.Tensor) else x for x in (mine, reference))
    for x, y in zip(mine, reference, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_inputs_look_like_an_update(inputs):
    turns = TINY.trajectories * TINY.turns
    assert inputs.switch.shape == (turns,) and 0 < inputs.switch.sum() < turns
    assert inputs.roles.shape == (turns * TINY.tokens,)
    assert {1, 2, 4} <= set(inputs.roles.tolist())
    assert all(g.abs().sum() > 0 for g in bench.make_calls(inputs)["linear_ppo"](ops))


def test_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench, "measure", lambda call, device: 0.002 if call() is not None else None
    )
    assert bench.main(["--size", "tiny", "--json", str(tmp_path / "bench.json")]) == 0
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "bench.json").read_text())
    chosen = ops.implementations()
    assert [(x["op"], x["device"]) for x in saved["ops"]] == [
        (op, d) for d in chosen["hae"] for op in chosen
    ]
    assert {x["op"]: x for x in saved["ops"]}["find_roles"][
        "tokens_per_second"
    ] == 4 * 5 * 40 / 0.002
    for entry in saved["ops"]:
        line = next(
            x for x in printed.splitlines() if x.split()[:2] == [entry["op"], entry["device"]]
        )
        assert (
            entry["implementation"] == chosen[entry["op"]][entry["device"]]
            and entry["implementation"] in line
        )
        assert "2 ms" in line and ("[" in line) == bool(entry["why"])
        assert entry["why"] in printed
    assert "scaled_dot_product_attention" in saved["attention"] or torch.cuda.is_available()
    assert saved["torch"] == torch.__version__ and torch.__version__ in printed


def test_environment_makes_it_tiny(monkeypatch):
    monkeypatch.setenv("HIPER_FAST_BENCH", "tiny")
    assert bench.choose_size() == "tiny"
    monkeypatch.delenv("HIPER_FAST_BENCH")
    assert bench.choose_size() == "full"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--json", "nowhere/bench.json"], "--json nowhere/bench.json: there is no folder nowhere"),
        (["--size", "huge"], "--size"),
        (["--device", "cpu"], "--device"),
    ],
)
def test_bad_options(capsys, arguments, named):
    with pytest.raises(SystemExit) as end:
        bench.main(arguments)
    assert end.value.code == 2 and named in capsys.readouterr().err


def test_a_file_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda call, device: 1.0)
    assert bench.main(["--size", "tiny", "--json", str(tmp_path)]) == 2
    assert "--json" in capsys.readouterr().err


def test_median_after_a_warm_up(monkeypatch):
    clock = iter([0, 0.15, *(t for i in range(3) for t in (10 * i, 10 * i + (0.1, 0.2, 0.9)[i]))])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.measure(lambda: None, "cpu") == pytest.approx(0.2)


def test_a_slow_call_is_made_once(monkeypatch):
    clock = iter([0, 5])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.measure(lambda: None, "cpu") == 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.2e-6, "4.2 µs"), (0.9999e-3, "1 ms"), (0.0653, "65.3 ms"), (1.234, "1.23 s")],
)
def test_duration(seconds, text):
    assert bench.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(812, "812"), (64_200, "64.2k"), (1.9e6, "1.9M"), (3e10, "30G")]
)
def test_rate(count, text):
    assert bench.format_rate(count) == text
