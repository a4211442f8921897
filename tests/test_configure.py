"""Options: from YAML and the command line into typed dataclasses, with an error that names the bad one."""

import dataclasses
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from hiper_fast import configure
from hiper_fast.agent.tiny import build_model, load_tokenizer
from hiper_fast.config import SHORT, Config, RolloutConfig
from hiper_fast.configure import RECIPES, make_config, resolve
from hiper_fast.envs.family import families
from hiper_fast.options import ConfigError, convert, flatten, list_options, option
from hiper_fast.rollout import engines
from hiper_fast.rollout.engines.paged import Options
from hiper_fast.runs.folder import find_run_folder, format_config, write_config

OPTIONS = {
    name: option
    for family in ("household", "alfworld", "webshop")
    for name, option in list_options(make_config([("", "env.name", family)])).items()
}
FAMILY = {
    "env.size": "household",
    "env.task_types": "household",
    "env.data": "webshop",
    "env.goals": "webshop",
}
FAMILY |= {"env.split_by": "webshop", "env.split": "webshop", "env.eval_split": "webshop"}


WITH = {  # what else a value needs, or may not contradict
    "train.group": lambda value: {"train.episodes": value},
    "train.importance_cap": lambda value: {"train.old_logprobs": "recomputed"},
    "train.clip_low": lambda value: {"train.loss": "cispo"},
}


def given(name, value):
    """The options of a configuration that has `name`."""
    more = WITH.get(name, lambda value: {})(value)
    return {"env.name": FAMILY.get(name, "household"), name: value, **more}


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)


def parse(*argv):
    return configure.parse(list(argv), program="train", description="Trains.")


def refused(capsys, *argv):
    """The one line that a bad command line ends with."""
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# The command line.


def test_no_options_give_the_defaults():
    assert parse() == resolve()
    own = resolve().train, Config().train
    assert own[0] == dataclasses.replace(own[1], updates=40, lr=1.5e-3), "what household adds"


def test_options_set_their_fields():
    config = parse(
        "--train.lr",
        "1e-6",
        "--train.updates=7",
        "--env.size",
        "medium",
        "--reward.invalid",
        "-0.5",
    )
    assert (config.train.lr, config.train.updates, config.env.size) == (1e-6, 7, "medium")
    assert config.reward.invalid == -0.5


def test_short_names():
    config = parse(
        *("--env", "household", "--model", "some/folder", "--seed", "5"),
        *("--updates", "3", "--name", "mine"),
    )
    assert (config.env.name, config.model.path, config.run.seed) == ("household", "some/folder", 5)
    assert (config.train.updates, config.run.name, config.run.resume) == (3, "mine", False)
    assert set(SHORT) == {"env", "model", "seed", "updates", "name", "resume", "plan"}
    assert parse("--run.seed", "5").run.seed == 5  # the long name stays


@pytest.mark.parametrize(
    "argv, value",
    [
        (["--advantage.normalize"], True),
        (["--advantage.normalize", "false"], False),
        (["--advantage.normalize=no"], False),
        (["--advantage.normalize=0"], False),
        (["--advantage.normalize", "YES"], True),
    ],
)
def test_bool_flags(argv, value):
    assert parse(*argv).advantage.normalize is value


@pytest.mark.parametrize(
    "argv, value",
    [
        (["--env.task_types", "look_at_obj_in_light,pick_two_obj_and_place"], 2),
        (["--env.task_types=look_at_obj_in_light"], 1),
        (["--env.task_types", "none"], None),
    ],
)
def test_lists_and_none(argv, value):
    task_types = parse(*argv).env.task_types
    assert task_types is None if value is None else len(task_types) == value
    assert parse("--train.value_coef", "1,0.5,2").train.value_coef == [1.0, 0.5, 2.0]


def test_a_default_list_is_not_shared():
    parse().train.value_coef.append(9.0)
    assert len(parse().train.value_coef) == 3


