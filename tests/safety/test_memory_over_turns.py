"""Risk that adds up over the user's turns: the policy's arithmetic, and the guard on several turns."""

import math
from dataclasses import replace

import pytest
import torch
import yaml
from builders.tiny_llava import build_addon, picture

from psa_fast.cli import main
from psa_fast.data.records import Turn
from psa_fast.safety import Guard, Policy, Request, load_guard
from psa_fast.safety.explanation import explain
from psa_fast.safety.flips import nearest_flips
from psa_fast.safety.reading import Reading, weigh
from psa_fast.safety.redecide import redecide


def with_memory(policy=None, **changes):
    given = {"decay": 0.5, "threshold": 0.6, "level": "high"} | changes
    values = (policy or Policy.load()).model_dump() | {"memory": given}
    values["levels"]["high"] = {"action": "refuse"}
    return Policy.model_validate(values)


def turn(number, score, kind=1, words_alone=True):
    """A reading of a turn whose unsafe score is the type head's alone."""
    types = [0.0] * 7
    types[kind], types[6] = score, 1.0 - score
    logits = [math.log(max(p, 1e-30)) for p in types] + [80.0, 0.0, 0.0, 0.0]
    return Reading("turn", types, [1.0, 0.0, 0.0, 0.0], number=number, logits=logits, words_alone=words_alone)


def test_each_turn_halves_what_was_before_and_adds_its_own():
    policy = with_memory()
    readings = [turn(2, 0.3), turn(0, 0.4, kind=4), turn(1, 0.45)]
    weighed = weigh(policy, readings)
    assert weighed.decision.accumulated == pytest.approx(0.3 + 0.45 / 2 + 0.4 / 4)
    assert (weighed.decision.code, weighed.decision.action) == ("accumulated", "refuse")
    assert weighed.decision.unsafe
    assert (weighed.reading.number, weighed.decision.type) == (2, 1), "the turn that adds the most names the type"
    assert weighed.highest_score == pytest.approx(0.45)
    below = weigh(policy, [turn(0, 0.4), turn(1, 0.3)])
    assert (below.decision.code, below.decision.action) == ("clean", "allow")
    assert below.decision.accumulated == pytest.approx(0.5)
    assert weigh(Policy.load(), readings).decision.accumulated is None
    assert weigh(policy, readings[:1]).decision.accumulated is None, "one turn adds up to nothing"


def test_what_is_stricter_counts_and_pictures_are_not_counted_with_every_turn():
    mild = with_memory(level="low")
    risky = [turn(0, 0.3), turn(1, 0.99)]
    levels = [0.0, 0.0, 0.0, 1.0]
    worst = weigh(mild, [risky[0], replace(risky[1], level_probs=levels)])
    assert (worst.decision.code, worst.decision.action) == ("unsafe", "refuse")
    assert worst.decision.accumulated > 1.0
    shown = [turn(0, 0.4, words_alone=False), turn(1, 0.45, words_alone=False)]
    assert weigh(with_memory(), [*shown, turn(0, 0.01), turn(1, 0.01)]).decision.action == "allow"
    off = Policy.model_validate(with_memory().model_dump() | {"types": dict.fromkeys(mild.types, False)})
    assert weigh(off, [turn(0, 0.45), turn(1, 0.45)]).decision.action == "allow"
    broken = replace(turn(1, 0.45), type_probs=[math.nan] * 7)
    assert weigh(with_memory(), [turn(0, 0.45), broken]).decision.code == "not_finite"


def test_the_nearest_flip_is_exact_under_a_memory():
    policy = with_memory()
    for scores in ((0.4, 0.45, 0.3), (0.2, 0.3, 0.1)):
        readings = [turn(place, score) for place, score in enumerate(scores)]
        weighed = weigh(policy, readings)
        flips = nearest_flips(policy, readings, weighed.reading)
        assert sum(flip.logit_change is not None for flip in flips) >= 2
        for place, flip in enumerate(flips[:11]):
            reach = 20.0 if flip.logit_change is None else abs(flip.logit_change) * (1 - 1e-6)
            tried = [(sign * reach * step / 40, weighed.decision.action) for step in range(1, 41) for sign in (1, -1)]
            if flip.logit_change is not None:
                tried.append((flip.logit_change, flip.action))
                assert flip.action != weighed.decision.action
            for change, expected in tried:
                moved = []
                for reading in readings:
                    logits = torch.tensor(reading.logits, dtype=torch.float64)
                    logits[place] += change
                    moved.append(replace(reading, logits=logits.tolist()).under((1.0, 1.0)))
                assert weigh(policy, moved).decision.action == expected, (flip, change)


