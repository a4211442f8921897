"""Which games count, as ALFWorld counts them, and in which words each of them is played."""

import json
import random
import re
import tarfile
from itertools import accumulate

import pytest
from helpers import configure
from test_alfworld_engine import tiny

from hiper_fast import envs
from hiper_fast.envs import household
from hiper_fast.envs.alfworld import (
    TASK_TYPES,
    AlfWorld,
    AlfWorldSplit,
    Game,
    GameError,
    games,
    trials,
)
from hiper_fast.envs.alfworld.dialect import Dialect
from hiper_fast.envs.alfworld.listing import list_games
from hiper_fast.envs.alfworld.player import make_player
from hiper_fast.envs.alfworld.prompts import render_compact, strip_opening
from hiper_fast.envs.prompts import State
from hiper_fast.options import ConfigError
from hiper_fast.rollout.games import Games

# Which games count.

PLACE, HEAT = "pick_and_place_simple", "pick_heat_then_place_in_recep"
TRIALS = {  # trial folder -> what its game file says otherwise (None: there is none)
    f"{PLACE}-Mug-None-Desk-1/trial_b": {},
    f"{PLACE}-Mug-None-Desk-1/trial_a": {"solvable": 1},
    f"{HEAT}-Mug-None-Desk-1/trial": {},
    f"{PLACE}-AppleSliced-None-Desk-1/trial": {},
    "pick_and_place_with_movable_recep-Pen-Mug-Desk-1/trial": None,
    "pick_and_place_with_movable_recep-Pen-Mug-Desk-2/trial": {"solvable": False},
    f"{PLACE}-Pen-None-Desk-1/trial": {"solvable": False},
    f"{PLACE}-Pen-None-Desk-1/trial_b": {"solvable": None},
    f"{PLACE}-Pen-None-Desk-2/trial": {"solvable": ...},  # without the key
    f"{PLACE}-Pen-None-Desk-3/trial": None,
}
LEFT_OUT = {
    "with a sliced object": 1,
    "with a movable receptacle": 2,
    "not solvable": 2,
    "not known to be solvable": 1,
    "without a game file": 1,
}


def write_split(folder, trials):
    for trial, changes in trials.items():
        (folder / trial).mkdir(parents=True)
        (folder / trial / "traj_data.json").write_text("{}")
        if changes is not None:
            content = {key: value for key, value in tiny(**changes).items() if value is not ...}
            (folder / trial / "game.tw-pddl").write_text(json.dumps(content))


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """A data set, in a folder of an unlucky name, with trials of every kind in valid_seen."""
    root = tmp_path / "movable Sliced"
    write_split(root / "train", {f"{PLACE}-Mug-None-Desk-1/trial": {}})
    write_split(root / "valid_seen", TRIALS)
    monkeypatch.setenv("ALFWORLD_DATA", str(root))
    return root


def test_what_alfworlds_loader_leaves_out_is_left_out(mixed):
    listing = list_games("valid_seen")
    counted = [str(path.parent.relative_to(mixed / "valid_seen")) for path in listing.games]
    assert counted == [
        f"{PLACE}-Mug-None-Desk-1/trial_a",
        f"{PLACE}-Mug-None-Desk-1/trial_b",
        f"{HEAT}-Mug-None-Desk-1/trial",
    ]
    assert listing.left_out == LEFT_OUT
    assert str(listing).startswith("3 games (left out: ") and "2 with a movable" in str(listing)
    assert games("valid_seen") == listing.games
    env = envs.make("alfworld", split="valid_seen")
    drawn = {env.reset(seed=seed) and env.game.name for seed in range(40)}
    assert drawn == set(map(str, listing.games))


def test_task_types_that_are_not_asked_for_are_left_out(mixed):
    listing = list_games("valid_seen", [HEAT])
    assert [path.parent.parent.name for path in listing.games] == [f"{HEAT}-Mug-None-Desk-1"]
    assert listing.left_out == {
        "of other task types": 6,
        "with a sliced object": 1,
        "with a movable receptacle": 2,
    }
    env = AlfWorldSplit("valid_seen", task_types=[HEAT])
    assert {env.reset(seed=seed) and env.game.name for seed in range(9)} == {str(listing.games[0])}
    with pytest.raises(ValueError, match="task_types is .'slice'.; choose from pick_and_place"):
        games("train", ["slice"])
    with pytest.raises(ConfigError, match="env: task_types is"):
        Games(configure("alfworld", env__task_types=["slice"]))
    with pytest.raises(ConfigError, match="nothing to play .*0 games .left out: 1 of other task"):
        Games(configure("alfworld", env__task_types=[HEAT]))


