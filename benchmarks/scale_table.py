"""The table of docs/scale.md: what fits where, by the arithmetic of `psa-fast plan`. Nothing is run, no GPU is needed.

python benchmarks/scale_table.py

Each cell starts from the recipe (its micro batch, all layers recomputed, ZeRO-3) at the row length of its column and
takes the first option `psa-fast plan` offers if that does not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from psa_fast.planning.memory import GIB, Machine, Sizes, estimate, measure, remedies
from psa_fast.training.config import TrainConfig, parse_args

MACHINES = (Machine(1, 24), Machine(1, 80), Machine(8, 80), Machine(8, 80, nodes=2))
RECIPES = ("llava-1.5-7b", "llava-1.5-13b")
RUNS = (("1", []), ("2, LoRA", []), ("2, full", ["--tune_type_llm", "full"]))
LENGTHS = (2048, 8192)


def cell(config: TrainConfig, sizes: Sizes, machine: Machine) -> str:
    """Options beyond the recipe, GiB of a GPU and of a host; or that it does not fit."""
    found, added = estimate(config, sizes, machine), ""
    if not found.fits:
        options = [r for r in remedies(config, sizes, machine) if "max_length" not in r.options]
        if not options:
            return f"no ({found.gpu_peak / GIB:.0f} GiB)"
        found, added = options[0].estimate, f"`{options[0].flags()}` "
    return f"{added}{found.gpu_peak / GIB:.1f} / {found.host_peak / GIB:.0f}"


def rows() -> Iterator[str]:
    """The table in Markdown."""
    yield "| GPUs | model | stage | " + " | ".join(f"{length} tokens a row" for length in LENGTHS) + " |"
    yield "|---|---|---|" + "---|" * len(LENGTHS)
    known = {}
    for recipe in RECIPES:
        for stage, options in RUNS:
            given = ["--recipe", recipe, "--stage", stage[0], *options, "--data_path", "-", "--image_folder", "-"]
            config = parse_args(given)
            known[recipe, stage] = config, measure(config)
    for machine in MACHINES:
        name = f"{machine.nodes} x {machine.gpus}" if machine.nodes > 1 else str(machine.gpus)
        for (recipe, stage), (config, sizes) in known.items():
            cells = [cell(dataclasses.replace(config, max_length=length), sizes, machine) for length in LENGTHS]
            model = recipe.removeprefix("llava-1.5-").upper()
            yield f"| {name} x {machine.gpu_gb:g} GB | {model} | {stage} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print("\n".join(rows()))
