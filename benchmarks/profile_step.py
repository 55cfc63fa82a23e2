"""Where a training step's time goes: ours, the official step (B0) and plain LLaVA fine-tuning (B1), part by part.

    python benchmarks/profile_step.py --stage 1 [--recipe NAME] [--json FILE] [--picture FILE.png] [--trace FILE.json]

Vision, safety modules (forward, both losses, backward, optimizer), LLM forward, loss (LM head and its gradient),
backward and optimizer: time, FLOPs, share of the measured matrix rate, on a GPU also the peak memory. Then what the
safety modules add to B1's step: the bottleneck with its losses, and the extra tokens in the language model (measured by
leaving them out). --recipe takes dimensions, objective, micro batch, safety tokens, query and LoRA rank from a training
recipe; weights are random, and activations are never recomputed. Started by a launcher with several ranks,

    deepspeed --num_gpus 2 benchmarks/profile_step.py --stage 1 ...

it shows instead what of our step on DeepSpeed's engine is communication, as rank 0 sees it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from baselines.official import Official
from baselines.stock import Stock
from communication import communication
from ladder import CUDA, DEVICE, DTYPE, where
from step_forms import PARTS, Form, Ours, synchronize
from step_measure import (
    CLOCKS,
    add_shared_options,
    check_shared_options,
    overhead,
    table_of_parts,
    time_parts,
)
from step_model import SIZES, TIMED, Size, build_base
from step_rows import Rows, in_order

from psa_fast.made_once import default_cache
from psa_fast.planning.architectures import base_config
from psa_fast.training.config import TrainConfig, parse_args
from psa_fast.training.flops import matrix_rate

SHOWN = ("ours", "B0", "B1")
DEFAULT_SIZE = "7b" if CUDA else "proportionate"
#: options of a recipe that change a step but not this profile, with the value that it has here
FIXED = {
    "gradient_checkpointing": "none",
    "tune_type_connector": "frozen",
    "label_smoothing": 0.0,
    "use_liger_kernel": False,
    "max_tokens_per_micro_batch": None,
}


@dataclass
class Task:
    """What is profiled: dimensions, rows a step, and the recipe's choices that the forms can follow."""

    size: Size
    batch: int
    config: TrainConfig
    objective: str = "joint"
    query: str = "prompt"
    dropout: float = 0.05
    has_concept: bool = True
    not_followed: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the profile; returns what --json writes."""
    args = _options(argv)
    task: Task = args.task
    options = {name: value for name, value in vars(args).items() if name not in ("task", "local_rank")}
    provenance = {**where(), "options": options, "task": asdict(task)}
    if _several_ranks():
        return _ranks(args, provenance)
    base = build_base(task.size)
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(Path(folder), base, task.size, task.batch * args.rounds, args.seed)
    forms = _forms(base, task, args.stage)
    batches = {
        name: [form.batch([rows[form.safety_tokens][i] for i in n]) for n in in_order(len(rows.lengths), task.batch)]
        for name, form in forms.items()
    }
    parts = time_parts(forms, batches, args.rounds, CLOCKS[args.clock])
    rate = matrix_rate(torch.device(DEVICE), DTYPE, n=8192 if CUDA else 2048, seconds=1.0) / 1e9
    shown = [name for name in SHOWN if name in forms]
    table = {name: table_of_parts(forms[name], batches[name], parts[name], rate) for name in shown}
    added = {}
    if task.objective == "joint":
        # a recipe without concept losses has no such part
        spent = {name: [{"safety modules": 0.0, **found} for found in times] for name, times in parts.items()}
        added = {name: overhead(spent, name, f"{name} without") for name in ("ours", "B0")}
    result = {
        "stage": args.stage,
        "parts": table,
        "safety_overhead": added,
        "matrix_rate_gflops": rate,
        "provenance": provenance,
    }
    _print(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.picture:
        draw(result, args.picture)
    if args.trace:
        with torch.profiler.profile(record_shapes=True, profile_memory=True) as trace:
            forms["ours"].step_in_parts(batches["ours"][0], torch.profiler.record_function)
            synchronize()
        trace.export_chrome_trace(args.trace)
    return result


def _several_ranks() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _ranks(args: argparse.Namespace, provenance: dict[str, Any]) -> dict[str, Any]:
    """The profile of several ranks; rank 0 prints and writes."""
    task: Task = args.task
    task.config.micro_batch_size = task.batch
    found = communication(task.size, task.config, args.rounds, args.seed)
    result = {"stage": args.stage, **found, "provenance": provenance}
    if os.environ["RANK"] == "0":
        print(
            f"stage {args.stage}, {found['ranks']} ranks, {task.config.deepspeed_config}: step {found['step']:.1f} ms, "
            f"MFU {found['mfu']:.1%}, of it {found['communication']:.1f} ms with a collective under way"
        )
        for kind, row in found["collectives"].items():
            print(f"  {kind:40s}{row['calls']:8.1f} calls{row['ms']:10.1f} ms")
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _forms(base: torch.nn.Module, task: Task, stage: int) -> dict[str, Form]:
    """Ours and B0, and where the language model runs both without safety tokens, and B1."""
    size, dropout = task.size, task.dropout
    ours = Ours(base, size, stage, task.objective, task.query, dropout=dropout)
    forms: dict[str, Form] = {"ours": ours, "B0": Official(base, ours.psa, size, stage, dropout=dropout)}
    for form in forms.values():
        form.has_concept, form.has_language = task.has_concept, task.objective == "joint"
    if task.objective == "joint":
        bare = Ours(base, size, stage, query=task.query, safety_tokens=0, dropout=dropout)
        official = Official(base, bare.psa, size, stage, dropout=dropout)
        forms |= {"ours without": bare, "B0 without": official, "B1": Stock(base, size, stage, dropout=dropout)}
        bare.has_concept = official.has_concept = False
    return forms


def task_of(recipe: str, stage: int) -> Task:
    """What a recipe says of a stage's step. ValueError, with a sentence, for what this profile cannot run."""
    config = parse_args(["--recipe", recipe, "--stage", str(stage), "--data_path", "-", "--image_folder", "-"])
    if stage == 1 and config.stage1_objective == "tokens":
        raise ValueError(f"--recipe {recipe}: stage1_objective tokens is not profiled, joint and concept are")
    if stage == 2 and config.tune_type_llm != "lora":
        raise ValueError(f"--recipe {recipe}: tune_type_llm {config.tune_type_llm} is not profiled, lora is")
    for name, value in (("num_head_tokens", config.num_safety_tokens), ("num_attention_heads", 8)):
        if getattr(config, name) != value:
            raise ValueError(f"--recipe {recipe}: {name} is {getattr(config, name)}, only {value} is profiled here")
    return Task(
        size=_size_of(config),
        batch=config.micro_batch_size,
        config=config,
        objective=config.stage1_objective if stage == 1 else "joint",
        query=config.query,
        dropout=config.lora_dropout if stage == 2 else 0.05,
        has_concept=config.runs_bottleneck,
        not_followed=tuple(f"{k}={getattr(config, k)}" for k, v in FIXED.items() if getattr(config, k) != v),
    )


