"""Attacks on a guard of random weights: what they claim, and what the real guard then says."""

import pytest
import torch
from builders.tiny_cases import CASES, QUESTION, noisy, worst_margin

from psa_fast.attacks.pixels import BUDGETS, Case, attack, head_loss, objective, reached
from psa_fast.attacks.search import search
from psa_fast.attacks.target import Readings, Target
from psa_fast.safety import Request


@pytest.fixture
def target(guard):
    """About half of the cases are unsafe to it."""
    found = Target(guard)
    with torch.no_grad():
        margins = torch.stack([worst_margin(found, case) for case in CASES])
        shift = margins.quantile(0.5)  # between two cases
        bias = guard.model.bottleneck.heads.bias
        bias[[6, 7]] += shift
    return found


def flags(target):
    return [one.verdict.unsafe for one in attack(target, CASES, "hide", 0, 1, answers=False)]


@pytest.mark.parametrize("goal", ["hide", "raise"])
def test_success_is_the_guards_verdict_and_grows_with_room(target, goal):
    plain = flags(target)
    assert 2 <= sum(plain) <= 10
    before = None
    for eps in (0, 8, 64, 255):
        outcomes = attack(target, CASES, goal, eps, 20, answers=False)
        assert [one.where for one in outcomes] == [case.where for case in CASES]
        for case, one in zip(CASES, outcomes, strict=True):
            assert (one.pictures.int() - target.ask(case.request).pictures.int()).abs().max() <= eps
            assert one.success == one.claimed == reached(goal, one.verdict)
            # the verdict comes from the guard's public door, for the picture as a file
            request = target.requests([target.ask(case.request)], one.pictures.unsqueeze(0))[0]
            again = target.guard.answer([request], max_new_tokens=1)[0].verdict
            assert (again.unsafe, again.level) == (one.verdict.unsafe, one.verdict.level)
            assert again.unsafe_score == pytest.approx(one.verdict.unsafe_score, abs=1e-5)
        share = sum(one.success for one in outcomes)
        if eps == 0:
            assert [one.success for one in outcomes] == [flag == (goal == "raise") for flag in plain]
        else:
            assert share >= before
        before = share
    assert before == len(CASES)


def test_a_saturated_head_is_still_broken(target):
    """Logits a thousand times as large: every probability is 0 or 1, and the attack finds just as much."""
    plain = attack(target, CASES, "hide", 64, 20, answers=False)
    with torch.no_grad():
        for parameter in target.guard.model.bottleneck.heads.parameters():
            parameter.mul_(1000)
    asked = [target.ask(case.request) for case in CASES]
    scores = [verdict.unsafe_score for verdict in target.verdicts(asked, torch.stack([one.pictures for one in asked]))]
    assert sum(score in (0.0, 1.0) for score in scores) > 6
    sure = attack(target, CASES, "hide", 64, 20, answers=False)
    assert sum(one.success for one in sure) >= sum(one.success for one in plain) - 1
    assert sum(one.success for one in sure) > sum(not flag for flag in flags(target))


def test_noise_does_less_than_the_attack(target):
    found = attack(target, CASES, "hide", 64, 20, answers=False)
    noise = attack(target, CASES, "hide", 64, 5, method="noise", answers=False)
    assert sum(one.success for one in noise) < sum(one.success for one in found)


def test_several_pictures_are_attacked_together_and_each_alone(target):
    pair = [Case(Request(QUESTION, (noisy(20 + i), noisy(40 + i)))) for i in range(4)]
    mixed = [CASES[0], *pair, CASES[1]]
    outcomes = attack(target, mixed, "hide", 255, 40, answers=False)
    assert [len(one.pictures) for one in outcomes] == [1, 2, 2, 2, 2, 1]
    assert all(one.success == one.claimed for one in outcomes)
    assert sum(one.success for one in outcomes) >= 4
    for case, one in zip(pair, outcomes[1:5], strict=True):
        if one.success:  # then no picture of the two is unsafe alone either
            asked = target.ask(case.request)
            assert len(asked.shown) == 3
            margins = target.margins(target.read([asked], one.pictures.unsqueeze(0).float() / 255))
            assert margins.amax() < 0


def test_downgrade_keeps_the_risk_and_lowers_its_level(target):
    with torch.no_grad():
        target.guard.model.bottleneck.heads.bias[10] += 3  # mostly level high
    grave = [case for case, flag in zip(CASES, flags(target), strict=True) if flag]
    before = attack(target, grave, "downgrade", 0, 1, answers=False)
    outcomes = attack(target, grave, "downgrade", 255, 60, answers=False)
    assert sum(one.success for one in outcomes) > sum(one.success for one in before)
    for one in outcomes:
        assert one.success == one.claimed == (one.verdict.unsafe and one.verdict.level == "low")


def test_a_downgrade_takes_the_worst_reading_into_account(target):
    """A reading that is unsafe and high keeps the request high; one that is clean has no say in it."""
    low, high, clean = torch.zeros(11), torch.zeros(11), torch.zeros(11)
    low[[0, 8]], high[[0, 10]], clean[[6, 7, 10]] = 9, 9, torch.tensor([9.0, 9.0, 5.0])
    valid = torch.ones(1, 2, dtype=torch.bool)
    for rows, expected in (((low, low), True), ((low, high), False), ((low, clean), True), ((clean, clean), False)):
        _, success = head_loss(target, Readings(torch.stack(rows).unsqueeze(0), valid), "downgrade")
        assert success.tolist() == [expected]


def test_answers_are_the_guards(target):
    wanted = [Case(case.request, case.where, "red") for case in CASES[:3]]
    outcomes = attack(target, wanted, "hide", 8, 5, max_new_tokens=4)
    for case, one in zip(wanted, outcomes, strict=True):
        request = target.requests([target.ask(case.request)], one.pictures.unsqueeze(0))[0]
        assert one.answer == target.guard.answer([request], max_new_tokens=4)[0].text
        assert one.useful == (one.answer == "red")


def test_every_loss_follows_the_same_success(target):
    asked = [target.ask(case.request) for case in CASES]
    pictures = torch.stack([one.pictures for one in asked])
    x = pictures.float() / 255
    rows = torch.arange(len(CASES))
    successes = [objective(target, asked, "hide", loss)(rows, x)[1] for loss in ("margin", "ce", "worst")]
    assert torch.equal(successes[0], successes[1])
    assert torch.equal(successes[0], successes[2])
    found = {
        loss: search(objective(target, asked, "hide", loss), pictures, 64, 20).success.sum().item()
        for loss in ("margin", "ce", "worst")
    }
    assert max(found.values()) - min(found.values()) <= 3
    with pytest.raises(ValueError, match="'ce' is for hiding"):
        objective(target, asked, "raise", "ce")


def test_errors_name_the_case(target):
    with pytest.raises(ValueError, match="row 7: the request has no picture"):
        attack(target, [Case(Request(QUESTION), "row 7")], "hide", 4, 5)


def test_budgets():
    assert (BUDGETS["quick"].n, BUDGETS["standard"].n) == (60, 200)
    assert BUDGETS["standard"].restarts == 3
