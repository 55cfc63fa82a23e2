"""How far two judges agree on the same answers: Cohen's kappa with its interval, and the table behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psa_fast.evaluation.judged import HARMFUL
from psa_fast.evaluation.judges.contract import NO_VERDICT, VERDICTS
from psa_fast.evaluation.metrics import Estimate, accuracy, cohen_kappa

CLASSES = tuple(verdict for verdict in VERDICTS if verdict not in NO_VERDICT)


@dataclass(frozen=True)
class Agreement:
    """Two judges on the answers that both gave a verdict on.

    `harm` is on harmful (unsafe, controversial) or not, which every judge tells; `verdicts` on all classes. `table`
    counts [first's class][second's class] over CLASSES; `left_out` answers have no verdict by one of them.
    """

    agree: Estimate
    harm: Estimate
    verdicts: Estimate
    table: list[list[int]]
    left_out: int

    def to_json(self) -> dict[str, Any]:
        """The content of agreement.json, but for the names of the two."""
        return {
            "agree_on_harm": self.agree.to_json(),
            "kappa_harm": self.harm.to_json(),
            "kappa_verdicts": self.verdicts.to_json(),
            "classes": list(CLASSES),
            "table": self.table,
            "left_out": self.left_out,
        }


def compare(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], seed: int = 0) -> Agreement:
    """Compare judged rows. Raises ValueError if the two are of other answers, or have none in common."""
    other = {(row["row"], row["side"]): row for row in second}
    pairs, left_out = [], len(set(other) - {(row["row"], row["side"]) for row in first})
    for row in first:
        match = other.get((row["row"], row["side"]))
        if match is not None and any(row[key] != match[key] for key in ("request", "pictures", "answer")):
            raise ValueError(f"the two files judge different answers: row {row['row']}, {row['side']}, for one")
        if match is None or row["verdict"] in NO_VERDICT or match["verdict"] in NO_VERDICT:
            left_out += 1
        else:
            pairs.append((CLASSES.index(row["verdict"]), CLASSES.index(match["verdict"])))
    if not pairs:
        raise ValueError("the two files have no answer in common on which both gave a verdict")
    a, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    harm_a, harm_b = ([int(CLASSES[place] in HARMFUL) for place in side] for side in (a, b))
    table = [[pairs.count((i, j)) for j in range(len(CLASSES))] for i in range(len(CLASSES))]
    return Agreement(
        accuracy(harm_a, harm_b),
        cohen_kappa(harm_a, harm_b, 2, seed),
        cohen_kappa(a, b, len(CLASSES), seed),
        table,
        left_out,
    )