def _size_of(config: TrainConfig) -> Size:
    """The dimensions of a recipe's base, from its folder or as architectures.py knows them."""
    name = str(config.model_name_or_path)
    if name == "sandbox":
        made = sorted(default_cache().glob("base-*"), key=lambda path: path.stat().st_mtime)
        if not made:
            raise ValueError("the sandbox's base is not there yet: deepspeed train.py --stage 1 makes it")
        name = str(made[-1])
    base = base_config(name)
    text, vision = base.get_text_config(), base.vision_config
    kinds = (base.model_type, vision.model_type, text.model_type)
    if kinds != ("llava", "clip_vision_model", "llama") or text.num_key_value_heads != text.num_attention_heads:
        raise ValueError(f"{name} is {' with '.join(kinds)}; only LLaVA-1.5's architecture is profiled")
    return Size(
        vision_width=vision.hidden_size,
        vision_layers=vision.num_hidden_layers,
        vision_heads=vision.num_attention_heads,
        vision_mlp=vision.intermediate_size,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        mlp=text.intermediate_size,
        vocabulary=text.vocab_size,
        image_size=vision.image_size,
        patch=vision.patch_size,
        safety_tokens=config.num_safety_tokens,
        lora_r=config.lora_r,
    )


def _print(result: dict[str, Any]) -> None:
    device, threads = result["provenance"]["device"], result["provenance"]["threads"]
    rate = result["matrix_rate_gflops"]
    print(f"stage {result['stage']}, {device}, {threads} threads, matrix rate {rate:.0f} GFLOP/s")
    not_followed = result["provenance"]["task"]["not_followed"]
    if not_followed:
        print(f"the recipe's {', '.join(not_followed)} is not in this profile")
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
    parser.add_argument("--recipe", help="training recipe, by name or path, whose step is profiled")
    parser.add_argument("--size", choices=sorted(TIMED), help=f"without a recipe (default: {DEFAULT_SIZE})")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each form")
    parser.add_argument("--batch", type=int, help="rows a step, for every form (default: the recipe's, or 2)")
    add_shared_options(parser)
    parser.add_argument("--picture", help="file for the stacked bars (needs matplotlib: pip install 'psa-fast[bench]')")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    parser.add_argument("--trace", help="file for a torch.profiler trace of one step of ours")
    args = parser.parse_args(argv)
    for name in ("rounds", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; expected 1 or more")
    if _several_ranks():
        for name in ("picture", "trace", "clock"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} has no effect with several ranks")
    if args.recipe and args.size:
        parser.error("--size has no effect with --recipe, which names its base")
    try:
        size = SIZES[args.size or DEFAULT_SIZE]
        own = TrainConfig(stage=args.stage, lora_r=size.lora_r)
        args.task = task_of(args.recipe, args.stage) if args.recipe else Task(size, 2, own)
    except ValueError as error:
        parser.error(str(error))
    if args.batch is not None:
        args.task.batch = args.batch
    if args.picture and find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install 'psa-fast[bench]'")
    check_shared_options(parser, args)
    return args


if __name__ == "__main__":
    main()
