"""The server beside the guard asked directly, and what it refuses."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders.http_requests import QUESTION, chat, data_url, png, user

from psa_fast.data.records import Turn
from psa_fast.safety import Guard, Policy, Request


def test_a_chat_is_answered_as_by_the_guard(strict_guard, open_client):
    client = open_client(strict_guard)
    seen = set()
    for seed in range(10):
        reply = client.post("/v1/chat/completions", json=chat(user(QUESTION, png(seed))))
        (expected,) = strict_guard.answer([Request(f"<image>\n{QUESTION}", (png(seed),))], max_new_tokens=6)
        body = reply.json()
        assert reply.status_code == 200
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
        assert body["psa"] == json.loads(json.dumps(expected.verdict.to_json()))
        refused = expected.verdict.action == "refuse"
        assert (choice["finish_reason"] == "content_filter") == refused
        assert (body["usage"]["completion_tokens"] == 0) == refused
        assert reply.headers["x-psa-policy-hash"] == strict_guard.policy.hash
        seen.add(refused)
    assert seen == {True, False}


def test_turns_and_pictures_reach_the_guard_in_their_order(guard, open_client):
    client = open_client(guard)
    said = [user("red ?", png(1)), {"role": "assistant", "content": "blue ."}, user("green ?", png(2), png(3))]
    turns = (
        Turn("user", "<image>\nred ?"),
        Turn("assistant", "blue ."),
        Turn("user", "<image>\n<image>\ngreen ?"),
    )
    (expected,) = guard.answer([Request(turns, (png(1), png(2), png(3)))], max_new_tokens=6)
    body = client.post("/v1/chat/completions", json=chat(*said)).json()
    assert body["choices"][0]["message"]["content"] == expected.text
    assert body["psa"]["unsafe_score"] == expected.verdict.unsafe_score
    # what a client gets, it may send back
    said.insert(3, body["choices"][0]["message"] | {"tool_calls": None})
    said.append({"role": "user", "content": "and ?"})
    said[3]["content"] = "red ."
    assert client.post("/v1/chat/completions", json=chat(*said)).status_code == 200


def streamed(reply):
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_streamed_text_is_the_text(strict_guard, open_client):
    client = open_client(strict_guard)
    for seed in range(10):
        call = chat(user(QUESTION, png(seed)))
        whole = client.post("/v1/chat/completions", json=call).json()
        reply = client.post(
            "/v1/chat/completions", json=call | {"stream": True, "stream_options": {"include_usage": True}}
        )
        assert reply.headers["content-type"].startswith("text/event-stream")
        chunks = streamed(reply)
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == whole["usage"]
        deltas = [chunk["choices"][0] for chunk in chunks[:-1]]
        assert deltas[0]["delta"]["role"] == "assistant"
        assert chunks[0]["psa"] == whole["psa"]
        assert "".join(d["delta"].get("content", "") for d in deltas) == whole["choices"][0]["message"]["content"]
        assert [d["finish_reason"] for d in deltas if d["finish_reason"]] == [whole["choices"][0]["finish_reason"]]


def test_an_answer_that_the_limit_cuts_says_so(guard, open_client):
    client = open_client(guard)
    reasons = {}
    for tokens in (1, 100):
        body = client.post("/v1/chat/completions", json=chat(user(QUESTION, png(0)), max_tokens=tokens)).json()
        reasons[tokens] = body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"]
    assert reasons[1] == ("length", 1)
    text = body["choices"][0]["message"]["content"]
    (longer,) = guard.answer([Request(f"<image>\n{QUESTION}", (png(0),))], max_new_tokens=120)
    # what ends by itself within the limit is not made longer by a higher one
    assert (reasons[100][0] == "stop") == (longer.text == text)


def test_a_moderation_has_the_fields_of_omni(strict_guard, open_client):
    openai = pytest.importorskip("openai", reason="its types are the oracle")
    client = open_client(strict_guard)
    url = {"type": "image_url", "image_url": {"url": data_url(png(4))}}
    body = client.post("/v1/moderations", json={"input": [{"type": "text", "text": QUESTION}, url]}).json()
    openai.types.ModerationCreateResponse.model_validate(body, strict=True)


def test_a_moderation_says_what_the_guard_reads(strict_guard, open_client):
    client = open_client(strict_guard)
    flags = set()
    for seed in range(10):
        url = {"type": "image_url", "image_url": {"url": data_url(png(seed))}}
        body = client.post(
            "/v1/moderations", json={"model": "psa", "input": [url, {"type": "text", "text": QUESTION}]}
        ).json()
        (verdict,) = strict_guard.verdicts([Request(f"<image>\n{QUESTION}", (png(seed),))])
        (result,) = body["results"]
        flags.add(result["flagged"])
        assert result["flagged"] == verdict.unsafe
        scores, categories = result["category_scores"], result["categories"]
        assert len(scores) == len(categories) == len(result["category_applied_input_types"]) == 13 + 6
        assert scores["psa/illegal-risk"] == scores["illicit"] == verdict.type_probs["illegal risk"]
        assert scores["psa/privacy"] == verdict.type_probs["privacy"]
        assert scores["sexual/minors"] == 0.0
        assert not any("clean" in name for name in scores)
        named = [name for name, flagged in categories.items() if flagged and name.startswith("psa/")]
        assert named == ([f"psa/{verdict.type.replace(' ', '-')}"] if verdict.unsafe else [])
        assert result["category_applied_input_types"]["psa/privacy"] == ["text", "image"]
        assert result["category_applied_input_types"]["violence"] == []
    assert flags == {True, False}
    texts = ["red ?", "blue green ?"]
    results = client.post("/v1/moderations", json={"input": texts}).json()["results"]
    expected = strict_guard.verdicts([Request(text) for text in texts])
    assert [result["psa"]["unsafe_score"] for result in results] == [v.unsafe_score for v in expected]
    assert results[0]["category_applied_input_types"]["psa/privacy"] == ["text"]


def test_what_is_not_read_has_no_score(folders, open_client):
    """An add-on for pictures alone: a score of 0 for words would call them safe."""
    from psa_fast.safety.load import load_guard

    client = open_client(load_guard(folders[1]))
    reply = client.post("/v1/moderations", json={"input": "red ?"})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "no_image"
    body = client.post("/v1/chat/completions", json=chat(user("red ?"))).json()
    assert body["choices"][0]["finish_reason"] == "content_filter"
    assert body["choices"][0]["message"]["content"] == Policy.load().responses.unchecked
    reply = client.post("/beta/litellm_basic_guardrail_api", json={"input_type": "request", "texts": ["red ?"]})
    assert reply.json()["action"] == "BLOCKED"


def test_the_guardrail_blocks_hints_or_lets_through(guard, strict, open_client):
    from base64 import b64encode

    path = "/beta/litellm_basic_guardrail_api"
    strict_guard = Guard(guard.model, guard.processor, strict)
    values = strict.model_dump()
    for level in values["levels"]:
        values["levels"][level] = {"action": "hint", "hint": "Mind {type}."}
    hinting = Guard(guard.model, guard.processor, Policy.model_validate(values))
    seen = set()
    for asked in (strict_guard, hinting):
        client = open_client(asked)
        for seed in range(10):
            image = b64encode(png(seed)).decode() if seed % 2 else data_url(png(seed))
            call = {"input_type": "request", "texts": ["red ?", QUESTION], "images": [image], "litellm_call_id": "x"}
            body = client.post(path, json=call).json()
            (verdict,) = asked.verdicts([Request(f"<image>\nred ?\n{QUESTION}", (png(seed),))])
            assert body["psa"]["unsafe_score"] == verdict.unsafe_score
            seen.add(body["action"])
            if verdict.action == "allow":
                assert body["action"] == "NONE"
            elif verdict.action == "refuse":
                assert body["action"] == "BLOCKED"
                assert verdict.type in body["blocked_reason"]
            else:
                assert body["action"] == "GUARDRAIL_INTERVENED"
                assert body["texts"] == ["red ?", f"Mind {verdict.type}.\n{QUESTION}"]
                assert body["images"] == [image]
    assert seen == {"NONE", "BLOCKED", "GUARDRAIL_INTERVENED"}
    dropped = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}
    for extra in ({"input_type": "response"}, {"tools": [{}]}, {"structured_messages": [dropped]}):
        reply = client.post(path, json={"input_type": "request", "texts": ["red ?"]} | extra)
        assert reply.status_code == 400, extra


def test_forty_at_once_are_answered_as_alone(strict_guard, open_client):
    client = open_client(strict_guard, max_queue=64, max_wait=0.05)
    expected = strict_guard.answer(
        [Request(f"<image>\n{QUESTION}", (png(seed),)) for seed in range(10)], max_new_tokens=6, batch_size=1
    )
    damaged = png(0)[:50]
    start = threading.Barrier(40)

    def ask(number):
        start.wait()
        seed = number % 10
        if number % 8 == 3:  # the header is whole: only the guard's own reading finds the damage
            call = chat(user(QUESTION, damaged))
        elif number % 8 == 5:
            call = chat(user(f"{QUESTION} " * 100, png(seed)))
        else:
            call = chat(user(QUESTION, png(seed)))
        return client.post("/v1/chat/completions", json=call)

    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(ask, range(40)))
    for number, reply in enumerate(replies):
        if number % 8 in (3, 5):
            assert reply.status_code == 400
            assert ("damaged" if number % 8 == 3 else "max_length") in reply.json()["error"]["message"]
            continue
        want = expected[number % 10]
        assert reply.json()["choices"][0]["message"]["content"] == want.text
        assert reply.json()["psa"]["action"] == want.verdict.action
        assert reply.json()["psa"]["unsafe_score"] == pytest.approx(want.verdict.unsafe_score, abs=1e-6)
    sizes = client.server.metrics.registry.get_sample_value
    assert sizes("psa_batch_size_sum") == 40
    assert sizes("psa_batch_size_count") < 40


def test_metrics_and_health(strict_guard, open_client):
    client = open_client(strict_guard)
    assert client.get("/healthz").json() == {"status": "ok"}
    for seed in range(10):
        client.post("/v1/chat/completions", json=chat(user(QUESTION, png(seed))))
    client.post("/v1/chat/completions", json={})
    lines = client.get("/metrics").text.splitlines()
    assert 'psa_requests_total{endpoint="/v1/chat/completions",status="200"} 10.0' in lines
    assert 'psa_requests_total{endpoint="/v1/chat/completions",status="404"} 1.0' in lines
    assert sum(float(line.split()[-1]) for line in lines if line.startswith("psa_verdicts_total{")) == 10
    assert "psa_queue_length 0.0" in lines
    for part in ("parse", "queue", "model", "total"):
        counts = [line for line in lines if line.startswith("psa_latency_seconds_count") and f'"{part}"' in line]
        assert float(counts[0].split()[-1]) >= 10, part
    assert client.get("/v1/models").json()["data"][0]["id"] == "psa"
    for reply in (client.get("/nowhere"), client.get("/v1/moderations")):
        assert reply.status_code in (404, 405)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_without_a_known_key_nothing_is_read(guard, open_client):
    client = open_client(guard, keys=["a-key-of-some-length", "another-key-of-some"])
    paths = ["/v1/chat/completions", "/v1/moderations", "/beta/litellm_basic_guardrail_api"]
    for header in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic a-key-of-some-length"}):
        replies = [client.post(path, headers=header, content=b"{") for path in paths]
        replies += [client.get(path, headers=header) for path in ("/metrics", "/v1/models")]
        assert {reply.status_code for reply in replies} == {401}
    assert client.get("/healthz").status_code == 200
    for key in ("a-key-of-some-length", "another-key-of-some"):
        for header in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
            assert client.post("/v1/moderations", headers=header, json={"input": "red ?"}).status_code == 200
    both = {"authorization": "Bearer no", "x-api-key": key}
    assert client.post("/v1/moderations", headers=both, json={"input": "red ?"}).status_code == 401


def test_the_shadow_policy_is_counted_and_changes_nothing(guard, strict, open_client):
    plain, shadowed = open_client(guard), open_client(guard, shadow=strict)
    answers = []
    for client in (plain, shadowed):
        bodies = [client.post("/v1/chat/completions", json=chat(user(QUESTION, png(s)))).json() for s in range(10)]
        answers.append([(body["choices"], body["psa"]) for body in bodies])
        client.server.batcher.close()
    assert answers[0] == answers[1]
    counted = {
        sample.labels["shadow_action"]: sample.value
        for metric in shadowed.server.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "psa_shadow_verdicts_total"
    }
    expected = Guard(guard.model, guard.processor, strict).verdicts(
        [Request(f"<image>\n{QUESTION}", (png(seed),)) for seed in range(10)]
    )
    refused = sum(verdict.action == "refuse" for verdict in expected)
    assert 0 < refused < 10
    assert counted == {"refuse": refused, "allow": 10 - refused}


def test_a_full_queue_is_told_before_a_body_is_read(guard, open_client, monkeypatch):
    client = open_client(guard, max_queue=32)
    monkeypatch.setattr(client.server.batcher, "_waiting", 32)
    reply = client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
    assert reply.json()["error"]["code"] == "queue_full"
