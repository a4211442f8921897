"""The ALFWorld engine: a tiny game by hand, recordings of the real engine, and bad files."""

import json
import lzma
import pickle
import random
import tarfile
import time

import pytest

from hiper_fast import envs
from hiper_fast.envs.alfworld import TASK_TYPES, AlfWorld, Game, GameError, Goal, games
from hiper_fast.envs.base import Environment

TINY_OBJECTS = """
    agent1 - agent
    start desk_place counter_place fridge_place - location
    Cabinet_bar_1 CounterTop_bar_1 Sink_bar_1_bar_SinkBasin Microwave_bar_1 Fridge_bar_1 -
    receptacle
    Desk_bar_1 - receptacle
    Mug_bar_1 Spoon_bar_1 Knife_bar_1 Bread_bar_1 SoapBar_bar_1 SoapBar_bar_2 DeskLamp_bar_1
    Statue - object
    MugType SpoonType KnifeType BreadType SoapBarType DeskLampType - otype
    CabinetType CounterTopType SinkBasinType MicrowaveType FridgeType DeskType - rtype
"""
TINY_INIT = """
    (atLocation agent1 start) (= (total-cost) 0) ; no receptacle at the start
    (receptacleType Cabinet_bar_1 CabinetType) (receptacleAtLocation Cabinet_bar_1 desk_place)
    (receptacleType Desk_bar_1 DeskType) (receptacleAtLocation Desk_bar_1 desk_place)
    (receptacleType CounterTop_bar_1 CounterTopType)
    (receptacleAtLocation CounterTop_bar_1 counter_place)
    (receptacleType Sink_bar_1_bar_SinkBasin SinkBasinType)
    (receptacleAtLocation Sink_bar_1_bar_SinkBasin counter_place)
    (receptacleType Microwave_bar_1 MicrowaveType)
    (receptacleAtLocation Microwave_bar_1 fridge_place)
    (receptacleType Fridge_bar_1 FridgeType) (receptacleAtLocation Fridge_bar_1 fridge_place)
    (openable Cabinet_bar_1) (openable Microwave_bar_1) (openable Fridge_bar_1)
    (canContain CounterTopType MugType) (canContain SinkBasinType MugType)
    (canContain FridgeType MugType)
    (canContain CabinetType MugType) (canContain CounterTopType BreadType)
    (canContain DeskType BreadType)
    (canContain CabinetType SoapBarType) (canContain CounterTopType KnifeType)
    (objectType Mug_bar_1 MugType) (objectType Spoon_bar_1 SpoonType)
    (objectType Knife_bar_1 KnifeType)
    (objectType Bread_bar_1 BreadType) (objectType DeskLamp_bar_1 DeskLampType)
    (objectType SoapBar_bar_1 SoapBarType) (objectType SoapBar_bar_2 SoapBarType)
    (pickupable Mug_bar_1) (pickupable Knife_bar_1) (pickupable Bread_bar_1)
    (pickupable SoapBar_bar_1) (pickupable SoapBar_bar_2)
    (isReceptacleObject Mug_bar_1) (inReceptacleObject Spoon_bar_1 Mug_bar_1)
    (cleanable Mug_bar_1) (heatable Mug_bar_1) (coolable Mug_bar_1)
    (heatable Bread_bar_1) (coolable Bread_bar_1) (cleanable Bread_bar_1) (sliceable Bread_bar_1)
    (toggleable DeskLamp_bar_1)
    (inReceptacle Mug_bar_1 CounterTop_bar_1) (objectAtLocation Mug_bar_1 counter_place)
    (inReceptacle Bread_bar_1 CounterTop_bar_1) (objectAtLocation Bread_bar_1 counter_place)
    (inReceptacle Knife_bar_1 CounterTop_bar_1) (objectAtLocation Knife_bar_1 counter_place)
    (inReceptacle SoapBar_bar_1 Sink_bar_1_bar_SinkBasin)
    (objectAtLocation SoapBar_bar_1 counter_place)
    (inReceptacle SoapBar_bar_2 Sink_bar_1_bar_SinkBasin)
    (objectAtLocation SoapBar_bar_2 counter_place)
    (inReceptacle DeskLamp_bar_1 Cabinet_bar_1) (objectAtLocation DeskLamp_bar_1 desk_place)
"""
MUG_IN_FRIDGE = """(exists (?r - receptacle) (exists (?o - object)
    (and (inReceptacle ?o ?r) (objectType ?o MugType) (receptacleType ?r FridgeType))))"""
