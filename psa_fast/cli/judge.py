"""`psa-fast judge`: answers of an evaluation judged by lists, models or people, and how far two judges agree."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psa_fast import __version__
from psa_fast.compat.argparse import Subcommands
from psa_fast.evaluation.refusal import DEFAULT_LIST, LISTS, MODES, Mode, get_list
from psa_fast.files import read_json, write_text

if TYPE_CHECKING:
    from psa_fast.evaluation.judged import Answers
    from psa_fast.evaluation.judges.contract import Asker, Judge
    from psa_fast.evaluation.judges.judge_format import Format
    from psa_fast.evaluation.metrics import Estimate

KEY_VARIABLE = "JUDGE_API_KEY"
# which options mean something for which task; None is "not given" for all of them
MODEL_OPTIONS = ("judge_url", "judge_model", "judge_key_env", "judge_local", "judge_template", "image_folder", "cache")
ENDPOINT_OPTIONS = ("judge_url", "judge_model", "judge_key_env", "image_folder", "workers", "timeout", "tries")
JUDGE_OPTIONS = (*MODEL_OPTIONS, "workers", "timeout", "tries", "labels", "refusal_list", "refusal_mode", "overwrite")


def register(subparsers: Subcommands) -> None:
    """Add the command `judge`."""
    parser = subparsers.add_parser(
        "judge",
        help="judge an evaluation's answers by lists, models or people; compare judges",
        description="Judge the answers that psa-fast evaluate wrote, without the model that gave them: attack success, "
        "over-refusal and general accuracy by judge. Or compare two judges, or draw answers to be labelled by hand.",
    )
    from psa_fast.evaluation.judges.known import JUDGES

    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--judge", nargs="+", choices=JUDGES, metavar="NAME", help=f"one or more of {', '.join(JUDGES)}")
    task.add_argument("--compare", nargs=2, metavar="FILE", help="two judged-STAGE-JUDGE.jsonl of the same answers")
    task.add_argument("--export_for_labelling", type=int, metavar="N", help="write N answers to be labelled by hand")
    parser.add_argument("--answers", metavar="PATH", help="an answers-STAGE.jsonl, or a folder of them")
    parser.add_argument(
        "--out", metavar="PATH", help="folder of verdicts and figures; the .csv or .jsonl to be labelled"
    )
    parser.add_argument("--judge_url", metavar="URL", help="OpenAI-compatible endpoint, up to and including /v1")
    parser.add_argument("--judge_model", metavar="NAME", help="name by which the endpoint knows the judge's model")
    parser.add_argument(
        "--judge_key_env", metavar="VARIABLE", help=f"environment variable with the key (default: {KEY_VARIABLE})"
    )
    parser.add_argument("--judge_local", metavar="DIR", help="the judge's model on this machine instead of an endpoint")
    parser.add_argument("--judge_template", metavar="FILE", help="YAML with the wording of the question")
    parser.add_argument("--image_folder", metavar="DIR", help="where image paths start, for judges that look at images")
    parser.add_argument("--cache", metavar="FILE", help="replies of judging models (default: replies.jsonl in --out)")
    parser.add_argument("--workers", type=int, metavar="N", help="prompts under way at once (default: 8)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="of one try (default: 60)")
    parser.add_argument("--tries", type=int, metavar="N", help="before a prompt counts as failed (default: 5)")
    parser.add_argument("--labels", metavar="FILE", help="the file that people labelled, for the judge human")
    parser.add_argument("--refusal_list", choices=sorted(LISTS), help=f"default: {DEFAULT_LIST}")
    parser.add_argument("--refusal_mode", choices=MODES, help="default: contains")
    parser.add_argument("--seed", type=int, help="of the sample, or of kappa's bootstrap (default: 0)")
    parser.add_argument(
        "--overwrite", action="store_true", default=None, help="replace figures of other answers in --out"
    )
    parser.set_defaults(func=judge)


def judge(args: argparse.Namespace) -> int:
    """Run the task that was asked for. Raises ValueError, with a sentence, for input that cannot be used."""
    if args.compare is not None:
        _refuse(args, (*JUDGE_OPTIONS, "answers"), "--compare")
        return _compare(args)
    if args.answers is None or args.out is None:
        raise ValueError("give --answers and --out")
    if args.export_for_labelling is not None:
        _refuse(args, JUDGE_OPTIONS, "--export_for_labelling")
        return _export(args)
    _refuse(args, ("seed",), "--judge")
    return _judge(args)


def _refuse(args: argparse.Namespace, names: Sequence[str], task: str) -> None:
    """Raise ValueError for an option that would do nothing."""
    given = [name for name in names if getattr(args, name) is not None]
    if given:
        raise ValueError(f"--{given[0]} does nothing with {task}; leave it out")


def _mode(args: argparse.Namespace) -> Mode:
    return "contains" if args.refusal_mode is None else args.refusal_mode


def _at_least_one(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= 1:
            raise ValueError(f"--{name} is {value}; expected at least 1")


def _judge(args: argparse.Namespace) -> int:
    from psa_fast.evaluation.judged import find_answers

    check_options(args)
    answers = find_answers(args.answers)
    out = Path(args.out)
    code = 0
    with ExitStack() as stack:
        for name in dict.fromkeys(args.judge):
            code |= _judge_all(args, _make(args, name, stack), answers, out)
    return code


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options of `--judge` that do not go together, before any answer is read."""
    from psa_fast.evaluation.judges.known import FORMATS, HUMAN

    models = [name for name in args.judge if name in FORMATS]
    if len(models) > 1:
        raise ValueError(f"--judge {' '.join(models)}: one judging model at a time, since --judge_url names one")
    if not models:
        _refuse(args, (*MODEL_OPTIONS, "workers", "timeout", "tries"), f"--judge {' '.join(args.judge)}")
    elif (args.judge_url is None) == (args.judge_local is None):
        raise ValueError(f"--judge {models[0]} needs --judge_url or --judge_local, one of them")
    elif args.judge_url is not None and args.judge_model is None:
        raise ValueError("--judge_url needs --judge_model")
    elif args.judge_local is not None:
        _refuse(args, ENDPOINT_OPTIONS, "--judge_local")
    if all(name == HUMAN or (name in FORMATS and FORMATS[name].tells_refusals) for name in args.judge):
        _refuse(args, ("refusal_list", "refusal_mode"), f"--judge {' '.join(args.judge)}")
    if (HUMAN in args.judge) != (args.labels is not None):
        raise ValueError("--judge human and --labels go together")
    _at_least_one(args, "workers", "tries")
    if args.timeout is not None and not 0 < args.timeout < float("inf"):
        raise ValueError(f"--timeout is {args.timeout}; expected seconds above 0")
    if args.judge_key_env is not None and not os.environ.get(args.judge_key_env):
        raise ValueError(f"--judge_key_env: the environment has no variable {args.judge_key_env}, or it is empty")
    for name in models:
        _form(args, name)


