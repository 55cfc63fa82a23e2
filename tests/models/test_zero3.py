"""ZeRO-3 on CPU, nothing persistent: the trajectory of plain torch, also with a text-only rank beside an image rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import tiny
from builders.tiny_vlm import make_batch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")
HERE = Path(__file__).parent


def plain(mode):
    from zero3_worker import LR, STEPS, divisors, make_model

    psa = make_model(mode, tied=mode == "full")
    batch = make_batch(3)
    optimizer = torch.optim.SGD([p for p in psa.parameters() if p.requires_grad], lr=LR)
    for _ in range(STEPS):
        psa(**batch, **divisors(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    psa.eval()
    features = psa.encode_images(batch["pixel_values"])
    logits = psa.concept_logits(features, batch["image_counts"], batch["input_ids"], batch["query_mask"])
    return {**{n: p.detach() for n, p in psa.named_parameters() if p.requires_grad}, "logits": logits.detach()}


@pytest.mark.parametrize(("mode", "world"), [("stage1", 2), ("lora", 2), ("full", 1)])
def test_zero3_follows_plain_torch(tmp_path, mode, world):
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": tiny.free_port(),
        "WORLD_SIZE": str(world),
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE / "zero3_worker.py"), mode, str(tmp_path)]
    ranks = []
    for rank in range(world):
        with (tmp_path / f"rank{rank}.log").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    command,
                    env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(world)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [process.wait(timeout=240) for process in ranks]  # the first run ever builds DeepSpeed's CPU op
    finally:
        for process in ranks:
            process.kill()
    logs = "\n".join((tmp_path / f"rank{rank}.log").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, logs
    got, expected = load_file(tmp_path / "weights.safetensors"), plain(mode)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
