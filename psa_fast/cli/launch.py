"""Commands whose work is shared by the ranks of a launcher, `deepspeed --module psa_fast.cli ...` or torchrun."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

Found = TypeVar("Found")
_LONGEST = timedelta(days=30)  # that a rank waits for another one, which may have much to answer
_FIRST_SPEAKS = 30.0  # seconds that a silent rank waits for the launcher to end it


@dataclass(frozen=True)
class Ranks:
    """This process's number among those that share the work, and how many there are."""

    rank: int = 0
    size: int = 1

    def from_first(self, work: Callable[[], Found]) -> Found:
        """Return on every rank what `work` returned on the first, the only one that calls it. A collective.

        Raises:
            ValueError, OSError: the first rank's, on every rank.
        """
        if self.size == 1:
            return work()
        from psa_fast.training.ranks import from_rank_0

        with _others_alive() as own:
            return from_rank_0(own(work))

    def gathered(self, own: Sequence[Any]) -> list[Any]:
        """Return the items of all ranks, rank by rank. A collective. Raises OSError if a rank has ended."""
        if self.size == 1:
            return list(own)
        from psa_fast.training.ranks import gathered

        with _others_alive():
            return gathered(own)


def shared(work: Callable[[Ranks], int]) -> int:
    """Call `work` with the ranks that the launcher started, this process alone without one; returns the exit code.

    What the first rank finds wrong is said by it alone. Raises ValueError for variables that no launcher sets.
    """
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not 0 <= rank < size:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {size} in the environment; a launcher counts from 0")
    if size == 1:
        return work(Ranks())
    from psa_fast.training.ranks import is_shared

    try:
        with _group(rank):
            return work(Ranks(rank, size))
    except (ValueError, OSError) as error:
        if rank > 0 and is_shared(error):
            # the launcher kills all ranks as soon as one has ended: the one that speaks must be the first
            time.sleep(_FIRST_SPEAKS)
            return 2
        raise


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{name} is {text[:40]!r} in the environment; a launcher sets it to a number")
    return int(text)


@contextmanager
def _group(rank: int) -> Iterator[None]:
    """The process group of the ranks. Objects alone travel, so it needs no GPU; each rank computes on its own."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        local = _number("LOCAL_RANK", rank)
        if local >= torch.cuda.device_count():
            raise ValueError(f"rank {rank} has no GPU: there are {torch.cuda.device_count()} on its machine")
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("gloo", timeout=_LONGEST)
    except (dist.DistNetworkError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"the ranks cannot meet ({reason}); give the launcher another --master_port") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _others_alive() -> Iterator[Callable[[Callable[[], Found]], Callable[[], Found]]]:
    """Context of a collective: a rank that has ended is one sentence on the others.

    Yields what marks work of this rank's own within it, whose errors stay what they are.
    """
    ours: list[RuntimeError] = []

    def own(work: Callable[[], Found]) -> Callable[[], Found]:
        def watched() -> Found:
            try:
                return work()
            except RuntimeError as error:
                ours.append(error)
                raise

        return watched

    try:
        yield own
    except RuntimeError as error:
        if error in ours:
            raise
        raise ChildProcessError("another rank has ended, and this one cannot go on without it") from error
