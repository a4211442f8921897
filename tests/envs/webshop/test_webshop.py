"""WebShop: the recorded episodes to the letter; each rule of pages, clicks, goals and reward."""

import json
import lzma
import random

import pytest
from products import asked, product

from hiper_fast.envs import Environment, make
from hiper_fast.envs.webshop import Catalogue, WebShop, is_admissible
from hiper_fast.envs.webshop.reward import PlainNouns, Reward, find_nouns
from hiper_fast.envs.webshop.shop import parse


def shop(items=None, attributes=None, **options):
    items = [product()] if items is None else items
    if attributes is None:
        attributes = {item["asin"]: asked("dimmable") for item in items}
    return Catalogue.from_items(items, attributes, **{"nouns": "plain", **options})


def many(count):
    return [
        product(f"B{i:09d}", name=f"Lamp number {i}", customization_options="")
        for i in range(count)
    ]


@pytest.fixture
def env():
    env = WebShop(shop(), split="all")
    env.reset(seed=0)
    return env


def walk(env, *commands):
    for command in commands:
        observation, reward, terminated, truncated, info = env.step(command)
        assert truncated is False
    return observation, reward, terminated, info


# The recordings.


@pytest.fixture(scope="module")
def recorded(data_dir):
    path = data_dir / "webshop" / "golden_episodes.jsonl.xz"
    if not path.exists():
        pytest.skip(f"no recorded WebShop episodes at {path}")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def catalogues(data_dir, tmp_path_factory):
    if not (data_dir / "webshop" / "items_ins_v2_1000.json").exists():
        pytest.skip("no WebShop product files")
    cache = tmp_path_factory.mktemp("cache")
    return {
        seed: Catalogue.load(
            data_dir / "webshop", seed=seed, nouns="plain", cache=cache, progress=lambda *_: None
        )
        for seed in (6, 1006)
    }


def recorded_reward(goal, step):
    """The reward with a noun test that gives the recorded title score, which a tagger made."""
    bought, wanted, score = (
        step["purchased_nouns"],
        step["goal_nouns"],
        step["verbose"]["title_score"],
    )
    shared = len(set(bought) & set(wanted))
    length = round(shared / score) if score else len(wanted)
    names = {goal["name"]: wanted + wanted[:1] * (length - len(wanted))}
    return lambda title: names.get(title, bought)


def test_recorded_episodes_replay_to_the_letter(recorded, catalogues):
    steps = 0
    for episode in recorded:
        catalogue, where = catalogues[episode["seed"]], (episode["seed"], episode["session"])
        env = WebShop(catalogue)
        observation, info = env.reset(options={"goal": episode["goal"]})
        assert (observation, info["available_actions"]) == (
            episode["reset"]["obs"],
            episode["reset"]["available"],
        )
        for step in episode["steps"]:
            if step["done"]:
                catalogue.reward = Reward(recorded_reward(episode["goal"], step))
            observation, reward, terminated, truncated, info = env.step(step["action"])
            at = (*where, step["action"])
            assert observation == step["obs"], at
            assert (terminated, truncated) == (step["done"], False), at
            state = {name: getattr(env, name) for name in ("keywords", "options")}
            state |= {"page": env.page_number, "asin": env.product and env.product.asin}
            assert state == step["session_state"], at
            if step["done"]:
                assert info["reward_parts"] == step["verbose"], at
                assert info["task_score"] == step["hiper"]["task_score"] == step["reward"], at
                assert (info["won"], reward) == (step["hiper"]["won"], step["hiper"]["reward"]), at
                assert env.product.price == step["price"], at
            else:
                assert info["available_actions"] == step["available"], at
                assert reward == step["reward"] == 0 and "reward_parts" not in info, at
            steps += 1
    assert steps > 200


def test_recorded_goals_and_prices_are_drawn_again(recorded, catalogues, data_dir):
    prices = json.loads((data_dir / "webshop" / "range_prices.json").read_text())
    for seed, catalogue in catalogues.items():
        for asin, price in prices[str(seed)].items():
            assert catalogue[asin].price == price
        order = list(range(len(catalogue.goals())))
        random.Random(seed).shuffle(order)  # as the recordings' loader did, with its own seed
        for episode in recorded:
            if episode["seed"] == seed:
                assert catalogue.goals()[order[episode["session"]]] == episode["goal"]


