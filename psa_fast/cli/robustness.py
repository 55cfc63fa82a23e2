"""`psa-fast robustness`: a run's guards under natural changes, words around the question and further pictures."""

from __future__ import annotations

import argparse
import gc
import json
from collections import Counter
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psa_fast.cli.sources import LONGEST, add_sources, file_sha256, find_data, named_stages, plan
from psa_fast.compat.argparse import Subcommands
from psa_fast.files import shorten
from psa_fast.taxonomy import PSA

if TYPE_CHECKING:
    from psa_fast.attacks.conditions import Case, Condition, Others
    from psa_fast.data.records import Record

PART = "robustness.jsonl.part"
CLOAK = "cloak"
FIT_RECORDS = 100  # of each group, of which a cloak is fitted on the first risks that are flagged


def register(subparsers: Subcommands) -> None:
    """Add the command `robustness`."""
    parser = subparsers.add_parser(
        "robustness",
        help="measure what changed pictures, words and further pictures do to the guard",
        description="Put the records of a split to base and add-ons under each condition of a suite, and write "
        "robustness.json and robustness.md to --out. An interrupted run goes on where it was.",
    )
    add_sources(parser)
    parser.add_argument(
        "--suite",
        default="all",
        help="natural, text, pictures, cloak, pixels, joint, controls, several by commas, or all (default: all; cloak "
        "among them only with --fit_data)",
    )
    parser.add_argument(
        "--fit_data", metavar="PATH",
        help="of another world than --data: a folder with SPLIT.jsonl, or a JSONL file, whose risks the suite cloak "
        "fits a picture on",
    )  # fmt: skip
    parser.add_argument(
        "--budget", choices=("quick", "standard"),
        help="of attacks on pixels: 60 records, 40 steps, 1 start; or 200, 40, 3 (default: quick)",
    )  # fmt: skip
    parser.add_argument(
        "--surrogate", action="append", default=[], metavar="NAME=DIR",
        help="an add-on that pictures are made for, to be tried on the others; suites pixels and controls",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, metavar="N",
        help="records of each group (default: 100; as many as the budget, where all suites are attacks on pixels)",
    )  # fmt: skip
    parser.add_argument(
        "--concepts_only", action="store_true",
        help="have the add-ons' concept heads read and answer nothing: flags alone, which cost little",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: 0)")
    parser.set_defaults(func=robustness)


def robustness(args: argparse.Namespace) -> int:
    """Run the suites. Raises ValueError, with a sentence, for input that cannot be used."""
    from psa_fast.attacks import conditions as plain
    from psa_fast.attacks import white_box
    from psa_fast.attacks.cloak import FITTED, conditions
    from psa_fast.attacks.pixels import BUDGETS
    from psa_fast.attacks.target import require_one_threshold
    from psa_fast.evaluation.output import OutputFolder
    from psa_fast.safety.load import addon_hash
    from psa_fast.safety.policy import Policy

    for name in ("limit", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} is {value}; expected at least 1")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed is {shorten(args.seed)}; expected a whole number of at least 0")
    suites = (*plain.SUITES, *((CLOAK,) if args.fit_data or args.suite != "all" else ()), *white_box.SUITES)
    chosen = list(suites) if args.suite == "all" else args.suite.split(",")
    if (CLOAK in chosen) != (args.fit_data is not None):
        raise ValueError("the suite cloak and --fit_data need one another, and only one of them is given")
    if unknown := [name for name in chosen if name not in suites]:
        raise ValueError(f"--suite {shorten(unknown[0])}: expected all, or some of {', '.join(suites)}")
    if args.concepts_only and (wrong := sorted(set(chosen) & set(white_box.SUITES))):
        raise ValueError(
            f"--concepts_only does nothing for the suite {wrong[0]}, whose attacks are judged by answers too"
        )
    if args.concepts_only and args.max_new_tokens != LONGEST:
        raise ValueError("--max_new_tokens does nothing with --concepts_only, which answers nothing; leave it out")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"--suite {shorten(args.suite)}: a suite is named twice")
    if args.budget is not None and not set(chosen) & set(white_box.SUITES):
        raise ValueError(f"--budget is of attacks on pixels, and none of {', '.join(white_box.SUITES)} is chosen")
    args.budget = args.budget or "quick"
    stages = named_stages(args.stage)
    surrogates = _surrogates(args.surrogate, chosen)
    todo = plan(args.run, args.base, stages)
    policy = Policy.load(args.policy)
    policy.require_taxonomy(PSA, "what this command counts")
    if set(chosen) & set(white_box.SUITES):
        require_one_threshold(policy)
    hashes = {name: addon_hash(path) for name, path in todo.addons.items()}
    for found in hashes.values():
        policy.require_model(found)
    file, image_folder = find_data(args.data, args.split, args.image_folder)
    fit_file, fit_folder = (
        (None, None) if args.fit_data is None else find_data(args.fit_data, args.split, None, "--fit_data")
    )
    if fit_file is not None and file_sha256(fit_file) == file_sha256(file):
        raise ValueError(f"--fit_data {fit_file} holds the records of --data; a cloak is fitted on others")
    limit = args.limit
    if limit is None:
        limit = BUDGETS[args.budget].n if set(chosen) <= set(white_box.SUITES) else 100
    settings = {
        "data": str(file), "data_sha256": file_sha256(file), "image_folder": str(image_folder),
        "addons_sha256": hashes,
        "base": todo.base, "stages": todo.addons, "limit": limit, "seed": args.seed,
        "policy": policy.hash, "max_new_tokens": args.max_new_tokens, "suites": chosen,
        "budget": args.budget if set(chosen) & set(white_box.SUITES) else None, "surrogates": surrogates,
    }  # fmt: skip
    if args.concepts_only:
        settings["concepts_only"] = True
    if fit_file is not None:
        settings["fit_data_sha256"] = file_sha256(fit_file)
    with OutputFolder(Path(args.out)).claim() as out:
        done = _done(out.path, settings, args.overwrite)
        cases, others = _cases(file, image_folder, limit)
        fit_on = None if fit_file is None or fit_folder is None else _cases(fit_file, fit_folder, FIT_RECORDS)[0]
        for stage in (*(() if args.concepts_only else ("base",)), *todo.addons):
            attacks = white_box.conditions(BUDGETS[args.budget], chosen, list(surrogates)) if stage != "base" else []
            cloaked: list[Condition | str] = (
                [FITTED, *conditions(None)] if fit_on is not None and stage != "base" else []
            )
            wanted: list[Condition | str | None] = [None, *plain.conditions(chosen), *cloaked, *attacks]
            _stage(stage, todo, policy, wanted, cases, others, fit_on, args, out.path, done)
        _write(out.path, settings, file, done, todo)
    return 0


