"""The step reads nothing back from the device; its report says what it did, one step later, before any save or failure.

Tensors on the meta device have no values: whatever asks for one fails, as it would wait on a GPU. That covers
train_step and clip_each; the engine and its model are stand-ins here, so not PsaVLM's forward and not DeepSpeed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from psa_fast.models import PsaConfig
from psa_fast.training import step as step_module
from psa_fast.training.config import TrainConfig
from psa_fast.training.flops import Meter, StageFlops
from psa_fast.training.loop import _log_unread
from psa_fast.training.metrics_log import FIELDS, speed
from psa_fast.training.step import StepReport, train_step

ROOT = Path(__file__).resolve().parents[2]
META = torch.device("meta")
METER = Meter(StageFlops(10, 0, 0, 0, 0, 0, 0, 0), rate=100.0)


def batch(samples=2, length=6):
    labels = torch.full((samples, length), -100)
    labels[:, -2:] = 3
    return {
        "input_ids": torch.ones(samples, length, dtype=torch.int64),
        "attention_mask": torch.ones(samples, length, dtype=torch.int64),
        "labels": labels,
        "image_counts": torch.ones(samples, dtype=torch.int64),
        "safe_type": torch.zeros(samples, dtype=torch.int64),
        "safe_level": torch.zeros(samples, dtype=torch.int64),
        "where": [f"a.jsonl:{i}" for i in range(samples)],
    }


class Engine:
    """What train_step asks of DeepSpeed's engine, around a toy on the meta device."""

    device = META

    def __init__(self, look=lambda loss: None):
        self.module = torch.nn.Module()
        self.module.bottleneck, self.module.safety_tokens = torch.nn.Linear(4, 4), torch.nn.Embedding(9, 4)
        self.module.config = PsaConfig(4, 4, 4, num_attention_heads=2)
        self.module.to(META)
        self.look, self.steps = look, 0

    def set_gradient_accumulation_boundary(self, is_boundary):
        assert is_boundary == (self.steps == 1)

    def __call__(self, input_ids, labels, image_counts, num_items, num_concept_rows, **rest):
        assert {t.device for t in (input_ids, labels, num_items, num_concept_rows)} == {META}
        assert image_counts.device.type == "cpu"
        hidden = self.module.bottleneck(self.module.safety_tokens(input_ids))
        loss = hidden.sum() / num_items
        self.look(loss.detach())
        return SimpleNamespace(loss=loss, loss_lm=loss, loss_type=None, loss_level=hidden.sum() / num_concept_rows[1])

    def backward(self, loss, scale_wrt_gas):
        loss.backward()

    def step(self):
        self.steps += 1

    def get_lr(self):
        # the step's own until the engine has stepped, then the next one's
        return [1e-3 if self.steps == 0 else 1e-4]

    def get_global_grad_norm(self):
        return torch.ones((), device=META)


@pytest.fixture
def on_meta(group_of_one, monkeypatch):
    """Runs a step on the meta device; returns the engine and how often something was copied to the host."""

    def go(engine, config):
        copies = []

        def reduce(tensor, op=None):
            assert tensor.device == META

        def copied(values):
            copies.append(values)
            return torch.zeros(values.shape, dtype=values.dtype)

        monkeypatch.setattr(dist, "all_reduce", reduce)
        monkeypatch.setattr(step_module, "_copied", copied)
        report = train_step(engine, iter([[batch(), batch()]]), config, METER, 1, lambda: False)
        assert isinstance(report, StepReport)
        assert report.learning_rate == 1e-3
        return len(copies)

    return go


@pytest.mark.parametrize("config", [TrainConfig(stage=1), TrainConfig(stage=2, concept_loss_weight=0)])
def test_a_step_reads_nothing_from_the_device(on_meta, config):
    engine = Engine()
    assert on_meta(engine, config) == 1  # one copy that nobody waits for
    assert engine.steps == 2


@pytest.mark.parametrize(
    "look", [torch.Tensor.item, torch.Tensor.tolist, float, bool, torch.Tensor.cpu, torch.Tensor.nonzero]
)
def test_the_test_above_notices_a_look(on_meta, look):
    with pytest.raises((RuntimeError, NotImplementedError)):
        on_meta(Engine(look), TrainConfig(stage=1))


ALL_LOSSES = ("loss_lm", "loss_type", "loss_level")


def report_of(where=("a.jsonl:3",), seconds=2.0, computed=ALL_LOSSES, **changes):
    known = {
        "supervised": 8.0, "typed": 2.0, "levelled": 2.0, "tokens": 30.0, "positions": 40.0, "samples": 4.0,
        "flops": 50.0, "loss": 3.0, "loss_lm": 2.0, "loss_type": 0.75, "loss_level": 0.25, "own_loss": 3.0,
        "own_loss_lm": 2.0, "own_loss_type": 0.75, "own_loss_level": 0.25, "stop": 0.0, "peak_memory_gb": 1.5,
        "data_seconds": 0.5, "grad_norm": 7.0, "loss_adversarial": 0.0, "own_loss_adversarial": 0.0,
    } | changes  # fmt: skip
    values = torch.tensor([known[name] for name in step_module._VALUES], dtype=torch.float64)
    began, ended = step_module._Moment(torch.device("cpu")), step_module._Moment(torch.device("cpu"))
    ended.time = began.time + seconds
    return StepReport(7, values, began, ended, 1e-3, 100.0, micro_batches=3, computed=computed, where=list(where))


