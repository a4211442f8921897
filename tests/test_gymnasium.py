"""The environments through Gymnasium itself: its checker, its registry, its vectors of processes."""

import pickle
import warnings

import pytest

gymnasium = pytest.importorskip("gymnasium")

from gymnasium.utils.env_checker import check_env  # noqa: E402
from test_alfworld_games import write_split  # noqa: E402

import hiper_fast.gymnasium  # noqa: E402
from hiper_fast import envs  # noqa: E402
from hiper_fast.gymnasium import MOST_SEEN, NAMES, AnyText, TextEnv  # noqa: E402

CONFIG = {"webshop": {"nouns": "plain"}}


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    trials = {f"pick_and_place_simple-Mug-None-Desk-{i}/trial": {} for i in range(3)}
    write_split(tmp_path / "train", trials)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)


def make(name, **config):
    return gymnasium.make(f"hiper_fast/{name}-v0", **CONFIG.get(name, {}), **config)


@pytest.mark.parametrize("name", NAMES)
def test_gymnasiums_own_checker_has_nothing_to_say(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(name).unwrapped)


@pytest.mark.parametrize("name", NAMES)
def test_it_plays_as_the_environment_does(name):
    env, plain = make(name, render_mode="ansi"), envs.make(name, **CONFIG.get(name, {}))
    assert isinstance(env.unwrapped, TextEnv) and env.spec.id == f"hiper_fast/{name}-v0"
    assert env.reset(seed=4) == plain.reset(seed=4)
    for command in ("look", "search[a lamp]", "inventory"):
        step = env.step(command)
        assert step == plain.step(command) and env.render() == step[0]
        assert step[0] in env.observation_space and command in env.action_space
    with pytest.raises(TypeError, match="command: expected str, got int"):
        env.step(3)
    env.close()
    env.close()


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_fixes_every_episode_after_it_and_a_copy_goes_on_alike(name):
    env, other = make(name).unwrapped, make(name).unwrapped
    assert env.reset(seed=1) == other.reset(seed=1)
    assert [env.reset() for _ in range(4)] == [other.reset() for _ in range(4)]
    copy = pickle.loads(pickle.dumps(env))
    assert copy.step("look") == env.step("look") and copy.reset() == env.reset()


def test_a_turn_limit_is_gymnasiums():
    env = make("household", max_episode_steps=2, size="medium")
    env.reset(seed=0)
    assert [env.step("look")[3] for _ in range(2)] == [False, True]
    with pytest.raises(ValueError, match="render_mode: 'human' is none of ansi, None"):
        TextEnv("household", render_mode="human")
    with pytest.raises(ValueError, match="unknown option 'sise' for household"):
        TextEnv("household", sise="small")


def make_processes(name, **options):
    return gymnasium.make_vec(
        f"hiper_fast/{name}-v0",
        num_envs=2,
        vectorization_mode="async",
        vector_kwargs={"context": "spawn", **options},
        **CONFIG.get(name, {}),
    )


def test_shared_memory_which_gymnasium_reads_texts_from_once_is_refused_with_the_mend():
    with pytest.raises(ValueError, match="shared_memory=False"):
        make_processes("household")


@pytest.mark.parametrize("name", NAMES)
def test_processes_play_as_one_does(name):
    many = make_processes(name, shared_memory=False)
    alone = [make(name) for _ in range(2)]
    try:
        seen, _ = many.reset(seed=7)
        assert seen == tuple(env.reset(seed=7 + i)[0] for i, env in enumerate(alone))
        for said in (("look", "inventory"), ("search[lamp]", "search[red tea]")):
            got = many.step(said)
            expected = [env.step(command) for env, command in zip(alone, said, strict=True)]
            assert got[0] == tuple(step[0] for step in expected)
            commands = [step[-1]["admissible_commands"] for step in expected]
            assert list(got[-1]["admissible_commands"]) == commands
    finally:
        many.close()


def test_the_space_holds_any_text_up_to_its_length():
    space = AnyText(5)
    assert "" in space and "a\ud800é漢🎁"[:5] in space
    assert "123456" not in space and 3 not in space and space == AnyText(5) != AnyText(6)
    space.seed(0)
    assert all(space.sample() in space for _ in range(20)) and len(space.sample((2, None))) == 2
    flat = gymnasium.spaces.flatten(space, "漢🎁")
    assert gymnasium.spaces.unflatten(space, flat) == "漢🎁"
    assert repr(AnyText(MOST_SEEN)) == f"Text(0, {MOST_SEEN}, charset=Unicode)"
    foreign = {"gymnasium", "openenv"}
    assert set(hiper_fast.gymnasium.NAMES) == set(envs.family.families.names()) - foreign
