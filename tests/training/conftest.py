"""Runs of train.py on the tiny base, with the launcher and without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def partitioned(tmp_path_factory):
    """ZeRO-3 with nothing small enough to stay whole: persistent parameters would hide missing gathers."""
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = tmp_path_factory.mktemp("ds") / "zero3_partitioned.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def command(base, world):
    """The launcher's command line for a short fp32 run on the tiny base."""

    def build(out, *options, ranks=1):
        launcher = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--num_gpus",
            str(ranks),
            "--master_port",
            tiny.free_port(),
        ]
        return [*launcher, str(ROOT / "train.py"), *tiny.arguments(base, world, out, *options)]

    return build


@pytest.fixture
def run():
    """Run to the end and return the output; a hang or a failure is loud."""

    def go(command, timeout=240, expect=0):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
        )
        output = done.stdout + done.stderr
        assert (done.returncode == 0) == (expect == 0), output[-4000:]
        return output

    return go


@pytest.fixture(scope="session")
def direct(base, world):
    """Run train.py to its end without the launcher, on any number of ranks, and return the output."""

    def go(out, *options, ranks=1, expect=0):
        options = tiny.arguments(base, world, out, *options)
        codes, output = tiny.outcome(tiny.start(tiny.train_command(options), ranks))
        assert codes == [expect] * ranks, output[-4000:]
        return output

    return go
