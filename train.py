"""Train PSA-VLM: `deepspeed train.py --stage 1`, then `deepspeed train.py --stage 2`.

Without further options the sandbox recipe runs; `--recipe llava-1.5-7b --model_name_or_path ... --data_path ...
--image_folder ... --output_dir ...` is the real thing. `--help` lists every option.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings

# before torch is imported: threads that spin while they wait starve each other where ranks or jobs share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def resolve_inputs(config, hint_for):
    """Real paths where the recipe says 'sandbox' (made on first use), and stage 2's add-on."""
    from psa_fast.training.checkpoint import find_resume, is_finished

    changes = {}
    if "sandbox" in (config.model_name_or_path, config.data_path):
        from psa_fast.sandbox.cache import default_cache, ensure

        world, base = ensure(default_cache(), seed=config.seed, hint_for=hint_for)
        if config.model_name_or_path == "sandbox":
            changes["model_name_or_path"] = str(base)
        if config.data_path == "sandbox":
            changes["data_path"] = str(world / f"stage{config.stage}.jsonl")
            changes["image_folder"] = str(world)
    # --resume auto may find nothing to resume, and must not then start from an untrained add-on
    if config.stage == 2 and config.addon is None and find_resume(config) is None and not is_finished(config.stage_dir):
        stage1 = dataclasses.replace(config, stage=1).stage_dir
        if not is_finished(stage1):
            raise ValueError(
                f"stage 2 starts from stage 1's add-on and {stage1} holds none: run --stage 1 first, or give --addon"
            )
        changes["addon"] = str(stage1)
    return dataclasses.replace(config, **changes)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    from rich.console import Console

    from psa_fast.safety.policy import Policy
    from psa_fast.training.config import parse_args

    rank = int(os.environ.get("RANK", "0"))
    # a fixed width keeps one log line one line in files
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    try:
        config = parse_args(argv)
        policy = Policy.load(config.policy)
        config = resolve_inputs(config, policy.hint)
        if rank == 0:
            console.print(
                "resolved options: " + ", ".join(f"{k}={v}" for k, v in config.to_dict().items()), soft_wrap=True
            )
        from psa_fast.training.loop import train

        train(config, hint_for=policy.hint, console=console)
    except (ValueError, FloatingPointError, OSError) as error:
        prefix = "train.py: error:" if rank == 0 else f"train.py: error: [rank {rank}]"
        # a data-loading worker hands its error over with its traceback; the sentence is the last line
        text = str(error)
        text = text.strip().splitlines()[-1] if "Original Traceback" in text else text
        print(f"{prefix} {text}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
