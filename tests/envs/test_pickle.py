"""Environments that travel: a copy from the middle of an episode goes on as the original does."""

import json
import pickle
import random
import subprocess
import sys

import pytest
from products import asked, product
from test_alfworld_games import write_split

from hiper_fast import envs
from hiper_fast.envs import household, webshop
from hiper_fast.envs.alfworld import AlfWorld

GO_ON = "import pickle, sys; env, moves = pickle.load(sys.stdin.buffer); " + (
    "sys.stdout.buffer.write(pickle.dumps([env.step(move) for move in moves]))"
)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    write_split(tmp_path / "train", {"pick_and_place_simple-Mug-None-Desk-1/trial": {}})
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)
    return tmp_path


def make_shop():
    items = [product(f"B{i}", pricing="$10 - $20") for i in range(9)]
    attributes = {f"B{i}": asked("dimmable") for i in range(9)}
    return webshop.WebShop(webshop.Catalogue.from_items(items, attributes, nouns="plain"))


MADE = {
    "household": lambda: envs.make("household"),
    "alfworld": lambda: envs.make("alfworld"),
    "alfworld game": lambda: AlfWorld(household.generate("pick_two_obj_and_place", 2, "small")),
    "webshop": lambda: envs.make("webshop", observation="text_rich", nouns="plain"),
    "webshop of items": make_shop,
}


def play(env, moves, rng, info):
    """What is seen in `moves` random moves, and the last `info`."""
    seen = []
    for _ in range(moves):
        listed = [c for c in info["admissible_commands"] if not c.startswith("search[")]
        command = rng.choice(listed + ["search[a cheap lamp]"] * isinstance(env, webshop.WebShop))
        seen.append((command, *env.step(command)))
        info = seen[-1][-1]
    return seen, info


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("moves", [0, 1, 7, 20])
def test_a_copy_from_the_middle_of_an_episode_goes_on_alike(name, moves):
    env = MADE[name]()
    rng = random.Random(moves)
    _, info = play(env, moves, rng, env.reset(seed=3)[1])
    copy, state = pickle.loads(pickle.dumps(env)), rng.getstate()
    ours, _ = play(env, 12, rng, info)
    rng.setstate(state)
    assert play(copy, 12, rng, info)[0] == ours
    if name != "household":  # which draws what nobody chose
        assert [copy.reset() for _ in range(3)] == [env.reset() for _ in range(3)]


@pytest.mark.parametrize("name", MADE)
def test_a_copy_goes_on_in_a_fresh_process(name):
    env = MADE[name]()
    env.reset(seed=3)
    moves = ["look", "search[lamp]", "click[next >]", "inventory"]
    sent = pickle.dumps((env, moves))
    got = subprocess.run([sys.executable, "-c", GO_ON], input=sent, stdout=subprocess.PIPE)
    assert pickle.loads(got.stdout) == [env.step(move) for move in moves]


def test_an_environment_travels_before_its_first_game_too():
    for make in MADE.values():
        copy = pickle.loads(pickle.dumps(make()))
        assert copy.reset(seed=5) == make().reset(seed=5)


def test_copies_of_the_shop_share_its_catalogue_and_weigh_little():
    env = envs.make("webshop")
    env.reset(seed=0)
    sent = pickle.dumps(env)
    first, second = pickle.loads(sent), pickle.loads(sent)
    assert first.catalogue is second.catalogue is env.catalogue
    assert first.goals is env.goals and len(sent) < 20_000


def test_a_shop_of_files_is_read_again_and_must_be_the_same(data):
    items = [product(f"B{i}", pricing="$10 - $20") for i in range(9)]
    folder = data / "shop"
    folder.mkdir()
    (folder / "items_shuffle.json").write_text(json.dumps(items))
    asks = {item["asin"]: asked("dimmable") for item in items}
    (folder / "items_ins_v2.json").write_text(json.dumps(asks))
    catalogue = webshop.Catalogue.load(folder, 4, prices={"B1": 12.5}, nouns="plain")
    env = webshop.WebShop(catalogue)
    first = env.reset(seed=0)
    sent = pickle.dumps(env)
    copy = pickle.loads(sent)
    assert copy.reset(seed=0) == first and copy.catalogue["B1"].price == 12.5
    assert copy.catalogue.prices.tolist() == catalogue.prices.tolist() and len(sent) < 20_000
    (folder / "items_shuffle.json").write_text(json.dumps(items[1:]))
    with pytest.raises(
        webshop.DataError, match="9 products when this was pickled and has 8; fetch"
    ):
        pickle.loads(sent)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("command", [None, 3, b"look", ["look"]])
def test_an_action_that_is_no_text_is_named(name, command):
    env = MADE[name]()
    env.reset(seed=0)
    before = pickle.dumps(env)
    kind = type(command).__name__
    with pytest.raises(TypeError, match=f"command: expected str, got {kind}$"):
        env.step(command)
    assert pickle.dumps(env) == before