@pytest.mark.parametrize(
    "argv, near",
    [
        (["--train.learning_rat", "1"], None),
        (["--train.uptates", "1"], "train.updates"),
        (["--env.sice=small"], "env.size"),
        (["--updatse", "1"], "updates"),
        (["stray"], None),
        (["train.lr", "3"], None),
    ],
)
def test_unknown_options_name_the_nearest(capsys, argv, near):
    err = refused(capsys, *argv)
    assert argv[0].lstrip("-").split("=")[0] in err and err.count("\n") == 1
    assert "python -m hiper_fast.train:" in err
    assert (f"did you mean {near}?" if near else "command line") in err


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("train.updates", "many", "a whole number"),
        ("train.updates", "1.5", "a whole number"),
        ("train.lr", "fast", "a finite number"),
        ("train.lr", "nan", "a finite number"),
        ("advantage.normalize", "perhaps", "true or false"),
        ("train.value_coef", "1,two,3", "a finite number"),
        ("train.value_coef", "1,inf,3", "a finite number"),
        ("train.lr", "inf", "a finite number"),
        ("run.seed", "9" * 5000, "a whole number"),
        ("run.name", "a\nb", "text without control or invisible characters"),
        ("run.name", "\x1b]0;", "text without control or invisible characters"),
        ("model.path", "\u202eexe", "text without control or invisible characters"),
        ("model.path", "\udcff", "text without control or invisible characters"),
    ],
)
def test_wrong_types_name_option_and_type(capsys, name, value, expected):
    err = refused(capsys, f"--{name}", value)
    assert name in err and f"expected {expected}" in err and value.split(",")[-1][:3] in err + value
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "name, near",
    [
        ("lr", "did you mean train.lr or warm_start.lr?"),
        ("max_turns", "did you mean env.max_turns?"),
        ("max-turns", "did you mean env.max_turns?"),
        ("train.max_turns", "did you mean env.max_turns?"),
        ("gamma", "did you mean advantage.gamma?"),
        ("episodes", "did you mean train.episodes, warm_start.episodes or eval.episodes?"),
        ("batch", "did you mean agent.batch_tokens or warm_start.batch_turns?"),
        ("temprature", "did you mean agent.temperature or eval.temperature?"),
        ("q", "see --help for all options"),
        ("x" * 100_000, "see --help for all options"),
        ("\x1b[31m", "see --help for all options"),
    ],
)
def test_near_misses_are_found_across_sections(capsys, name, near):
    err = refused(capsys, f"--{name}", "1")
    assert near in err and len(err) < 400 and err.count("\n") == 1 and err[:-1].isprintable()


def test_an_option_without_its_dashes(capsys):
    assert "unexpected argument 'train.lr=3'; write --train.lr" in refused(capsys, "train.lr=3")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("run.seed", "-1", "must be at least 0"),
        ("run.seed", str(2**63), "must be at most 9223372036854775807"),
        ("train.episodes", str(10**12), "must be at most 2147483647"),
        ("train.clip_low", "1", "train.clip_low: PPO clips"),
        ("train.clip_low", "1.5", "must be at most 1"),
        ("train.lr", "2", "must be at most 1"),
        ("reward.success", "1e30", "must be at most 1000000.0"),
        (
            "run.name",
            "../elsewhere",
            "run.name: '../elsewhere' is no name of a folder below run.folder",
        ),
        ("run.name", "/tmp/x", "is no name of a folder"),
        ("run.name", "..", "is no name of a folder"),
        ("run.name", "", "is no name of a folder"),
        ("run.name", "ü" * 101, "is longer than 200 bytes"),
    ],
)
def test_values_that_make_no_sense(capsys, name, value, message):
    err = refused(capsys, f"--{name}={value}")
    assert message in err and err.count("\n") == 1 and len(err) < 400


def test_a_folder_of_runs_that_cannot_be(capsys):
    err = refused(capsys, "--run.folder=" + "x" * 4000, "--resume")
    assert "File name too long" in err and err.count("\n") == 1 and len(err) < 400


def test_without_a_lower_clip():
    assert resolve(given={"train.loss": "cispo", "train.clip_low": 1}).train.clip_low == 1


def test_a_missing_value_is_one_clear_line(capsys):
    err = refused(capsys, "--train.lr")
    assert "--train.lr" in err and "expected one argument" in err
    assert len(err.splitlines()) == 1, "the usage of all options buries the message"


NUMBERS = [name for name, option in OPTIONS.items() if type(option.default) in (int, float)]


def test_every_number_has_a_range_or_says_that_it_has_none():
    for name in NUMBERS:
        assert bool(OPTIONS[name].bounds) != OPTIONS[name].unbounded, name
        assert {"least", "above"} & OPTIONS[name].bounds.keys(), name
        assert {"most", "below"} & OPTIONS[name].bounds.keys(), name
    assert {name for name in NUMBERS if OPTIONS[name].unbounded} == set()


def test_every_list_of_numbers_has_a_range_and_a_length():
    lists = [option for option in OPTIONS.values() if option.kind == list[float]]
    assert lists and all(option.bounds and option.count for option in lists)


def test_every_text_is_a_choice_or_known_to_be_free():
    """What is neither is checked elsewhere: by the folder, the registry or the data that it names."""
    free = {name for name, option in OPTIONS.items() if option.kind is str}
    assert free == {
        *("env.name", "env.split", "env.eval_split", "agent.style", "model.path", "model.device"),
        *("rollout.engine", "advantage.estimator", "run.name", "run.folder"),
        "warm_start.demonstrations",
    }


def test_defaults_keep_their_own_rules():
    for name in ("household", "alfworld", "webshop"):
        assert resolve(given=flatten(resolve(given={"env.name": name}))) == resolve(
            given={"env.name": name}
        )