def test_a_run_tells_what_was_left_out(mixed):
    made = Games(configure("alfworld"))
    assert len(made.list_panel()) == 3
    told = made.family.describe_data()
    assert told == {
        "train": "1 game, checked",
        "valid_seen": str(list_games("valid_seen", check=True)),
    }


def test_a_corrupt_file_is_named_before_anything_is_played(mixed):
    file = mixed / "valid_seen" / f"{HEAT}-Mug-None-Desk-1" / "trial" / "game.tw-pddl"
    for content in ("{", "[1]"):
        file.write_text(content)
        with pytest.raises(ConfigError, match=f"env: cannot play .*{HEAT}"):
            Games(configure("alfworld"))


def test_official_games_all_count(data_dir, tmp_path, monkeypatch):
    archive = data_dir / "alfworld" / "valid_seen.tar.xz"
    if not archive.exists():
        pytest.skip(f"no {archive}")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path)
    (folder,) = tmp_path.rglob("valid_seen")
    monkeypatch.setenv("ALFWORLD_DATA", str(folder.parent))
    listing = list_games("valid_seen")
    assert len(listing.games) == 140 and listing.left_out == {}
    assert {len(games("valid_seen", [type_])) > 0 for type_ in TASK_TYPES} == {True}
    assert {Game.load(path).dialect for path in listing.games} == {Dialect()}


# The words of a file from before ALFWorld 0.4.

OLD = Dialect("put", "in/on", names_location=True, helps=False)


def age(content):
    """The game as it was written then: what ALFWorld's own script for old files does, undone."""
    grammar = content["grammar"].rsplit("action help", 1)[0]
    for new, old in (
        ("move {o} to {r}", "put {o} in/on {r}"),
        ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
        ("You arrive at {r.name}.", "You arrive at {lend.name}."),
    ):
        assert new in grammar
        grammar = grammar.replace(new, old)
    steps = [re.sub("^move (.+) to ", r"put \1 in/on ", step) for step in content["walkthrough"]]
    before, help_ = content["pddl_domain"].split("(:action help")
    depths = accumulate((letter == "(") - (letter == ")") for letter in help_)
    domain = before + help_[next(i for i, depth in enumerate(depths) if depth < 0) + 1 :]
    return content | {"grammar": grammar, "walkthrough": steps, "pddl_domain": domain}


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_an_old_file_is_played_in_its_own_words(task_type):
    new = household.generate(task_type, 3, "small")
    game = Game.from_dict(age(new))
    assert game.dialect == OLD and Game.from_dict(new).dialect == Dialect()
    ours, theirs = AlfWorld(game), AlfWorld(new)
    info, expected = ours.reset()[1], theirs.reset()[1]
    for old_step, new_step in zip(game.walkthrough, new["walkthrough"], strict=True):
        listed = info["admissible_commands"]
        assert "help" not in listed and old_step in listed
        assert len(listed) == len(expected["admissible_commands"]) - 1
        text, *_, info = ours.step(old_step)
        expected = theirs.step(new_step)[-1]
        if old_step.startswith("go to"):
            assert re.match(r"You arrive at [a-z]+ \d+\. ", text)
            assert not text.startswith(f"You arrive at {old_step[6:]}.")
        if old_step.startswith("put"):
            put = re.fullmatch("put (.+) in/on (.+)", old_step)
            assert text == f"You put the {put[1]} in/on the {put[2]}."
            assert new_step not in listed
    assert info["won"] and ours.step("help")[0] == "Nothing happens."


@pytest.mark.parametrize("aged", [False, True], ids=["new", "old"])
def test_no_command_that_is_listed_does_nothing(aged):
    rng = random.Random(0)
    for seed, task_type in enumerate(TASK_TYPES):
        content = household.generate(task_type, seed, "medium")
        env = AlfWorld(age(content) if aged else content)
        info, seen = env.reset()[1], set()
        for _ in range(150):
            busy = [c for c in info["admissible_commands"] if not c.startswith(("go ", "exam"))]
            command = rng.choice(busy if rng.random() < 0.5 else info["admissible_commands"])
            text, *_, info = env.step(command)
            seen.add(command.split()[0])
            assert text != "Nothing happens.", command
        assert "take" in seen and ("put" if aged else "move") in seen


