"""`psa-fast serve`: its options, its keys, and one real process from start to stop."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from builders.http_requests import QUESTION, chat, png, user
from builders.tiny import ROOT, free_port

from psa_fast.cli import main
from psa_fast.serve.api_keys import ApiKeys
from psa_fast.serve.settings import ServerSettings
from psa_fast.serve.wire_errors import ApiError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--api_keys FILE, or --open"),
        (["--port", "70000"], "--port is 70000"),
        (["--audit_mb", "5"], "--audit_mb does nothing without --audit"),
        (["--audit", "log", "--audit_mb", "0"], "--audit_mb is 0"),
        (["--max_queue", "0"], "--max_queue is 0"),
        (["--max_queue", "8"], "--max_inputs is 32, but only --max_queue 8"),
        (["--max_wait", "-1"], "--max_wait is -1.0; expected at least 0"),
        (["--timeout", "nan"], "--timeout is nan"),
        (["--model_name", " "], "--model_name is ' '"),
        (["--policy", "absent.yaml"], "absent.yaml"),
        (["--shadow", "absent.yaml"], "absent.yaml"),
        (["--api_keys", "absent.txt"], "absent.txt"),
    ],
)
def test_what_cannot_be_served_is_refused_before_a_model_is_loaded(options, message, capsys, monkeypatch):
    monkeypatch.delenv("PSA_FAST_API_KEYS", raising=False)
    assert main(["serve", "--model", "absent", *options]) == 2
    assert message in capsys.readouterr().err


def test_an_open_server_has_no_keys(capsys, monkeypatch):
    monkeypatch.setenv("PSA_FAST_API_KEYS", "first-key-0123456")
    assert main(["serve", "--model", "absent", "--open"]) == 2
    assert "--open is for a server without API keys" in capsys.readouterr().err


def test_without_the_extra_a_sentence_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", "absent"]) == 2
    assert "psa-fast[serve]" in capsys.readouterr().err


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# who: why\n\nfirst-key-0123456\n")
    keys = ApiKeys.load(file, {"PSA_FAST_API_KEYS": "second-key-012345, third-key-0123456"})
    names = {keys.check(f"Bearer {word}-key-0123456"[:24]) for word in ("first", "second", "third")}
    assert len(names) == 3
    for header in (None, "", "Bearer ", "first-key-0123456", "Bearer first-key-012345", "Bearer # who: why"):
        with pytest.raises(ApiError) as refused:
            keys.check(header)
        assert refused.value.status == 401
    assert ApiKeys.load(None, {}).check(None) is None
    for text, environment in (("# none\n", {}), ("short\n", {}), ("a key with blanks in it\n", {})):
        file.write_text(text)
        with pytest.raises(ValueError, match="keys") as error:
            ApiKeys.load(file, environment)
        assert text.strip() not in str(error.value)
    with pytest.raises(ValueError, match="PSA_FAST_API_KEYS"):
        ApiKeys.load(None, {"PSA_FAST_API_KEYS": ""})


def test_limits_are_numbers():
    for name in ("max_body_mb", "max_images", "max_pixels", "max_new_tokens", "max_batch"):
        with pytest.raises(ValueError, match=name):
            ServerSettings(**{name: 0})


def test_a_process_from_start_to_stop(trained, tmp_path):
    pytest.importorskip("uvicorn", reason="the extra psa-fast[serve] is not installed")
    port, key = free_port(), "some-key-0123456789"
    command = [sys.executable, "-m", "psa_fast.cli", "serve", "--model", trained.addon, "--base", trained.base]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PSA_FAST_API_KEYS": key}
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [*map(str, command), "--port", port], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        address = f"http://127.0.0.1:{port}"

        def get(path, body=None):
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(address + path, data, headers)
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)

        deadline = time.monotonic() + 120
        while True:
            try:
                assert get("/healthz") == {"status": "ok"}
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert get("/v1/chat/completions", chat(user(QUESTION, png(1))))["psa"]["checked"]
        # openai's own client, where it is there
        try:
            import openai
        except ModuleNotFoundError:
            openai = None
        if openai is not None:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key=key)
            call = chat(user(QUESTION, png(1)))
            whole = client.chat.completions.create(**call)
            chunks = client.chat.completions.create(**call, stream=True)
            pieces = [c.choices[0].delta.content or "" for c in chunks]
            assert "".join(pieces) == whole.choices[0].message.content
            assert client.moderations.create(input=QUESTION, model="psa").results[0].categories.sexual is False
            with pytest.raises(openai.BadRequestError, match="tools"):
                client.chat.completions.create(**call, tools=[{"type": "function", "function": {"name": "f"}}])
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    said = (tmp_path / "log").read_text()
    assert code in (0, -signal.SIGTERM), said
    assert "Application shutdown complete" in said
    assert QUESTION not in said
    assert key not in said
