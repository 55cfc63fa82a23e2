"""`psa-fast bench`: a public benchmark imported, answered, judged and reported by its recipe."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psa_fast.cli.launch import Ranks, shared
from psa_fast.compat.argparse import Subcommands

if TYPE_CHECKING:
    from psa_fast.evaluation.benchmark_recipe import Recipe
    from psa_fast.evaluation.benchmark_steps import BenchmarkSteps

# options that go on to the command of a step as they are
ANSWER_OPTIONS = ("run", "base", "policy", "batch_size", "limit")
MODEL_OPTIONS = ("judge_url", "judge_model", "judge_key_env", "judge_local", "judge_template")
CALL_OPTIONS = ("workers", "timeout", "tries")


def register(subparsers: Subcommands) -> None:
    """Add the command `bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="run a public benchmark by its recipe: import, answer, judge, report",
        description="Import a public benchmark, answer it with the base and with each stage, judge the answers and "
        "write report.json and report.md. The same command goes on where a run ended early.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the benchmark; --list prints them")
    parser.add_argument("--list", action="store_true", help="print the benchmarks with their recipes")
    parser.add_argument("--source", metavar="DIR", help="the benchmark's folder, as it was published")
    parser.add_argument("--split", help="in the place of the recipe's")
    parser.add_argument("--taxonomy_map", metavar="FILE", help="YAML table of categories in the place of our own")
    parser.add_argument(
        "--on_bad_sample",
        choices=("error", "skip"),
        default="error",
        help="rows that cannot be read end the run, or are left out and counted in the report (default: error)",
    )
    parser.add_argument("--run", metavar="DIR", help="training output: its stage1 and stage2 folders are measured")
    parser.add_argument("--base", metavar="PATH", help="base VLM (default: the one the add-ons' configs name)")
    parser.add_argument("--policy", metavar="FILE", help="policy YAML of the guarded runs (default: the shipped one)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="requests at once (default: 128)")
    parser.add_argument("--limit", type=int, metavar="N", help="use N rows, spread evenly")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="in the place of the recipe's")
    parser.add_argument("--judge", metavar="NAME", help="in the place of the recipe's; keywords judges beside any")
    for name in (*MODEL_OPTIONS, *CALL_OPTIONS):
        parser.add_argument(f"--{name}", metavar="VALUE", help="as for psa-fast judge")
    parser.add_argument("--out", metavar="DIR", help="folder of the run; its report is written there")
    parser.add_argument("--overwrite", action="store_true", help="make steps anew that were asked something else")
    parser.set_defaults(func=bench)


def bench(args: argparse.Namespace) -> int:
    """Print the list, or run a benchmark; 1 if a judge has too few verdicts. Raises ValueError for unusable input."""
    if args.list:
        return _list(args)
    return shared(lambda ranks: _bench(args, ranks))


def _list(args: argparse.Namespace) -> int:
    from psa_fast.evaluation.benchmark_recipe import BENCHMARKS, read_recipe

    if args.name is not None or args.source is not None:
        raise ValueError("--list prints all benchmarks and runs none; leave it or the benchmark out")
    for name in BENCHMARKS:
        recipe, _ = read_recipe(name)
        needs = ", a model: give --judge_url and --judge_model, or --judge keywords" if recipe.needs_model else ""
        print(f"{name}: {recipe.title}, split {recipe.split or 'all'}, at most {recipe.max_new_tokens} new tokens")
        print(f"  judge: {recipe.judge}{needs}")
        print(f"  figures: {', '.join(recipe.metrics)}")
        print(f"  published: {recipe.published}")
        print(f"  differs: {recipe.differs}")
    return 0


def _bench(args: argparse.Namespace, ranks: Ranks) -> int:
    from psa_fast.cli.evaluation import evaluate_on
    from psa_fast.evaluation.benchmark_recipe import read_recipe
    from psa_fast.evaluation.benchmark_steps import BenchmarkSteps
    from psa_fast.training.ranks import alike

    with alike():
        _check(args)
        recipe = read_recipe(args.name)
        judges = list(dict.fromkeys(("keywords", args.judge or recipe[0].judge)))
        answer, judge = _answer_arguments(args, recipe[0]), _judge_arguments(args, recipe[0], judges)
        asked = _asked(args, recipe, judges, answer)
    out = Path(args.out)
    steps = BenchmarkSteps(out)

    def begin() -> None:
        stack.enter_context(steps.claim())
        steps.begin(asked, datetime.now(timezone.utc).isoformat(timespec="seconds"), args.overwrite)
        if steps.facts("records") is None:
            steps.done("records", asked["records"], [out / "records.jsonl"], _import(args, recipe[0], out))

    def finish() -> int:
        if steps.facts("verdicts") is None:
            if judge.func(judge) != 0:
                print("no report: a judge gave too few verdicts")
                return 1
            steps.done("verdicts", asked["verdicts"], sorted((out / "verdicts").glob("judged-*")), {})
        _report(steps, args.name, recipe, asked, judges)
        return 0

    with ExitStack() as stack:
        ranks.from_first(begin)
        if ranks.from_first(lambda: steps.facts("answers")) is None:
            evaluate_on(answer, ranks)
            files = (out / "answers").glob("answers-*.jsonl")
            ranks.from_first(lambda: steps.done("answers", asked["answers"], [*sorted(files), _answers(out)], {}))
        return ranks.from_first(finish)


def _check(args: argparse.Namespace) -> None:
    from psa_fast.evaluation.benchmark_recipe import BENCHMARKS

    if args.name not in BENCHMARKS:
        raise ValueError(f"bench needs a NAME (or --list), one of: {', '.join(BENCHMARKS)}")
    for name in ("source", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"bench {args.name} needs --{name}")
    if args.run is None and args.base is None:
        raise ValueError("nothing to measure: give --run, or --base for a base alone")


def _answers(out: Path) -> Path:
    return out / "answers" / "report.json"


def _parsed(command: str, argv: list[str]) -> argparse.Namespace:
    """The options of another command as its own parser reads them; SystemExit is argparse's sentence."""
    from psa_fast.cli import evaluation, judge

    parser = argparse.ArgumentParser(prog="psa-fast", allow_abbrev=False)
    {"evaluate": evaluation, "judge": judge}[command].register(parser.add_subparsers())
    return parser.parse_args([command, *argv])


def _options(args: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    return [f"--{name}={value}" for name in names if (value := getattr(args, name)) is not None]


def _answer_arguments(args: argparse.Namespace, recipe: Recipe) -> argparse.Namespace:
    out = Path(args.out)
    tokens = recipe.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    fixed: dict[str, Any] = {
        "data": out / "records.jsonl",
        "image_folder": _image_folder(args, recipe),
        "out": out / "answers",
    }
    fixed |= {"max_new_tokens": tokens, "refusal_list": recipe.refusal_list}
    argv = [*_options(args, ANSWER_OPTIONS), *(f"--{name}={value}" for name, value in fixed.items())]
    return _parsed("evaluate", argv + ["--overwrite"] * args.overwrite)


def _judge_arguments(args: argparse.Namespace, recipe: Recipe, judges: list[str]) -> argparse.Namespace:
    """The options of the judges. Raises ValueError, before anything is answered, if they do not go together."""
    from psa_fast.cli.judge import check_options
    from psa_fast.evaluation.judges.known import FORMATS, HUMAN, JUDGES

    wanted = args.judge or recipe.judge
    if wanted not in JUDGES or wanted == HUMAN:
        known = ", ".join(name for name in JUDGES if name != HUMAN)
        raise ValueError(f"--judge {wanted} cannot judge a benchmark; expected one of {known}")
    if wanted in FORMATS and args.judge_url is None and args.judge_local is None:
        raise ValueError(
            f"the judge of {args.name} is {wanted}, a model: give --judge_url and --judge_model, or --judge_local, or "
            f"--judge keywords, which takes every answer to a risky request that does not refuse for unsafe"
        )
    out = Path(args.out)
    argv = ["--judge", *judges, "--answers", str(out / "answers"), "--out", str(out / "verdicts"), "--overwrite"]
    argv += [f"--refusal_list={recipe.refusal_list}", *_options(args, (*MODEL_OPTIONS, *CALL_OPTIONS))]
    if args.judge_url is not None:
        argv.append(f"--image_folder={_image_folder(args, recipe)}")
    found = _parsed("judge", argv)
    check_options(found)
    return found


def _asked(
    args: argparse.Namespace, recipe: tuple[Recipe, str], judges: list[str], answer: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """All that decides what each step makes, by step."""
    from psa_fast import __version__
    from psa_fast.cli import evaluation
    from psa_fast.evaluation.judges.wording import read_wording
    from psa_fast.safety.load import addon_hash
    from psa_fast.safety.policy import Policy
    from psa_fast.taxonomy import PSA

    policy = Policy.load(args.policy)
    policy.require_taxonomy(PSA, "what a benchmark counts")
    if recipe[0].files and args.split is not None:
        raise ValueError(f"--split does nothing with {args.name}, whose file is its only split; leave it out")
    split = recipe[0].split if args.split is None else args.split
    todo = evaluation.asked(answer)
    table = None if args.taxonomy_map is None else hashlib.sha256(Path(args.taxonomy_map).read_bytes()).hexdigest()
    wording = None if args.judge_template is None else read_wording(args.judge_template)
    return {
        "records": {
            "benchmark": args.name,
            "recipe": recipe[1],
            "source": args.source,
            "split": split,
            "taxonomy_map": table,
            "on_bad_sample": args.on_bad_sample,
            "version": __version__,
        },
        "answers": {name: getattr(answer, name) for name in (*ANSWER_OPTIONS, "max_new_tokens", "refusal_list")}
        | {"policy": policy.hash, "base": todo.base}
        | {"addons": {name: addon_hash(folder) for name, folder in todo.addons.items()}},
        "verdicts": {name: getattr(args, name) for name in MODEL_OPTIONS if name != "judge_key_env"}
        | {"judges": judges, "judge_template": wording},
    }


def _image_folder(args: argparse.Namespace, recipe: Recipe) -> Path:
    """Where the benchmark's images are: written out by the run, or where the source has them."""
    if recipe.files:
        return _first(args, recipe, "image_folder")
    return Path(args.out) / "images"


def _first(args: argparse.Namespace, recipe: Recipe, option: str) -> Path:
    """The first path of a recipe's `files` that is there. Raises ValueError if none is."""
    for name in recipe.files[option]:
        if (path := Path(args.source) / name).exists():
            return path
    raise ValueError(f"--source {args.source} has none of: {', '.join(recipe.files[option])}")


def _file_arguments(args: argparse.Namespace, recipe: Recipe) -> argparse.Namespace:
    """The options of an importer that takes files of any name."""
    from psa_fast.data.importers import load_importer

    parser = argparse.ArgumentParser()
    load_importer(recipe.importer).add_arguments(parser)
    return parser.parse_args(
        [*(f"--{name}={_first(args, recipe, name)}" for name in recipe.files), *_options(args, ("taxonomy_map",))]
    )


def _import(args: argparse.Namespace, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Write the benchmark's records and images; what became of its rows. Raises ValueError if some are not to be."""
    from psa_fast.data.importers import load_importer
    from psa_fast.data.importers.source import Source
    from psa_fast.data.importers.writing import import_rows
    from psa_fast.data.records import DataError, list_problems

    if recipe.files:
        rows = load_importer(recipe.importer).read(_file_arguments(args, recipe))
        entries: dict[str, int] = {}
    else:
        split = recipe.split if args.split is None else args.split
        source = Source(recipe.importer, args.source, split, out / "images", args.taxonomy_map)
        rows, entries = source.rows(), source.entries
    partly = args.on_bad_sample == "skip"
    result = import_rows(rows, out / "records.jsonl", _image_folder(args, recipe), partly)
    if result.problems and args.on_bad_sample == "error":
        raise DataError(args.source, result.problems)
    if not result.written:
        raise ValueError(f"--source {args.source}: there is no row that can be asked")
    for line in list_problems(result.problems):
        print(line)
    print(f"read {result.read} rows of {recipe.title}, wrote {result.written}, left out {result.reasons.total()}")
    return {
        "read": result.read,
        "written": result.written,
        "left_out": result.reasons.total(),
        "reasons": dict(result.reasons.most_common()),
        "entries": dict(entries),
    }


def _report(
    steps: BenchmarkSteps, name: str, recipe: tuple[Recipe, str], asked: Mapping[str, Any], judges: list[str]
) -> None:
    from psa_fast.evaluation.benchmark_report import write_benchmark_report

    write_benchmark_report(steps.path, name, recipe, steps.date, steps.facts("records"), asked, judges)
    print(f"wrote {steps.path / 'report.md'} and {steps.path / 'report.json'}")
