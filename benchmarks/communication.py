"""What the ranks of a training step exchange: our step on DeepSpeed's engine, under torch.profiler.

profile_step.py runs it where a launcher has started several ranks. Each rank trains on rows of its own.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ladder import CUDA, DTYPE
from step_flops import safety_options
from step_model import Size, build_base
from step_rows import Rows, in_order
from transformers.integrations import HfDeepSpeedConfig

from psa_fast.data import pack
from psa_fast.models import PsaVLM
from psa_fast.training.config import TrainConfig
from psa_fast.training.engine import build_engine, init_distributed, resolve_deepspeed_config
from psa_fast.training.flops import Meter, StageFlops, shared_matrix_rate
from psa_fast.training.stages import optimizer_groups, prepare
from psa_fast.training.step import train_step
from psa_fast.training.vision_tower import keep_whole

# gloo's work on its own threads; on a GPU the kernels
COLLECTIVES = ("ncclDevKernel", "ncclKernel") if CUDA else ("gloo:",)
WARMUP = 2


def communication(size: Size, config: TrainConfig, rounds: int, seed: int) -> dict[str, Any]:
    """Times of this rank's steps and collectives, in ms. A collective.

    Args:
        size: dimensions of the base, which gets random weights.
        config: options of the step; the global batch is one micro-batch of each rank.
        rounds: steps that count, after WARMUP.
        seed: of the rows.

    Returns:
        step: the median step. communication: of a step, as long as any collective was under way. collectives: calls
        and ms of a step by kind, which may overlap. ranks; mfu, of the matrix rate measured on rank 0.
    """
    rank, world_size = init_distributed()
    config.global_batch_size = config.micro_batch_size * world_size
    ds_config = resolve_deepspeed_config(config, world_size)
    rate = shared_matrix_rate(DTYPE)
    steps = rounds + WARMUP
    # as in train.py: with it transformers partitions the base while it is built
    keep_alive = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None
    model = PsaVLM.build(
        build_base(size),
        **safety_options(size),
        query=config.query,
    )
    parts = prepare(model, config)
    meter = Meter(StageFlops.of(model, config), rate)
    batches = _batches(model, size, config, steps, seed + rank)
    keep_whole(model)
    engine = build_engine(model, optimizer_groups(model, parts, config.weight_decay), config, ds_config, steps)
    del keep_alive
    engine.train()

    def run(first: int, last: int) -> list[dict[str, float]]:
        return [train_step(engine, batches, config, meter, i, lambda: False).read()[0] for i in range(first, last)]

    run(0, WARMUP)
    with torch.profiler.profile() as trace:
        rows = run(WARMUP, steps)
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in trace.events():
        if event.name.startswith(COLLECTIVES):
            spans[event.name.split("(")[0]].append((event.time_range.start, event.time_range.end))
    every = [span for of_kind in spans.values() for span in of_kind]
    dist.barrier()
    dist.destroy_process_group()
    return {
        "ranks": world_size,
        "step": 1e3 * statistics.median(row["seconds"] for row in rows),
        "mfu": statistics.median(row["mfu"] for row in rows),
        "communication": _covered(every) / 1e3 / rounds,
        "collectives": {
            kind: {"calls": len(found) / rounds, "ms": sum(b - a for a, b in found) / 1e3 / rounds}
            for kind, found in sorted(spans.items())
        },
    }


def _batches(model: PsaVLM, size: Size, config: TrainConfig, steps: int, seed: int) -> Iterator[list[dict]]:
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(Path(folder), model.vlm, size, config.micro_batch_size * steps, seed)[size.safety_tokens]
    batches = [pack([rows[i] for i in numbers]) for numbers in in_order(len(rows), config.micro_batch_size)]
    # one micro-batch a step
    return iter([[batch | {"pixel_values": batch["pixel_values"].to(DTYPE)}] for batch in batches])


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
