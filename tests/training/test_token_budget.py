"""Whole runs under a token budget follow the run without one: ZeRO-2 and ZeRO-3, one rank and two, resumed or not."""

import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from psa_fast.data import GlobalBatchSampler, PsaDataset, load_records
from psa_fast.models import load_processor
from psa_fast.safety.policy import Policy
from psa_fast.training.config import TrainConfig
from psa_fast.training.micro_batches import Schedule

LONGEST = 108
BATCH = ("--global_batch_size", 8, "--max_length", LONGEST, "--hint_rate", 0.5)
BUDGET = ("--max_tokens_per_micro_batch", LONGEST)


@pytest.fixture
def budgeted(command):
    """The launcher's command line under the budget, which takes the place of a micro-batch size."""

    def build(*arguments, ranks=1):
        line = command(*arguments, *BATCH, *BUDGET, ranks=ranks)
        at = line.index("--micro_batch_size")
        return line[:at] + line[at + 2 :]

    return build


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("budget")


def rows_of(out):
    return [json.loads(line) for line in (out / "stage1" / "metrics.jsonl").read_text().splitlines()]


def weights_of(out):
    return load_file(out / "stage1" / "psa.safetensors")


def assert_same_run(expected, out):
    for left, right in zip(rows_of(expected), rows_of(out), strict=True):
        assert (left["tokens"], left["supervised_tokens"]) == (right["tokens"], right["supervised_tokens"])
        for name in ("loss", "loss_lm", "loss_type", "loss_level", "grad_norm", "lr"):
            assert left[name] == pytest.approx(right[name], rel=1e-5), name
    left, right = weights_of(expected), weights_of(out)
    assert left.keys() == right.keys()
    for name in left:
        assert_close(left[name], right[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_number_of_micro_batches_varies_here(base, world):
    """Or the runs below would show nothing."""
    processor = load_processor(base, SimpleNamespace(num_safety_tokens=8))
    records = load_records(world / "mixed.jsonl", world)
    hint = Policy.load(None).hint
    dataset = PsaDataset(records, world, processor, hint, hint_rate=0.5, max_length=LONGEST)
    config = TrainConfig(global_batch_size=8, max_tokens_per_micro_batch=LONGEST)
    sampler = GlobalBatchSampler(len(records), 8)
    for world_size, several in ((1, 3), (2, 2)):
        schedule = Schedule(sampler, config, 0, world_size, 0, 4, dataset.length)
        counts = [len(schedule.micro_batches(step)) for step in range(4)]
        assert len(set(counts)) > 1
        assert min(counts) >= several


@pytest.mark.parametrize("zero", [3, 2])
def test_a_budget_changes_neither_losses_nor_weights(command, budgeted, run, finished, partitioned, zero):
    plain, out = finished / "plain", finished / f"zero{zero}"
    if not plain.exists():
        run(command(plain, *BATCH, "--deepspeed_config", partitioned))
    config = partitioned if zero == 3 else f"ds_configs/zero{zero}.json"
    run(budgeted(out, "--deepspeed_config", config, "--save_steps", 2, ranks=2))
    assert_same_run(plain, out)
    assert len({row["micro_batches"] for row in rows_of(out)}) > 1
    assert {row["micro_batches"] for row in rows_of(plain)} == {4}


def test_a_resumed_run_packs_as_the_whole_one(budgeted, run, finished, partitioned):
    whole, out = finished / "zero3", finished / "resumed"
    options = ["--deepspeed_config", partitioned, "--save_steps", 2]
    if not whole.exists():
        run(budgeted(whole, *options, ranks=2))
    # what a kill after step 2 leaves
    shutil.copytree(whole / "stage1" / "checkpoint-2", out / "stage1" / "checkpoint-2")
    shutil.copy(whole / "stage1" / "metrics.jsonl", out / "stage1")
    assert "at step 2" in run(budgeted(out, *options, "--resume", "auto", ranks=2))
    expected, found = weights_of(whole), weights_of(out)
    assert all(expected[name].equal(found[name]) for name in expected)
    assert [row["loss"] for row in rows_of(whole)] == [row["loss"] for row in rows_of(out)]
