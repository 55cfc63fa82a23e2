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
from psa_fast.cli.sources import LONGEST, STAGE_DIRS, Plan, add_sources, find_data, named_stages, plan, spread
from psa_fast.compat.argparse import Subcommands
from psa_fast.evaluation.refusal import DEFAULT_LIST, LISTS, MODES, error_rates, get_list
from psa_fast.files import unwritable_text
from psa_fast.taxonomy import PSA

if TYPE_CHECKING:
    from typing import TextIO

    from rich.progress import TaskID

    from psa_fast.data.records import Record
    from psa_fast.evaluation.metrics import Estimate
    from psa_fast.evaluation.output import OutputFolder
    from psa_fast.evaluation.report import StageReport
    from psa_fast.evaluation.results import Result
    from psa_fast.safety import Guard
    from psa_fast.safety.policy import Policy


def register(subparsers: Subcommands) -> None:
    """Add the command `evaluate`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure safety, over-refusal and ability of the base and of each stage",
        description="Answer the records of a split with the base and with each add-on, guarded and unguarded, and "
        "write report.json, report.md, report.html and the answers (answers-STAGE.jsonl) to --out.",
    )
    add_sources(parser)
    parser.add_argument("--stage1", metavar="DIR", help="add-on folder, short for --stage stage1=DIR")
    parser.add_argument("--stage2", metavar="DIR", help="add-on folder, short for --stage stage2=DIR")
    parser.add_argument("--batch_size", type=int, default=128, metavar="N", help="requests at once (default: 128)")
    parser.add_argument("--limit", type=int, metavar="N", help="use N rows, spread evenly over the file")
    parser.add_argument("--refusal_list", choices=sorted(LISTS), default=DEFAULT_LIST, help=f"default: {DEFAULT_LIST}")
    parser.add_argument("--refusal_mode", choices=MODES, default="contains", help="default: contains")
    parser.add_argument(
        "--thresholds", action="store_true", help="put every threshold, what it misses and flags, into report.json"
    )
    parser.add_argument(
        "--intervene", type=int, metavar="N",
        help="also force each concept on N harmless requests and clear it in N risky ones (rows of their own)",
    )  # fmt: skip
    parser.add_argument(
        "--concepts_only", action="store_true", help="have the add-ons' concept heads read the records, and answer none"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.set_defaults(func=evaluate)


@dataclass(frozen=True)
class Answered:
    """What the stages gave, by stage: reports, how many answers the refusal list could not read, and the results."""

    reports: dict[str, StageReport]
    unread: dict[str, dict[str, int]]
    results: dict[str, list[Result]]


def evaluate(args: argparse.Namespace) -> int:
    """Run the evaluation, on all ranks of a launcher. Raises ValueError, with a sentence, for input that is no use."""
    return shared(lambda ranks: evaluate_on(args, ranks))


def asked(args: argparse.Namespace) -> Plan:
    """What the options ask for. Raises ValueError for options that cannot be used."""
    for name in ("batch_size", "max_new_tokens", "limit", "intervene"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; expected at least 1")
    named = [(name, folder) for name in STAGE_DIRS if (folder := getattr(args, name)) is not None]
    todo = plan(args.run, args.base, [*named, *named_stages(args.stage)])
    if args.concepts_only:
        _check_concepts_only(args, todo)
    if wrong := unwritable_text(_settings(args, todo)):
        raise ValueError(f"--{wrong}, which a report cannot hold; name it in UTF-8")
    return todo


def _check_concepts_only(args: argparse.Namespace, todo: Plan) -> None:
    """Raise ValueError where no head could be read, and for options of answers."""
    if not todo.addons:
        raise ValueError("--concepts_only needs an add-on: give --run, --stage1, --stage2 or --stage NAME=DIR")
    for name, default in (
        ("max_new_tokens", LONGEST),
        ("intervene", None),
        ("refusal_list", DEFAULT_LIST),
        ("refusal_mode", MODES[0]),
    ):
        if getattr(args, name) != default:
            raise ValueError(f"--{name} does nothing with --concepts_only, which answers nothing; leave it out")


def _settings(args: argparse.Namespace, todo: Plan) -> dict[str, Any]:
    """What was asked for: a second run with the same replaces the first one's report."""
    names = ("data", "split", "image_folder", "policy", "max_new_tokens", "limit", "refusal_list", "refusal_mode")
    settings = {name: getattr(args, name) for name in (*names, "seed")} | {"base": todo.base, "stages": todo.addons}
    # without an option a report is the same as one of a version that did not know it
    settings |= {name: True for name in ("thresholds", "concepts_only") if getattr(args, name)}
    return settings if args.intervene is None else settings | {"intervene": args.intervene}