@pytest.mark.parametrize("kind", ["listed", "search", "walkthrough"])
def test_players_speak_the_old_words_too(kind):
    won, puts = 0, set()
    for seed in range(12):
        content = age(household.generate(TASK_TYPES[seed % len(TASK_TYPES)], seed, "small"))
        env = AlfWorld(content)
        text, info = env.reset()
        player, action = make_player(kind, env.game, random.Random(seed)), None
        observation = strip_opening(text)
        for _ in range(40):
            commands = info["admissible_commands"]
            player.observe(action, observation, commands)
            move = player.move(commands)
            action = move.action
            assert action in commands
            if action.startswith("put "):
                puts.add(move.subgoal.split()[0])
            observation, _, over, _, info = env.step(action)
            if over:
                break
        won += info["won"]
    assert won >= 10 and puts == {"put"}


def test_compact_prompts_group_the_old_words():
    commands = ["put mug 1 in/on desk 1", "put mug 2 in/on desk 1", "look"]
    text = render_compact(State("do it.", "You see nothing.", commands))
    assert "put mug 1 mug 2 in/on desk 1\n" in text


def change(old, new):
    content = household.generate(TASK_TYPES[0], 0, "small")
    assert old in content["grammar"]
    return content | {"grammar": content["grammar"].replace(old, new)}


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "move {o} to {r}",
            "place {o} on {r}",
            r"its grammar says 'place \{o\} on \{r\}' for PutObject; only 'move \{o\} to \{r\}' or "
            r"'put \{o\} in/on \{r\}' can be played",
        ),
        ("take {o} from {r}", "grab {o}", r"says 'grab \{o\}' for PickupObject; only 'take"),
        ('template :: "help"', 'template :: "assist"', "says 'assist' for help; only 'help'"),
        ("action CoolObject", "action Chill", "has no action CoolObject"),
        ("action help", 'action Sing { template :: "sing"; }\naction help', "unknown .*: Sing"),
        (
            "You move the {o.name}",
            "You drop the {o.name}",
            "does not answer PutObject by 'You move",
        ),
        ("You arrive at {r.name}.", "Welcome.", "does not answer GotoLocation by 'You arrive at"),
    ],
)
def test_other_words_are_refused_with_the_file_and_what_it_says(tmp_path, old, new, message):
    path = tmp_path / "game.tw-pddl"
    path.write_text(json.dumps(change(old, new)))
    with pytest.raises(GameError, match=f"cannot play {path}: .*{message}"):
        AlfWorld(path)


def test_blanks_in_a_template_do_not_matter():
    content = change('template :: "move {o} to {r}"', 'template  ::\n """ move {o}  to {r} """')
    assert Game.from_dict(content).dialect == Dialect()


# What is damaged shows at the start.


def list_parsing(content):
    """Game files that read well and cannot be played."""
    return {
        "no domain": content | {"pddl_domain": ""},
        "half a problem": content | {"pddl_problem": content["pddl_problem"][:-40]},
        "no grammar": content | {"grammar": None},
        "other words": change("take {o} from {r}", "grab {o}") | {"solvable": True},
    }


@pytest.fixture(params=["alone", "shared"])
def crowd(request, tmp_path, monkeypatch):
    """Nine games for training and the counts of processes that check them: one, or three."""
    monkeypatch.setattr(trials, "SHARE", 3 if request.param == "shared" else 100)
    monkeypatch.setattr(trials, "count_cores", lambda: 3)
    write_split(tmp_path / "train", {f"{PLACE}-Mug-None-Desk-{i}/trial": {} for i in range(9)})
    write_split(tmp_path / "valid_seen", {f"{PLACE}-Mug-None-Desk-1/trial": {}})
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    return [tmp_path / "train" / f"{PLACE}-Mug-None-Desk-{i}/trial/game.tw-pddl" for i in range(9)]


def test_all_games_are_checked_and_counted(crowd):
    made = Games(configure("alfworld"))
    assert made.family.describe_data()["train"] == "9 games, checked"
    assert list_games("train", check=True).games == crowd == games("train")


@pytest.mark.parametrize("fault", list_parsing(household.generate(TASK_TYPES[0], 0, "small")))
def test_a_game_that_could_not_be_played_later_is_named_at_the_start(crowd, fault):
    content = list_parsing(household.generate(TASK_TYPES[0], 0, "small") | {"solvable": True})
    crowd[7].write_text(json.dumps(content[fault]))
    with pytest.raises(ConfigError, match=f"env: cannot play {crowd[7]}: its? .*out of train.$"):
        Games(configure("alfworld"))


