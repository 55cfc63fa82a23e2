"""The nearest flip of every concept, against a search along the concept's logit with the policy itself."""

import math

import pytest
import torch

from psa_fast.safety.flips import nearest_flips
from psa_fast.safety.policy import RISKY_TYPES, Policy
from psa_fast.safety.reading import Reading, weigh
from psa_fast.taxonomy import RISK_LEVELS, RISK_TYPES

CONCEPTS = (*RISK_TYPES, *RISK_LEVELS, "clean")
# logits of both heads, which change alike for the last one
PLACES = [*([place] for place in range(11)), [6, 7]]


def reading(logits, temperatures=(1.0, 1.0)):
    return Reading("prompt", [], [], logits=[float(value) for value in logits]).under(temperatures)


def variant(**changes):
    """The shipped policy with other keys."""
    return Policy.model_validate(Policy.load().model_dump() | changes)


LEVELS = {"low": {"action": "allow"}, "medium": {"action": "refuse"}, "high": {"action": "block"}}
FITTED = dict(type_temperature=2.5, level_temperature=0.4, over_refusal=0.05, confidence=0.95, rows=100)
POLICIES = {
    "shipped": Policy.load(),
    "all actions": variant(levels=LEVELS, unsafe_threshold=0.3),
    "types off": variant(levels=LEVELS, types={name: i % 2 == 0 for i, name in enumerate(RISKY_TYPES)}),
    "all off": variant(types=dict.fromkeys(RISKY_TYPES, False)),
    "by type": variant(levels=LEVELS, type_thresholds={t: 0.1 + 0.15 * i for i, t in enumerate(RISKY_TYPES)}),
    "calibrated": variant(
        levels=LEVELS, calibration=FITTED | {"data_sha256": "0" * 64, "addon_sha256": "0" * 64}, unsafe_threshold=0.7
    ),
}


def action(policy, logits, places, change):
    changed = [[value + change * (place in places) for place, value in enumerate(row)] for row in logits]
    return weigh(policy, [reading(row, policy.temperatures) for row in changed]).decision.action


@pytest.mark.parametrize("name", POLICIES)
def test_the_nearest_flip_is_one_and_nothing_nearer_is(name):
    policy = POLICIES[name]
    rng = torch.Generator().manual_seed(7)
    flipped = 0
    for count in (1, 1, 3):
        logits = (torch.randn(count, 11, generator=rng, dtype=torch.float64) * 2).tolist()
        readings = [reading(row, policy.temperatures) for row in logits]
        now = weigh(policy, readings)
        flips = nearest_flips(policy, readings, now.reading)
        assert [flip.concept for flip in flips] == list(CONCEPTS)
        for places, flip in zip(PLACES, flips, strict=True):
            reach = 25.0 if flip.logit_change is None else abs(flip.logit_change) * (1 - 1e-6)
            tried = [reach * step / 60 for step in range(1, 61)]
            for change in [*tried, *(-one for one in tried)]:
                assert action(policy, logits, places, change) == now.decision.action, (flip, change)
            probs = now.reading.type_probs + now.reading.level_probs
            assert flip.probability == pytest.approx(probs[places[0]], abs=1e-12)
            if flip.logit_change is not None:
                flipped += 1
                assert action(policy, logits, places, flip.logit_change) == flip.action != now.decision.action
    assert flipped or name == "all off"
    if name == "all off":
        assert not flipped


def test_the_flip_of_a_threshold_is_known_in_closed_form():
    # p(clean) = .2, and the level head is sure of none: raising clean to half undoes the risk
    logits = [math.log(p) for p in (0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2)] + [50.0, 0.0, 0.0, 0.0]
    one = reading(logits)
    flips = {flip.concept: flip for flip in nearest_flips(Policy.load(), [one], one)[:11]}
    assert flips["clean"].logit_change == pytest.approx(math.log(4.0))
    assert flips["clean"].changed_probability == pytest.approx(0.5)
    assert (flips["clean"].action, flips["clean"].type, flips["clean"].level) == ("allow", "clean", "none")
    assert flips["politics"].logit_change is None, "the other risks are enough without it"
    assert flips["high"].logit_change is None, "a hint at every level"

    one = reading([*logits[:7], 0.0, 1.0, 0.0, 0.0])
    *alone, both = nearest_flips(Policy.load(), [one], one)
    assert {flip.logit_change for flip in alone} == {None}, "the other head is enough"
    assert (both.head, both.action) == ("both", "allow")
    assert both.logit_change == pytest.approx(max(math.log(4.0), math.log(2.0 + math.e)))


def test_no_number_has_no_flip_and_no_logits_are_a_fault():
    broken = Reading("prompt", [math.nan] * 7, [math.nan] * 4, logits=[math.nan] * 11)
    assert nearest_flips(Policy.load(), [broken], broken) == ()
    with pytest.raises(ValueError, match="logits were not kept"):
        nearest_flips(Policy.load(), [Reading("prompt", [1.0] * 7, [1.0] * 4)], broken)