def test_goals_of_the_thousand_products(catalogues):
    goals = catalogues[6].goals()
    assert (len(goals), len(catalogues[6].goals("human"))) == (6910, 13)
    assert sum(not goals.reachable(i) for i in range(len(goals))) == 458
    assert [len(goals.split(s)) for s in ("test", "validation", "train")] == [500, 1000, 5410]
    assert goals.split("test").tolist() == catalogues[1006].goals().split("test").tolist()


def test_splits_by_product_share_no_product(catalogues):
    goals = catalogues[6].goals()
    parts = {
        name: goals.split(name, "product").tolist() for name in ("test", "validation", "train")
    }
    assert (len(parts["test"]), len(parts["validation"])) == (500, 1000)
    products = {name: {goals[i]["asin"] for i in part} for name, part in parts.items()}
    assert (
        not products["test"] & products["validation"] and not products["train"] & products["test"]
    )
    assert not products["train"] & products["validation"]
    shared = {goals[i]["asin"] for i in goals.split("test")} & {
        goals[i]["asin"] for i in goals.split("train")
    }
    assert shared  # which is why the other split is there


# Pages and clicks.


def test_environment_protocol(env):
    assert isinstance(env, Environment)
    observation, info = env.reset(seed=3)
    goal = env.goal
    assert (
        observation == f"WebShop [SEP] Instruction: [SEP] {goal['instruction_text']} [SEP] Search"
    )
    assert info["task"] == goal["instruction_text"]
    assert (info["task_type"], info["won"], info["task_score"]) == ("garden", False, 0.0)
    assert info["available_actions"] == {"has_search_bar": True, "clickables": ["search"]}
    assert info["admissible_commands"] == ["search[<your query>]", "click[search]"]


def test_same_seed_same_goals():
    catalogue = shop(many(40))
    one, other = WebShop(catalogue, split="all", seed=5), WebShop(catalogue, split="all", seed=5)
    drawn = [one.reset()[0] for _ in range(5)]
    assert drawn == [other.reset()[0] for _ in range(5)] and len(set(drawn)) > 1
    assert one.reset(seed=9) == other.reset(seed=9)


def test_item_page(env):
    observation, _, _, info = walk(env, "search[lamp]", "click[b000000001]")
    after = observation.split(" [SEP] ")[2:]
    assert after == [
        *[
            "Back to Search",
            "< Prev",
            "color",
            "light blue",
            "red | white",
            "Oak Desk Lamp",
            "Price: $18.5",
        ],
        *["Rating: N.A.", "Description", "Features", "Reviews", "Buy Now"],
    ]
    assert info["available_actions"] == {
        "has_search_bar": False,
        "clickables": [
            *["back to search", "< prev", "description", "features", "reviews", "buy now"],
            *["light blue", "red | white"],
        ],
    }
    assert info["admissible_commands"][-1] == "click[red | white]"


def test_sub_pages(env):
    walk(env, "search[lamp]", "click[b000000001]", "click[light blue]")
    for name, texts in {
        "description": ["A lamp of oak."],
        "features": ["Dimmable", "Warm light"],
        "reviews": [],
    }.items():
        observation, *_, info = walk(env, f"click[{name}]")
        assert observation.split(" [SEP] ")[2:] == ["Back to Search", "< Prev", *texts]
        assert info["available_actions"]["clickables"] == ["back to search", "< prev"]
        walk(env, "click[< prev]")
        assert env.options == {"color": "light blue"} and env.where == "item"


def test_attributes_show_on_request():
    env = WebShop(shop(), split="all", show_attributes=True)
    env.reset()
    observation, *_, info = walk(env, "search[lamp]", "click[b000000001]")
    assert (
        "Reviews [SEP] Attributes [SEP] Buy Now" in observation
        and "attributes" in info["available_actions"]["clickables"]
    )
    observation, *_ = walk(env, "click[attributes]")
    assert observation.endswith(
        "< Prev [SEP] dimmable [SEP] garden [SEP] desk lamps [SEP] Home › Lighting › Lamps"
    )


def test_turning_pages():
    env = WebShop(shop(many(12)), split="all")
    env.reset()
    observation, *_, info = walk(env, "search[lamp]")
    assert "Page 1 (Total results: 12) [SEP] Next > [SEP] B" in observation
    assert len(info["available_actions"]["clickables"]) == 2 + 10
    observation, *_, info = walk(env, "click[next >]")
    assert "Page 2 (Total results: 12) [SEP] < Prev [SEP] Next > [SEP] B" in observation
    assert len(info["available_actions"]["clickables"]) == 3 + 2
    observation, *_ = walk(env, "click[next >]", "click[next >]")
    assert observation.endswith("Page 4 (Total results: 12) [SEP] < Prev [SEP] Next >")
    walk(env, "click[< prev]", "click[< prev]")
    asin = env.page.clickables[-1]
    walk(env, f"click[{asin}]", "click[description]", "click[< prev]", "click[< prev]")
    assert (env.page_number, env.product, env.options) == (2, None, {})
    walk(env, "click[back to search]")
    assert (env.page_number, env.keywords, env.where) == (None, None, "search")


