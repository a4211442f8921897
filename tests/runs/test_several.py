"""Several runs in one page: which of them are seeds of one arm, how arms are named, and what is refused."""

import pytest
import yaml
from helpers import Page
from test_comparison import panel, write_run

from hiper_fast.report import main
from hiper_fast.runs.several import build_several, group_runs, read_options

pytest.importorskip("scipy")


def make_run(folder, seed=0, last=6, **options):
    """A run of one update; `train__lr=1` is train.lr."""
    write_run(folder, [panel(2), panel(last)], [10])
    sections = {
        "env": {"name": "household"},
        "advantage": {"estimator": "hae"},
        "model": {"path": "tiny", "device": "cpu"},
        "eval": {"panel": "test", "episodes": 10},
        "run": {"seed": seed, "name": folder.name},
    }
    for name, value in options.items():
        section, key = name.split("__")
        sections.setdefault(section, {})[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    return folder


@pytest.fixture
def runs(tmp_path):
    own = [make_run(tmp_path / f"hae-seed{seed}", seed, 6 + seed) for seed in (0, 1)]
    gae = {"advantage__estimator": "gae", "model__device": "cuda"}
    return own + [make_run(tmp_path / f"gae-seed{seed}", seed, 4 + seed, **gae) for seed in (0, 1)]


def group(runs):
    return group_runs({run: read_options(run) for run in runs})


def test_seeds_and_estimators_are_one_page(runs, tmp_path, capsys):
    assert main([str(run) for run in runs]) == 0
    target = tmp_path / "compared" / "report.html"
    assert capsys.readouterr().out.strip() == str(target)
    page = Page(target.read_text())
    assert [tag for tag, _ in page.tags].count("figure") == 3
    for text in ("gae against hae: −20.0", "65.0 %", "45.0 %", "seeds 0, 1"):
        assert text in page.text, text
    assert (tmp_path / "compared" / "results.md").exists()
    assert main([*map(str, runs), "--folder", str(tmp_path / "own")]) == 0
    assert (tmp_path / "own" / "report.html").exists()


def test_seeds_alone_are_one_arm(runs):
    assert group(runs[:2]) == {"hae": {0: runs[0], 1: runs[1]}}
    assert "hae" in Page(build_several(runs[:2]).read_text()).text


def test_engines_on_other_machines_are_one_arm(tmp_path, capsys):
    """Their own options of the machine tell runs apart no more than the common ones do."""
    paged, small = {"rollout__engine": "paged"}, {"rollout__cache_gb": 0.5, "model__device": "cuda"}
    same = [make_run(tmp_path / "a", 0, **paged), make_run(tmp_path / "b", 1, **paged | small)]
    assert main([*map(str, same), "--folder", str(tmp_path / "own")]) == 0
    assert "seeds 0, 1" in Page((tmp_path / "own" / "report.html").read_text()).text
    foreign = {"rollout__engine": "nowhere:Engine", "rollout__rooms": 2}
    others = [make_run(tmp_path / f"c{seed}", seed, **foreign) for seed in (0, 1)]
    assert main([*map(str, others), "--folder", str(tmp_path / "own")]) == 0, "not to be had here"


def test_a_warm_starts_folder_is_the_same_for_all_seeds(tmp_path):
    paths = [f"runs/study/warm-start-abc-seed{seed}/checkpoints/step-000000" for seed in (1, 10)]
    own = [
        make_run(tmp_path / f"r{seed}", seed, model__path=path)
        for seed, path in zip((1, 10), paths, strict=True)
    ]
    assert list(group(own)["hae"]) == [1, 10]


def test_arms_are_named_by_what_tells_them_apart(tmp_path):
    one, two = make_run(tmp_path / "a"), make_run(tmp_path / "b", train__lr=1e-3)
    assert list(group([one, two])) == ["train.lr None", "train.lr 0.001"]
    options = {f"train__{name}": 1 for name in ("lr", "critic_lr", "beta2", "eps")}
    three = make_run(tmp_path / "c-seed0", **options)
    assert list(group([one, three])) == ["a", "c"]


def test_what_does_not_go_together_is_named(runs, tmp_path, capsys):
    again = make_run(tmp_path / "hae-seed0-2")
    tuned = make_run(tmp_path / "tuned", eval__panel="tune")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.yaml").write_text("- 1\n")
    bare = make_run(tmp_path / "bare", 7)
    (bare / "metrics.jsonl").write_text("")
    for other, said in (
        (again, "are the same but for their names; leave one out"),
        (tuned, "has eval.panel tune"),
        (tmp_path / "empty", "config.yaml: cannot be read"),
        (tmp_path / "odd", "config.yaml: cannot be read"),
        (bare, "it has no evaluation yet"),
    ):
        assert main([str(runs[0]), str(other)]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, said
    assert main([str(runs[0]), "--folder", "x"]) == 2
    assert "--folder" in capsys.readouterr().err
