"""A step that fails ends every rank, data-loading workers included, and leaves the row of the step before."""

import json
import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from psa_fast.data.images import ImageError
from psa_fast.training import loop, run_setup
from psa_fast.training import micro_batches as schedule
from psa_fast.training.config import parse_args

ROOT = Path(__file__).resolve().parents[2]

FAIL = """
import os, sys
sys.path.insert(0, os.getcwd())
from psa_fast.models import PsaVLM
forward, calls = PsaVLM.forward, []
def failing(self, *args, **kwargs):
    calls.append(None)
    if len(calls) == 3 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        raise RuntimeError("not about the loss")
    return forward(self, *args, **kwargs)
PsaVLM.forward = failing
import train
sys.exit(train.main(sys.argv[1:]))
"""


def test_an_error_in_a_step_leaves_the_row_of_the_step_before(command, run, tmp_path):
    script = tmp_path / "fail.py"
    script.write_text(FAIL)
    arguments = command(tmp_path, ranks=2)
    output = run([str(script) if a == str(ROOT / "train.py") else a for a in arguments], expect=1)
    assert "RuntimeError: not about the loss" in output
    rows = [json.loads(line) for line in (tmp_path / "stage1" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_the_loader_is_closed_whatever_fails_and_ctrl_c_waits_for_no_report(
    failure, base, world, tmp_path, group_of_one, monkeypatch
):
    seen = []

    class Log:
        def __init__(self, *_, **__):
            pass

        def write(self, row):
            seen.append(row)

        def close(self):
            raise OSError("the disk is full")

    def batches(*_):
        try:
            yield from range(2)
        finally:
            seen.append("closed")

    def step(engine, batches, *_):
        if next(batches) == 1:
            raise failure
        return SimpleNamespace(read_alone=lambda limit: "the row of the step before")

    for name, stand_in in {
        "MetricsLog": Log,
        "micro_batches": batches,
        "train_step": step,
        "build_engine": lambda *_: SimpleNamespace(train=lambda: None),
        "check_engine": lambda engine: None,
        "shared_matrix_rate": lambda dtype: 1.0,
    }.items():
        monkeypatch.setattr(loop if hasattr(loop, name) else run_setup, name, stand_in)
    options = {"model_name_or_path": base, "data_path": world / "mixed.jsonl", "image_folder": world, "hint_rate": 0}
    config = parse_args([f"--{name}={value}" for name, value in (options | {"output_dir": tmp_path}).items()])
    with pytest.raises(OSError, match="the disk is full") as raised:
        loop._run(config, None, Console(quiet=True), 0, 1)
    assert seen == ["the row of the step before", "closed"][failure is KeyboardInterrupt :]
    del raised  # until here its traceback kept the generator from closing by itself


class SlowRows:
    """The second row takes longer than anything waits for it."""

    def __init__(self):
        self.begun = multiprocessing.Event()

    def __getitem__(self, row):
        if row:
            self.begun.set()
            time.sleep(60)
        return row


def test_workers_in_the_middle_of_a_row_are_killed(monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # what the loader waits for each
    monkeypatch.setattr(schedule, "pack", list)
    before = set(multiprocessing.active_children())

    class Steps:
        start, stop = 0, 2

        def __iter__(self):
            return iter([[0], [1]])

        def micro_batches(self, step):
            return [None]

    config = SimpleNamespace(packing=True, dataloader_num_workers=2, seed=0)
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    rows = SlowRows()
    batches = schedule.micro_batches(rows, Steps(), config, processor)
    assert next(batches) == [[0]]
    assert rows.begun.wait(20)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    batches.close()
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()


class RefusedRows:
    """The second row is refused."""

    def __init__(self, error):
        self.error = error

    def __getitem__(self, row):
        if row:
            raise self.error
        return row


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (ImageError("data.jsonl:7: a.png is missing"), ValueError, "data.jsonl:7: a.png is missing"),
        (OSError(5, "Input/output error", "a.png"), OSError, "[Errno 5] Input/output error: 'a.png'"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_refuses_keeps_its_words(monkeypatch, workers, error, kind, sentence):
    monkeypatch.setattr(schedule, "pack", list)
    config = SimpleNamespace(packing=True, dataloader_num_workers=workers, seed=0)
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    steps = type("Steps", (list,), {"start": 0, "stop": 2, "micro_batches": lambda self, step: [None]})([[0], [1]])
    batches = schedule.micro_batches(RefusedRows(error), steps, config, processor)
    assert next(batches) == [[0]]
    with pytest.raises(kind) as raised:
        next(batches)
    assert str(raised.value) == sentence
