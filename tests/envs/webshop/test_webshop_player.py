"""The scripted player of WebShop against the environment, and what it reads in an instruction."""

import math
import random

import pytest

from hiper_fast.envs import webshop
from hiper_fast.envs.player import Move
from hiper_fast.envs.webshop.pages import SEARCH_COMMAND
from hiper_fast.envs.webshop.player import PHRASES, Shopper, Wish, read_dollars


@pytest.fixture(scope="module")
def env():
    return webshop.WebShop(
        webshop.Catalogue.from_items(*webshop.generate(), name="generated"), "test"
    )


def play(env, goal, turns=15, disturb=None):
    """(info, moves) of one episode."""
    observation, info = env.reset(options={"goal": goal})
    shopper, action, moves = Shopper(info["task"]), None, []
    for turn in range(turns):
        commands = info["admissible_commands"]
        shopper.observe(action, observation, commands)
        move = shopper.move(commands)
        moves.append(move)
        assert move.action in commands or (
            SEARCH_COMMAND in commands and move.action.startswith("search[")
        )
        action = disturb(turn, commands, move) if disturb else move.action
        observation, _, over, _, info = env.step(action)
        if over:
            break
    return info, moves


# The instruction.


def test_a_whole_instruction():
    text = "Find me slim fit shirts with long sleeve for daily wear"
    wish = Wish(f"{text} with color: red, and size: x-large, and price lower than 40.00 dollars")
    assert wish.words == ["slim", "fit", "shirts", "long", "sleeve", "daily", "wear"]
    assert wish.options == {"color": "red", "size": "x-large"} and wish.limit == 40
    assert wish.request == "slim fit shirts with long sleeve for daily wear"


@pytest.mark.parametrize(
    "text, words, options, limit",
    [
        ("Find me desks", ["desks"], {}, math.inf),
        ("Find me desks, and price lower than 1000.00 dollars", ["desks"], {}, 1000),
        ("Find me desks with size: 5 x 7, and a b: c and d", ["desks"],
         {"size": "5 x 7", "a b": "c and d"}, math.inf),
        ("i need a gluten free bar, and price lower than 20.00 dollars",
         ["gluten", "free", "bar"], {}, 20),
        ("", [], {}, math.inf),
        ("with : , and price lower than dollars",
         ["price", "lower", "than", "dollars"], {}, math.inf),
    ],
)  # fmt: skip
def test_instructions(text, words, options, limit):
    wish = Wish(text)
    assert (wish.words, wish.options, wish.limit) == (words, options, limit)


def test_the_options_of_every_goal_are_read(env):
    goals = env.catalogue.goals("synthetic")
    for index in range(0, len(goals), 37):
        wish = Wish(goals[index]["instruction_text"])
        assert (
            wish.options == goals[index]["goal_options"]
            and wish.limit == goals[index]["price_upper"]
        )


def test_official_instructions_are_read(data_dir, tmp_path):
    catalogue = webshop.Catalogue.load(data_dir / "webshop", cache=tmp_path)
    goals = catalogue.goals("synthetic")
    read = [
        Wish(goals[i]["instruction_text"]).options == goals[i]["goal_options"]
        for i in range(0, len(goals), 23)
    ]
    assert sum(read) > 0.9 * len(read)


def test_prices():
    assert (
        read_dollars("$18.49") == 18.49
        and read_dollars("Price: $3.0 to $10.99") == 10.99
        and read_dollars("free") == math.inf
    )


# The episode.


def test_it_buys_what_was_asked_for(env):
    results = [play(env, goal) for goal in env.panel[:60]]
    assert sum(info["won"] for info, _ in results) >= 57
    for info, moves in results:
        subgoals = [move.subgoal for move in moves]
        assert subgoals[0] == PHRASES["search"] and subgoals[1] == PHRASES["choose"]
        assert set(subgoals) <= set(PHRASES.values())
        assert not info["won"] or moves[-1].action == "click[buy now]"


def test_it_leaves_a_product_that_lacks_an_option(env):
    """Some goals need a second look at the results."""
    back = [
        moves
        for _, moves in (play(env, goal) for goal in env.panel[:60])
        if any(m.action == "click[< prev]" for m in moves)
    ]
    assert back
    for moves in back:
        opened = [
            m.action
            for m in moves
            if m.subgoal == PHRASES["choose"] and m.action != "click[< prev]"
        ]
        assert len(opened) == len(set(opened)), "none twice"


def test_it_recovers_from_mistakes(env):
    rng, won = random.Random(0), 0
    for goal in env.panel[:40]:
        shopper = Shopper(goal["instruction_text"])

        def disturb(turn, commands, move, shopper=shopper):
            return (
                shopper.stumble(move, commands, rng).action if rng.random() < 0.2 else move.action
            )

        won += play(env, goal, 30, disturb)[0]["won"]
    assert won >= 36


def test_stumbles_never_buy(env):
    rng, shopper = random.Random(0), Shopper("Find me")
    env.reset(seed=0)
    info = env.step("search[tea]")[-1]
    info = env.step(info["admissible_commands"][-1])[-1]
    commands = [*info["admissible_commands"], SEARCH_COMMAND]
    move = Move(PHRASES["buy"], "click[buy now]")
    actions = {shopper.stumble(move, commands, rng).action for _ in range(300)}
    assert (
        "click[buy now]" not in actions
        and SEARCH_COMMAND not in actions
        and "click[reviews]" in actions
    )
    assert any(action.startswith("search[") for action in actions)


def test_an_empty_page_of_results_is_left(env):
    env.reset(options={"goal": env.panel[0]})
    env.step("search[zzzzz]")
    observation, *_, info = env.step("click[next >]")
    shopper = Shopper(info["task"])
    shopper.observe("click[next >]", observation, info["admissible_commands"])
    assert shopper.move(info["admissible_commands"]).action == "click[back to search]"