def test_a_report_says_how_fast_the_step_was(group_of_one):
    row, stopping = report_of().read()
    assert set(row) == set(FIELDS)
    assert not stopping
    assert report_of(stop=1.0).read()[1]
    assert (row["step"], row["micro_batches"]) == (7, 3)
    assert (row["tokens"], row["supervised_tokens"]) == (30, 8)
    assert row["tokens_per_s"] == pytest.approx(15)
    assert row["samples_per_s"] == pytest.approx(2)
    assert row["padding_share"] == pytest.approx(0.25)
    assert row["mfu"] == pytest.approx(50 / 2 / 100)
    assert (row["data_seconds"], row["peak_memory_gb"], row["grad_norm"]) == (0.5, 1.5, 7.0)
    assert speed(row) == "15 tokens/s 2.0 samples/s MFU 25.0% padding 25.0% 1.5 GiB"


@pytest.mark.parametrize(
    ("counts", "computed", "expected"),
    [
        # a mean over nothing comes out as 0 of the step's sums
        ({"typed": 0, "loss_type": 0}, ALL_LOSSES, (3.0, 2.0, None, 0.25)),
        ({"levelled": 0, "loss_level": 0}, ALL_LOSSES, (3.0, 2.0, 0.75, None)),
        ({"supervised": 0, "loss_lm": 0}, ALL_LOSSES, (3.0, None, 0.75, 0.25)),
        ({"typed": 0, "levelled": 0, "loss": 0}, ("loss_type", "loss_level"), (None, None, None, None)),
        ({}, ("loss_lm",), (3.0, 2.0, None, None)),
        ({}, ("loss_type", "loss_level"), (3.0, None, 0.75, 0.25)),
        ({"loss_lm": 0, "loss": 1.0}, ALL_LOSSES, (1.0, 0.0, 0.75, 0.25)),  # a loss that is 0 is 0
    ],
)
def test_a_loss_that_no_row_reached_is_null_not_zero(group_of_one, counts, computed, expected):
    row, _ = report_of(computed=computed, **{name: float(value) for name, value in counts.items()}).read()
    assert tuple(row[name] for name in ("loss", *ALL_LOSSES)) == expected


def test_which_losses_a_run_adds_up():
    def computed(**options):
        return step_module._computed(TrainConfig(**options))

    assert computed() == ALL_LOSSES
    assert computed(stage1_objective="concept") == ("loss_type", "loss_level")
    assert computed(stage1_objective="tokens") == computed(stage=2, concept_loss_weight=0.0) == ("loss_lm",)


def test_a_loss_that_is_not_finite_names_the_step_and_the_rows(group_of_one):
    bad = {"loss_lm": float("nan"), "own_loss_lm": float("nan")}
    with pytest.raises(FloatingPointError, match=r"step 7; rows of the batch: a\.jsonl:3, a\.jsonl:9$"):
        report_of(("a.jsonl:3", "a.jsonl:9"), **bad).read()
    # another rank's loss: its own rows are finite
    with pytest.raises(FloatingPointError, match=r"step 7; rows of the batch: $"):
        report_of(loss=float("inf")).read()


class Lines(list):
    """Stands in for MetricsLog."""

    def write(self, row):
        self.append(row["step"])


def test_a_failing_rank_logs_what_was_done_by_itself_and_hides_nothing():
    # there is no process group here, so a collective would fail
    bad = {"loss": float("nan"), "own_loss": float("nan")}
    assert report_of().read_alone(limit=0)["step"] == 7
    assert report_of(**bad).read_alone(limit=0) is None
    log = Lines()
    _log_unread(log, [report_of(), report_of(**bad), report_of()], Console())
    assert log == [7]
    stuck = report_of()
    stuck.ended.event = SimpleNamespace(query=lambda: False)
    with pytest.raises(TimeoutError, match="has not finished its step"):
        stuck.read_alone(limit=0.02)
    said = Console(record=True)
    _log_unread(None, [report_of()], said)  # what goes wrong here is not what the run failed of
    assert "figures are lost" in said.export_text()


POISON = """
import sys
from psa_fast.models import PsaVLM
forward, calls = PsaVLM.forward, []
def poisoned(self, *args, **kwargs):
    out = forward(self, *args, **kwargs)
    calls.append(None)
    if len(calls) == 5:  # the third step's first micro-batch
        out.loss = out.loss * float("nan")
    return out
PsaVLM.forward = poisoned
import train
sys.exit(train.main(sys.argv[1:]))
"""


def test_nothing_is_saved_after_a_loss_that_is_not_finite(command, tmp_path):
    arguments = command(tmp_path, "--save_steps", 2)
    options = arguments[arguments.index(str(ROOT / "train.py")) + 1 :]
    done = subprocess.run(
        [sys.executable, "-c", POISON, *options],
        capture_output=True, text=True, timeout=240, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    # read while step 4 was under way, after which there would have been a checkpoint
    assert "the loss is not finite at step 3; rows of the batch: " in done.stderr
    assert done.stderr.split("rows of the batch: ")[1].count(".jsonl:") == 4
    stage = tmp_path / "stage1"
    assert [p.name for p in stage.glob("*checkpoint-*")] == ["checkpoint-2"]
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert list(row) == list(FIELDS)
        assert row["padding_share"] == 0
        assert 0 < row["mfu"] < 1
        assert 0 <= row["data_seconds"] <= row["seconds"]
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["samples_per_s"] == pytest.approx(4 / row["seconds"])
        assert 0.1 < row["peak_memory_gb"] < 64
        assert row["micro_batches"] == 2
    assert "matrix rate measured on rank 0: " in done.stdout
