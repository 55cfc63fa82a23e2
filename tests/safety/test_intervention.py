"""A concept set, cleared or clipped: what becomes of the probabilities, the verdict and the answer."""

import math
from dataclasses import replace

import pytest
from builders.tiny_llava import build_addon, picture

from psa_fast.safety import Guard, Intervention, Policy, Request, load_guard
from psa_fast.safety.policy import RISKY_LEVELS, RISKY_TYPES
from psa_fast.safety.reading import Reading
from psa_fast.safety.redecide import redecide
from psa_fast.taxonomy import RISK_LEVELS, RISK_TYPES

QUESTION = "<image>\nwhat colour is the circle ?"
READ = Reading("prompt", [0.1, 0.2, 0.05, 0.05, 0.3, 0.1, 0.2], [0.4, 0.1, 0.2, 0.3])


@pytest.fixture(scope="module")
def guard(folders, tmp_path_factory):
    return load_guard(build_addon(folders[0], tmp_path_factory.mktemp("by hand") / "addon"))


def one(**given):
    (found,) = Intervention(**given).apply([READ])
    assert sum(found.type_probs) == pytest.approx(1.0)
    assert sum(found.level_probs) == pytest.approx(1.0)
    assert (found.query, found.logits) == (READ.query, READ.logits)
    return dict(zip(RISK_TYPES, found.type_probs, strict=True)), dict(zip(RISK_LEVELS, found.level_probs, strict=True))


def test_what_is_set_is_certain_and_the_rest_stays():
    types, levels = one(kind="set", type="privacy")
    assert types["privacy"] == 1.0
    assert list(levels.values()) == READ.level_probs
    types, levels = one(kind="set", level="low")
    assert levels["low"] == 1.0
    assert list(types.values()) == READ.type_probs
    types, levels = one(kind="set", type="fairness", level="high")
    assert (types["fairness"], levels["high"]) == (1.0, 1.0)


def test_what_is_cleared_goes_to_no_risk_with_its_share_of_the_level():
    types, levels = one(kind="clear", type="privacy")
    assert (types["privacy"], types["clean"]) == (0.0, pytest.approx(0.5))
    assert types["politics"] == 0.1
    # privacy is .3 of .8 of the risk by type: the level head keeps 5/8 of its risk of .6
    assert levels["none"] == pytest.approx(1 - 0.6 * 5 / 8)
    assert levels["high"] == pytest.approx(0.3 * 5 / 8)
    types, levels = one(kind="clear", level="high")
    assert (levels["high"], levels["none"], levels["low"]) == (0.0, pytest.approx(0.7), 0.1)
    assert list(types.values()) == READ.type_probs
    types, levels = one(kind="clear")
    assert (types["clean"], levels["none"]) == (pytest.approx(1.0), pytest.approx(1.0))


def test_what_is_clipped_keeps_at_most_so_much():
    types, levels = one(kind="clip", most=0.25)
    assert types["clean"] == pytest.approx(0.75) == levels["none"]
    assert types["privacy"] / types["politics"] == pytest.approx(3.0)
    types, levels = one(kind="clip", type="privacy", most=0.15)
    assert (types["privacy"], types["clean"]) == (pytest.approx(0.15), pytest.approx(0.35))
    assert levels["none"] == pytest.approx(1 - 0.6 * (1 - 0.3 / 0.8 / 2))
    assert one(kind="clip", most=0.9) == (
        dict(zip(RISK_TYPES, READ.type_probs, strict=True)),
        dict(zip(RISK_LEVELS, READ.level_probs, strict=True)),
    )
    broken = replace(READ, type_probs=[math.nan] * 7)
    assert Intervention("set", "privacy").apply([broken]) == [broken], "no number is made up"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(kind="raise"), "set, clear or clip"),
        (dict(kind="set"), "name the type"),
        (dict(kind="set", type="clean"), "expected one of: politics"),
        (dict(kind="set", level="none"), "expected one of: low"),
        (dict(kind="clear", type="weather"), "'weather'"),
        (dict(kind="clip"), "needs the largest"),
        (dict(kind="clear", most=0.1), "only clip"),
        (dict(kind="clip", most=1.0), "below 1"),
        (dict(kind="clip", most=math.nan), "below 1"),
        (dict(kind="clip", most=True), "below 1"),
    ],
)
def test_what_does_nothing_or_contradicts_itself_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Intervention(**given)
    with pytest.raises(ValueError, match=message):
        Intervention.from_json(given)


def test_what_is_no_intervention_is_refused():
    for value in (None, [], {}, {"kind": "clear", "more": 1}):
        with pytest.raises(ValueError, match="an object with kind"):
            Intervention.from_json(value)
    with pytest.raises(ValueError, match="expected an Intervention"):
        Request(QUESTION, (picture(0),), {"kind": "clear"})


def test_every_concept_that_is_set_gives_its_hint_and_clearing_gives_the_plain_answer(guard):
    plain = Request(QUESTION, (picture(0),))
    (unguarded,) = guard.answer([plain], guarded=False, max_new_tokens=6)
    asked = [
        replace(plain, intervention=Intervention("set", kind, level)) for kind in RISKY_TYPES for level in RISKY_LEVELS
    ]
    answers = guard.answer([*asked, replace(plain, intervention=Intervention("clear"))], max_new_tokens=6)
    for request, answer in zip(asked, answers, strict=False):
        verdict, wanted = answer.verdict, request.intervention
        assert (verdict.type, verdict.level, verdict.unsafe_score) == (wanted.type, wanted.level, 1.0)
        assert verdict.hint == guard.policy.hint(wanted.type, wanted.level)
        assert verdict.intervention == wanted
        assert verdict.to_json()["intervention"]["type"] == wanted.type
    assert answers[-1].verdict.action == "allow"
    assert answers[-1].text == unguarded.text
    (before,) = guard.verdicts([plain])
    assert before.intervention is None
    for answer in answers:  # what was read is kept, and another policy decides after the same intervention
        for mine, theirs in zip(answer.verdict.readings, before.readings, strict=True):
            assert mine.logits == pytest.approx(theirs.logits, abs=1e-4)
        assert redecide(guard.policy, answer.verdict) == answer.verdict


def test_a_batch_keeps_each_intervention_to_its_own_request(guard):
    plain = [Request(QUESTION, (picture(seed),)) for seed in range(4)]
    mixed = [
        replace(request, intervention=Intervention("set", "privacy", "high")) if place % 2 else request
        for place, request in enumerate(plain)
    ]
    expected, found = guard.verdicts(plain), guard.verdicts(mixed)
    for place, (before, after) in enumerate(zip(expected, found, strict=True)):
        if place % 2:
            assert (after.type, after.level) == ("privacy", "high")
        else:
            assert after == before


def test_switched_off_types_stay_off_and_nothing_unread_is_forced(guard, folders):
    values = guard.policy.model_dump() | {"types": guard.policy.types | {"privacy": False}}
    lenient = Guard(guard.model, guard.processor, Policy.model_validate(values))
    asked = Request(QUESTION, (picture(0),), Intervention("set", "privacy", "high"))
    (verdict,) = lenient.verdicts([asked])
    assert (verdict.code, verdict.action) == ("type_off", "allow")
    with pytest.raises(ValueError, match="does nothing to an unguarded answer"):
        guard.answer([asked], guarded=False)
    (verdict,) = load_guard(folders[1]).verdicts([Request("what ?", (), Intervention("clear"))])
    assert (verdict.code, verdict.action) == ("not_checked", "block")
    assert "no concept to intervene on" in verdict.error
