"""Which records of an evaluation each of several ranks answers."""

from __future__ import annotations

from collections.abc import Sequence

from psa_fast.data.records import Record
from psa_fast.evaluation.evaluate import batches_of


def share_of(records: Sequence[Record], batch_size: int, rank: int, ranks: int) -> list[int]:
    """Places of the records that a rank answers, in order: every `ranks`-th batch of those that one rank would ask.

    What a record is answered depends, in the last digits, on the others of its batch. `run_stage` makes the same
    batches of a share as of the whole, so the answers do not depend on the number of ranks.
    """
    return sorted(place for batch in batches_of(records, batch_size)[rank::ranks] for place in batch)
