"""Which rows of a global batch share a micro-batch: even token sums, a function of the rows' lengths alone."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

#: a slot while it is being filled: its sum of lengths and its rows
_Slot = tuple[int, tuple[int, ...]]


def even_slots(lengths: Sequence[int], slots: int, rows_per_slot: int | None = None) -> list[list[int]]:
    """Rows in `slots` lists with nearly equal sums of lengths, the largest sum first.

    Largest differencing (Karmarkar and Karp 1982): of the partial solutions the two whose slots differ most are joined,
    the largest slots of one with the smallest of the other, until one is left. With `rows_per_slot` each begins with
    one row in every slot, so all slots end with the same number of rows (Michiels, Korst, Aarts, van Leeuwen 2003).

    Args:
        lengths: tokens of each row, positive.
        slots: how many lists.
        rows_per_slot: rows of each; None: as many as it takes, at least one.

    Returns: indices into `lengths`, ascending in each slot.

    Raises ValueError if there are fewer rows than slots, or not slots x rows_per_slot of them.
    """
    if len(lengths) < slots or rows_per_slot not in (None, len(lengths) / slots):
        each = "at least one row" if rows_per_slot is None else f"{rows_per_slot} rows"
        raise ValueError(f"{len(lengths)} rows cannot give {each} to each of {slots} slots")
    single: list[_Slot] = [(n, (i,)) for i, n in enumerate(lengths)]
    longest_first = sorted(single, key=lambda slot: (-slot[0], slot[1]))
    width = 1 if rows_per_slot is None else slots
    parts = [longest_first[first : first + width] for first in range(0, len(lengths), width)]
    # the number tells equal differences apart, so that ties fall alike everywhere
    heap = [(-_difference(part, slots), number, part) for number, part in enumerate(parts)]
    heapq.heapify(heap)
    for number in range(len(parts), 2 * len(parts) - 1):
        (_, _, a), (_, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        joined = _join(a, b, slots)
        heapq.heappush(heap, (-_difference(joined, slots), number, joined))
    return [sorted(rows) for _, rows in heap[0][2]]


def slots_within(lengths: Sequence[int], budget: int, world_size: int) -> list[list[int]]:
    """`even_slots` of the smallest multiple of `world_size` slots whose sums all stay within `budget`.

    Raises ValueError for a row longer than the budget.
    """
    if max(lengths) > budget:
        raise ValueError(f"a row has {max(lengths)} tokens, more than the {budget} of a micro-batch")
    # no two rows over half the budget can share a slot
    least = max(-(-sum(lengths) // budget), sum(2 * n > budget for n in lengths), 1)
    for count in range(-(-least // world_size) * world_size, len(lengths) + 1, world_size):
        slots = even_slots(lengths, count)
        if sum(lengths[i] for i in slots[0]) <= budget:
            return slots
    raise ValueError(f"{len(lengths)} rows do not divide over {world_size} ranks")


def deal(slots: Sequence[list[int]], rank: int, world_size: int) -> list[list[int]]:
    """One rank's slots, a micro-step after the other. `slots`, by size, are dealt `world_size` at a time.

    The ranks so run neighbours in size at the same time, and the order turns round every time, or one rank would get
    the larger one in every micro-step.
    """
    places = (rank, world_size - 1 - rank)
    return [slots[first + places[turn % 2]] for turn, first in enumerate(range(0, len(slots), world_size))]


def _difference(part: list[_Slot], slots: int) -> int:
    """Largest sum less smallest; a slot that is not there yet is empty."""
    return part[0][0] - (part[-1][0] if len(part) == slots else 0)


def _join(a: list[_Slot], b: list[_Slot], slots: int) -> list[_Slot]:
    """Both by size: b's largest go to a's empty slots, the next to a's smallest, and so on."""
    free = slots - len(a)
    joined = a + b[:free]
    for at, (total, rows) in zip(range(len(a) - 1, -1, -1), b[free:], strict=False):
        joined[at] = (a[at][0] + total, a[at][1] + rows)
    joined.sort(key=lambda slot: (-slot[0], slot[1]))
    return joined
