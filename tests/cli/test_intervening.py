"""The options --set, --clear and --clip of one request."""

import json

import pytest
from builders.tiny_llava import build_addon, picture

from psa_fast.cli import main
from psa_fast.safety import load

QUESTION = "what colour is the circle ?"


@pytest.fixture(scope="module")
def ask(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("intervening")
    picture(0).save(root / "a.png")
    addon = build_addon(folders[0], root / "addon")
    return ["--model", str(addon), "--image", str(root / "a.png"), "--prompt", QUESTION]


def test_an_intervention_is_told_in_verdict_and_line(ask, capsys):
    options = ["--max_new_tokens", "3", "--set", "type=illegal-risk", "level=high"]
    assert main(["generate", *ask, *options, "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert (verdict["type"], verdict["level"], verdict["action"]) == ("illegal risk", "high", "hint")
    assert verdict["intervention"] == {"kind": "set", "type": "illegal risk", "level": "high", "most": None}
    assert main(["generate", *ask, *options]) == 0
    assert "[INTERVENED (set type illegal risk level high): hint: " in capsys.readouterr().out
    assert main(["explain", *ask, "--clip", "0.2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"]["action"], found["flips"]) == ("allow", [])
    assert found["margin"] == pytest.approx(-0.3)
    assert main(["explain", *ask, "--clear"]) == 0
    assert "by hand: clear all risk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "privacy"], "--set 'privacy': expected type=NAME"),
        (["--set", "type=weather"], "--set: type is 'weather'"),
        (["--set", "type=privacy", "type=fairness"], "--set 'type=fairness'"),
        (["--set", "type=privacy", "--clear"], "cannot be given together"),
        (["--clip", "much"], "--clip 'much': expected a number"),
        (["--clip", "type=privacy"], "--clip: clip needs the largest probability"),
        (["--clip", "1.5"], "below 1"),
        (["--clear", "--unguarded"], "does nothing with --unguarded"),
    ],
)
def test_what_is_no_intervention_is_refused_before_a_model_is_loaded(ask, monkeypatch, capsys, options, message):
    monkeypatch.setattr(load, "load_guard", lambda *args: pytest.fail("a model was loaded"))
    assert main(["generate", *ask, *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
