"""`train.py` and `psa-fast train`: one program, one sentence for a failure, printed once."""

import os
import subprocess
from unittest import mock

import pytest

from psa_fast import cli, train
from psa_fast.training import loop
from psa_fast.training.ranks import alike, from_rank_0


@pytest.fixture(autouse=True)
def waited(monkeypatch):
    """Seconds that a silent rank has waited for the one that speaks."""
    found = []
    monkeypatch.setattr(train.time, "sleep", found.append)
    return found


def as_rank(rank, local_rank=None):
    """Context of a launched rank's environment."""
    return mock.patch.dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank if local_rank is None else local_rank))


@pytest.fixture
def fails(base, world, tmp_path, monkeypatch):
    """Calls main while training raises `error`; returns the exit code."""

    def go(error, out=tmp_path):
        def raising(*_, **__):
            raise error

        monkeypatch.setattr(loop, "train", raising)
        inputs = ["--model_name_or_path", base, "--data_path", world / "mixed.jsonl", "--image_folder", world]
        return train.main([*map(str, inputs), "--output_dir", str(out)])

    return go


@pytest.mark.parametrize("argv", [["--no_such_option"], ["--seed", "many"], ["--recipe", "nope"], ["--max_steps=0"]])
def test_options_that_no_rank_can_use_are_refused_once(capsys, argv, waited):
    with as_rank(0):
        assert train.main(argv) == 2
    assert not waited
    said = capsys.readouterr()
    assert said.err.startswith("train.py: error: ")
    assert said.err.count("\n") == 1
    with as_rank(1):
        assert train.main(argv) == 2
    assert capsys.readouterr().err == ""
    assert waited  # or the launcher might end rank 0 before it has spoken
    # another node may have another folder, so it speaks for itself
    with as_rank(8, local_rank=0):
        assert train.main(argv) == 2
    assert capsys.readouterr().err.startswith("train.py: error: [rank 8] ")


def test_a_path_with_brackets_is_printed_as_it_is(fails, capsys, tmp_path):
    assert fails(ValueError("bad"), tmp_path / "[/bold] :cat:") == 2
    assert "output_dir=" + str(tmp_path / "[/bold] :cat:") in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "/runs/x"), ValueError("bad"), FloatingPointError("nan")]
)
def test_a_rank_s_own_failure_is_printed_by_that_rank(fails, capsys, error):
    with as_rank(3):
        assert fails(error) == 2
    sentence = str(error).replace("[Errno 28] No space left on device: '/runs/x'", "/runs/x: No space left on device")
    assert capsys.readouterr().err == f"train.py: error: [rank 3] {sentence}\n"


def test_a_failure_of_all_ranks_is_printed_once(fails, capsys, group_of_one):
    def refuse():
        raise ValueError("no row is left")

    with pytest.raises(ValueError, match="no row is left") as shared:
        from_rank_0(refuse)
    with as_rank(3):
        assert fails(shared.value) == 2
    assert "error" not in capsys.readouterr().err
    with as_rank(0):
        assert fails(shared.value) == 2
    assert capsys.readouterr().err.endswith("train.py: error: no row is left\n")


@pytest.mark.parametrize(
    ("raised", "expected"), [(OSError(28, "full", "/x"), OSError), (ValueError("bad"), ValueError)]
)
def test_rank_0_s_errors_keep_their_kind(group_of_one, raised, expected):
    def fail():
        raise raised

    with pytest.raises(expected) as error:
        from_rank_0(fail)
    assert str(error.value) == str(raised)
    assert from_rank_0(lambda: [1]) == [1]


def test_a_fault_of_the_program_keeps_its_traceback(fails):
    with pytest.raises(RuntimeError, match="shape"), alike():
        fails(RuntimeError("shape mismatch"))


def test_a_failure_of_the_versions_comes_before_the_inputs(monkeypatch, capsys, tmp_path):
    from psa_fast.models import versions

    def refuse():
        raise ValueError("psa-fast needs peft 0.18 or newer")

    monkeypatch.setattr(versions, "check_versions", refuse)
    monkeypatch.setenv("PSA_FAST_CACHE", str(tmp_path / "cache"))
    assert train.main(["--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "train.py: error: psa-fast needs peft 0.18 or newer\n"
    assert not (tmp_path / "cache").exists()


def test_the_sandbox_s_cache_that_cannot_be_written_is_a_sentence(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PSA_FAST_CACHE", str(tmp_path / "file" / "cache"))
    assert train.main(["--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: error: ")
    assert str(tmp_path / "file") in said


def test_the_installed_command_is_the_same_program(monkeypatch, capsys):
    assert cli.main(["train", "--stage", "1", "--max_steps", "0"]) == 2
    assert capsys.readouterr().err.startswith("psa-fast train: error: --max_steps is 0; expected a whole number")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--help"])
    assert ended.value.code == 0
    assert "memory and speed:" in capsys.readouterr().out


def test_several_ranks_are_started_by_the_launcher(monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command) or 0)
    assert cli.main(["train", "--num_gpus", "2", "--stage", "2", "--no_packing", "--output-dir", "o"]) == 0
    (command,) = calls
    assert command[1:] == [
        "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "psa_fast.train",
        "--stage=2", "--packing=False", "--output_dir=o",
    ]  # fmt: skip
    assert cli.main(["train", "--num_gpus", "0"]) == 2