def test_a_search_works_everywhere_and_starts_anew():
    env = WebShop(shop(many(12)), split="all")
    env.reset()
    walk(env, "search[lamp]", "click[next >]", "search[number lamp]")
    assert (env.page_number, env.keywords) == (1, ["number", "lamp"])
    walk(env, "click[b000000003]", "click[features]", "search[Lamp  3]")
    assert (env.keywords, env.product, env.where) == (["lamp", "", "3"], None, "results")
    assert env.page.clickables[2] == "b000000003"


@pytest.mark.parametrize(
    ("command", "parsed"),
    [
        ("search[Red Shoes]", ("search", "red shoes")),
        ("click[< Prev] and more", ("click", "< prev")),
        ("search[red [shoes] women]", ("search[red ", "shoes] women")),
        ("search[]", (None, None)),
        ("[x]", (None, None)),
        ("search[[x]", ("search[", "x")),
        ("click[[]", ("click", "[")),
        ("click[a]]", ("click", "a]")),
        ("click[a\nb]", (None, None)),
        ("search", (None, None)),
        ("", (None, None)),
    ],
)
def test_parse(command, parsed):
    assert parse(command) == parsed


def test_parse_is_the_originals_pattern():
    import re

    rng = random.Random(0)
    for _ in range(5000):
        command = "".join(rng.choice("a[]]\n") for _ in range(rng.randrange(9)))
        match = re.match(r"(.+)\[(.+)\]", command)
        assert parse(command) == (match.groups() if match else (None, None)), command


@pytest.mark.parametrize(
    "command",
    ["Click[search]", " click[search]", "click[search]", "click[b000000001]", "go", "search"],
)
def test_other_commands_change_nothing(env, command):
    before, info = env.reset(seed=0)
    assert env.step(command) == (before, 0.0, False, False, info)
    assert not is_admissible(command, info["available_actions"])


def test_what_is_admissible(env):
    assert is_admissible("search[x]", env.reset()[1]["available_actions"])
    *_, info = walk(env, "search[lamp]")
    assert is_admissible("click[B000000001]", info["available_actions"])
    assert all(
        is_admissible(command, info["available_actions"]) for command in info["admissible_commands"]
    )


def test_the_last_option_group_wins_a_shared_value():
    options = {
        "Fit": [{"value": "Men"}, {"value": "Red"}],
        "Style": [{"value": "red"}, {"value": "Buy Now"}],
    }
    env = WebShop(shop([product(customization_options=options)]), split="all")
    env.reset()
    *_, info = walk(env, "search[lamp]", "click[b000000001]", "click[red]")
    assert env.options == {"style": "red"}
    assert info["available_actions"]["clickables"][-2:] == ["men", "red"]
    assert walk(env, "click[buy now]")[2]  # an option that reads like a button is the button


def test_the_info_belongs_to_the_caller(env):
    _, info = env.reset(seed=0)
    info["available_actions"]["clickables"].clear()
    info["admissible_commands"].clear()
    _, again = env.reset(seed=0)
    assert again["admissible_commands"] and again["available_actions"]["clickables"]


def test_text_rich():
    env = WebShop(shop(), split="all", observation="text_rich")
    observation, _ = env.reset()
    text = env.goal["instruction_text"]
    assert observation == f"WebShop\nInstruction: \n{text}\n[button] Search [button_]\n"
    observation, *_ = walk(env, "search[lamp]")
    assert observation == (
        f"Instruction:\n{text}\n[button] Back to Search [button_]\nPage 1 (Total results: 1)\n"
        "[button] Next > [button_]\n"
        "\n[button] B000000001 [button_]\nOak Desk Lamp\n$18.5\n"
    )
    observation, *_ = walk(env, "click[b000000001]", "click[light blue]")
    assert observation.startswith(f"You have clicked light blue.\nInstruction:\n{text}\n")
    assert (
        "\ncolor\n  [clicked button] light blue [clicked button_]\n"
        "  [button] red | white [button_]\n" in observation
    )
    observation, *_ = walk(env, "click[< prev]")
    assert "\n\n[clicked button] B000000001 [clicked button_]\n" in observation