@pytest.mark.parametrize("name", [name for name in NUMBERS if OPTIONS[name].bounds])
def test_each_bound_is_kept(name):
    option, step = OPTIONS[name], 1 if type(OPTIONS[name].default) is int else 1e-9
    bounds = option.bounds
    for bound, words in (
        ("above", "above"),
        ("least", "at least"),
        ("below", "below"),
        ("most", "at most"),
    ):
        if bound in bounds:
            outside = bounds[bound] + {"least": -step, "most": step}.get(bound, 0)
            with pytest.raises(ConfigError, match=f"command line: {name}: must be {words}"):
                resolve(given=given(name, outside))
    inside = {"least": 0, "above": step, "most": 0, "below": -step}
    for bound, value in bounds.items():
        resolve(given=given(name, value + inside[bound]))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["train.lr", "reward.success", "train.updates", "train.value_coef"]
)
def test_numbers_are_finite(name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected a"):
        resolve(given={name: [value] * 3 if name == "train.value_coef" else value})


def test_large_seeds_are_exact():
    assert resolve(given={"run.seed": "9007199254740993"}).run.seed == 9007199254740993


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.choices])
def test_choices_are_listed(name):
    with pytest.raises(ConfigError, match=name) as caught:
        resolve(given=given(name, "neither"))
    choices = OPTIONS[name].choices
    assert all(choice in str(caught.value) for choice in choices)
    for choice in choices:
        config = resolve(given=given(name, choice))
        assert flatten(config)[name] == choice or choice == "auto"


def test_value_coef_has_three_entries():
    with pytest.raises(ConfigError, match="train.value_coef: expected 3 values"):
        resolve(given={"train.value_coef": "1,2"})


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "gigpo", "group_hae"])
def test_what_compares_episodes_needs_groups(name):
    with pytest.raises(ConfigError, match=f"train.group: {name} .* compares episodes of one game"):
        resolve(given={"advantage.estimator": name})
    assert resolve(given={"advantage.estimator": name, "train.group": 8}).train.group == 8


def test_whole_groups():
    with pytest.raises(
        ConfigError, match="train.group: 10 episodes .* do not make whole groups of 4"
    ):
        resolve(given={"train.episodes": 10, "train.group": 4})


@pytest.mark.parametrize(
    "name, value, near",
    [
        ("advantage.estimator", "hea", "did you mean hae"),
        (
            "advantage.estimator",
            "nothing like it",
            "known: dr_grpo, gae, gigpo, group_hae, grpo, hae",
        ),
        ("rollout.engine", "page", "did you mean paged"),
        ("rollout.engine", "no.such:Engine", "no.such:Engine cannot be loaded"),
        ("env.name", "webshp", "did you mean webshop"),
        ("env.name", "no.such:Family", "no.such:Family cannot be loaded"),
        ("agent.style", "terse", "none of reference, transcript, compact"),
    ],
)
def test_names_that_nothing_has(name, value, near):
    with pytest.raises(ConfigError, match=name) as caught:
        resolve(given={name: value})
    assert near in str(caught.value)


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    config = resolve(given={"env.name": "household"})
    options = list_options(config)
    for name in flatten(config):
        assert f"--{name}" in out and options[name].help.split()[0] in out
    assert all(f"--{short}" in out for short in SHORT) and "--config" in out
    told = " ".join(out.split())
    assert "1e-6) [tiny: 0.0015; pretrained: 1e-06]" in told and "Trains." in out
    assert "[tiny: 384; pretrained: 2048]" in told and "episodes per update [128]" in told
    assert "those of the tiny one" not in told and "that of the tiny one" in told
    assert "--env.goals" not in out


def test_help_lists_the_options_of_the_chosen_environment(capsys):
    with pytest.raises(SystemExit):
        parse("--env", "webshop", "--help")
    out = capsys.readouterr().out
    assert "--env.goals" in out and "--env.size" not in out


def test_an_option_of_another_environment_is_unknown(capsys):
    err = refused(capsys, "--env", "household", "--env.goals", "human")
    assert "unknown option 'env.goals'" in err and err.count("\n") == 1


@dataclasses.dataclass(slots=True)
class RemoteOptions(RolloutConfig):
    host: str = option("here", "where it runs")
    cores: int = option(1, "of this machine", above=0, local=True)


@pytest.fixture
def remote(monkeypatch):
    """An engine with an option of its own."""
    engine = type("Remote", (), {"Options": RemoteOptions})
    monkeypatch.setitem(engines._plugins.registered, "remote", engine)
    return engine


def test_an_engine_brings_options_of_its_own(tmp_path, capsys, remote):
    file = write(tmp_path / "a.yaml", "rollout: {host: there, engine: remote}")
    assert parse("--config", file).rollout == RemoteOptions(engine="remote", host="there")
    assert parse("--rollout.host=far", "--rollout.engine=remote").rollout.host == "far"
    with pytest.raises(SystemExit):
        parse("--rollout.engine", "remote", "--env=webshop", "--help")
    out = capsys.readouterr().out
    assert "--rollout.host" in out and "where it runs [here]" in out and "--env.goals" in out


def test_an_option_of_another_engine_is_unknown(capsys, remote):
    assert "unknown option 'rollout.host'" in refused(capsys, "--rollout.host", "far")
    err = refused(capsys, "--rollout.engine=remote", "--rollout.hots=far")
    assert "did you mean rollout.host?" in err


def test_a_run_that_goes_on_with_another_engine_leaves_the_options_of_the_first(tmp_path, remote):
    trained = resolve(given={"rollout.engine": "remote", "rollout.host": "there"})
    own = list(configure.read_sections(dataclasses.asdict(trained), "a run"))
    assert resolve(own=own).rollout.host == "there"
    assert type(resolve(given={"rollout.engine": "paged"}, own=own).rollout) is Options


