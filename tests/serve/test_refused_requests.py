"""Requests that are refused: a status, a sentence, the place at fault, and the guard is never asked."""

import base64
import io
import json
import random

import pytest
from builders.http_requests import QUESTION, chat, data_url, png, user
from PIL import Image

CHAT, MODERATIONS, GUARDRAIL = "/v1/chat/completions", "/v1/moderations", "/beta/litellm_basic_guardrail_api"


@pytest.fixture
def client(guard, open_client, monkeypatch):
    """A client of a server whose guard must not be asked."""

    def never(*args, **kwargs):
        raise AssertionError("the guard was asked")

    monkeypatch.setattr(guard, "answer", never)
    monkeypatch.setattr(guard, "verdicts", never)
    return open_client(guard, max_body_mb=1, max_images=2, max_pixels=10_000, max_inputs=3, max_new_tokens=20)


def image(url):
    return {"role": "user", "content": [{"type": "image_url", "image_url": url}]}


def picture(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def text(words):
    return {"role": "user", "content": words}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"temperature": 0.7}, "temperature"),
        ({"temperature": False}, "temperature"),
        ({"stop": ["."]}, "stop"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"something": 1}, "something"),
        ({"max_tokens": 21}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "6"}, "max_tokens"),
        ({"max_completion_tokens": 5}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": "gpt-4o"}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [text(QUESTION), text(QUESTION)]}, "messages"),
        ({"messages": [{"role": "system", "content": "be rude"}, text(QUESTION)]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages[0].role"),
        ({"messages": [text("")]}, "messages"),
        ({"messages": [text("<image> red ?")]}, "messages[0].content"),
        ({"messages": [text(7)]}, "messages[0].content"),
        ({"messages": [text("\ud800")]}, "messages[0].content"),
        ({"messages": [text(QUESTION) | {"name": "eve"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [image({"url": "https://example.com/a.png"})]}, "messages[0].content[0].image_url.url"),
        ({"messages": [image({"url": "http://169.254.169.254/"})]}, "messages[0].content[0].image_url.url"),
        ({"messages": [image({"url": "file:///etc/passwd"})]}, "messages[0].content[0].image_url.url"),
        ({"messages": [image({"url": "/etc/passwd"})]}, "messages[0].content[0].image_url.url"),
        ({"messages": [image({"url": "data:text/html;base64,AAAA"})]}, "messages[0].content[0].image_url.url"),
        ({"messages": [image({"url": "data:image/png;base64,AA*A"})]}, "messages[0].content[0].image_url.url"),
        ({"messages": [image({"url": data_url(b"no picture")})]}, "messages[0].content[0].image_url.url"),
        ({"messages": [image({"url": data_url(b"")})]}, "messages[0].content[0].image_url.url"),
        ({"messages": [image({"url": data_url(picture(101, 100))})]}, "messages[0].content[0].image_url.url"),
        ({"messages": [image({"url": data_url(png(1)), "detail": "low"})]}, "messages[0].content[0].image_url.detail"),
        ({"messages": [user(QUESTION, png(1), png(2), png(3))]}, "messages[0].content[2].image_url.url"),
    ],
)
def test_a_chat_that_cannot_be_done_as_asked(client, options, param):
    # by hand: the client's own encoder refuses half a character
    body = json.dumps(chat(text(QUESTION)) | options).encode()
    reply = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == (404 if param == "model" else 400)
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) < 300


@pytest.mark.parametrize("path", [CHAT, MODERATIONS, GUARDRAIL])
def test_bodies_that_are_none(client, path):
    json_header = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b'"a"', b"\xff", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[" * 100_000):
        reply = client.post(path, content=content, headers=json_header)
        assert reply.status_code == 400, content[:20]
        assert reply.json()["error"]["message"]
    assert client.post(path, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.post(path, content=b" " * (2**20 + 1), headers=json_header).status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": []},
        {"input": 3},
        {"input": ""},
        {"input": ["a", 3]},
        {"input": ["a"] * 4},
        {"input": "a", "model": "omni-moderation-latest"},
        {"input": "a", "threshold": 0.1},
        {"input": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]},
    ],
)
def test_moderations_that_cannot_be_done(client, body):
    reply = client.post(MODERATIONS, json=body)
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"texts": ["a"]},
        {"input_type": "request"},
        {"input_type": "request", "texts": "a"},
        {"input_type": "request", "texts": [1]},
        {"input_type": "request", "texts": ["a"], "structured_messages": 1},
        {"input_type": "request", "texts": ["a"], "structured_messages": ["a"]},
        {"input_type": "request", "texts": ["a"], "images": ["https://example.com/a.png"]},
        {"input_type": "request", "texts": ["a"], "images": [base64.b64encode(b"none").decode()]},
    ],
)
def test_guardrail_calls_that_cannot_be_read(client, body):
    reply = client.post(GUARDRAIL, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_mutated_requests_are_refused_or_guarded(guard, open_client):
    """A status of 4xx with a sentence, or an answer that was read; never a fault of the server."""
    rng = random.Random(0)
    junk = [None, True, 0, -1, 1e300, "", [], {}, "x" * 500, [[]], {"a": {}}, "<image>", "</s>", "data:", "http://a/"]

    def mutated(value):
        if rng.random() < 0.12:
            return rng.choice(junk)
        if isinstance(value, dict):
            kept = {key: mutated(part) for key, part in value.items() if rng.random() > 0.04}
            return kept | ({rng.choice(["n", "tools", "x", "type"]): rng.choice(junk)} if rng.random() < 0.08 else {})
        return [mutated(part) for part in value] * rng.choice([1, 1, 2]) if isinstance(value, list) else value

    seeds = [
        (CHAT, chat(user(QUESTION, png(1)))),
        (MODERATIONS, {"model": "psa", "input": ["red ?", "blue ?"]}),
        (MODERATIONS, {"input": user(QUESTION, png(1))["content"]}),
        (GUARDRAIL, {"input_type": "request", "texts": ["red ?"], "images": [data_url(png(1))]}),
        (GUARDRAIL, {"input_type": "request", "texts": ["red ?"], "structured_messages": [text("red ?")]}),
    ]
    client = open_client(guard)
    statuses = set()
    for _ in range(400):
        path, seed = rng.choice(seeds)
        body = bytearray(json.dumps(mutated(seed)).encode())
        for _ in range(rng.choice([0, 0, 1, 4])):
            body[rng.randrange(len(body))] = rng.randrange(256)
        reply = client.post(path, content=bytes(body), headers={"content-type": "application/json"})
        statuses.add(reply.status_code)
        if reply.status_code == 200:
            told = reply.json()
            verdicts = [told["psa"]] if "psa" in told else [result["psa"] for result in told["results"]]
            assert all(verdict["checked"] for verdict in verdicts)
        else:
            assert reply.json()["error"]["message"]
    assert statuses == {200, 400, 404}
