"""Constants measured on a card: the tables that launches read, and benchmarks/tune.py, which writes them."""

import json
import os

import pytest
import torch

pytest.importorskip("triton")

import tune
from tune_cases import CASES, Case, Launch

from hiper_fast.kernels import _tuning

GPU = torch.device("cuda", 0)
NAME = "A card, 9.0, Triton 3.6"
DEFAULTS = {"BLOCK": 1024, "STAGES": 3, "TMA": False}


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Files to write to: what comes with the package, and the user's own."""
    monkeypatch.setattr(_tuning, "SHIPPED", tmp_path / "tuned.json")
    monkeypatch.setattr(_tuning, "cache_file", lambda: tmp_path / "own.json")
    monkeypatch.setattr(_tuning, "describe_device", lambda device: NAME)
    clear()
    yield tmp_path / "tuned.json", tmp_path / "own.json"
    clear()


def clear():
    _tuning._measured.cache_clear()
    _tuning.constants.cache_clear()


def write(path, kernel, **values):
    path.write_text(json.dumps({NAME: {kernel: values}}))


def read(kernel="a._kernel", device=GPU):
    return _tuning.constants(kernel, device, **DEFAULTS)


def test_without_a_table_the_defaults_count(tables, recwarn):
    assert read() == DEFAULTS and not recwarn.list


def test_the_users_table_goes_before_what_is_shipped(tables):
    shipped, own = tables
    shipped.write_text(json.dumps({NAME: {"a._kernel": {"BLOCK": 64}, "b._kernel": {"BLOCK": 32}}}))
    write(own, "a._kernel", BLOCK=2048, TMA=True)
    assert read() == DEFAULTS | {"BLOCK": 2048, "TMA": True}
    assert read("b._kernel") == DEFAULTS | {"BLOCK": 32}
    assert read(device=torch.device("cpu")) == DEFAULTS


def test_another_cards_table_is_not_read(tables, monkeypatch):
    write(tables[0], "a._kernel", BLOCK=64)
    monkeypatch.setattr(_tuning, "describe_device", lambda device: "Another, 8.0, Triton 3.6")
    assert read() == DEFAULTS


def test_the_tables_can_be_left_unread(tables, monkeypatch):
    write(tables[1], "a._kernel", BLOCK=64)
    monkeypatch.setattr(_tuning, "READ", False)
    assert read() == DEFAULTS


BROKEN = [[], {NAME: 3}, {NAME: {"a._kernel": {"BLOCK": "64"}}}]


@pytest.mark.parametrize("text", ["{", "\xff", *map(json.dumps, BROKEN)])
def test_a_broken_table_is_one_warning(tables, text):
    tables[1].write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match="own.json.*defaults") as caught:
        assert read() == read("b._kernel") == DEFAULTS
    assert len(caught) == 1


@pytest.mark.parametrize(
    "values", [{"BLOCK": 1000}, {"BLOCK": -64}, {"BLOCK": True}, {"STAGES": 0}, {"TMA": 1}]
)
def test_a_value_that_cannot_be_is_told(tables, values):
    write(tables[1], "a._kernel", **values)
    with pytest.warns(UserWarning, match="a._kernel"):
        assert read() == DEFAULTS


def test_a_parameter_that_is_no_more_is_passed_over(tables, recwarn):
    write(tables[1], "a._kernel", WARPS=8, STAGES=4)
    assert read() == DEFAULTS | {"STAGES": 4} and not recwarn.list


def test_constants_can_be_tried(tables):
    write(tables[0], "a._kernel", BLOCK=64)
    with _tuning.trying("a._kernel", BLOCK=512):
        assert read() == DEFAULTS | {"BLOCK": 512}
    with _tuning.trying("a._kernel"):
        assert read() == DEFAULTS
    assert read() == DEFAULTS | {"BLOCK": 64}


def test_what_is_shipped_is_a_table():
    content = json.loads(_tuning.SHIPPED.read_text())
    assert all(_tuning.read_table(_tuning.SHIPPED, device) for device in content)


CPU = torch.device("cpu")
TIMES = {1024: 1.0, 2048: 0.5, 512: 2.0, 256: 0.995}


class Fake:
    """A case whose call gives its BLOCK: wrong at 4096, refused at 8192; and a clock for it."""

    def __init__(self, *blocks):
        self.case = Case("a._kernel", {"BLOCK": blocks}, self.prepare)

    def prepare(self, few, device, dtype):
        return Launch(self.call, lambda: (torch.zeros(1, dtype=torch.float64),))

    def call(self):
        block = read(device=CPU)["BLOCK"]
        if block == 8192:
            raise OSError("out of resources")
        return (torch.full((1,), float(block == 4096)),)

    def clock(self, call):
        call()
        return TIMES[read(device=CPU)["BLOCK"]]

    def tune(self, misfits=()):
        return tune.tune(self.case, CPU, torch.float32, dict(misfits), self.clock)