def test_what_an_engine_has_of_a_machine_stays_there(remote):
    trained = resolve(given={"rollout.engine": "remote", "rollout.cores": 8})
    own = list(configure.read_sections(dataclasses.asdict(trained), "a run"))
    assert trained.rollout.cores == 8 and resolve(own=own).rollout.cores == 1
    assert resolve(given={"rollout.cores": 4}, own=own).rollout.cores == 4


def test_options_of_an_engine_are_those_of_every_engine_and_more(remote):
    remote.Options = dict
    with pytest.raises(
        ConfigError, match="rollout.engine: remote: its Options are no class below .*RolloutConfig"
    ):
        resolve(given={"rollout.engine": "remote"})


# YAML files.


def test_the_command_line_goes_over_the_file_and_the_file_over_defaults(tmp_path):
    file = write(tmp_path / "a.yaml", "env: {size: large}\ntrain:\n  updates: 3\n  lr: 1e-5\n")
    config = parse("--config", file, "--updates", "4")
    assert (config.env.size, config.train.updates, config.train.lr) == ("large", 4, 1e-5)


def test_later_files_go_over_earlier_ones(tmp_path):
    first = write(tmp_path / "a.yaml", "env: {size: large}\ntrain: {updates: 3, lr: 1e-5}\n")
    second = write(tmp_path / "b.yaml", "train: {updates: 4}\n")
    config = parse("--config", first, f"--config={second}", "--train.lr", "2e-5")
    assert (config.env.size, config.train.updates, config.train.lr) == ("large", 4, 2e-5)
    assert parse("--config", second, "--config", first).train.updates == 3


def test_the_bad_one_of_several_files_is_named(tmp_path, capsys):
    good, bad = (
        write(tmp_path / "a.yaml", "train: {updates: 3}"),
        write(tmp_path / "b.yaml", "train: {uptates: 3}"),
    )
    err = refused(capsys, "--config", good, "--config", bad)
    assert bad in err and good not in err and err.count("\n") == 1


def test_shipped_recipes_are_found_by_name_and_files_win(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "webshop").mkdir()  # a folder of data, say, is no file
    assert parse("--config", "alfworld").env.max_turns == 50
    assert parse("--config", "alfworld", "--config", "webshop").env.max_turns == 15
    write(tmp_path / "alfworld", "env: {max_turns: 7}")
    assert parse("--config", "alfworld").env.max_turns == 7
    err = refused(capsys, "--config", "alfwrold")
    assert "cannot be read (No such file" in err and "did you mean the recipe alfworld?" in err
    assert "default-webshop" not in refused(capsys, "--config", "nothing like it")


def test_a_file_lies_over_the_recipe_that_it_calls_its_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "a.yaml", "train: {lr: 3e-6}\nbase: alfworld\n")
    config = parse("--config", file)
    assert (config.train.lr, config.train.critic_lr, config.env.max_turns) == (3e-6, 1e-5, 50)
    config = parse("--config", "qwen2.5-7b-4x80gb", "--config", file)
    assert config.model.path == "Qwen/Qwen2.5-1.5B-Instruct", "a base lies over what comes before"
    write(tmp_path / "alfworld", "base: alfworld\nenv: {max_turns: 7}")
    assert parse("--config", "alfworld").env.max_turns == 7
    assert parse("--config", file).env.max_turns == 50, "bases are recipes that are shipped"


def test_the_papers_recipes_are_the_references_and_what_their_task_needs():
    common = {option: value for _, option, value in configure.read_file("hiper-reference")}
    other = {"alfworld": set(), "webshop": {"agent.max_prompt_tokens", "reward.keep"}}
    other["webshop"].add("advantage.bootstrap")
    for name, changed in other.items():
        own = {option: value for _, option, value in configure.read_file(name)}
        assert {option for option in common if own[option] != common[option]} == changed
        added = own.keys() - common.keys() - {"agent.fallback"}
        assert {option.split(".")[0] for option in added} == {"env", "eval", "plan"}
    both = ["hiper-reference", "qwen2.5-1.5b-1x80gb"]
    for name in ("alfworld", "webshop"):
        config = resolve(both, {"env.name": name})
        assert (config.advantage.bootstrap, config.model.dtype) == ("reference", "bfloat16")
        assert config.env == resolve([name]).env and config.eval == resolve([name]).eval
        assert config.agent.fallback == resolve([name]).agent.fallback


@pytest.mark.parametrize(
    "word, value",
    [(False, "none"), (True, "next_state"), ("false", "none"), ("true", "next_state"), ("No", "none")],
)  # fmt: skip
def test_bootstrap_of_earlier_runs_is_read(tmp_path, word, value):
    """It was true or false."""
    file = write(tmp_path / "config.yaml", f"advantage: {{bootstrap: {word}}}")
    assert resolve([file]).advantage.bootstrap == value
    assert parse(f"--advantage.bootstrap={word}").advantage.bootstrap == value
    with pytest.raises(ConfigError, match="'yess' is none of none, next_state, reference"):
        resolve(given={"advantage.bootstrap": "yess"})


