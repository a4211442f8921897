"""Options: from YAML and the command line into typed dataclasses, with an error that names the bad one."""

from pathlib import Path

import pytest
import yaml

from hiper_fast import config as configuration
from hiper_fast.config import (
    CHOICES,
    NON_NEGATIVE,
    POSITIVE,
    SHORT,
    UNIT_INTERVAL,
    Config,
    ConfigError,
    check,
    environment,
    flatten,
    options,
    prompt_style,
    resolve,
    run_folder,
    write_file,
)


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)


def parse(*argv):
    return configuration.parse(list(argv), program="train", description="Trains.")


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
    assert parse() == Config()


def test_options_set_their_fields():
    config = parse("--train.lr", "1e-6", "--train.updates=7", "--env.size", "medium", "--reward.invalid", "-0.5")
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
        ("train.updates", "many", "int"),
        ("train.updates", "1.5", "int"),
        ("train.lr", "fast", "float"),
        ("train.lr", "nan", "float"),
        ("advantage.normalize", "perhaps", "bool"),
        ("train.value_coef", "1,two,3", "float"),
    ],
)
def test_wrong_types_name_option_and_type(capsys, name, value, expected):
    err = refused(capsys, f"--{name}", value)
    assert name in err and f"expected {expected}" in err and value.split(",")[-1][:3] in err + value
    assert err.count("\n") == 1


def test_a_missing_value_is_one_clear_line(capsys):
    err = refused(capsys, "--train.lr")
    assert "--train.lr" in err and "expected one argument" in err
    assert len(err.splitlines()) <= 2, "the usage of all options buries the message"


@pytest.mark.parametrize("name", POSITIVE)
def test_positive_options_refuse_zero(name):
    with pytest.raises(ConfigError, match=rf"{name}: must be above 0"):
        resolve([], {name: 0})


@pytest.mark.parametrize("name", NON_NEGATIVE)
def test_non_negative_options_refuse_minus_one(name):
    with pytest.raises(ConfigError, match=f"{name}: must not be negative"):
        resolve([], {name: -1})
    resolve([], {name: 0})


@pytest.mark.parametrize("name", UNIT_INTERVAL)
def test_unit_interval_options_refuse_two(name):
    with pytest.raises(ConfigError, match=rf"{name}: must lie in \[0, 1\]"):
        resolve([], {name: 2})
    resolve([], {name: 0})
    if name != "warm_start.noise":
        resolve([], {name: 1})


def test_noise_on_every_turn_would_leave_nothing_to_imitate():
    with pytest.raises(ConfigError, match="warm_start.noise: must be below 1"):
        resolve([], {"warm_start.noise": 1})


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_listed(name):
    with pytest.raises(ConfigError, match=name) as caught:
        resolve([], {name: "neither"})
    assert all(choice in str(caught.value) for choice in CHOICES[name])
    for choice in CHOICES[name]:
        assert flatten(resolve([], {name: choice}))[name] == choice


def test_value_coef_has_three_entries():
    with pytest.raises(ConfigError, match="train.value_coef"):
        resolve([], {"train.value_coef": "1,2"})


def test_dual_clip_of_one_would_clip_every_loss():
    with pytest.raises(ConfigError, match="train.dual_clip: must be above 1"):
        resolve([], {"train.dual_clip": 1})


def test_the_lists_of_ranges_name_options_that_exist():
    assert {*POSITIVE, *NON_NEGATIVE, *UNIT_INTERVAL, *CHOICES, *SHORT.values()} <= set(options())
    check(Config())


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    flat = flatten(Config())
    for name, (_, text) in options().items():
        assert f"--{name}" in out
        assert text.split()[0] in out
    assert all(f"--{short}" in out for short in SHORT) and "--config" in out
    assert str(flat["train.lr"]) in out and "Trains." in out


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
    good, bad = write(tmp_path / "a.yaml", "train: {updates: 3}"), write(tmp_path / "b.yaml", "train: {uptates: 3}")
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


