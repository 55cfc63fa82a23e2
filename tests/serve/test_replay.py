"""A log decided again: exactly as it was, and under another policy as a guard under that policy decides."""

import json

import pytest
import yaml
from builders.http_requests import QUESTION, chat, png, user

from psa_fast.cli import main
from psa_fast.data.records import Turn
from psa_fast.safety import Guard, Policy, Request, load_guard
from psa_fast.safety.redecide import redecide
from psa_fast.serve.audit_log import AuditLog
from psa_fast.serve.replay import replay

WORDS = (QUESTION, "red ?", "blue green red ? be careful", "sorry , i cannot help")


@pytest.fixture
def other(guard):
    """A policy with other types, threshold and actions than the shipped one."""
    values = guard.policy.model_dump()
    values["unsafe_threshold"] = 0.9
    values["levels"]["high"] = {"action": "refuse"}
    values["levels"]["low"] = {"action": "block"}
    values["types"]["privacy"] = values["types"]["misleading"] = False
    return Policy.model_validate(values)


@pytest.fixture
def requests():
    found = [Request(f"<image>\n<image>\n{words}", (png(s), png(s + 1))) for s in range(6) for words in WORDS]
    return [*found, *map(Request, WORDS), Request(QUESTION, (b"none",)), Request(f"<image>\n{QUESTION}", (png(0),))]


def test_another_policy_decides_as_a_guard_under_it(guard, strict, other, requests):
    mine = guard.verdicts(requests)
    differing = 0
    for policy in (strict, other):
        theirs = Guard(guard.model, guard.processor, policy, guard.model_hash).verdicts(requests)
        for before, after in zip(mine, theirs, strict=True):
            assert redecide(policy, before) == after
            differing += before.action != after.action
    assert differing > 10


def calibrated(policy, addon_sha256):
    fitted = {"type_temperature": 2.5, "level_temperature": 0.4, "over_refusal": 0.05, "confidence": 0.95, "rows": 100}
    fitted |= {"data_sha256": "0" * 64, "addon_sha256": addon_sha256}
    return Policy.model_validate(policy.model_dump() | {"calibration": fitted})


def test_temperatures_are_those_of_the_policy_that_decides(guard, requests):
    warm = calibrated(guard.policy, guard.model_hash)
    mine = guard.verdicts(requests)
    theirs = Guard(guard.model, guard.processor, warm, guard.model_hash).verdicts(requests)
    assert any(a.type_probs != b.type_probs for a, b in zip(mine, theirs, strict=True))
    assert [redecide(warm, verdict) for verdict in mine] == theirs
    assert [redecide(guard.policy, verdict) for verdict in theirs] == mine
    with pytest.raises(ValueError, match="calibrated on the add-on"):
        redecide(calibrated(guard.policy, "1" * 64), mine[0])


def test_what_is_not_read_stays_so(folders, other):
    guard = load_guard(folders[1])
    lenient = Policy.model_validate(other.model_dump() | {"on_error": "allow"})
    (mine,) = guard.verdicts([Request(QUESTION)])
    (theirs,) = Guard(guard.model, guard.processor, lenient, guard.model_hash).verdicts([Request(QUESTION)])
    assert (mine.action, theirs.action) == ("block", "allow")
    assert redecide(lenient, mine) == theirs
    assert redecide(guard.policy, theirs).action == "block"


def test_a_log_is_replayed_and_two_policies_compared(guard, other, open_client, tmp_path, capsys):
    log = tmp_path / "audit.jsonl"
    files = {"old": tmp_path / "old.yaml", "new": tmp_path / "new.yaml"}
    for name, policy in (("old", guard.policy), ("new", other)):
        files[name].write_text(yaml.safe_dump(policy.model_dump(exclude_none=True)))
        assert Policy.load(files[name]).hash == policy.hash
    client = open_client(guard, audit=AuditLog(log), shadow=other)
    expected = []
    for seed in range(6):
        for words in WORDS:
            asked = Request(f"<image>\n{words}", (png(seed),))
            pair = [Guard(guard.model, guard.processor, p).verdicts([asked])[0] for p in (guard.policy, other)]
            expected.append(tuple(verdict.action for verdict in pair))
            assert client.post("/v1/chat/completions", json=chat(user(words, png(seed)))).status_code == 200
    client.post("/v1/chat/completions", json=chat(user("red " * 300)))
    client.server.batcher.close()

    assert main(["policy", "replay", str(log), "--policy", str(files["old"])]) == 0
    assert capsys.readouterr().out.startswith("25 rows, 25 the same, 0 different")
    assert main(["policy", "replay", str(log), "--policy", str(files["new"])]) == 2
    assert f"{log}:" in (said := capsys.readouterr().err)
    assert ": decided by policy" in said
    assert main(["policy", "diff", str(files["old"]), str(files["new"]), "--records", str(log)]) == 0
    said = capsys.readouterr().out.splitlines()
    for old, new in {pair for pair in expected if pair[0] != pair[1]}:
        (line,) = [line for line in said if line.split()[:3] == [old, "->", new]]
        assert line.split()[3] == str(expected.count((old, new)))
    assert sum(old != new for old, new in expected) > 3

    # a row that was changed by hand comes out differently
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if not row["shadow"]]
    rows[0]["action"] = "block"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["policy", "replay", str(log)]) == 1
    assert "24 the same, 1 different" in capsys.readouterr().out
    for wrong in ({"version": 1}, {"version": 2}, [], rows[0] | {"readings": [{"query": "prompt"}]}):
        log.write_text(json.dumps(rows[0]) + "\n" + json.dumps(wrong))
        assert main(["policy", "replay", str(log)]) == 2
        assert f"{log}:2: " in capsys.readouterr().err


def test_what_turns_add_up_to_is_served_logged_and_replayed(guard, folders, open_client, tmp_path):
    """Turns that are each below the threshold, under a memory just below and just above what they add up to."""
    turns = [user(WORDS[0]), {"role": "assistant", "content": "red"}, user(WORDS[1])]
    asked = Request((Turn("user", WORDS[0]), Turn("assistant", "red"), Turn("user", WORDS[1])))
    lenient = guard.policy.model_dump() | {"unsafe_threshold": 1.0}
    wide = Policy.model_validate(lenient | {"memory": {"decay": 0.5, "threshold": 99.0, "level": "low"}})
    (verdict,) = Guard(guard.model, guard.processor, wide).verdicts([asked])
    assert (verdict.action, verdict.highest_score < 1.0 < verdict.accumulated) == ("allow", True)
    for factor, code in ((0.99, "accumulated"), (1.01, "clean")):
        memory = {"decay": 0.5, "threshold": verdict.accumulated * factor, "level": "low"}
        policy = Policy.model_validate(lenient | {"memory": memory})
        log = tmp_path / f"{code}.jsonl"
        client = open_client(Guard(guard.model, guard.processor, policy, guard.model_hash), audit=AuditLog(log))
        psa = client.post("/v1/chat/completions", json=chat(*turns)).json()["psa"]
        assert (psa["code"], psa["action"]) == (code, "hint" if code == "accumulated" else "allow")
        client.server.batcher.close()
        row = json.loads(log.read_text())
        assert row["accumulated"] == pytest.approx(verdict.accumulated)
        assert (replay(log, policy).rows, replay(log, policy).same) == (1, 1)
    with pytest.raises(ValueError, match="reads no turn's words alone"):
        open_client(load_guard(folders[1]), shadow=wide)
