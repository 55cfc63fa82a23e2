"""What each choice of our step is worth, by arithmetic: no model is run, no weight is held.

    python benchmarks/levers.py [--json FILE]

At LLaVA-1.5-7B and at the size that compare_step.py times: FLOPs of a step without the choice over those with it, for
rows of step_rows.py, two a micro-batch; bytes at 7B in bf16. And the largest micro-batch of full rows that `psa-fast
plan` lets into 80 GB, with and without recomputation (docs/scale.md says what it counts).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from proportions import BATCH, ROWS, batches_of
from step_flops import Flops, official, ours
from step_model import SIZES, Size
from step_rows import RowShape, draw_shapes

from psa_fast.planning import activations
from psa_fast.planning.memory import GIB, Machine, estimate, measure
from psa_fast.training.config import parse_args

MACHINES = {"1 x 80 GB": Machine(1, 80), "8 x 80 GB": Machine(8, 80)}
LARGEST = 64


def flops(size: Size, rows: Sequence[RowShape]) -> dict[str, float]:
    """Of each lever: FLOPs of a joint step of stage 1 without it over those with it."""
    batches, _ = batches_of(rows)
    joint, concept = ours(size, "stage1_joint", rows), ours(size, "stage1_concept", rows)
    total = sum(joint.values())
    # where every row is as long as the longest of its batch; the supervised rows stay
    padded = [RowShape(max(row.text for row in batch), row.supervised) for batch in batches for row in batch]
    everything: Flops = official(size, "stage1_joint", [[row] for row in rows])
    return {
        "packing": sum(ours(size, "stage1_joint", padded).values()) / total,
        # one more forward pass: half of what frozen weights cost, a third of attention
        "no_recomputation": 1 + (joint["language_model"] / 2 + joint["attention"] / 3) / total,
        "supervised_rows": 1 + (everything["lm_head"] - joint["lm_head"]) / total,
        "one_vision_pass": 1 + joint["vision"] / total,
        "concept": total / sum(concept.values()),
    }


def saved_bytes(size: Size) -> dict[str, int]:
    """Of levers that save memory: bytes a micro-batch of BATCH rows on average, in bf16."""
    rows = draw_shapes(ROWS, size)
    batches, _ = batches_of(rows)
    padding = sum(max(row.text for row in batch) - row.text for batch in batches for row in batch) / len(batches)
    positions = BATCH * (sum(row.text for row in rows) / len(rows) + size.image_tokens + size.safety_tokens)
    config = parse_args(["--recipe", "llava-1.5-7b", "--stage", "1", "--data_path", "-", "--image_folder", "-"])
    sizes = measure(config)
    layout = activations.Layout(round(padding), round(padding), "nothing")
    kept = activations.language_model(sizes.dims, sizes.tuning, layout, recompute_every=0)
    language = size.layers * (4 * size.width**2 + 3 * size.width * size.mlp) + size.vocabulary * size.width
    return {
        "packing": sum(kept.values()),
        "supervised_rows": round(4 * positions * size.vocabulary),
        "concept": 2 * language,
    }


def micro_batches() -> dict[str, dict[str, dict[str, int]]]:
    """Largest micro-batch of rows of 2,048 tokens at 7B by machine, stage and recomputation."""
    found: dict[str, Any] = {}
    for stage in (1, 2):
        given = ["--recipe", "llava-1.5-7b", "--stage", str(stage), "--data_path", "-", "--image_folder", "-"]
        config = parse_args(given)
        sizes = measure(config)
        for name, machine in MACHINES.items():
            for kind in ("full", "none"):
                fitting = 0
                for rows in range(1, LARGEST + 1):
                    tried = replace(
                        config,
                        micro_batch_size=rows,
                        global_batch_size=rows * machine.world_size,
                        gradient_checkpointing=kind,
                    )
                    if estimate(tried, sizes, machine).gpu_peak > machine.gpu_gb * GIB:
                        break
                    fitting = rows
                found.setdefault(name, {}).setdefault(f"stage {stage}", {})[kind] = fitting
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args(argv)
    found = {
        "rows": ROWS,
        "flops": {name: flops(SIZES[name], draw_shapes(ROWS, SIZES[name])) for name in ("proportionate", "7b")},
        "bytes_7b": saved_bytes(SIZES["7b"]),
        "micro_batches_7b": micro_batches(),
    }
    text = json.dumps(found, indent=2) + "\n"
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