@pytest.mark.parametrize(
    "text, message",
    [
        ("base: nothing", "base: 'nothing' is none of the recipes alfworld, hiper-reference"),
        ("base: [alfworld]", "base: ['alfworld'] is none of the recipes"),
        ("base: alfworld\nupdates: 3", "expected sections"),
        ("train: {uptates: 3}", "unknown option 'train.uptates'; did you mean train.updates"),
        ("trian: {updates: 3}", "did you mean train.updates"),
        ("train: {updates: soon}", "train.updates: expected a whole number, got 'soon'"),
        ("train: {updates: 1.5}", "train.updates: expected a whole number"),
        ("train: {updates: .inf}", "train.updates: expected a whole number"),
        ("train: {updates: null}", "train.updates: expected a whole number"),
        ("train: {updates: true}", "train.updates: expected a whole number"),
        ("train: {updates: [1]}", "train.updates: expected a whole number"),
        ("train: {value_coef: 3}", "train.value_coef: expected a list"),
        ("advantage: {gamma: 1.5}", "advantage.gamma: must be at most 1, got 1.5"),
        ("updates: 3", "expected sections"),
        ("train: 3", "got 3 in 'train'"),
        ("lr: 1.0e-5", "did you mean train.lr"),
        ("train.lr: 1.0e-5", "did you mean train.lr?"),
        (
            "train: [lr]",
            "expected sections such as 'train:' with options below them, got ['lr'] in 'train'",
        ),
        ("5: {lr: 1}", "got the key 5"),
        ("true: {lr: 1}", "got the key True"),
        ("train: {5: 1}", "train: expected the name of an option, got 5"),
        ("? [a]\n: {lr: 1}", "not valid YAML"),
        (
            "train:\n  lr: 1\nenv: {}\ntrain:\n  updates: 3",
            "(line 4: 'train' stands here again; it is in line 1 already)",
        ),
        ("train:\n  lr: 1\n  lr: 2", "(line 3: 'lr' stands here again; it is in line 2 already)"),
        (
            "train:\n\tlr: 1",
            "(line 2: found character '\\t' that cannot start any token; indent with spaces)",
        ),
        ("train: {updates: 1" + "0" * 5000 + "}", "a value is not of its kind"),
        (
            "train: {updates: 0x1" + "0" * 5000 + "}",
            "expected a whole number, got a number of more than 80 digits",
        ),
        ("train: {updates: 2001-13-45}", "a value is not of its kind"),
        ("train: {updates: !!int ''}", "a value is not of its kind"),
        (
            "train: {updates: 2001-01-01}",
            "train.updates: expected a whole number, got datetime.date(2001, 1, 1)",
        ),
        ("train: &a [*a]", "(line 1: it holds itself)"),
        ("[" * 5000, "nested too deeply"),
        (
            'model: {path: "\\e[31m"}',
            "model.path: expected text without control or invisible characters, got '\\x1b[31m'",
        ),
        ('"\\e[2J": {lr: 1}', "unknown option '\\x1b[2J.lr'"),
        ("- a\n- b", "expected sections"),
        ("just words", "expected sections"),
        ("train: {updates: 3", "not valid YAML"),
        ("train: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path, capsys, text, message):
    file = write(tmp_path / "bad.yaml", text)
    err = refused(capsys, "--config", file)
    assert message in err and err.count("\n") == 1


def test_a_section_whose_lines_are_all_comments_is_empty(tmp_path):
    text = "base:\ntrain:\n  # lr: 1.0e-5\nenv:\n  # size: large\neval: {}\n"
    assert parse("--config", write(tmp_path / "a.yaml", text)) == parse()


@pytest.mark.parametrize("form", ["[{0}, {0}, {0}]", "{{x: {0}, y: {0}}}", "{{<<: [{0}, {0}]}}"])
@pytest.mark.parametrize("place", ["train: {{updates: {}}}", "train: {}", "{}: 1"])
def test_aliases_that_grow_beyond_all_measure_are_refused_at_once(tmp_path, capsys, form, place):
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} " + form.format(f"*a{i - 1}") for i in range(1, 80)]
    file = write(tmp_path / "laughs.yaml", "\n".join([*lines, place.format("*a79 ")]))
    started = time.perf_counter()
    err = refused(capsys, "--config", file)
    assert err.count("\n") == 1 and len(err) < 400 and time.perf_counter() - started < 5
    assert "aliases stand for more than 100,000 values" in err


def test_aliases_of_a_usual_size_are_taken(tmp_path):
    text = "train: &rates {lr: 0.002, critic_lr: 0.003}\nwarm_start: {lr: &r 0.5}\nreward: {success: *r}\n"
    config = parse("--config", write(tmp_path / "a.yaml", text))
    assert (config.train.critic_lr, config.reward.success) == (0.003, 0.5)


def test_a_file_too_large_for_options(tmp_path, capsys):
    assert "larger than 500,000 bytes" in refused(capsys, "--config", "/dev/zero")


def test_a_bad_file_is_named(tmp_path, capsys):
    file = write(tmp_path / "bad.yaml", "train: {uptates: 3}")
    assert file in refused(capsys, "--config", file)


def test_a_missing_file_and_a_folder(tmp_path, capsys):
    assert "cannot be read (No such file" in refused(
        capsys, "--config", str(tmp_path / "none.yaml")
    )
    assert "cannot be read (Is a directory" in refused(capsys, "--config", str(tmp_path))


def test_bytes_that_are_no_text(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "not valid YAML" in refused(capsys, "--config", str(tmp_path / "bad.yaml"))


def test_an_empty_file_changes_nothing(tmp_path):
    assert parse("--config", write(tmp_path / "empty.yaml", "")) == parse()


def test_yaml_null_lists_and_yes(tmp_path):
    file = write(
        tmp_path / "a.yaml",
        "env: {task_types: null}\nwarm_start: {enabled: yes}\ntrain: {value_coef: [1, 2, 3]}\n",
    )
    config = parse("--config", file)
    assert config.env.task_types is None
    assert config.warm_start.enabled == "yes"  # YAML reads a bare yes as true
    assert config.train.value_coef == [1.0, 2.0, 3.0]


def test_the_written_file_reads_back_equal(tmp_path):
    config = resolve(
        given={
            "train.lr": 1e-7,
            "env.task_types": ["look_at_obj_in_light"],
            "run.name": "Küche",
            "reward.keep": -0.3,
        },
    )
    write_config(config, tmp_path)
    assert resolve([tmp_path / "config.yaml"]) == config
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text())) == [
        *(
            "env",
            "agent",
            "model",
            "rollout",
            "reward",
            "advantage",
            "train",
            "warm_start",
            "eval",
            "run",
            "plan",
        )
    ]


# What "auto" means.


def test_auto_environment_and_style(monkeypatch):
    config = resolve()
    assert (config.env.name, config.agent.style) == ("household", "compact")
    monkeypatch.setenv("ALFWORLD_DATA", "somewhere")
    assert resolve().env.name == "alfworld"
    pretrained = {"env.name": "household", "model.path": "some/model"}
    assert resolve(given=pretrained).agent.style == "reference"
    for style in ("compact", "transcript"):
        assert resolve(given={"agent.style": style}).agent.style == style


def test_only_the_tiny_model_is_warm_started():
    assert resolve().warm_start.enabled == "yes"
    assert resolve(given={"model.path": "some/model"}).warm_start.enabled == "no"
    assert resolve(given={"warm_start.enabled": "no"}).warm_start.enabled == "no"


def test_pretrained_models_are_in_bfloat16_on_a_gpu(monkeypatch):
    def find_dtype(**given):
        given = {"model.path": "some/model"} | {k.replace("__", "."): v for k, v in given.items()}
        return resolve(given={"env.name": "household", **given}).model.dtype

    assert find_dtype(model__device="cpu") == "float32"
    assert find_dtype(model__device="cpu", plan__gpu="h100") == "bfloat16"
    for native in (True, False):  # in the GPU's own operations, or emulated
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native
        )
        assert find_dtype() == ("bfloat16" if native else "float32")
        assert find_dtype(model__dtype="float32") == find_dtype(model__device="cpu") == "float32"
        assert find_dtype(model__path="tiny") == "float32"


