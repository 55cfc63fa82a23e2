"""Setting, clearing or clipping a concept by hand: between what the concept head read and what the policy decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from psa_fast.files import shorten
from psa_fast.safety.policy import RISKY_LEVELS, RISKY_TYPES
from psa_fast.safety.reading import Reading
from psa_fast.taxonomy import CLEAN, RISK_LEVELS, RISK_TYPES

Kind = Literal["set", "clear", "clip"]


@dataclass(frozen=True)
class Intervention:
    """What is done by hand to every reading of a request before the policy decides.

    Attributes:
        kind: "set": the type, the level or both are certain. "clear": the type or level is not there; its probability
            goes to `clean` or `none`, and with a type the part of the level head's risk that is its share. Without
            either there is no risk at all. "clip": the same as far as `most` allows; without either the risk of each
            head, all of it, is at most that.
        type: a risk type's name, None for none.
        level: a risk level's name, None for none.
        most: of "clip", the largest probability.

    A reading that is not a number stays as it is. Raises ValueError for what does nothing or contradicts itself.
    """

    kind: Kind
    type: str | None = None
    level: str | None = None
    most: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"an intervention is set, clear or clip, not {shorten(self.kind, 40)}")
        for what, names in (("type", RISKY_TYPES), ("level", RISKY_LEVELS)):
            if (name := getattr(self, what)) is not None and name not in names:
                raise ValueError(f"{self.kind}: {what} is {shorten(name, 40)}; expected one of: {', '.join(names)}")
        if self.kind == "set" and self.type is None and self.level is None:
            raise ValueError("set: name the type, the level or both")
        if (self.kind == "clip") is (self.most is None):
            raise ValueError("clip needs the largest probability" if self.kind == "clip" else "only clip has one")
        if self.most is not None and (
            isinstance(self.most, bool) or not isinstance(self.most, int | float) or not 0.0 <= self.most < 1.0
        ):
            raise ValueError(f"clip: the largest probability is {shorten(self.most, 40)}; expected 0 or more, below 1")

    @classmethod
    def from_json(cls, value: Any) -> Intervention:
        """The intervention of {"kind", "type", "level", "most"}; all but the first may be left out or null.

        Raises ValueError for anything else.
        """
        names = ("kind", "type", "level", "most")
        if not isinstance(value, dict) or "kind" not in value or not set(value) <= set(names):
            raise ValueError(f"an intervention is an object with kind, type, level, most, not {shorten(value, 60)}")
        return cls(**value)

    def __str__(self) -> str:
        names = [f"{what} {name}" for what in ("type", "level") if (name := getattr(self, what)) is not None]
        return " ".join([self.kind, *(names or ["all risk"]), *([] if self.most is None else [f"{self.most:g}"])])

    def apply(self, readings: Sequence[Reading]) -> list[Reading]:
        """The readings with the concept set, cleared or clipped; their logits stay what was read."""
        return [self._apply(reading) for reading in readings]

    def _apply(self, reading: Reading) -> Reading:
        types, levels = list(reading.type_probs), list(reading.level_probs)
        if not all(map(math.isfinite, types + levels)):
            return reading
        if self.kind == "set":
            types = types if self.type is None else [float(name == self.type) for name in RISK_TYPES]
            levels = levels if self.level is None else [float(name == self.level) for name in RISK_LEVELS]
            return replace(reading, type_probs=types, level_probs=levels)
        most = 0.0 if self.most is None else self.most
        risky = [i for i in range(len(types)) if i != CLEAN]
        if self.type is None and self.level is None:
            _scale(types, risky, CLEAN, _factor(sum(types[i] for i in risky), most))
            _scale(levels, range(1, len(levels)), 0, _factor(sum(levels[1:]), most))
        if self.type is not None:
            kind = RISK_TYPES.index(self.type)
            share, factor = types[kind] / (sum(types[i] for i in risky) or 1.0), _factor(types[kind], most)
            _scale(levels, range(1, len(levels)), 0, 1.0 - share * (1.0 - factor))
            _scale(types, [kind], CLEAN, factor)
        if self.level is not None:
            level = RISK_LEVELS.index(self.level)
            _scale(levels, [level], 0, _factor(levels[level], most))
        return replace(reading, type_probs=types, level_probs=levels)


def _factor(probability: float, most: float) -> float:
    return 1.0 if probability <= most else most / probability


def _scale(probs: list[float], places: Sequence[int], rest: int, factor: float) -> None:
    """Multiply some probabilities; what they lose goes to `rest`."""
    before = sum(probs[i] for i in places)
    for i in places:
        probs[i] *= factor
    probs[rest] += before * (1.0 - factor)


def intervened(intervention: Intervention | None, readings: Sequence[Reading]) -> Sequence[Reading]:
    """The readings that the policy decides on."""
    return readings if intervention is None else intervention.apply(readings)
