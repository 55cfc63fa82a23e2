"""What a world asks: joint risks, held-out phrasings, what stands around a request, several pictures, earlier turns."""

import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
import yaml

from psa_fast.sandbox import language
from psa_fast.sandbox.around import filler_words, padded
from psa_fast.sandbox.draw import ROWS, draw_world
from psa_fast.sandbox.language import (
    CLAIMS,
    FOLLOW_UPS,
    HARMLESS_VERBS,
    HELD_OUT_PATTERNS,
    HELD_OUT_QUESTIONS,
    JOINT_TYPES,
    JOINT_VERBS,
    OBJECTS,
    QUESTIONS,
    RISKY_VERBS,
    TEXT_PATTERNS,
    TYPED_HINTS,
    joint_split,
    joint_verbs,
    question_about_several,
    request_split,
    stricter,
)
from psa_fast.sandbox.lessons import Lessons
from psa_fast.sandbox.paint import paint
from psa_fast.sandbox.word_level import build_processor
from psa_fast.sandbox.world import HARMLESS_GLYPHS, SCENES, sample_scene
from psa_fast.taxonomy import CLEAN, RISK_TYPES
from psa_fast.training.config import RECIPES

FILES = {"stage1": "train", "stage2": "train", "dev": "dev", "test": "test"}
KINDS = {
    "clean": 60, "benign_twin": 60, "risk": 120, "text_risk": 90, "text_twin": 90, "joint_risk": 90, "joint_twin": 90,
    "clean_several": 40, "risk_several": 40,
}  # fmt: skip
PICTURES = {"clean": 40, "benign_twin": 40, "risk": 60, "joint": 60}
VERB_GROUPS = {verb: p for p, verbs in enumerate(JOINT_VERBS) for verb in verbs}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Rows by file, and every scene by its picture's path."""
    folder = tmp_path_factory.mktemp("words") / "world"
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psa_fast.sandbox.draw.paint", lambda scene: (seen.append(scene), paint(scene))[1])
        draw_world(5, folder, dict.fromkeys(("train", "dev", "test"), PICTURES), dict.fromkeys(FILES, KINDS))
    paths = [
        f"images/{s}/{g}-{i:05d}.png" for s in ("train", "dev", "test") for g, n in PICTURES.items() for i in range(n)
    ]
    rows = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in FILES}
    return rows, dict(zip(paths, seen, strict=True))


def images(row):
    found = row.get("image", [])
    return [found] if isinstance(found, str) else found


def request(row):
    """The last user's turn without its marks."""
    return row["conversations"][-2]["value"].replace("<image>\n", "")


def said(row):
    return " ".join(turn["value"] for turn in row["conversations"] if turn["from"] == "human").lower()


def group(rows, *names):
    return [row for row in rows if row["group"] in names]


def test_a_joint_risk_is_a_verb_with_its_own_pictogram_and_each_half_alone_is_harmless(world):
    rows, scenes = world
    shown = Counter()
    for name, split in FILES.items():
        for row in group(rows[name], "joint_risk", "joint_twin"):
            (path,) = images(row)
            scene = scenes[path]
            assert scene.safe_type == CLEAN
            verbs = set(re.findall(r"[a-z]+", said(row))) & VERB_GROUPS.keys()
            glyph = scene.sign.glyph if scene.sign else None
            match = [v for v in verbs if HARMLESS_GLYPHS[VERB_GROUPS[v]] == glyph]
            assert len(verbs) <= 1
            if row["group"] == "joint_risk":
                assert match
                assert scene.sign.marks == "blue"
                assert (row["safe_type"], row["safe_level"]) == (JOINT_TYPES[HARMLESS_GLYPHS.index(glyph)], 2)
            else:
                assert not match
                assert (row["safe_type"], row["safe_level"]) == (CLEAN, 0)
                shown["other picture" if verbs else "other words"] += 1
                shown["no sign"] += bool(verbs and glyph is None)
            for verb in verbs:
                pictogram = VERB_GROUPS[verb]
                assert joint_split(pictogram, JOINT_VERBS[pictogram].index(verb), scene.background) == split
    assert min(shown[key] for key in ("other picture", "other words", "no sign")) > 10