@pytest.mark.parametrize(
    "text, message",
    [
        ("train: {uptates: 3}", "unknown option 'train.uptates'; did you mean train.updates"),
        ("trian: {updates: 3}", "did you mean train.updates"),
        ("train: {updates: soon}", "train.updates: expected int, got 'soon'"),
        ("train: {updates: 1.5}", "train.updates: expected int"),
        ("train: {updates: .inf}", "train.updates: expected int"),
        ("train: {updates: null}", "train.updates: expected int"),
        ("train: {updates: true}", "train.updates: expected int"),
        ("train: {updates: [1]}", "train.updates: expected int"),
        ("train: {value_coef: 3}", "train.value_coef: expected a list"),
        ("advantage: {gamma: 1.5}", "advantage.gamma: must lie in"),
        ("updates: 3", "expected sections"),
        ("train:", "expected sections"),
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


def test_a_bad_file_is_named(tmp_path, capsys):
    file = write(tmp_path / "bad.yaml", "train: {uptates: 3}")
    assert file in refused(capsys, "--config", file)


def test_a_missing_file_and_a_folder(tmp_path, capsys):
    assert "cannot be read (No such file" in refused(capsys, "--config", str(tmp_path / "none.yaml"))
    assert "cannot be read (Is a directory" in refused(capsys, "--config", str(tmp_path))


def test_bytes_that_are_no_text(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "not valid YAML" in refused(capsys, "--config", str(tmp_path / "bad.yaml"))


def test_an_empty_file_changes_nothing(tmp_path):
    assert parse("--config", write(tmp_path / "empty.yaml", "")) == Config()


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
        [],
        {
            "train.lr": 1e-7,
            "env.task_types": ["look_at_obj_in_light"],
            "run.name": "Küche",
            "reward.keep": -0.3,
        },
    )
    write_file(config, tmp_path / "config.yaml")
    assert resolve([tmp_path / "config.yaml"], {}) == config
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text())) == [
        *("env", "agent", "model", "reward", "advantage", "train", "warm_start", "eval", "run", "plan")
    ]


# What "auto" means.


def test_auto_environment_and_style(monkeypatch):
    config = Config()
    assert environment(config) == "household" and prompt_style(config) == "compact"
    monkeypatch.setenv("ALFWORLD_DATA", "somewhere")
    assert environment(config) == "alfworld"
    config.env.name, config.model.path = "household", "some/model"
    assert environment(config) == "household" and prompt_style(config) == "reference"
    for style in ("compact", "transcript"):
        config.agent.style = style
        check(config)
        assert prompt_style(config) == style


# Run folders.


def run(tmp_path, name="auto", resume=False, seed=0):
    return resolve([], {"run.folder": str(tmp_path), "run.name": name, "run.resume": resume, "run.seed": seed})


def begin(folder: Path, text=""):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(text)


def test_automatic_names_are_numbered(tmp_path):
    assert run_folder(run(tmp_path)) == tmp_path / "household-seed0"
    begin(tmp_path / "household-seed0")
    assert run_folder(run(tmp_path)) == tmp_path / "household-seed0-2"
    begin(tmp_path / "household-seed0-2")
    assert run_folder(run(tmp_path)) == tmp_path / "household-seed0-3"
    assert run_folder(run(tmp_path, seed=1)) == tmp_path / "household-seed1"


def test_a_folder_that_is_no_run_is_not_written_into(tmp_path):
    (tmp_path / "household-seed0").mkdir()
    assert run_folder(run(tmp_path)) == tmp_path / "household-seed0-2"
    with pytest.raises(ConfigError, match="--resume: there is no run"):
        run_folder(run(tmp_path, resume=True))


def test_a_taken_name_is_refused_with_two_ways_out(tmp_path):
    assert run_folder(run(tmp_path, "mine")) == tmp_path / "mine"
    begin(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"--name: the run .*mine exists; .*--resume"):
        run_folder(run(tmp_path, "mine"))


def test_resume_finds_the_newest_automatic_run(tmp_path):
    begin(tmp_path / "household-seed0")
    assert run_folder(run(tmp_path, resume=True)) == tmp_path / "household-seed0"
    begin(tmp_path / "household-seed0-2")
    assert run_folder(run(tmp_path, resume=True)) == tmp_path / "household-seed0-2"
    begin(tmp_path / "mine")
    assert run_folder(run(tmp_path, "mine", resume=True)) == tmp_path / "mine"
    with pytest.raises(ConfigError, match="there is no run .*household-seed7"):
        run_folder(run(tmp_path, resume=True, seed=7))


def test_resume_reads_the_runs_own_options_below_the_command_line(tmp_path, capsys):
    begin(tmp_path / "mine", "train: {updates: 9, episodes: 3}\n")
    config = parse("--resume", "--name", "mine", "--run.folder", str(tmp_path), "--updates", "12")
    assert (config.train.updates, config.train.episodes) == (12, 3)
    assert config.run.resume and run_folder(config) == tmp_path / "mine"
    assert "there is no run" in refused(capsys, "--resume", "--name", "other", "--run.folder", str(tmp_path))


@pytest.mark.parametrize(
    "recipe", sorted(Path(configuration.__file__).parent.glob("recipes/*.yaml")), ids=lambda p: p.stem
)
def test_recipes_load(recipe):
    configuration.resolve([recipe], {})
