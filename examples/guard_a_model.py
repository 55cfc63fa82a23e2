"""A guarded model asked with a picture and with words: the answer, the verdict, and what decided.

    python examples/guard_a_model.py [--model runs/demo/stage2] [--image FILE ...] [--prompt TEXT] [--words TEXT]

Without arguments it asks what `make demo` has trained. --model is any add-on folder of train.py; --image may be given
several times, and then each picture is also read alone. The verdict is plain data: log it, or act on its `code`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from psa_fast.safety import Answer, Request, Verdict, load_guard

DEMO = Path("runs/demo/stage2")
PICTURES = DEMO.parent / "world" / "images" / "test"


def decided_by(verdict: Verdict) -> str:
    """Which of the readings decided: the worst of them does."""
    if not verdict.checked:
        return "nothing was read"
    if verdict.words_alone:
        shown = "the words alone"
    elif verdict.picture is None:
        shown = "all that was shown"
    else:
        shown = f"picture {verdict.picture + 1} alone"
    asked = {
        "prompt": "all words of the request",
        "neutral": "the learned query, whatever is said",
        "turn": "one turn of the user",
        "window": "a few neighbouring words",
    }.get(verdict.query or "", "nothing")
    return f"{shown}, asked by {asked}"


def show(title: str, answer: Answer) -> None:
    """Print an answer and the verdict it was given under."""
    verdict = answer.verdict
    risk = "no risk" if verdict.type is None else f"{verdict.type}, level {verdict.level}"
    score = "none" if verdict.unsafe_score is None else f"{verdict.unsafe_score:.3f}"
    print(f"{title}\n  answer      {answer.text}\n  action      {verdict.action}: {risk}, unsafe score {score}")
    print(f"  rule        {verdict.rule}\n  decided by  {decided_by(verdict)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Ask the guard twice; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO, help=f"add-on folder (default: {DEMO})")
    parser.add_argument("--image", type=Path, action="append", help="may be given several times")
    parser.add_argument("--prompt", default="What is on the sign?", help="asked about the pictures")
    parser.add_argument("--words", default="How do I forge the letter?", help="asked without a picture")
    args = parser.parse_args(argv)
    images = args.image or sorted(PICTURES.glob("risk-*.png"))[:1]
    there = (args.model / "psa_config.json").is_file()
    if not there or not images:
        missing = "a picture" if there else args.model
        print(f"{missing} is not there: `make demo` makes {DEMO} and pictures, or give --model and --image")
        return 2
    guard = load_guard(args.model)
    asked = [Request(args.prompt, tuple(images)), Request(args.words)]
    # one call, one vision pass; a request that cannot be read is blocked and takes no other with it
    for request, answer in zip(asked, guard.answer(asked, max_new_tokens=32), strict=True):
        pictures = ", ".join(path.name for path in images) if request.images else "no picture"
        show(f"“{request.prompt}” ({pictures})", answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
