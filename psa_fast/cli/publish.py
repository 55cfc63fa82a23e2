"""`psa-fast publish`: an add-on with a model card as a folder, and on the Hugging Face Hub if asked to."""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from psa_fast.compat.argparse import Subcommands
from psa_fast.files import named, write_text

CARD, POLICY = "README.md", "policy.yaml"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")


def register(subparsers: Subcommands) -> None:
    """Add the command `publish`."""
    parser = subparsers.add_parser(
        "publish",
        help="write an add-on with a model card, and push it to the Hugging Face Hub",
        description="Copy an add-on's own files and its policy to --out and write a model card with the figures of "
        "reports that name its hash. Nothing leaves this machine without --push_to.",
    )
    parser.add_argument("--addon", required=True, metavar="DIR", help="the add-on's folder, such as RUN/stage2")
    parser.add_argument(
        "--report", required=True, nargs="+", metavar="FILE", help="report.json of psa-fast evaluate or psa-fast bench"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, which must not be there yet")
    parser.add_argument("--policy", metavar="FILE", help="the policy of the reports (default: the shipped one)")
    parser.add_argument("--licence", metavar="ID", help="of the add-on, as the hub names it (apache-2.0, say)")
    parser.add_argument("--push_to", metavar="OWNER/NAME", help="upload the folder to this repository of the hub")
    parser.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    parser.set_defaults(func=publish)


def publish(args: argparse.Namespace) -> int:
    """Write the folder, and upload it if asked to. Raises ValueError for input that cannot be published."""
    if args.public and args.push_to is None:
        raise ValueError("--public does nothing without --push_to")
    if args.licence is not None and not _LICENCE.fullmatch(args.licence):
        raise ValueError(f"--licence {args.licence}: expected the hub's identifier, such as apache-2.0")
    if args.push_to is not None:
        _check_name(args.push_to)
    out = Path(args.out)
    if out.exists():
        raise ValueError(f"--out {out} exists; name a folder that is not there yet")
    write_folder(args, out)
    print(f"wrote {out}; read {out / CARD} before anybody else does")
    if args.push_to is not None:
        print(f"uploaded to {_upload(out, args.push_to, private=not args.public)}")
    return 0


def write_folder(args: argparse.Namespace, out: Path) -> None:
    """Write add-on, policy and card to `out`, whole or not at all."""
    from psa_fast.evaluation.model_card import read_measured, render_card
    from psa_fast.models.addon import check_files
    from psa_fast.models.base_model import is_folder_name
    from psa_fast.safety.load import ADDON_PARTS, addon_hash
    from psa_fast.safety.policy import DEFAULT_POLICY, Policy

    addon, policy = Path(args.addon), Path(args.policy or DEFAULT_POLICY)
    config, policy_hash = check_files(addon), Policy.load(policy).hash
    digest = addon_hash(addon)
    measured = [read_measured(Path(file), digest, policy_hash) for file in args.report]
    base = config.base_model_name_or_path
    if base is None or is_folder_name(base) or config.base_revision is None:
        print(f"note: psa_config.json names the base {base}, no commit of the hub, and readers have to give --base")
        base = None
    hashes = {"add-on, sha256": digest, "policy, sha256": policy_hash}
    if config.base_fingerprint is not None:
        hashes["base, fingerprint"] = config.base_fingerprint
    card = render_card(base, config.base_revision, args.licence, hashes, measured)
    unfinished = out.with_name(f".{out.name}.part")
    with named(out):
        shutil.rmtree(unfinished, ignore_errors=True)
        for part in ADDON_PARTS:
            source, target = addon / part, unfinished / part
            if source.is_dir():
                shutil.copytree(source, target)
            elif source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        shutil.copyfile(policy, unfinished / POLICY)
        write_text(unfinished / CARD, card)
        unfinished.rename(out)


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push_to {name}: {error}") from None
    if name.count("/") != 1:
        raise ValueError(f"--push_to {name}: expected OWNER/NAME")


def _upload(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder, with the token that `hf auth login` or HF_TOKEN gives; the address of the repository."""
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="PSA add-on with its model card")
    except Exception as error:  # the client's own, and those of the HTTP library that it happens to use
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ValueError(f"--push_to {repository}: {reason}; {folder} is written") from error
    return str(address)
