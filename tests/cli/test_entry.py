"""The `psa-fast` command: exit codes, and one sentence for every fault that is not the program's."""

import os
import subprocess
import sys

import pytest

from psa_fast import __version__, cli


def command(monkeypatch, outcome):
    """Make `psa-fast policy check` do `outcome`."""
    monkeypatch.setattr("psa_fast.cli.generate.check_policy", outcome)
    return cli.main(["policy", "check"])


def fail(error):
    def run(args):
        raise error

    return run


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"psa-fast {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("not so"), 2, "psa-fast: error: not so\n"),
        (
            NotADirectoryError(20, "Not a directory", "/dev/null/x"),
            2,
            "psa-fast: error: /dev/null/x: Not a directory\n",
        ),
        (OSError(28, "No space left on device", "/a/b"), 2, "psa-fast: error: /a/b: No space left on device\n"),
        (OSError("/a/b cannot be written"), 2, "psa-fast: error: /a/b cannot be written\n"),
        (PermissionError(13, "Permission denied", "/a"), 2, "psa-fast: error: /a: Permission denied\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_faults_are_one_sentence(monkeypatch, capsys, error, code, words):
    assert command(monkeypatch, fail(error)) == code
    assert capsys.readouterr().err == words


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    with pytest.raises(RuntimeError, match="ours"):
        command(monkeypatch, fail(RuntimeError("ours")))


@pytest.mark.parametrize(
    ("redirect", "code", "words"),
    [(">/dev/full", 2, "No space left on device"), (">&-", 0, ""), ("| true", 1, "")],
)
def test_an_output_that_cannot_be_written(redirect, code, words):
    ask = f"{sys.executable} -m psa_fast.cli policy check"
    script = f"{ask} {redirect}; echo ${{PIPESTATUS[0]}} >&2"
    if redirect == "| true":  # closed before anything is written
        script = f"{{ sleep 0.2; {ask}; echo $? >&2; }} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=os.environ, timeout=60)
    lines = done.stderr.splitlines()
    assert lines[-1] == str(code)
    assert len(lines) == 1 + bool(words)
    assert words in lines[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["policy", "check", ""], "FILE is '', which names nothing"),
        (["data", "check", "a\0b"], "FILE is 'a\\x00b', which names nothing"),
        (["data", "check", "a", "--image_folder", ""], "--image_folder is ''"),
        (["data", "import", "psa", "--source", "a", "--source", "", "--out", "b"], "--source is ''"),
        (["sandbox", "data", "--out", ""], "--out is ''"),
        (["evaluate", "--data", "a", "--base", "b", "--out", ""], "--out is ''"),
        (["generate", "--model", "", "--prompt", ""], "--model is ''"),
        (["evaluate", "--data", "a\udcff", "--base", "b", "--out", "c"], "--data holds '\\udcff' at character 1"),
        (["sandbox", "base", "--out", "a", "--seed", "-1"], "--seed is -1; expected"),
        (["sandbox", "data", "--out", "a", "--seed", "9" * 60], "--seed is 999"),
    ],
)
def test_what_names_nothing_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert len(printed.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
