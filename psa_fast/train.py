"""`train.py` and `psa-fast train`: inputs made real, one stage trained, every failure one sentence.

`deepspeed --module psa_fast.train --stage 1` is `deepspeed train.py --stage 1` where only the package is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
import warnings
from typing import Any

from psa_fast.compat.argparse import Subcommands
from psa_fast.threads import choose_waiting

choose_waiting()
_SPEAKER_FIRST = 30.0  # seconds that a silent rank waits for the launcher to end it


def register(subparsers: Subcommands) -> None:
    """Add the command `train`."""
    from psa_fast.training.arguments import USAGE, OneLine, add_options

    parser = subparsers.add_parser(
        "train",
        help="train a stage, as train.py does",
        description="Train PSA-VLM: stage 1, then stage 2. Without options the sandbox recipe runs.",
        usage=USAGE.replace("[--OPTION", "[--num_gpus N] [--OPTION"),
        formatter_class=OneLine,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--num_gpus", "--num-gpus", type=int, metavar="N", help="start N ranks here (default: this process alone)"
    )
    add_options(parser)
    parser.set_defaults(func=_command)


def _command(args: argparse.Namespace) -> int:
    from psa_fast.training.options import OPTIONS

    typed = {name: value for name, value in vars(args).items() if name in OPTIONS}
    if args.num_gpus is None:
        return run(typed, "psa-fast train")
    if not 1 <= args.num_gpus <= 1024:
        raise ValueError(f"--num_gpus is {args.num_gpus}; expected a whole number of at least 1")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(args.num_gpus)]
    options = [f"--{name}={value}" for name, value in typed.items()]
    code = subprocess.call([*launcher, "--module", "psa_fast.train", *options])
    # the launcher ends by the signal that it passed on
    return code if code >= 0 else 2


def main(argv: list[str] | None = None) -> int:
    """Entry point of train.py; returns the exit code."""
    from psa_fast.training.arguments import typed_options

    try:
        typed = typed_options(argv, "train.py")
    except ValueError as error:
        return _fail(error, "train.py", everywhere=True)
    return run(typed, "train.py")


def run(typed: dict[str, str], prog: str) -> int:
    """Train one stage with the options typed, on this rank; returns the exit code."""
    from rich.console import Console

    from psa_fast.safety.policy import Policy
    from psa_fast.training.config import resolve

    # a fixed width keeps one log line one line in files; a path with brackets or colons is no markup
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    console.quiet = os.environ.get("RANK", "0") != "0"
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    # DeepSpeed calls collectives by their older names
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    try:
        # options, policy and inputs are the same for every rank of a node
        everywhere = True
        config = resolve(typed)
        policy = Policy.load(config.policy)
        if config.stage:
            policy.require_taxonomy(config.concepts, f"--taxonomy {config.taxonomy}")
        from psa_fast.models.versions import check_versions

        check_versions()
        config = resolve_inputs(config, policy.hint)
        validation = build_validation(config, policy)
        console.print("resolved options: " + ", ".join(f"{k}={v}" for k, v in config.to_dict().items()), soft_wrap=True)
        everywhere = False
        if config.stage == 0:
            from psa_fast.training.robust_run import train_tower

            train_tower(config, console)
        else:
            from psa_fast.training.loop import train

            train(config, hint_for=policy.hint, console=console, validation=validation)
    except (ValueError, FloatingPointError, OSError) as error:
        return _fail(error, prog, everywhere)
    return 0


def resolve_inputs(config: Any, hint_for: Any) -> Any:
    """Real paths where the recipe names an embedded base or world (made on first use), and stage 2's add-on."""
    from psa_fast.data.record_tables import EVALUATED_ON, TRAINED_ON, as_records, is_table
    from psa_fast.made_once import default_cache
    from psa_fast.sandbox.cache import ensure_base, ensure_world
    from psa_fast.training.checkpoint import find_resume, is_finished
    from psa_fast.training.options import EMBEDDED

    changes: dict[str, Any] = {}
    if config.model_name_or_path in EMBEDDED:
        base = ensure_base(config.model_name_or_path, default_cache(), config.seed, hint_for)
        changes["model_name_or_path"] = str(base)
    if config.data_path in EMBEDDED:
        world = ensure_world(config.data_path, default_cache(), config.seed)
        changes |= {"data_path": str(world / f"stage{max(config.stage, 1)}.jsonl"), "image_folder": str(world)}
    if config.eval_data_path in EMBEDDED:
        world = ensure_world(config.eval_data_path, default_cache(), config.seed)
        changes |= {"eval_data_path": str(world / "dev.jsonl"), "eval_image_folder": str(world)}
    for data, folder, split in (
        ("data_path", "image_folder", TRAINED_ON), ("eval_data_path", "eval_image_folder", EVALUATED_ON),
    ):  # fmt: skip
        path = changes.get(data, getattr(config, data))
        if path is not None and is_table(path):
            images = changes.get(folder, getattr(config, folder))
            changes[data], changes[folder] = as_records(
                path, images, split, f"--{data}", config.on_bad_sample, config.kept_keys, config.concepts
            )
    # --resume auto may find nothing to resume, and must not then start from an untrained add-on
    if config.stage == 2 and config.addon is None and find_resume(config) is None and not is_finished(config.stage_dir):
        stage1 = dataclasses.replace(config, stage=1).stage_dir
        if not is_finished(stage1):
            raise ValueError(
                f"stage 2 starts from stage 1's add-on and {stage1} holds none: run --stage 1 first, or give --addon"
            )
        changes["addon"] = str(stage1)
    return dataclasses.replace(config, **changes)


def build_validation(config: Any, policy: Any) -> Any:
    """What `--eval_every` evaluates, with its rows read and every picture decoded; None without.

    Raises:
        ValueError: rows that cannot be used.
    """
    if config.stage == 0 or config.eval_every is None:
        return None
    from psa_fast.evaluation.during_training import DevSet

    return DevSet(
        config.eval_data_path,
        config.eval_image_folder or config.image_folder,
        config.model_name_or_path,
        policy,
        config.eval_batch_size,
        answers=config.runs_language_model,
    )


def _fail(error: Exception, prog: str, everywhere: bool) -> int:
    """Print the sentence, once a node where every rank has the same, and return the exit code."""
    from psa_fast.training.ranks import is_shared

    if (everywhere or is_shared(error)) and os.environ.get("LOCAL_RANK", "0") != "0":
        # the launcher kills all ranks as soon as one has ended: the one that speaks must be the first
        time.sleep(_SPEAKER_FIRST)
        return 2
    rank = os.environ.get("RANK", "0")
    prefix = f"{prog}: error:" if rank == "0" else f"{prog}: error: [rank {rank}]"
    print(f"{prefix} {_sentence(error)}", file=sys.stderr, flush=True)
    return 2


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{str(error.filename)[:300]}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
