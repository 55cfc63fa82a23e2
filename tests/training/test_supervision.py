"""A run with nothing to learn is refused before a model is loaded, one with little is warned."""

from dataclasses import replace

import pytest

from psa_fast.data import Record, Turn
from psa_fast.training.config import TrainConfig
from psa_fast.training.supervision import check_supervision, unlearnt_readings, with_learnable_answers


def rows(count, safe_type=None, safe_level=None, picture=True):
    mark = "<image>\n" if picture else ""
    turns = (Turn("user", f"{mark}what is this ?"), Turn("assistant", "a circle ."))
    return [Record(("a.png",) if picture else (), safe_type, safe_level, turns) for _ in range(count)]


LABELLED = [*rows(5, 6, 0), *rows(5, 2, 3)]
STAGE_2 = {"stage": 2, "concept_loss_weight": 1.0}


@pytest.mark.parametrize(
    ("records", "options", "sentence"),
    [
        (rows(3), {}, "none of 3 rows has both a picture and a label .*--stage1_objective tokens leaves it out"),
        (rows(3), {"stage1_objective": "concept"}, "none of 3 rows has both a picture and a label"),
        # the labels stand at rows without pictures, and the pictures at rows without labels
        ([*rows(3), *rows(3, 2, 3, picture=False)], {}, "none of 6 rows has both a picture and a label"),
        (rows(3), STAGE_2, "none of 3 rows has both .*--concept_loss_weight 0 leaves it out"),
        (rows(3, 2, 3, picture=False), {}, "none of 3 rows has a picture, and stage 1 trains what stands before"),
        (rows(3, 2, 3, picture=False), {"stage1_objective": "tokens"}, "none of 3 rows has a picture"),
    ],
)
def test_nothing_to_learn_is_refused(records, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_supervision(records, TrainConfig(data_path="d.jsonl", **options))


@pytest.mark.parametrize(
    ("records", "options"),
    [
        (LABELLED, {}),
        (rows(3), {"stage1_objective": "tokens"}),
        (rows(3), {"stage": 2, "concept_loss_weight": 0.0}),
        (rows(3, picture=False), {"stage": 2, "concept_loss_weight": 0.0}),  # LoRA learns from text too
        ([*LABELLED, *rows(190)], {}),  # 5.0%
    ],
)
def test_enough_to_learn_says_nothing(records, options):
    assert check_supervision(records, TrainConfig(data_path="d.jsonl", **options)) == []


@pytest.mark.parametrize(
    ("records", "warnings"),
    [
        ([*LABELLED, *rows(191)], ["only 10 of 201 rows (5.0%) have both a picture and a label"]),
        ([*rows(2, 6), *rows(2, 1)], ["no row with a picture has a safe_level"]),
        ([*rows(2, None, 0), *rows(2, None, 3)], ["no row with a picture has a safe_type"]),
        ([*rows(2, 2, 1), *rows(9, 6, 0, picture=False)], ["all 2 labelled pictures are of the type 'insults and"]),
    ],
)
def test_little_to_learn_is_said(records, warnings):
    found = check_supervision(records, TrainConfig(data_path="d.jsonl"))
    assert len(found) == len(warnings)
    for text, start in zip(found, warnings, strict=True):
        assert text.startswith(start)


def test_an_addon_claims_no_reading_that_its_records_do_not_teach():
    def row(images, safe_type, **labels):
        turns = (Turn("user", "<image>" * len(images) + "what ?"), Turn("assistant", "that"))
        return Record(images, safe_type, None if safe_type is None else 0, turns, **labels)

    pictured = row(("a.png",), 6)
    unknown = row(("a.png",), 6, image_label="unknown")
    words = row((), 2)
    assert unlearnt_readings([pictured, words]) == {}
    assert unlearnt_readings([pictured]) == {"reads_text": False}
    assert unlearnt_readings([unknown, words]) == {"neutral_query": False}
    # words that are never risky teach to call all words harmless
    assert unlearnt_readings([pictured, row((), 6)]) == {"reads_text": False}
    assert unlearnt_readings([pictured, row(("a.png",), 2, group="text_risk")]) == {}
    assert unlearnt_readings([row((), None)]) == {"neutral_query": False, "reads_text": False}


def made_up(count):
    return [replace(record, path="d.jsonl", line=7, extra={"answer_from": "template"}) for record in rows(count, 2, 3)]


@pytest.mark.parametrize("options", [{"stage": 1}, {"stage": 1, "stage1_objective": "tokens"}, {"stage": 2}])
def test_answers_that_an_importer_made_up_are_not_learnt_unasked(options):
    own = [*LABELLED, replace(LABELLED[0], extra={"answer_from": "annotator"})]
    records = [*own, *made_up(3)]

    def config(choice):
        return TrainConfig(data_path="d.jsonl", on_template_answers=choice, **options)

    sentence = r"d.jsonl: the answers of 3 of 14 rows are .*\(first: d.jsonl:7\).*--on_template_answers drop"
    with pytest.raises(ValueError, match=sentence):
        with_learnable_answers(records, config("error"))
    assert with_learnable_answers(own, config("error")) == own
    assert with_learnable_answers(records, config("drop")) == own
    assert with_learnable_answers(records, config("keep")) == records
    assert check_supervision(records, config("keep"))[0] == "3 of 14 rows teach an answer that an importer made up"
    assert check_supervision(own, config("keep")) == []
    with pytest.raises(ValueError, match="--on_template_answers drop leaves none"):
        with_learnable_answers(made_up(2), config("drop"))


def test_the_concept_head_learns_from_rows_without_answers_of_their_own():
    records, config = [*LABELLED, *made_up(3)], TrainConfig(data_path="d.jsonl", stage1_objective="concept")
    assert with_learnable_answers(records, config) == records
    assert check_supervision(records, config) == []
