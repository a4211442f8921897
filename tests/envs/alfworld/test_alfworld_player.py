"""The scripted players, straight against the environment."""

import random
import re
from types import SimpleNamespace

import pytest

from hiper_fast.envs.alfworld.player import Searcher, Walkthrough, assign_subgoals, make_player
from hiper_fast.envs.alfworld.prompts import strip_opening
from hiper_fast.envs.household import Household, subgoal_phrases
from hiper_fast.envs.player import Move

GAMES = range(1000, 1060)


def play(env, kind, seed, turns):
    """(won, moves) of one game played by a scripted player."""
    observation, info = env.reset(seed=seed)
    expert, action, moves = make_player(kind, env.game, random.Random(seed)), None, []
    observation = strip_opening(observation)
    for _ in range(turns):
        commands = info["admissible_commands"]
        expert.observe(action, observation, commands)
        move = expert.move(commands)
        moves.append(move)
        assert move.action in commands, f"game {seed}: {move.action!r} is not admissible"
        action = move.action
        observation, _, over, _, info = env.step(action)
        if over:
            return info["won"], moves
    return False, moves


def test_searcher_wins_small_games_from_the_text_alone():
    env = Household("small")
    results = [play(env, "search", seed, 30) for seed in GAMES]
    assert sum(won for won, _ in results) >= 0.9 * len(results)


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_walkthrough_wins_every_game(size):
    env = Household(size)
    for seed in list(GAMES)[: 60 if size == "small" else 12]:
        won, moves = play(env, "walkthrough", seed, 1000)
        assert won and [m.action for m in moves] == env.content["walkthrough"]
        assert [m.subgoal for m in moves] == env.content["subgoals"]


def test_searcher_wins_larger_rooms_too_given_time():
    env = Household("medium")
    results = [play(env, "search", seed, 80) for seed in list(GAMES)[:12]]
    assert sum(won for won, _ in results) >= 10


def test_searcher_names_the_goals_own_subgoals_in_order():
    env = Household("small")
    for seed in list(GAMES)[:20]:
        won, moves = play(env, "search", seed, 60)
        phrases = list(subgoal_phrases(env.game.goal).values())
        assert {m.subgoal for m in moves} <= set(phrases)
        assert not won or moves[-1].subgoal == phrases[-1]


def test_searcher_looks_where_the_thing_shall_go_last_of_all():
    env = Household("small", ["pick_and_place_simple"])
    env.reset(seed=3)
    kind = env.game.goal.receptacle_type
    commands = [f"go to {kind} 1", f"go to {kind} 2", "go to zebra 1", "look"]
    searcher, visited = make_player("listed", env.game, random.Random(0)), []
    searcher.observe(None, "", commands)
    for _ in range(3):
        visited.append(searcher.move(commands).action)
        place = visited[-1].removeprefix("go to ")
        searcher.observe(
            visited[-1], f"You arrive at {place}. On the {place}, you see nothing.", commands
        )
    assert visited == ["go to zebra 1", f"go to {kind} 1", f"go to {kind} 2"]


def test_searcher_goes_in_an_order_of_its_own_for_every_random_state():
    env = Household("small")
    env.reset(seed=3)
    commands = [f"go to shelf {number}" for number in range(1, 5)]

    def see_order(kind, seed):
        searcher = make_player(kind, env.game, random.Random(seed))
        searcher.observe(None, "", commands)
        return tuple(searcher.unexplored)

    assert len({see_order("search", seed) for seed in range(60)}) > 15  # of 24
    assert {see_order("listed", seed) for seed in range(9)} == {tuple(c[6:] for c in commands)}


def test_searcher_does_the_same_for_the_same_random_state():
    env = Household("small")
    assert play(env, "search", 7, 40) == play(env, "search", 7, 40)


@pytest.mark.parametrize("kinds", [("go to ",), ("",)], ids=["sent elsewhere", "any command"])
def test_searcher_recovers_from_what_it_did_not_choose(kinds):
    """The warm start makes it stumble on a share of the turns."""
    env, rng, won = Household("small"), random.Random(0), 0
    for seed in list(GAMES)[:30]:
        observation, info = env.reset(seed=seed)
        expert, action, observation = (
            make_player("search", env.game, random.Random(seed)),
            None,
            strip_opening(observation),
        )
        for _ in range(60):
            commands = info["admissible_commands"]
            expert.observe(action, observation, commands)
            action = expert.move(commands).action
            assert action in commands
            others = [c for c in commands if c.startswith(kinds)]
            if others and rng.random() < 0.15:
                action = rng.choice(others)
            observation, _, over, _, info = env.step(action)
            if over:
                won += info["won"]
                break
    assert won >= 26


def test_stumbles_are_random_commands_and_never_ask_for_help():
    env, rng = Household("small"), random.Random(0)
    env.reset(seed=3)
    searcher = make_player("search", env.game, rng)
    right = Move(searcher.phrases["find"], "take pen 2 from sidetable 2")
    seen = [searcher.stumble(right, ["go to desk 1", "look", "help"], rng) for _ in range(200)]
    assert {m.subgoal for m in seen} == set(searcher.phrases.values())
    assert {m.action for m in seen} == {*(f"go to desk {n}" for n in range(1, 5)), "look"}


