"""The stage's output folder: one run at a time, and only what a run wrote is ever deleted."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TextIO

import torch.distributed as dist
from rich.console import Console

from psa_fast.files import lock, named, refuse_pipe_or_folder
from psa_fast.models.addon import ADAPTER, CHANGED, CONFIG, WEIGHTS
from psa_fast.training.metrics_log import METRICS
from psa_fast.training.reporters import BOARD

from .best import BEST
from .checkpoint import STATE
from .config import TrainConfig
from .ranks import alike, from_rank_0

_WRITTEN = {CONFIG, WEIGHTS, ADAPTER, CHANGED.split("/")[0], STATE, METRICS, BOARD, BEST}
# what earlier versions left beside them: DeepSpeed's scripts
_WRITTEN |= {"zero_to_fp32.py", "zero_to_torch.py"}
_CHECKPOINT = re.compile(r"checkpoint-[0-9]+|\.checkpoint-[0-9]+\.(tmp|old)")


def of_a_run(folder: Path) -> list[Path]:
    """Return what a run has written into the folder of a stage, by name."""
    if not folder.is_dir():
        return []
    unfinished = {f".{name}.{end}" for name in _WRITTEN for end in ("tmp", "old")}
    return sorted(
        path for path in folder.iterdir() if path.name in _WRITTEN | unfinished or _CHECKPOINT.fullmatch(path.name)
    )


def refuse_used(config: TrainConfig) -> None:
    """Refuse to mix two runs in one folder. A collective.

    Raises:
        ValueError: an earlier run is there, and neither continued nor overwritten.
    """
    used = of_a_run(config.stage_dir)
    dist.barrier()
    if used and config.resume == "none" and not config.overwrite_output_dir:
        raise ValueError(
            f"{config.stage_dir} holds an earlier run; --resume auto continues it, --overwrite_output_dir deletes it, "
            f"another --output_dir leaves it alone"
        )


def claim(config: TrainConfig, console: Console) -> list[TextIO]:
    """Make the folder and keep other runs out of it for as long as rank 0's file in the list stays open. A collective.

    An earlier run that may be overwritten goes only now, after records and options were read.

    Raises:
        ValueError: another run writes there, or the ranks see different folders.
        OSError: the folder cannot be made or cleared.
    """
    locks: list[TextIO] = []
    from_rank_0(lambda: _claim(config, console, locks))
    with alike():
        if not config.stage_dir.is_dir():
            raise ValueError(f"--output_dir {config.output_dir} must be one folder that every node shares")
    return locks


def _claim(config: TrainConfig, console: Console, locks: list[TextIO]) -> None:
    folder = config.stage_dir
    with named(config.output_dir):
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    refuse_pipe_or_folder(folder / METRICS)
    if (folder / BOARD).exists() and not (folder / BOARD).is_dir():
        raise ValueError(f"{folder / BOARD} is not a folder")
    busy = f"another run is under way in {folder}; give this one an --output_dir of its own"
    locks.append(lock(Path(config.output_dir) / f".stage{config.stage}.lock", busy, console.print))
    if config.overwrite_output_dir:
        _clear(folder, console)
    with named(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _clear(folder: Path, console: Console) -> None:
    """Delete what a run wrote; anything else in the folder stays, and is named."""
    for path in of_a_run(folder):
        with named(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    kept = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if kept:
        names = ", ".join(kept[:10]) + (", ..." if len(kept) > 10 else "")
        console.print(f"kept in {folder}, as no run wrote it: {names}", markup=False, soft_wrap=True)
