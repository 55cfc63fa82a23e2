"""`psa-fast calibrate`: a policy whose threshold keeps a promise about harmless requests, for one add-on."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psa_fast.cli.sources import addons_of, file_sha256, find_data
from psa_fast.compat.argparse import Subcommands

if TYPE_CHECKING:
    from psa_fast.evaluation.held_out import Fit, HeldOut
    from psa_fast.safety.policy import Policy

TARGET = "over_refusal"
COMPARED = 64  # rows by which two heads are held to read the same
MARK = "# calibrated:"  # begins the comments that this command writes, and takes out again
# of the keys that it writes: the line, and the indented or blank ones below it
_BLOCKS = re.compile(r"^(?:calibration|type_thresholds)[ \t]*:[^\n]*\n?(?:[ \t]+[^\n]*(?:\n|\Z))*", re.MULTILINE)
_THRESHOLD = re.compile(r"^unsafe_threshold[ \t]*:[ \t]*[^\s#]+", re.MULTILINE)


def register(subparsers: Subcommands) -> None:
    """Add the command `calibrate`."""
    parser = subparsers.add_parser(
        "calibrate",
        help="fit a policy's temperatures and threshold to an add-on and held-out rows",
        description="Write a policy that flags at most a given share of harmless requests like those of the data, with "
        "a given confidence, and whose probabilities are calibrated. The rows must be held out: neither trained on nor "
        "reported on afterwards.",
    )
    addon = parser.add_mutually_exclusive_group(required=True)
    addon.add_argument(
        "--run",
        metavar="DIR",
        help="training output: its last stage is calibrated, and with it the other if its head reads the same",
    )
    addon.add_argument("--addon", metavar="DIR", help="add-on folder to be calibrated")
    parser.add_argument("--base", metavar="PATH", help="base VLM (default: the one the add-on's config names)")
    parser.add_argument("--data", required=True, metavar="PATH", help="folder with SPLIT.jsonl, or a JSONL file")
    parser.add_argument("--split", default="dev", help="SPLIT.jsonl of the data folder (default: dev)")
    parser.add_argument("--image_folder", metavar="DIR", help="where image paths start (default: the data folder)")
    parser.add_argument("--batch_size", type=int, default=64, metavar="N", help="requests at once (default: 64)")
    parser.add_argument(
        "--target", required=True, metavar=f"{TARGET}=SHARE", help="of harmless requests that may be flagged"
    )
    parser.add_argument("--per", choices=["type"], help="a threshold for each risk type, each with a part of the share")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="that it is kept (default: 0.95)")
    parser.add_argument("--policy", metavar="FILE", help="policy YAML to start from (default: the shipped one)")
    parser.add_argument("--out", required=True, metavar="FILE", help="policy file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.set_defaults(func=calibrate)


def calibrate(args: argparse.Namespace) -> int:
    """Fit the policy and write it. Raises ValueError, with a sentence, for what cannot be promised."""
    from psa_fast.evaluation.held_out import fit, reads_alike
    from psa_fast.files import write_text
    from psa_fast.safety.load import checked_hash
    from psa_fast.safety.policy import DEFAULT_POLICY, Policy

    target = _share(args.target)
    if not 0.5 <= args.confidence < 1.0:
        raise ValueError(f"--confidence is {args.confidence:g}; expected at least 0.5 and less than 1")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}; expected at least 1")
    given = Policy.load(args.policy)
    if given.memory is not None:
        raise ValueError(
            "the policy has a memory, which flags more than a threshold promises; calibrate one without it"
        )
    policy = given.model_copy(update={"calibration": None, "type_thresholds": None})
    text = Path(args.policy or DEFAULT_POLICY).read_text(encoding="utf-8-sig")
    if Path(args.out).exists() and not args.overwrite:
        raise ValueError(f"--out {args.out} is there already; name another, or give --overwrite")
    with_values(text, policy, [])  # a file that cannot be changed is met before a model is loaded
    *others, addon = map(Path, [args.addon] if args.run is None else addons_of(args.run).values())
    file, image_folder = find_data(args.data, args.split, args.image_folder)
    addon_sha256 = checked_hash(addon, policy)

    rows = _read(args, addon, file, image_folder, policy)
    same = [
        other
        for other in others
        if reads_alike(rows[:COMPARED], _read(args, other, file, image_folder, policy, COMPARED))
    ]
    try:
        found = fit(rows, policy, target, args.confidence, args.per == "type")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    hashes = [addon_sha256, *(checked_hash(one) for one in same)]
    new = _calibrated(policy, found, target, args.confidence, file_sha256(file), hashes)
    told = _told(new, found, file, [addon, *same])
    write_text(args.out, with_values(text, new, told))
    print(*told, *_trade(rows, policy, new), sep="\n")
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


def _read(
    args: argparse.Namespace, addon: Path, file: Path, image_folder: Path, policy: Policy, most: int | None = None
) -> list[HeldOut]:
    """Have the concept head read the labelled rows, the first `most` of them, without answering."""
    from psa_fast.data.records import load_records
    from psa_fast.evaluation.check import check_prompts, require_labels
    from psa_fast.evaluation.evaluate import pictures_of
    from psa_fast.evaluation.held_out import HeldOut
    from psa_fast.safety.guard import Request
    from psa_fast.safety.load import base_of, load_guard, load_prompter

    base = base_of(addon) if args.base is None else args.base
    records = load_records(file, image_folder, taxonomy=policy.taxonomy)
    unlabelled = require_labels(file, records)
    if unlabelled and most is None:
        first = unlabelled[0].where
        print(f"{len(unlabelled)} of {len(records)} rows have no label and are left out; the first is {first}")
    records = [record for record in records if record.group][:most]
    check_prompts(file, records, load_prompter(base, addon), 1)
    guard = load_guard(addon, base, policy)
    rows = []
    for start in range(0, len(records), args.batch_size):
        batch = records[start : start + args.batch_size]
        requests = [Request(record.turns[:-1], pictures_of(record, image_folder)) for record in batch]
        readings = guard.readings(requests, len(requests))
        rows += [HeldOut.of(record, found, policy) for record, found in zip(batch, readings, strict=True)]
    return rows


def _calibrated(
    policy: Policy, found: Fit, target: float, confidence: float, data_sha256: str, addons_sha256: Sequence[str]
) -> Policy:
    from psa_fast.evaluation.held_out import ALL_TYPES
    from psa_fast.safety.policy import Calibration

    kind, level = found.temperatures
    values: dict[str, Any] = {
        "calibration": Calibration(
            type_temperature=kind,
            level_temperature=level,
            over_refusal=target,
            confidence=confidence,
            rows=found.rows,
            data_sha256=data_sha256,
            addon_sha256=addons_sha256[0],
            same_head_sha256=list(addons_sha256[1:]),
        )
    }
    if ALL_TYPES in found.thresholds:
        values["unsafe_threshold"] = found.thresholds[ALL_TYPES].value
    else:
        # a type that is switched off flags nothing, whatever its threshold
        given = {name: threshold.value for name, threshold in found.thresholds.items()}
        values["type_thresholds"] = {name: given.get(name, policy.unsafe_threshold) for name in policy.taxonomy.risks}
    return policy.model_copy(update=values)


def _told(new: Policy, found: Fit, file: Path, addons: Sequence[Path]) -> list[str]:
    """What was fitted, as comments of the file."""
    assert new.calibration is not None
    today = datetime.now(timezone.utc).date().isoformat()
    which = ", ".join(repr(str(addon)) for addon in addons)
    lines = [f"{MARK} {today}, {new.calibration.promise}", f"{MARK} data {str(file)!r}, add-on {which}"]
    for head, one in found.heads.items():
        lines.append(
            f"{MARK} {head} head: temperature {one.temperature:.4g}; calibration error on {one.n} other rows "
            f"{one.before:.4f}, now {one.after:.4f}"
        )
    for name, threshold in found.thresholds.items():
        lines.append(
            f"{MARK} {name}: from {threshold.value:.6g} on, {threshold.flagged} of {threshold.n} harmless rows are "
            f"flagged; upper bound {threshold.bound:.6g}"
        )
    return lines


def _trade(rows: Sequence[HeldOut], old: Policy, new: Policy) -> list[str]:
    """Shares of the rows of each group that the policy flagged, and that the new one flags."""
    from psa_fast.evaluation.held_out import flagged
    from psa_fast.evaluation.metrics import rate

    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        chosen = [row for row in rows if row.group == group]
        was, now = (rate([flagged(row, policy) for row in chosen]) for policy in (old, new))
        lines.append(
            f"{group:<12} {now.n:>6} rows: flagged {was.value:.3f} before, {now.value:.3f} "
            f"[{now.low:.3f}, {now.high:.3f}] now"
        )
    return lines


def with_values(text: str, new: Policy, told: Sequence[str]) -> str:
    """The text of a policy's file with the thresholds and the calibration of `new`, `told` as comments.

    What an earlier calibration left goes. Raises ValueError where the keys are not at the left of lines of their own.
    """
    import yaml

    from psa_fast.safety.policy import Policy

    kept = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(MARK))
    kept = _BLOCKS.sub("", kept).rstrip("\n") + "\n"
    number = yaml.safe_dump(new.unsafe_threshold).splitlines()[0]  # as YAML writes a float: 1e-07 would be a text
    kept, found = _THRESHOLD.subn(f"unsafe_threshold: {number}", kept)
    values = new.model_dump()
    added = {name: values[name] for name in ("type_thresholds", "calibration") if values[name] is not None}
    block = yaml.safe_dump(added, sort_keys=False) if added else ""
    comments = "".join(f"{line}\n" for line in told)
    written = f"{kept}\n{comments}{block}" if comments or block else kept
    try:
        same = found == 1 and Policy.model_validate(yaml.safe_load(written)).hash == new.hash
    except (ValueError, yaml.YAMLError):
        same = False
    if not same:
        raise ValueError(
            "the policy's file cannot be changed; write unsafe_threshold, type_thresholds and calibration each at the "
            "left of a line"
        )
    return written