def test_the_fastest_that_fits_and_is_right_is_chosen(tables):
    found = Fake(1024, 512, 2048, 4096, 8192, 16384).tune({"BLOCK 16384": "spill"})
    assert found.chosen == {"BLOCK": 2048} and (found.before, found.after) == (1.0, 0.5)
    assert found.timed == 3
    assert found.skipped == {"are wrong": 1, "fail (OSError)": 1, "spill": 1}
    assert "1.0000 -> 0.5000 ms (50.0% less), 3 timed; 1 are wrong; 1 fail" in str(found)


def test_for_a_small_gain_the_default_stays(tables):
    found = Fake(1024, 256).tune()
    assert found.chosen == found.default and found.after == found.before
    assert "the defaults" in str(found)


@pytest.mark.parametrize("first, why", [(4096, "are wrong"), (8192, "fail")])
def test_defaults_that_do_not_work_are_told(tables, first, why):
    with pytest.raises(RuntimeError, match=f"the defaults {why}"):
        Fake(first, 1024).tune()


def test_what_was_found_is_read_again(tables):
    own = tables[1]
    own.write_text(json.dumps({"Another": {"a._kernel": {"BLOCK": 32}}}))
    tune.write_table(own, NAME, [Fake(1024, 2048).tune()])
    clear()
    assert read() == DEFAULTS | {"BLOCK": 2048}
    assert json.loads(own.read_text())["Another"] == {"a._kernel": {"BLOCK": 32}}
    tune.write_table(own, NAME, [Fake(1024, 512).tune()])
    assert json.loads(own.read_text())[NAME] == {"a._kernel": {"BLOCK": 1024}}


def test_a_run_keeps_what_it_found_when_a_kernel_fails(tables, capsys, monkeypatch):
    good, bad = Fake(1024, 2048), Fake(8192, 1024)
    cases = [good.case, bad.case._replace(kernel="b._kernel")]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    screened = [("a._kernel", "BLOCK 1024", ""), ("b._kernel", "BLOCK 8192", "spill")]
    monkeypatch.setattr(tune, "screen", lambda cases, capability, jobs: screened)
    monkeypatch.setattr(tune, "milliseconds", lambda call, *_, **__: good.clock(call))
    assert tune.run(cases, tables[1], 1) == 1
    assert json.loads(tables[1].read_text()) == {NAME: {"a._kernel": {"BLOCK": 2048}}}
    assert "b._kernel" in (out := capsys.readouterr().out) and "the defaults spill" in out


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing")
@pytest.mark.parametrize("warps, reason", [(8, ""), (4, "spill")])
def test_spills_are_found_without_a_gpu(warps, reason):
    case = next(case for case in CASES if case.kernel == "_head._statistics_kernel")
    with _tuning.trying(case.kernel, BLOCK=8192, STAGES=3, num_warps=warps):
        assert tune.find_misfit(case, 90) == reason


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)
def test_what_a_case_launches_can_be_built(case, monkeypatch):
    """Here nothing is: what is launched is written down, as for a build, with the last of the candidates."""
    judged = []
    monkeypatch.setattr(tune, "judge", lambda build, launch, capability: judged.append(launch))
    with _tuning.trying(case.kernel, **list(tune.list_candidates(case))[-1]):
        assert tune.find_misfit(case, 90) == ""
    of_a_kernel = case.kernel.split(".")[1].startswith("_")
    assert bool(judged) == of_a_kernel


def test_shared_memory_is_held_to_the_card(monkeypatch):
    built = {"stack": 0, "shared": 150_000}
    for capability, fits in ((80, True), (89, False), (90, True), (77, False)):
        reason = tune.judge(lambda *_, **__: built, (), capability)
        assert reason == ("" if fits else "take too much shared memory")
    assert tune.judge(lambda *_, **__: {"stack": 8}, (), 90) == "spill"
    assert "do not compile" in tune.judge(lambda *_, **__: 1 / 0, (), 90)


def test_a_dry_run_lists_candidates(capsys, monkeypatch):
    screened = [
        ("swiglu._forward_kernel", "BLOCK 1", ""),
        ("swiglu._forward_kernel", "BLOCK 2", "spill"),
    ]
    monkeypatch.setattr(tune, "screen", lambda cases, capability, jobs: screened)
    assert tune.main(["--dry-run", "--kernels", "swiglu._forward"]) == 0
    assert capsys.readouterr().out.split("\n")[:3] == [
        "swiglu._forward_kernel", "  BLOCK 1", f"  {'BLOCK 2':<44} would spill",
    ]  # fmt: skip


def test_a_broken_table_is_not_written_over(tables, capsys, monkeypatch):
    tables[1].write_text("{")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        tune.main(["--kernels", "rope"])
    assert "remove it first" in capsys.readouterr().err and tables[1].read_text() == "{"


def test_what_cannot_be_tuned_is_told(capsys):
    for arguments, words in ((["--kernels", "nothing"], "'nothing'"), ([], "no NVIDIA GPU")):
        if arguments or not torch.cuda.is_available():
            with pytest.raises(SystemExit):
                tune.main(arguments)
            assert words in capsys.readouterr().err
