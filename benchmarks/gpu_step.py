"""The step at LLaVA-1.5-7B's dimensions on a GPU: random weights in bf16, no download, one result file a part.

    python benchmarks/gpu_step.py [stage1] [stage2] [guard] [fp8] [--out runs/bench] [--dry_run]

stage1, stage2: compare_step.py's comparison of that stage, with B0, B1 and B2, peak memory, the parts' times and what
the safety modules add; guard: guard_cost.py's answers under guard; fp8, which must be asked for: fp8_step.py's frozen
layers in FP8, refused below compute capability 8.9. A part whose result is there already is skipped, so that a run
which was stopped goes on; delete the file to measure it again. Each part is meant to take less than nine minutes on one
GPU of 80 GB (not yet measured).

--dry_run goes through the same on this machine with a tiny model and few steps: what it writes is no measurement.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import compare_step
import fp8_step
import guard_cost
from ladder import CUDA

Run = Callable[[Sequence[str]], Any]

#: part -> (what runs it, its options on a GPU, its options in a dry run)
PARTS: dict[str, tuple[Run, list[str], list[str]]] = {
    **{
        f"stage{stage}": (
            compare_step.main,
            ["--stages", str(stage), "--size", "7b", "--steps", "20"],
            ["--stages", str(stage), "--size", "tiny", "--steps", "1", "--warmup", "1", "--part_rounds", "1"],
        )
        for stage in (1, 2)
    },
    "guard": (
        guard_cost.main,
        ["--size", "7b", "--requests", "3", "--rounds", "4"],
        ["--size", "tiny", "--requests", "1", "--rounds", "2", "--answer_tokens", "6", "--verdict_tokens", "3"],
    ),
    "fp8": (fp8_step.main, ["--size", "7b"], ["--size", "tiny", "--steps", "2"]),
}
#: not every GPU has FP8
DEFAULT = ("stage1", "stage2", "guard")


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Run the parts that have no result yet; returns their names."""
    args = _options(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    ran = []
    for part in args.parts or DEFAULT:
        run, options, few = PARTS[part]
        path: Path = args.out / f"{'dry' if args.dry_run else 'gpu'}-step-{part}.json"
        if _measured(path):
            print(f"{part}: {path} is there already, skipped")
            continue
        # under its own name only when it is whole
        unfinished = path.with_suffix(".unfinished")
        allocator = ["--allocator", "as_is"] if args.dry_run and not CUDA and run is compare_step.main else []
        print(f"{part}:", flush=True)
        run([*(few if args.dry_run else options), *allocator, "--json", str(unfinished)])
        unfinished.replace(path)
        print(f"{part}: wrote {path}", flush=True)
        ran.append(part)
    return ran


def _measured(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path} is no whole result ({error}); delete it to measure it again") from None
    return True


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: {', '.join(DEFAULT)})"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results")
    parser.add_argument("--dry_run", action="store_true", help="a tiny model, also on a CPU")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}; there are {', '.join(PARTS)}")
    if not CUDA and not args.dry_run:
        parser.error("torch finds no CUDA device; --dry_run goes through the same with a tiny model on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
