"""Where a training step's time goes: ours, the official step (B0) and plain LLaVA fine-tuning (B1), part by part.

    python benchmarks/profile_step.py --stage 1 [--json FILE] [--picture FILE.png] [--trace FILE.json]

Vision, safety modules (forward, both losses, backward, optimizer), LLM forward, loss (LM head and its gradient),
backward and optimizer: time, FLOPs, share of the measured matrix rate, on a GPU also the peak memory. Then what the
safety modules add to B1's step: the bottleneck with its losses, and the extra tokens in the language model (measured by
leaving them out). Communication is not in it: one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from baselines.official import Official
from baselines.stock import Stock
from ladder import CUDA, DEVICE, DTYPE, where
from step_forms import PARTS, Form, Ours, synchronize
from step_measure import CLOCKS, Counter, overhead, time_parts
from step_model import SIZES, Rows, build_base, in_order

SHOWN = ("ours", "B0", "B1")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the profile; returns what --json writes."""
    args = _options(argv)
    size = SIZES[args.size]
    base = build_base(size)
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(Path(folder), base, size, args.batch * args.rounds, args.seed)
    ours, bare = Ours(base, size, args.stage), Ours(base, size, args.stage, safety_tokens=0)
    forms: dict[str, Form] = {
        "ours": ours,
        "ours without": bare,
        "B0": Official(base, ours.psa, size, args.stage),
        "B0 without": Official(base, bare.psa, size, args.stage),
        "B1": Stock(base, size, args.stage),
    }
    for name in ("ours without", "B0 without"):
        forms[name].has_concept = False
    batches = {
        name: [form.batch([rows[form.safety_tokens][i] for i in n]) for n in in_order(len(rows.lengths), args.batch)]
        for name, form in forms.items()
    }
    parts = time_parts(forms, batches, args.rounds, CLOCKS[args.clock])
    rate = matrix_rate()
    table = {name: _table(forms[name], batches[name], parts[name], rate) for name in SHOWN}
    result = {
        "stage": args.stage,
        "parts": table,
        "safety_overhead": {name: overhead(parts, name, f"{name} without") for name in ("ours", "B0")},
        "matrix_rate_gflops": rate,
        "provenance": {**where(), "options": vars(args)},
    }
    _print(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.picture:
        draw(result, args.picture)
    if args.trace:
        with torch.profiler.profile(record_shapes=True, profile_memory=True) as trace:
            ours.step(batches["ours"][0])
            synchronize()
        trace.export_chrome_trace(args.trace)
    return result


def matrix_rate(n: int = 8192 if CUDA else 2048) -> float:
    """GFLOP/s of a square matrix product in the benchmark's dtype, the best of many: the most a step could reach."""
    a, b = (torch.randn(n, n, device=DEVICE).to(DTYPE) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e9


def _table(form: Form, batches: list, times: list[dict[str, float]], rate: float) -> dict[str, dict[str, float | None]]:
    """Each part's median, and FLOPs averaged over the same batches."""
    count = Counter()
    for batch in batches:
        form.step_in_parts(batch, count)
    rows: dict[str, dict[str, float | None]] = {}
    for part in PARTS:
        if part not in times[0]:
            continue
        seconds, gflop = statistics.median(t[part] for t in times), count.flops[part] / len(batches) / 1e9
        rows[part] = {
            "ms": 1e3 * seconds,
            "gflop": gflop,
            "of_matrix_rate": gflop / seconds / rate,
            "peak_mb": count.bytes[part] / 2**20 if CUDA else None,
        }
    seconds, gflop = statistics.median(sum(t.values()) for t in times), sum(r["gflop"] or 0 for r in rows.values())
    peak = max(count.bytes.values()) / 2**20 if CUDA else None
    rows["step"] = {"ms": 1e3 * seconds, "gflop": gflop, "of_matrix_rate": gflop / seconds / rate, "peak_mb": peak}
    return rows


def _print(result: dict[str, Any]) -> None:
    device, threads = result["provenance"]["device"], result["provenance"]["threads"]
    rate = result["matrix_rate_gflops"]
    print(f"stage {result['stage']}, {device}, {threads} threads, matrix rate {rate:.0f} GFLOP/s")
    for name, rows in result["parts"].items():
        print(f"\n{name:18s}{'ms':>9s}{'share':>8s}{'GFLOP':>10s}{'of rate':>9s}" + ("     peak MB" if CUDA else ""))
        for part, row in rows.items():
            print(
                f"  {part:16s}{row['ms']:9.1f}{row['ms'] / rows['step']['ms']:8.1%}{row['gflop']:10.1f}"
                f"{row['of_matrix_rate']:9.0%}" + (f"{row['peak_mb']:12.0f}" if CUDA else "")
            )
    print()
    for name, row in result["safety_overhead"].items():
        print(
            f"{name}: bottleneck and losses {row['bottleneck_and_losses_percent']:.1f}% of B1's step, "
            f"extra LLM tokens {row['extra_llm_tokens_percent']:.1f}%"
        )


def draw(result: dict[str, Any], path: str) -> None:
    """Stacked bars of the parts' times, one bar a form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 2.8), layout="constrained")
    names = list(result["parts"])
    left = [0.0] * len(names)
    for part in PARTS:
        widths = [result["parts"][name].get(part, {"ms": 0.0})["ms"] for name in names]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.set_title(f"stage {result['stage']}, {result['provenance']['device']}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(PARTS), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=[1, 2], required=True)
    parser.add_argument("--size", choices=sorted(SIZES), default="7b" if CUDA else "proportionate")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each form")
    parser.add_argument("--batch", type=int, default=2, help="rows a step, for every form")
    parser.add_argument("--seed", type=int, default=0, help="of the records")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: this process's CPU seconds")
    parser.add_argument("--json", help="file for the result")
    parser.add_argument("--picture", help="file for the stacked bars (needs matplotlib: pip install 'psa-fast[bench]')")
    parser.add_argument("--trace", help="file for a torch.profiler trace of one step of ours")
    args = parser.parse_args(argv)
    for name in ("rounds", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; expected 1 or more")
    if args.picture and find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install 'psa-fast[bench]'")
    if args.clock == "cpu" and (CUDA or torch.get_num_threads() > 1):
        parser.error("--clock cpu measures one thread on a CPU: set OMP_NUM_THREADS=1")
    return args


if __name__ == "__main__":
    main()