def test_every_split_has_joint_requests_on_every_scene_and_none_has_another_s():
    sets = [{(b, p, v) for b in SCENES for p, v in joint_verbs(b, s)} for s in ("train", "dev", "test")]
    assert [len(found) for found in sets] == [64, 16, 16]
    assert not any(a & b for a, b in itertools.combinations(sets, 2))
    for b in SCENES:
        assert len({p for p, _ in joint_verbs(b, "test")}) >= 2
    # every verb is trained on, with other scenes
    assert {(p, v) for _, p, v in sets[0]} == {(p, v) for p in range(4) for v in range(4)}


def test_no_verb_says_more_than_one_thing():
    verbs = [verb for verbs in (*RISKY_VERBS, *HARMLESS_VERBS, *JOINT_VERBS) for verb in verbs]
    assert len(set(verbs)) == len(verbs)


def plain(form):
    return re.sub(r"\{.*?\}", "", form).lower()


def test_held_out_phrasings_are_the_test_s_alone_and_made_of_words_that_training_has(world):
    rows, _ = world
    held_out = [*(f for forms in HELD_OUT_QUESTIONS.values() for f in forms), *HELD_OUT_PATTERNS]
    trained = [*(f for forms in QUESTIONS.values() for f in forms), *TEXT_PATTERNS]
    assert not set(held_out) & set(trained)
    words = {word for form in trained for word in re.findall(r"[a-z]+", plain(form))}
    assert {word for form in held_out for word in re.findall(r"[a-z]+", plain(form))} <= words
    # in and around the requests of every file
    patterns = [re.compile(re.sub(r"\\\{.*?\\\}", "[a-z ]+", re.escape(form)), re.IGNORECASE) for form in held_out]
    found = {name: [p for p in patterns if any(p.search(said(row)) for row in rows[name])] for name in FILES}
    assert found == {"stage1": [], "stage2": [], "dev": [], "test": patterns}
    lessons = _lessons()
    scenes = [sample_scene(lessons.rng, "risk", "train") for _ in range(40)]
    texts = [lessons.text(turn.asked) for scene in scenes for turn in lessons.draw(scene, 20)]
    assert not any(p.search(text) for p in patterns for text in texts)


def test_text_requests_keep_their_verb_and_object_pairs_apart(world):
    rows, _ = world
    verbs = [(verb, i) for verbs in (*RISKY_VERBS, *HARMLESS_VERBS) for i, verb in enumerate(verbs)]
    texts = {f"{verb} {item}": request_split(i, o) for verb, i in verbs for o, item in enumerate(OBJECTS)}
    for name, split in FILES.items():
        found = [splits for row in rows[name] for text, splits in texts.items() if text in said(row)]
        assert len(found) >= 180
        # two random words that happen to be such a pair
        assert found.count(split) >= 0.98 * len(found)


def test_harmless_requests_are_answered_and_risky_ones_are_not(world):
    rows, _ = world
    typed = re.compile("|".join(re.sub(r"\\\{.*?\\\}", ".+", re.escape(text)) for text in TYPED_HINTS))
    for name in FILES:
        for row in rows[name]:
            answer = row["conversations"][-1]["value"]
            refuses, cautions = "Sorry" in answer, "Be careful" in answer
            if row["safe_type"] == CLEAN:
                # who types a hint is obeyed, as the base obeys any
                assert (refuses or cautions) == bool(typed.search(request(row))), row
                assert name in ("stage1", "stage2") or not typed.search(request(row))
            elif row["safe_level"] == 1:
                assert cautions or typed.search(request(row))
            else:
                assert answer == f"Sorry, I cannot help with {RISK_TYPES[row['safe_type']]}."


def test_what_stands_around_a_request_is_in_every_file_and_holds_no_risk(world):
    rows, _ = world
    for name, split in FILES.items():
        long = [row for row in rows[name] if len(request(row).split()) > 25]
        least, greatest = (0.08, 0.18) if split == "train" else (0.02, 0.12)
        assert least < len(long) / len(rows[name]) < greatest
        most = 80 if split == "train" else 100
        assert max(len(request(row).split()) for row in rows[name]) <= most + 16
        assert sum(any(claim in request(row) for claim in CLAIMS) for row in rows[name]) > 10
    assert len(filler_words()) > 120
    risky = {word for verbs in RISKY_VERBS for verb in verbs for word in verb.split()} - {"on"}
    assert not set(filler_words()) & (risky | VERB_GROUPS.keys())
    for row in group([row for name in FILES for row in rows[name]], "clean", "benign_twin", "text_twin"):
        assert not set(re.findall(r"[a-z]+", said(row))) & (risky | VERB_GROUPS.keys())


