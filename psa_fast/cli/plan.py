"""`psa-fast plan`: does a run fit, before any model is loaded."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from psa_fast.compat.argparse import Subcommands
from psa_fast.files import shorten
from psa_fast.training.arguments import OneLine, add_group
from psa_fast.training.config import TrainConfig, resolve
from psa_fast.training.options import EMBEDDED

if TYPE_CHECKING:
    from psa_fast.planning.memory import Estimate, Machine, Remedy, Sizes

# what of train.py's options changes memory; the others are not accepted, so that none is silently ignored
OPTIONS = (
    "stage", "stage1_objective", "recipe", "model_name_or_path", "max_length", "num_safety_tokens", "num_head_tokens",
    "num_attention_heads", "projector_depth", "tune_type_llm", "tune_type_connector", "lora_r", "lora_dropout",
    "concept_loss_weight", "packing", "attn_implementation", "global_batch_size", "micro_batch_size",
    "max_tokens_per_micro_batch", "gradient_checkpointing", "deepspeed_config", "dataloader_num_workers",
)  # fmt: skip


def register(subparsers: Subcommands) -> None:
    """Add the command `plan`."""
    parser = subparsers.add_parser(
        "plan",
        help="estimate a training run's memory before a model is loaded; exit code 1 if it does not fit",
        description="Memory of a training run per GPU and host, from the model's configuration alone. What does not "
        "fit is named, with the settings that would. Exit code 1 if the run does not fit as asked.",
        usage="%(prog)s --recipe NAME --gpus N --gpu_gb G [--nodes K] [--host_gb G] [--OPTION VALUE ...]",
        formatter_class=OneLine,
        allow_abbrev=False,
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of a node")
    machine.add_argument("--gpu_gb", type=float, required=True, metavar="G", help="memory of a GPU in GiB")
    machine.add_argument("--nodes", type=int, default=1, metavar="K", help="nodes (default: 1)")
    machine.add_argument("--host_gb", type=float, metavar="G", help="memory of a node in GiB (default: not checked)")
    load = parser.add_argument_group("load")
    load.add_argument("--images_per_row", type=int, default=1, metavar="N", help="images of a row (default: 1)")
    options = parser.add_argument_group("train.py's options that matter here; defaults come from the recipe")
    add_group(options, OPTIONS)
    parser.set_defaults(func=plan)


def plan(args: argparse.Namespace) -> int:
    """Print the estimate; 0 if the run fits, else 1 with what would help. ValueError for options that do not fit."""
    from rich.console import Console

    from psa_fast.planning.memory import MOST, Machine, estimate, measure, remedies

    machine = Machine(args.gpus, args.gpu_gb, args.nodes, args.host_gb)
    images = args.images_per_row
    if not 0 <= images <= MOST:
        raise ValueError(f"--images_per_row is {shorten(images)}; expected a whole number, 0 to {MOST}")
    config = read_options(args)
    sizes = measure(config)
    found = estimate(config, sizes, machine, images)
    # a fixed width keeps one line one line in files
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    print_estimate(config, sizes, found, console)
    if not found.fits:
        print_remedies(found, remedies(config, sizes, machine, images), console)
    return 0 if found.fits else 1


def read_options(args: argparse.Namespace) -> TrainConfig:
    """The training options as train.py would resolve them."""
    if not hasattr(args, "recipe"):
        raise ValueError("--recipe is needed, such as llava-1.5-7b")
    given = {name: getattr(args, name) for name in OPTIONS if hasattr(args, name)}
    if str(given.get("stage")) == "0":
        raise ValueError("a plan is made for stages 1 and 2; stage 0 holds a vision tower twice and no language model")
    # no record is read, but train.py asks where they are
    config = resolve(given | {"data_path": "-", "image_folder": "-"})
    if config.model_name_or_path in EMBEDDED:
        raise ValueError(
            "a plan needs a folder for the sandbox's base: --model_name_or_path, see psa-fast sandbox base"
        )
    if config.dtype == "fp32":
        raise ValueError(f"a plan is made for bf16, the recipe {config.recipe!r} says fp32")
    return config


def print_estimate(config: TrainConfig, sizes: Sizes, found: Estimate, console: Any) -> None:
    """Tables of parameters and memory, and the verdict."""
    machine = found.machine
    nodes = f"{machine.nodes} x " if machine.nodes > 1 else ""
    console.print(
        f"{config.model_name_or_path}, stage {config.stage}, {nodes}{machine.gpus} x {machine.gpu_gb:g} GiB, "
        f"{config.deepspeed_config}, micro batch {_micro(config, machine)}, rows of {config.max_length} tokens, "
        f"attention {config.attn_implementation}, {'packed' if config.packing else 'padded'}, "
        f"checkpointing {config.gradient_checkpointing}"
    )
    console.print(f"parameters: {sizes.total:,}, trained: {sizes.trained:,}")
    for name, count in sizes.parts.items():
        console.print(f"  {name}: {count:,}")
    console.print(_table(found))
    for note in found.notes:
        console.print(f"note: {note}")
    verdict = "fits" if found.fits_gpu else "does not fit"
    console.print(f"{verdict}: {_gib(found.gpu_peak)} of {machine.gpu_gb:g} GiB on each GPU")
    if machine.host_gb is not None:
        held = "fits" if found.fits_host else "does not fit"
        console.print(f"{held}: {_gib(found.host_peak)} of {machine.host_gb:g} GiB on each host")


def print_remedies(found: Estimate, options: list[Remedy], console: Any) -> None:
    """What is too large, and the options that help."""
    if not found.fits_gpu:
        parts = {**found.states, **found.step}
        largest = max(parts, key=lambda name: parts[name])
        over = found.gpu_peak - found.machine.gpu_gb * 2**30
        console.print(f"{_gib(over)} GiB too many on a GPU; the largest part is {largest}, {_gib(parts[largest])} GiB")
    if not found.fits_host:
        largest = max(found.host, key=lambda name: found.host[name])
        over = found.host_peak - (found.machine.host_gb or 0) * 2**30
        console.print(
            f"{_gib(over)} GiB too many on a host; the largest part is {largest}, {_gib(found.host[largest])} GiB"
        )
    if not options:
        console.print("no setting known here makes it fit: more or larger GPUs, or a larger host, are needed")
    for remedy in options:
        host = f", {_gib(remedy.estimate.host_peak)} GiB on each host"
        console.print(f"would fit with {remedy.flags()} ({_gib(remedy.estimate.gpu_peak)} GiB{host})")


def _table(found: Estimate) -> Any:
    from rich.table import Table

    table = Table(title="GiB", show_edge=False)
    table.add_column("part")
    for moment in ("forward and backward", "optimizer step", "host", "NVMe, all ranks"):
        table.add_column(moment, justify="right")
    for name, size in found.states.items():
        table.add_row(name, _gib(size), _gib(size))
    for name, size in found.step.items():
        table.add_row(name, _gib(size))
    for name, size in found.optimizer.items():
        table.add_row(name, "", _gib(size))
    table.add_row("CUDA context, communication, allocator (assumed)", *2 * [_gib(found.overhead)])
    for name, size in found.host.items():
        table.add_row(name, "", "", _gib(size))
    if found.nvme:
        table.add_row("optimizer state", "", "", "", _gib(found.nvme * found.machine.world_size))
    return table


def _micro(config: TrainConfig, machine: Machine) -> str:
    """What a rank takes in one pass, its rows as the engine will lower them."""
    if config.max_tokens_per_micro_batch is not None:
        return f"of at most {config.max_tokens_per_micro_batch} tokens"
    return f"of {max(1, min(config.micro_batch_size, config.global_batch_size // machine.world_size))}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
