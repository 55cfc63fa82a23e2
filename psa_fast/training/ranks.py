"""One error for all ranks: what rank 0 finds is raised on every rank, and printed once.

torch is imported where it is used: a mistyped option is answered without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

Found = TypeVar("Found")
_SHARED = "on_every_rank"


@contextmanager
def alike() -> Iterator[None]:
    """Context of code that every rank runs on the same options and files, so that all fail alike if one does."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        setattr(error, _SHARED, True)
        raise


def is_shared(error: BaseException) -> bool:
    """Return whether every rank raised this error, so that one of them may speak for all."""
    return bool(getattr(error, _SHARED, False))


def from_rank_0(work: Callable[[], Found]) -> Found:
    """Return on every rank what `work` returned on rank 0, the only one that calls it. A collective.

    Raises:
        ValueError, OSError: rank 0's, on every rank.
    """
    import torch.distributed as dist

    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            message[0] = work()
        except (ValueError, OSError) as error:
            message[1] = (isinstance(error, OSError), str(error))
    dist.broadcast_object_list(message)
    if message[1] is not None:
        is_os_error, text = message[1]
        with alike():
            raise OSError(text) if is_os_error else ValueError(text)
    return message[0]


def gathered(own: Sequence[Any]) -> list[Any]:
    """Return the items of all ranks, rank by rank, on every rank. A collective."""
    import torch.distributed as dist

    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, list(own))
    return [item for share in shares for item in share]
