"""`psa-fast evaluate`: base and add-ons on the same records, side by side in report.json and report.md."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psa_fast.cli.launch import Ranks, shared
from psa_fast.compat.argparse import Subcommands
from psa_fast.data.rows import folder_hint
from psa_fast.evaluation.refusal import DEFAULT_LIST, LISTS, MODES, error_rates, get_list
from psa_fast.files import unwritable_text

if TYPE_CHECKING:
    from typing import TextIO

    from rich.progress import TaskID

    from psa_fast.data.records import Record
    from psa_fast.evaluation.evaluate import Result
    from psa_fast.evaluation.output import OutputFolder
    from psa_fast.evaluation.report import StageReport
    from psa_fast.safety.policy import Policy

STAGE_DIRS = ("stage1", "stage2")


def register(subparsers: Subcommands) -> None:
    """Add the command `evaluate`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure safety, over-refusal and ability of the base and of each stage",
        description="Answer the records of a split with the base and with each add-on, guarded and unguarded, and "
        "write report.json, report.md and the answers (answers-STAGE.jsonl) to --out.",
    )
    add_sources(parser)
    parser.add_argument("--stage1", metavar="DIR", help="add-on folder, short for --stage stage1=DIR")
    parser.add_argument("--stage2", metavar="DIR", help="add-on folder, short for --stage stage2=DIR")
    parser.add_argument("--batch_size", type=int, default=128, metavar="N", help="requests at once (default: 128)")
    parser.add_argument("--limit", type=int, metavar="N", help="use N rows, spread evenly over the file")
    parser.add_argument("--refusal_list", choices=sorted(LISTS), default=DEFAULT_LIST, help=f"default: {DEFAULT_LIST}")
    parser.add_argument("--refusal_mode", choices=MODES, default="contains", help="default: contains")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.set_defaults(func=evaluate)


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add what every measurement is given: records, base and add-ons, the guard's policy, and where the report goes."""
    parser.add_argument("--data", required=True, metavar="PATH", help="folder with SPLIT.jsonl, or a JSONL file")
    parser.add_argument("--split", default="test", help="SPLIT.jsonl of the data folder (default: test)")
    parser.add_argument("--image_folder", metavar="DIR", help="where image paths start (default: the data folder)")
    parser.add_argument("--run", metavar="DIR", help="training output: its stage1 and stage2 folders are measured")
    parser.add_argument("--base", metavar="PATH", help="base VLM (default: the one the add-ons' configs name)")
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME=DIR", help="a further add-on; may be given several times"
    )
    parser.add_argument("--policy", metavar="FILE", help="policy YAML of the guarded runs (default: the shipped one)")
    parser.add_argument("--max_new_tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder the report is written to")
    parser.add_argument("--overwrite", action="store_true", help="replace what other data or settings gave in --out")


@dataclass(frozen=True)
class Plan:
    """What to evaluate: the base and the add-ons by stage name, in the report's order."""

    base: str
    addons: dict[str, str]


def plan(run: str | None, base: str | None, stages: Sequence[tuple[str, str]]) -> Plan:
    """Find the add-ons and their base. Raises ValueError if there is nothing to evaluate or the bases differ."""
    from psa_fast.safety.load import CONFIG, base_of

    addons: dict[str, str] = {}
    if run is not None:
        addons = {name: str(Path(run) / name) for name in STAGE_DIRS if (Path(run) / name / CONFIG).is_file()}
        if not addons:
            raise ValueError(f"--run {run} holds no add-on: neither {' nor '.join(STAGE_DIRS)} has a {CONFIG}")
    for name, folder in stages:
        if not name.replace("_", "").replace("-", "").isalnum() or name == "base":
            raise ValueError(f"{name!r} cannot name a stage: use letters, digits, - and _, and not 'base'")
        if name in addons:
            raise ValueError(f"stage {name} was given twice: {addons[name]} and {folder}")
        addons[name] = folder
    bases = {name: base_of(folder) for name, folder in addons.items()} if base is None else {"": base}
    if not bases:
        raise ValueError("nothing to evaluate: give --run, --base, --stage1, --stage2 or --stage NAME=DIR")
    if len(set(bases.values())) > 1:
        named = ", ".join(f"{name}: {path}" for name, path in bases.items())
        raise ValueError(f"the add-ons name different bases ({named}); give one with --base")
    return Plan(next(iter(bases.values())), addons)


def find_data(data: str, split: str, image_folder: str | None) -> tuple[Path, Path]:
    """The JSONL file and the image folder of --data. Raises ValueError if they do not exist."""
    path = Path(data)
    file = path / f"{split}.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"--data {data}: there is no file {file}{folder_hint(path)}")
    return file, Path(image_folder) if image_folder is not None else file.parent


