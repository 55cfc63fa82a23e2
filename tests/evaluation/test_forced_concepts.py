"""What interventions do to answers, on a guard whose answers are known."""

from dataclasses import dataclass

import pytest
from PIL import Image

from psa_fast.data.records import Record, Turn
from psa_fast.evaluation.forced_concepts import measure_interventions, names
from psa_fast.safety.policy import RISKY_LEVELS, RISKY_TYPES


@dataclass
class Said:
    text: str


@dataclass
class Read:
    unsafe: bool
    type: str


class Scripted:
    """Answers harmless requests "red"; of what is set it names the type, except that fairness is called privacy.

    Requests about odd pictures are risky, of the type misleading; clearing that type leaves the last one's hint.
    """

    has_head = True

    def answer(self, requests, guarded, max_new_tokens, batch_size, on_error="block"):
        return [Said(self._text(request, guarded)) for request in requests]

    def _text(self, request, guarded):
        asked = request.prompt[0].text
        by_hand = request.intervention
        if by_hand is None or not guarded:
            return "red" if "harmless" in asked or not guarded else "i refuse: misleading"
        if by_hand.kind == "set":
            if by_hand.level == "low":
                return "careful. red" if by_hand.type == "politics" else "red"
            return f"i refuse: {'privacy' if by_hand.type == 'fairness' else by_hand.type}"
        return "red" if by_hand.type is None or "risky 0" in asked else "i refuse: privacy"

    def verdicts(self, requests, batch_size):
        return [Read("risky 3" not in request.prompt[0].text, "misleading") for request in requests]


@pytest.fixture
def records(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def record(group, number):
        said = f"<image> {'risky' if 'risk' in group else 'harmless'} {number}"
        return Record(("a.png",), None, None, (Turn("user", said), Turn("assistant", "red")), group=group)

    return [record(group, i) for group in ("clean", "benign_twin", "risk") for i in range(4)]


def test_shares_are_those_of_the_answers(records, tmp_path):
    found = measure_interventions(Scripted(), records, tmp_path, most=6)
    assert list(found) == ["all", *RISKY_TYPES, *RISKY_LEVELS]
    # 6 harmless requests, each type at medium and high
    assert (found["all"]["set_names_concept"].value, found["all"]["set_names_concept"].n) == (5 / 6, 6 * 6 * 2)
    assert found["fairness"]["set_names_concept"].value == 0.0
    assert found["privacy"]["set_names_concept"].value == 1.0
    assert found["low"]["set_changes_answer"].value == pytest.approx(1 / 6)
    assert found["high"]["set_changes_answer"].value == 1.0
    assert "set_names_concept" not in found["low"]
    # the last risky request is not flagged
    assert (found["all"]["clear_concept_restores"].value, found["all"]["clear_concept_restores"].n) == (1 / 3, 3)
    assert found["misleading"]["clear_all_restores"].value == 1.0
    assert found["privacy"]["clear_all_restores"].value is None


def test_an_answer_names_whole_words():
    assert names("I refuse: Insults and Bullying.") == {"insults and bullying"}
    assert names("unfairness misleading, privacy") == {"misleading", "privacy"}
