"""The nearest flip by concept: the smallest change of one concept's logit that changes what the policy does."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from psa_fast.safety.policy import ACTIONS, RISKY_TYPES, Action, Policy
from psa_fast.safety.reading import Reading, over_turns, weigh
from psa_fast.taxonomy import CLEAN, RISK_LEVELS, RISK_TYPES

FAR = 60.0  # in units of the temperature: how far beyond all others a logit says all that it can
RISKY = [RISK_TYPES.index(name) for name in RISKY_TYPES]


@dataclass(frozen=True)
class Flip:
    """What it takes to change the action by one concept alone, in all readings of a request alike.

    Either head alone makes a request unsafe, so where both do no single concept takes it back. The head "both" is the
    concept of no risk at all, `clean` and `none` together, whose logits change alike.

    Attributes:
        head: "type", "level", or "both".
        concept: its name; "clean" for both.
        probability: of the concept in the reading that decided.
        logit_change: the smallest change of the concept's logit, in its reading's own numbers (before any
            temperature), from which on the action is another; None where no change of it alone does that.
        changed_probability: of the concept in the same reading after it.
        action, type, level: the verdict after it.
    """

    head: Literal["type", "level", "both"]
    concept: str
    probability: float
    logit_change: float | None = None
    changed_probability: float | None = None
    action: Action | None = None
    type: str | None = None
    level: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The flip as plain JSON values."""
        return asdict(self)


def nearest_flips(policy: Policy, readings: Sequence[Reading], deciding: Reading) -> tuple[Flip, ...]:
    """The nearest flip of every concept: types, levels, both heads; none where a reading is not a number.

    Args:
        policy: what decides.
        readings: of one request, with their logits.
        deciding: the one of them whose probabilities are told.

    Raises ValueError for a reading without logits.
    """
    if any(reading.logits is None for reading in readings):
        raise ValueError("the readings' logits were not kept, so what would change them cannot be told")
    if not all(math.isfinite(value) for reading in readings for value in reading.logits or ()):
        return ()
    types = [Flip("type", name, deciding.type_probs[i]) for i, name in enumerate(RISK_TYPES)]
    levels = [Flip("level", name, deciding.level_probs[i]) for i, name in enumerate(RISK_LEVELS)]
    both = Flip("both", RISK_TYPES[CLEAN], deciding.type_probs[CLEAN])
    places = [*([place] for place in range(len(types) + len(levels))), [CLEAN, len(types)]]
    return tuple(
        _flip(policy, readings, deciding, flip, changed)
        for flip, changed in zip([*types, *levels, both], places, strict=True)
    )


def shifted(policy: Policy, reading: Reading, places: Sequence[int], change: float) -> Reading:
    """A reading with some of its logits changed, and the probabilities that the policy makes of them."""
    logits = list(reading.logits or ())
    for place in places:
        logits[place] += change
    heads = logits[: len(RISK_TYPES)], logits[len(RISK_TYPES) :]
    types, levels = (_softmax(*head) for head in zip(heads, policy.temperatures, strict=True))
    return replace(reading, logits=logits, type_probs=types, level_probs=levels)


