"""Our training step beside what a user would otherwise run, in turn and in one process.

    python benchmarks/compare_step.py [--stages 1 2] [--steps 20] [--json FILE]

B0 is the official step, B1 stock Hugging Face LLaVA fine-tuning, B2 that with Liger (CUDA) and rows grouped by length:
see baselines/. All forms train on the same records in batches of two, with an AdamW of their own, for the same number
of steps. First the losses of B0 and ours (with the paper's query, without dropout) are laid over each other for some
steps: forms that do not compute the same get no times. A ratio is the baseline's median step time over ours; CAVEATS
says what a ratio is not, and stands beside it wherever it is printed or written.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from baselines.official import Official
from baselines.stock import LIGER, Stock
from ladder import CUDA, where
from step_forms import Form, Ours
from step_measure import CLOCKS, add_shared_options, check_shared_options, overhead, peak_memory, time_parts, time_steps
from step_model import SIZES, Rows, Size, attention, build_base, grouped_by_length, in_order

TOLERANCE = 1e-3
BASELINES = ("B0", "B1", "B2")
# what each ratio compares that is not alike
CAVEATS = {
    "stage1_joint": "B0 and B1 hold fp32 logits of all rows: glibc's allocator alone moves these ratios by a fifth",
    "stage1_concept": "no language model in this step, a whole joint step in theirs (like for like: about 1.4x B0)",
    "stage2_lora": "B0 trains the safety modules as ours does; the official code freezes them (about 3 to 4% of B0)",
}


def caveat(target: str, size: str) -> str:
    """One line to read beside the ratios of `target`."""
    scaled = "" if size == "7b" else "; small widths, whole vocabulary: at 7B about 1.1x B0, 1.0x B1 by FLOPs"
    return f"not alike: {CAVEATS[target]}{scaled if target == 'stage1_joint' else ''}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison; returns what --json writes."""
    args = _options(argv)
    size = SIZES[args.size]
    base = build_base(size)
    count = args.batch * max(args.warmup + args.steps, args.overlay_steps)
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(Path(folder), base, size, count, args.seed)
    result: dict[str, Any] = {"ratios": {}, "peak_memory": {}, "safety_overhead": {}, "loss_overlay_max_diff": 0.0}
    provenance = _provenance(args, rows)
    print(f"{provenance['device']}, {provenance['threads']} threads, {provenance['dtype']}, model {args.size}")
    for stage in args.stages:
        difference = overlay(base, size, stage, rows, args)
        result["loss_overlay_max_diff"] = max(result["loss_overlay_max_diff"], difference)
        print(
            f"\nstage {stage}: losses of ours and B0 differ by at most {difference:.1e} in {args.overlay_steps} steps"
        )
        if difference > TOLERANCE and not CUDA:
            raise SystemExit(f"the losses differ by {difference:.1e}, more than {TOLERANCE:g}: nothing is timed")
        for key, found in compare_stage(base, size, stage, rows, args).items():
            (result if key in result else provenance).setdefault(key, {}).update(found)
    result["provenance"] = provenance
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def overlay(base: Any, size: Size, stage: int, rows: Rows, args: argparse.Namespace) -> float:
    """The largest difference of any loss between B0 and ours over some optimizer steps from the same weights."""
    ours = [Ours(base, size, stage, query="first", dropout=0.0)]
    ours += [Ours(base, size, stage, "concept", query="first")] if stage == 1 else []
    official = Official(base, ours[0].psa, size, stage, dropout=0.0, lora_on_head=False)
    worst = 0.0
    for numbers in in_order(len(rows.lengths), args.batch)[: args.overlay_steps]:
        picked = [rows[size.safety_tokens][i] for i in numbers]
        expected = official.step(official.batch(picked))
        for form in ours:
            got = form.step(form.batch(picked))
            worst = max([worst, *((loss - expected[name]).abs().item() for name, loss in got.items())])
    return worst


