"""A tiny untrained base and a small world with text-only rows, made once per test run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    from psa_fast.safety.policy import Policy
    from psa_fast.sandbox.base import BaseRecipe, build_base
    from psa_fast.sandbox.language import all_texts
    from psa_fast.sandbox.processor import build_processor

    folder = tmp_path_factory.mktemp("base")
    processor = build_processor(all_texts(Policy.load(None).hint))
    torch.manual_seed(0)
    build_base(
        processor, replace(BaseRecipe(), hidden_size=32, heads=4, vision_layers=2, language_layers=2)
    ).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    from psa_fast.sandbox.draw import draw_world

    folder = tmp_path_factory.mktemp("world") / "w"
    images = {"train": {"clean": 6, "benign_twin": 6, "risk": 12}}
    draw_world(3, folder, images=images, rows={"stage1": {"clean": 6, "risk": 12, "text_risk": 4, "benign_twin": 6}})
    rows = (folder / "stage1.jsonl").read_text().splitlines()
    talk = [{"from": "human", "value": "what is this ?"}, {"from": "gpt", "value": "a red circle ."}]
    # half of every batch of four is text only, so that with two ranks one of them may have no image at all
    rows += [json.dumps({"id": f"text-{i}", "safe_type": 6, "safe_level": 0, "conversations": talk}) for i in range(28)]
    (folder / "mixed.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def partitioned(tmp_path_factory):
    """ZeRO-3 with nothing small enough to stay whole: persistent parameters would hide missing gathers."""
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = tmp_path_factory.mktemp("ds") / "zero3_partitioned.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def group_of_one(monkeypatch):
    """A process group of this process alone."""
    import torch
    import torch.distributed as dist

    from psa_fast.training.engine import init_distributed

    # ZeRO-3 replaces it for good with one that keeps more for backward
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)

    before = dict(os.environ)
    assert init_distributed() == (0, 1)
    yield
    dist.destroy_process_group()
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture
def command(base, world):
    """The launcher's command line for a short fp32 run on the tiny base."""

    def build(out, *options, ranks=1):
        shared = {
            "--recipe": "sandbox",
            "--model_name_or_path": base,
            "--data_path": world / "mixed.jsonl",
            "--image_folder": world,
            "--output_dir": out,
            "--global_batch_size": 4,
            "--micro_batch_size": 2,
            "--max_steps": 4,
            "--dtype": "fp32",
            "--learning_rate": 1e-3,
        }
        given = {str(o) for o in options}
        pairs = [str(x) for key, value in shared.items() if key not in given for x in (key, value)]
        launcher = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--num_gpus",
            str(ranks),
            "--master_port",
            free_port(),
        ]
        return [*launcher, str(ROOT / "train.py"), *pairs, *map(str, options)]

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


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
