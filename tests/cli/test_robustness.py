"""`psa-fast robustness` on a tiny model: a report, an interrupted run that goes on, and what is refused."""

import json

import pytest

from psa_fast import cli
from psa_fast.attacks import cloak, measure
from psa_fast.attacks.conditions import conditions
from psa_fast.attacks.robustness_report import JSON, PAGE
from psa_fast.cli.robustness import PART


@pytest.fixture
def run(world, tmp_path, capsys):
    """Run the command on one add-on of the tiny world; returns the exit code and what stands on stderr."""

    def go(*options):
        stage = f"stage1={world / 'run' / 'stage1'}"
        given = ("--data", world / "data", "--stage", stage, "--out", tmp_path, "--max_new_tokens", 2, *options)
        code = cli.main(["robustness", *map(str, given)])
        return code, capsys.readouterr().err

    return go


def test_an_interrupted_run_goes_on_where_it_was(run, tmp_path, monkeypatch):
    whole, asked = measure.measure, []

    def stops(guard, stage, condition, *rest, **more):
        asked.append((stage, "none" if condition is None else condition.name))
        if asked[-1] == ("stage1", chosen[1]):
            raise KeyboardInterrupt
        return whole(guard, stage, condition, *rest, **more)

    chosen = ["none", *(condition.name for condition in conditions(["pictures"]))]
    monkeypatch.setattr(measure, "measure", stops)
    assert run("--suite", "pictures", "--limit", 1)[0] == 130
    assert not (tmp_path / JSON).exists()
    before = (tmp_path / PART).read_text()
    monkeypatch.setattr(measure, "measure", lambda *given, **more: (asked.append(given[1:3]), whole(*given, **more))[1])
    asked.clear()
    assert run("--suite", "pictures", "--limit", 1)[0] == 0
    # the plain results, which the others are compared with, are taken again; of the base nothing is left to do
    assert [(stage, one.name if one else "none") for stage, one in asked] == [("stage1", name) for name in chosen]
    assert before.splitlines()[0] in json.dumps(json.loads((tmp_path / JSON).read_text())["provenance"]["settings"])
    rows = json.loads((tmp_path / JSON).read_text())["rows"]
    assert {(row["stage"], row["condition"]) for row in rows} >= {("stage1", name) for name in chosen}
    assert all(name in (tmp_path / PAGE).read_text() for name in chosen[1:])
    code, error = run("--suite", "pictures", "--limit", 2)
    assert (code, "is of other data or settings" in error) == (2, True)


def test_a_cloak_is_fitted_on_one_world_and_tried_on_another(run, world, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(world / "data", other)
    rows = (other / "test.jsonl").read_text().splitlines()
    (other / "test.jsonl").write_text("\n".join(rows[1:]) + "\n")
    assert run("--suite", "cloak", "--fit_data", other, "--limit", 2)[0] == 0
    rows = json.loads((tmp_path / JSON).read_text())["rows"]
    fitted = {row["condition"]: row for row in rows if row["condition"].startswith(cloak.FITTED)}
    assert [row["lost"]["n"] > 0 for row in fitted.values()] == [True, True]
    tried = {(row["condition"], row["group"]): row for row in rows if row["condition"] in cloak.NAMES}
    assert {group for _, group in tried} >= {"risk", "clean"}
    assert all(tried[name, "risk"]["n"] == 2 for name in cloak.NAMES)
    assert (tmp_path / "got_through" / "stage1-cloak.png").is_file()


def test_heads_alone_find_what_they_find_with_answers(run, world, tmp_path, capsys):
    stage, out = f"stage1={world / 'run' / 'stage1'}", tmp_path / "alone"
    given = ("--data", world / "data", "--stage", stage, "--out", out, "--suite", "pictures", "--limit", 1)
    assert cli.main(["robustness", "--concepts_only", *map(str, given)]) == 0
    assert run("--suite", "pictures", "--limit", 1)[0] == 0
    alone, whole = (json.loads((folder / JSON).read_text())["rows"] for folder in (out, tmp_path))
    answers = ("attack_success", "refused", "accuracy", "seconds", "cpu_seconds")
    kept = [{name: row[name] for name in row if name not in answers} for row in whole if row["stage"] != "base"]
    assert [{name: row[name] for name in row if "seconds" not in name} for row in alone] == kept


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--suite", "nature"], "--suite 'nature'"),
        (["--limit", "0"], "--limit is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--stage", "stage1"], "--stage 'stage1'"),
        (["--suite", "pixels", "--surrogate", "x=nowhere"], "--surrogate x: nowhere holds no psa_config.json"),
        (["--suite", "natural", "--surrogate", "x=nowhere"], "--surrogate x: nowhere"),
        (["--split", "dev"], "dev.jsonl"),
        (["--suite", "cloak"], "the suite cloak and --fit_data need one another"),
        (["--suite", "text", "--fit_data", "DATA"], "the suite cloak and --fit_data need one another"),
        (["--suite", "cloak", "--fit_data", "DATA"], "a cloak is fitted on others"),
        (["--suite", "text,pixels", "--concepts_only"], "--concepts_only does nothing for the suite pixels"),
        (["--suite", "text", "--concepts_only"], "--max_new_tokens does nothing with --concepts_only"),
        (["--suite", "cloak", "--fit_data", "nowhere"], "--fit_data nowhere: there is no file"),
        (["--suite", "text,text"], "--suite 'text,text': a suite is named twice"),
        (["--suite", "text", "--budget", "quick"], "--budget is of attacks on pixels, and none of pixels, joint"),
    ],
)
def test_what_cannot_be_measured_is_named_before_a_model_is_loaded(run, world, monkeypatch, options, named):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("psa_fast.safety.load.load_guard", load)
    monkeypatch.setattr("psa_fast.safety.load.load_plain", load)
    code, error = run(*(world / "data" if option == "DATA" else option for option in options))
    assert (code, named in error) == (2, True), error
