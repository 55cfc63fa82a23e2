"""The training loop of both stages: one path for every rank, from records to a finished add-on."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from psa_fast.training.metrics_log import MetricsLog
from psa_fast.training.micro_batches import Schedule, micro_batches, needs_lengths

from . import checkpoint
from .config import TrainConfig
from .engine import init_distributed
from .ranks import alike
from .reporters import open_reporters
from .run_setup import HintFor, Run, set_up
from .step import StepReport, train_step
from .stop_flag import StopFlag
from .validation import Validation, validate

# seconds that a failing run waits for the step before: DeepSpeed has waited for most of it already
_LAST_WAIT = 10.0


def train(
    config: TrainConfig,
    hint_for: HintFor | None = None,
    console: Console | None = None,
    validation: Validation | None = None,
) -> None:
    """Run one stage to its end, or until SIGTERM or Ctrl-C, which save first.

    Args:
        config: resolved options; `model_name_or_path`, `data_path` and `image_folder` name real files.
        hint_for: (type id, level id) -> the policy's hint text, mixed into prompts at `hint_rate`.
        console: where rank 0 prints.
        validation: what `--eval_every` runs; None: nothing.

    Raises:
        ValueError: options, records or checkpoints that do not fit, before any training.
        FloatingPointError: a loss that is not finite, naming the step and the rows of the batch.
    """
    rank, world_size = init_distributed()
    console = console or Console(markup=False, emoji=False)
    console.quiet = rank != 0
    try:
        _run(config, hint_for, console, rank, world_size, validation)
    finally:
        # gloo ranks may abort at exit otherwise
        dist.destroy_process_group()


def _run(
    config: TrainConfig,
    hint_for: HintFor | None,
    console: Console,
    rank: int,
    world_size: int,
    validation: Validation | None = None,
) -> None:
    run = set_up(config, hint_for, validation, console, rank, world_size)
    if run is None:
        return
    log = _open_log(run) if rank == 0 else None
    stop, batches, launched = StopFlag(), _batches(run), Launched(log)
    run.engine.train()
    with ExitStack() as ending:  # the last comes first, and each whatever another raises
        if log:
            ending.callback(log.close)
        ending.callback(batches.close)
        ending.callback(stop.restore)
        try:
            last = _steps(run, batches, launched, stop, log)
        except Exception:  # a second Ctrl-C waits for nothing
            if log:
                _log_unread(log, launched.unread, console)
            raise
    if last is None:
        return
    if rank == 0:
        checkpoint.finish(config, last)
    dist.barrier()
    console.print(f"stage {config.stage} finished: {config.stage_dir}")


def _steps(
    run: Run, batches: Iterator[list[dict]], launched: Launched, stop: StopFlag, log: MetricsLog | None
) -> Path | None:
    """Take the steps that are left, validate and save as they go: the last checkpoint, None if asked to stop."""
    config, total, saved = run.config, run.records.total_steps, run.saved
    for step in range(run.start + 1, total + 1):
        report = train_step(run.engine, batches, config, run.meter, step, lambda: bool(stop.requested), run.adversary)
        launched.add(report)
        validates, saves = _due(config.eval_every, step, total), _due(config.save_steps, step, total, last=True)
        # the device works on one step while the host reads the one before; what is saved has been read
        stopping = launched.read(0 if validates or saves else 1)
        if stopping:
            launched.read(0)
        if validates and run.validation is not None:  # before it is saved: a resumed run would not come back to it
            _validate(run, run.validation, step, log)
        if saves or stopping:
            with alike():
                saved = checkpoint.save_checkpoint(run.engine, config, step, total, run.records.digest)
        if stopping and step < total:
            run.console.print(f"{stop.requested or 'stopped'}: saved {saved}; continue with --resume auto")
            return None
    assert saved is not None
    return saved


def _due(every: int | None, step: int, total: int, last: bool = False) -> bool:
    """Whether a step is one of every `every` (None and 0: of none), or the last one of something that is done."""
    return bool(every and step % every == 0) or (step == total and (last or bool(every)))


def _validate(run: Run, validation: Validation, step: int, log: MetricsLog | None) -> None:
    """Evaluate, log the figures and keep the add-on if it is the best. A collective."""
    figures = validate(run.engine, validation, run.processor)
    if log:
        log.write_evaluation(step, figures)
    if run.best is not None and run.best.offer(run.engine, step, figures):
        run.console.print(f"best {run.best.metric} so far: {run.best.folder}", soft_wrap=True)


def _open_log(run: Run) -> MetricsLog:
    config, start = run.config, run.start
    reporters = open_reporters(config, start)
    title = f"stage {config.stage}"
    return MetricsLog(config.stage_dir, run.records.total_steps, start, run.console, title, reporters=reporters)


class Launched:
    """The steps that were launched and not read yet, oldest first; rank 0 has a log to read them into."""

    def __init__(self, log: MetricsLog | None) -> None:
        self.unread: deque[StepReport] = deque()
        self._log = log

    def add(self, report: StepReport) -> None:
        """Remember a step."""
        self.unread.append(report)

    def read(self, but: int) -> bool:
        """Log all steps but the last `but`; whether any rank was asked to stop.

        Raises:
            FloatingPointError: a loss that is not finite, naming the step and the rows of the batch.
        """
        stopping = False
        while len(self.unread) > but:
            row, asked = self.unread[0].read()
            self.unread.popleft()
            stopping |= asked
            if self._log:
                self._log.write(row)
        return stopping


def _batches(run: Run) -> Generator[list[dict], None, None]:
    """This rank's micro-batches of each step that is left."""
    dataset, sampler = run.records.dataset, run.records.sampler
    length = dataset.length if needs_lengths(run.config) else None
    schedule = Schedule(sampler, run.config, run.rank, run.world_size, run.start, run.records.total_steps, length)
    return micro_batches(dataset, schedule, run.config, run.processor)


def _log_unread(log: MetricsLog, launched: Iterable[StepReport], console: Console) -> None:
    """Log the steps that were done when the run failed, up to one whose loss is not finite."""
    try:
        for report in launched:
            row = report.read_alone(limit=_LAST_WAIT)
            if row is None:
                return
            log.write(row)
    except Exception as error:  # printed only: raised, it would take the place of the failure
        console.print(f"the last step's figures are lost: {error}")
