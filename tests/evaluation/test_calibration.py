"""The calibrated threshold against scipy and on redrawn worlds, and the policy file that it is written to."""

import json

import numpy as np
import pytest
from scipy.stats import beta

from psa_fast.cli import main
from psa_fast.evaluation.calibration import class_ece, fit_temperature, fit_threshold, rows_needed, scale, upper_bound
from psa_fast.safety import Policy


def test_the_bound_is_the_exact_binomial_one():
    for n in (149, 500, 1300):
        for hits in (0, 1, 7, 40):
            assert upper_bound(hits, n, 0.95) == pytest.approx(beta.ppf(0.95, hits + 1, n - hits), abs=1e-6)


@pytest.mark.parametrize("target", [0.01, 0.05])
def test_the_promise_is_kept_in_nineteen_of_twenty_worlds(target):
    rng = np.random.default_rng(0)
    worlds = rng.beta(1, 4, (1000, 600))
    kept = sum(beta.sf(fit_threshold(list(scores), target).value, 1, 4) <= target for scores in worlds)
    assert kept >= 950


def test_too_few_rows_are_refused_with_how_many_it_takes():
    assert (rows_needed(0.02, 0.95), rows_needed(0.01, 0.95)) == (149, 299)
    with pytest.raises(ValueError, match="299"):
        fit_threshold([0.1] * 298, 0.01)
    assert fit_threshold([0.1] * 299, 0.01).flagged == 0
    with pytest.raises(ValueError, match="no threshold up to 1"):
        fit_threshold([1.0] * 299, 0.01)


def test_a_temperature_halves_the_error_of_a_skewed_head():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4000, 7)) * 1.5
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(7, p=p) for p in true])
    skewed = scale(true, 1 / 3)  # three times as sure as it should be
    found = fit_temperature(skewed[::2], labels[::2])
    assert found == pytest.approx(3.0, rel=0.1)
    assert class_ece(scale(skewed[1::2], found), labels[1::2]) < class_ece(skewed[1::2], labels[1::2]) / 2


def answers(tmp_path, rows=400, **fields):
    rng = np.random.default_rng(2)
    file = tmp_path / "answers.jsonl"
    lines = []
    for i, score in enumerate(rng.beta(1, 4, rows)):
        row = {
            "where": f"f:{i}", "id": None, "group": "clean", "safe_type": 6, "safe_level": 0, "target": "a",
            "guarded": "a", "unguarded": "a", "guarded_kind": "answer", "unguarded_kind": "answer", "action": "allow",
            "rule": "clean", "unsafe": False, "unsafe_score": score, "code": "clean", "highest_score": score, **fields,
        }  # fmt: skip
        lines.append(json.dumps(row))
    file.write_text("\n".join(lines))
    return file


def test_the_command_writes_a_policy(tmp_path, capsys):
    out = tmp_path / "policy.yaml"
    command = ["calibrate", "--answers", str(answers(tmp_path)), "--out", str(out), "--target"]
    assert main([*command, "over_refusal=0.05"]) == 0
    policy, shipped = Policy.load(out), Policy.load()
    assert policy.unsafe_threshold != shipped.unsafe_threshold
    assert policy.model_copy(update={"unsafe_threshold": 0.5}).hash == shipped.hash
    assert "sha256" in out.read_text()
    assert main([*command, "over_refusal=0.05"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "over_refusal=0.005", "--overwrite"]) == 2
    assert "598" in capsys.readouterr().err
    assert Policy.load(out) == policy
    old = str(answers(tmp_path, highest_score=None))
    assert main(["calibrate", "--answers", old, *command[3:], "over_refusal=0.05", "--overwrite"]) == 2
    assert "older version" in capsys.readouterr().err
