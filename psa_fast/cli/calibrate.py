"""`psa-fast calibrate`: a policy whose threshold keeps a promise about harmless requests."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from psa_fast.compat.argparse import Subcommands

if TYPE_CHECKING:
    from psa_fast.evaluation.calibration import Threshold
    from psa_fast.evaluation.results import Result
    from psa_fast.safety.policy import Policy

TARGET = "over_refusal"
MARK = "# calibrated:"  # begins the lines that this command writes, and takes out again
_KEY = re.compile(r"^unsafe_threshold[ \t]*:[^\n#]*", re.MULTILINE)


def register(subparsers: Subcommands) -> None:
    """Add the command `calibrate`."""
    parser = subparsers.add_parser(
        "calibrate",
        help="choose a policy's threshold for a share of harmless requests that may be flagged",
        description="Write a policy whose unsafe_threshold is the lowest that flags at most a given share of harmless "
        "requests like those of the data, with a given confidence. The rows must be held out: neither trained on nor "
        "reported on afterwards.",
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--answers", metavar="FILE", help="answers-STAGE.jsonl of psa-fast evaluate; no model is run")
    given.add_argument("--data", metavar="PATH", help="folder with SPLIT.jsonl, or a JSONL file, to be read by --model")
    parser.add_argument("--model", metavar="DIR", help="add-on folder that reads --data")
    parser.add_argument("--base", metavar="PATH", help="base VLM (default: the one the add-on's config names)")
    parser.add_argument("--split", help="SPLIT.jsonl of the data folder (default: dev)")
    parser.add_argument("--image_folder", metavar="DIR", help="where image paths start (default: the data folder)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="requests at once (default: 64)")
    parser.add_argument(
        "--target", required=True, metavar=f"{TARGET}=SHARE", help="of harmless requests that may be flagged"
    )
    parser.add_argument("--per", choices=["group"], help="keep the target in every group of harmless rows by itself")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="that it is kept (default: 0.95)")
    parser.add_argument("--policy", metavar="FILE", help="policy YAML to start from (default: the shipped one)")
    parser.add_argument("--out", required=True, metavar="FILE", help="policy file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.set_defaults(func=calibrate)


@dataclass(frozen=True)
class Source:
    """The rows that a threshold rests on, and where they come from."""

    results: Sequence[Result]
    file: Path
    model_hash: str | None = None

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()


def calibrate(args: argparse.Namespace) -> int:
    """Fit the threshold and write the policy. Raises ValueError, with a sentence, for what cannot be promised."""
    from psa_fast.evaluation.calibration import fit_threshold
    from psa_fast.evaluation.paired import flag_scores
    from psa_fast.evaluation.results import REFUSED, by_group
    from psa_fast.files import write_text
    from psa_fast.safety.policy import DEFAULT_POLICY, Policy

    target = _share(args.target)
    if not 0.5 <= args.confidence < 1.0:
        raise ValueError(f"--confidence is {args.confidence:g}; expected at least 0.5 and less than 1")
    _check_options(args)
    policy = Policy.load(args.policy)
    text = Path(args.policy or DEFAULT_POLICY).read_text(encoding="utf-8-sig")
    if Path(args.out).exists() and not args.overwrite:
        raise ValueError(f"--out {args.out} is there already; name another, or give --overwrite")
    with_threshold(text, policy, 0.5, [])  # a file that cannot be changed is met before a model is loaded

    source = _read_answers(Path(args.answers)) if args.answers is not None else _read_data(args, policy)
    groups = {name: rows for name, rows in by_group(source.results).items() if name in REFUSED and rows}
    scores = {name: flag_scores(rows) for name, rows in groups.items()}
    known = {name: found for name, found in scores.items() if found is not None}
    if len(known) < len(scores):
        raise ValueError(
            f"{source.file} does not tell the highest score of each row: an older version wrote it; "
            "run psa-fast evaluate again, or give --data and --model"
        )
    parts = known if args.per else {"harmless": [score for found in known.values() for score in found]}
    fitted = {}
    for name, found in parts.items():
        try:
            fitted[name] = fit_threshold(found, target, args.confidence)
        except ValueError as error:
            raise ValueError(f"{source.file}, {name}: {error}" if args.per else f"{source.file}: {error}") from error
    value = max(threshold.value for threshold in fitted.values())
    promise = (
        f"with {args.confidence:.10g} confidence at most {target:g} of harmless requests like those below are flagged"
        + (", in each group" if args.per else "")
    )
    told = [*_provenance(source, fitted, promise), *_reliability(source.results)]
    new = with_threshold(text, policy, value, told)
    write_text(args.out, new)
    print(*told, *_trade(source.results, policy.unsafe_threshold, value), sep="\n")
    print(f"wrote {args.out}")
    return 0


def _share(text: str) -> float:
    """The share of --target. Raises ValueError for another target or a share outside (0, 1)."""
    name, _, number = text.partition("=")
    try:
        share = float(number)
    except ValueError:
        share = 0.0
    if name != TARGET or not 0.0 < share < 1.0:
        raise ValueError(f"--target is {text}; expected {TARGET}=SHARE, a share between 0 and 1")
    return share


def _check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that has nothing to do, or that is missing."""
    of_data = ("model", "base", "split", "image_folder", "batch_size")
    if args.answers is not None:
        idle = [f"--{name}" for name in of_data if getattr(args, name) is not None]
        if idle:
            raise ValueError(f"{', '.join(idle)}: the answers are read already; these go with --data")
    elif args.model is None:
        raise ValueError("--data needs --model, the add-on that reads it")
    elif args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}; expected at least 1")


