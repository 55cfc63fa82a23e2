"""A judging model behind an endpoint: what is sent, retried, kept and never asked twice."""

import base64
import io
import json
import threading
import time
import zlib

import pytest
from builders.judging import fake_endpoint, result, results
from builders.tiny_llava import picture
from PIL import Image

from psa_fast.evaluation.judged import answered, judge_answers
from psa_fast.evaluation.judges.contract import NoReply, Prompt, Reply
from psa_fast.evaluation.judges.endpoint import Endpoint
from psa_fast.evaluation.judges.known import get_format
from psa_fast.evaluation.judges.model_judge import ModelJudge
from psa_fast.evaluation.judges.reply_cache import ReplyCache

SAFE = "Safety: Safe\nCategories: None\nRefusal: No"
UNSAFE = "Safety: Unsafe\nCategories: Violent\nRefusal: No"
ASK = Prompt(({"role": "user", "content": "é ?"},), max_tokens=7)


def endpoint(fake, **options):
    return Endpoint(fake.url, "m", **{"pause": 0.001, "timeout": 5.0, **options})


def test_what_is_sent():
    with fake_endpoint(lambda body: "said") as fake:
        assert endpoint(fake, key="secret")(ASK).text == "said"
        assert endpoint(fake)(Prompt(text="B", max_tokens=4)).text == "said"
    assert fake.paths == ["/v1/chat/completions", "/v1/completions"]
    message = {"role": "user", "content": "é ?"}
    assert fake.calls[0] == {"model": "m", "temperature": 0, "max_tokens": 7, "messages": [message]}
    assert fake.calls[1] == {"model": "m", "temperature": 0, "max_tokens": 4, "prompt": "B"}
    assert fake.headers[0]["Authorization"] == "Bearer secret"
    assert "Authorization" not in fake.headers[1]


def test_pictures_go_with_the_question(tmp_path):
    picture(1).save(tmp_path / "a.png")
    prompt = Prompt(({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}), pictures=("a.png",))
    with fake_endpoint(lambda body: "said") as fake:
        asker = endpoint(fake, image_folder=tmp_path)
        before = asker.digest(prompt)
        asker(prompt)
        image, text = fake.calls[0]["messages"][0]["content"]
        kind, _, data = image["image_url"]["url"].partition(",")
        assert (kind, text) == ("data:image/png;base64", {"type": "text", "text": "q"})
        sent = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        assert sent.tobytes() == picture(1).convert("RGB").tobytes()
        picture(2).save(tmp_path / "a.png")
        assert asker.digest(prompt) != before
        with pytest.raises(ValueError, match=r"a\.png for one: give --image_folder"):
            endpoint(fake)(prompt)


def test_logprobs_are_read():
    top = [{"token": "Yes", "logprob": -0.1}, {"token": "No", "logprob": float("-inf")}]
    choice = {"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]}}
    body = json.dumps({"choices": [choice]}).encode()
    with fake_endpoint(lambda _: (200, body)) as fake:
        reply = endpoint(fake)(Prompt(ASK.messages, max_tokens=1, top_logprobs=5))
    assert reply == Reply("Yes", (("Yes", -0.1),))
    assert fake.calls[0]["logprobs"] is True
    assert fake.calls[0]["top_logprobs"] == 5


@pytest.mark.parametrize(
    "trouble",
    [(429, b""), (500, b"x"), (503, b""), (200, b'{"choices": [{"mess'), (200, b"{}"), (200, b'{"choices": []}')],
)
def test_what_may_pass_is_tried_again(trouble):
    said = iter([trouble, trouble, "at last"])
    with fake_endpoint(lambda body: next(said)) as fake:
        assert endpoint(fake)(ASK).text == "at last"
    assert len(fake.calls) == 3
    with fake_endpoint(lambda body: trouble) as fake, pytest.raises(NoReply, match="2 tries"):
        endpoint(fake, tries=2)(ASK)
    assert len(fake.calls) == 2


def test_what_the_endpoint_says_of_a_bad_request_is_told():
    with fake_endpoint(lambda body: (400, b"too long")) as fake, pytest.raises(NoReply, match="400: 'too long'"):
        endpoint(fake)(ASK)


@pytest.mark.parametrize(("status", "error"), [(400, NoReply), (302, NoReply), (401, ValueError), (404, ValueError)])
def test_what_will_not_pass_is_asked_once(status, error):
    with fake_endpoint(lambda body: (status, b"")) as fake, pytest.raises(error, match=str(status)):
        endpoint(fake, key="secret")(ASK)
    assert fake.paths == ["/v1/chat/completions"]  # no redirect is followed: the key would go with it


def test_no_server_and_a_slow_one():
    with fake_endpoint(lambda body: "x") as fake:
        pass
    with pytest.raises(NoReply, match=r"no connection.*3 tries"):
        endpoint(fake, tries=3)(ASK)
    with fake_endpoint(lambda body: time.sleep(0.3) or "x") as slow, pytest.raises(NoReply, match="timed out"):
        endpoint(slow, tries=1, timeout=0.05)(ASK)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "localhost:8000/v1", "http://u:p@h/v1", "http://h/v1?k=1", "http://"]
)
def test_urls_that_are_none(url):
    with pytest.raises(ValueError, match="--judge_url"):
        Endpoint(url, "m")