def _form(args: argparse.Namespace, name: str) -> Format:
    from psa_fast.evaluation.judges.known import get_format
    from psa_fast.evaluation.judges.wording import read_wording

    form = get_format(name, None if args.judge_template is None else read_wording(args.judge_template))
    if args.judge_local is not None and (form.sees_pictures or form.top_logprobs):
        raise ValueError(f"{name} needs images or log-probabilities, and --judge_local has neither; use --judge_url")
    return form


def _make(args: argparse.Namespace, name: str, stack: ExitStack) -> Judge:
    from psa_fast.evaluation.judges.human_labels import HumanLabels
    from psa_fast.evaluation.judges.keyword_list import KeywordList
    from psa_fast.evaluation.judges.known import HUMAN, KEYWORDS
    from psa_fast.evaluation.judges.model_judge import ModelJudge
    from psa_fast.evaluation.judges.reply_cache import ReplyCache

    if name == KEYWORDS:
        return KeywordList(get_list(args.refusal_list or DEFAULT_LIST), _mode(args))
    if name == HUMAN:
        return HumanLabels(args.labels)
    form = _form(args, name)
    cache = stack.enter_context(ReplyCache(Path(args.cache or Path(args.out) / "replies.jsonl")).open())
    return ModelJudge(form, _asker(args), cache)


def _asker(args: argparse.Namespace) -> Asker:
    from psa_fast.evaluation.judges.endpoint import Endpoint
    from psa_fast.evaluation.judges.local_model import LocalModel

    if args.judge_local is not None:
        return LocalModel(args.judge_local)
    key = os.environ.get(args.judge_key_env or KEY_VARIABLE)
    return Endpoint(
        args.judge_url,
        args.judge_model,
        key,
        args.image_folder,
        timeout=args.timeout or 60.0,
        tries=args.tries or 5,
        workers=args.workers or 8,
    )