def evaluate_on(args: argparse.Namespace, ranks: Ranks) -> int:
    """Run the evaluation on one of the ranks that share it. A collective; errors as `evaluate`."""
    from psa_fast.evaluation.output import OutputFolder
    from psa_fast.evaluation.report import data_provenance
    from psa_fast.evaluation.report_html import write_page
    from psa_fast.safety.policy import Policy
    from psa_fast.training.ranks import alike

    with alike():
        todo, policy = asked(args), Policy.load(args.policy)
        if args.intervene is not None:
            policy.require_taxonomy(PSA, "--intervene")
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
        _report(args, todo, policy, settings, data, answered)
        out.finish()
        written = [out.path / "report.md", out.path / "report.json"]
        if not args.concepts_only:  # the page is about answers
            written.append(write_page(out.path, image_folder).path)
        print(f"wrote {', '.join(map(str, written[:-1]))} and {written[-1]}")

    with ExitStack() as stack:
        records, data = ranks.from_first(prepare)
        answered = _run(args, todo, policy, records, image_folder, out, ranks)
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

    for folder in todo.addons.values():
        # a missing or unreadable file, or another base, is met now, not after the stages before
        checked_hash(folder, policy)
        check_base_folder(folder, read_config(folder), todo.base)
    everything = load_records(file, image_folder, taxonomy=policy.taxonomy)
    if unlabelled := require_labels(file, everything):
        print(
            f"{len(unlabelled)} of {len(everything)} rows have no label and are in no metric; "
            f"the first is {unlabelled[0].where}"
        )
    records = spread(everything, args.limit)
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
) -> Answered:
    """Answer the records stage by stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from psa_fast.evaluation.cards import shown_alone
    from psa_fast.evaluation.evaluate import batch_seconds, run_stage
    from psa_fast.evaluation.evaluate import unread as count_unread
    from psa_fast.evaluation.forced_concepts import measure_interventions
    from psa_fast.evaluation.sharding import share_of
    from psa_fast.safety.load import addon_hash, load_guard, load_plain

    reports: dict[str, StageReport] = {}
    unread: dict[str, dict[str, int]] = {}
    everything: dict[str, list[Result]] = {}
    columns = (TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    share = share_of(records, args.batch_size, ranks.rank, ranks.size)
    own = [records[place] for place in share]
    with Progress(*columns, disable=ranks.rank > 0) as progress:
        for stage in (*(() if args.concepts_only else ("base",)), *todo.addons):
            task = progress.add_task(stage, total=len(own))
            addon = todo.addons.get(stage)
            guard = load_plain(todo.base) if addon is None else load_guard(addon, todo.base, policy)
            times = [time.perf_counter()]  # of the start, and of the end of each batch of this rank
            kept = ranks.from_first(partial(_kept, out, stage, records))
            before = kept if ranks.rank == 0 else {}
            with out.answers(out.share(stage, ranks.rank), (result.to_json() for result in before.values())) as stream:

                def keep(
                    batch: list[Result], stream: TextIO = stream, task: TaskID = task, times: list[float] = times
                ) -> None:
                    times.append(time.perf_counter())
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
                    not args.concepts_only,
                )
            progress.update(task, completed=len(own))
            seconds = round(time.perf_counter() - times[0], 1)
            everyones = ranks.gathered(list(zip(share, answered, strict=True)))
            found = [result for _, result in sorted(everyones, key=itemgetter(0))]
            looks = shown_alone(everything["base"], found) if guard.has_head and not args.concepts_only else []
            complete = partial(_complete, out, stage, guard, records, found, image_folder, looks)
            results = ranks.from_first(complete)
            facts: dict[str, Any] = {
                "path": addon or todo.base,
                "sha256": None if addon is None else addon_hash(addon),
                "seconds": seconds,
                "batch_seconds": batch_seconds(times),
                "neutral_question": guard.neutral_question,
            }
            intervene = partial(measure_interventions, guard, records, image_folder, args.intervene)
            forced = ranks.from_first(partial(intervene, args.max_new_tokens, args.batch_size))
            reports[stage] = _stage_report(args, results, guard.has_head, facts, forced)
            everything[stage] = results
            unread[stage] = {name: count_unread(results, name == "guarded") for name in ("guarded", "unguarded")}
            del guard  # one model at a time: two copies of a large base do not fit
            gc.collect()
    return Answered(reports, unread, everything)


def _stage_report(
    args: argparse.Namespace,
    results: Sequence[Result],
    has_head: bool,
    facts: dict[str, Any],
    forced: dict[str, dict[str, Estimate]],
) -> StageReport:
    from psa_fast.evaluation.evaluate import compute_metrics, concept_metrics, per_source, per_type
    from psa_fast.evaluation.report import StageReport
    from psa_fast.evaluation.results import by_group

    sources, others = (per_source(results, has_head, args.seed, left_out) for left_out in (False, True))
    if args.concepts_only:
        return StageReport(concept_metrics(by_group(results), args.seed), {}, facts, sources, others)
    metrics = compute_metrics(results, has_head, args.seed)
    return StageReport(metrics, per_type(results), facts, sources, others, forced)


def _complete(
    out: OutputFolder,
    stage: str,
    guard: Guard,
    records: Sequence[Record],
    results: Sequence[Result],
    image_folder: Path,
    looks: Sequence[int],
) -> list[Result]:
    """Write a stage's answers, those at `looks` with where the pool looked; returns them."""
    from psa_fast.evaluation.evaluate import with_looks

    found = with_looks(guard, records, results, image_folder, looks)
    out.merge(stage, (result.to_json() for result in found))
    return found