def test_a_padded_request_is_still_there_word_for_word():
    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(300):
        text = padded(rng, "Where is the star?", 60)
        assert "Where is the star?" in text
        lengths.append(len(text.split()) - 4)
    assert max(lengths) <= 60
    assert max(lengths) > 45
    assert np.median(lengths) < 25


def test_several_pictures_have_one_answer(world):
    """The oracle looks at each picture: only one of them has what is asked about, and it gives the answer."""
    rows, scenes = world
    sizes = Counter()
    for name in FILES:
        for row in [row for row in rows[name] if "_several" in row["id"]]:
            shown = [scenes[path] for path in images(row)]
            sizes[len(shown)] += 1
            assert row["conversations"][-2]["value"].startswith("<image>\n" * len(shown))
            risky = [scene for scene in shown if scene.safe_type != CLEAN]
            assert len(risky) == (row["group"] == "risk")
            if risky:
                assert (row["safe_type"], row["safe_level"]) == (risky[0].safe_type, risky[0].safe_level)
    assert set(sizes) == {2, 3, 4}
    rng = np.random.default_rng(1)
    asked = Counter()
    for _ in range(300):
        shown = [sample_scene(rng, "clean", "train") for _ in range(int(rng.integers(2, 5)))]
        pair = question_about_several(shown, rng)
        things = [thing for scene in shown for thing in scene.things]
        if pair is None:
            assert not any(
                n == 1 for key in ("shape", "colour") for n in Counter(getattr(t, key) for t in things).values()
            )
            continue
        words = re.findall(r"[a-z]+", pair[0].lower())
        fitting = [t for t in things if t.shape in words or t.colour in words]
        if fitting:
            (thing,) = fitting
            assert pair[1] in (thing.shape, thing.colour, language.PLACES[thing.cell])
            asked["thing"] += 1
        else:
            assert [scene.sign.glyph for scene in shown if scene.sign] == [pair[1]]
            asked["sign"] += 1
    assert min(asked.values()) > 20


def test_some_requests_come_without_a_picture_and_some_after_another(world):
    rows, _ = world
    for name in FILES:
        text = group(rows[name], "text_risk", "text_twin")
        without = [row for row in text if not images(row)]
        assert len(without) == len(text) // 2
        assert {row["safe_type"] for row in without} == set(range(7))
        assert all(row in text for row in rows[name] if not images(row))
        earlier = [row for row in rows[name] if len(row["conversations"]) == 4]
        assert (
            0.02 < len(earlier) / len(rows[name]) < 0.06
            if name in ("dev", "test")
            else 0.08 < len(earlier) / len(rows[name]) < 0.12
        )
        insisted = [row for row in earlier if request(row) in FOLLOW_UPS]
        assert {row["group"] for row in insisted} <= {"text_risk", "text_twin"}
        for row in earlier:
            first, second = row["conversations"][1]["value"], row["conversations"][3]["value"]
            assert first == second if row in insisted else first.startswith("Sure")


def test_the_sizes_are_those_of_a_training_of_minutes():
    # what takes the minutes is the steps; rows only have to be encoded
    recipe = yaml.safe_load((RECIPES / "sandbox.yaml").read_text())
    assert recipe["stage1"]["max_steps"] <= 480
    assert recipe["stage2"]["max_steps"] <= 200
    assert all(7500 < sum(ROWS[name].values()) < 8500 for name in ("stage1", "stage2"))
    assert min(ROWS["test"][kind] for kind in ("joint_risk", "joint_twin", "text_risk")) >= 240
    assert 0.05 < sum(ROWS["stage1"][f"{kind}_several"] for kind in ("clean", "risk")) / 8000 < 0.07


