"""Why the guard did what it did to a request: which reading, concept, rule and threshold, and what would change it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from psa_fast.safety.flips import Flip, nearest_flips
from psa_fast.safety.policy import Policy
from psa_fast.safety.reading import Reading, strictest_first
from psa_fast.safety.verdict import Verdict
from psa_fast.taxonomy import PSA, RISK_TYPES

if TYPE_CHECKING:
    from PIL import Image

    from psa_fast.safety.guard import Guard
    from psa_fast.safety.looking import Look
    from psa_fast.safety.request import Request

MOST_LOOKS = 6  # readings that are shown, the strictest ones


@dataclass(frozen=True)
class Explanation:
    """A verdict and what it rests on; one value for the command line, the server and the page.

    Attributes:
        verdict: what was decided.
        key: of the policy's file what the action follows from: "levels.high", "memory", "types.privacy", ...; None
            where no risk was found.
        threshold: what the unsafe score of the reading that decided, or the accumulated risk, was compared with; None
            where nothing was read.
        threshold_key: where it stands in the policy's file: "unsafe_threshold", "type_thresholds.privacy" or
            "memory.threshold".
        margin: the unsafe score less the threshold.
        heads: which heads reach the threshold by themselves: "type", "level".
        flips: what would have changed the action, by concept (`flips.nearest_flips`); none after an intervention.
        looks: where the strictest readings that were shown a picture looked, the one that decided first.
        seen: the request's pictures as the model saw them.
    """

    verdict: Verdict
    key: str | None = None
    threshold: float | None = None
    threshold_key: str | None = None
    margin: float | None = None
    heads: tuple[str, ...] = ()
    flips: tuple[Flip, ...] = ()
    looks: tuple[Look, ...] = ()
    seen: tuple[Image.Image, ...] = field(default=(), repr=False, compare=False)

    def to_json(self, cells: bool = True) -> dict[str, Any]:
        """The explanation as plain JSON values; `cells` False: without the numbers of every feature of a picture."""
        return {
            "verdict": self.verdict.to_json(),
            "key": self.key,
            "threshold": self.threshold,
            "threshold_key": self.threshold_key,
            "margin": self.margin,
            "heads": list(self.heads),
            "flips": [flip.to_json() for flip in self.flips],
        } | ({"looks": [asdict(look) for look in self.looks]} if cells else {})

    def lines(self) -> list[str]:
        """The explanation in plain words."""
        verdict = self.verdict
        found = [f"action: {verdict.action}, because {verdict.rule}"]
        if verdict.intervention is not None:
            found.append(f"by hand: {verdict.intervention}")
        if verdict.query is not None:
            found.append(f"read by: {reading_name(verdict)}")
        if verdict.type is not None and verdict.level is not None and verdict.unsafe:
            found.append(f"concept: {verdict.type}, level {verdict.level}")
        if self.key is not None:
            found.append(f"rule: {self.key} of the policy" + ("" if verdict.hint is None else f": {_quoted(verdict)}"))
        if self.margin is not None and self.threshold is not None:
            side = "above" if self.margin >= 0.0 else "below"
            score = (verdict.accumulated if verdict.code == "accumulated" else verdict.unsafe_score) or 0.0
            found.append(
                f"score: {score:.4f}, {abs(self.margin):.4f} {side} the threshold {self.threshold:g} "
                f"({self.threshold_key})" + (f", by the {' and the '.join(self.heads)} head" if self.heads else "")
            )
        return found + self._flip_lines()

    def _flip_lines(self) -> list[str]:
        near = sorted((flip for flip in self.flips if flip.logit_change is not None), key=_distance)
        lines = [
            f"  {_concept(flip)}: {flip.probability:.3g} -> {flip.changed_probability:.3g} "
            f"(logit {flip.logit_change:+.3f}): {flip.action}"
            + (f", {flip.type}, level {flip.level}" if flip.action != "allow" else "")
            for flip in near
        ]
        if lines:
            lines.insert(0, "another action, if one concept alone had been read otherwise (nearest first):")
        if none := [_concept(flip) for flip in self.flips if flip.logit_change is None]:
            lines.append(f"no change alone of these would have: {', '.join(none)}")
        return lines


def _concept(flip: Flip) -> str:
    return "no risk, by both heads" if flip.head == "both" else f"{flip.head} {flip.concept}"


def _distance(flip: Flip) -> float:
    return abs(flip.logit_change or 0.0)


def _quoted(verdict: Verdict) -> str:
    return json.dumps(verdict.hint, ensure_ascii=False)


def reading_name(reading: Reading | Verdict | Look) -> str:
    """Which reading it is, in words."""
    number = reading.number if not isinstance(reading, Verdict) else reading.query_number
    names = {"prompt": "the whole prompt", "neutral": "the learned query alone", "turn": "turn", "window": "window"}
    name = names[reading.query or "prompt"] + ("" if number is None else f" {number + 1}")
    if getattr(reading, "words_alone", False):
        return f"{name}, without any picture"
    return name if reading.picture is None else f"{name}, shown picture {reading.picture + 1} alone"


def require_explainable(policy: Policy) -> None:
    """Raise ValueError for a policy of another taxonomy than PSA's, whose decisions are not explained."""
    policy.require_taxonomy(PSA, "what explains a decision")