GET_MUG = ["go to countertop 1", "take mug 1 from countertop 1"]
PUT_IN_FRIDGE = ["go to fridge 1", "open fridge 1", "move mug 1 to fridge 1"]


def tiny(goal=MUG_IN_FRIDGE, init=TINY_INIT, objects=TINY_OBJECTS, **changes):
    return {
        "pddl_domain": "(define (domain alfred) (:requirements :adl))",
        "grammar": '"rhs": "Your task is to: put a mug in fridge."',
        "pddl_problem": f"(define (problem tiny) (:domain alfred)(:objects {objects}) "
        f"(:init {init}) (:goal {goal}))",
        "solvable": True,
        "walkthrough": GET_MUG + PUT_IN_FRIDGE,
    } | changes


def play(env, commands):
    """The texts of the commands; every one of them must be admissible."""
    texts = []
    for command in commands:
        text, *_ = env.step(command)
        assert text != "Nothing happens.", command
        texts.append(text)
    return texts


def test_start_text_and_commands():
    env = AlfWorld(tiny())
    text, info = env.reset()
    assert text == (
        "-= Welcome to TextWorld, ALFRED! =-\n\n"
        "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, "
        "a countertop 1, a desk 1, a fridge 1, a microwave 1, and a sinkbasin 1.\n\n"
        "Your task is to: put a mug in fridge."
    )
    assert info == {
        "admissible_commands": [
            "go to cabinet 1",
            "go to countertop 1",
            "go to desk 1",
            "go to fridge 1",
            "go to microwave 1",
            "go to sinkbasin 1",
            "help",
            "inventory",
            "look",
        ],
        "won": False,
        "task": "put a mug in fridge.",
        "task_type": "pick_and_place_simple",
    }
    assert isinstance(env, Environment)


def test_walkthrough_is_won_and_pays_once():
    env = AlfWorld(tiny())
    env.reset()
    for command in GET_MUG + PUT_IN_FRIDGE[:-1]:
        assert env.step(command)[1:4] == (0.0, False, False)
    text, reward, terminated, truncated, info = env.step(PUT_IN_FRIDGE[-1])
    assert (text, reward, terminated, truncated) == (
        "You move the mug 1 to the fridge 1.",
        10.0,
        True,
        False,
    )
    assert info["won"] and "take mug 1 from fridge 1" in info["admissible_commands"]
    assert env.step("look")[1:3] == (0.0, True)  # the reward is for the winning step alone
    text, info = env.reset()
    assert not info["won"] and env.step("inventory")[0] == "You are not carrying anything."


