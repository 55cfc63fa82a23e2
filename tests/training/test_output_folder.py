"""Only what a run wrote is deleted, and only one run writes."""

import os

import pytest
from rich.console import Console

from psa_fast.training.config import TrainConfig
from psa_fast.training.output_folder import claim, refuse_used

OURS = [
    "checkpoint-5/trainer_state.json", ".checkpoint-6.tmp/psa.safetensors", "psa_config.json", "psa.safetensors",
    "adapter/adapter_config.json", "llm/model.safetensors", "trainer_state.json", "metrics.jsonl",
    "tensorboard/events.out", "zero_to_fp32.py",
]  # fmt: skip
THEIRS = ["notes.txt", "checkpoint-old/weights", "plots/loss.png", "checkpoint-5-best/x"]


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def left_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_overwriting_deletes_what_a_run_wrote_and_names_the_rest(tmp_path, group_of_one):
    stage = tmp_path / "stage1"
    fill(stage, OURS + THEIRS)
    console = Console(record=True, width=200)
    claim(TrainConfig(output_dir=str(tmp_path), overwrite_output_dir=True), console)
    assert left_in(stage) == sorted(THEIRS)
    assert "kept in" in (said := console.export_text())
    assert "checkpoint-5-best, checkpoint-old, notes.txt, plots" in said


def test_an_earlier_run_is_refused_a_folder_with_notes_is_not(tmp_path, group_of_one):
    config = TrainConfig(output_dir=str(tmp_path))
    fill(tmp_path / "stage1", THEIRS)
    refuse_used(config)
    fill(tmp_path / "stage1", ["metrics.jsonl"])
    with pytest.raises(ValueError, match="holds an earlier run; --resume auto continues it"):
        refuse_used(config)
    claim(config, Console(quiet=True))
    assert "metrics.jsonl" in left_in(tmp_path / "stage1")


def test_two_runs_do_not_write_into_one_folder(tmp_path, group_of_one):
    config = TrainConfig(output_dir=str(tmp_path))
    held = claim(config, Console(quiet=True))
    with pytest.raises(ValueError, match=r"another run is under way in .*stage1"):
        claim(config, Console(quiet=True))
    for file in held:
        file.close()
    claim(config, Console(quiet=True))


def test_a_folder_that_cannot_be_made_is_named(tmp_path, group_of_one):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        claim(TrainConfig(output_dir=str(tmp_path / "file" / "out")), Console(quiet=True))


@pytest.mark.parametrize("name", [".stage1.lock", "stage1/metrics.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_folder_in_a_file_s_place_is_refused_and_not_waited_for(tmp_path, group_of_one, name, make):
    (tmp_path / "stage1").mkdir()
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a .*, not a file"):
        claim(TrainConfig(output_dir=str(tmp_path)), Console(quiet=True))


def test_a_file_in_the_place_of_tensorboard_s_folder_is_refused(tmp_path, group_of_one):
    fill(tmp_path / "stage1", ["tensorboard"])
    with pytest.raises(ValueError, match="tensorboard is not a folder"):
        claim(TrainConfig(output_dir=str(tmp_path)), Console(quiet=True))
