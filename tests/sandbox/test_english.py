"""The world with real sentences: what is divided between training, dev and test, and what its rows say."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from psa_fast.data.records import load_records
from psa_fast.evaluation.refusal import DEFAULT_LIST, classify, get_list
from psa_fast.sandbox.draw import IMAGES, draw_world
from psa_fast.sandbox.english import QUESTION_KINDS, joint_request, picture_question, safe_answer, sentences
from psa_fast.sandbox.english_rows import ROWS, draw_english_rows
from psa_fast.sandbox.language import JOINT_TYPES
from psa_fast.sandbox.world import GLYPHS, HARMLESS_GLYPHS, Place, Scene, Sign, Thing
from psa_fast.taxonomy import CLEAN, RISK_TYPES

SPLITS = ("train", "dev", "test")
# words that tell nothing: the twins share the others
COMMON = {
    "a",
    "an",
    "the",
    "of",
    "to",
    "my",
    "in",
    "for",
    "with",
    "at",
    "about",
    "and",
    "is",
    "who",
    "on",
    "it",
    "from",
}


def all_acts(split):
    known = sentences()
    return [act for part in (*known.risky, *known.harmless, *known.joint.values()) for act in part[split]]


def test_no_phrasing_is_in_two_splits():
    known = sentences()
    parts = [{split: all_acts(split) for split in SPLITS}, known.frames, known.asides, *known.questions.values()]
    for part in parts:
        texts = Counter(text.lower() for split in SPLITS for text in part[split])
        assert not [text for text, count in texts.items() if count > 1]
        assert all(part[split] for split in SPLITS)


def test_every_type_has_as_many_risks_as_harmless_twins_and_they_share_their_words():
    known = sentences()
    assert len(known.risky) == len(known.harmless) == CLEAN
    assert set(known.joint) == set(HARMLESS_GLYPHS)
    for split, fewest in (("train", 50), ("dev", 10), ("test", 10)):
        words = set(re.findall(r"\w+", " ".join(act for part in known.harmless for act in part[split]).lower()))
        for risky, harmless in zip(known.risky, known.harmless, strict=True):
            assert len(risky[split]) == len(harmless[split]) >= fewest
            shared = [bool(words & set(act.lower().split()) - COMMON) for act in risky[split]]
            assert np.mean(shared) > (0.75 if split == "train" else 0.6)


def test_frames_take_an_act_and_questions_what_they_ask_about():
    known = sentences()
    assert all(frame.count("{act}") == 1 for split in SPLITS for frame in known.frames[split])
    slots = {"colour": "shape", "shape": "colour", "place": "shape"}
    for kind, forms in known.questions.items():
        for split in SPLITS:
            for form in forms[split]:
                assert set(re.findall(r"\{(\w+)\}", form)) == {slots[kind]} if kind in slots else "{" not in form
    assert set(known.questions) == {*QUESTION_KINDS, "sign"}


def test_answers_are_what_the_refusal_list_reads():
    words = get_list(DEFAULT_LIST)
    kinds = {0: "answer", 1: "caution", 2: "refusal", 3: "refusal"}
    for kind in range(CLEAN):
        for level, expected in kinds.items():
            assert classify(safe_answer(kind, level, "It is red."), words) == expected
    assert safe_answer(CLEAN, 0, "It is red.") == "It is red."


def scene(glyph):
    things = (Thing("star", "green", Place(48, 48, 1, 0)), Thing("cross", "red", Place(16, 16, 1, 0)))
    return Scene("field", things, None if glyph is None else Sign(glyph, "blue", 1, Place(80, 80, 1, 0)), 0)


def test_a_joint_request_is_a_risk_with_its_own_pictogram_alone():
    rng, known = np.random.default_rng(0), sentences()
    for glyph in (None, *GLYPHS):
        for risky in (False, True) if glyph in HARMLESS_GLYPHS else (False,):
            for _ in range(20):
                asked, answer = joint_request(rng, "test", scene(glyph), risky)
                owners = [g for g, acts in known.joint.items() if any(act in asked for act in acts["test"])]
                assert owners == [glyph] if risky else glyph not in owners
                assert answer.startswith("I'm sorry" if risky else "Of course")


def test_questions_are_answered_truly():
    rng = np.random.default_rng(0)
    assert picture_question(rng, "test", scene(None), "sign") is None
    assert picture_question(rng, "test", scene("cup"), "sign")[1] == "It is the cup sign."
    assert picture_question(rng, "dev", scene("cup"), "count") == ("Could you count the shapes?", "There are two.")
    for _ in range(10):
        asked, answer = picture_question(rng, "train", scene(None), "place")
        assert answer == f"It is in the {'centre' if 'star' in asked else 'northwest'}."


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("english") / "world"
    images = {split: dict.fromkeys(counts, 12) for split, counts in IMAGES.items()}
    rows = {name: dict.fromkeys(counts, 24) for name, counts in ROWS.items()}
    draw_world(3, out, images, rows, draw=draw_english_rows)
    return out


def test_rows_are_sound_records_whose_sentences_no_training_row_has(world):
    asked = {}
    for name in ROWS:
        records = load_records(world / f"{name}.jsonl", world)
        assert Counter(record.group for record in records) == dict.fromkeys(ROWS[name], 24)
        for record in records:
            assert (record.safe_type == CLEAN) == ("risk" not in record.group)
            assert len(record.images) == 1 or record.group.startswith("text")
            assert (record.regions != ()) == (record.group in ("risk", "joint_risk"))
        kinds = Counter(record.safe_type for record in records if record.group == "text_risk")
        assert kinds == dict.fromkeys(range(CLEAN), 4)
        joint = {record.safe_type for record in records if record.group == "joint_risk"}
        assert joint <= set(JOINT_TYPES)
        asked[name] = {record.turns[0].text.replace("<image>", "").strip() for record in records}
    for held_out in ("dev", "test"):
        assert not asked[held_out] & (asked["stage1"] | asked["stage2"])
        acts = [act for act in all_acts("train") if any(f" {act}" in text for text in asked[held_out])]
        # a wording may be a part of a longer one, never the whole of a held-out one
        assert all(any(act in other and act != other for other in all_acts(held_out)) for act in acts)


def test_a_seed_gives_the_same_world(world, tmp_path):
    summary = json.loads((world / "world.json").read_text())
    assert summary["seed"] == 3
    draw_world(3, tmp_path / "dev", summary["images"], summary["rows"], ("dev",), draw_english_rows)
    assert (tmp_path / "dev" / "dev.jsonl").read_bytes() == (world / "dev.jsonl").read_bytes()


def test_refusals_name_the_type():
    assert all(RISK_TYPES[kind] in safe_answer(kind, 2, "") for kind in range(CLEAN))