def test_texts_of_every_command():
    env = AlfWorld(tiny())
    env.reset()
    assert play(env, ["look"]) == [
        "You are in the middle of a room. Looking quickly around you, you see nothing."
    ]
    assert play(
        env, ["go to countertop 1", "take mug 1 from countertop 1", "examine mug 1", "inventory"]
    ) == [
        "You arrive at countertop 1. "
        "On the countertop 1, you see a bread 1, a knife 1, and a mug 1.",
        "You pick up the mug 1 from the countertop 1.",
        "This is a normal mug 1. In it, you see a spoon 1.",
        "You are carrying: a mug 1.",
    ]
    assert play(
        env, ["look", "clean mug 1 with sinkbasin 1", "move mug 1 to sinkbasin 1", "look"]
    ) == [
        "You are facing the countertop 1, and sinkbasin 1. Next to it, you see nothing.",
        "You clean the mug 1 using the sinkbasin 1.",
        "You move the mug 1 to the sinkbasin 1.",
        "You are facing the countertop 1, and sinkbasin 1. Next to it, you see a mug 1.",
    ]
    assert play(
        env, ["examine sinkbasin 1", "go to cabinet 1", "use desklamp 1", "open cabinet 1"]
    ) == [
        "On the sinkbasin 1, you see a mug 1, a soapbar 2, and a soapbar 1.",
        "You arrive at cabinet 1. The cabinet 1 is closed.",
        "You turn on the desklamp 1.",
        "You open the cabinet 1. The cabinet 1 is open. In it, you see a desklamp 1.",
    ]
    assert play(env, ["use desklamp 1", "close cabinet 1", "examine cabinet 1"]) == [
        "You turn on the desklamp 1.",
        "You close the cabinet 1.",
        "The cabinet 1 is closed.",
    ]
    (help_text,) = play(env, ["help"])
    assert help_text.startswith("Available commands:\n  look:") and help_text.endswith(
        "sharp object\n"
    )


@pytest.mark.parametrize(
    "commands, text",
    [
        ([], "There's nothing special about bread 1."),
        (["heat"], "This is a hot bread 1."),
        (["cool"], "This is a cold bread 1."),
        (["clean"], "This is a clean bread 1."),
        (["heat", "cool"], "This is a cold bread 1."),
        (["cool", "clean", "heat"], "This is a hot and clean bread 1."),
        (["clean", "cool"], "This is a cool and clean bread 1."),
        (["slice"], "This is a sliced bread 1."),
        (["slice", "heat"], "This is a hot sliced bread 1."),
        (["slice", "cool"], "This is a cool sliced bread 1."),
        (["slice", "clean"], "This is a clean sliced bread 1."),
        (["slice", "clean", "heat"], "This is a hot and clean sliced bread 1."),
        (["slice", "cool", "clean"], "This is a cool and clean sliced bread 1."),
    ],
)
def test_examining_shows_what_was_done(commands, text):
    env = AlfWorld(tiny())
    env.reset()
    play(env, ["go to countertop 1"])
    if "slice" in commands:
        knife = [
            "take knife 1 from countertop 1",
            "slice bread 1 with knife 1",
            "move knife 1 to countertop 1",
        ]
        assert play(env, knife)[1] == "You sliced the bread 1 with the knife 1."
    play(env, ["take bread 1 from countertop 1"])
    appliances = {"heat": "microwave 1", "cool": "fridge 1", "clean": "sinkbasin 1"}
    for verb in commands:
        if verb != "slice":
            go = f"go to {appliances[verb]}"
            env.step(go)
            done = play(
                env, [f"{verb} bread 1 with {appliances[verb]}"]
            )  # closed appliances work too
            assert done == [f"You {verb} the bread 1 using the {appliances[verb]}."]
    assert play(env, ["examine bread 1"]) == [text]


@pytest.mark.parametrize(
    "command",
    [
        "",
        " ",
        "Look",
        "LOOK",
        "look around",
        "go",
        "go to",
        "go to moon 1",
        "go to  desk 1",
        "take mug 1",
        "take",
        "use",
    ]
    + [
        "examine mug 1",
        "heat mug 1 with microwave 1",
        "move mug 1 to fridge 1",
        "look\nlook",
        "\x00",
        "é" * 9999,
    ],
)
def test_inadmissible_commands_do_nothing(command):
    env = AlfWorld(tiny())
    _, before = env.reset()
    text, reward, terminated, truncated, info = env.step(command)
    assert (text, reward, terminated, truncated) == ("Nothing happens.", 0.0, False, False)
    assert info == before