def test_no_auto_is_left_but_the_name_of_a_run_that_has_none_yet(monkeypatch):
    for terminal, display in ((True, "panel"), (False, "plain")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        config = resolve()
        left = [name for name, value in flatten(config).items() if value == "auto"]
        assert left == ["run.name"] and config.run.display == display


def test_what_belongs_to_the_machine_is_not_taken_from_a_run(tmp_path):
    write_config(resolve(given={"run.display": "none", "train.updates": 3}), tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("device: cpu", "device: cuda:7"))
    config = configure.parse([], program="eval", description="", run=tmp_path / "config.yaml")
    assert (
        config.train.updates == 3
        and config.model.device != "cuda:7"
        and config.run.display != "none"
    )
    assert resolve([tmp_path / "config.yaml"]).model.device == "cuda:7", (
        "a file that is asked for counts whole"
    )


def test_a_runs_own_environment_counts_where_it_is_played_again(tmp_path):
    """And what a run knew that this environment does not have is left out."""
    write_config(resolve(given={"env.name": "webshop", "env.max_turns": 4}), tmp_path)
    file = tmp_path / "config.yaml"
    own = list(configure.read_file(file))
    assert resolve(own=own).env == resolve([file]).env and resolve(own=own).env.max_turns == 4
    other = resolve(given={"env.name": "household"}, own=own)
    assert other.env == resolve(given={"env.name": "household"}).env
    limits = {"max_prompt_tokens": 384, "max_response_tokens": 28, "fallback": 30}
    assert other.agent == dataclasses.replace(resolve([file]).agent, **limits)
    file.write_text(file.read_text().replace("env:", "env:\n  size: large"))
    assert resolve(own=list(configure.read_file(file))).env.max_turns == 4
    with pytest.raises(ConfigError, match="unknown option 'env.size'"):
        resolve([file])


# Defaults follow the model.

PAPER = {"alfworld": ["alfworld"], "webshop": ["webshop"], "household": ["hiper-reference"]}


def tell(config, *but):
    """All settings but those of `but`, sections or options."""
    return {name: value for name, value in flatten(config).items() if not name.startswith(but)}


@pytest.mark.parametrize("name", PAPER)
def test_a_pretrained_model_has_the_papers_settings_of_its_environment(name):
    config = resolve(given={"env.name": name, "model.path": "some/model"})
    paper = resolve(PAPER[name], {"env.name": name})
    assert tell(config, "model.path", "plan.") == tell(paper, "model.path", "plan.")
    assert (config.train.lr, config.agent.max_response_tokens) == (1e-6, 512)
    assert config.agent.max_prompt_tokens == (4096 if name == "webshop" else 2048)
    assert config.plan == resolve(given={"env.name": name}).plan, (
        "which is told of the paper's runs"
    )


def test_what_is_told_goes_over_the_papers_settings(tmp_path):
    file = write(
        tmp_path / "a.yaml", "agent: {max_prompt_tokens: 1000}\nmodel: {path: some/model}\n"
    )
    config = resolve([file], {"train.lr": 3e-6, "train.minibatches": 4})
    assert (config.agent.max_prompt_tokens, config.train.lr) == (1000, 3e-6)
    assert (config.train.minibatches, config.train.minibatch_size) == (4, 0)
    both = {"model": "some/model", "train.minibatches": 4, "train.minibatch_size": 64}
    assert resolve(given=both).train.minibatch_size == 64
    assert resolve([file], {"model": "tiny"}).train.lr == resolve().train.lr


def save_checkpoint(folder: Path, *, config=None, weights=True) -> Path:
    """What tells a checkpoint's kind: the model's configuration, and that of its run."""
    folder.mkdir(parents=True)
    if weights:
        build_model(load_tokenizer(families.find("household").tokenizer), 0).config.save_pretrained(
            folder
        )
    if config:
        (folder / "hiper_fast.yaml").write_text(format_config(config))
    return folder


@pytest.mark.parametrize("weights, told", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", PAPER)
def test_a_checkpoint_of_the_tiny_model_keeps_the_tiny_models_settings(
    tmp_path, name, weights, told
):
    own = resolve(given={"env.name": "household"}) if told else None
    folder = save_checkpoint(tmp_path / "step-000010", config=own, weights=weights)
    config = resolve(given={"env.name": name, "model.path": str(folder)})
    tiny = resolve(given={"env.name": name})
    assert tell(config, "model.path", "warm_start.enabled") == tell(
        tiny, "model.path", "warm_start.enabled"
    )
    assert (config.agent.style, config.warm_start.enabled) == ("compact", "no")


def test_a_checkpoint_of_a_pretrained_model_has_the_papers_settings(tmp_path):
    own = resolve(given={"model.path": "some/model"})
    folder = save_checkpoint(tmp_path / "step-000010", config=own, weights=False)
    assert resolve(given={"model.path": str(folder)}).train.lr == 1e-6


def play_elsewhere(tmp_path, capsys, env, trained):
    """The configuration that plays a run's checkpoint in `env`, and what is said of it."""
    folder = save_checkpoint(
        tmp_path / "step-000010", config=resolve(given=trained), weights=trained["model"] == "tiny"
    )
    config = configure.parse(
        [f"--env={env}", f"--model={folder}"],
        program="eval",
        description="",
        run=folder / "hiper_fast.yaml",
    )
    return config, capsys.readouterr().out


def test_a_checkpoint_in_another_environment_has_that_ones_own_limits(tmp_path, capsys):
    trained = {
        "env": "household",
        "model": "tiny",
        "agent.max_prompt_tokens": 300,
        "agent.history": 3,
    }
    config, said = play_elsewhere(tmp_path, capsys, "webshop", trained)
    assert (config.agent.max_prompt_tokens, config.agent.fallback, config.eval.episodes) == (
        512,
        20,
        500,
    )
    assert config.env == resolve(given={"env": "webshop"}).env
    assert (config.agent.history, config.agent.style) == (3, "compact"), (
        "how the model was taught to read"
    )
    assert said == "This checkpoint was trained on household; the settings of webshop apply.\n"


def test_a_pretrained_models_checkpoint_in_another_environment(tmp_path, capsys):
    trained = {
        "env": "webshop",
        "model": "some/model",
        "model.critic": "shared",
        "agent.max_response_tokens": 99,
    }
    config, said = play_elsewhere(tmp_path, capsys, "alfworld", trained)
    assert (config.agent.max_prompt_tokens, config.agent.max_response_tokens) == (2048, 512)
    assert (config.reward.keep, config.advantage.bootstrap, config.eval.episodes) == (
        -0.3,
        "reference",
        140,
    )
    assert config.model.critic == "shared" and "was trained on webshop" in said


def test_a_checkpoint_in_its_own_environment_keeps_all_of_its_settings(tmp_path, capsys):
    trained = {
        "env": "webshop",
        "model": "tiny",
        "agent.max_prompt_tokens": 300,
        "eval.episodes": 7,
    }
    config, said = play_elsewhere(tmp_path, capsys, "webshop", trained)
    assert (config.agent.max_prompt_tokens, config.eval.episodes, said) == (300, 7, "")


def test_a_run_that_goes_on_elsewhere_says_where_it_was_trained(tmp_path, capsys):
    folder = tmp_path / "mine"
    begin(folder)
    write_config(resolve(given={"env": "household", "agent.max_prompt_tokens": 300}), folder)
    more = f"--run.folder={tmp_path}", "--name=mine", "--resume"
    assert parse(*more, "--env=webshop").agent.max_prompt_tokens == 512
    assert "trained on household; the settings of webshop apply" in capsys.readouterr().out
    assert parse(*more).agent.max_prompt_tokens == 300
    assert capsys.readouterr().out == ""


# Run folders.


def run(tmp_path, name="auto", resume=False, seed=0):
    return resolve(
        given={
            "run.folder": str(tmp_path),
            "run.name": name,
            "run.resume": resume,
            "run.seed": seed,
        }
    )


def begin(folder: Path, text=""):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(text)


def test_automatic_names_are_numbered(tmp_path):
    assert find_run_folder(run(tmp_path)) == tmp_path / "household-seed0"
    begin(tmp_path / "household-seed0")
    assert find_run_folder(run(tmp_path)) == tmp_path / "household-seed0-2"
    begin(tmp_path / "household-seed0-2")
    assert find_run_folder(run(tmp_path)) == tmp_path / "household-seed0-3"
    assert find_run_folder(run(tmp_path, seed=1)) == tmp_path / "household-seed1"


def test_a_folder_that_is_no_run_is_not_written_into(tmp_path):
    (tmp_path / "household-seed0").mkdir()
    assert find_run_folder(run(tmp_path)) == tmp_path / "household-seed0-2"
    with pytest.raises(ConfigError, match="--resume: there is no run"):
        find_run_folder(run(tmp_path, resume=True))


def test_a_taken_name_is_refused_with_two_ways_out(tmp_path):
    assert find_run_folder(run(tmp_path, "mine")) == tmp_path / "mine"
    begin(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"--name: the run .*mine exists; .*--resume"):
        find_run_folder(run(tmp_path, "mine"))


def test_resume_finds_the_newest_automatic_run(tmp_path):
    begin(tmp_path / "household-seed0")
    assert find_run_folder(run(tmp_path, resume=True)) == tmp_path / "household-seed0"
    begin(tmp_path / "household-seed0-2")
    assert find_run_folder(run(tmp_path, resume=True)) == tmp_path / "household-seed0-2"
    begin(tmp_path / "mine")
    assert find_run_folder(run(tmp_path, "mine", resume=True)) == tmp_path / "mine"
    with pytest.raises(ConfigError, match="there is no run .*household-seed7"):
        find_run_folder(run(tmp_path, resume=True, seed=7))


def test_resume_reads_the_runs_own_options_below_the_command_line(tmp_path, capsys):
    begin(tmp_path / "mine", "train: {updates: 9, episodes: 3}\n")
    config = parse("--resume", "--name", "mine", "--run.folder", str(tmp_path), "--updates", "12")
    assert (config.train.updates, config.train.episodes) == (12, 3)
    assert config.run.resume and find_run_folder(config) == tmp_path / "mine"
    assert "there is no run" in refused(
        capsys, "--resume", "--name", "other", "--run.folder", str(tmp_path)
    )


@pytest.mark.parametrize(
    "recipe",
    sorted([*RECIPES.glob("*.yaml"), *RECIPES.parent.glob("envs/*/defaults.yaml")]),
    ids=str,
)
def test_recipes_load(recipe):
    environment = recipe.parent.name if recipe.stem == "defaults" else "auto"
    resolve([recipe], {"env.name": environment} if environment != "auto" else {})


# The reference's settings, and the table that tells of them.


def read_departures():
    """Option -> (the reference's value, WebShop's, ours), as docs/hiper.md has them."""
    text = (Path(__file__).parents[1] / "docs" / "hiper.md").read_text()
    section = text.split("## Where we differ from the reference")[1]
    table = {}
    for row in section.splitlines():
        if row.startswith("| `"):
            option, there, here, _ = (cell.strip() for cell in row.strip("|").split("|"))
            there, _, shop = there.partition("; webshop ")
            table[option.strip("`")] = (there, shop or there, here)
    return table


def test_the_table_has_every_option_in_which_the_reference_and_our_defaults_differ():
    ours, there = flatten(Config()), flatten(resolve(["hiper-reference"]))
    said = {name for _, name, _ in configure.read_file("hiper-reference")}
    assert {name for name in said if there[name] != ours[name]} == read_departures().keys()


def test_the_table_has_the_values_of_recipes_and_defaults():
    ours = flatten(Config())
    recipes = [flatten(resolve([name])) for name in ("hiper-reference", "alfworld", "webshop")]
    for name, (there, shop, here) in read_departures().items():
        read = [convert(OPTIONS[name], OPTIONS[name].kind, said) for said in (there, there, shop)]
        assert read == [recipe[name] for recipe in recipes], name
        assert convert(OPTIONS[name], OPTIONS[name].kind, here) == ours[name], name
