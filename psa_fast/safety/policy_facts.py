"""What a policy does, as a table for programs and in plain words; nothing is read and no model asked."""

from __future__ import annotations

import json
from typing import Any

from psa_fast.safety.policy import Action, Policy


def policy_facts(policy: Policy) -> dict[str, Any]:
    """What a policy does with every type and level, and with what is not read, as plain JSON values."""
    calibration, taxonomy = policy.calibration, policy.taxonomy
    return {
        "sha256": policy.hash,
        "version": policy.version,
        "rows": [_row(policy, kind, level) for kind in taxonomy.risks for level in taxonomy.levels[1:]],
        "not_read": {"action": policy.on_error, "says": policy.responses.unchecked if _blocks(policy) else None},
        "unreadable": {"action": "block", "says": policy.responses.unchecked},
        "memory": None if policy.memory is None else policy.memory.model_dump(),
        "calibration": None if calibration is None else calibration.model_dump() | {"promise": calibration.promise},
    }


def _row(policy: Policy, kind: str, level: str) -> dict[str, Any]:
    """One type and level: whether it is on, from which unsafe score it counts, what is done and said then."""
    on = policy.types[kind]
    action: Action = policy.levels[level].action if on else "allow"
    says = policy.hint(kind, level) if action == "hint" else None
    if action in ("refuse", "block"):
        says = getattr(policy.responses, action).format(type=kind)
    return {
        "type": kind,
        "level": level,
        "on": on,
        "threshold": policy.threshold(policy.taxonomy.type_id(kind)),
        "action": action,
        "says": says,
    }


def _blocks(policy: Policy) -> bool:
    return policy.on_error == "block"


def policy_in_words(policy: Policy) -> list[str]:
    """What a policy does, a sentence a line."""
    taxonomy = policy.taxonomy
    risk = f"max(1 - p({taxonomy.types[taxonomy.harmless]}), 1 - p({taxonomy.levels[0]}))"
    if policy.type_thresholds is None:
        lines = [f"A request is unsafe where its unsafe score is at least {policy.unsafe_threshold:g}."]
    else:
        lines = ["A request is unsafe where its unsafe score is at least the threshold of its likeliest risk:"]
        lines += [f"  {kind}: {value:g}" for kind, value in policy.type_thresholds.items() if policy.types[kind]]
    lines.append(
        f"The score is {risk}, so that either head alone is enough; the strictest of all readings of a request decides."
    )
    if off := [kind for kind in taxonomy.risks if not policy.types[kind]]:
        lines.append(f"Switched off, so allowed, with their part of the risk: {', '.join(off)}.")
    if on := [kind for kind in taxonomy.risks if policy.types[kind]]:
        lines.append(f"For {', '.join(on)} the likeliest level says what is done:")
        lines += [f"  {level}: {_deed(policy, level)}" for level in taxonomy.levels[1:]]
    if policy.memory is not None:
        decay, limit, level = policy.memory.decay, policy.memory.threshold, policy.memory.level
        lines.append(
            f"Over the user's turns the scores of their words add up, each turn multiplying what was before it by "
            f"{decay:g}; from {limit:g} on that is a risk of level {level}."
        )
    said = json.dumps(policy.responses.unchecked, ensure_ascii=False)
    not_read = f"blocked with {said}" if _blocks(policy) else "answered unread"
    lines.append(f"What the concept head does not read (on_error) is {not_read}.")
    lines.append(f"What cannot be read at all, and what gives no number, is blocked with {said}.")
    if policy.calibration is None:
        lines.append("It is not calibrated: its thresholds promise nothing.")
    else:
        addon = policy.calibration.addon_sha256[:12]
        lines.append(f"It is calibrated on the add-on of sha256 {addon}: {policy.calibration.promise}.")
    return lines


def _deed(policy: Policy, level: str) -> str:
    rule = policy.levels[level]
    if rule.action == "allow":
        return "allow: the language model answers the request as it is"
    if rule.action == "hint":
        return f"hint: {json.dumps(rule.hint, ensure_ascii=False)} is put before the request, then it is answered"
    said = json.dumps(getattr(policy.responses, rule.action), ensure_ascii=False)
    return f"{rule.action}: the answer is {said}; the language model is not asked"