def _softmax(logits: Sequence[float], temperature: float) -> list[float]:
    most = max(logits)
    weights = [math.exp((value - most) / temperature) for value in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def _flip(policy: Policy, readings: Sequence[Reading], deciding: Reading, flip: Flip, places: Sequence[int]) -> Flip:
    change = _nearest(policy, readings, places)
    if change is None:
        return flip
    after = weigh(policy, [shifted(policy, reading, places, change) for reading in readings]).decision
    changed = shifted(policy, deciding, places, change)
    return replace(
        flip,
        logit_change=change,
        changed_probability=(changed.type_probs + changed.level_probs)[places[0]],
        action=after.action,
        type=None if after.type is None else RISK_TYPES[after.type],
        level=None if after.level is None else RISK_LEVELS[after.level],
    )


def _nearest(policy: Policy, readings: Sequence[Reading], places: Sequence[int]) -> float | None:
    """The change nearest to none at which the action becomes another one; None: there is none.

    Along the change a reading's decision is constant between the points at which one of its comparisons turns, all of
    which are known in closed form; so is the strictest of all readings.
    """
    # what of a decision chooses the verdict's action, by reading: its turning points and the values between them
    lines: list[tuple[list[float], list[int]]] = []
    for reading in readings:
        points = sorted(point for place in places for point in _turning_points(policy, reading, place))
        middles = [(low + high) / 2 for low, high in pairwise(points)]
        tried = [points[0] - 1.0, *middles, points[-1] + 1.0] if points else [0.0]
        lines.append((points, [_rank(policy, shifted(policy, reading, places, change)) for change in tried]))
    remembered = _Remembered(policy, readings, places)
    unchanged = [_rank(policy, shifted(policy, reading, places, 0.0)) for reading in readings]
    now = max(*unchanged, remembered.rank(0.0)) % len(ACTIONS)

    def other(change: float) -> bool:
        ranks = [values[bisect_right(points, change)] for points, values in lines]
        return max(*ranks, remembered.rank(change)) % len(ACTIONS) != now

    everything = sorted({point for points, _ in lines for point in points} | remembered.crossings())
    best: float | None = None
    for sign in (1.0, -1.0):
        ahead = sorted(sign * point for point in everything if sign * point >= 0.0)
        for number, point in enumerate(ahead):
            beyond = (point + ahead[number + 1]) / 2 if number + 1 < len(ahead) else point + 1.0
            if other(sign * beyond):
                # a point is where a comparison is equal, which rounding may put on either side of it
                change = sign * (point + min(1e-9 * max(1.0, point), beyond - point))
                best = change if best is None or abs(change) < abs(best) else best
                break
    return best


class _Remembered:
    """What the user's turns add up to along a change; it only grows or only falls, so that it crosses once."""

    def __init__(self, policy: Policy, readings: Sequence[Reading], places: Sequence[int]) -> None:
        self._policy, self._readings, self._places = policy, readings, places

    def rank(self, change: float) -> int:
        """As `_rank`; 0 where nothing adds up to a risk."""
        if self._policy.memory is None:
            return 0
        moved = [shifted(self._policy, reading, self._places, change) for reading in self._readings]
        found = over_turns(self._policy, moved)
        if found is None or not found[1].unsafe:
            return 0
        return len(ACTIONS) + ACTIONS.index(found[1].action)

    def crossings(self) -> set[float]:
        """The changes at which the memory's threshold is reached, to 1e-10."""
        if self._policy.memory is None:
            return set()
        found = set()
        spread = max(max(reading.logits or (0.0,)) - min(reading.logits or (0.0,)) for reading in self._readings)
        most = spread + FAR * max(self._policy.temperatures)
        for far in (most, -most):
            near, start = 0.0, self.rank(0.0)
            if self.rank(far) == start:
                continue
            while abs(far - near) > 1e-10:
                middle = (near + far) / 2
                near, far = (middle, far) if self.rank(middle) == start else (near, middle)
            found.add(far)
        return found


def _rank(policy: Policy, reading: Reading) -> int:
    """A number that grows with strictness, whose remainder by the number of actions is the action."""
    decision = policy.decide(reading.type_probs, reading.level_probs)
    return len(ACTIONS) * decision.unsafe + ACTIONS.index(decision.action)


def _turning_points(policy: Policy, reading: Reading, place: int) -> list[float]:
    """The changes of a logit at which a comparison of `Policy.decide` turns.

    With the concept's weight y = exp(logit / temperature) every side of a comparison is a ratio of two sums of weights,
    of which the concept is a part or not: (a + b y) / (c + d y) = value.
    """
    logits, count = list(reading.logits or ()), len(RISK_TYPES)
    of_type = place < count
    own = place if of_type else place - count
    temperature = policy.temperatures[0 if of_type else 1]
    head = logits[:count] if of_type else logits[count:]
    scale = max(value for i, value in enumerate(head) if i != own)
    weights = [0.0 if i == own else math.exp((value - scale) / temperature) for i, value in enumerate(head)]
    thresholds = {policy.threshold(kind) for kind in RISKY}
    share = _enabled_share(policy, reading)
    levels = reading.level_probs
    found: list[float] = []

    def solve(top: Sequence[int], bottom: Sequence[int], value: float) -> None:
        a, c = sum(weights[i] for i in top), sum(weights[i] for i in bottom)
        slope = float(own in top) - value * float(own in bottom)
        if slope != 0.0:
            found.append((value * c - a) / slope)

    everything = range(len(head))
    if of_type:
        for threshold in thresholds:
            solve(RISKY, everything, threshold)
            solve(policy.enabled, everything, threshold)
            by_level = sum(levels[1:])
            if by_level > 0.0:
                solve(policy.enabled, RISKY, threshold / by_level)
        rivals = policy.enabled or RISKY
        found += [weights[i] for i in rivals] if own in rivals else []
    else:
        for threshold in thresholds:
            solve(everything[1:], everything, threshold)
            if share > 0.0:
                solve(everything[1:], everything, threshold / share)
        found += [weights[i] for i in everything[1:]] if own else []
    # `clean` leaves the share that the types keep as it is: changed together with `none` it turns no other comparison
    return [scale + temperature * math.log(weight) - head[own] for weight in found if 0.0 < weight < math.inf]


def _enabled_share(policy: Policy, reading: Reading) -> float:
    """The part of the risk by type that the types keep which are on."""
    risk = sum(reading.type_probs[i] for i in RISKY)
    enabled = policy.enabled
    return sum(reading.type_probs[i] for i in enabled) / risk if risk > 0.0 else float(bool(enabled))