def test_commands_are_stripped():
    env = AlfWorld(tiny())
    env.reset()
    assert play(env, ["  go to desk 1\n"]) == [
        "You arrive at desk 1. On the desk 1, you see nothing."
    ]


def test_an_object_in_two_receptacles_keeps_the_other():
    env = AlfWorld(tiny(init=TINY_INIT + "(inReceptacle Mug_bar_1 Sink_bar_1_bar_SinkBasin)"))
    env.reset()
    play(env, GET_MUG)
    assert play(env, ["examine sinkbasin 1"]) == [
        "On the sinkbasin 1, you see a mug 1, a soapbar 2, and a soapbar 1."
    ]
    play(
        env,
        ["move mug 1 to sinkbasin 1", "take mug 1 from sinkbasin 1", "move mug 1 to countertop 1"],
    )
    assert play(env, ["look"])[0].endswith("Next to it, you see a mug 1.")


def test_environments_share_a_game_but_no_state():
    game = Game.from_dict(tiny())
    first, second = AlfWorld(game), AlfWorld(game)
    first.reset()
    _, info = second.reset()
    info["admissible_commands"].clear()
    play(first, GET_MUG + PUT_IN_FRIDGE)
    text, *_, info = second.step("go to countertop 1")
    assert "mug 1" in text and not info["won"]
    assert first.game is second.game
    copy = pickle.loads(pickle.dumps(game))
    third = AlfWorld(copy)
    third.reset()
    play(third, GET_MUG + PUT_IN_FRIDGE)
    assert third.step("look")[-1]["won"]


def test_reset_switches_games_and_refuses_unknown_options():
    env = AlfWorld(tiny())
    _, info = env.reset(options={"game": tiny(grammar="Your task is to: rest.")}, seed=3)
    assert info["task"] == "rest."
    assert env.reset()[1]["task"] == "rest."
    with pytest.raises(ValueError, match="unknown reset option 'games'"):
        env.reset(options={"games": 1})
    with pytest.raises(TypeError, match="game must be"):
        AlfWorld(3)


LAMP = """(and (exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and
    (objectType ?ot DeskLampType) (toggleable ?ot) (isToggled ?ot)
    (receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r)))
    (exists (?o - object ?a - agent) (and (objectType ?o MugType) (holds ?a ?o))))"""
TWO = """(exists (?r - receptacle) (exists (?o1 - object) (and (objectType ?o1 SoapBarType)
    (receptacleType ?r CabinetType) (inReceptacle ?o1 ?r)
    (exists (?o2 - object) (and (not (= ?o1 ?o2))
    (objectType ?o2 SoapBarType) (receptacleType ?r CabinetType) (inReceptacle ?o2 ?r))))))"""
STATE = """(exists (?r - receptacle) (exists (?o - object) (and ({able} ?o) (objectType ?o MugType)
    (receptacleType ?r SinkBasinType) ({state} ?o) (inReceptacle ?o ?r))))"""


@pytest.mark.parametrize(
    "pddl, goal",
    [
        (MUG_IN_FRIDGE, Goal("pick_and_place_simple", "mug", "fridge", 1, None, None)),
        (LAMP, Goal("look_at_obj_in_light", "mug", None, 1, None, "desklamp")),
        (TWO, Goal("pick_two_obj_and_place", "soapbar", "cabinet", 2, None, None)),
        (
            STATE.format(able="cleanable", state="isClean"),
            Goal("pick_clean_then_place_in_recep", "mug", "sinkbasin", 1, "clean", None),
        ),
        (
            STATE.format(able="heatable", state="isHot"),
            Goal("pick_heat_then_place_in_recep", "mug", "sinkbasin", 1, "hot", None),
        ),
        (
            STATE.format(able="coolable", state="isCool"),
            Goal("pick_cool_then_place_in_recep", "mug", "sinkbasin", 1, "cool", None),
        ),
        ("(forall (?o - object) (not (isHot ?o)))", None),
    ],
)
def test_goal_is_read_from_pddl(pddl, goal):
    game = Game.from_dict(tiny(f"(and {pddl})"))
    assert game.goal == goal
    assert game.task_type == (goal.task_type if goal else "other")