def _judge_all(args: argparse.Namespace, who: Judge, answers: Sequence[Answers], out: Path) -> int:
    """Judge every stage by one judge, write rows and figures, print them; 1 if a stage has too few verdicts."""
    from psa_fast.evaluation.judged import count_verdicts, figures, judge_answers, without_verdict

    words, mode = get_list(args.refusal_list or DEFAULT_LIST), _mode(args)
    over_refusal = who.name if who.tells_refusals else f"list {words.name}, mode {mode}"
    provenance = {
        "judge": {"name": who.name, **who.provenance()},
        "over_refusal_by": over_refusal,
        "answers": {stage.stage: stage.sha256 for stage in answers},
        "version": __version__,
    }
    report = out / f"judged-{who.name}.json"
    if report.exists() and not args.overwrite:
        _check_older(report, provenance)
    found, counts = {}, {}
    failures = []
    for stage in answers:
        rows = judge_answers(stage.results, who)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(out / f"judged-{stage.stage}-{who.name}.jsonl", text)
        found[stage.stage] = figures(rows, stage.results, who, words, mode)
        counts[stage.stage] = count_verdicts(rows)
        if (missing := without_verdict(rows)) is not None:
            failures.append(f"{who.name} on {stage.stage}: {missing}")
    failure = "; ".join(failures) or None
    stages = {
        stage: {"figures": {name: e.to_json() for name, e in found[stage].items()}, "verdicts": counts[stage]}
        for stage in found
    }
    content = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "provenance": provenance,
        "failure": failure,
        "stages": {} if failure else stages,
    }
    write_text(report, json.dumps(content, indent=2, allow_nan=False) + "\n")
    _print_trust(who)
    if failure:
        print(f"no figures: {failure}")
        return 1
    for name, numbers in found.items():
        _print_figures(name, who.name, over_refusal, numbers, counts[name])
    print(f"wrote {report}")
    return 0


def _check_older(report: Path, provenance: dict[str, Any]) -> None:
    """Raise ValueError if the figures there are of other answers or another judge."""
    try:
        older = read_json(report, "figures").get("provenance")
    except ValueError:
        older = None
    if older != json.loads(json.dumps(provenance)):
        raise ValueError(f"{report} is of other answers or another judge; name another --out, or give --overwrite")


def _print_figures(
    stage: str, name: str, over_refusal: str, found: dict[str, Estimate], counts: dict[str, int]
) -> None:
    print(f"{stage}, judge {name} (over-refusal by {over_refusal}):")
    for metric, estimate in found.items():
        if estimate.value is not None:
            interval = f"[{estimate.low:.3f}, {estimate.high:.3f}]"
            print(f"  {metric:<36} {estimate.value:.3f} {interval}  n {estimate.n}")
    print("  verdicts: " + ", ".join(f"{verdict} {count}" for verdict, count in counts.items()))


def _print_trust(who: Judge) -> None:
    """What the judge cost, or how often it is known to be wrong."""
    from psa_fast.evaluation.judges.keyword_list import KeywordList
    from psa_fast.evaluation.judges.model_judge import ModelJudge

    if isinstance(who, ModelJudge):
        print(f"{who.name}: {who.calls} prompts went to the model, every other reply was there already")
    if isinstance(who, KeywordList):
        facts = who.provenance()
        print(f"list {facts['list']}, English only; on labelled answers it takes")
        for kind, taken in facts["on_labelled_answers"].items():
            print(f"  {kind} for " + ", ".join(f"{other} {count}" for other, count in sorted(taken.items())))


def _compare(args: argparse.Namespace) -> int:
    from psa_fast.evaluation.agreement import CLASSES, compare
    from psa_fast.evaluation.judged import read_judged

    first, second = args.compare
    found = compare(read_judged(first), read_judged(second), args.seed or 0)
    print(f"rows: {first}\ncolumns: {second}")
    print(" " * 14 + "".join(f"{name:>14}" for name in CLASSES))
    for name, row in zip(CLASSES, found.table, strict=True):
        print(f"{name:>14}" + "".join(f"{count:>14}" for count in row))
    for what, estimate in (
        ("agreement on harm", found.agree),
        ("kappa on harm", found.harm),
        ("kappa on verdicts", found.verdicts),
    ):
        if estimate.value is None:
            print(f"{what}: n/a ({estimate.reason})")
        else:
            print(f"{what}: {estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}], n {estimate.n}")
    print(f"{found.left_out} answers without a verdict by both are left out")
    if args.out is not None:
        content = {"first": first, "second": second, "seed": args.seed or 0, **found.to_json()}
        write_text(Path(args.out) / "agreement.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    return 0


def _export(args: argparse.Namespace) -> int:
    from psa_fast.evaluation.judged import SIDES, answered, find_answers
    from psa_fast.evaluation.judges.human_labels import LABELS, sample, write_sample

    _at_least_one(args, "export_for_labelling")
    out = Path(args.out)
    if out.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"--out {out}: expected a .csv or .jsonl file to be labelled")
    if out.exists():
        raise ValueError(f"--out {out} exists, and may hold labels; name another file")
    results = [result for stage in find_answers(args.answers) for result in stage.results if result.group]
    rows = sample((answered(r, side) for r in results for side in SIDES), args.export_for_labelling, args.seed or 0)
    write_sample(out, rows)
    print(f"wrote {len(rows)} answers to {out}; write one of {', '.join(LABELS)} into the column label")
    return 0