def _surrogates(given: list[str], chosen: list[str]) -> dict[str, str]:
    """The folders of --surrogate by their names."""
    from psa_fast.safety.load import CONFIG

    found: dict[str, str] = {}
    for item in given:
        name, mark, folder = item.partition("=")
        if not mark or not name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"--surrogate {shorten(item)}: expected NAME=DIR, the name of letters, digits, - and _")
        if name in found:
            raise ValueError(f"--surrogate {name} was given twice: {found[name]} and {folder}")
        if not (Path(folder) / CONFIG).is_file():
            raise ValueError(f"--surrogate {name}: {folder} holds no {CONFIG}")
        found[name] = folder
    if found and not {"pixels", "controls"} & set(chosen):
        raise ValueError("--surrogate is for the suites pixels and controls, and neither is chosen")
    return found


def _done(folder: Path, settings: dict[str, Any], overwrite: bool) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The rows that an interrupted run of the same settings has left, by stage and condition."""
    from psa_fast.attacks.robustness_report import JSON
    from psa_fast.files import named, read_json

    kept = json.loads(json.dumps(settings))
    part = folder / PART
    older = read_json(folder / JSON, "report") if (folder / JSON).exists() and not overwrite else None
    if older is not None and older.get("provenance", {}).get("settings") != kept:
        raise ValueError(f"{folder / JSON} is of other data or settings; name another --out, or give --overwrite")
    done: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with named(part):
        lines = part.read_text(encoding="utf-8").splitlines() if part.exists() else []
        if lines and (overwrite or json.loads(lines[0]) != kept):
            if not overwrite:
                raise ValueError(f"{part} is of other data or settings; name another --out, or give --overwrite")
            lines = []
        if not lines:
            part.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    for line in lines[1:]:
        try:
            row = json.loads(line)
        except ValueError:  # the line that was being written when the run ended
            continue
        done[row["stage"], row["condition"]] = row["rows"]
    return done


def _cases(file: Path, image_folder: Path, limit: int) -> tuple[list[Case], Others]:
    """At most `limit` records of each group with their pictures, and what conditions may add to them."""
    from psa_fast.attacks.conditions import Case, Others, harmless_words
    from psa_fast.attacks.measure import HARMLESS, RISKS
    from psa_fast.data.images import load_image, resolve
    from psa_fast.data.records import load_records

    records = [record for record in load_records(file, image_folder) if record.group in (*RISKS, *HARMLESS)]
    if not records:
        raise ValueError(f"{file}: no record has a group that the suites know")
    counts: Counter[str] = Counter()

    def case(record: Record) -> Case:
        return Case(record, tuple(load_image(resolve(image_folder, name)) for name in record.images))

    cases: list[Case] = []
    added: list[Case] = []
    for record in records:
        counts[record.group] += 1
        if counts[record.group] <= limit:
            cases.append(case(record))
        elif record.group == "clean" and len(record.images) == 1 and len(added) < 100:
            added.append(case(record))
    clean = added or [one for one in cases if one.record.group == "clean" and len(one.pictures) == 1]
    pictures = tuple(one.pictures[0] for one in clean)
    if not pictures:
        raise ValueError(f"{file}: there is no clean record with one picture, which conditions add to others")
    asked = [one for one in cases if one.record.group in ("clean", "benign_twin")]
    return cases, Others(pictures, harmless_words(asked))


def _stage(
    stage: str,
    todo: Any,
    policy: Any,
    wanted: list[Condition | str | None],
    cases: list[Case],
    others: Others,
    fit_on: list[Case] | None,
    args: argparse.Namespace,
    folder: Path,
    done: dict[tuple[str, str], list[dict[str, Any]]],
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from psa_fast.attacks import white_box
    from psa_fast.attacks.cloak import FITTED, conditions, fit
    from psa_fast.attacks.cloak import NAMES as CLOAKED
    from psa_fast.attacks.measure import measure
    from psa_fast.attacks.pixels import BUDGETS
    from psa_fast.evaluation.refusal import DEFAULT_LIST, get_list
    from psa_fast.files import named, write_with
    from psa_fast.safety.load import load_guard, load_plain

    addon = todo.addons.get(stage)
    names = ["none" if one is None else one if isinstance(one, str) else one.name for one in wanted]
    if all((stage, name) in done for name in names):
        return
    known = white_box.Known()
    if addon is not None:
        pending = [name for name in names if (stage, name) not in done]
        known = _known(todo.base, args, pending, cases)
    guard = load_plain(todo.base) if addon is None else load_guard(addon, todo.base, policy)
    cloak = None
    if fit_on is not None and any((stage, name) not in done for name in (FITTED, *CLOAKED) if name in names):
        cloak = fit(guard, [one for one in fit_on if one.record.group == "risk"], seed=args.seed)
        write_with(folder / white_box.PICTURES / f"{stage}-cloak.png", partial(cloak.picture.save, format="PNG"))
        fitted = {one.name: one for one in conditions(cloak.picture)}
        wanted = [fitted.get(name, condition) for name, condition in zip(names, wanted, strict=True)]
    # of the base only what it can answer is of interest
    mine = [case for case in cases if case.record.group == "clean"] if addon is None else cases
    plain: dict[str, Any] = {}
    words = get_list(DEFAULT_LIST)
    columns = (TextColumn("{task.description:>34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(stage, total=len(names))
        for name, condition in zip(names, wanted, strict=True):
            progress.update(task, description=f"{stage}, {name}")
            if (stage, name) not in done or condition is None:  # the plain results are compared with
                if name == FITTED and cloak is not None:
                    rows = cloak.rows(stage, args.seed)
                elif isinstance(condition, str):
                    budget, longest = BUDGETS[args.budget], args.max_new_tokens
                    rows = white_box.measure(
                        guard, stage, name, mine, words, budget, args.seed, known, longest, folder / white_box.PICTURES
                    )
                else:
                    put = [case for case in mine if condition is None or condition.applies(case)]
                    rows, results = measure(
                        guard, stage, condition, put, others, plain, words, args.seed, args.max_new_tokens,
                        concepts_only=args.concepts_only,
                    )  # fmt: skip
                    plain = plain or results
                done[stage, name] = [row.to_json() for row in rows]
                with named(folder / PART), (folder / PART).open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"stage": stage, "condition": name, "rows": done[stage, name]}) + "\n")
            progress.advance(task)
    del guard  # one model at a time
    gc.collect()


def _known(base: str, args: argparse.Namespace, pending: list[str], cases: list[Case]) -> Any:
    """What the pending attacks need beside the guard: the base's own answers, and other guards when they are used."""
    import functools

    from psa_fast.attacks import pixels, white_box
    from psa_fast.attacks.joint import own_answers
    from psa_fast.attacks.pixels import BUDGETS
    from psa_fast.attacks.target import Target
    from psa_fast.safety.load import load_guard, load_plain

    answers = {}
    if any(name in pending for name in white_box.conditions(BUDGETS[args.budget], ("pixels", "joint"))):
        risky = [case for case in cases if case.record.group == "risk" and len(case.pictures) == 1]
        undefended = Target(load_plain(base))
        asked = [pixels.Case(white_box.request_of(case), case.record.where) for case in risky]
        answers = {one.where: one.wanted or "" for one in own_answers(undefended, asked, args.max_new_tokens)}
        del undefended  # one model at a time
        gc.collect()
    folders = _surrogates(args.surrogate, ["pixels"])
    loaders = {name: functools.cache(functools.partial(load_guard, folder)) for name, folder in folders.items()}
    return white_box.Known(answers, loaders)


def _write(
    folder: Path, settings: dict[str, Any], file: Path, done: dict[tuple[str, str], list[dict[str, Any]]], todo: Any
) -> None:
    from psa_fast.attacks.robustness_report import JSON, PAGE, write_report
    from psa_fast.evaluation.report import environment
    from psa_fast.files import named

    provenance = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
        **environment(),
    }
    write_report(folder, [row for rows in done.values() for row in rows], provenance)
    with named(folder / PART):
        (folder / PART).unlink()
    print(f"wrote {folder / PAGE} and {folder / JSON}")
