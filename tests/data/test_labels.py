"""Where a risk is: labels of picture, words and both together, their defaults, contradictions and way into batches."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from psa_fast.data import PsaDataset, Record, Turn, collate, pack
from psa_fast.data.keys import meant_field
from psa_fast.data.records import fingerprint, parse_row, read_records

TURNS = [{"from": "user", "value": "<image>\nwhat is this ?"}, {"from": "assistant", "value": "a red square"}]
TEXT = [TURNS[0] | {"value": "what is this ?"}, TURNS[1]]


def row(**changes):
    base = {"image": "a.png", "safe_type": 1, "safe_level": 3, "conversations": TURNS}
    base |= {"image": None, "conversations": TEXT} if changes.pop("text_only", False) else {}
    return {name: value for name, value in (base | changes).items() if value is not None}


def parse(**changes):
    problems, record = parse_row(row(**changes), "f", 1)
    return [problem.message for problem in problems], record


CLEAN = {"safe_type": 6, "safe_level": 0}
# what the row says -> group, labels (image, text, joint), the picture's own type and level
ROWS = {
    "risk": ({}, "risk", "unsafe unknown unsafe", (1, 3)),
    "clean": (CLEAN, "clean", "safe safe safe", (6, 0)),
    "look-alike": (CLEAN | {"group": "benign_twin"}, "benign_twin", "safe safe safe", (6, 0)),
    "text risk": ({"group": "text_risk"}, "text_risk", "safe unsafe unsafe", (6, 0)),
    "text risk, the type the image's": (CLEAN | {"group": "text_risk"}, "text_risk", "safe unsafe unsafe", (6, 0)),
    "text twin": (CLEAN | {"group": "text_twin"}, "text_twin", "safe safe safe", (6, 0)),
    "joint risk": ({"group": "joint_risk"}, "joint_risk", "safe safe unsafe", (6, 0)),
    "joint twin": (CLEAN | {"group": "joint_twin"}, "joint_twin", "safe safe safe", (6, 0)),
    "no type": ({"safe_type": None, "safe_level": None}, "", "unknown unknown unknown", (None, None)),
    "no level": ({"safe_level": None}, "risk", "unsafe unknown unsafe", (1, None)),
    "words alone, risky": (
        {"text_only": True, "group": "text_risk"},
        "text_risk",
        "unknown unsafe unsafe",
        (None, None),
    ),
    "words alone, as ever": ({"text_only": True}, "risk", "unknown unsafe unsafe", (None, None)),
    "words alone, clean": ({"text_only": True} | CLEAN, "clean", "unknown safe safe", (None, None)),
    # labels that are given
    "both risky": ({"image_label": "unsafe", "text_label": "unsafe"}, "risk", "unsafe unsafe unsafe", (1, 3)),
    "words risky": ({"image_label": "safe", "text_label": "unsafe"}, "text_risk", "safe unsafe unsafe", (6, 0)),
    "only together": ({"image_label": "safe", "text_label": "safe"}, "joint_risk", "safe safe unsafe", (6, 0)),
    "picture not known": ({"image_label": "unknown"}, "risk", "unknown unknown unsafe", (None, None)),
    "a risky picture besides": (
        {"group": "text_risk", "image_label": "unsafe"},
        "text_risk",
        "unsafe unsafe unsafe",
        (1, 3),
    ),
    "picture of a harmless question not known": (
        CLEAN | {"group": "benign_twin", "image_label": "unknown"},
        "benign_twin",
        "unknown safe safe",
        (None, None),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_labels_follow_from_group_and_type_unless_they_are_given(name):
    changes, group, labels, picture = ROWS[name]
    problems, record = parse(**changes)
    assert not problems
    assert record.group == group
    assert [record.image_label, record.text_label, record.joint_label] == labels.split()
    assert record.picture == picture
    # what is written says the same, and no more than it has to
    written = record.to_row()
    assert {key for key in written if key.endswith("_label")} <= {key for key in changes if key.endswith("_label")}
    assert parse_row(written, "f", 1) == ([], record)


BAD = {
    "no value of ours": ({"image_label": "risky"}, "image_label is 'risky'; expected one of: safe, unsafe, unknown"),
    "a number": ({"text_label": 1}, "text_label is 1; expected one of"),
    "another case": ({"joint_label": "Safe"}, "joint_label is 'Safe'"),
    "safe together, a risk": ({"joint_label": "safe"}, "joint_label is 'safe', but safe_type is 1, which is a risk"),
    "clean, but unsafe": (CLEAN | {"image_label": "unsafe"}, "image_label is 'unsafe', but safe_type is 6 (clean)"),
    "clean, but unsafe together": (CLEAN | {"joint_label": "unsafe"}, "joint_label is 'unsafe', but safe_type is 6"),
    "no image": ({"text_only": True, "image_label": "unsafe"}, "image_label is 'unsafe', but the row has no image"),
    "a safe whole of an unsafe part": (
        {"safe_type": None, "safe_level": None, "joint_label": "safe", "text_label": "unsafe"},
        "joint_label is 'safe', but text_label is 'unsafe'",
    ),
    "a risk that is nowhere": ({"image_label": "safe"}, "group is 'risk', but image_label is 'safe' (the default"),
    "risk in a safe image": ({"group": "risk", "image_label": "safe"}, "group is 'risk', but image_label is 'safe'"),
    "text risk in safe words": ({"group": "text_risk", "text_label": "safe"}, "group is 'text_risk', but text_label"),
    "joint risk of a risky picture": (
        {"group": "joint_risk", "image_label": "unsafe"},
        "group is 'joint_risk', but image_label is 'unsafe'",
    ),
    "joint risk of type clean": (CLEAN | {"group": "joint_risk"}, "group is 'joint_risk', but safe_type is 6 (clean)"),
    "joint twin of a risky type": ({"group": "joint_twin"}, "group is 'joint_twin', but safe_type is 1"),
    "joint without a picture": ({"text_only": True, "group": "joint_risk"}, "'joint_risk', but the row has no image"),
    "a slip": ({"image_labels": "safe"}, "key 'image_labels' is not read; did you mean image_label?"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_contradiction_is_one_sentence(name):
    changes, message = BAD[name]
    problems, _ = parse(**changes)
    assert len(problems) == 1, problems
    assert message in problems[0]


def test_a_bad_label_names_its_line_and_words_with_another_sense_are_left_alone(tmp_path):
    (tmp_path / "f.jsonl").write_text(
        "\n".join(json.dumps(row(text_only=True, text_label=v)) for v in ("unsafe", "no"))
    )
    reading = read_records(tmp_path / "f.jsonl", None)
    assert [str(problem).split(": ")[0] for problem in reading.problems] == [f"{tmp_path / 'f.jsonl'}:2"]
    assert len(reading.records) == 1
    for key in ("image_level", "text", "label_source", "caption"):
        assert meant_field(key) is None


def test_the_fingerprint_covers_a_picture_s_own_label_and_is_what_it_was_without():
    record = Record(("a.png",), 1, 3, (Turn("user", "<image>"), Turn("assistant", "x")))
    # what it was before there were such labels: a run of that time goes on
    assert fingerprint([record]) == "26e65b6d8c53ca0bfdaade3c9988270dbe2156cefbbcf1db7ce33f3e69f4816c"
    text_risk = replace(record, group="text_risk", image_label="", text_label="", joint_label="")
    assert text_risk.picture == (6, 0)
    assert fingerprint([text_risk]) != fingerprint([record])
    assert fingerprint([replace(record, image_label="unknown")]) != fingerprint([record])
    assert fingerprint([replace(record, text_label="unsafe")]) == fingerprint([record]), "training does not take it"


def test_batches_hold_the_request_s_label_and_the_picture_s(chat, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    kinds = ({}, {"group": "text_risk"}, {"text_only": True}, CLEAN, {"image_label": "unknown"}, {"safe_level": None})
    records = [parse(**kind)[1] for kind in kinds]
    data = PsaDataset(records, tmp_path, chat.build())
    items = [data[i] for i in range(len(records))]
    for batch in (collate(items, 0), pack(items)):
        assert {batch[name].dtype for name in ("picture_type", "picture_level")} == {batch["safe_type"].dtype}
        assert batch["safe_type"].tolist() == [1, 1, 1, 6, 1, 1]
        assert batch["picture_type"].tolist() == [1, 6, -100, 6, -100, 1]
        assert batch["picture_level"].tolist() == [3, 0, -100, 0, -100, -100]


def test_no_label_outlives_a_picture_that_is_cut_off(chat, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    turns = [*TEXT, {"from": "user", "value": "and <image> ?"}, TURNS[1]]
    record = parse(conversations=turns)[1]
    processor = chat.build()
    whole = PsaDataset([record], tmp_path, processor)[0]
    assert (whole.picture_type, whole.picture_level) == (1, 3)
    first_answer = len(PsaDataset([parse(text_only=True)[1]], tmp_path, processor)[0].input_ids)
    cut = PsaDataset([record], tmp_path, processor, max_length=first_answer + 3)[0]
    assert cut.cut_images == 1
    assert {cut.safe_type, cut.safe_level, cut.picture_type, cut.picture_level} == {-100}
