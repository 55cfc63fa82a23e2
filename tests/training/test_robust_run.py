"""Stage 0 through train.py: its base, several ranks, stopping and going on, and what it refuses."""

import json
import shutil
import signal
import sys
import time

import pytest
import tiny
import torch
from safetensors.torch import load_file



def rows_of(out):
    return [json.loads(line) for line in (out / "stage0-run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def stage0(base, world):
    """train.py --stage 0 on the tiny base, for some steps of each phase."""
    def go(out, *options, ranks=1, expect=0):
        shared = ["--recipe", "sandbox", "--stage", 0, "--model_name_or_path", base, "--image_folder", world,
                  "--data_path", world / "mixed.jsonl", "--output_dir", out, "--dtype", "fp32", "--warmup_steps", 0,
                  "--global_batch_size", 4, "--micro_batch_size", 2, "--feature_steps", 2, "--concept_steps", 2]  # fmt: skip
        given = {str(option) for option in options}
        pairs = [str(x) for i in range(0, len(shared), 2) if shared[i] not in given for x in shared[i : i + 2]]
        codes, output = tiny.outcome(tiny.start(tiny.train_command([*pairs, *map(str, options)]), ranks))
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


def test_sigterm_saves_and_the_rest_follows(base, world, stage0, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    length = ["--feature_steps", 30, "--concept_steps", 30]
    stage0(whole, *length)
    options = ["--recipe", "sandbox", "--stage", 0, "--model_name_or_path", base, "--image_folder", world,
               "--data_path", world / "mixed.jsonl", "--output_dir", stopped, "--dtype", "fp32", "--warmup_steps", 0,
               "--global_batch_size", 4, "--micro_batch_size", 2, *length]  # fmt: skip
    processes = tiny.start(tiny.train_command([str(option) for option in options]))
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
        (["--feature_steps", 0, "--concept_steps", 0], "both 0"),
        (["--lora_r", 4], "only acts in stage 2"),
        (["--max_steps", 4], "only acts in stages 1 and 2"),
        (["--warmup_steps", 2], "leaves none"),
        (["--model_name_or_path", "no/base"], "must be a folder"),
    ],
)
def test_what_cannot_be_is_one_sentence(stage0, tmp_path, options, sentence):
    output = stage0(tmp_path / "out", *options, expect=2)
    assert sentence in output
    assert "Traceback" not in output


def test_a_plan_of_stage_0_is_refused(run, tmp_path):
    output = run([sys.executable, "-m", "psa_fast.cli", "plan", "--stage", "0", "--recipe", "llava-1.5-7b", "--gpus", "1",
                  "--gpu_gb", "80"], expect=2)  # fmt: skip
    assert "stages 1 and 2" in output
