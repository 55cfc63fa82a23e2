"""A tiny untrained base, a small world and runs on them, for the tests of training and for `tests/fuzz`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from builders import forked

ROOT = Path(__file__).resolve().parents[2]


def build_base(folder: Path) -> Path:
    """The sandbox's architecture at its smallest, with its processor."""
    import torch

    from psa_fast.safety.policy import Policy
    from psa_fast.sandbox import base
    from psa_fast.sandbox.language import all_texts
    from psa_fast.sandbox.vision import TowerRecipe
    from psa_fast.sandbox.word_level import build_processor

    processor = build_processor(all_texts(Policy.load(None).hint))
    torch.manual_seed(0)
    tower = TowerRecipe(layers=2, channels=(8, 32, 32, 32))
    recipe = replace(base.BaseRecipe(), hidden_size=32, heads=4, tower=tower, language_layers=2)
    base.build_base(processor, recipe).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def build_world(folder: Path) -> Path:
    """Pictures and `mixed.jsonl`, of which half are text only: with two ranks one of them may have no image at all."""
    from psa_fast.sandbox.draw import draw_world

    images = {"train": {"clean": 6, "benign_twin": 6, "risk": 12}}
    wanted = {"clean": 6, "risk": 12, "text_risk": 4, "benign_twin": 6}
    draw_world(3, folder, images=images, rows={"stage1": {kind: 3 * count for kind, count in wanted.items()}})
    # short ones: sums over long prompts round differently in each layout, and take longer
    rows = []
    for line in (folder / "stage1.jsonl").read_text().splitlines():
        row = json.loads(line)
        if wanted[row["group"]] and sum(len(turn["value"].split()) for turn in row["conversations"]) <= 30:
            wanted[row["group"]] -= 1
            rows.append(line)
    assert not any(wanted.values())
    talk = [{"from": "human", "value": "what is this ?"}, {"from": "gpt", "value": "a red circle ."}]
    rows += [json.dumps({"id": f"text-{i}", "safe_type": 6, "safe_level": 0, "conversations": talk}) for i in range(28)]
    (folder / "mixed.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def arguments(base: Path, world: Path, out: Path, *options: object) -> list[str]:
    """The options of train.py for a short fp32 run on the tiny base."""
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
        "--augment": "none",
        "--learning_rate": 1e-3,
    }
    given = {str(option) for option in options}
    texts = list(map(str, options))
    if "--stage" not in texts or texts[texts.index("--stage") + 1] == "1":
        shared["--stage1_objective"] = "joint"  # the recipe's own does without the language model
    pairs = [str(x) for key, value in shared.items() if key not in given for x in (key, value)]
    return [*pairs, *map(str, options)]


def start(command: list[str], ranks: int = 1) -> list[subprocess.Popen | forked.Forked]:
    """Processes of one group without the launcher, which takes as long as a short run; one process group per rank.

    A command of one rank finds a port for itself.
    """
    processes: list[subprocess.Popen | forked.Forked] = []
    port = free_port()
    for rank in range(ranks):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        if ranks > 1:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
            environment |= {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
        if command[0] == sys.executable and command[1].endswith(".py") and forked.possible():
            processes.append(forked.Forked(command, environment, ROOT))
            continue
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, **pipes))
    return processes


def outcome(processes: list[subprocess.Popen | forked.Forked], timeout: float = 240) -> tuple[list[int], str]:
    """Exit codes and output of all; whatever is left of them after the time is killed."""
    deadline = time.monotonic() + timeout
    try:
        outputs = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in processes]
    finally:
        kill(processes)
    return [process.returncode for process in processes], "\n".join(outputs)


def kill(processes: list[subprocess.Popen | forked.Forked]) -> None:
    """SIGKILL to each process that still runs and to its children."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def train_command(options: list[str]) -> list[str]:
    """The command line of train.py, on one rank or for each of several."""
    return [sys.executable, str(ROOT / "train.py"), *options]


def free_port() -> str:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