# Buying.


def test_a_full_score_wins_and_ends(env):
    goal = env.goal
    buy = [
        "search[lamp]",
        "click[b000000001]",
        f"click[{goal['goal_options']['color']}]",
        "click[buy now]",
    ]
    observation, reward, terminated, info = walk(env, *buy)
    assert (reward, terminated, info["won"], info["task_score"]) == (10.0, True, True, 1.0)
    parts = info["reward_parts"]
    assert {key: parts[key] for key in ("r_type", "r_att", "r_option", "r_price")} == {
        "r_type": 1.0, "r_att": 1.0, "r_option": 1.0, "r_price": True,
    }  # fmt: skip
    assert info["available_actions"] == {"has_search_bar": False, "clickables": []}
    assert (
        f'asin [SEP] B000000001 [SEP] options [SEP] {{"color": "{goal["goal_options"]["color"]}"}}'
        in observation
    )
    assert observation.endswith(
        "Your score (min 0.0, max 1.0) [SEP] 1.0 [SEP] Reward Details [SEP] None"
    )
    assert env.step("search[lamp]") == (
        observation,
        0.0,
        True,
        False,
        info,
    )  # nothing follows, and nothing pays twice


def test_a_partial_score_does_not_pay(env):
    _, reward, terminated, info = walk(env, "search[lamp]", "click[b000000001]", "click[buy now]")
    assert (reward, terminated, info["won"]) == (0.0, True, False)
    assert info["task_score"] == pytest.approx(2 / 3)
    env.reset()
    assert env.step("search[lamp]")[-1]["task_score"] == 0


def test_options_on_the_last_page_are_written_as_the_original_writes_them():
    options = {"Size": [{"value": '5\' & "é" <b>'}]}
    env = WebShop(shop([product(customization_options=options)]), split="all")
    env.reset()
    observation, *_ = walk(
        env, "search[lamp]", "click[b000000001]", 'click[5\' & "é" <b>]', "click[buy now]"
    )
    assert '{"size": "5\\u0027 \\u0026 \\"\\u00e9\\" \\u003cb\\u003e"}' in observation


def score(goal_changes, options=(), price=10.0, **changes):
    [goal] = [dict(shop([product(customization_options="")]).goals()[0]) | goal_changes]
    bought = shop([product(**changes)])["B000000001"]
    return Reward(PlainNouns())(bought, goal, price, options)


def test_reward_type():
    other = {"query": "sofas", "product_category": "Home › Lighting", "name": "Oak Desk Lamp"}
    assert score(other)[1]["r_type"] == 1.0  # two parts of the path are shared
    elsewhere = other | {"product_category": "Garden › Lighting"}
    assert score(elsewhere)[1]["r_type"] == 1.0  # the titles are alike
    assert (
        score(elsewhere | {"name": "Oak Bed Set Grand Room"})[1]["r_type"] == 0.5
    )  # 1 of 5 is not above 0.2
    eleven = " ".join(["Oak", *("tin cat dog sun hat box cup pen jar map".split())])
    assert score({"name": eleven})[1]["r_type"] == 0.1
    assert score({"name": "Red Bed"}) == (0.0, score({"name": "Red Bed"})[1])
    assert score({"name": "1 2 3"})[1]["title_score"] == 0.2  # no nouns at all
    assert score({"name": "Lamp lamp lamp"})[1]["title_score"] == pytest.approx(
        1 / 3
    )  # repeats stay in the divisor


def test_reward_attributes():
    assert (
        score({"attributes": ["dimmable lamp"]})[1]["r_att"] == 1
    )  # one token set holds the other
    assert score({"attributes": ["warm light"]})[1]["r_att"] == 1  # in a bullet
    assert score({"attributes": ["lamp of"]})[1]["r_att"] == 1  # in the description
    assert (
        score({"attributes": ["Warm Light"]})[1]["r_att"] == 0
    )  # literally, and texts are in lower case
    assert score({"attributes": ["warm light", "sturdy"]})[1]["r_att"] == 0.5