def test_searcher_puts_down_what_it_took_by_mistake():
    """It once walked to and fro between two places for ever."""
    env, won, mistakes = Household("small"), 0, 0
    for seed in list(GAMES)[:30]:
        observation, info = env.reset(seed=seed)
        expert, action = make_player("search", env.game, random.Random(seed)), None
        observation, mistaken = strip_opening(observation), False
        for _ in range(60):
            commands = info["admissible_commands"]
            expert.observe(action, observation, commands)
            action = expert.move(commands).action
            wrong = [c for c in commands if re.match(rf"take (?!{env.game.goal.object_type} )", c)]
            if wrong and not mistaken:
                action, mistaken, mistakes = wrong[0], True, mistakes + 1
            observation, _, over, _, info = env.step(action)
            if over:
                won += info["won"]
                break
    assert mistakes > 20 and won >= 28


def test_searcher_with_two_lamps_uses_the_one_that_is_here():
    searcher = Searcher(goal("book", lamp_type="desklamp"), random.Random(0))
    places = [f"go to {r}" for r in ("desk 1", "shelf 1", "bed 1")]
    searcher.observe(None, "", places)
    for place, text in (
        ("desk 1", "a desklamp 1"),
        ("shelf 1", "a desklamp 2"),
        ("bed 1", "a book 1"),
    ):
        searcher.observe(f"go to {place}", f"On the {place}, you see {text}.", places)
    take = "take book 1 from bed 1"
    assert searcher.move([*places, take]).action == take
    searcher.observe(take, "You pick up the book 1 from the bed 1.", places)
    action = searcher.move(places).action
    here, number = (
        action.removeprefix("go to "),
        {"desk 1": 1, "shelf 1": 2}[action.removeprefix("go to ")],
    )
    searcher.observe(action, f"On the {here}, you see a desklamp {number}.", places)
    assert searcher.move([*places, f"use desklamp {number}"]).action == f"use desklamp {number}"


def test_player_kinds():
    env = Household("small")
    env.reset(seed=0)
    assert isinstance(make_player("search", env.game, random.Random(0)), Searcher)
    assert isinstance(make_player("walkthrough", env.game, random.Random(0)), Walkthrough)


# Subgoals of a walkthrough.


def goal(object_type, receptacle_type=None, state=None, lamp_type=None, count=1):
    return SimpleNamespace(
        object_type=object_type,
        receptacle_type=receptacle_type,
        state=state,
        lamp_type=lamp_type,
        count=count,
    )


def test_lamp_before_the_object():
    """An order that official games have: every step still serves what comes next."""
    steps = ["go to dresser 1", "use desklamp 1", "take alarmclock 2 from dresser 1"]
    subgoals = assign_subgoals(goal("alarmclock", lamp_type="desklamp"), steps)
    assert subgoals == ["use desklamp", "use desklamp", "take alarmclock"]


def test_two_objects():
    steps = [
        *("go to shelf 1", "take mug 1 from shelf 1", "go to desk 1", "move mug 1 to desk 1"),
        *(
            "go to shelf 2",
            "open shelf 2",
            "take mug 2 from shelf 2",
            "go to desk 1",
            "move mug 2 to desk 1",
        ),
    ]
    assert assign_subgoals(goal("mug", "desk", count=2), steps) == [
        *("find mug", "take mug", "put mug in desk", "put mug in desk"),
        *("find second mug", "find second mug", "take second mug"),
        *("put second mug in desk", "put second mug in desk"),
    ]


def test_changed_state_with_steps_after_the_last_milestone():
    steps = [
        "take egg 1 from shelf 1",
        "go to fridge 1",
        "cool egg 1 with fridge 1",
        "move egg 1 to sink 1",
        "look",
    ]
    subgoals = assign_subgoals(goal("egg", "sink", state="cool"), steps)
    assert subgoals == ["take egg", "cool egg", "cool egg", "put egg in sink", "put egg in sink"]


@pytest.mark.parametrize("steps", [[], ["look"], ["look", "go to desk 1"]])
def test_walkthroughs_without_milestones(steps):
    assert assign_subgoals(goal("mug", "desk"), steps) == ["None"] * len(steps)


def test_official_walkthroughs_have_a_subgoal_for_every_step(data_dir):
    import json
    import tarfile

    from hiper_fast.envs.alfworld import Game

    seen = 0
    with tarfile.open(data_dir / "alfworld" / "valid_seen.tar.xz") as archive:
        for member in archive:
            if not member.name.endswith("game.tw-pddl"):
                continue
            game = Game.from_dict(json.load(archive.extractfile(member)), name=member.name)
            subgoals = assign_subgoals(game.goal, game.walkthrough)
            assert len(subgoals) == len(game.walkthrough)
            assert set(subgoals) <= set(subgoal_phrases(game.goal).values())
            seen += 1
            if seen == 25:
                break
    assert seen == 25
