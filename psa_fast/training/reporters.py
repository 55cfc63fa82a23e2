"""Where a run's figures go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio (`--report_to`)."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from psa_fast.files import named, shorten

from .config import TrainConfig
from .ranks import from_rank_0

BOARD = "tensorboard"
TRACKERS = ("wandb", "trackio")  # packages of one interface: init, log, finish


class Reporter(Protocol):
    """Takes the figures of a step, on rank 0."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Record figures by name; a step may be given several times."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in a folder; what they hold from `first_step` on, by a run that was stopped, counts no longer.

    Raises OSError, here and in both methods, naming the folder that cannot be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._hook = threading.excepthook
        threading.excepthook = self._leave_to_the_next_write
        with named(folder):
            self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Record figures as scalars."""
        with named(self.folder):
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        try:
            with named(self.folder):
                self.writer.close()
        finally:
            threading.excepthook = self._hook

    def _leave_to_the_next_write(self, failure: Any) -> None:
        """TensorBoard's thread would print a traceback of a full disk; its next write raises the same error."""
        if not isinstance(failure.exc_value, OSError):
            self._hook(failure)


class Tracker:
    """A package with wandb's interface. Its own variables hold: WANDB_MODE, WANDB_PROJECT, TRACKIO_SPACE_ID, ...

    Args:
        package: one of TRACKERS, installed.
        config: of the run, which is recorded with it; the run is named after its folder.

    Raises:
        ValueError: the package cannot start a run.
    """

    def __init__(self, package: str, config: TrainConfig) -> None:
        self._module: Any = importlib.import_module(package)
        project = os.environ.get(f"{package.upper()}_PROJECT", "psa-fast")
        try:
            self._module.init(project=project, name=str(config.stage_dir), config=config.to_dict())
        except Exception as error:  # each package has errors of its own: no login, no network
            reason = shorten((str(error) or type(error).__name__).strip().splitlines()[0], 200)
            raise ValueError(f"--report_to {package}: it cannot start a run ({reason})") from error

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Hand the figures over."""
        self._module.log(dict(figures), step=step)

    def close(self) -> None:
        """Wait until the package has them."""
        self._module.finish()


def check_reporters(config: TrainConfig) -> None:
    """Refuse a package that is not there, before anything is loaded; rank 0 alone imports it. A collective.

    Raises:
        ValueError: naming the extra that installs it.
    """

    def look() -> None:
        for name in config.reporters:
            if name in TRACKERS:
                try:
                    importlib.import_module(name)
                except ImportError as error:
                    raise ValueError(
                        f"--report_to {name} needs the package {name}: pip install 'psa-fast[{name}]' ({error})"
                    ) from None

    from_rank_0(look)


def open_reporters(config: TrainConfig, start_step: int) -> list[Reporter]:
    """The reporters that `--report_to` names, for the steps after `start_step`."""
    made: dict[str, Any] = {BOARD: lambda: TensorBoard(config.stage_dir / BOARD, start_step + 1)}
    return [made[name]() if name in made else Tracker(name, config) for name in config.reporters]
