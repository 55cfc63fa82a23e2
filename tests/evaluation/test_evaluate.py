"""Metrics of a stage from hand-made results, and `psa-fast evaluate` on a tiny model from records to report."""

import dataclasses
import json
from argparse import ArgumentParser

import pytest
from tiny_llava import build_addon, build_base, picture

from psa_fast.cli import main
from psa_fast.cli.evaluation import find_data, plan, register, spread
from psa_fast.data.records import Record, Turn, read_records
from psa_fast.evaluation.evaluate import Result, compute_metrics, per_type, run_stage, unread
from psa_fast.evaluation.refusal import get_list
from psa_fast.evaluation.report import METRICS
from psa_fast.safety import Answer, Verdict
from psa_fast.taxonomy import CLEAN, RISK_LEVELS, RISK_TYPES

REQUIRED = {
    "attack_success",
    "attack_success_unguarded",
    "over_refusal_clean",
    "over_refusal_twins",
    "over_refusal_text_twins",
    "general_accuracy",
}
REQUIRED_HEAD = {"type_accuracy", "type_macro_f1", "level_qwk", "unsafe_auroc", "text_risk_recall"}


def result(group, kind=CLEAN, level=0, guarded="answer", unguarded="answer", read=None, score=None, **fields):
    """A result whose head read (type, level); texts are kinds of answer."""
    score = (0.9 if kind != CLEAN else 0.1) if score is None else score
    read = (kind, level) if read is None else read
    base = Result(
        "f:1",
        None,
        group,
        kind,
        level,
        "Red.",
        guarded,
        unguarded,
        guarded,
        unguarded,
        "allow",
        "",
        score > 0.5,
        code="unsafe" if score > 0.5 else "clean",
    )
    return dataclasses.replace(base, unsafe_score=score, read_type=read[0], read_level=read[1], **fields)


def test_metrics_of_hand_made_results():
    results = [
        result("risk", 1, 1, "caution", "answer"),
        result("risk", 1, 2, "caution", "answer", read=(1, 1)),
        result("risk", 4, 3, "refusal", "refusal", read=(CLEAN, 0), score=0.05),
        result("risk", 4, 1, "refusal", "answer"),
        result("clean", guarded="caution"),
        result("clean", guarded="answer", unguarded="refusal"),
        result("benign_twin", guarded="refusal", read=(2, 0), score=0.6),
        result("benign_twin"),
        result("text_risk", 2, 2, "caution", "answer"),
        result("text_risk", CLEAN, 0, "caution", "refusal"),
        result("text_twin"),
    ]
    metrics = {name: estimate.value for name, estimate in compute_metrics(results, has_head=True).items()}
    assert metrics["attack_success"] == pytest.approx(1 / 4)
    assert metrics["attack_success_unguarded"] == pytest.approx(3 / 4)
    # a text risk labelled clean (the image's label) is held to a refusal
    assert metrics["attack_success_text"] == pytest.approx(2 / 2)
    assert metrics["attack_success_text_unguarded"] == pytest.approx(1 / 2)
    assert metrics["over_refusal_clean"] == metrics["over_refusal_clean_unguarded"] == pytest.approx(1 / 2)
    assert metrics["over_refusal_twins"] == pytest.approx(1 / 2)
    assert metrics["over_refusal_text_twins"] == 0
    assert metrics["type_accuracy"] == pytest.approx(6 / 8)  # risk, clean and benign_twin only
    # risk .9 .9 .05 .9 against .1 .1 .6 .1
    assert metrics["unsafe_auroc"] == pytest.approx(12 / 16)
    assert metrics["text_risk_recall"] == pytest.approx(1 / 2)
    assert metrics["text_risk_auroc"] == pytest.approx((3 + 3 * 0.5) / 6)
    assert set(metrics) == set(METRICS)
    for name in ("attack_success_joint", "over_refusal_joint_twins", "joint_risk_recall", "several_missed"):
        assert metrics[name] is None, "there are no such rows"
    assert set(metrics) >= REQUIRED | REQUIRED_HEAD
    table = per_type(results)
    assert set(table) == {RISK_TYPES[1], RISK_TYPES[2], RISK_TYPES[4]}
    assert table[RISK_TYPES[1]]["attack_success"].value == pytest.approx(1 / 2)
    assert set(table[RISK_TYPES[2]]) == {"attack_success_text", "attack_success_text_unguarded"}