@pytest.mark.parametrize(
    ("wanted", "chosen", "matches"),
    [
        (
            {"color": "light blue"},
            ["navy blue"],
            True,
        ),  # chosen becomes "blue", found in "color light blue"
        ({"color": "blue"}, ["navy blue"], True),
        ({"color": "navy"}, ["navy blue"], False),  # "blue" comes first in the list
        (["dark blue"], ["blue"], True),
        ({"size": "7.5"}, ["7"], True),  # "7" is one of the words "size 7 5"
        ({"size": "large"}, ["small", "large"], True),
        ({"size": "large"}, [], False),
    ],
)
def test_reward_options(wanted, chosen, matches):
    assert score({"goal_options": wanted}, chosen)[1]["r_option"] == matches


def test_reward_price_and_weights():
    total, parts = score({"goal_options": {"size": "s"}, "price_upper": 9.5})
    assert (parts["r_price"], parts["w_att"], parts["w_option"], parts["w_price"]) == (
        False,
        1 / 3,
        1 / 3,
        1 / 3,
    )
    assert total == pytest.approx(1 / 3)
    assert "r_option" not in score({"goal_options": {}})[1]


def test_nouns():
    assert PlainNouns()("Women's T-Shirts for the Garden, 2XL (Blue)") == [
        "women",
        "t",
        "shirts",
        "garden",
        "blue",
    ]
    assert find_nouns("plain").name in str(WebShop(shop(), split="all").provenance["nouns"])
    assert WebShop(shop(nouns=str.split), split="all").provenance["nouns"] == "split"
    with pytest.raises(ValueError, match="nouns: 'nltk' is none of"):
        find_nouns("nltk")


def test_spacy_nouns():
    pytest.importorskip("spacy", reason="spaCy is not installed")
    try:
        nouns = find_nouns("spacy")
    except ImportError as error:
        pytest.skip(str(error))
    assert "lamp" in nouns("An oak lamp to look at") and "look" not in nouns(
        "An oak lamp to look at"
    )
    assert find_nouns("auto").name == nouns.name


# Goals.


def test_synthetic_goals():
    options = {
        "Size": [{"value": "s"}, {"value": "l"}],
        "Color": [{"value": "red"}, {"value": "blue"}],
    }
    items = [
        product(customization_options=options),
        product("B2", pricing="$989.00 to $991", customization_options=""),
    ]
    catalogue = shop(items, {"B000000001": asked("a", "b"), "B2": asked("b")}, prices={"B2": 990.0})
    goals = catalogue.goals()
    assert [goal["goal_options"] for goal in goals] == [
        *[{"color": color, "size": size} for color in ("red", "blue") for size in ("s", "l")],
        {},
    ]
    assert list(goals[0]["goal_options"]) == ["color", "size"]
    assert goals[1]["instruction_text"].startswith(
        "Find me desk lamps with color: red, and size: l, and price lower than "
    )
    assert (
        goals[0]["price_upper"] in (30, 40, 50)
        and goals[0]["price_upper"] == goals[3]["price_upper"]
    )
    assert goals[0]["weight"] == (1 / 4 + 1 / 5) / 2
    assert (goals[-1]["instruction_text"], goals[-1]["price_upper"]) == (
        "Find me desk lamps",
        1000000,
    )
    with pytest.raises(IndexError):
        goals[5]


def test_human_goals():
    human = {
        "B000000001": [
            {
                "instruction": "a lamp.",
                "instruction_attributes": ["dimmable"],
                "instruction_options": ["red"],
            },
            {"instruction": "any", "instruction_attributes": [], "instruction_options": []},
        ]
    }
    env = WebShop(shop(human=human), split="all", goals="human")
    _, info = env.reset()
    assert info["task"].startswith("a lamp, and price lower than ")
    assert (env.goal["goal_options"], env.goal["weight"], len(env.panel)) == (["red"], 1, 1)
    *_, info = walk(
        env, "search[lamp]", "click[b000000001]", "click[red | white]", "click[buy now]"
    )
    assert info["won"] and env.reachable


def test_seed_and_prices():
    items = [product(f"B{i:09d}", pricing="$10.00 - $50.00") for i in range(5)]
    one, other = shop(items, seed=1), shop(items, seed=2)
    assert one.prices.tolist() == shop(items, seed=1).prices.tolist() != other.prices.tolist()
    fixed = shop(items, seed=1, prices={"B000000003": 12.5})
    assert (
        fixed["B000000003"].price == 12.5 and fixed["B000000004"].price == one["B000000004"].price
    )
    assert fixed["B000000003"].price_tag == "$10.0 to $50.0"
    with pytest.raises(ValueError, match="prices: there is no product 'X'"):
        shop(items, prices={"X": 1.0})
    with pytest.raises(ValueError, match="prices: B000000003: expected a price"):
        shop(items, prices={"B000000003": "12"})


