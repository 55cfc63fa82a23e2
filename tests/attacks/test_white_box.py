"""The suites of white-box attacks: which rows they make, and what a report shows of them."""

from dataclasses import replace

import pytest
import torch
from builders.tiny_cases import QUESTION, noisy
from PIL import Image

from psa_fast.attacks.conditions import Case
from psa_fast.attacks.pixels import Budget
from psa_fast.attacks.robustness_report import page
from psa_fast.attacks.target import Target
from psa_fast.attacks.white_box import SUITES, Known, conditions, measure, request_of
from psa_fast.data.records import Record, Turn
from psa_fast.evaluation.refusal import DEFAULT_LIST, get_list

BUDGET = Budget(5, 1, 3, (1, 8, 64))
WORDS = get_list(DEFAULT_LIST)


def case(line, group, level=0):
    turns = (Turn("user", f"<image>\n{QUESTION}"), Turn("assistant", "red"))
    kind = 0 if level else 6
    return Case(Record((f"{line}.png",), kind, level, turns, group=group, path="rows.jsonl", line=line), (noisy(line),))


CASES = [
    *(case(i, "risk", 1 + i % 3) for i in range(6)), *(case(i, "clean") for i in range(6, 8)),
    case(8, "benign_twin"), case(9, "text_risk", 2),
]  # fmt: skip


@pytest.fixture
def flagging(guard):
    """A guard that flags all of the pictures."""
    target = Target(guard)
    with torch.no_grad():
        asked = [target.ask(request_of(one)) for one in CASES]
        pixels = torch.stack([one.pictures for one in asked]).float() / 255
        least = target.margins(target.read(asked, pixels)).flatten(1).amax(1).min()
        guard.model.bottleneck.heads.bias[[6, 7]] += least - 0.5
    return guard


def test_conditions_are_those_of_the_suites_asked_for():
    assert conditions(BUDGET, ["pixels"]) == [
        f"{goal} {eps}/255" for goal in ("hide", "raise", "downgrade", "noise") for eps in (8, 64)
    ]
    assert [name for name in conditions(BUDGET, ["pixels"], ["seed1"]) if name.startswith("from")] == [
        "from:seed1 4/255", "from:seed1 8/255",
    ]  # fmt: skip
    assert conditions(BUDGET, ["controls"]) == ["controls"]
    joint = conditions(Budget(5, 1, 3, (2,)), ["joint"])
    assert joint == ["joint 2/255", "joint-noise 2/255", "unguarded 2/255"]  # the text suite begins at 8
    everything = conditions(BUDGET, SUITES)
    assert len(everything) == len(set(everything))


def test_each_condition_makes_the_rows_of_its_groups(flagging):
    known = Known({one.record.where: "red" for one in CASES}, {"itself": lambda: flagging})
    groups = {"raise": {"clean", "benign_twin"}, "unlock": {"text_risk"}, "unlock-unguarded": {"text_risk"}}
    for name in [*conditions(Budget(5, 1, 3, (8,)), ["pixels", "joint"]), "from:itself 8/255"]:
        goal = name.split(" ")[0]
        rows = measure(flagging, "stage1", name, CASES, WORDS, BUDGET, 0, known, 3)
        assert {row.group for row in rows} == groups.get(goal, {"risk"}), name
        for row in rows:
            assert 1 <= row.n <= BUDGET.n
            assert row.suite == ("joint" if goal.startswith(("joint", "un")) else "pixels")
            assert (row.flagged is None) == (goal != "raise")
            assert row.settings["eps"] == 8
            if goal not in ("raise", "unlock", "unlock-unguarded"):
                assert row.useful is not None  # the base's own answer is known
                assert row.useful.n == row.n


def test_controls_make_a_row_for_each_check(flagging):
    known = Known(surrogates={"itself": lambda: flagging})
    rows = measure(flagging, "stage1", "controls", CASES, WORDS, Budget(5, 1, 3, (4,)), 0, known)
    names = [row.condition for row in rows]
    assert len(names) == 11
    assert {"gradient_is_the_slope", "transfer_is_weaker", "guard_agrees", "square_is_weaker"} <= set(names)
    assert all(row.n == 3 for row in rows)
    text = page([row.to_json() for row in rows], {})
    assert "## Are gradients masked?" in text
    for row in rows:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row.condition} |")]
        assert line.split(" | ")[3] == {True: "yes", False: "**no**"}[row.settings["passed"]]


def test_several_pictures_and_none_are_left_out(flagging):
    two = Record(
        ("a.png", "b.png"), 0, 2, (Turn("user", "<image>\n<image>\nred"), Turn("assistant", "red")), group="risk"
    )
    none = Record((), 0, 2, (Turn("user", "red"), Turn("assistant", "red")), group="risk")
    cases = [Case(two, (noisy(1), noisy(2))), Case(none, ())]
    assert measure(flagging, "stage1", "hide 8/255", cases, WORDS, BUDGET, 0) == []
    assert measure(flagging, "stage1", "controls", cases, WORDS, BUDGET, 0) == []


def test_pictures_that_got_through_are_kept_beside_their_own(flagging, tmp_path):
    (row,) = measure(flagging, "stage1", "hide 64/255", CASES, WORDS, Budget(30, 1, 6), 0, folder=tmp_path / "through")
    kept = row.settings["got_through"]
    assert 0 < len(kept) == min(4, round(row.missed.value * row.n))
    by_place = {one.record.where: one for one in CASES}
    for one in kept:
        own = by_place[one["where"]]
        before = Image.open(tmp_path / one["before"])
        assert before.tobytes() == own.pictures[0].tobytes()
        answer = flagging.answer([replace(request_of(own), images=(tmp_path / one["file"],))])[0]
        assert not answer.verdict.unsafe  # the file itself gets through
        assert one["asked"] == QUESTION
    text = page([row.to_json()], {})
    assert all(f"![]({one['file']})" in text for one in kept)
