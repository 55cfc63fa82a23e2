"""What a run writes as it goes: metrics.jsonl, its reporters, one log line, the progress bar."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from psa_fast.files import named

from .reporters import Reporter

METRICS = "metrics.jsonl"
Row = Mapping[str, "float | None"]
LOSSES = ("loss", "loss_lm", "loss_type", "loss_level", "loss_adversarial")
FIELDS = (
    "step",
    "loss",
    "loss_lm",
    "loss_type",
    "loss_level",
    "loss_adversarial",
    "grad_norm",
    "lr",
    "micro_batches",
    "tokens",
    "supervised_tokens",
    "padding_share",
    "seconds",
    "data_seconds",
    "tokens_per_s",
    "samples_per_s",
    "mfu",
    "peak_memory_gb",
)


class MetricsLog:
    """Rank 0's record of a run. A resumed run drops the lines after the step it resumes from, then appends.

    Args:
        folder: of the stage.
        total_steps: of the run.
        start_step: the step it resumes from, or 0.
        console: for log lines and progress.
        title: of the progress bar.
        fields: what a row holds, the step first.
        losses: those of them that a log line shows.
        speed: the end of a log line.
        reporters: where the figures go besides; closed with the log.

    Raises:
        OSError: naming the file, when it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int,
        console: Console,
        title: str,
        fields: Sequence[str] = FIELDS,
        losses: Sequence[str] = LOSSES,
        speed: Callable[[Row], str] | None = None,
        reporters: Sequence[Reporter] = (),
    ):
        self._fields, self._losses, self._speed = fields, losses, speed or _speed
        self._path = path = folder / METRICS
        self._reporters = reporters
        kept = []
        if path.exists() and start_step:
            # a killed run may have left half a line; whatever lies beyond the checkpoint is run again
            with named(path):
                lines = path.read_bytes().splitlines()
            for line in lines:
                step = _step_of(line)
                if step is None:
                    console.print(f"{path}: dropping an incomplete line left by the interrupted run")
                elif step <= start_step:
                    kept.append(line.decode())
        with named(path):
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(line + "\n" for line in kept))
            self._file = path.open("a")
        self._progress = Progress(
            TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"),
            TimeRemainingColumn(), TextColumn("{task.fields[line]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("steps", total=total_steps, completed=start_step, line="")
        self._console = console
        self._total = total_steps
        self._every = max(1, total_steps // 20)
        self._progress.start()

    def write(self, row: Row) -> None:
        """Record one optimizer step.

        Args:
            row: exactly the keys of `fields`; None for a loss that no row of the step reached, or the run leaves out.

        Raises:
            OSError: naming the file that cannot be written.
        """
        step = int(row["step"] or 0)
        self._record({name: row[name] for name in self._fields}, step)
        losses = " ".join(f"{name} {shown(row[name])}" for name in self._losses)
        self._progress.update(self._task, completed=step, line=f"loss {shown(row['loss'])} {self._speed(row)}")
        if step % self._every == 0 or step in (1, self._total):
            self._console.print(
                f"step {step}/{self._total} {losses} lr {row['lr']:.2e} {row['seconds']:.2f} s {self._speed(row)}",
                soft_wrap=True,
            )

    def write_evaluation(self, step: int, figures: Row) -> None:
        """Record an evaluation after a step, as `eval/NAME`.

        Args:
            step: optimizer steps taken.
            figures: by name; None for one that the answers leave undefined.

        Raises:
            OSError: naming the file that cannot be written.
        """
        self._record({"step": step} | {f"eval/{name}": value for name, value in figures.items()}, step)
        told = " ".join(f"{name} {shown(value)}" for name, value in figures.items())
        self._console.print(f"step {step}/{self._total} evaluation: {told}", soft_wrap=True)

    def _record(self, row: Row, step: int) -> None:
        """A line of the file, and what of it is a number to the reporters."""
        with named(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        found = {name: value for name, value in row.items() if name != "step" and value is not None}
        for reporter in self._reporters:
            reporter.log(found, step)

    def close(self) -> None:
        """Flush and close everything, the reporters too."""
        self._progress.stop()
        with ExitStack() as stack:
            for reporter in self._reporters:
                stack.callback(reporter.close)
            with named(self._path):
                self._file.close()


def _step_of(line: bytes) -> int | None:
    """The step of a line of the log, None for what is no whole line of it."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int else None


def shown(loss: float | None) -> str:
    """Return a loss as the log shows it, a dash where there is none."""
    return "-" if loss is None else f"{loss:.4f}"


def speed(row: Row) -> str:
    """The part of a log line that says how fast a step was, and with how much memory."""
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    return (
        f"{row['tokens_per_s']:,.0f} tokens/s {row['samples_per_s']:.1f} samples/s MFU {mfu} "
        f"padding {row['padding_share']:.1%} {row['peak_memory_gb']:.1f} GiB"
    )


_speed = speed  # the name is an argument above