def compare_stage(base: Any, size: Size, stage: int, rows: Rows, args: argparse.Namespace) -> dict[str, Any]:
    """Times, memory and overhead of one stage, under the keys of the result."""
    key = "stage1_joint" if stage == 1 else "stage2_lora"
    ours = Ours(base, size, stage)
    forms: dict[str, Form] = {key: ours}
    if stage == 1:
        forms["stage1_concept"] = Ours(base, size, stage, "concept")
    forms["B0"] = Official(base, ours.psa, size, stage)
    forms["B1"] = Stock(base, size, stage)
    forms["B2"] = Stock(base, size, stage, liger=LIGER, name="B2")

    needed = args.warmup + args.steps
    lengths = rows.lengths[: needed * args.batch]
    plain, grouped = in_order(len(lengths), args.batch), grouped_by_length(lengths, args.batch, args.seed)
    orders = {name: grouped if name == "B2" else plain for name in forms}
    batches = {
        name: [form.batch([rows[form.safety_tokens][i] for i in numbers]) for numbers in orders[name]]
        for name, form in forms.items()
    }
    times = time_steps(forms, batches, args.warmup, CLOCKS[args.clock])
    longest = max(range(needed), key=lambda i: sum(lengths[j] for j in plain[i]))
    heavy = {name: form.batch([rows[form.safety_tokens][i] for i in plain[longest]]) for name, form in forms.items()}
    memory = {name: peak_memory(form, heavy[name]) for name, form in forms.items()}
    targets = [name for name in forms if name not in BASELINES]
    ratios = {
        target: {name: statistics.median(times[name]) / statistics.median(times[target]) for name in BASELINES}
        for target in targets
    }
    steps = {}
    for name, seconds in times.items():
        worked = sum(lengths[i] for numbers in orders[name][args.warmup :] for i in numbers)
        p50, p90 = statistics.median(seconds), sorted(seconds)[math.ceil(0.9 * len(seconds)) - 1]
        steps[name] = {
            "p50_ms": 1e3 * p50,
            "p90_ms": 1e3 * p90,
            "samples_per_s": args.batch * len(seconds) / sum(seconds),
            "tokens_per_s": worked / sum(seconds),
        }
    bare = {"ours": Ours(base, size, stage, safety_tokens=0)}
    bare["B0"] = Official(base, bare["ours"].psa, size, stage)
    for form in bare.values():
        form.has_concept = False
    in_turn = {"ours": ours, "ours without": bare["ours"], "B0": forms["B0"], "B0 without": bare["B0"]}
    in_turn["B1"] = forms["B1"]
    used = {
        name: [form.batch([rows[form.safety_tokens][i] for i in numbers]) for numbers in plain]
        for name, form in in_turn.items()
    }
    parts = time_parts(in_turn, used, args.part_rounds, CLOCKS[args.clock])
    found = {name: overhead(parts, name, f"{name} without") for name in ("ours", "B0")}
    _print(key, args.size, steps, memory, ratios, found)
    return {
        "ratios": ratios,
        "peak_memory": {
            target: {name: memory[name] for name in BASELINES}
            | {"ours": memory[target], "ours_over_B0": memory[target]["total_mb"] / memory["B0"]["total_mb"]}
            for target in targets
        },
        "safety_overhead": {key: found},
        "steps": {key: steps},
    }


def _print(key: str, size: str, steps: dict, memory: dict, ratios: dict, found: dict) -> None:
    print(f"{'':16s}{'p50 ms':>9s}{'p90 ms':>9s}{'tokens/s':>10s}{'rows/s':>8s}{'step MB':>9s}{'total MB':>10s}")
    for name, row in steps.items():
        print(
            f"{name:16s}{row['p50_ms']:9.0f}{row['p90_ms']:9.0f}{row['tokens_per_s']:10.0f}{row['samples_per_s']:8.2f}"
            f"{memory[name]['step_mb']:9.0f}{memory[name]['total_mb']:10.0f}"
        )
    for target, row in ratios.items():
        shown = "  ".join(f"{name} {value:.2f}x" for name, value in row.items())
        print(f"{target}: {shown}  memory {memory[target]['total_mb'] / memory['B0']['total_mb']:.2f}x of B0's")
        print(f"    {caveat(target, size)}")
    for name, row in found.items():
        print(
            f"{key}, {name}: bottleneck and losses {row['bottleneck_and_losses_percent']:.1f}% of B1's step, "
            f"extra LLM tokens {row['extra_llm_tokens_percent']:.1f}%"
        )


def _provenance(args: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    batches = in_order(len(rows.lengths), args.batch)
    padded = sum(args.batch * max(rows.lengths[i] for i in numbers) for numbers in batches)
    return {
        **where(),
        "transformers": transformers.__version__,
        "attention": attention(),
        "options": vars(args),
        "rows": len(rows.lengths),
        "tokens_per_row": [min(rows.lengths), statistics.mean(rows.lengths), max(rows.lengths)],
        "supervised_share": rows.supervised / sum(rows.lengths),
        "padding_share": 1 - sum(rows.lengths) / padded,
        "liger": LIGER,
        "notes": {
            "tokens_per_s": "text and image tokens of the rows, without padding or safety tokens, for every form",
            "peak_memory": "one step on the longest batch; step_mb above what was held before, total_mb with weights "
            "and optimizer state; " + ("CUDA's allocator" if CUDA else "sum of torch's allocations (profiler)"),
            "safety_overhead": "percent of B1's step time, parts timed in turn",
            **{f"ratios of {target}": caveat(target, args.size) for target in CAVEATS},
            "B1": "stage 1: connector trained beside a frozen language model; stage 2: LoRA as ours",
        },
    }


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="7b" if CUDA else "proportionate")
    parser.add_argument("--stages", type=int, nargs="+", choices=[1, 2], default=[1, 2])
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--overlay_steps", type=int, default=5, help="steps whose losses are compared")
    parser.add_argument("--part_rounds", type=int, default=5, help="rounds of the overhead")
    parser.add_argument("--batch", type=int, default=2, help="rows a step, for every form")
    add_shared_options(parser)
    args = parser.parse_args(argv)
    for name, least in (("steps", 1), ("warmup", 0), ("overlay_steps", 1), ("part_rounds", 1), ("batch", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; expected {least} or more")
    check_shared_options(parser, args)
    return args


if __name__ == "__main__":
    main()
