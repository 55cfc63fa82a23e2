"""`psa-fast export`: a trained model as a plain transformers folder, and what such a folder cannot hold."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from psa_fast import __version__
from psa_fast.compat.argparse import Subcommands
from psa_fast.files import shown

if TYPE_CHECKING:
    from psa_fast.models import PsaConfig

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def register(subparsers: Subcommands) -> None:
    """Add the command `export`."""
    parser = subparsers.add_parser(
        "export",
        help="merge a trained model into a plain transformers folder, without its guard",
        description="Write base and stage-2 add-on as one folder that transformers loads without psa-fast: LoRA is "
        "merged, connector and other weights that were trained are in place. The guard is not in it, and the safety "
        "tokens lie beside it, as no stock model has a place for them.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the add-on's folder, such as RUN/stage2")
    parser.add_argument("--base", metavar="PATH", help="base VLM (default: the one the add-on's config names)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, which must not be there yet")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as the base is stored)")
    parser.set_defaults(func=export)


def export(args: argparse.Namespace) -> int:
    """Write the folder. Raises ValueError, with a sentence, for what cannot be exported."""
    out = Path(args.out)
    if os.path.lexists(out):
        raise ValueError(f"--out {shown(out)} exists; name a folder that is not there yet")
    import torch

    from psa_fast.models import PsaVLM, commit_of, load_processor
    from psa_fast.models.addon import base_of, changes_base, check_base_folder, check_files
    from psa_fast.models.stock_folder import base_files, write_merged
    from psa_fast.safety.load import addon_hash, naming_base

    config = check_files(args.model)
    base = base_of(args.model, config) if args.base is None else args.base
    if not changes_base(args.model):
        raise ValueError(
            f"--model {args.model} changes no weight of its base (stage 1 does not), so there is nothing to merge: "
            f"the stock folder is the base itself, {shown(base)}"
        )
    with naming_base(base):
        check_base_folder(args.model, config, base)
        load_processor(base, config, config.revision_of(base))  # whether there is one, before the weights
        psa = PsaVLM.from_pretrained(
            base, args.model, None if args.dtype is None else getattr(torch, DTYPES[args.dtype])
        )
        files = base_files(base, commit_of(psa.vlm))
    lines = told(psa.config)
    card = render_card(psa.config, Path(args.model).resolve().name, addon_hash(args.model), lines)
    write_merged(psa, files, out, card)
    print(f"wrote {shown(out)}, {str(psa.vlm.dtype).removeprefix('torch.')}")
    print("\n".join(lines))
    return 0


def told(config: PsaConfig) -> list[str]:
    """What a stock folder does not hold, as sentences."""
    from psa_fast.models.stock_folder import SAFETY_KEY, SAFETY_TOKENS

    count, width = config.num_safety_tokens, config.hidden_size
    lines = [
        "Not guarded: no verdict, no policy, no hint or refusal of the policy's. The concept modules are not in it."
    ]
    if count:
        lines.append(
            f"Without its {count} safety tokens, as no stock model puts them in: its answers may differ from those of "
            f"the guarded model, and no figure of psa-fast is of it. {SAFETY_TOKENS} holds them ({SAFETY_KEY}, "
            f"[{count}, {width}]), for who puts these rows before each image's own."
        )
    return lines


def render_card(config: PsaConfig, addon: str, digest: str, lines: list[str]) -> str:
    """Return the folder's README.md.

    Args:
        config: the add-on's.
        addon: name of its folder.
        digest: SHA-256 of its files.
        lines: what the folder does not hold.
    """
    from psa_fast.models.base_model import is_folder_name

    base, commit = config.base_model_name_or_path, config.base_revision
    on_hub = base is not None and commit is not None and not is_folder_name(base)
    where = f"`{base}`, commit `{commit}`" if on_hub else "one that has no name on the hub"
    relation = f"base_model: {base}\nbase_model_relation: finetune\n" if on_hub else ""
    missing = "\n".join(f"- {line}" for line in lines)
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
{relation}---

# Merged from a PSA add-on

The weights of a base with those that stage 2 of psa-fast trained. The base is {where}, and its own terms hold.
`AutoModelForImageTextToText` and `AutoProcessor` load this folder without psa-fast.

## What is not in it

{missing}

## Where the rest is

The concept modules are in `psa.safetensors` of the add-on, a folder named `{addon}` when this was written; SHA-256 of
its files: `{digest}`.
It belongs on the base, not on this folder. `psa-fast generate --model ADDON` answers with the guard.

Written by psa-fast {__version__}.
"""
