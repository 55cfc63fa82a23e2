"""The thread that asks the guard: bounded, fair to each request, and whole at its end."""

import threading

import pytest

from psa_fast.safety import Request
from psa_fast.serve.batcher import Batcher
from psa_fast.serve.settings import ServerSettings
from psa_fast.serve.wire_errors import ApiError


class Gate:
    """A guard that answers a request with its own text once the gate is open, and breaks over some."""

    def __init__(self):
        self.open, self.entered = threading.Event(), threading.Event()
        self.batches = []

    def verdicts(self, requests, batch_size):
        self.entered.set()
        assert self.open.wait(10)
        texts = [request.prompt for request in requests]
        self.batches.append(texts)
        if "breaks" in texts:
            raise RuntimeError("out of memory")
        return texts


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()


def ask(batcher, *texts):
    return batcher.submit([Request(text) for text in texts])


def test_one_that_breaks_takes_no_other_with_it(gate):
    batcher = Batcher(gate, ServerSettings(max_wait=0.2))
    gate.open.set()
    one, bad, other = ask(batcher, "one", "breaks", "other")
    assert (one.result(10).verdict, other.result(10).verdict) == ("one", "other")
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(10)
    assert gate.batches == [["one", "breaks", "other"], ["one"], ["breaks"], ["other"]]
    assert ask(batcher, "later")[0].result(10).verdict == "later"
    batcher.close(10)


def test_what_finds_the_queue_full_is_refused_at_once_and_whole(gate):
    batcher = Batcher(gate, ServerSettings(max_queue=3, max_inputs=3, max_batch=1, max_wait=0.0))
    first = ask(batcher, "first")
    assert gate.entered.wait(10)
    ask(batcher, "a", "b")
    with pytest.raises(ApiError) as refused:
        ask(batcher, "c", "d")
    assert (refused.value.status, refused.value.code) == (429, "queue_full")
    assert refused.value.headers() == {"retry-after": "1"}
    (c,) = ask(batcher, "c")
    assert batcher.waiting == 3
    gate.open.set()
    assert first[0].result(10).verdict == "first"
    assert c.result(10).verdict == "c"
    assert gate.batches == [["first"], ["a"], ["b"], ["c"]]
    batcher.close(10)


def test_who_has_given_up_is_not_read(gate):
    batcher = Batcher(gate, ServerSettings(max_batch=4, max_wait=0.0))
    ask(batcher, "first")
    assert gate.entered.wait(10)
    gone, stays = ask(batcher, "gone", "stays")
    assert gone.cancel()
    gate.open.set()
    assert stays.result(10).verdict == "stays"
    assert gate.batches == [["first"], ["stays"]]
    batcher.close(10)


def test_the_end_answers_what_was_taken(gate):
    batcher = Batcher(gate, ServerSettings(max_batch=2, max_wait=0.0))
    futures = ask(batcher, *"abcde")
    assert gate.entered.wait(10)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while batcher.alive:
        pass
    with pytest.raises(ApiError) as refused:
        ask(batcher, "late")
    assert (refused.value.status, refused.value.code) == (503, "stopping")
    gate.open.set()
    assert [future.result(10).verdict for future in futures] == list("abcde")
    closing.join(10)
    assert not closing.is_alive()


def test_a_request_that_waits_too_long_is_given_up(guard, open_client, monkeypatch):
    late = threading.Event()
    monkeypatch.setattr(guard, "verdicts", lambda requests, batch_size: late.wait(10) and [None])
    client = open_client(guard, timeout=0.1)
    reply = client.post("/v1/moderations", json={"input": "red ?"})
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "timeout"
    late.set()


def test_a_fault_of_the_model_is_an_error_with_a_cause(guard, open_client, monkeypatch):
    def breaks(*args, **kwargs):
        raise RuntimeError("the words of the request")

    monkeypatch.setattr(guard, "answer", breaks)
    client = open_client(guard)
    body = {"model": "psa", "messages": [{"role": "user", "content": "red ?"}]}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 500
    assert "RuntimeError" in reply.json()["error"]["message"]
    assert "words" not in reply.text
