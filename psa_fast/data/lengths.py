"""Whether every row can be encoded, and what `max_length` cuts: known before the first step, without any image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from psa_fast.data.chat import counts_by_size, fixed_placeholder
from psa_fast.data.dataset import PsaDataset
from psa_fast.data.records import Problem, Record


@dataclass
class RowCheck:
    """What `check_rows` found, by the rows' indices in the dataset.

    `problems` says why a row cannot be used in some epoch; `cut_answers` are the rows that lose supervised tokens to
    max_length, `cut_images` those that lose a picture and with it their concept label.
    """

    problems: dict[int, Problem] = field(default_factory=dict)
    cut_answers: set[int] = field(default_factory=set)
    cut_images: set[int] = field(default_factory=set)

    def update(self, other: RowCheck) -> None:
        """Add what was found of other rows, of another rank's share, say."""
        self.problems.update(other.problems)
        self.cut_answers |= other.cut_answers
        self.cut_images |= other.cut_images

    def cut_sentence(self, max_length: int | None) -> str | None:
        """What the user should know about the rows that are cut; None if none is."""
        rows = self.cut_answers | self.cut_images
        if not rows:
            return None
        parts = [f"{len(self.cut_answers)} lose the end of an answer"] if self.cut_answers else []
        parts += [f"{len(self.cut_images)} a picture and their concept label"] if self.cut_images else []
        return f"max_length {max_length} cuts {len(rows)} row(s): {', '.join(parts)}"


def check_rows(
    dataset: PsaDataset, indices: Iterable[int] | None = None, advance: Callable[[int], object] = lambda rows: None
) -> RowCheck:
    """Encode rows, with and without the hint that they may get, and count their tokens; no image is decoded.

    `dataset.lengths` then holds the lengths of all good rows. Ranks can share the work: each checks its own indices,
    then the lengths and the RowChecks are put together (`dict.update`, `RowCheck.update`).

    Args:
        dataset: the rows as training will read them.
        indices: of the rows to check; None: all.
        advance: called with the number of rows done.

    Raises:
        ValueError: for a processor that cannot tell an image's tokens without the image.
    """
    chosen = range(len(dataset)) if indices is None else list(indices)
    if not counts_by_size(dataset.processor) and any(dataset.records[index].images for index in chosen):
        fixed_placeholder(dataset.processor)
    found = RowCheck()
    first_of: dict[int, int] = {}  # balancing repeats records: each needs to be looked at once
    for index in chosen:
        record = dataset.records[index]
        first = first_of.setdefault(id(record), index)
        if first == index:
            _check(dataset, record, index, found)
        else:
            for rows in (found.cut_answers, found.cut_images):
                if first in rows:
                    rows.add(index)
            if first in found.problems:
                found.problems[index] = found.problems[first]
            for hinted in (False, True):
                if (first, hinted) in dataset.lengths:
                    dataset.lengths[index, hinted] = dataset.lengths[first, hinted]
        advance(1)
    return found


def _check(dataset: PsaDataset, record: Record, index: int, found: RowCheck) -> None:
    for hint in dataset.hints(index):
        try:
            row = dataset.without_images(index, hint)
        except ValueError as error:
            message = str(error).removeprefix(f"{record.where}: ")
            found.problems[index] = Problem(record.path, record.line, message)
            return
        if row.cut_answer:
            found.cut_answers.add(index)
        if row.cut_images:
            found.cut_images.add(index)