def _kept(out: OutputFolder, stage: str, records: Sequence[Record]) -> dict[str, Result]:
    """The answers that the run had before it was cut short, by file and line; they are the first rank's from now on."""
    from psa_fast.evaluation.results import Result

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
    answered: Answered,
) -> None:
    from psa_fast.evaluation.metrics import BOOTSTRAP_SAMPLES
    from psa_fast.evaluation.paired import differences, threshold_curve
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
        "policy": {
            "path": args.policy or f"shipped ({DEFAULT_POLICY.name})",
            "sha256": policy.hash,
            "unsafe_threshold": policy.unsafe_threshold,
            "type_thresholds": policy.type_thresholds,
            "calibration": None if policy.calibration is None else policy.calibration.model_dump(),
            "memory": None if policy.memory is None else policy.memory.model_dump(),
        },
        "refusal": {
            "list": refusals.name,
            "mode": args.refusal_mode,
            "patterns": refusals.patterns,
            "refusals": list(refusals.refusals),
            "cautions": list(refusals.cautions),
            "on_labelled_answers": error_rates(refusals, args.refusal_mode),
            "unread": answered.unread,
        },
        "decoding": {
            "method": "greedy",
            "max_new_tokens": args.max_new_tokens,
            "batch_size": args.batch_size,
            "dtype": str(default_dtype()).removeprefix("torch."),
        },
        "bootstrap": {"samples": BOOTSTRAP_SAMPLES, "seed": args.seed, "interval": 0.95},
        **({} if policy.taxonomy == PSA else {"taxonomy": policy.taxonomy.to_json()}),
        **environment(),
    }
    curves = {stage: threshold_curve(results) for stage, results in answered.results.items()}
    between = {} if args.concepts_only else differences(answered.results)
    write_report(Path(args.out), answered.reports, provenance, between, curves if args.thresholds else None)
