"""`psa-fast explain` on a tiny model: words, JSON and picture; what it refuses before a model is loaded."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
from builders.http_requests import chat, png, user
from builders.tiny_llava import build_addon

from psa_fast.cli import main
from psa_fast.safety import Request, load, load_guard

QUESTION = "what colour is the circle ?"


@pytest.fixture(scope="module")
def addon(folders, tmp_path_factory):
    return str(build_addon(folders[0], tmp_path_factory.mktemp("explain") / "addon"))


def test_words_json_and_picture_say_what_the_guard_says(addon, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png(3))
    body = chat(user(QUESTION, png(3))) | {"model": "whatever", "max_tokens": 5}
    (tmp_path / "request.json").write_text(json.dumps(body))
    picture = tmp_path / "why.svg"
    assert main(["explain", "--model", addon, "--request", str(tmp_path / "request.json"), "--json"]) == 0
    by_file = json.loads(capsys.readouterr().out)
    ask = ["explain", "--model", addon, "--prompt", QUESTION, "--image", str(tmp_path / "a.png")]
    assert main([*ask, "--json", "--picture", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == by_file
    (verdict,) = load_guard(addon).verdicts([Request(QUESTION, (png(3),))])
    assert found["verdict"] == json.loads(json.dumps(verdict.to_json()))
    assert [flip["concept"] for flip in found["flips"]][:2] == ["politics", "illegal risk"]
    assert ET.parse(picture).getroot().tag.endswith("svg")
    assert main(ask) == 0
    assert capsys.readouterr().out.startswith(f"action: {verdict.action}, because {verdict.rule}\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either --prompt"),
        (["--prompt", QUESTION, "--request", "r.json"], "either --prompt"),
        (["--request", "r.json", "--image", "a.png"], "--image goes with --prompt"),
        (["--prompt", QUESTION, "--picture", "a.png"], r"ends in \.svg"),
        (["--request", "absent.json"], "absent.json"),
        (["--request", "FILE"], "request .*body.json: messages"),
        (["--prompt", "<image>"], r"1 <image> mark\(s\), but 0"),
    ],
)
def test_what_cannot_be_explained_is_one_sentence(addon, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(load, "load_guard", lambda *args: pytest.fail("a model was loaded"))
    (tmp_path / "body.json").write_text('{"messages": []}')
    options = [str(tmp_path / "body.json") if option == "FILE" else option for option in options]
    assert main(["explain", "--model", addon, *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)