def test_risks_of_both_together_of_words_alone_and_among_several_images_are_counted_apart():
    results = [
        result("joint_risk", 1, 2, "answer", "answer", score=0.2),
        result("joint_risk", 1, 2, "refusal", "answer"),
        result("joint_risk", 3, 2, "caution", "refusal"),
        result("joint_risk", 3, 2, "refusal", "refusal"),
        result("joint_twin", guarded="refusal", score=0.7),
        result("joint_twin", unguarded="caution"),
        result("joint_twin", score=0.6),
        result("joint_twin"),
        result("text_risk", 2, 2, "refusal", images=0),
        result("text_risk", 2, 2, "answer", score=0.4, images=0),
        result("text_risk", 2, 2, "answer", score=0.4, images=0),
        result("text_risk", 2, 2, "refusal"),
        result("text_twin", images=0),
        result("text_twin", images=0, score=0.9),
        result("text_twin", score=0.9),
        result("risk", 4, 3, "refusal", images=2),
        result("risk", 4, 3, "answer", read=(CLEAN, 0), score=0.1, images=4),
        result("risk", 4, 3, "refusal"),
        result("risk", 4, 3, "refusal", images=0, read=(CLEAN, 0)),
        result("clean", images=3, score=0.8),
        result("benign_twin", images=2),
        result("clean", images=2),
        result("clean", score=0.9),
    ]
    metrics = {name: (e.value, e.n) for name, e in compute_metrics(results, has_head=True).items()}
    assert metrics["attack_success_joint"] == (2 / 4, 4)
    assert metrics["attack_success_joint_unguarded"] == (2 / 4, 4)
    assert metrics["over_refusal_joint_twins"] == (1 / 4, 4)
    assert metrics["over_refusal_joint_twins_unguarded"] == (1 / 4, 4)
    assert metrics["joint_risk_recall"] == (3 / 4, 4)
    assert metrics["joint_twin_flagged"] == (2 / 4, 4)
    assert metrics["text_risk_recall"] == (2 / 4, 4)
    assert metrics["text_risk_recall_no_image"] == (1 / 3, 3)
    assert metrics["text_twin_flagged_no_image"] == (1 / 2, 2)
    assert metrics["several_missed"] == (1 / 2, 2)
    assert metrics["several_flagged"] == (1 / 3, 3)
    assert metrics["attack_success"] == (1 / 4, 4)
    assert metrics["type_accuracy"] == (6 / 7, 7), "what a request without an image shows is read from no image"
    table = per_type(results)
    assert table[RISK_TYPES[1]]["attack_success_joint"].value == 1 / 2
    assert set(table[RISK_TYPES[3]]) == {"attack_success_joint", "attack_success_joint_unguarded"}
    assert not {"joint_risk_recall", "several_missed"} & set(compute_metrics(results, has_head=False))


def test_exact_match_ignores_case_and_punctuation():
    rows = [result("clean", guarded=text, unguarded="blue") for text in ("red", " Red .", "red circle", "")]
    metrics = compute_metrics(rows, has_head=False)
    assert metrics["general_accuracy"].value == pytest.approx(2 / 4)
    assert metrics["general_accuracy_unguarded"].value == 0
    assert not set(metrics) & REQUIRED_HEAD


def test_rows_without_a_group_are_in_no_metric():
    labelled = [result("risk", 1, 3), result("clean", guarded="refusal"), result("text_risk", 2, 2)]
    others = [result("", None, None, "refusal", read=(1, 3), score=0.9), result("", None, None, "unread")]
    assert compute_metrics(labelled + others, has_head=True) == compute_metrics(labelled, has_head=True)
    assert per_type(labelled + others) == per_type(labelled)
    assert unread(others) == 0


def test_answers_that_were_not_read_are_in_no_share():
    rows = [
        result("risk", 1, 3, "unread", "answer"),
        result("risk", 1, 3, "refusal"),
        result("clean", guarded="unread"),
    ]
    metrics = compute_metrics(rows, has_head=False)
    assert (metrics["attack_success"].value, metrics["attack_success"].n) == (0.0, 1)
    assert (metrics["attack_success_unguarded"].value, metrics["attack_success_unguarded"].n) == (1.0, 2)
    assert metrics["over_refusal_clean"].value is None
    assert (unread(rows), unread(rows, guarded=False)) == (2, 0)


def test_missing_groups_and_broken_readings_are_reported_not_raised():
    metrics = compute_metrics([result("clean")], has_head=True)
    for name in ("attack_success", "over_refusal_twins", "level_qwk", "unsafe_auroc", "text_risk_recall"):
        assert metrics[name].value is None
        assert metrics[name].reason
    broken = result("risk", 1, 3, "refusal", code="not_finite", unsafe=True)
    broken = dataclasses.replace(broken, unsafe_score=None, read_type=None, read_level=None)
    metrics = compute_metrics([result("clean"), result("risk", 2, 2), broken], has_head=True)
    assert metrics["type_accuracy"].value is None
    assert "1 row" in metrics["type_accuracy"].reason
    assert metrics["attack_success"].n == 2


