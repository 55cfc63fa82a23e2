"""Our training step beside what a user would otherwise run, in turn and in one process.

    python benchmarks/compare_step.py [--stages 1 2] [--steps 20] [--json FILE]

B0 is the official step, B1 stock Hugging Face LLaVA fine-tuning, B2 that with Liger (CUDA) and rows grouped by length:
see baselines/. Like is held against like (step_flops.AGAINST): the concept objective against the official step without
its language model, LoRA alone against the official stage 2, whose safety modules are frozen. All forms train on the
same records in batches of two, with an AdamW of their own, for the same number of steps. First the losses of B0 and
ours (with the paper's query, without dropout) are laid over each other for some steps: forms that do not compute the
same get no times. A ratio is the time of all the baseline's steps over that of ours; beside it stand the ratios of
FLOPs, of this model and of LLaVA-1.5-7B and 13B.

On a CPU all is timed twice, each in a process of its own: with glibc's default allocator, and with one that keeps what
is freed, as GPUs' allocators do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from baselines.official import Official
from baselines.stock import LIGER, Stock
from ladder import CUDA, DEVICE, DTYPE, where
from proportions import batches_of, shares
from speed_tables import markdown
from step_flops import AGAINST, ratios
from step_forms import Form, Ours
from step_measure import (
    CLOCKS,
    add_shared_options,
    check_shared_options,
    overhead,
    peak_memory,
    table_of_parts,
    time_parts,
    time_steps,
)
from step_model import SIZES, TIMED, Size, attention, build_base
from step_rows import Rows, draw_shapes, grouped_by_length, in_order

from psa_fast.training.flops import matrix_rate

TOLERANCE = 1e-3
#: measured steps of the concept objective at 7B's dimensions, some seconds each
CONCEPT_STEPS = 3
#: environment of each allocator
ALLOCATORS = {"default": {}, "keep": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}}
#: forms that are only there to show what one of our choices is worth, see levers.py
LEVERS = {"padded": {"packs": False}, "recomputed": {"recomputes": True}}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison; returns what --json writes."""
    args = _options(argv)
    found = {args.allocator: measure(args)} if args.allocator in ("as_is", "cuda") else _each_allocator(args)
    first = next(iter(found.values()))
    result = {name: first.pop(name) for name in ("loss_overlay_max_diff", "provenance") if name in first}
    for measured in list(found.values())[1:]:
        del measured["provenance"]
    result |= {"flops": flops(args), "shares": _shares(args.size), "allocators": found}
    print(markdown(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _each_allocator(args: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measures under each allocator; what does not depend on it, under the first alone."""
    found: dict[str, Any] = {}
    before = dict(os.environ)
    for name in ALLOCATORS if args.allocator == "both" else (args.allocator,):
        # glibc reads its settings when a process starts
        for setting in [key for key in os.environ if key.startswith("MALLOC_")]:
            del os.environ[setting]
        os.environ |= ALLOCATORS[name]
        print(f"timing with the allocator {name!r}", flush=True)
        try:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                found[name] = pool.submit(measure, args, times_only=bool(found)).result()
        finally:
            os.environ.clear()
            os.environ |= before
    return found


def measure(args: argparse.Namespace, times_only: bool = False) -> dict[str, Any]:
    """All that is timed in this process; `times_only`: no overlay of losses, no memory, no levers."""
    size = SIZES[args.size]
    base = build_base(size)
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(Path(folder), base, size, _rows_needed(args), args.seed)
    result: dict[str, Any] = {"provenance": _provenance(args, rows)}
    result["malloc"] = result["provenance"].get("malloc")
    result["matrix_rate_gflops"] = matrix_rate(torch.device(DEVICE), DTYPE, 8192 if CUDA else 2048, 1.0) / 1e9
    worst = 0.0
    for stage in args.stages:
        if not times_only:
            worst = max(worst, overlay(base, size, stage, rows, args))
            if worst > TOLERANCE and not CUDA:
                raise SystemExit(f"the losses differ by {worst:.1e}, more than {TOLERANCE:g}: nothing is timed")
            result["loss_overlay_max_diff"] = worst
        for key, found in compare_stage(
            base, size, stage, rows, args, times_only, result["matrix_rate_gflops"]
        ).items():
            result.setdefault(key, {}).update(found)
    if 1 in args.stages and not times_only and not CUDA:
        result["concept_7b"] = concept_at_full_size(args)
    return result


def _rows_needed(args: argparse.Namespace) -> int:
    return args.batch * max(args.warmup + args.steps, args.overlay_steps)


def concept_at_full_size(args: argparse.Namespace) -> dict[str, Any]:
    """The concept objective's step at LLaVA-1.5-7B's own dimensions: it has no language model, so a CPU can run it."""
    size = replace(SIZES["7b" if args.size == "proportionate" else args.size], layers=0)
    base, target, steps = build_base(size), "stage1_concept", 1 + min(CONCEPT_STEPS, args.steps)
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(Path(folder), base, size, args.batch * steps, args.seed)
    ours = our_form(base, size, target)
    forms: dict[str, Form] = {target: ours, "B0 concept": official_form(base, ours, size, target)}
    order = in_order(len(rows.lengths), args.batch)
    batches = {name: _batches(form, rows, order) for name, form in forms.items()}
    times = time_steps(forms, batches, 1, CLOCKS[args.clock])
    shapes = [[rows.shapes[i] for i in numbers] for numbers in order[1:]]
    return {
        "steps": {name: _speed(seconds, args.batch, 0) for name, seconds in times.items()},
        "flops": ratios(size, shapes, shapes, targets=(target,))[target]["B0 concept"],
        "peak_memory": {name: peak_memory(form, batches[name][0]) for name, form in forms.items()},
    }


def overlay(base: Any, size: Size, stage: int, rows: Rows, args: argparse.Namespace) -> float:
    """The largest difference of any loss between B0 and ours over some optimizer steps from the same weights."""
    paper = {"query": "first", "dropout": 0.0}
    worst = 0.0
    for target in _targets(stage):
        ours = our_form(base, size, target, **paper)
        official = official_form(base, ours, size, target, dropout=0.0, lora_on_head=False)
        for numbers in in_order(len(rows.lengths), args.batch)[: args.overlay_steps]:
            picked = [rows[size.safety_tokens][i] for i in numbers]
            got, expected = ours.step(ours.batch(picked)), official.step(official.batch(picked))
            worst = max([worst, *((loss - expected[name]).abs().item() for name, loss in got.items())])
            if target == "stage2_lora_alone":
                break  # the official one freezes the safety tokens, which ours trains: only the first step is alike
    return worst


def _targets(stage: int) -> list[str]:
    return [target for target in AGAINST if target.startswith(f"stage{stage}")]


def our_form(base: Any, size: Size, target: str, **options: Any) -> Ours:
    """Our step of a target."""
    objective = "concept" if target == "stage1_concept" else "joint"
    return Ours(base, size, int(target[5]), objective, has_concept=target != "stage2_lora_alone", **options)


def official_form(base: Any, ours: Ours, size: Size, target: str, **options: Any) -> Official:
    """The official step of a target, with the values of ours."""
    objective = "concept" if target == "stage1_concept" else "joint"
    frozen = target == "stage2_lora_alone"
    return Official(base, ours.psa, size, int(target[5]), objective=objective, frozen=frozen, **options)


def forms_of(base: Any, size: Size, stage: int) -> dict[str, Form]:
    """Every form that is timed, by the names of step_flops.AGAINST."""
    ours = {target: our_form(base, size, target) for target in _targets(stage)}
    official = {}
    for target, form in ours.items():
        name = next(name for name in AGAINST[target] if name.startswith("B0"))
        official[name] = official_form(base, form, size, target)
    stock = {"B1": Stock(base, size, stage), "B2": Stock(base, size, stage, liger=LIGER, name="B2")}
    return {**ours, **official, **stock}


def compare_stage(
    base: Any, size: Size, stage: int, rows: Rows, args: argparse.Namespace, times_only: bool, rate: float
) -> dict[str, Any]:
    """Times, memory, parts and overhead of one stage, under the keys of the result."""
    forms = forms_of(base, size, stage)
    shown = list(forms)
    if stage == 1 and not times_only:
        forms |= {name: Ours(base, size, stage, **options) for name, options in LEVERS.items()}
    needed = args.warmup + args.steps
    lengths = rows.lengths[: needed * args.batch]
    plain, grouped = in_order(len(lengths), args.batch), grouped_by_length(lengths, args.batch, args.seed)
    orders = {name: grouped if name == "B2" else plain for name in forms}
    batches = {name: _batches(form, rows, orders[name]) for name, form in forms.items()}
    times = time_steps(forms, batches, args.warmup, CLOCKS[args.clock])
    result: dict[str, Any] = {
        "steps": {
            f"stage{stage}": {
                name: _speed(seconds, args.batch, sum(lengths[i] for n in orders[name][args.warmup :] for i in n))
                for name, seconds in times.items()
            }
        },
        # of all steps together: padding lies in the long rows, which a median leaves out
        "ratios": {t: {name: sum(times[name]) / sum(times[t]) for name in AGAINST[t]} for t in _targets(stage)},
    }
    if not times_only:
        longest = max(range(needed), key=lambda i: sum(lengths[j] for j in plain[i]))
        memory = {name: peak_memory(form, _batches(form, rows, [plain[longest]])[0]) for name, form in forms.items()}
        result["peak_memory"] = {f"stage{stage}": memory}
    return result | _parts(base, size, stage, {n: forms[n] for n in shown if n != "B2"}, batches, rows, args, rate)


def _batches(form: Form, rows: Rows, order: Sequence[Sequence[int]]) -> list[Any]:
    return [form.batch([rows[form.safety_tokens][i] for i in numbers]) for numbers in order]


def _speed(seconds: Sequence[float], batch: int, tokens: int) -> dict[str, float]:
    return {
        "mean_ms": 1e3 * statistics.mean(seconds),
        "p50_ms": 1e3 * statistics.median(seconds),
        "p90_ms": 1e3 * sorted(seconds)[math.ceil(0.9 * len(seconds)) - 1],
        "samples_per_s": batch * len(seconds) / sum(seconds),
        "tokens_per_s": tokens / sum(seconds),
    }


def _parts(
    base: Any, size: Size, stage: int, forms: dict[str, Form], batches: dict, rows: Rows, args: Any, rate: float
) -> dict[str, Any]:
    """Time and FLOPs of each form's parts, and what the safety modules add to B1's step."""
    joint = _targets(stage)[0] if stage == 1 else "stage2_lora"
    bare: dict[str, Any] = {"ours": Ours(base, size, stage, safety_tokens=0)}
    bare["B0"] = Official(base, bare["ours"].psa, size, stage)
    for form in bare.values():
        form.has_concept = False
    plain = in_order(args.batch * len(batches[joint]), args.batch)
    # each beside its own without safety tokens, so that both find the machine alike
    in_turn: dict[str, Form] = {}
    for name, form in forms.items():
        in_turn[name] = form
        if name in (joint, "B0"):
            in_turn[f"{name} without"] = bare["B0" if name == "B0" else "ours"]
    used = {name: batches.get(name) or _batches(form, rows, plain) for name, form in in_turn.items()}
    parts = time_parts(in_turn, used, args.part_rounds, CLOCKS[args.clock])
    return {
        "parts": {f"stage{stage}": {n: table_of_parts(form, used[n], parts[n], rate) for n, form in forms.items()}},
        "safety_overhead": {
            f"stage{stage}": {
                name: overhead(parts, key, f"{key} without") for name, key in (("ours", joint), ("B0", "B0"))
            }
        },
    }


def flops(args: argparse.Namespace) -> dict[str, Any]:
    """FLOPs of the baselines over ours for the rows that are timed, at their own size and at LLaVA-1.5's."""
    found = {}
    for name in dict.fromkeys((args.size, "7b", "13b") if args.size != "tiny" else ("tiny",)):
        shapes = draw_shapes(_rows_needed(args), SIZES[name], args.seed)
        plain, grouped = batches_of(shapes[: args.batch * (args.warmup + args.steps)], args.batch, args.seed)
        found[name] = ratios(SIZES[name], plain[args.warmup :], grouped[args.warmup :])
    return found


def _shares(size: str) -> dict[str, dict[str, float]]:
    return {name: shares(SIZES[name]) for name in dict.fromkeys((size, "7b") if size != "tiny" else ("tiny",))}


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
    }


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=TIMED, default="7b" if CUDA else "proportionate")
    parser.add_argument("--stages", type=int, nargs="+", choices=[1, 2], default=[1, 2])
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--overlay_steps", type=int, default=5, help="steps whose losses are compared")
    parser.add_argument("--part_rounds", type=int, default=4, help="rounds of the parts")
    parser.add_argument("--batch", type=int, default=2, help="rows a step, for every form")
    kinds = ["cuda"] if CUDA else ["both", *ALLOCATORS, "as_is"]
    parser.add_argument(
        "--allocator", choices=kinds, default=kinds[0], help="as_is: what this process was started with"
    )
    parser.add_argument("--note", help="what else is to be known of this run, printed with hardware and versions")
    add_shared_options(parser)
    args = parser.parse_args(argv)
    for name, least in (("steps", 1), ("warmup", 0), ("overlay_steps", 1), ("part_rounds", 1), ("batch", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; expected {least} or more")
    check_shared_options(parser, args)
    return args


if __name__ == "__main__":
    main()
