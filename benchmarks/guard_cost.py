"""What the guard adds to an answer: guarded against plain generation, and a verdict against a generative guard.

    python benchmarks/guard_cost.py [--size proportionate|7b] [--requests 4] [--rounds 5] [--json FILE]

One request at a time: a picture and a question of 12 words, then one of 250, which is read in some thirty windows. In
turn, in one process:

- plain: the stock base answers with `--answer_tokens` tokens;
- one reading: the guarded model answers as many, with the whole prompt as its only query;
- guarded: the same with every reading (the learned query alone, the prompt, its windows);
- verdict: the guard reads and blocks, so nothing is generated;
- generative guard: the stock base writes `--verdict_tokens` tokens about the same request.

Weights are random; the concept head's bias is set to say "clean" (for the verdict: "high"), so that every answer has
all its tokens; a run where one has fewer is refused. --size 7b is the default on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ladder import CUDA, where
from PIL import Image
from step_flops import safety_options
from step_forms import synchronize
from step_measure import CLOCKS
from step_model import SIZES, TIMED, Size, build_base, build_processor, same_weights

from psa_fast.models import PsaVLM
from psa_fast.safety import Guard, Policy, Request
from psa_fast.safety.plain import PlainVLM
from psa_fast.sandbox.language import QUESTIONS
from psa_fast.sandbox.paint import paint
from psa_fast.sandbox.world import sample_scene
from psa_fast.taxonomy import CLEAN, RISK_LEVELS

WORDS = {"short": 12, "long": 250}
WINDOW = 16
CERTAIN = 1e4


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison; returns what --json writes."""
    args = _options(argv)
    size = SIZES[args.size]
    base = build_base(size).eval()
    result: dict[str, Any] = {**where(), "size": args.size, "requests": args.requests, "rounds": args.rounds}
    result |= {"answer_tokens": args.answer_tokens, "verdict_tokens": args.verdict_tokens, "prompts": {}}
    print(f"{result['device']}, {result['threads']} threads, {result['dtype']}, model {args.size}")
    with tempfile.TemporaryDirectory() as folder:
        for name, words in WORDS.items():
            requests = _requests(Path(folder), args.requests, words)
            forms = _forms(base, size, args.answer_tokens, args.verdict_tokens, [r.turns[0].text for r in requests])
            result["prompts"][name] = found = _compare(forms, requests, args.rounds)
            print(f"\n{name}: questions of {words} words; median seconds a request")
            for form, seconds in found["seconds"].items():
                print(f"  {form:18s}{seconds:9.4f}")
            for ratio, (low, middle, high) in found["ratios"].items():
                print(f"  {ratio:36s}{middle:8.3f}  [{low:.3f}, {high:.3f}] quartiles")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _requests(folder: Path, count: int, words: int) -> list[Request]:
    rng = np.random.default_rng(0)
    vocabulary = sorted({word for forms in QUESTIONS.values() for form in forms for word in form.split()})
    requests = []
    for i in range(count):
        path = folder / f"{words}-{i}.png"
        Image.fromarray(paint(sample_scene(rng, "clean", "train"))).save(path)
        asked = " ".join(vocabulary[j] for j in rng.integers(len(vocabulary), size=words))
        requests.append(Request(asked, [path]))
    return requests


Form = Callable[[Request], None]


def _forms(base: Any, size: Size, answer_tokens: int, verdict_tokens: int, texts: list[str]) -> dict[str, Form]:
    stock = build_processor(base, size, 0, texts)
    ours = build_processor(base, size, size.safety_tokens, texts)

    def plain(tokens: int) -> Form:
        guard = _counting(Guard(PlainVLM(base), stock), tokens)
        return lambda request: _answer(guard, request, tokens, guarded=False)

    def guarded(level: int, every_reading: bool = True, policy: Policy | None = None) -> Guard:
        torch.manual_seed(1)
        model = PsaVLM.build(
            same_weights(base),
            **safety_options(size),
            neutral_query=every_reading,
            query_window=WINDOW if every_reading else 0,
            reads_text=every_reading,
        )
        bias = model.bottleneck.heads.bias.data
        bias[0 if level else CLEAN] = CERTAIN
        bias[len(model.config.risk_types) + level] = CERTAIN
        return _counting(Guard(model, ours, policy, neutral_question=None), answer_tokens)

    alone, whole = guarded(0, every_reading=False), guarded(0)
    blocking, high = Policy.load(), RISK_LEVELS[-1]
    rule = blocking.levels[high].model_copy(update={"action": "block", "hint": None})
    blocking = blocking.model_copy(update={"levels": blocking.levels | {high: rule}})
    reading = guarded(len(RISK_LEVELS) - 1, policy=blocking)
    return {
        "plain": plain(answer_tokens),
        "one reading": lambda request: _answer(alone, request, answer_tokens),
        "guarded": lambda request: _answer(whole, request, answer_tokens),
        "verdict": lambda request: _verdict(reading, request),
        "generative guard": plain(verdict_tokens),
    }


def _counting(guard: Guard, tokens: int) -> Guard:
    """The guard, refusing to go on where an answer does not have `tokens` tokens."""
    generate = guard.model.generate

    def counted(**inputs: Any) -> torch.Tensor:
        ids = generate(**inputs)
        if ids.shape[1] != tokens:
            raise SystemExit(f"an answer has {ids.shape[1]} tokens instead of {tokens}: unlike work is not compared")
        return ids

    guard.model.generate = counted
    return guard


def _answer(guard: Guard, request: Request, tokens: int, guarded: bool = True) -> None:
    (answer,) = guard.answer([request], guarded, max_new_tokens=tokens, on_error="raise")
    if answer.verdict.action != "allow":
        raise SystemExit(f"the answer was to be allowed, the guard said {answer.verdict.action}: nothing is timed")


def _verdict(guard: Guard, request: Request) -> None:
    (answer,) = guard.answer([request], on_error="raise")
    if answer.verdict.action != "block":
        raise SystemExit(f"the request was to be blocked, the guard said {answer.verdict.action}: nothing is timed")


def _compare(forms: dict[str, Form], requests: list[Request], rounds: int) -> dict[str, Any]:
    """Medians of every form, and quartiles of the ratios within a round."""
    now = CLOCKS["wall"]
    times: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():  # what is loaded or compiled at first use
        form(requests[0])
    for round_ in range(rounds):
        for request in requests:
            for name, form in list(forms.items())[:: 1 if round_ % 2 else -1]:
                synchronize()
                start = now()
                form(request)
                synchronize()
                times[name].append(now() - start)
    pairs = {
        "guarded / plain": ("guarded", "plain"),
        "guarded / one reading": ("guarded", "one reading"),
        "generative guard / verdict": ("generative guard", "verdict"),
    }
    ratios = {}
    for name, (a, b) in pairs.items():
        found = [x / y for x, y in zip(times[a], times[b], strict=True)]
        ratios[name] = statistics.quantiles(found, n=4)
    return {"seconds": {name: statistics.median(found) for name, found in times.items()}, "ratios": ratios}


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=TIMED, default="7b" if CUDA else "proportionate")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answer_tokens", type=int, default=64)
    parser.add_argument("--verdict_tokens", type=int, default=20)
    parser.add_argument("--json", help="file for the result")
    args = parser.parse_args(argv)
    for name in ("requests", "rounds", "answer_tokens", "verdict_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is at least 1")
    if args.requests * args.rounds < 2:
        parser.error("--requests times --rounds is at least 2: quartiles need that many")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json {args.json}: no such folder")
    return args


if __name__ == "__main__":
    main()
