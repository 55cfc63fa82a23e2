"""`psa-fast policy explain` tells in plain words what a policy does, or why it did it to a logged row or a reading."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from psa_fast.compat.argparse import Subcommands

if TYPE_CHECKING:
    from psa_fast.safety.explanation import Explanation
    from psa_fast.safety.policy import Policy
    from psa_fast.safety.verdict import Verdict


def register(subparsers: Subcommands) -> None:
    """Add `explain` to the subcommands of `policy`."""
    parser = subparsers.add_parser("explain", help="tell in plain words what a policy does, or why it did it")
    parser.add_argument("file", nargs="?", metavar="FILE", help="policy YAML (default: the shipped one)")
    parser.add_argument("--log", metavar="LOG", help="why it decided a row of a log of `psa-fast serve --audit`")
    parser.add_argument("--line", type=int, metavar="N", help="the row's line in --log, from 1")
    parser.add_argument(
        "--reading",
        metavar="FILE",
        help="what it does with a reading, and why: JSON with type_probs and level_probs, or with logits",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=explain_policy)


def explain_policy(args: argparse.Namespace) -> int:
    """Print what a policy does, or why. Raises ValueError, with a sentence, for what cannot be told."""
    from psa_fast.safety.policy import Policy
    from psa_fast.safety.policy_facts import policy_facts, policy_in_words

    if (args.log is None) is not (args.line is None):
        raise ValueError("--log LOG and --line N go together: one row of a log is explained")
    if args.line is not None and args.line < 1:
        raise ValueError(f"--line is {args.line}; expected at least 1")
    if args.log is not None and args.reading is not None:
        raise ValueError("give --log or --reading, not both")
    policy = Policy.load(args.file)
    if args.log is None and args.reading is None:
        lines = [f"policy {args.file or 'shipped'}, sha256 {policy.hash}", *policy_in_words(policy)]
        print(json.dumps(policy_facts(policy), indent=2, ensure_ascii=False) if args.json else "\n".join(lines))
        return 0
    found = _why(policy, args)
    print(json.dumps(found.to_json(), indent=2, ensure_ascii=False) if args.json else "\n".join(found.lines()))
    return 0


def _why(policy: Policy, args: argparse.Namespace) -> Explanation:
    from psa_fast.safety.explanation import explained, require_explainable

    require_explainable(policy)  # before numbers are read as those of other classes
    return explained(policy, _reading(policy, args.reading) if args.reading else _logged(policy, args.log, args.line))


def _logged(policy: Policy, log: str, line: int) -> Verdict:
    """The verdict of a line of a log, decided again under the policy, which must be the one that decided it."""
    from psa_fast.safety.redecide import redecide
    from psa_fast.serve.replay import read_log

    for number, verdict in read_log(log):
        if number == line:
            if verdict.policy_hash != policy.hash:
                told = f"decided by policy {str(verdict.policy_hash)[:12]}, not {policy.hash[:12]}"
                raise ValueError(f"{log}:{line}: {told}; give the file of that one")
            return redecide(policy, verdict)
    raise ValueError(f"{log}: line {line} holds no verdict that was applied (a shadow policy's is none)")


def _reading(policy: Policy, file: str) -> Verdict:
    """The verdict of one reading in a file. Raises ValueError, naming the file, for what is none."""
    import math

    from psa_fast.files import read_json
    from psa_fast.safety.reading import Reading, weigh
    from psa_fast.safety.verdict import read_verdict
    from psa_fast.taxonomy import RISK_LEVELS, RISK_TYPES

    given = read_json(file, "reading")
    heads = (("type", RISK_TYPES), ("level", RISK_LEVELS))
    try:
        if set(given) == {"logits"}:
            logits = _numbers(given["logits"], (*RISK_TYPES, *RISK_LEVELS), "logits")
        elif set(given) == {"type_probs", "level_probs"}:
            logits = []
            for (head, names), temperature in zip(heads, policy.temperatures, strict=True):
                probs = _numbers(given[f"{head}_probs"], names, f"{head}_probs")
                if min(probs) < 0.0 or abs(sum(probs) - 1.0) > 1e-3:
                    raise ValueError(f"{head}_probs are no {len(names)} probabilities that sum to 1")
                # a probability of 0 has no logit; this one is 0 beside any other
                logits += [temperature * math.log(max(p, 1e-300)) for p in probs]
        else:
            raise ValueError("it holds either logits, or type_probs and level_probs, and nothing else")
    except ValueError as error:
        raise ValueError(f"reading {file}: {error}") from None
    reading = Reading("prompt", [], [], logits=logits).under(policy.temperatures)
    weighed = weigh(policy, [reading])
    return read_verdict(*weighed, [reading])


def _numbers(value: Any, names: tuple[str, ...], key: str) -> list[float]:
    """As many finite numbers as there are names, from a list in their order or from an object by name."""
    import math

    if isinstance(value, dict):
        if set(value) != set(names):
            raise ValueError(f"{key} names other concepts than {', '.join(names)}")
        value = [value[name] for name in names]
    if not isinstance(value, list) or len(value) != len(names):
        raise ValueError(f"{key} is no list of {len(names)} numbers, or object with one for each concept")
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in value):
        raise ValueError(f"{key} holds what is no finite number")
    return [float(one) for one in value]
