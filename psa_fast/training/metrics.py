"""What a run writes as it goes: metrics.jsonl, TensorBoard, one log line, the progress bar."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

FIELDS = (
    "step",
    "loss",
    "loss_lm",
    "loss_type",
    "loss_level",
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
        absent: fields that this run does not compute; null in the file, and nowhere else.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int,
        console: Console,
        title: str,
        absent: Collection[str] = (),
    ):
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = []
        if path.exists() and start_step:
            # a killed run may have left half a line; whatever lies beyond the checkpoint is run again
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    console.print(f"{path}: dropping an incomplete line left by the interrupted run")
                    continue
                if row["step"] <= start_step:
                    kept.append(line)
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._progress = Progress(
            TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"),
            TimeRemainingColumn(), TextColumn("{task.fields[line]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("steps", total=total_steps, completed=start_step, line="")
        self._console = console
        self._absent = set(absent)
        self._total = total_steps
        self._every = max(1, total_steps // 20)
        self._progress.start()

    def write(self, row: dict[str, float]) -> None:
        """Record one optimizer step; `row` has exactly the keys of `FIELDS`."""
        shown = {name: None if name in self._absent else row[name] for name in FIELDS}
        self._file.write(json.dumps(shown) + "\n")
        self._file.flush()
        for name, value in shown.items():
            if value is not None and name != "step":
                self._board.add_scalar(name, value, int(row["step"]))
        losses = ("loss", "loss_lm", "loss_type", "loss_level")
        line = " ".join(f"{name} {shown[name]:.4f}" for name in losses if name not in self._absent)
        self._progress.update(self._task, completed=row["step"], line=f"loss {row['loss']:.4f} {speed(row)}")
        step = int(row["step"])
        if step % self._every == 0 or step in (1, self._total):
            self._console.print(
                f"step {step}/{self._total} {line} lr {row['lr']:.2e} {row['seconds']:.2f} s {speed(row)}",
                soft_wrap=True,
            )

    def close(self) -> None:
        """Flush and close everything."""
        self._progress.stop()
        self._file.close()
        self._board.close()


def speed(row: dict[str, float]) -> str:
    """The part of a log line that says how fast a step was, and with how much memory."""
    return (
        f"{row['tokens_per_s']:,.0f} tokens/s {row['samples_per_s']:.1f} samples/s MFU {row['mfu']:.1%} "
        f"padding {row['padding_share']:.1%} {row['peak_memory_gb']:.1f} GiB"
    )