def test_of_several_damaged_files_the_first_is_named_with_how_many_there_are(crowd):
    crowd[2].write_bytes(crowd[2].read_bytes()[:500])
    crowd[5].write_text("")
    crowd[8].write_text(json.dumps(tiny(pddl_domain="(define (domain other))")))
    said = f"env: cannot play {crowd[2]}: .*truncated.* first of 3 damaged files among the 9 trials"
    with pytest.raises(ConfigError, match=said):
        Games(configure("alfworld"))


def test_workers_that_cannot_run_are_done_without(crowd, monkeypatch):
    monkeypatch.setattr(trials, "_WORKER", "raise SystemExit(1)")
    assert len(list_games("train", check=True).games) == 9
    crowd[8].write_text("{")
    with pytest.raises(GameError, match=str(crowd[8])):
        list_games("train", check=True)


# Where the data lies.


@pytest.mark.parametrize(
    "given",
    ["json_2.1.1", "", "json_2.1.1/train", "json_2.1.1/valid_seen", "..", "json_2.1.1/train/TASK"],
)
def test_a_folder_a_level_too_deep_or_too_high_is_recognised(tmp_path, monkeypatch, given):
    data = tmp_path / "all" / "alfworld"
    for split in ("train", "valid_seen"):
        write_split(data / "json_2.1.1" / split, {f"{PLACE}-Mug-None-Desk-1/trial": {}})
    (tmp_path / "all" / "webshop").mkdir()
    monkeypatch.setenv(
        "ALFWORLD_DATA", str(data / given.replace("TASK", f"{PLACE}-Mug-None-Desk-1"))
    )
    for split in ("train", "valid_seen"):
        [game] = games(split)
        assert game.resolve().is_relative_to(data / "json_2.1.1" / split)


def test_a_folder_too_high_without_the_archives_name_is_recognised(tmp_path, monkeypatch):
    write_split(tmp_path / "games" / "train", {f"{PLACE}-Mug-None-Desk-1/trial": {}})
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    assert games("train")[0].is_relative_to(tmp_path / "games" / "train")


def test_a_folder_that_is_wrong_is_told_with_the_right_one(tmp_path, monkeypatch):
    for name in ("old", "new"):
        write_split(tmp_path / name / "json_2.1.1/train", {f"{PLACE}-Mug-None-Desk-1/trial": {}})
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="holds .*new/json_2.1.1, .*old/json_2.1.1; name one"):
        games("train")
    with pytest.raises(ValueError, match="no split 'valid_seen'.* contains json_2.1.1"):
        games("valid_seen")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere, which is no folder; point it at the folder"):
        games("train")


# Text that would reach the terminal.

EVIL = "\x1b]0;title\x07\x1b[31mred\x1b[0m\x00\x9b2J\u202e\ud800"


def test_a_games_own_texts_come_out_clean_and_can_be_played(tmp_path):
    content = household.generate(TASK_TYPES[0], 0, "small")
    grammar = content["grammar"].replace("Your task is to: ", f"Your task is to: {EVIL}")
    problem = content["pddl_problem"].replace("_bar_", "\x1b[2J_bar_")
    file = tmp_path / "game.tw-pddl"
    file.write_text(json.dumps(content | {"grammar": grammar, "pddl_problem": problem}))
    ours, theirs = AlfWorld(file), AlfWorld(content)
    text, info = ours.reset()
    assert "\x1b" not in text and "\x9b" not in text and text.encode()
    assert info["task"].startswith("red\u202e?")
    assert info["admissible_commands"] == theirs.reset()[1]["admissible_commands"]
    for step in content["walkthrough"]:
        *_, info = ours.step(step)
    assert info["won"]


def test_an_error_tells_names_and_contents_clean(tmp_path):
    folder = tmp_path / "\x1b[31mred\u202e"
    folder.mkdir()
    file = folder / "game.tw-pddl"
    file.write_text(json.dumps(tiny(pddl_domain="(define (domain \x1b[2J\ud800)")))
    with pytest.raises(GameError) as caught:
        AlfWorld(file)
    assert f"{tmp_path}/red/game.tw-pddl: its domain is ?" in str(caught.value)