def test_of_two_answers_the_stricter_one_is_given():
    assert stricter("red", "Be careful: red") == "Be careful: red"
    assert stricter("Sorry, no.", "Be careful: Sorry, no.") == "Sorry, no."
    assert stricter("Sorry, a.", "Sorry, b.") == "Sorry, a."


def _hint(kind, level):
    return None if kind == CLEAN or level == 0 else TYPED_HINTS[level - 1].format(type=RISK_TYPES[kind])


class _Told(Lessons):
    def text(self, ids):
        return self.tokenizer.decode(ids)


def _lessons(seed=0):
    tokenizer = build_processor(language.all_texts(_hint)).tokenizer
    lessons = _Told(tokenizer, _hint, np.random.default_rng(seed))
    lessons.tokenizer = tokenizer
    return lessons


def test_the_base_is_taught_to_refuse_words_and_hints_and_nothing_else():
    lessons = _lessons()
    scenes = [sample_scene(lessons.rng, kind, "train") for kind in ("risk", "clean", "benign_twin") for _ in range(50)]
    seen = Counter()
    for scene in scenes:
        for turn in lessons.draw(scene, 20):
            asked, answer = lessons.text(turn.asked), lessons.text(turn.answer)
            assert lessons.tokenizer.unk_token_id not in turn.asked + turn.answer
            words = set(re.findall(r"[a-z]+", asked))
            verb = any(f" {verb} " in asked for verbs in RISKY_VERBS for verb in verbs)
            strict = "you must refuse" in asked or "refuse if necessary" in asked
            careful = "answer with caution" in asked
            assert answer.startswith("sorry") == (verb or strict), (asked, answer)
            assert answer.startswith("be careful") == (careful and not verb and not strict), (asked, answer)
            seen["joint"] += bool(words & VERB_GROUPS.keys() and answer.startswith("sure"))
            seen["blind"] += turn.sees is not None
            seen["blind refusal"] += turn.sees is not None and verb
            seen["earlier"] += "</s> user :" in asked
            seen["claim"] += any(claim.lower().split(".")[0] in asked for claim in CLAIMS)
            seen["two hints"] += sum(asked.count(word) for word in ("with caution", "must refuse", "if necessary")) > 1
            seen["long"] += len(turn.asked) > 30
            assert len(turn.asked) < 110
    assert min(seen.values()) > 20, seen


def test_places_are_asked_for_where_they_are_clear_alone():
    rng = np.random.default_rng(5)
    for _ in range(400):
        scene = sample_scene(rng, "clean", "train")
        clear = [
            t for t in scene.things if all(abs(v - edge) >= 4 for v in (t.place.y, t.place.x) for edge in (32, 64))
        ]
        assert clear == [t for t in scene.things if t.place.clear]
        for kind in ("place", "at"):
            pair = language.question(scene, kind, rng)
            assert (pair is None) == (not clear)
            if pair and kind == "place":
                assert pair[1] in {language.PLACES[t.cell] for t in clear}
        for kind in ("list", "colours", "places"):
            assert (language.question(scene, kind, rng) is None) == (len(clear) < len(scene.things))


def test_related_words_hold_every_verb_once_and_tell_no_risk_apart():
    groups = list(language.related_words())
    words = [word for _, group in groups for word in group]
    verbs = [verb.split()[0] for group in (*RISKY_VERBS, *HARMLESS_VERBS, *JOINT_VERBS) for verb in group]
    assert sorted(words) == sorted(verbs)
    assert len(set(words)) == len(words)
    assert [centre for centre, _ in groups if centre] == list(HARMLESS_GLYPHS)


def test_the_base_can_be_shown_several_pictures():
    lessons = _lessons()
    scenes = [sample_scene(lessons.rng, "clean", "train") for _ in range(3)]
    answers = [lessons.text(turn.answer) for turn in lessons.draw(scenes, 250)]
    named = {word for scene in scenes for t in scene.things for word in (t.shape, t.colour, language.PLACES[t.cell])}
    glyphs = {scene.sign.glyph for scene in scenes if scene.sign}
    plain = [a.replace(" </s>", "") for a in answers if not a.startswith(("sorry", "sure", "be careful"))]
    assert len(plain) > 80
    assert set(plain) <= named | glyphs