def spread(records: Sequence[Record], limit: int | None) -> list[Record]:
    """`limit` records at even distances, so that a file sorted by group keeps all of its groups."""
    if limit is None or limit >= len(records):
        return list(records)
    return [records[i * len(records) // limit] for i in range(limit)]


def evaluate(args: argparse.Namespace) -> int:
    """Run the evaluation, on all ranks of a launcher. Raises ValueError, with a sentence, for input that is no use."""
    return shared(lambda ranks: evaluate_on(args, ranks))


def asked(args: argparse.Namespace) -> Plan:
    """What the options ask for. Raises ValueError for options that cannot be used."""
    for name in ("batch_size", "max_new_tokens", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; expected at least 1")
    named = [(name, folder) for name in STAGE_DIRS if (folder := getattr(args, name)) is not None]
    for item in args.stage:
        name, equals, folder = item.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--stage {item}: expected NAME=DIR")
        named.append((name, folder))
    todo = plan(args.run, args.base, named)
    if wrong := unwritable_text(_settings(args, todo)):
        raise ValueError(f"--{wrong}, which a report cannot hold; name it in UTF-8")
    return todo


def _settings(args: argparse.Namespace, todo: Plan) -> dict[str, Any]:
    """What was asked for: a second run with the same replaces the first one's report."""
    names = ("data", "split", "image_folder", "policy", "max_new_tokens", "limit", "refusal_list", "refusal_mode")
    return {name: getattr(args, name) for name in (*names, "seed")} | {"base": todo.base, "stages": todo.addons}


def evaluate_on(args: argparse.Namespace, ranks: Ranks) -> int:
    """Run the evaluation on one of the ranks that share it. A collective; errors as `evaluate`."""
    from psa_fast.evaluation.output import OutputFolder
    from psa_fast.evaluation.report import data_provenance
    from psa_fast.safety.policy import Policy
    from psa_fast.training.ranks import alike

    with alike():
        todo, policy = asked(args), Policy.load(args.policy)
        file, image_folder = find_data(args.data, args.split, args.image_folder)
    out, settings = OutputFolder(Path(args.out)), _settings(args, todo)

    def prepare() -> tuple[list[Record], dict[str, Any]]:
        stack.enter_context(out.claim())
        out.check_older_report(settings, args.overwrite)
        everything, records = _read(args, todo, policy, file, image_folder)
        data = data_provenance(file, image_folder, records, len(everything))
        if out.begin(_identity(args, todo, policy, settings, data), args.overwrite):
            print(f"going on with the run that began in {out.path}")
        return records, data

    def report() -> None:
        _report(args, todo, policy, settings, data, reports, unread)
        out.finish()
        print(f"wrote {out.path / 'report.md'} and {out.path / 'report.json'}")

    with ExitStack() as stack:
        records, data = ranks.from_first(prepare)
        reports, unread = _run(args, todo, policy, records, image_folder, out, ranks)
        ranks.from_first(report)
    return 0


def _identity(
    args: argparse.Namespace, todo: Plan, policy: Policy, settings: dict[str, Any], data: dict[str, Any]
) -> dict[str, Any]:
    """All that an answer depends on: a run that was cut short is gone on with by one of the same identity only."""
    from psa_fast.evaluation.report import environment
    from psa_fast.safety.load import addon_hash, default_dtype

    return {
        "settings": settings,
        "batch_size": args.batch_size,
        "data": data,
        "policy": policy.hash,
        "addons": {name: addon_hash(folder) for name, folder in todo.addons.items()},
        "base": _folder_state(todo.base),
        "dtype": str(default_dtype()),
        **environment(),
    }


def _folder_state(folder: str) -> dict[str, list[int]]:
    """Size and time of change of the files in a folder: they tell that a base is another one, unread."""
    files = sorted(path for path in Path(folder).glob("*") if path.is_file())
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _read(
    args: argparse.Namespace, todo: Plan, policy: Policy, file: Path, image_folder: Path
) -> tuple[list[Record], list[Record]]:
    """All records and those to be evaluated, with every image decoded and every prompt made."""
    from psa_fast.data.records import load_records
    from psa_fast.evaluation.check import check_prompts, longest_hint, require_labels
    from psa_fast.models import PsaConfig
    from psa_fast.models.addon import check_base_folder, read_config
    from psa_fast.safety.load import CONFIG, checked_hash, load_prompter

    everything = load_records(file, image_folder)
    if unlabelled := require_labels(file, everything):
        print(
            f"{len(unlabelled)} of {len(everything)} rows have no label and are in no metric; "
            f"the first is {unlabelled[0].where}"
        )
    records = spread(everything, args.limit)
    for folder in todo.addons.values():
        # a missing or unreadable file, or another base, is met now, not after the stages before
        checked_hash(folder)
        check_base_folder(folder, read_config(folder), todo.base)
    # the add-on with the longest images; prompts that it can take, the others can
    tokens = {f: PsaConfig.from_json_file(Path(f) / CONFIG).num_safety_tokens for f in todo.addons.values()}
    longest = max(tokens, key=lambda folder: tokens[folder], default=None)
    prompter = load_prompter(todo.base, longest)
    check_prompts(file, records, prompter, args.max_new_tokens, longest_hint(policy) if todo.addons else None)
    return everything, records


def _run(
    args: argparse.Namespace,
    todo: Plan,
    policy: Policy,
    records: list[Record],
    image_folder: Path,
    out: OutputFolder,
    ranks: Ranks,
) -> tuple[dict[str, StageReport], dict[str, dict[str, int]]]:
    """Answer the records stage by stage: the stages' reports, and how many answers the refusal list could not read."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from psa_fast.evaluation.evaluate import compute_metrics, per_type, run_stage
    from psa_fast.evaluation.evaluate import unread as count_unread
    from psa_fast.evaluation.report import StageReport
    from psa_fast.evaluation.sharding import share_of
    from psa_fast.safety.load import addon_hash, load_guard, load_plain

    reports: dict[str, StageReport] = {}
    unread: dict[str, dict[str, int]] = {}
    columns = (TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    share = share_of(records, args.batch_size, ranks.rank, ranks.size)
    own = [records[place] for place in share]
    with Progress(*columns, disable=ranks.rank > 0) as progress:
        for stage in ("base", *todo.addons):
            task = progress.add_task(stage, total=len(own))
            addon = todo.addons.get(stage)
            guard = load_plain(todo.base) if addon is None else load_guard(addon, todo.base, policy)
            start = time.perf_counter()
            kept = ranks.from_first(partial(_kept, out, stage, records))
            before = kept if ranks.rank == 0 else {}
            with out.answers(out.share(stage, ranks.rank), (result.to_json() for result in before.values())) as stream:

                def keep(batch: list[Result], stream: TextIO = stream, task: TaskID = task) -> None:
                    out.append(stream, [result.to_json() for result in batch])
                    progress.advance(task, len(batch))

                answered = run_stage(
                    guard,
                    own,
                    image_folder,
                    get_list(args.refusal_list),
                    args.refusal_mode,
                    args.max_new_tokens,
                    args.batch_size,
                    keep,
                    kept,
                )
            progress.update(task, completed=len(own))
            everyones = ranks.gathered(list(zip(share, answered, strict=True)))
            results = [result for _, result in sorted(everyones, key=itemgetter(0))]
            ranks.from_first(lambda: out.merge(stage, (result.to_json() for result in results)))  # noqa: B023
            facts: dict[str, Any] = {
                "path": addon or todo.base,
                "sha256": None if addon is None else addon_hash(addon),
                "seconds": round(time.perf_counter() - start, 1),
                "neutral_question": guard.neutral_question,
            }
            reports[stage] = StageReport(compute_metrics(results, guard.has_head, args.seed), per_type(results), facts)
            unread[stage] = {
                "guarded": count_unread(results),
                "unguarded": count_unread(results, guarded=False),
            }
            del guard  # one model at a time: two copies of a large base do not fit
            gc.collect()
    return reports, unread


def _kept(out: OutputFolder, stage: str, records: Sequence[Record]) -> dict[str, Result]:
    """The answers that the run had before it was cut short, by file and line; they are the first rank's from now on."""
    from psa_fast.evaluation.evaluate import Result

    shares = out.shares(stage)
    rows = [row for name in (stage, *shares) for row in out.kept(name)]
    if rows and len({record.where for record in records}) < len(records):
        print(f"{stage}: several records stand on one line of the file, so all are answered anew")
        return {}
    try:
        kept = {row["where"]: Result.from_json(row) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the answers kept in {out.path} for {stage} cannot be read ({error}); remove them") from None
    if shares:
        out.merge(stage, (result.to_json() for result in kept.values()))
    return kept


def _report(
    args: argparse.Namespace,
    todo: Plan,
    policy: Policy,
    settings: dict[str, Any],
    data: dict[str, Any],
    reports: dict[str, StageReport],
    unread: dict[str, dict[str, int]],
) -> None:
    from psa_fast.evaluation.metrics import BOOTSTRAP_SAMPLES
    from psa_fast.evaluation.report import environment, write_report
    from psa_fast.safety.load import default_dtype
    from psa_fast.safety.policy import DEFAULT_POLICY

    refusals = get_list(args.refusal_list)
    provenance = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
        "base": todo.base,
        "split": args.split if Path(args.data).is_dir() else None,
        "data": data,
        "policy": {"path": args.policy or f"shipped ({DEFAULT_POLICY.name})", "sha256": policy.hash},
        "refusal": {
            "list": refusals.name,
            "mode": args.refusal_mode,
            "patterns": refusals.patterns,
            "refusals": list(refusals.refusals),
            "cautions": list(refusals.cautions),
            "on_labelled_answers": error_rates(refusals, args.refusal_mode),
            "unread": unread,
        },
        "decoding": {
            "method": "greedy",
            "max_new_tokens": args.max_new_tokens,
            "batch_size": args.batch_size,
            "dtype": str(default_dtype()).removeprefix("torch."),
        },
        "bootstrap": {"samples": BOOTSTRAP_SAMPLES, "seed": args.seed, "interval": 0.95},
        **environment(),
    }
    write_report(Path(args.out), reports, provenance)
