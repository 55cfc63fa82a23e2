"""Which rows run together, where and when: the micro-batches of each rank, from any step on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

import torch

from psa_fast.compat.torch import end_workers
from psa_fast.data import GlobalBatchSampler, PsaDataset, collate, pack
from psa_fast.training.config import TrainConfig
from psa_fast.training.slots import deal, even_slots, slots_within

Row = tuple[int, int]


class Schedule(torch.utils.data.Sampler):
    """One rank's micro-batches as lists of (index, epoch). A step's depend on nothing but its rows and their lengths.

    Args:
        sampler: the global batches.
        config: `micro_batch_size` and `max_tokens_per_micro_batch`.
        rank: whose micro-batches.
        world_size: ranks.
        start: the first step, from 0.
        stop: the step after the last.
        length: index, epoch -> tokens of that row; None cuts each global batch into consecutive rows.
    """

    def __init__(
        self,
        sampler: GlobalBatchSampler,
        config: TrainConfig,
        rank: int,
        world_size: int,
        start: int,
        stop: int,
        length: Callable[[int, int], int] | None = None,
    ):
        self.sampler, self.rank, self.world_size, self.start, self.stop = sampler, rank, world_size, start, stop
        self.micro_batch_size, self.budget = config.micro_batch_size, config.max_tokens_per_micro_batch
        self.length = length

    def __iter__(self) -> Iterator[list[Row]]:
        for step in range(self.start, self.stop):
            yield from self.micro_batches(step)

    def micro_batches(self, step: int) -> list[list[Row]]:
        """The rows of each micro-batch of a step; every rank has equally many micro-batches, none is empty."""
        rows, micro = self.sampler.batch(step), self.micro_batch_size
        if self.length is None:
            own = range(self.rank * micro, len(rows), micro * self.world_size)
            return [rows[first : first + micro] for first in own]
        lengths = [self.length(*row) for row in rows]
        if self.budget is None:
            slots = even_slots(lengths, len(rows) // micro, micro)
        else:
            slots = slots_within(lengths, self.budget, self.world_size)
        return [[rows[i] for i in slot] for slot in deal(slots, self.rank, self.world_size)]


def needs_lengths(config: TrainConfig) -> bool:
    """Whether rows are assigned by their tokens; `micro_batch_size` is at most a rank's share (`accumulation_steps`).

    Not for padded rows, whose work is not their tokens, nor without the language model, where an image costs the same
    beside any text; and one micro-batch a step leaves nothing to assign.
    """
    several = config.max_tokens_per_micro_batch is not None or config.micro_batch_size < config.global_batch_size
    return config.packing and config.runs_language_model and several


def micro_batches(
    dataset: PsaDataset, schedule: Schedule, config: TrainConfig, processor: Any
) -> Generator[list[dict], None, None]:
    """For each step of the schedule the list of its collated micro-batches. `close` it to end the loader's workers."""
    tokenizer = processor.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows_together = pack if config.packing else partial(collate, pad_token_id=pad)
    workers = config.dataloader_num_workers > 0
    loader: Any = iter(
        torch.utils.data.DataLoader(
            _Refusals(dataset) if workers else dataset,
            batch_sampler=schedule,
            collate_fn=partial(_collate_or_refuse, rows_together) if workers else rows_together,
            num_workers=config.dataloader_num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_loop,
            # its own generator: drawing worker seeds from the global one would shift a resumed run's dropout
            generator=torch.Generator().manual_seed(config.seed),
        )
    )
    try:
        for step in range(schedule.start, schedule.stop):
            found = [next(loader) for _ in schedule.micro_batches(step)]
            for batch in found:
                if isinstance(batch, Exception):
                    raise batch
            yield found
    finally:
        # an exception's traceback keeps the loader alive, and python's exit would wait for workers that ignore SIGTERM
        if workers:
            end_workers(loader)


class _Refusals(torch.utils.data.Dataset):
    """A dataset that returns what it refuses, as an error: raised in a worker, its message would hold a traceback."""

    def __init__(self, dataset: PsaDataset):
        self.dataset = dataset

    def __getitem__(self, row: Row) -> Any:
        try:
            return self.dataset[row]
        except ValueError as error:
            return ValueError(str(error))  # of a class whose pickle can be read, whatever the error's own needs
        except OSError as error:
            return OSError(*(error.args if error.filename is None else (error.errno, error.strerror, error.filename)))


def _collate_or_refuse(rows_together: Callable[[list], dict], rows: list) -> Any:
    return next((row for row in rows if isinstance(row, Exception)), None) or rows_together(rows)


def _leave_signals_to_the_loop(worker: int) -> None:
    """A signal to the whole process group must not take the data away before the loop has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