TURNS = tuple(
    Turn("user" if place % 2 == 0 else "assistant", said)
    for place, said in enumerate(("<image>\nwhat colour is the circle ?", "red", "blue ?", "green", "be careful"))
)


@pytest.fixture(scope="module")
def guard(folders, tmp_path_factory):
    return load_guard(build_addon(folders[0], tmp_path_factory.mktemp("memory") / "addon"))


def test_the_guard_adds_up_the_turns_of_a_conversation(guard, tmp_path):
    asked = Request(TURNS, (picture(0),))
    (readings,) = guard.readings([asked])
    words = [one for one in readings if one.query == "turn" and one.words_alone]
    scores = [max(1 - one.type_probs[6], 1 - one.level_probs[0]) for one in words]
    assert [one.number for one in words] == [0, 1, 2]
    total = scores[2] + 0.5 * scores[1] + 0.25 * scores[0]
    single = max(max(1 - one.type_probs[6], 1 - one.level_probs[0]) for one in readings)
    lenient = Policy.model_validate(guard.policy.model_dump() | {"unsafe_threshold": 1.0})
    assert single < 1.0 < total
    policies = {limit: with_memory(lenient, threshold=limit) for limit in (total * 0.999, total * 1.001)}
    (low, high) = (
        Guard(guard.model, guard.processor, one, guard.model_hash).answer([asked], max_new_tokens=2)[0]
        for one in policies.values()
    )
    assert (low.verdict.code, low.verdict.action, high.verdict.action) == ("accumulated", "refuse", "allow")
    assert low.text == policies[total * 0.999].responses.refuse.format(type=low.verdict.type)
    assert low.verdict.accumulated == pytest.approx(total) == high.verdict.accumulated
    assert (low.verdict.query, low.verdict.words_alone) == ("turn", True)
    assert low.verdict.to_json()["accumulated"] == low.verdict.accumulated
    for policy, answer in zip(policies.values(), (low, high), strict=True):
        assert redecide(policy, answer.verdict) == answer.verdict
        (plain,) = guard.verdicts([asked])
        assert redecide(policy, plain).action == answer.verdict.action
    found = explain(Guard(guard.model, guard.processor, policies[total * 0.999]), asked)
    assert (found.key, found.threshold_key) == ("memory", "memory.threshold")
    assert found.margin == pytest.approx(total * 0.001, rel=1e-3)
    assert found.flips[-1].action == "allow"
    (alone,) = Guard(guard.model, guard.processor, policies[total * 0.999]).verdicts([Request("be careful")])
    assert (alone.action, alone.accumulated) == ("allow", None)


def test_a_memory_where_nothing_adds_up_is_refused(folders, guard):
    old = load_guard(folders[1])
    with pytest.raises(ValueError, match="reads no turn's words alone"):
        Guard(old.model, old.processor, with_memory())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": 1.5}, "memory.decay"),
        ({"threshold": 0.0}, "memory.threshold"),
        ({"level": "none"}, "file: memory.level is 'none'; expected one of: low, medium, high"),
        ({"more": 1}, "memory.more"),
    ],
)
def test_a_wrong_memory_is_named(tmp_path, changes, message):
    values = Policy.load().model_dump(exclude_none=True)
    values["memory"] = {"decay": 0.5, "threshold": 0.6, "level": "high"} | changes
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=f"policy {file}: {message}"):
        Policy.load(file)


def test_it_is_off_by_default_told_where_it_is_on_and_not_calibrated(tmp_path, capsys):
    assert Policy.load().memory is None
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump(with_memory().model_dump(exclude_none=True)))
    assert Policy.load(file).hash == with_memory().hash != with_memory(decay=0.6).hash
    assert main(["policy", "check", str(file)]) == 0
    assert "memory      from 0.6" in capsys.readouterr().out
    assert main(["policy", "explain", str(file)]) == 0
    assert "from 0.6 on that is a risk of level high" in capsys.readouterr().out
    options = ["--data", "d", "--run", "r", "--target", "over_refusal=0.02", "--out", str(tmp_path / "o.yaml")]
    assert main(["calibrate", *options, "--policy", str(file)]) == 2
    assert "has a memory" in capsys.readouterr().err
    fitted = {"type_temperature": 2.5, "level_temperature": 0.4, "over_refusal": 0.05, "confidence": 0.95, "rows": 100}
    fitted |= {"data_sha256": "0" * 64, "addon_sha256": "1" * 64}
    with pytest.raises(ValueError, match="memory"):
        Policy.model_validate(with_memory().model_dump() | {"calibration": fitted})
