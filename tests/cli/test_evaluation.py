"""`psa-fast evaluate` on a tiny model, from records to report."""

import json
from argparse import ArgumentParser

import pytest
from builders.metrics import REQUIRED, REQUIRED_HEAD
from builders.tiny_llava import build_addon, build_base

from psa_fast.cli import main
from psa_fast.cli.evaluation import register
from psa_fast.cli.sources import find_data, plan, spread
from psa_fast.data.records import read_records


def test_spread_keeps_every_group_of_a_sorted_file():
    assert spread(list("aaabbbccc"), 3) == ["a", "b", "c"]
    assert spread([1, 2], 5) == spread([1, 2], None) == [1, 2]


def run(*argv):
    parser = ArgumentParser()
    register(parser.add_subparsers())
    args = parser.parse_args(["evaluate", *map(str, argv)])
    return args.func(args)


def test_command_writes_the_report(world, tmp_path):
    extra = f"first={world / 'run' / 'stage1'}"
    common = ("--data", world / "data", "--run", world / "run", "--max_new_tokens", 4, "--batch_size", 8)
    assert run(*common, "--stage", extra, "--thresholds", "--out", tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["stages"]) == ["base", "stage1", "stage2", "first"]
    for stage, metrics in report["stages"].items():
        assert set(metrics) >= (REQUIRED if stage == "base" else REQUIRED | REQUIRED_HEAD)
        for estimate in metrics.values():
            assert set(estimate) - {"reason"} == {"value", "low", "high", "n"}
            if estimate["value"] is not None:
                assert estimate["low"] <= estimate["value"] <= estimate["high"]
    base = report["stages"]["base"]
    assert base["attack_success"] == base["attack_success_unguarded"]
    assert not set(base) & REQUIRED_HEAD
    assert report["stages"]["first"] == report["stages"]["stage1"]
    provenance = report["provenance"]
    assert provenance["data"]["groups"] == dict.fromkeys(sorted(METRICS_GROUPS), 4)
    for key in ("refusal", "decoding", "policy", "versions", "hardware", "bootstrap", "date"):
        assert provenance[key]
    assert provenance["refusal"]["list"] == "psa2"
    text = (tmp_path / "report.md").read_text()
    labelled = provenance["refusal"]["on_labelled_answers"]
    right, total = labelled["refusal"]["refusal"], sum(labelled["refusal"].values())
    assert f"this list finds {right} of {total} refusals" in text
    assert provenance["stages"]["stage1"]["neutral_question"] is None  # the learned query asks alone
    for word in (*REQUIRED, *REQUIRED_HEAD, "`psa2`", "contains", provenance["data"]["sha256"], "| base | stage1 |"):
        assert word in text
    rows = [json.loads(line) for line in (tmp_path / "answers-stage2.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    for row in rows:
        assert row["highest_score"] >= row["unsafe_score"] > 0
        assert sum(row["type_probs"]) == pytest.approx(1.0)
    curve = report["thresholds"]["stage2"]
    assert curve["threshold"] == sorted({row["highest_score"] for row in rows})
    assert (curve["risky"], curve["harmless"], report["thresholds"]["base"]) == (8, 12, None)
    assert list(report["differences"])[:3] == ["stage1 - base", "stage2 - stage1", "stage2 - base"]
    for stage in provenance["stages"].values():
        assert stage["batch_seconds"]["batches"] == 3
        assert 0 < stage["batch_seconds"]["p50"] <= stage["batch_seconds"]["p95"]
    page = (tmp_path / "report.html").read_text()
    assert "stage1" in page
    assert "data:image/png" in page
    assert "cannot be read" not in page

    # the same again, in other batches, is the same report
    assert run(*common[:-1], 3, "--out", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    # so that a report of a version without the option is replaced by the same command
    assert set(provenance["settings"]) - set(again["provenance"]["settings"]) == {"thresholds"}
    assert "thresholds" not in again
    for name, estimate in again["stages"]["stage2"].items():
        assert estimate == pytest.approx(report["stages"]["stage2"][name], abs=1e-6), name


def rows_of(world):
    return [json.loads(line) for line in (world / "data" / "test.jsonl").read_text().splitlines()]


def data_with(world, tmp_path, rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return "--data", file, "--image_folder", world / "data", "--max_new_tokens", 3


@pytest.fixture
def no_model(monkeypatch):
    for name in ("load_guard", "load_plain"):
        monkeypatch.setattr(f"psa_fast.safety.load.{name}", lambda *args: pytest.fail("a model was loaded"))


def spoil(rows, line, change):
    rows = json.loads(json.dumps(rows))
    rows[line - 1] = {**rows[line - 1], **change}
    return rows


TURNS = [{"from": "user", "value": "<image>\nwhat is it ?"}, {"from": "assistant", "value": "red"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": [{**TURNS[0], "value": "<image>" + "circle " * 300}, TURNS[1]]}, r"7: the prompt has 3\d\d"),
        # it fits, and would not with the longest hint before it
        ({"conversations": [{**TURNS[0], "value": "<image>" + "circle " * 225}, TURNS[1]]}, r"7: the prompt has 25\d"),
        ({"image": "images/absent.png"}, "7: .*absent"),
        ({"image": "images/truncated.png"}, "7: .*truncated"),
        ({"conversations": [{**TURNS[0], "value": "<image> \ud800"}, TURNS[1]]}, "7: .*ud800"),
        ({"conversations": [TURNS[0], {**TURNS[1], "value": "\ud800"}]}, "7: .*ud800"),
        ({"id": "\udfff"}, "7: .*udfff"),
    ],
)
def test_a_bad_row_is_named_before_a_model_is_loaded(world, tmp_path, no_model, change, message):
    whole = (world / "data" / "images" / "3.png").read_bytes()
    (world / "data" / "images" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    data = data_with(world, tmp_path, spoil(rows_of(world), 7, change))
    with pytest.raises(ValueError, match=rf"rows\.jsonl:{message}"):
        run(*data, "--run", world / "run", "--out", tmp_path / "out")


def test_every_bad_row_is_named(world, tmp_path, no_model):
    long = {"conversations": [{**TURNS[0], "value": "<image>" + "circle " * 300}, TURNS[1]]}
    data = data_with(world, tmp_path, spoil(spoil(rows_of(world), 2, long), 9, long))
    with pytest.raises(ValueError, match=r"(?s)2 problem.*rows\.jsonl:2: .*rows\.jsonl:9: "):
        run(*data, "--base", world / "base", "--out", tmp_path / "out")


def test_a_file_without_labels_is_refused_and_rows_without_are_counted(world, tmp_path, capsys, no_model, monkeypatch):
    def unlabel(row):
        return {key: value for key, value in row.items() if key not in ("safe_type", "safe_level", "group")}

    rows = rows_of(world)
    with pytest.raises(ValueError, match=r"none of its 20 rows has a label"):
        run(*data_with(world, tmp_path, map(unlabel, rows)), "--base", world / "base", "--out", tmp_path / "out")
    monkeypatch.undo()
    some = [unlabel(row) if i in (3, 5) else row for i, row in enumerate(rows)]
    assert run(*data_with(world, tmp_path, some), "--base", world / "base", "--out", tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "2 of 20 rows have no label and are in no metric" in output
    assert "rows.jsonl:4" in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["provenance"]["data"]["groups"]["not labelled"] == 2
    assert "**2 of these rows have no label" in (tmp_path / "out" / "report.md").read_text()
    assert len((tmp_path / "out" / "answers-base.jsonl").read_text().splitlines()) == 20


def test_an_image_alone_is_evaluated(world, tmp_path):
    rows = [{**row, "conversations": [{**TURNS[0], "value": "<image>"}, TURNS[1]]} for row in rows_of(world)[:3]]
    data = data_with(world, tmp_path, rows)
    assert not read_records(data[1], data[3])[1]
    assert run(*data, "--stage1", world / "run" / "stage1", "--out", tmp_path / "out") == 0
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers-stage1.jsonl").read_text().splitlines()]
    assert all(answer["unsafe_score"] is not None for answer in answers)


def test_interventions_are_rows_of_their_own(world, tmp_path):
    ask = ("--data", world / "data", "--stage", f"one={world / 'run' / 'stage1'}", "--max_new_tokens", 2)
    assert run(*ask, "--intervene", 1, "--out", tmp_path / "with") == 0
    assert run(*ask, "--out", tmp_path / "without") == 0
    found, plain = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("with", "without"))
    for part in ("stages", "per_type", "per_source", "differences"):
        assert found[part] == plain[part], "no other figure knows of them"
    rows = found["interventions"]
    assert rows["base"] == {}
    assert rows["one"]["all"]["set_names_concept"]["n"] == 12
    assert rows["one"]["low"]["set_changes_answer"]["n"] == 6
    assert "interventions" not in plain
    assert found["provenance"]["settings"]["intervene"] == 1
    for name in ("report.md", "report.html"):
        assert "set_changes_answer" in (tmp_path / "with" / name).read_text()
        assert "set_changes_answer" not in (tmp_path / "without" / name).read_text()
    with pytest.raises(ValueError, match="--intervene is 0"):
        run(*ask, "--intervene", 0, "--out", tmp_path / "none")


def test_a_report_is_not_overwritten_by_another(world, tmp_path):
    data = data_with(world, tmp_path, rows_of(world)[:4])
    ask = (*data, "--base", world / "base", "--out", tmp_path / "out")
    assert run(*ask) == 0
    before = (tmp_path / "out" / "report.json").read_bytes()
    with pytest.raises(ValueError, match="is of other data or settings"):
        run(*ask, "--limit", 2)
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    assert run(*ask) == 0  # the same again
    assert run(*ask, "--limit", 2, "--overwrite") == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["provenance"]["data"]["rows"] == 2
    assert len((tmp_path / "out" / "answers-base.jsonl").read_text().splitlines()) == 2


def test_the_folder_is_tried_before_the_data_is_read(world, tmp_path):
    with pytest.raises(OSError, match="/dev/null/x"):
        run("--data", world / "data", "--base", world / "base", "--out", "/dev/null/x")
    assert run_main("--data", tmp_path, "--base", world / "base", "--out", "/dev/null/x") == 2


def run_main(*argv):
    return main(["evaluate", *map(str, argv)])


METRICS_GROUPS = ("clean", "benign_twin", "risk", "text_risk", "text_twin")


def test_plan_and_data_are_checked(world, tmp_path):
    run_dir, base = str(world / "run"), str(world / "base")
    assert plan(run_dir, None, []).base == base
    assert plan(None, base, []).addons == {}
    for arguments, message in (
        ((None, None, []), "nothing to evaluate"),
        ((str(tmp_path), None, []), "holds no add-on"),
        ((run_dir, None, [("stage1", run_dir)]), "given twice"),
        ((None, base, [("base", run_dir)]), "cannot name a stage"),
        ((None, None, [("stage1", str(tmp_path))]), "is not a PSA add-on"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(*arguments)
    other = build_addon(build_base(tmp_path / "other", seed=5), tmp_path / "addon")
    with pytest.raises(ValueError, match="different bases"):
        plan(run_dir, None, [("x", str(other))])
    assert find_data(str(world / "data"), "test", None) == (world / "data" / "test.jsonl", world / "data")
    with pytest.raises(ValueError, match=r"no file .*dev\.jsonl"):
        find_data(str(world / "data"), "dev", None)
    with pytest.raises(ValueError, match="--limit is 0"):
        run("--data", world, "--base", base, "--out", tmp_path, "--limit", 0)
    with pytest.raises(ValueError, match="expected NAME=DIR"):
        run("--data", world, "--stage", "x", "--out", tmp_path)


def test_concept_heads_alone(world, tmp_path, monkeypatch, capsys):
    data = ("--data", world / "data", "--run", world / "run", "--batch_size", 8)
    assert run(*data, "--max_new_tokens", 4, "--out", tmp_path / "whole") == 0
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())
    monkeypatch.setattr(
        "psa_fast.models.PsaVLM.generate", lambda *args, **kwargs: pytest.fail("something was answered")
    )
    out = tmp_path / "heads"
    assert run(*data, "--concepts_only", "--thresholds", "--out", out) == 0
    report = json.loads((out / "report.json").read_text())
    assert list(report["stages"]) == ["stage1", "stage2"]
    for stage, metrics in report["stages"].items():
        for name in REQUIRED_HEAD:
            assert metrics[name] == pytest.approx(whole["stages"][stage][name], abs=1e-6), name
        assert not REQUIRED & set(metrics)
    assert report["thresholds"]["stage1"]["risky"] == 8
    text = (out / "report.md").read_text()
    assert "nothing was answered" in text
    assert "refusals: list" not in text
    assert "not read" not in text
    assert "attack_success" not in text
    assert report["per_type"] == {"stage1": {}, "stage2": {}}
    assert report["differences"] == {}

    # what is made of answers says that there are none
    assert not (out / "report.html").exists()
    assert main(["report", str(out)]) == 2
    assert "--concepts_only" in capsys.readouterr().err
    assert main(["judge", "--answers", str(out), "--judge", "keywords", "--out", str(tmp_path / "judged")]) == 2
    assert "nothing was answered" in capsys.readouterr().err


def test_concept_heads_need_an_addon_and_no_options_of_answers(world, tmp_path, no_model):
    data = ("--data", world / "data", "--concepts_only", "--out", tmp_path)
    with pytest.raises(ValueError, match="--concepts_only needs an add-on"):
        run(*data, "--base", world / "base")
    for option in (("--max_new_tokens", 5), ("--refusal_list", "vlguard"), ("--refusal_mode", "startswith")):
        with pytest.raises(ValueError, match=f"{option[0]} does nothing with --concepts_only"):
            run(*data, "--run", world / "run", *option)