SOAP_1 = [
    "go to sinkbasin 1",
    "take soapbar 1 from sinkbasin 1",
    "go to cabinet 1",
    "open cabinet 1",
]
SOAP_1 += ["move soapbar 1 to cabinet 1"]
SOAP_2 = [
    "go to sinkbasin 1",
    "take soapbar 2 from sinkbasin 1",
    "go to cabinet 1",
    "move soapbar 2 to cabinet 1",
]


@pytest.mark.parametrize(
    "goal, commands, won",
    [
        (TWO, SOAP_1, False),
        (TWO, SOAP_1 + SOAP_2, True),
        (TWO, SOAP_1 + ["take soapbar 1 from cabinet 1", "move soapbar 1 to cabinet 1"], False),
        (LAMP, ["go to desk 1", "use desklamp 1", *GET_MUG], False),  # not beside the lamp
        (LAMP, ["go to desk 1", "use desklamp 1", *GET_MUG, "go to desk 1"], True),
        (LAMP, [*GET_MUG, "go to cabinet 1", "use desklamp 1"], True),
        ("(holdsAny agent1)", GET_MUG, True),
        ("(not (holdsAny agent1))", [], True),
        ("(not (holdsAny agent1))", GET_MUG, False),
        ("(or (holdsAny agent1) (opened Fridge_bar_1))", ["go to fridge 1", "open fridge 1"], True),
        ("(imply (holdsAny agent1) (opened Fridge_bar_1))", GET_MUG, False),
        ("(forall (?o - object) (imply (objectType ?o SoapBarType) (exists (?r - receptacle) (and "
         "(receptacleType ?r CabinetType) (inReceptacle ?o ?r)))))", SOAP_1, False),
        ("(forall (?o - object) (imply (objectType ?o SoapBarType) (exists (?r - receptacle) (and "
         "(receptacleType ?r CabinetType) (inReceptacle ?o ?r)))))", SOAP_1 + SOAP_2, True),
        ("(exists (?o - object) (and (holds agent1 ?o) (exists (?o - object) (isClean ?o))))",
         [*GET_MUG, "clean mug 1 with sinkbasin 1"], True),
        ("(exists (?r - receptacle) (inReceptacle ?r ?r))", [], False),
        ("(and)", [], True),
        ("(or)", [], False),
        ("(exists (?x - receptacle) (canContain ?x ?x))", [], False),
    ],
)  # fmt: skip
def test_goals_of_every_shape(goal, commands, won):
    goal = goal.replace("Fridge_bar_1", "fridge_BAR_1")  # names are case-insensitive
    env = AlfWorld(tiny(goal))
    env.reset()
    play(env, commands)
    assert env.step("look")[-1]["won"] is won


