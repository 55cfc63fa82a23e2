"""Runs of train.py from one process that has imported everything: each is a fork of it, and starts in no time.

Importing torch, transformers and DeepSpeed takes longer than most runs of these tests. A fork has every module as a
fresh process would have it after its imports; nothing has been run in it. Not on machines with a GPU, where a fork
cannot use what its parent has opened.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOADED = [
    "torch",
    "deepspeed",
    "peft",
    "tensorboard",
    "torch.utils.tensorboard",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "transformers.models.llama.modeling_llama",
    "transformers.models.dpt.modeling_dpt",
    "transformers.models.bit.modeling_bit",
    "psa_fast.training.loop",
    "psa_fast.training.robust_run",
]


def possible() -> bool:
    """Whether runs may be forks here."""
    return hasattr(os, "fork") and shutil.which("nvidia-smi") is None


class Forked:
    """A run of a Python file, with what of subprocess.Popen the tests use."""

    stdout = None

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._output = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # what the server is started with counts
        try:
            self._process = context.Process(target=_enter, args=(command, environment, str(folder), self._output.name))
            self._process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As Popen's: the exit code, the negative number of a signal, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait, then everything it printed."""
        self.wait(timeout)
        return Path(self._output.name).read_text(encoding="utf-8", errors="replace"), None

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)


def _enter(command: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    target = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command[1:]
    sys.path.insert(0, str(Path(command[1]).parent))
    runpy.run_path(command[1], run_name="__main__")