def test_a_key_that_cannot_be_sent_is_not_shown():
    with pytest.raises(ValueError, match="no header") as caught:
        Endpoint("http://h/v1", "m", key="very-secret\n")
    assert "secret" not in str(caught.value)


def test_every_answer_is_asked_about_once_and_never_again(tmp_path):
    rows = results(40)
    texts = {(r.request, getattr(r, side)) for r in rows for side in ("guarded", "unguarded")}
    most, now, lock = [0], [0], threading.Lock()

    def reply(body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.005)
        with lock:
            now[0] -= 1
        return SAFE

    with fake_endpoint(reply) as fake:
        found = []
        for _ in range(2):
            with ReplyCache(tmp_path / "replies.jsonl").open() as cache:
                judge = ModelJudge(get_format("qwen3guard"), endpoint(fake, workers=3), cache)
                found.append(judge_answers(rows, judge))
            assert len(fake.calls) == len(texts) == 60
        assert judge.calls == 0
        assert found[0] == found[1]
        assert len(found[0]) == 80
        assert 1 < most[0] <= 3
        # another model is another judge
        with ReplyCache(tmp_path / "replies.jsonl").open() as cache:
            other = Endpoint(fake.url, "other")
            list(ModelJudge(get_format("qwen3guard"), other, cache).judge([answered(rows[0], "guarded")]))
        assert len(fake.calls) == 61


def test_replies_are_in_the_order_of_the_answers(tmp_path):
    rows = results(24)

    def reply(body):
        time.sleep(0.002 * (zlib.crc32(body["messages"][0]["content"].encode()) % 5))
        return SAFE if "here is how" not in body["messages"][-1]["content"] else UNSAFE

    with fake_endpoint(reply) as fake, ReplyCache(tmp_path / "r.jsonl").open() as cache:
        found = judge_answers(rows, ModelJudge(get_format("qwen3guard"), endpoint(fake), cache))
    assert {row["verdict"] for row in found if "here is how" in row["answer"]} == {"unsafe"}
    assert {row["verdict"] for row in found if "here is how" not in row["answer"]} == {"safe"}


def test_a_prompt_without_a_reply_is_failed_and_asked_again_another_time(tmp_path):
    down = [True]
    with fake_endpoint(lambda body: (500, b"") if down[0] else SAFE) as fake:
        for verdict in ("failed", "safe"):
            with ReplyCache(tmp_path / "r.jsonl").open() as cache:
                judge = ModelJudge(get_format("qwen3guard"), endpoint(fake, tries=1), cache)
                [opinion] = judge.judge([answered(results(1)[0], "guarded")])
            assert opinion.verdict == verdict
            down[0] = False


def test_a_run_that_ends_early_asks_the_rest_only(tmp_path):
    rows = [result(number, "risk", f"answer {number}") for number in range(30)]

    def run(fake):
        with ReplyCache(tmp_path / "r.jsonl").open() as cache:
            return judge_answers(rows, ModelJudge(get_format("qwen3guard"), endpoint(fake, workers=1), cache))

    said = iter([SAFE] * 7)
    with fake_endpoint(lambda body: next(said, (401, b""))) as fake, pytest.raises(ValueError, match="401"):
        run(fake)
    with fake_endpoint(lambda body: SAFE) as fake:
        assert {row["verdict"] for row in run(fake)} == {"safe"}
    assert len(fake.calls) == 23


def test_a_cache_cut_short_goes_on(tmp_path):
    file = tmp_path / "deep" / "r.jsonl"
    with ReplyCache(file).open() as cache:
        cache.put("a", Reply("x\n", (("yes", -0.5),)))
        cache.put("b", Reply("é"))
    whole = file.read_bytes()
    for cut in range(1, 12):
        file.write_bytes(whole[:-cut])
        with ReplyCache(file).open() as cache:
            assert cache.get("a") == Reply("x\n", (("yes", -0.5),))
            assert cache.get("b") is None
            cache.put("b", Reply("again"))
        with ReplyCache(file).open() as cache:
            assert cache.get("b") == Reply("again")
    file.write_bytes(b'{"key": \n' + whole)
    with pytest.raises(ValueError, match=r"r\.jsonl:1: no reply of a judge"), ReplyCache(file).open():
        pass
    with (
        ReplyCache(tmp_path / "x").open(),
        pytest.raises(ValueError, match="another run"),
        ReplyCache(tmp_path / "x").open(),
    ):
        pass