def test_goal_is_grounded_fast_enough_for_many_objects():
    objects = TINY_OBJECTS + " ".join(f"SoapBar_bar_{n}" for n in range(3, 60)) + " - object"
    init = TINY_INIT + " ".join(f"(objectType SoapBar_bar_{n} SoapBarType)" for n in range(3, 60))
    assert Game.from_dict(tiny(TWO, init, objects)).goal.count == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pddl_domain": "(define (domain logistics))"}, "domain is logistics"),
        ({"pddl_domain": ""}, "domain is missing"),
        ({"pddl_domain": None}, "no text under 'pddl_domain'"),
        ({"grammar": ""}, "Your task is to"),
        ({"grammar": ["x"]}, "no text under 'grammar'"),
        ({"pddl_problem": ""}, "no \\(:domain"),
        ({"walkthrough": "look"}, "walkthrough"),
        ({"walkthrough": [1]}, "walkthrough"),
        ({"goal": "(" * 3000 + ")" * 3000}, "deep"),
        ({"goal": "(exists (?o) (flies ?o) (and))"}, "cannot be read"),
        ({"goal": "(checked agent1)"}, "cannot be read"),
        ({"goal": "(isHot ?o)"}, "variable \\?o"),
        ({"goal": "(exists ((?o)) (isHot ?o))"}, "cannot be read"),
        ({"goal": "(exists ?o (isHot ?o))"}, "cannot be read"),
        ({"goal": "(and isHot)"}, "cannot be read"),
        ({"goal": "isHot"}, "not a parenthesised"),
        ({"goal": "(exists (?a ?b ?c ?d ?e ?f ?g ?h - object) (isHot ?a))"}, "bindings"),
        ({"init": TINY_INIT.replace("(openable", "openable", 1)}, "parentheses"),
        ({"init": TINY_INIT + "(isHot)"}, "unknown to ALFWorld: \\(ishot\\)"),
        ({"init": TINY_INIT + "(on a b)"}, "unknown to ALFWorld: \\(on a b\\)"),
        ({"init": TINY_INIT + "(not (isHot Mug_bar_1))"}, "not a plain fact"),
        ({"init": TINY_INIT + "(isHot Ghost_bar_1)"}, "'ghost_bar_1' without declaring"),
        ({"init": TINY_INIT + "(atLocation agent1 desk_place)"}, "2 facts \\(atLocation"),
        ({"init": TINY_INIT + "(receptacleAtLocation Fridge_bar_1 start)"}, "two locations"),
        ({"init": "(atLocation Mug_bar_1 start)"}, "where an agent is needed"),
        ({"init": "(atLocation agent1 start)"}, "nowhere to go"),
        ({"init": "(openable Fridge_bar_1)"}, "0 facts \\(atLocation"),
    ],
)
def test_bad_content_is_one_clear_error(changes, message):
    with pytest.raises(GameError, match=f"cannot play bad.game: .*{message}"):
        Game.from_dict(tiny(**changes), name="bad.game")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 200_000, b"[1]", b"null", b"{}", b'{"pddl_domain": 1}'],
)
def test_bad_files_are_one_clear_error(tmp_path, content):
    path = tmp_path / "game.tw-pddl"
    path.write_bytes(content)
    for source in (path, tmp_path, str(path)):
        with pytest.raises(GameError, match="cannot play .*game.tw-pddl"):
            Game.load(source)


def test_any_truncation_of_a_problem_is_an_error():
    problem = tiny()["pddl_problem"]
    for end in range(0, len(problem), 37):
        with pytest.raises(GameError):
            Game.from_dict(tiny(pddl_problem=problem[:end]))


def test_missing_and_huge_files(tmp_path):
    with pytest.raises(GameError, match="cannot read .*nowhere"):
        Game.load(tmp_path / "nowhere")
    path = tmp_path / "game.tw-pddl"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(GameError, match="larger than 16 MiB"):
        Game.load(path)


def test_games_of_a_split(tmp_path, monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(ValueError, match="ALFWORLD_DATA is not set"):
        games("train")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="no split 'train'"):
        games("train")
    (tmp_path / "json_2.1.1" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="is empty"):
        games("train")
    for task in ("b", "a"):
        trial = tmp_path / "json_2.1.1" / "train" / task / "trial"
        trial.mkdir(parents=True)
        (trial / "game.tw-pddl").write_text(
            json.dumps(tiny(grammar=f"Your task is to: do {task}."))
        )
    expected = [
        tmp_path / "json_2.1.1" / "train" / task / "trial" / "game.tw-pddl" for task in "ab"
    ]
    assert games("train") == expected
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "json_2.1.1"))
    assert games("train") == expected

    env = envs.make("alfworld", split="train")
    with pytest.raises(RuntimeError, match="reset before step"):
        env.step("look")
    drawn = [env.reset(seed=seed)[1]["task"] for seed in range(20)]
    assert set(drawn) == {"do a.", "do b."}
    assert drawn == [env.reset(seed=seed)[1]["task"] for seed in range(20)]
    assert env.step("look")[0].startswith("You are in the middle")
    assert {env.reset()[1]["task"] for _ in range(20)} == {"do a.", "do b."}


