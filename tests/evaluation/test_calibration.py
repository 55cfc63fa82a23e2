"""Calibration against scipy and on redrawn worlds: bound, threshold, temperature, and both fitted together."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import beta

from psa_fast.evaluation.calibration import class_ece, fit_temperature, fit_threshold, rows_needed, scale, upper_bound
from psa_fast.evaluation.held_out import ALL_TYPES, HeldOut, fit, flagged, type_scores
from psa_fast.safety.policy import Calibration, Policy
from psa_fast.taxonomy import CLEAN, RISK_TYPES


def test_the_bound_is_the_exact_binomial_one():
    for n in (149, 500, 1300):
        for hits in (0, 1, 7, 40):
            assert upper_bound(hits, n, 0.95) == pytest.approx(beta.ppf(0.95, hits + 1, n - hits), abs=1e-6)


@pytest.mark.parametrize("target", [0.01, 0.05])
def test_the_promise_is_kept_in_nineteen_of_twenty_worlds(target):
    rng = np.random.default_rng(0)
    worlds = rng.beta(1, 4, (1000, 600))
    found = [fit_threshold(list(scores), target).value for scores in worlds]
    kept = sum(beta.sf(value, 1, 4) <= target for value in found)
    assert kept >= 950
    # it is not kept by flagging nothing
    assert np.median(beta.sf(found, 1, 4)) > target / 4


def test_too_few_rows_are_refused_with_how_many_it_takes():
    assert (rows_needed(0.02, 0.95), rows_needed(0.01, 0.95)) == (149, 299)
    with pytest.raises(ValueError, match=r"298 harmless rows are too few.* takes 299"):
        fit_threshold([0.1] * 298, 0.01)
    assert fit_threshold([0.1] * 299, 0.01).flagged == 0
    with pytest.raises(ValueError, match="no threshold up to 1"):
        fit_threshold([1.0] * 299, 0.01)


def skewed(rng, rows, classes=7, times=3.0):
    """Logits `times` too large of rows whose labels are drawn by the true ones."""
    true = rng.normal(size=(rows, classes)) * 1.5
    labels = (true + rng.gumbel(size=true.shape)).argmax(1)
    return true * times, labels


def test_a_temperature_halves_the_error_of_a_skewed_head():
    logits, labels = skewed(np.random.default_rng(1), 4000)
    found = fit_temperature(logits[::2], labels[::2])
    assert found == pytest.approx(3.0, rel=0.1)
    rest, told = logits[1::2], labels[1::2]
    assert class_ece(scale(rest, found), told) < class_ece(scale(rest, 1.0), told) / 2

    def loss(t):
        return -log_softmax(logits[::2] / t, axis=1)[np.arange(2000), labels[::2]].mean()

    best = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9})
    assert found == pytest.approx(best.x, abs=1e-6)


def test_scaled_probabilities_and_their_error_are_those_of_scipy_and_of_a_loop():
    logits, labels = skewed(np.random.default_rng(2), 200)
    probs = scale(logits, 2.5)
    np.testing.assert_allclose(probs, softmax(logits / 2.5, axis=1), atol=1e-12)
    error = 0.0
    for low in range(15):
        chosen = [
            i for i, p in enumerate(probs) if low / 15 <= p.max() < (low + 1) / 15 or (low == 14 and p.max() == 1)
        ]
        if chosen:
            right = np.mean([probs[i].argmax() == labels[i] for i in chosen])
            error += len(chosen) / 200 * abs(right - np.mean([probs[i].max() for i in chosen]))
    assert class_ece(probs, labels) == pytest.approx(error, abs=1e-12)


def world(rng, rows, readings=3):
    """Rows of a head that is twice too sure, about half of them harmless, a few readings each."""
    logits = rng.normal(size=(rows, 1, len(RISK_TYPES) + 4)) * 1.5
    logits[..., CLEAN] += 2.0
    logits[..., len(RISK_TYPES)] += 2.0
    drawn = logits[:, 0] + rng.gumbel(size=logits[:, 0].shape)
    kinds, levels = drawn[:, : len(RISK_TYPES)].argmax(1), drawn[:, len(RISK_TYPES) :].argmax(1)
    logits = logits + 0.2 * rng.normal(size=(rows, readings, 1)) * (np.arange(readings) > 0)[:, None]
    return [
        HeldOut("clean" if kind == CLEAN else "risk", {"type": int(kind), "level": int(level)}, row, 0, -1.0)
        for kind, level, row in zip(kinds, levels, 2.0 * logits, strict=True)
    ]


def fitted_policy(found):
    kind, level = found.temperatures
    calibration = Calibration(
        type_temperature=kind, level_temperature=level, over_refusal=0.1, confidence=0.95, rows=found.rows,
        data_sha256="0" * 64, addon_sha256="1" * 64,
    )  # fmt: skip
    values = {name: threshold.value for name, threshold in found.thresholds.items()}
    if ALL_TYPES in values:
        changes = {"unsafe_threshold": values[ALL_TYPES]}
    else:
        changes = {"type_thresholds": values}
    return Policy.load().model_copy(update={"calibration": calibration, **changes})


@pytest.mark.parametrize("per_type", [False, True])
def test_fitted_together_the_promise_holds_on_fresh_rows(per_type):
    rng = np.random.default_rng(3)
    fresh = [row for row in world(rng, 4000) if row.group == "clean"]
    shares = []
    for _ in range(10):
        found = fit(rows := world(rng, 1600), Policy.load(), 0.1, 0.95, per_type)
        assert set(found.thresholds) == (set(RISK_TYPES[:CLEAN]) if per_type else {ALL_TYPES})
        harmless = sum(row.group == "clean" for row in rows)
        assert found.rows == harmless - harmless // 4
        assert found.temperatures == pytest.approx((2.0, 2.0), rel=0.2)
        assert all(one.after < one.before for one in found.heads.values())
        policy = fitted_policy(found)
        shares.append(np.mean([flagged(row, policy) for row in fresh]))
    assert sum(share <= 0.1 for share in shares) >= 9
    assert np.median(shares) > (0.02 if per_type else 0.05)


def test_a_row_is_flagged_as_the_policy_decides():
    rng = np.random.default_rng(4)
    thresholds = dict(zip(RISK_TYPES[:CLEAN], (0.3, 0.5, 0.6, 0.7, 0.8, 0.9), strict=True))
    policy = Policy.load().model_copy(update={"type_thresholds": thresholds})
    rows = world(rng, 300)
    for row in rows:
        decided = [
            policy.decide(softmax(logits[:7]).tolist(), softmax(logits[7:]).tolist()).unsafe for logits in row.logits
        ]
        assert flagged(row, policy) is any(decided)
    assert 20 < sum(flagged(row, policy) for row in rows) < 280
    nothing = HeldOut("clean", {"type": None, "level": None}, np.array([]), 0, float("inf"))
    broken = HeldOut("clean", {"type": None, "level": None}, np.full((1, 11), np.nan), 0, -1.0)
    assert flagged(nothing, policy)
    assert flagged(broken, policy)
    assert not flagged(HeldOut("clean", nothing.labels, nothing.logits, 0, -1.0), policy)
    assert set(type_scores(rows[0], policy, (1.0, 1.0))) <= set(RISK_TYPES[:CLEAN])


def test_what_is_too_little_is_named():
    rng = np.random.default_rng(5)
    with pytest.raises(ValueError, match=r"148 harmless rows are too few.* takes 198"):
        fit([row for row in world(rng, 500) if row.group == "clean"][:148], Policy.load(), 0.02, 0.95)
    unlabelled = [HeldOut(r.group, {"type": None, "level": None}, r.logits, 0, -1.0) for r in world(rng, 600)]
    with pytest.raises(ValueError, match=r"0 rows with a picture and a type label.* about 200"):
        fit(unlabelled, Policy.load(), 0.02, 0.95)
    off = Policy.load().model_copy(update={"types": dict.fromkeys(RISK_TYPES[:CLEAN], False)})
    with pytest.raises(ValueError, match="switches every risk type off"):
        fit(world(rng, 400), off, 0.02, 0.95, per_type=True)
