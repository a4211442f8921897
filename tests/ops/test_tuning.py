"""Constants measured on a card: the tables that launches read, and benchmarks/tune.py, which writes them."""

import json

import pytest
import torch

pytest.importorskip("triton")

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
