"""Whole runs on CPU ranks: same trajectory, resume, stop, refusals.

Those of two ranks and those that are killed or stopped go through the deepspeed launcher, as a user's do.
"""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from psa_fast.training.integrity import write_state_file


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(a, b, tolerance, prefix=""):
    left, right = load_file(a / "psa.safetensors"), load_file(b / "psa.safetensors")
    assert left.keys() == right.keys()
    for name in (name for name in left if name.startswith(prefix)):
        torch.testing.assert_close(
            left[name], right[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_two_ranks_follow_one_rank_in_both_stages(command, run, direct, finished, partitioned):
    one, two = finished / "one", finished / "two"
    ds = ["--deepspeed_config", partitioned]
    direct(one, *ds, "--save_steps", 2)
    run(command(two, *ds, ranks=2))
    one_rows, two_rows = rows_of(one / "stage1"), rows_of(two / "stage1")
    assert [r["step"] for r in one_rows] == [1, 2, 3, 4]
    for left, right in zip(one_rows, two_rows, strict=True):
        assert left["supervised_tokens"] == right["supervised_tokens"]
        for key in ("loss", "loss_lm", "loss_type", "loss_level", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=1e-4), key
    assert_same_weights(one / "stage1", two / "stage1", 1e-4)

    stage2 = ["--stage", 2, "--hint_rate", 0.5, *ds]
    # nothing to resume: starts from OUTPUT_DIR/stage1
    direct(one, *stage2, "--resume", "auto")
    assert_same_weights(one / "stage1", one / "stage2", 0.0, "bottleneck.")
    # which layers are recomputed changes no loss either
    run(command(two, *stage2, "--addon", one / "stage1", "--gradient_checkpointing", "every_2", ranks=2))
    for left, right in zip(rows_of(one / "stage2"), rows_of(two / "stage2"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
    adapters = [load_file(out / "stage2" / "adapter" / "adapter_model.safetensors") for out in (one, two)]
    assert any(v.abs().max() > 0 for k, v in adapters[0].items() if "lora_B" in k)
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_activation_checkpointing_and_padded_rows_change_no_loss(direct, finished, tmp_path, partitioned, ranks):
    ds = ["--deepspeed_config", partitioned]
    if not (finished / "one" / "stage1").exists():
        direct(finished / "one", *ds, "--save_steps", 2)
    recomputed = "every_2" if ranks == 1 else "full"
    direct(tmp_path, *ds, "--gradient_checkpointing", recomputed, "--packing", ranks == 1, ranks=ranks)
    for left, right in zip(rows_of(finished / "one" / "stage1"), rows_of(tmp_path / "stage1"), strict=True):
        for key in ("loss", "loss_lm", "loss_type", "loss_level", "grad_norm", "tokens", "supervised_tokens"):
            assert left[key] == pytest.approx(right[key], rel=1e-4), key
        assert left["padding_share"] == 0
        assert (right["padding_share"] > 0) == (ranks == 2)
    assert_same_weights(finished / "one" / "stage1", tmp_path / "stage1", 1e-4)


def test_stage_2_resumes_its_adapter_and_saves_tuned_base_weights(direct, finished, partitioned):
    from psa_fast.models import PsaVLM

    one = finished / "one"
    if not (one / "stage1").exists():
        direct(one)
    lora = ["--stage", 2, "--addon", one / "stage1", "--save_steps", 2, "--deepspeed_config", partitioned]
    out = finished / "lora"
    direct(out, *lora)
    whole = load_file(out / "stage2" / "adapter" / "adapter_model.safetensors")
    # what a kill after step 2 leaves: no later checkpoint, no finished add-on
    shutil.rmtree(out / "stage2" / "checkpoint-4")
    for path in (out / "stage2").iterdir():
        if path.is_file() and path.name != "metrics.jsonl":
            path.unlink()
    assert "at step 2" in direct(out, *lora, "--resume", "auto")
    resumed = load_file(out / "stage2" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    full = finished / "full"
    direct(full, *lora, "--tune_type_llm", "full", "--tune_type_connector", "full", "--learning_rate", 1e-3)
    base = PsaVLM.from_pretrained(None, one / "stage1").state_dict()
    tuned = PsaVLM.from_pretrained(None, full / "stage2").state_dict()
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert any("language_model.layers" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert not any("vision_tower" in name or name.startswith("bottleneck") for name in changed)


def test_killed_run_resumes_on_the_same_trajectory(command, direct, tmp_path, partitioned):
    options = ["--deepspeed_config", partitioned, "--save_steps", 2]
    process = subprocess.Popen(
        command(tmp_path, *options, "--max_steps", 400, "--lr_scheduler_type", "constant"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    stage = tmp_path / "stage1"
    deadline = time.time() + 200
    while not (stage / "checkpoint-2" / "trainer_state.json").exists() and not (stage / "checkpoint-4").exists():
        assert time.time() < deadline, "no checkpoint appeared"
        assert process.poll() is None, "the run ended early"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = max(int(p.name.split("-")[1]) for p in stage.glob("checkpoint-*"))
    same = [*options, "--lr_scheduler_type", "constant"]
    # the killed run was asked for 400 steps; another number would be another schedule, which is refused
    assert "max_steps 400 ->" in direct(tmp_path, *same, "--resume", "auto", expect=2)

    state_file = stage / f"checkpoint-{reached}" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    write_state_file(state_file, state | {"records": "of another file"})
    resumed = (tmp_path, *same, "--resume", "auto", "--max_steps")
    assert "does not hold the records" in direct(*resumed, 400, expect=2)
    end = reached + 2
    state["total_steps"] = state["config"]["max_steps"] = end
    write_state_file(state_file, state)
    output = direct(*resumed, end)
    assert f"at step {reached}" in output
    direct(tmp_path / "whole", *same, "--max_steps", end)
    assert [r["step"] for r in rows_of(stage)] == list(range(1, end + 1))
    assert_same_weights(stage, tmp_path / "whole" / "stage1", 0.0)
    assert "already finished" in direct(*resumed, end)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves(command, direct, tmp_path, number):
    process = subprocess.Popen(
        command(tmp_path, "--max_steps", 400),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "stage1" / "metrics.jsonl"
    deadline = time.time() + 200
    while not (metrics.exists() and metrics.read_text()):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    if number == signal.SIGTERM:
        assert "another run is under way" in direct(tmp_path, "--resume", "auto", expect=2)
    # to the group, as schedulers and Ctrl-C do: DeepSpeed's outermost process passes nothing on by itself
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    saved = list((tmp_path / "stage1").glob("checkpoint-*/trainer_state.json"))
    assert len(saved) == 1, output[-2000:]
    assert f"{number.name}: saved" in output


def test_earlier_run_is_not_overwritten(direct, finished, tmp_path):
    if not (finished / "one" / "stage1").exists():
        direct(finished / "one")
    assert "holds an earlier run" in direct(finished / "one", expect=2)
    assert "run --stage 1 first" in direct(tmp_path, "--stage", 2, expect=2)
