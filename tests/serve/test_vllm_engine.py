"""Answers written by an engine that has nothing but the exported folder; the recorded contract is checked there."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from builders.http_requests import QUESTION, chat, png, user
from builders.stage2 import trained
from builders.tiny_llava import build_base
from transformers import AutoModelForImageTextToText, AutoProcessor

from psa_fast.cli import main
from psa_fast.data.records import Turn
from psa_fast.safety import Guard, Policy, Request
from psa_fast.safety.load import load_guard
from psa_fast.serve.vllm_engine import VllmEngine, read_reply
from psa_fast.serve.wire_errors import ApiError, EngineDown

KEY = "engine-key"


class Engine(ThreadingHTTPServer):
    """Stands in for vLLM: transformers' model of the exported folder, asked as the contract has it."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.lock, self.bodies, self.reply = threading.Lock(), [], None
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    @torch.no_grad()
    def answer(self, body):
        assert body.keys() == {"model", "messages", "max_tokens", "temperature", "stop_token_ids", "add_special_tokens"}
        assert (body["model"], body["temperature"]) == ("merged", 0)
        rows, messages = [], []
        for message in body["messages"]:
            content = []
            for part in message["content"]:
                if part["type"] == "image_embeds":
                    data = base64.b64decode(part["image_embeds"], validate=True)
                    tensor = torch.load(io.BytesIO(data), weights_only=True)
                    assert (tensor.ndim, tensor.shape[0], tensor.shape[2]) == (3, 1, 32)
                    assert len(data) < tensor.numel() * tensor.element_size() + 4000  # nothing but these rows
                    rows.append(tensor[0])
                    part = {"type": "image"}
                content.append(part)
            messages.append({"role": message["role"], "content": content})
        assert len(rows) <= 1
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        tokenizer, image = self.processor.tokenizer, self.processor.image_token
        text = text.replace(image, image * (len(rows[0]) if rows else 1))
        ids = tokenizer(text, add_special_tokens=body["add_special_tokens"], return_tensors="pt")["input_ids"]
        embeds = self.model.get_input_embeddings()(ids)
        if rows:
            embeds[ids == self.model.config.image_token_id] = rows[0]
        new = self.model.generate(
            inputs_embeds=embeds,
            max_new_tokens=body["max_tokens"],
            do_sample=False,
            eos_token_id=body["stop_token_ids"],
        )[0].tolist()
        choice = {
            "message": {"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True)},
            "finish_reason": "stop" if new[-1] in body["stop_token_ids"] else "length",
        }
        return {"choices": [choice], "usage": {"prompt_tokens": ids.shape[1], "completion_tokens": len(new)}}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            status, reply = self.server.reply(body) if self.server.reply else (200, self.server.answer(body))
        self.send_response(status)
        if status == 307:
            self.send_header("Location", self.server.url)
        data = json.dumps(reply).encode()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args):
        pass


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Add-on and base with their export."""
    root = tmp_path_factory.mktemp("engine")
    base = build_base(root / "base")
    addon = trained(base, root / "stage2", lora=True, full=("connector",))
    assert main(["export", "--model", str(addon), "--out", str(root / "merged")]) == 0
    return addon, root / "merged"


@pytest.fixture(scope="module")
def running(merged):
    engine = Engine(merged[1])
    thread = threading.Thread(target=engine.serve_forever, daemon=True)
    thread.start()
    yield engine
    engine.shutdown()
    engine.server_close()


@pytest.fixture
def engine(running):
    running.bodies.clear()
    running.reply = None
    return running


@pytest.fixture(scope="module")
def guard(merged):
    return load_guard(merged[0])


def behind(guard, engine, policy=None):
    """The same model, whose answers the engine writes."""
    found = Guard(guard.model, guard.processor, policy, model_hash=guard.model_hash)
    found.writer = VllmEngine(found, engine.url, "merged", KEY, timeout=30)
    return found


def policy(threshold, action=None):
    values = Policy.load().model_dump()
    values["unsafe_threshold"] = threshold
    for level in values["levels"] if action else ():
        values["levels"][level] = {"action": action}
    return Policy.model_validate(values)


ASKED = [
    Request(QUESTION, (png(1),)),
    Request(f"be careful : <image> {QUESTION}", (png(2),)),
    Request(QUESTION),
    Request(
        (Turn("user", f"<image>\n{QUESTION}"), Turn("assistant", "red"), Turn("user", "is that blue ?")), (png(3),)
    ),
]


@pytest.mark.parametrize("threshold", [1e-6, 1.0])
def test_the_engines_answers_are_the_guards_own(guard, engine, threshold):
    own = Guard(guard.model, guard.processor, policy(threshold), model_hash=guard.model_hash)
    wanted = own.answer(ASKED, max_new_tokens=6)
    found = behind(guard, engine, policy(threshold)).answer(ASKED, max_new_tokens=6)
    assert found == wanted
    assert len({answer.text for answer in wanted}) > 1
    hints = [answer.verdict.hint for answer in wanted]
    assert all(hints) if threshold < 1 else not any(hints)
    assert len(engine.bodies) == len(ASKED)


def test_what_the_policy_answers_itself_is_never_sent(guard, engine):
    answers = behind(guard, engine, policy(1e-6, "refuse")).answer(ASKED)
    assert {answer.verdict.action for answer in answers} == {"refuse"}
    assert engine.bodies == []


def test_one_that_the_engine_refuses_takes_no_other_with_it(guard, engine, open_client):
    client = open_client(behind(guard, engine), max_images=1, max_wait=0.2)
    body = chat(user(QUESTION, png(1)))
    good = client.post("/v1/chat/completions", json=body)
    assert good.status_code == 200, good.text
    assert (
        good.json()["choices"][0]["message"]["content"]
        == guard.answer([Request(QUESTION, (png(1),))], max_new_tokens=6)[0].text
    )
    engine.reply = lambda body: (
        (400, {"error": "too long"}) if "blue" in json.dumps(body) else (200, engine.answer(body))
    )
    replies = {}
    threads = [
        threading.Thread(
            target=lambda text=text: replies.update({text: client.post("/v1/chat/completions", json=chat(user(text)))})
        )
        for text in (QUESTION, "is the circle blue ?")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies[QUESTION].status_code == 200
    refused = replies["is the circle blue ?"]
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "engine_failed")


def test_an_engine_that_is_down_is_an_error_and_asked_once_a_batch(guard, engine, open_client):
    client = open_client(behind(guard, engine), max_images=1)
    engine.reply = lambda body: (503, {})
    reply = client.post("/v1/chat/completions", json=chat(user(QUESTION)))
    assert (reply.status_code, reply.json()["error"]["code"]) == (502, "engine_down")
    asked = len(engine.bodies)
    writer = behind(guard, engine)
    writer.writer.url = "http://127.0.0.1:9/v1"
    with pytest.raises(EngineDown, match="no connection"):
        writer.answer(ASKED[:2])
    assert asked == len(engine.bodies) == 1


def test_what_the_engine_cannot_take_is_refused(guard, engine):
    with pytest.raises(ApiError, match="one picture a request") as refused:
        behind(guard, engine, policy(1.0)).answer([Request(f"<image> <image> {QUESTION}", (png(1), png(2)))])
    assert refused.value.status == 400
    varying = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(image_tokens=None)))
    with pytest.raises(ValueError, match="pictures differ in their tokens"):
        VllmEngine(varying, engine.url, "merged")
    assert engine.bodies == []


def whole(**changes):
    choice = {"message": {"content": "red"}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 2}} | changes


def test_a_reply_is_taken_whole_or_not_at_all():
    assert read_reply(json.dumps(whole()).encode(), 5).text == "red"
    for data, words in (
        (b"\xff", "no chat completion"),
        (b"[]", "no chat completion"),
        (json.dumps(whole(choices=[])).encode(), "no chat completion"),
        (json.dumps(whole(usage=None)).encode(), "no chat completion"),
        (json.dumps(whole(choices=[{"message": {"content": None}, "finish_reason": "stop"}])).encode(), "no finished"),
        (json.dumps(whole(choices=[{"message": {"content": "a"}, "finish_reason": None}])).encode(), "no finished"),
    ):
        with pytest.raises(ApiError, match=words):
            read_reply(data, 5)
    with pytest.raises(ApiError, match="read 5 tokens where the prompt has 8"):  # without safety tokens, say
        read_reply(json.dumps(whole()).encode(), 8)


def test_a_redirect_is_not_followed(guard, engine):
    engine.reply = lambda body: (307, {})
    with pytest.raises(ApiError, match="status 307"):
        behind(guard, engine).answer(ASKED[:1])
    assert len(engine.bodies) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine_model", "merged"], "--engine_model does nothing without --engine"),
        (["--engine", "http://host/v1"], "--engine needs --engine_model"),
        (["--engine", "http://host/v1", "--engine_model", "m"], "give --max_images 1"),
        (["--engine", "file:///etc", "--engine_model", "m", "--max_images", "1"], "expected http://HOST:PORT/v1"),
        (["--engine", "http://host:70000/v1", "--engine_model", "m", "--max_images", "1"], "Port out of range"),
        (["--engine", "http://u:p@host/v1", "--engine_model", "m", "--max_images", "1"], "leave out user, password"),
    ],
)
def test_an_engine_that_cannot_be_asked_is_refused_before_a_model_is_loaded(options, message, capsys, monkeypatch):
    monkeypatch.delenv("PSA_FAST_API_KEYS", raising=False)
    assert main(["serve", "--model", "absent", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_command_has_the_engine_write(merged, engine, guard, monkeypatch):
    testclient = pytest.importorskip("fastapi.testclient", reason="the extra psa-fast[serve] is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="the extra psa-fast[serve] is not installed")
    replies = []

    def run(app, **_options):
        with testclient.TestClient(app) as client:
            replies.append(client.post("/v1/chat/completions", json=chat(user(QUESTION, png(1)))))

    monkeypatch.setattr(uvicorn, "run", run)
    monkeypatch.setenv("PSA_FAST_ENGINE_KEY", KEY)
    monkeypatch.delenv("PSA_FAST_API_KEYS", raising=False)
    options = ["--engine", engine.url, "--engine_model", "merged", "--max_images", "1"]
    assert main(["serve", "--model", str(merged[0]), *options]) == 0
    assert replies[0].status_code == 200, replies[0].text
    assert len(engine.bodies) == 1
    (wanted,) = guard.answer([Request(QUESTION, (png(1),))], max_new_tokens=6)
    assert replies[0].json()["choices"][0]["message"]["content"] == wanted.text
