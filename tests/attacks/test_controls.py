"""The controls pass on an honest guard and find out one whose gradients are masked."""

import pytest
import torch
from builders.tiny_cases import CASES, QUESTION, noisy, worst_margin

from psa_fast.attacks.controls import (
    converged,
    gradient_is_not_zero,
    gradient_is_the_slope,
    guard_agrees,
    more_room_helps,
    run_controls,
    square_is_weaker,
    transfer,
    transfer_is_weaker,
    unbounded_succeeds,
)
from psa_fast.attacks.pixels import Case
from psa_fast.attacks.target import Readings, Target
from psa_fast.safety import Request


@pytest.fixture
def target(guard):
    """Flags most of the cases, not by much."""
    found = Target(guard)
    with torch.no_grad():
        shift = torch.stack([worst_margin(found, case) for case in CASES]).quantile(0.2)
        guard.model.bottleneck.heads.bias[[6, 7]] += shift
    return found


class Masked(Target):
    """Logits that are rounded to whole steps of 2: the readings stay, the gradient is gone."""

    def read_features(self, asked, features):
        readings = super().read_features(asked, features)
        return Readings((readings.logits / 2).round() * 2 + 0 * readings.logits, readings.valid)


class Shifted(Target):
    """Sees pixels that the guard does not see."""

    def read(self, asked, pixels):
        return super().read(asked, (pixels + 0.1).clamp(0, 1))


def test_an_honest_guard_passes(target):
    seen = []
    found = run_controls(
        target, CASES, {"itself": target}, eps=32, steps=20, radii=(4, 32, 128), queries=40, progress=seen.append
    )
    by_name = {control.name: control for control in found}
    assert len(found) == len(seen) == 11
    must = {"gradient_is_the_slope", "gradient_is_not_zero", "more_room_helps", "unbounded_succeeds", "guard_agrees"}
    assert all(by_name[name].passed for name in must), by_name
    assert all(isinstance(control.passed, bool) for control in found)
    flagged = by_name["gradient_is_not_zero"].numbers["n"]
    assert 6 <= flagged <= len(CASES)
    shares = by_name["more_room_helps"].numbers["success"]
    assert shares["4"] < shares["128"]  # else growing would tell nothing


def test_masked_gradients_are_found_out(guard, target):
    masked = Masked(guard)
    flagged = [case for case in CASES if worst_margin(target, case) > 2]
    assert len(flagged) >= 4
    assert not gradient_is_not_zero(masked, flagged).passed
    assert not gradient_is_the_slope(masked, flagged, 0).passed
    assert not unbounded_succeeds(masked, flagged, 20, 0).passed
    # a surrogate with gradients does better than the attack on what is masked
    assert not transfer_is_weaker(masked, "open", target, flagged, 128, 20, 0).passed
    assert not square_is_weaker(masked, flagged, 255, 20, 300, 0).passed


def test_an_attack_on_another_picture_than_the_guard_sees_is_found_out(guard, target):
    flagged = [case for case in CASES if worst_margin(target, case) > 0]
    assert guard_agrees(target, flagged, 32, 20, 0).passed
    assert not guard_agrees(Shifted(guard), flagged, 32, 20, 0).passed


def test_a_search_that_ends_too_early_has_not_converged(target):
    flagged = [case for case in CASES if worst_margin(target, case) > 0]
    assert not more_room_helps(target, flagged, (255, 0), 20, 0).passed  # the wrong way round
    assert not converged(target, flagged * 2, 255, 1, 0).passed or unbounded_succeeds(target, flagged, 1, 0).passed


def test_transfer_is_judged_by_the_other_guard(target, folders):
    from psa_fast.safety import load_guard

    other = Target(load_guard(folders[1]))
    outcomes = transfer(other, target, CASES[:4], 64, 10)
    asked = [target.ask(case.request) for case in CASES[:4]]
    verdicts = target.verdicts(asked, torch.stack([one.pictures for one in outcomes]))
    assert [one.success for one in outcomes] == [not verdict.unsafe for verdict in verdicts]


def test_nothing_flagged_is_no_control(target):
    with torch.no_grad():
        target.guard.model.bottleneck.heads.bias[[6, 7]] += 1e4
    with pytest.raises(ValueError, match="flags none"):
        run_controls(target, [Case(Request(QUESTION, (noisy(1),)))])


def test_half_precision_is_not_checked_by_differences(target):
    target.guard.model.bfloat16()
    control = gradient_is_the_slope(target, CASES[:1], 0)
    assert control.passed is None
    assert "half precision" in control.numbers["reason"]
