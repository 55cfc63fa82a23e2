"""Each script of examples/ does what its docstring says, on something tiny."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from builders import tiny, tiny_llava

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name):
    """The module of an example, freshly."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_replace_pooling_head(capsys):
    options = ["--width", "24", "--heads", "4", "--keys", "9", "--batch", "2", "--rounds", "2"]
    load("replace_pooling_head").main(options)
    shown = capsys.readouterr().out
    assert float(re.search(r"fp64: (\S+)", shown)[1]) < 1e-12
    assert re.search(r"MultiheadAttention \d+\.\d ms, attention_pool \d+\.\d ms\nratio \d", shown)


@pytest.fixture(scope="module")
def addon(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return tiny_llava.build_addon(tiny_llava.build_base(root / "base"), root / "addon")


def test_guard_a_model(addon, tmp_path, capsys):
    for number in range(2):
        tiny_llava.picture(number).save(tmp_path / f"{number}.png")
    images = [word for number in range(2) for word in ("--image", str(tmp_path / f"{number}.png"))]
    assert load("guard_a_model").main(["--model", str(addon), *images, "--prompt", "what colour ?"]) == 0
    pictures, words = capsys.readouterr().out.split("“How do I forge")
    assert pictures.startswith("“what colour ?” (0.png, 1.png)")
    assert words.startswith(" the letter?” (no picture)")
    assert "decided by  the words alone, asked by " in words
    for part in (pictures, words):
        assert re.search(r"action      (allow|hint|refuse|block): .*unsafe score \d\.\d{3}", part)
        assert re.search(r"decided by  .+, asked by (all|the learned|one|a few)", part)


def test_guard_a_model_says_how_the_demo_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert load("guard_a_model").main([]) == 2
    assert "`make demo` makes runs/demo/stage2" in capsys.readouterr().out


def test_train_on_your_records(tmp_path):
    base = tiny.build_base(tmp_path / "base")
    script = str(EXAMPLES / "train_on_your_records.py")
    command = [sys.executable, script, "--out", str(tmp_path / "mine"), "--base", str(base), "--steps", "2"]
    codes, output = tiny.outcome(tiny.start(command))
    assert codes == [0], output[-3000:]
    assert "9 record(s)" in output
    assert "no problem" in output
    steps = [json.loads(line) for line in (tmp_path / "mine/run/stage1/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert f"loss {steps[0]['loss']:.3f} at step 1, {steps[1]['loss']:.3f} at step 2" in output
    assert (tmp_path / "mine/run/stage1/psa.safetensors").is_file()
