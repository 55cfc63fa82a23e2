"""Which records a run sees, and in which order: both depend on the seed alone."""

from __future__ import annotations

import logging
import math
import random
from collections import defaultdict
from collections.abc import Sequence

from psa_fast.data.records import Record
from psa_fast.taxonomy import PSA

logger = logging.getLogger(__name__)

MAX_REPEATS = 4


def balance(
    records: Sequence[Record], clean_samples: int | None = None, seed: int = 0, max_repeats: int = MAX_REPEATS
) -> list[Record]:
    """A class-balanced choice of records, in random order; logs what it took.

    Every record of a risk type is kept. Types with fewer records than the largest one are filled up with repeats, each
    record at most `max_repeats` times in all. Of the clean records `clean_samples` are drawn (None: all; fewer if there
    are fewer). Records without a type stay as they are.
    """
    if clean_samples is not None and clean_samples < 0:
        raise ValueError(f"clean_samples is {clean_samples}; expected 0 or more")
    if max_repeats < 1:
        raise ValueError(f"max_repeats is {max_repeats}; expected 1 or more")
    rng = random.Random(f"balance {seed}")
    by_type: dict[int | None, list[Record]] = defaultdict(list)
    for record in records:
        by_type[record.safe_type].append(record)
    taxonomy = next((record.taxonomy for record in records), PSA)
    clean = by_type.pop(taxonomy.harmless, [])
    unlabelled = by_type.pop(None, [])
    largest = max(map(len, by_type.values()), default=0)

    wanted = len(clean) if clean_samples is None else clean_samples
    chosen = rng.sample(clean, min(wanted, len(clean)))
    if wanted > len(clean):
        logger.warning("balance: %d clean records wanted, only %d there; taking all of them", wanted, len(clean))
    logger.info("balance: %s: %d of %d", taxonomy.types[taxonomy.harmless], len(chosen), len(clean))
    for safe_type, group in sorted(by_type.items(), key=lambda entry: entry[0] or 0):
        target = min(largest, max_repeats * len(group))
        rounds, rest = divmod(target, len(group))
        chosen += group * rounds + rng.sample(group, rest)
        logger.info("balance: %s: %d from %d records", taxonomy.types[safe_type or 0], target, len(group))
    if unlabelled:
        logger.info("balance: without a type: all %d", len(unlabelled))
    chosen += unlabelled
    if not chosen:
        raise ValueError("no record is left after balancing; is clean_samples 0 and every record clean?")
    rng.shuffle(chosen)
    return chosen


class GlobalBatchSampler:
    """The global batch of any step, so that resuming needs the step number only.

    The rows are one endless stream: epoch after epoch, each a permutation of its own from (seed, epoch), cut into
    global batches. Every row comes once an epoch; a batch may hold the end of one epoch and the start of the next.
    """

    def __init__(self, n: int, global_batch: int, seed: int = 0) -> None:
        if n < 1 or global_batch < 1:
            raise ValueError(f"a sampler needs records and a batch size of at least 1, got {n} and {global_batch}")
        self.n, self.global_batch, self.seed = n, global_batch, seed
        self._orders: dict[int, list[int]] = {}

    def batch(self, step: int) -> list[tuple[int, int]]:
        """(index, epoch) of each row of global batch `step` (from 0): the keys that PsaDataset takes."""
        if step < 0:
            raise ValueError(f"step is {step}; expected 0 or more")
        first = step * self.global_batch
        positions = (divmod(position, self.n) for position in range(first, first + self.global_batch))
        return [(self._order(epoch)[offset], epoch) for epoch, offset in positions]

    def steps(self, epochs: float) -> int:
        """Global batches in `epochs` passes over the data; the last one is filled from the next epoch."""
        if not (epochs > 0 and math.isfinite(epochs)):
            raise ValueError(f"epochs is {epochs}; expected a finite number above 0")
        return -int(-epochs * self.n // self.global_batch)

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(self.n))
            random.Random(f"order {self.seed} {epoch}").shuffle(order)
            # a batch rarely spans more than two epochs; more orders would only cost memory
            self._orders = {old: kept for old, kept in self._orders.items() if old == epoch - 1} | {epoch: order}
        return self._orders[epoch]