def _read_answers(file: Path) -> Source:
    from psa_fast.evaluation.results import read_results

    return Source(read_results(file), file)


def _read_data(args: argparse.Namespace, policy: Policy) -> Source:
    """Have the add-on read the rows of --data, without answering."""
    from psa_fast.cli.evaluation import find_data
    from psa_fast.data.records import load_records
    from psa_fast.evaluation.check import check_prompts, require_labels
    from psa_fast.evaluation.evaluate import read_stage
    from psa_fast.safety.load import addon_hash, base_of, checked_hash, load_guard, load_prompter

    file, image_folder = find_data(args.data, args.split or "dev", args.image_folder)
    checked_hash(args.model)
    base = base_of(args.model) if args.base is None else args.base
    records = load_records(file, image_folder)
    require_labels(file, records)
    check_prompts(file, records, load_prompter(base, args.model), 1)
    guard = load_guard(args.model, base, policy)
    results = read_stage(guard, records, image_folder, args.batch_size or 64)
    return Source(results, file, addon_hash(args.model))


def _provenance(source: Source, fitted: dict[str, Threshold], promise: str) -> list[str]:
    today = datetime.now(timezone.utc).date().isoformat()
    lines = [f"{MARK} {today}, {promise}", f"{MARK} data {source.file.name!r}, sha256 {source.sha256}"]
    if source.model_hash is not None:
        lines.append(f"{MARK} add-on sha256 {source.model_hash}")
    for name, found in fitted.items():
        lines.append(
            f"{MARK} {name}: from {found.value:.6g} on {found.flagged} of {found.n} rows are flagged, "
            f"upper bound {found.bound:.6g}"
        )
    return lines


def _reliability(results: Sequence[Result]) -> list[str]:
    """What a temperature would do to the heads' probabilities: fitted on every other row, measured on the others."""
    import numpy as np

    from psa_fast.evaluation.calibration import class_ece, fit_temperature, scale
    from psa_fast.evaluation.evaluate import image_readings

    lines = []
    rows, _, _ = image_readings(results)
    for head in ("type", "level"):
        pairs = [(getattr(r, f"{head}_probs"), getattr(r, f"safe_{head}")) for r in rows]
        kept = [(probs, label) for probs, label in pairs if probs is not None and label is not None]
        if len(kept) < 100:  # fewer say nothing
            continue
        probs, labels = np.array([p for p, _ in kept]), np.array([label for _, label in kept])
        temperature = fit_temperature(probs[::2], labels[::2])
        before, after = class_ece(probs[1::2], labels[1::2]), class_ece(scale(probs[1::2], temperature), labels[1::2])
        lines.append(
            f"{MARK} {head} head: calibration error {before:.4f}, at temperature {temperature:.3g} {after:.4f} "
            "(not applied)"
        )
    return lines


def _trade(results: Sequence[Result], old: float, new: float) -> list[str]:
    """Shares of risky and harmless rows flagged at the policy's old threshold and at the new one."""
    from psa_fast.evaluation.metrics import rate
    from psa_fast.evaluation.paired import flag_scores
    from psa_fast.evaluation.results import ATTACKED, REFUSED, by_group

    lines = []
    for group, rows in by_group(results).items():
        scores = flag_scores(rows)
        if not scores or group not in (*ATTACKED, *REFUSED):
            continue
        was, now = (rate([score >= threshold for score in scores]) for threshold in (old, new))
        lines.append(
            f"{group:<12} {was.n:>6} rows: flagged {was.value:.3f} at {old:g}, {now.value:.3f} "
            f"[{now.low:.3f}, {now.high:.3f}] at {new:.6g}"
        )
    return lines


def with_threshold(text: str, policy: Policy, value: float, told: Sequence[str]) -> str:
    """The text of a policy's file with another threshold, and comments before it in place of an earlier calibration's.

    Raises ValueError where the threshold cannot be found as a line of its own.
    """
    import yaml

    from psa_fast.safety.policy import Policy

    kept = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(MARK))
    number = yaml.safe_dump(value).splitlines()[0]  # as YAML writes a float: 1e-07 would be a text
    new, found = _KEY.subn(f"unsafe_threshold: {number} ", kept)
    new = "".join(f"{line}\n" for line in told) + re.sub(r"(?m)^(unsafe_threshold: \S+) $", r"\1", new)
    wanted = policy.model_copy(update={"unsafe_threshold": value})
    if found != 1 or Policy.model_validate(yaml.safe_load(new)).hash != wanted.hash:
        raise ValueError("the policy's unsafe_threshold cannot be changed; write it on a line of its own, at the left")
    return new
