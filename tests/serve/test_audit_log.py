"""The audit log: complete, without content, whole after a kill and after its renaming."""

import hashlib
import json

import pytest
from builders.http_requests import QUESTION, chat, png, user

from psa_fast.safety import Guard, Request
from psa_fast.serve.audit_log import AuditLog


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_verdict_is_there_and_no_word_of_the_request(guard, strict, open_client, tmp_path):
    strict_guard = Guard(guard.model, guard.processor, strict, model_hash="ab" * 32)
    file = tmp_path / "logs" / "audit.jsonl"
    client = open_client(strict_guard, keys=["a-key-of-some-length"], shadow=guard.policy, audit=AuditLog(file))
    client.headers["authorization"] = "Bearer a-key-of-some-length"
    for seed in range(10):
        assert client.post("/v1/chat/completions", json=chat(user(QUESTION, png(seed)))).status_code == 200
    client.post("/v1/moderations", json={"input": ["canary " * 300, QUESTION]})
    client.server.batcher.close()
    written = file.read_text()
    assert not any(word in written for word in ("canary", "colour", "circle", "a-key-of", "image>"))
    found = rows(file)
    given = [row for row in found if not row["shadow"]]
    assert len(given) == 12
    assert len(found) == 24
    for seed, row in enumerate(given[:10]):
        (verdict,) = strict_guard.verdicts([Request(f"<image>\n{QUESTION}", (png(seed),))])
        assert row["image_sha256"] == [hashlib.sha256(png(seed)).hexdigest()]
        assert (row["action"], row["rule"], row["unsafe_score"]) == (
            verdict.action,
            verdict.rule,
            verdict.unsafe_score,
        )
        assert (row["policy"], row["model"]) == (strict.hash, "ab" * 32)
        # what was logged decides again as it did
        decision = strict.decide(list(row["type_probs"].values()), list(row["level_probs"].values()))
        assert (decision.action, decision.rule, decision.unsafe_score) == (
            row["action"],
            row["rule"],
            row["unsafe_score"],
        )
        assert set(row["seconds"]) == {"queue", "model"}
    assert given[10]["code"] == "not_checked"
    assert given[10]["rule"] is None
    assert len({row["text_sha256"] for row in given}) == 3
    assert {row["policy"] for row in found if row["shadow"]} == {guard.policy.hash}


def test_an_answer_that_cannot_be_logged_is_not_given(guard, open_client, tmp_path, monkeypatch):
    log = AuditLog(tmp_path / "audit.jsonl")
    client = open_client(guard, audit=log)

    def full(row):
        raise OSError(28, "No space left on device", str(log.path))

    monkeypatch.setattr(log, "write", full)
    reply = client.post("/v1/chat/completions", json=chat(user(QUESTION, png(0))))
    assert reply.status_code == 500
    assert "choices" not in reply.json()


def test_a_full_log_is_renamed_and_nothing_is_lost(tmp_path):
    file = tmp_path / "audit.jsonl"
    log = AuditLog(file)
    log.most = 200
    for number in range(40):
        log.write({"number": number, "more": "x" * 50})
    files = sorted(tmp_path.glob("audit.jsonl.2*"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) > 5
    assert all(path.stat().st_size <= 200 for path in [*files, file])
    assert sorted(row["number"] for path in [*files, file] for row in rows(path)) == list(range(40))
    with pytest.raises(ValueError, match="another process"):
        AuditLog(file)
    log.close()
    file.write_text(file.read_text() + '{"cut')
    log = AuditLog(file)
    log.write({"number": 40})
    log.close()
    assert file.read_text().splitlines()[-2:] == ['{"cut', '{"number": 40}']
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match="folder"):
        AuditLog(tmp_path)