def test_make_refuses_what_it_does_not_know(monkeypatch):
    with pytest.raises(
        ValueError, match="unknown environment 'chess'; known: alfworld, .*household"
    ):
        envs.make("chess")
    with pytest.raises(
        ValueError, match="unknown option 'splits' for alfworld; known: split, engine"
    ):
        envs.make("alfworld", splits="train")
    with pytest.raises(ValueError, match="unknown engine 'fast'"):
        envs.make("alfworld", engine="fast")


# Against the real games.

STRIDE = {"valid_seen": 1, "train": 12}  # how many of a split's games are tested: every n-th


@pytest.fixture(scope="module")
def official(data_dir, tmp_path_factory):
    """The official splits, unpacked: the folder that holds train/ and valid_seen/."""
    root = tmp_path_factory.mktemp("alfworld")
    for split in ("valid_seen", "train"):
        archive = data_dir / "alfworld" / f"{split}.tar.xz"
        if not archive.exists():
            pytest.skip(f"no {archive}")
        with tarfile.open(archive) as tar:
            found = sorted(
                (m for m in tar if m.name.endswith("game.tw-pddl")), key=lambda m: m.name
            )
            tar.extractall(root, members=found[:: STRIDE[split]])
    return next(path.parent for path in root.rglob("valid_seen"))


def test_every_recorded_step_to_the_letter(data_dir, official):
    steps = 0
    with lzma.open(data_dir / "alfworld" / "textworld_valid_seen.jsonl.xz", "rt") as file:
        for line in file:
            record = json.loads(line)
            env = AlfWorld(official / record["game"])
            for step in record["steps"]:
                if step["command"] is None:
                    text, info = env.reset()
                    terminated = False
                else:
                    text, reward, terminated, _, info = env.step(step["command"])
                    assert reward == (10.0 if step["won"] else 0.0)
                got = (text, info["admissible_commands"], info["won"], terminated)
                assert got == (
                    step["observation"],
                    step["admissible"],
                    step["won"],
                    step["done"],
                ), step["command"]
                steps += 1
    assert steps > 1000


def test_official_walkthroughs_win(official):
    paths = sorted((official / "valid_seen").glob("*/*/game.tw-pddl"))
    assert len(paths) == 140
    paths += sorted((official / "train").glob("*/*/game.tw-pddl"))
    assert len(paths) > 400
    seen = set()
    for path in paths:
        game = Game.load(path)
        task_type, object_type, _, place, _ = path.parts[-3].split("-")
        goal = game.goal
        assert game.task_type == goal.task_type == task_type
        assert goal.object_type == object_type.lower()
        assert (goal.lamp_type or goal.receptacle_type) == place.lower()
        seen.add(task_type)
        env = AlfWorld(game)
        env.reset()
        *_, last = (env.step(command) for command in game.walkthrough)
        assert last[1:3] == (10.0, True), path
    assert seen == set(TASK_TYPES)


def test_speed_floor(official):
    """Far below what it does (docs/alfworld.md), so that only a lost order of magnitude fails."""
    paths = sorted((official / "valid_seen").glob("*/*/game.tw-pddl"))[:20]
    begin = time.process_time()
    parsed = [Game.load(path) for path in paths]
    assert (time.process_time() - begin) / len(paths) < 0.02
    rng, steps = random.Random(0), 0
    begin = time.process_time()
    for game in parsed:
        env = AlfWorld(game)
        _, info = env.reset()
        for _ in range(200):
            *_, info = env.step(rng.choice(info["admissible_commands"]))
            steps += 1
    assert steps / (time.process_time() - begin) > 10_000
