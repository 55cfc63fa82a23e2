"""`psa-fast policy explain`: the whole table of a policy, and why it decided a logged row or a reading."""

import json
import subprocess
import sys

import pytest
import yaml

from psa_fast.cli import main
from psa_fast.safety.policy import DEFAULT_POLICY, RISKY_LEVELS, RISKY_TYPES, Policy
from psa_fast.safety.reading import Reading, weigh
from psa_fast.taxonomy import level_id, type_id


@pytest.fixture
def file(tmp_path):
    values = yaml.safe_load(DEFAULT_POLICY.read_text())
    values["types"]["privacy"] = False
    values["levels"] |= {"high": {"action": "block"}, "low": {"action": "allow"}}
    values["type_thresholds"] = {kind: 0.2 + 0.1 * i for i, kind in enumerate(RISKY_TYPES)}
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_every_row_of_the_table_is_what_the_policy_decides(file, capsys):
    policy = Policy.load(file)
    assert main(["policy", "explain", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sha256"] == policy.hash
    assert [(row["type"], row["level"]) for row in facts["rows"]] == [(t, v) for t in RISKY_TYPES for v in RISKY_LEVELS]
    for row in facts["rows"]:
        kind, level = type_id(row["type"]), level_id(row["level"])
        for score, unsafe in ((row["threshold"] + 1e-6, True), (row["threshold"] - 1e-6, False)):
            types = [0.0] * 7
            levels = [0.0] * 4
            types[kind], types[6] = score, 1 - score
            levels[level], levels[0] = score, 1 - score
            decision = policy.decide(types, levels)
            assert decision.unsafe is (unsafe and row["on"])
            if decision.unsafe:
                assert (decision.action, decision.hint or decision.response) == (row["action"], row["says"])
            else:
                assert decision.action == "allow"


def test_the_words_name_switches_thresholds_actions_and_the_promise(file, capsys):
    assert main(["policy", "explain", str(file)]) == 0
    said = capsys.readouterr().out
    assert "  fairness: 0.5" in said
    assert "  privacy:" not in said
    assert "Switched off, so allowed, with their part of the risk: privacy." in said
    assert "  low: allow: " in said
    assert "  high: block: the answer is " in said
    assert "not calibrated" in said
    fitted = {"type_temperature": 2.5, "level_temperature": 0.4, "over_refusal": 0.05, "confidence": 0.95, "rows": 100}
    fitted |= {"data_sha256": "0" * 64, "addon_sha256": "1" * 64}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"calibration": fitted, "on_error": "allow"}))
    assert main(["policy", "explain", str(file)]) == 0
    said = capsys.readouterr().out
    assert Policy.load(file).calibration.promise in said
    assert "is answered unread" in said


def test_what_a_policy_does_is_told_without_torch():
    code = (
        "import sys; from psa_fast.cli import main; main(['policy', 'explain', '--json']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def log_row(policy, logits, **changes):
    weighed = weigh(policy, [Reading("prompt", [], [], logits=logits).under((1.0, 1.0))])
    read = {"query": "prompt", "number": None, "span": None, "picture": None, "words_alone": False, "logits": logits}
    decision = weighed.decision
    row = {"version": 1, "shadow": False, "readings": [read], "rule": decision.rule, "policy": policy.hash}
    row |= {"model": None, "checked": True, "applied": True, "unsafe": decision.unsafe, "action": decision.action}
    return row | {"type": None, "level": None, "unsafe_score": decision.unsafe_score, "code": decision.code} | changes


def test_a_row_of_a_log_and_a_reading_say_why(file, tmp_path, capsys):
    policy, logits = Policy.load(file), [0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 4.0]
    log = tmp_path / "audit.jsonl"
    rows = [log_row(policy, logits, shadow=True), log_row(policy, logits), log_row(Policy.load(), logits)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["policy", "explain", str(file), "--log", str(log), "--line", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"]["action"], found["key"]) == ("block", "levels.high")
    assert (found["threshold"], found["threshold_key"]) == (pytest.approx(0.3), "type_thresholds.illegal risk")
    assert found["flips"][-1]["action"] == "allow"
    reading = tmp_path / "reading.json"
    for given in ({"logits": logits}, {name: found["verdict"][name] for name in ("type_probs", "level_probs")}):
        reading.write_text(json.dumps(given))
        assert main(["policy", "explain", str(file), "--reading", str(reading), "--json"]) == 0
        again = json.loads(capsys.readouterr().out)
        for key in ("key", "threshold", "heads"):
            assert again[key] == found[key]
        for mine, theirs in zip(again["flips"], found["flips"], strict=True):
            assert mine["logit_change"] == pytest.approx(theirs["logit_change"], abs=1e-6)
    for line, message in (("1", "holds no verdict"), ("3", "decided by policy"), ("9", "holds no verdict")):
        assert main(["policy", "explain", str(file), "--log", str(log), "--line", line]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "either logits"),
        ({"logits": [1.0] * 10}, "no list of 11 numbers"),
        ({"logits": [*[1.0] * 10, "x"]}, "no finite number"),
        ({"type_probs": [1.0] * 7, "level_probs": [0.25] * 4}, "sum to 1"),
        ({"type_probs": {"a": 1.0}, "level_probs": [0.25] * 4}, "other concepts"),
        ({"logits": [1.0] * 11, "more": 1}, "nothing else"),
    ],
)
def test_what_is_no_reading_is_one_sentence_with_its_file(tmp_path, capsys, content, message):
    file = tmp_path / "reading.json"
    file.write_text(json.dumps(content))
    assert main(["policy", "explain", "--reading", str(file)]) == 2
    said = capsys.readouterr().err
    assert f"reading {file}: " in said
    assert message in said


def test_options_that_do_nothing_are_refused(capsys):
    for options in (
        ["--log", "a.jsonl"],
        ["--line", "1"],
        ["--log", "a", "--line", "1", "--reading", "b"],
        ["--log", "a", "--line", "0"],
    ):
        assert main(["policy", "explain", *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_policy_of_another_taxonomy_is_told_in_its_classes(tmp_path, capsys):
    small = {"version": 1, "name": "small", "heads": {"type": {"harmless": "fine", "classes": ["fire", "fine"]}}}
    values = yaml.safe_load(DEFAULT_POLICY.read_text()) | {"taxonomy": small, "types": {"fire": True}}
    values |= {"levels": {"risky": {"action": "refuse"}}, "memory": {"decay": 0.5, "threshold": 0.8, "level": "risky"}}
    file, reading = tmp_path / "small.yaml", tmp_path / "reading.json"
    file.write_text(yaml.safe_dump(values))
    reading.write_text(json.dumps({"type_probs": [0.9, 0.1], "level_probs": [0.1, 0.9]}))
    assert main(["policy", "explain", str(file)]) == 0
    said = capsys.readouterr().out
    assert "max(1 - p(fine), 1 - p(none))" in said
    assert "For fire the likeliest level says what is done:\n  risky: refuse" in said
    assert "from 0.8 on that is a risk of level risky" in said
    assert main(["policy", "explain", str(file), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["type"], row["level"], row["threshold"], row["action"]) == ("fire", "risky", 0.5, "refuse")
    # the log need not be there: of other classes no decision is explained
    for options in (["--reading", str(reading)], ["--log", "none.jsonl", "--line", "1"]):
        assert main(["policy", "explain", str(file), *options]) == 2
        assert "what explains a decision is of the taxonomy psa, the policy of small" in capsys.readouterr().err
