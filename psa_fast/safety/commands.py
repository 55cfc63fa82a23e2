"""`psa-fast generate`: answer one request from the command line, guarded by default."""

from __future__ import annotations

import argparse
import json


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the command `generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="answer a question about images, guarded by the policy",
        description="Answer a question about images. The concept head reads the images once, the policy decides, and "
        "the language model answers from the same vision pass.",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="add-on folder (psa_config.json, psa.safetensors)"
    )
    parser.add_argument("--base", metavar="PATH", help="base VLM (default: the one the add-on's config names)")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image; may be given several times"
    )
    parser.add_argument(
        "--prompt", required=True, help="the question; may hold <image> marks, else the images come first"
    )
    parser.add_argument("--policy", metavar="FILE", help="policy YAML (default: the shipped one)")
    parser.add_argument("--unguarded", action="store_true", help="report the verdict, but do not apply it")
    parser.add_argument("--max_new_tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    parser.add_argument("--json", action="store_true", help="print answer and verdict as one JSON object")
    parser.set_defaults(func=generate)


def generate(args: argparse.Namespace) -> int:
    """Print the answer and its verdict. Raises ValueError, with a sentence, for input that cannot be used."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens is {args.max_new_tokens}; expected at least 1")
    from psa_fast.data.images import load_image
    from psa_fast.safety.policy import Policy

    policy = Policy.load(args.policy)
    images = tuple(load_image(path) for path in args.image)

    from psa_fast.safety.guard import Request
    from psa_fast.safety.load import load_guard

    request = Request(args.prompt, images)
    request.turns  # noqa: B018 - a request that does not fit is refused before a model is loaded
    guard = load_guard(args.model, args.base, policy)
    (answer,) = guard.answer([request], guarded=not args.unguarded, max_new_tokens=args.max_new_tokens)
    verdict = answer.verdict
    if args.json:
        print(json.dumps({"answer": answer.text, "verdict": verdict.to_json()}, indent=2, ensure_ascii=False))
        return 0
    print(answer.text)
    note = "" if verdict.applied or not verdict.checked else ", not applied"
    score = "" if verdict.unsafe_score is None else f", unsafe score {verdict.unsafe_score:.3f}"
    kind = "" if verdict.type is None else f", type {verdict.type}, level {verdict.level}"
    print(f"[{verdict.action}{note}: {verdict.rule}{kind}{score}]")
    return 0
