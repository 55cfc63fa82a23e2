"""`psa-fast policy check` and what `psa-fast generate` says before and without a model."""

import subprocess
import sys
from argparse import ArgumentParser

import pytest
import yaml
from builders.tiny_llava import picture

from psa_fast.cli import main
from psa_fast.cli.generate import register
from psa_fast.safety import load
from psa_fast.safety.policy import DEFAULT_POLICY, Policy

QUESTION = "what colour is the circle ?"


def run(*argv):
    parser = ArgumentParser()
    register(parser.add_subparsers())
    args = parser.parse_args([*map(str, argv)])
    return args.func(args)


def test_policy_check_tells_what_a_policy_does(tmp_path, capsys):
    content = yaml.safe_load(DEFAULT_POLICY.read_text())
    content["types"]["privacy"] = False
    content["levels"]["high"] = {"action": "refuse"}
    content["unsafe_threshold"] = 0.25
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["policy", "check", str(file)]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "0.25" in rows["unsafe"]
    assert rows["low"].split()[1] == rows["medium"].split()[1] == "hint"
    assert "Answer with caution." in rows["low"]
    assert rows["high"].split()[1] == "refuse"
    assert "I cannot help with this request" in rows["high"]
    assert rows["sha256"].split()[1] == Policy.load(file).hash
    assert main(["policy", "check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "types off   none" in lines


def test_policy_check_names_the_faults(tmp_path, capsys):
    file = tmp_path / "policy.yaml"
    file.write_text(DEFAULT_POLICY.read_text().replace("0.5", "2.5").replace("privacy: on", "private: on"))
    assert main(["policy", "check", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"psa-fast: error: policy {file}: ")
    assert "unsafe_threshold" in captured.err
    # each level of the file is checked once the one before is right
    assert captured.err.count("\n") == 1


def test_policy_check_loads_no_model():
    code = (
        "import sys; from psa_fast.cli import main; main(['policy', 'check']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_without_an_image_the_answer_is_not_called_allowed(folders, capsys):
    assert run("generate", "--model", folders[1], "--prompt", QUESTION, "--max_new_tokens", 3) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("[NOT CHECKED FOR RISKS: ")
    assert "allow" not in last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "<image> hello"], r"1 <image> mark\(s\), but 0"),
        (["--prompt", "hello \udcff"], "which is no text"),
        (["--prompt", ""], "text or an image"),
        (["--prompt", QUESTION, "--image", "absent.png"], r"absent\.png"),
        (["--prompt", QUESTION, "--max_new_tokens", "250"], "more than the 256 of max_length"),
        (["--prompt", QUESTION, "--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "circle " * 300], "more than the 256 of max_length"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(folders, monkeypatch, options, message):
    monkeypatch.setattr(load, "load_guard", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        run("generate", "--model", folders[1], *options)


def test_an_image_alone_may_be_asked_about(folders, tmp_path, capsys):
    picture(0).save(tmp_path / "a.png")
    ask = ("generate", "--model", folders[1], "--prompt", "", "--image", tmp_path / "a.png", "--max_new_tokens", 3)
    assert run(*ask) == 0
    assert "unsafe score" in capsys.readouterr().out