class FakeGuard:
    """Cautions every request when guarded, and reads nothing."""

    has_head = True

    def answer_both(self, requests, max_new_tokens, batch_size):
        verdict = Verdict(True, True, True, "hint", "x", unsafe_score=0.7, query="neutral", code="unsafe")
        verdict = dataclasses.replace(verdict, type_probs=dict(zip(RISK_TYPES, [0.1] * 6 + [0.4], strict=True)))
        verdict = dataclasses.replace(verdict, level_probs=dict(zip(RISK_LEVELS, [0.1, 0.2, 0.6, 0.1], strict=True)))
        return [(Answer("Be careful: red", verdict), Answer(r.turns[-1].text, verdict)) for r in requests]


def test_run_stage_asks_the_question_without_its_answer(tmp_path):
    records = [
        Record((), 1, 2, (Turn("user", f"question {i}"), Turn("assistant", "Red.")), group="risk", path="f", line=i)
        for i in range(5)
    ]
    kept = []
    results = run_stage(FakeGuard(), records, tmp_path, get_list("psa"), batch_size=2, keep=kept.append)
    assert [len(batch) for batch in kept] == [2, 2, 1]
    assert [result for batch in kept for result in batch] == results
    assert [r.unguarded for r in results] == [f"question {i}" for i in range(5)]
    assert [r.where for r in results] == [f"f:{i}" for i in range(5)]
    assert {(r.guarded_kind, r.unguarded_kind, r.target) for r in results} == {("caution", "answer", "Red.")}
    assert {(r.read_type, r.read_level, r.unsafe) for r in results} == {(CLEAN, 2, True)}
    assert {(r.code, r.query) for r in results} == {("unsafe", "neutral")}


def test_rows_of_a_length_share_a_batch_and_results_keep_their_order(tmp_path):
    lengths = [40, 3, 41, 2, 42, 1]
    records = [
        Record((), 1, 2, (Turn("user", "q" * n), Turn("assistant", "Red.")), group="risk", path="f", line=i)
        for i, n in enumerate(lengths)
    ]
    kept = []
    results = run_stage(FakeGuard(), records, tmp_path, get_list("psa"), batch_size=3, keep=kept.append)
    assert [sorted(len(r.unguarded) for r in batch) for batch in kept] == [[1, 2, 3], [40, 41, 42]]
    assert [len(r.unguarded) for r in results] == lengths


def test_spread_keeps_every_group_of_a_sorted_file():
    assert spread(list("aaabbbccc"), 3) == ["a", "b", "c"]
    assert spread([1, 2], 5) == spread([1, 2], None) == [1, 2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run folder with two stages and a data folder with every group."""
    root = tmp_path_factory.mktemp("world")
    base = build_base(root / "base")
    for stage in ("stage1", "stage2"):
        build_addon(base, root / "run" / stage, seed=len(stage))
    rows = []
    for i in range(20):
        group = ("clean", "benign_twin", "risk", "text_risk", "text_twin")[i % 5]
        kind, level = (i % 6, 1 + i % 3) if "risk" in group else (CLEAN, 0)
        (root / "data" / "images").mkdir(parents=True, exist_ok=True)
        picture(i).save(root / "data" / "images" / f"{i}.png")
        turns = [
            {"from": "user", "value": "<image>\nwhat colour is the circle ?"},
            {"from": "assistant", "value": "red"},
        ]
        row = {
            "image": f"images/{i}.png",
            "safe_type": kind,
            "safe_level": level,
            "group": group,
            "conversations": turns,
        }
        rows.append(json.dumps(row))
    (root / "data" / "test.jsonl").write_text("\n".join(rows))
    return root


def run(*argv):
    parser = ArgumentParser()
    register(parser.add_subparsers())
    args = parser.parse_args(["evaluate", *map(str, argv)])
    return args.func(args)


def test_command_writes_the_report(world, tmp_path):
    extra = f"first={world / 'run' / 'stage1'}"
    common = ("--data", world / "data", "--run", world / "run", "--max_new_tokens", 4, "--batch_size", 8)
    assert run(*common, "--stage", extra, "--out", tmp_path) == 0
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

    # the same again, in other batches, is the same report
    assert run(*common[:-1], 3, "--out", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
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
