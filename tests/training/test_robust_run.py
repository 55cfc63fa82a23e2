"""Stage 0 through train.py: its base, several ranks, stopping and going on, and what it refuses."""

import json
import shutil
import signal
import time

import pytest
import torch
from builders import tiny
from safetensors.torch import load_file

from psa_fast.cli import main
from psa_fast.training.config import parse_args


def rows_of(out):
    return [json.loads(line) for line in (out / "stage0-run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def options(base, world):
    """train.py's options for stage 0 on the tiny base, a few steps of each phase."""

    def build(out, *given):
        shared = {
            "--stage": 0,
            "--model_name_or_path": base,
            "--data_path": world / "mixed.jsonl",
            "--image_folder": world,
            "--output_dir": out,
            "--dtype": "fp32",
            "--warmup_steps": 0,
            "--global_batch_size": 4,
            "--micro_batch_size": 2,
            "--feature_steps": 2,
            "--concept_steps": 2,
        }
        left = [str(x) for name, value in shared.items() if name not in given for x in (name, value)]
        return tiny.train_command([*left, *map(str, given)])

    return build


@pytest.fixture
def stage0(options):
    """Run it to its end, on any number of ranks, and return the output."""

    def go(out, *given, ranks=1, expect=0):
        codes, output = tiny.outcome(tiny.start(options(out, *given), ranks))
        assert codes == [expect] * ranks, output[-4000:]
        return output

    return go


def tower_of(folder):
    found = load_file(folder / "model.safetensors")
    return {name: value for name, value in found.items() if "vision" in name}


def test_two_ranks_and_a_resumed_run_give_the_base_of_one_rank(stage0, base, direct, tmp_path):
    one, two, again = tmp_path / "one", tmp_path / "two", tmp_path / "again"
    stage0(one, "--save_steps", 1, "--save_total_limit", 4)
    stage0(two, ranks=2)
    rows = rows_of(one)
    assert [row["phase"] for row in rows] == [0, 0, 1, 1]
    for left, right in zip(rows, rows_of(two), strict=True):
        for key in ("loss", "loss_concept", "distance_clean", "distance_attacked", "grad_norm"):
            assert (left[key] is None) == (right[key] is None)
            assert (left[key] or 0.0) == pytest.approx(right[key] or 0.0, rel=1e-3, abs=1e-9), key
    old, new = load_file(base / "model.safetensors"), load_file(one / "stage0" / "model.safetensors")
    assert old.keys() == new.keys()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved
    assert all("vision_tower" in name for name in moved)
    for name, value in tower_of(two / "stage0").items():
        torch.testing.assert_close(value, new[name], rtol=0, atol=2e-4)

    # what a stop in either phase leaves is continued to the bit
    for step in (1, 3):
        folder = again / str(step)
        shutil.copytree(one / "stage0-run" / f"checkpoint-{step}", folder / "stage0-run" / f"checkpoint-{step}")
        stage0(folder, "--save_steps", 1, "--save_total_limit", 4, "--resume", "auto")
        for name, value in tower_of(folder / "stage0").items():
            assert torch.equal(value, new[name]), name

    direct(one, "--stage", 1, "--model_name_or_path", one / "stage0", "--max_steps", 1)
    assert (one / "stage1" / "psa.safetensors").is_file()
    assert "already finished" in stage0(one, "--save_steps", 1, "--save_total_limit", 4, "--resume", "auto")
    stage0(one, "--overwrite_output_dir")
    assert torch.equal(tower_of(one / "stage0")[min(moved)], new[min(moved)])


def test_sigterm_saves_and_the_rest_follows(options, stage0, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    length = ["--feature_steps", 30, "--concept_steps", 30]
    stage0(whole, *length)
    processes = tiny.start(options(stopped, *length))
    log = stopped / "stage0-run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and log.read_text().count("\n") >= 3):
        time.sleep(0.05)
    processes[0].send_signal(signal.SIGTERM)
    codes, output = tiny.outcome(processes)
    assert codes == [0], output[-3000:]
    assert "SIGTERM: saved" in output
    assert not (stopped / "stage0").exists()
    stage0(stopped, *length, "--resume", "auto")
    want = tower_of(whole / "stage0")
    for name, value in tower_of(stopped / "stage0").items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--deepspeed_config", "ds_configs/zero3.json"], "--deepspeed_config ds_configs/zero2.json"),
        (["--feature_steps", "0", "--concept_steps", "0"], "both 0"),
        (["--concept_steps", "0", "--concept_tie", "1"], "--concept_tie has no effect with --concept_steps 0"),
        (["--lora_r", "4"], "only acts in stage 2"),
        (["--max_steps", "4"], "only acts in stages 1 and 2"),
        (["--weight_decay", "0.1"], "must be 0 in stage 0"),
        (["--concept_steps", "10"], "--warmup_steps 10 leaves none"),
    ],
)
def test_options_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_args(["--stage", "0", *options])


def test_a_plan_of_stage_0_is_refused(capsys):
    assert main(["plan", "--stage", "0", "--recipe", "llava-1.5-7b", "--gpus", "1", "--gpu_gb", "80"]) == 2
    assert "stages 1 and 2" in capsys.readouterr().err


def test_the_result_of_another_is_never_overwritten(stage0, tmp_path):
    (tmp_path / "stage0").mkdir()
    output = stage0(tmp_path, expect=2)
    assert f"{tmp_path / 'stage0'} is already there" in output
    assert "Traceback" not in output
