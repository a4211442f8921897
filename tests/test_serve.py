"""What `python -m hiper_fast.serve` refuses, each in one line."""

import sys

import pytest

from hiper_fast import serve
from hiper_fast.envs.openenv import OpenEnvSession
from hiper_fast.options import ConfigError


def refuse(capsys, *argv):
    assert serve.main(list(argv)) == 2
    told = capsys.readouterr().err
    assert told.startswith("python -m hiper_fast.serve: ") and told.count("\n") == 1
    return told


def test_without_the_package_both_ways_say_what_to_install(capsys, monkeypatch):
    for name in ("fastapi", "openenv", "openenv.core"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "hiper_fast.openenv", raising=False)
    monkeypatch.setattr("hiper_fast.envs.openenv.environment.read_schema", lambda *_: {})
    assert "pip install 'hiper_fast[openenv]'" in refuse(capsys, "household")
    with pytest.raises(ConfigError, match=r"pip install 'hiper_fast\[openenv\]'"):
        OpenEnvSession().reset(seed=0)


def test_a_url_is_one_of_http():
    with pytest.raises(
        ConfigError, match="env.url: somewhere is no address of a server; give http://"
    ):
        OpenEnvSession("somewhere")


def test_options_are_those_of_the_environment():
    assert serve.read_options("household", ["--env.size", "medium"]).size == "medium"
    assert serve.read_options("household", ["--env.size=large"]).name == "household"
    for given, told in (
        (["--env.sise=small"], "did you mean env.size"),
        (["--env.max_turns=3"], "unexpected argument '--env.max_turns=3'"),
        (["--env.size=huge"], "env.size: 'huge' is none of small, medium, large"),
        (["--env.size"], "env.size: True is none of"),
    ):
        with pytest.raises(ConfigError, match=told):
            serve.read_options("household", given)


def test_a_place_that_is_taken_or_none_is_named():
    with serve.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} \(.*in use.*\); give another"):
            serve.listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="--port: must be from 0 to 65535, got 70000"):
        serve.listen("127.0.0.1", 70_000)
    with pytest.raises(ConfigError, match="nothing can be served at 192.0.2.1:0"):
        serve.listen("192.0.2.1", 0)


def test_it_refuses_in_one_line(capsys):
    pytest.importorskip("openenv", reason="needs openenv-core: pip install 'hiper_fast[openenv]'")
    assert "there is no environment 'househild'" in refuse(capsys, "househild")
    assert "--sessions: must be at least 1" in refuse(capsys, "household", "--sessions=0")