def test_reachable():
    catalogue = shop(attributes={"B000000001": asked("not there")})
    goal = catalogue.goals()[0]
    assert not catalogue.reachable(goal | {"attributes": ["sturdy"]}) and catalogue.reachable(goal)
    assert not catalogue.reachable(goal | {"price_upper": 1.0})
    env = WebShop(catalogue, split="all")
    env.reset(options={"goal": goal | {"attributes": ["sturdy"]}})
    assert not env.reachable


def test_small_shops_are_split_in_quarters():
    goals = shop(many(100)).goals()
    parts = [goals.split(name).tolist() for name in ("test", "validation", "train")]
    assert [len(part) for part in parts] == [25, 25, 50] and len(set().union(*parts)) == 100
    assert sum(parts, []) == goals.split("all").tolist()
    with pytest.raises(ValueError, match="split: there is no 'test' goal"):
        WebShop(shop(), split="test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attributes": []}, "'attributes' is empty"),
        ({"attributes": [1]}, "'attributes' must hold texts only"),
        ({"goal_options": "red"}, "'goal_options' is str"),
        ({"goal_options": {"a": None}}, "'goal_options' must hold texts only"),
        ({"price_upper": None}, "'price_upper' is NoneType"),
        ({"query": 3}, "'query' is int"),
    ],
)
def test_bad_goals(env, change, message):
    with pytest.raises(ValueError, match=message):
        env.reset(options={"goal": env.goal | change})


def test_errors(env):
    with pytest.raises(ValueError, match="goal: 'query' is missing"):
        env.reset(options={"goal": {}})
    with pytest.raises(ValueError, match="goal: expected a dict"):
        env.reset(options={"goal": "lamp"})
    with pytest.raises(ValueError, match="unknown reset option 'game'"):
        env.reset(options={"game": 1})
    with pytest.raises(TypeError, match="command: expected str, got bytes"):
        env.step(b"search[lamp]")
    with pytest.raises(RuntimeError, match="call reset first"):
        WebShop(shop(), split="all").step("search[lamp]")
    for option in (
        {"split": "dev"},
        {"split_by": "asin"},
        {"goals": "robot"},
        {"observation": "html"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: .* is none of"):
            WebShop(shop(), **{"split": "all", **option})


def test_make_names_what_is_missing(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="there is no items_shuffle_1000.json"):
        make("webshop", data=tmp_path)
    monkeypatch.setenv("WEBSHOP_DATA", str(tmp_path / "away"))
    with pytest.raises(ValueError, match="there is no such folder"):
        make("webshop")


# Whatever a policy may write.


def test_fuzzed_commands():
    rng = random.Random(0)
    env = WebShop(shop(many(12)), split="all", observation="text_rich")
    alphabet = [
        "[",
        "]",
        "click",
        "search",
        "lamp",
        "< prev",
        "\ud800",
        "é",
        "🙂",
        "\x00",
        "\n",
        " ",
        "'",
        '"',
        "\u202e",
        "ß",
        "İ",
    ]
    for episode in range(20):
        env.reset(seed=episode)
        for _ in range(40):
            known = rng.choice(
                ["search[lamp]", *(f"click[{c}]" for c in env.page.clickables if c != "buy now")]
            )
            command = rng.choice(
                [
                    known,
                    "".join(rng.choices(alphabet, k=rng.randrange(12))),
                    f"search[{rng.choice(alphabet)}]",
                ]
            )
            before, options = env.page, dict(env.options)
            observation, reward, terminated, _, info = env.step(command)
            assert (reward, terminated, info["won"]) == (0.0, False, False) and observation
            if not is_admissible(command, {"clickables": before.clickables}):
                assert env.page is before and env.options == options


@pytest.mark.parametrize(
    "command",
    [
        "[" * 200_000, "]" * 200_000, "[]" * 100_000, "search[" * 50_000,
        "search[" + "[" * 100_000 + "]",
        f"search[{'lamp ' * 20_000}]", f"search[{'x' * 200_000}]", f"click[{'a' * 200_000}]",
        bytes(range(256)).decode("latin-1") * 100,
        f"search[{bytes(range(256)).decode('utf-8', 'surrogateescape')}]",
    ],
    ids=range(10),
)  # fmt: skip
@pytest.mark.timeout(60)
def test_huge_commands(env, command):
    observation, reward, terminated, truncated, _ = env.step(command)
    assert observation and not (reward or terminated or truncated)
