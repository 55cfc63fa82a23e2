"""Metrics of a stage from hand-made results."""

import dataclasses

import pytest
from builders.metrics import REQUIRED, REQUIRED_HEAD

from psa_fast.data.records import Record, Turn
from psa_fast.evaluation.evaluate import Result, compute_metrics, per_type, run_stage, unread
from psa_fast.evaluation.refusal import get_list
from psa_fast.evaluation.report import METRICS
from psa_fast.safety import Answer, Verdict
from psa_fast.taxonomy import CLEAN, RISK_LEVELS, RISK_TYPES


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