def explained(policy: Policy, verdict: Verdict) -> Explanation:
    """Explain a verdict of a policy without any model.

    Raises ValueError for a verdict of another policy, for one that was read but whose readings were not kept, and for
    another taxonomy than PSA's.
    """
    require_explainable(policy)
    if verdict.policy_hash is not None and verdict.policy_hash != policy.hash:
        raise ValueError(f"the verdict is of policy {verdict.policy_hash[:12]}, not of {policy.hash[:12]}")
    if verdict.code == "not_checked":
        return Explanation(verdict, "responses.unchecked")
    if verdict.code in ("no_image", "no_head"):
        return Explanation(verdict, "on_error")
    deciding, intervention = deciding_reading(verdict), verdict.intervention
    if verdict.code == "not_finite":
        return Explanation(verdict, "responses.unchecked")
    if intervention is not None:
        (deciding,) = intervention.apply([deciding])
    if policy.memory is not None and verdict.code == "accumulated":
        total, limit = verdict.accumulated or 0.0, policy.memory.threshold
        flips = () if intervention is not None else nearest_flips(policy, verdict.readings, deciding)
        return Explanation(verdict, "memory", limit, "memory.threshold", total - limit, flips=flips)
    kind = policy.likeliest_risk(deciding.type_probs)
    threshold, score = policy.threshold(kind), verdict.unsafe_score or 0.0
    of_type = policy.type_thresholds is not None
    risks = {"type": sum(deciding.type_probs[:-1]), "level": sum(deciding.level_probs[1:])}
    keys = {"unsafe": f"levels.{verdict.level}", "type_off": f"types.{verdict.type}"}
    return Explanation(
        verdict,
        keys.get(verdict.code),
        threshold,
        f"type_thresholds.{RISK_TYPES[kind]}" if of_type else "unsafe_threshold",
        score - threshold,
        tuple(name for name, risk in risks.items() if risk >= threshold),
        () if intervention is not None else nearest_flips(policy, verdict.readings, deciding),
    )


def deciding_reading(verdict: Verdict) -> Reading:
    """The reading that decided a verdict. Raises ValueError if it was not kept."""
    wanted = verdict.query, verdict.query_number, verdict.picture, verdict.words_alone
    for reading in verdict.readings:
        if (reading.query, reading.number, reading.picture, reading.words_alone) == wanted:
            return reading
    raise ValueError("the verdict's readings were not kept, so it cannot be explained")


def explain(guard: Guard, request: Request, verdict: Verdict | None = None) -> Explanation:
    """Explain what a guard says to a request; its language model writes nothing.

    Args:
        guard: with a concept head.
        request: what is asked.
        verdict: what the guard said of it, where that is known already.

    Raises ValueError for a guard without a concept head.
    """
    from psa_fast.safety.looking import looks
    from psa_fast.safety.overlay import pictures_seen

    if guard.policy is None:
        raise ValueError("this model has no concept head, so there is nothing to explain")
    if verdict is None:
        (verdict,) = guard.verdicts([request])
    found = explained(guard.policy, verdict)
    if not verdict.readings or verdict.code == "not_finite":
        return found
    order = _to_look_at(guard.policy, verdict)
    return replace(found, looks=tuple(looks(guard, request, order)), seen=pictures_seen(guard, request))


def _to_look_at(policy: Policy, verdict: Verdict) -> Sequence[Reading]:
    """The strictest readings with a picture, the one that decided first wherever it was shown one."""
    first = deciding_reading(verdict)
    others = [reading for reading in strictest_first(policy, verdict.readings) if reading != first]
    return [reading for reading in (first, *others) if not reading.words_alone][:MOST_LOOKS]
