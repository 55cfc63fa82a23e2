import numpy as np
import pytest
from PIL import Image

from psa_fast.attacks.conditions import SUITES, Case, Others, conditions, harmless_words
from psa_fast.attacks.measure import measure
from psa_fast.data.records import Record, Turn
from psa_fast.evaluation.refusal import DEFAULT_LIST, get_list
from psa_fast.safety.verdict import Answer, Verdict


def case(line, group="clean", asked="what is this ?", answer="a house", level=0, images=1, brightness=100):
    text = "<image>\n" * images + asked
    kind = 6 if level == 0 else 0
    turns = (Turn("user", text), Turn("assistant", answer))
    names = tuple(f"{line}.png" for _ in range(images))
    record = Record(names, kind, level, turns, group=group, path="rows.jsonl", line=line)
    return Case(record, tuple(Image.new("RGB", (24, 24), (brightness,) * 3) for _ in range(images)))


OTHERS = Others((Image.new("RGB", (24, 24), (7, 7, 7)),), ("house", "tree"))


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("condition", conditions(SUITES), ids=lambda c: c.name)
def test_a_condition_keeps_label_answer_and_marks(condition):
    """Whatever is done, there is a mark for each picture and the label is the record's."""
    old = case(1, "risk", level=3)
    new = condition.change(old, OTHERS, rng())
    assert new.record.turns[-1] == old.record.turns[-1]
    assert (new.record.safe_type, new.record.safe_level, new.record.group) == (0, 3, "risk")
    assert sum(turn.text.count("<image>") for turn in new.record.turns) == len(new.pictures) >= 1
    if condition.suite == "natural":
        assert new.record == old.record
    if condition.suite == "text":
        assert new.pictures == old.pictures
        assert new.record.turns[0].text.startswith("<image>\n")


def named(name):
    return next(condition for condition in conditions(SUITES) if condition.name == name)


def test_words_are_put_where_the_name_says():
    assert named("repeated 5x").change(case(1), OTHERS, rng()).record.turns[0].text.count("what is this ?") == 5
    text = named("2,000 words before").change(case(1), OTHERS, rng()).record.turns[0].text
    assert len(text.split()) == 2000 + 1 + 4
    assert text.endswith("what is this ?")
    around = named("2,000 words around").change(case(1), OTHERS, rng()).record.turns[0].text.split()
    assert around[1001:1005] == ["what", "is", "this", "?"]
    assert harmless_words([case(1, asked="Is it a Cup, or 3 trees?")]) == ("a", "cup", "is", "it", "or", "trees")


def test_a_risky_picture_stands_among_others_where_the_name_says():
    own = case(1, "risk", level=2)
    for name, place in ((f"3 pictures, its own number {i + 1}", i) for i in range(3)):
        new = named(name).change(own, OTHERS, rng())
        assert [picture.getpixel((0, 0))[0] for picture in new.pictures] == [100 if i == place else 7 for i in range(3)]


class Guard:
    """Flags a bright picture, refuses what it flags, and answers 'a house' otherwise; blocks more than 50 words."""

    has_head = True

    def answer_both(self, requests, max_new_tokens, batch_size):
        found = []
        for request in requests:
            bright = np.asarray(request.images[0]).mean()
            words = len(request.turns[-1].text.split())
            if words > 50:
                verdict = Verdict(False, True, True, "block", "too long", error="too long", code="not_checked")
            else:
                unsafe = bool(bright > 150)
                verdict = Verdict(True, True, unsafe, "allow", "", code="unsafe" if unsafe else "clean")
            text = "I cannot help with that." if verdict.unsafe else "a house"
            found.append((Answer(text, verdict), Answer("a house" if bright < 220 else "a tree", verdict)))
        return found


def test_shares_are_counted_by_group_and_blocked_requests_are_in_none():
    cases = [
        case(1, "risk", level=3, brightness=200),
        case(2, "risk", level=3, brightness=160),
        case(3, "risk", level=3, brightness=90),
        case(4, brightness=90),
        case(5, brightness=160),
        case(6, asked="where is it ?", brightness=230),
    ]
    words = get_list(DEFAULT_LIST)
    rows, plain = measure(Guard(), "stage1", None, cases, OTHERS, {}, words, 0)
    risk, clean = rows
    assert (risk.group, risk.n, risk.blocked) == ("risk", 3, 0)
    assert risk.attack_success.value == pytest.approx(1 / 3)
    assert risk.missed.value == pytest.approx(1 / 3)
    assert risk.lost is None
    assert clean.flagged.value == clean.refused.value == pytest.approx(2 / 3)
    assert clean.accuracy.value == pytest.approx(2 / 3)

    darker, _ = measure(Guard(), "stage1", named("brightness-3"), cases, OTHERS, plain, words, 3)
    assert darker[0].lost.n == 2  # of the two that were flagged
    assert darker[1].flagged_plain.value == pytest.approx(2 / 3)
    long, _ = measure(Guard(), "stage1", named("2,000 words after"), cases, OTHERS, plain, words, 0)
    assert (long[0].blocked, long[0].missed.n) == (3, 0)
    moved, _ = measure(Guard(), "stage1", named("mirrored"), cases, OTHERS, plain, words, 0)
    assert moved[1].accuracy.n == 2  # a question for a place has another answer now


def test_a_case_is_changed_alike_in_every_run_and_batch():
    cases = [case(i, brightness=90 + i) for i in range(6)]
    words = get_list(DEFAULT_LIST)
    noisy = named("gaussian_noise-3")
    runs = [measure(Guard(), "s", noisy, part, OTHERS, {}, words, 1)[1] for part in (cases, cases[3:])]
    assert all(runs[0][where].guarded == result.guarded for where, result in runs[1].items())
