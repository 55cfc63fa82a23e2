"""`psa-fast generate` answers one request, guarded by default; `psa-fast policy check` shows what a policy does."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from psa_fast.cli import policy_explain, policy_log
from psa_fast.cli.intervening import add_intervention, intervention_of
from psa_fast.compat.argparse import Subcommands

if TYPE_CHECKING:
    from psa_fast.safety.guard import Guard, Request
    from psa_fast.safety.policy import Policy
    from psa_fast.safety.verdict import Verdict


def register(subparsers: Subcommands) -> None:
    """Add the commands `generate` and `policy`."""
    parser = subparsers.add_parser(
        "generate",
        help="answer a question about images, guarded by the policy",
        description="Answer a question about images. The concept head reads the images once, the policy decides, and "
        "the language model answers from the same vision pass.",
    )
    add_request(parser)
    add_intervention(parser)
    parser.add_argument("--unguarded", action="store_true", help="report the verdict, but do not apply it")
    parser.add_argument("--max_new_tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    parser.add_argument("--json", action="store_true", help="print answer and verdict as one JSON object")
    parser.set_defaults(func=generate)

    commands = subparsers.add_parser("policy", help="check or explain a policy, replay a log").add_subparsers(
        dest="policy_command", required=True, metavar="{check,explain,replay,diff}"
    )
    check = commands.add_parser("check", help="show what a policy does, or what is wrong with its file; loads no model")
    check.add_argument("file", nargs="?", metavar="FILE", help="policy YAML (default: the shipped one)")
    check.set_defaults(func=check_policy)
    policy_explain.register(commands)
    policy_log.register(commands)


def add_request(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the options of one request: model, policy, images and prompt; `required` tells whether a prompt is."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="add-on folder (psa_config.json, psa.safetensors)"
    )
    parser.add_argument("--base", metavar="PATH", help="base VLM (default: the one the add-on's config names)")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image; may be given several times"
    )
    parser.add_argument(
        "--prompt", required=required, help="the question; may hold <image> marks, else the images come first"
    )
    parser.add_argument("--policy", metavar="FILE", help="policy YAML (default: the shipped one)")


def guard_for(args: argparse.Namespace, request: Request, new_tokens: int) -> tuple[Guard, Request]:
    """The guard that the options name, and the request, its pictures read.

    A request that cannot be asked is refused, with a ValueError, before a model is loaded.
    """
    from psa_fast.safety.load import base_of, checked_hash, load_guard, load_prompter
    from psa_fast.safety.policy import Policy

    policy = Policy.load(args.policy)
    turns, request = request.turns, replace(request, images=tuple(request.pictures()))
    checked_hash(args.model, policy)
    base = base_of(args.model) if args.base is None else args.base
    prompter = load_prompter(base, args.model)
    prompter.prompt(turns, prompter.prepare(request), new_tokens)
    return load_guard(args.model, base, policy), request


def generate(args: argparse.Namespace) -> int:
    """Print the answer and its verdict. Raises ValueError, with a sentence, for input that cannot be used."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens is {args.max_new_tokens}; expected at least 1")
    from psa_fast.safety.guard import Request

    intervention = intervention_of(args)
    if intervention is not None and args.unguarded:
        raise ValueError(f"--{intervention.kind} does nothing with --unguarded: the verdict is not applied")
    asked = Request(args.prompt, tuple(map(Path, args.image)), intervention)
    guard, request = guard_for(args, asked, args.max_new_tokens)
    (answer,) = guard.answer(
        [request], guarded=not args.unguarded, max_new_tokens=args.max_new_tokens, on_error="raise"
    )
    if args.json:
        print(json.dumps({"answer": answer.text, "verdict": answer.verdict.to_json()}, indent=2, ensure_ascii=False))
        return 0
    print(answer.text)
    print(f"[{describe(answer.verdict)}]")
    return 0


def describe(verdict: Verdict) -> str:
    """A verdict in one line: what was done and why, or that nothing was checked."""
    if not verdict.checked:
        blocked = ", blocked" if verdict.applied and verdict.action == "block" else ""
        return f"NOT CHECKED FOR RISKS: {verdict.rule.partition(': ')[2]}{blocked}"
    note = "" if verdict.applied else ", not applied"
    score = "" if verdict.unsafe_score is None else f", unsafe score {verdict.unsafe_score:.3f}"
    kind = "" if verdict.type is None else f", type {verdict.type}, level {verdict.level}"
    query = {"neutral": ", by the neutral query", "turn": ", by turn", "window": ", by window"}.get(
        verdict.query or "", ""
    )
    number = "" if verdict.query_number is None else f" {verdict.query_number + 1}"
    picture = "" if verdict.picture is None else f", in picture {verdict.picture + 1}"
    words = ", in the words alone" if verdict.words_alone else ""
    by_hand = "" if verdict.intervention is None else f"INTERVENED ({verdict.intervention}): "
    return f"{by_hand}{verdict.action}{note}: {verdict.rule}{kind}{score}{query}{number}{picture}{words}"


def check_policy(args: argparse.Namespace) -> int:
    """Print what a policy does. Raises ValueError, naming every fault, for a file that is none."""
    from psa_fast.safety.policy import Policy

    print("\n".join(policy_table(Policy.load(args.file), args.file or "shipped")))
    return 0


def policy_table(policy: Policy, name: str) -> list[str]:
    """The lines of a table: which risk types are on, and what each level of risk leads to."""
    switches = {state: ", ".join(t for t, on in policy.types.items() if on == state) for state in (True, False)}
    taxonomy = policy.taxonomy
    score = f"max(1 - p({taxonomy.types[taxonomy.harmless]}), 1 - p({taxonomy.levels[0]}))"
    if policy.type_thresholds is None:
        thresholds = [("unsafe", f"from {policy.unsafe_threshold:g}", score)]
    else:
        thresholds = [("unsafe", f"from {value:g}", f"{score}, {t}") for t, value in policy.type_thresholds.items()]
    rows = [
        ("version", str(policy.version), ""),
        *thresholds,
        ("types on", switches[True] or "none", ""),
        ("types off", switches[False] or "none", ""),
    ]
    texts = {"allow": "", "hint": "", "refuse": policy.responses.refuse, "block": policy.responses.block}
    for level, rule in policy.levels.items():
        rows.append((level, rule.action, json.dumps(rule.hint or texts[rule.action], ensure_ascii=False)))
    rows.append(("unread", policy.on_error, "requests that the concept head does not read"))
    rows.append(("unreadable", "block", json.dumps(policy.responses.unchecked, ensure_ascii=False)))
    if policy.memory is not None:
        told = f"of the turns' scores, decay {policy.memory.decay:g}, is level {policy.memory.level}"
        rows.append(("memory", f"from {policy.memory.threshold:g}", told))
    if policy.calibration is not None:
        temperatures = ", ".join(f"{value:.4g}" for value in policy.temperatures)
        rows.append(("calibrated", "", f"temperatures {temperatures}; {policy.calibration.promise}"))
    lines = [f"{first:<11} {second:<8} {third}".rstrip() for first, second, third in rows]
    return [f"policy {name}: valid", *lines, f"{'sha256':<11} {policy.hash}"]
