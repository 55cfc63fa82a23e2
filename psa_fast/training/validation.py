"""Evaluation during training: the same forwards on any number of ranks, and a training that does not notice them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, Protocol

import torch
import torch.distributed as dist

from psa_fast.data.overlap import shared_records
from psa_fast.data.records import Record
from psa_fast.models import PsaVLM

from .config import TrainConfig
from .ranks import gathered

Figures = Mapping[str, "float | None"]


class Validation(Protocol):
    """A fixed evaluation in batches, which the ranks share.

    Attributes:
        records: what is asked.
        digest: their fingerprint.
        batches: how many there are; what one holds depends on nothing but the records.
        defined: the figures that have a value on these records.
    """

    records: Sequence[Record]
    digest: str
    batches: int
    defined: frozenset[str]

    def check(self, processor: Any, commit: str | None) -> None:
        """Raise ValueError for records that the base cannot be asked; `commit` is that of a base on the hub."""

    def answer(self, model: PsaVLM, processor: Any, batch: int) -> list[Any]:
        """The results of one batch, in the records' order; the model is in evaluation mode afterwards."""

    def figures(self, results: list[Any]) -> Figures:
        """All results to figures by name; None for one that they leave undefined."""


def check_validation(config: TrainConfig, validation: Validation, processor: Any, commit: str | None) -> None:
    """Refuse what `--eval_every` and `--keep_best` could not do, before a model is loaded.

    Raises:
        ValueError: rows that cannot be asked, or a figure that has no value on them.
    """
    validation.check(processor, commit)
    if config.keep_best is not None and config.keep_best not in validation.defined:
        raise ValueError(
            f"--keep_best {config.keep_best} has no value on the rows of --eval_data_path {config.eval_data_path}; "
            f"they have {', '.join(sorted(validation.defined)) or 'none'}"
        )


def overlap_warning(config: TrainConfig, validation: Validation, trained_on: Sequence[Record]) -> str | None:
    """What of the evaluation's rows is trained on, as a sentence; None where nothing is. No image is opened."""
    same_folder = config.eval_image_folder in (None, config.image_folder)
    shared = shared_records(trained_on, validation.records, same_folder)
    if not shared:
        return None
    return (
        f"warning: --eval_data_path {config.eval_data_path} shares with the rows that are trained on: "
        f"{shared.requests} request(s), the images of {shared.images} row(s), the twins of {shared.twins} "
        f"(first: {shared.example}); its figures flatter the model. psa-fast data overlap names all of them"
    )


def validate(engine: Any, validation: Validation, processor: Any) -> Figures:
    """The figures of the weights as they are, on every rank. A collective.

    Batches are dealt to ranks whole, so the figures are the same on any number of ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with _undisturbed(engine.module, engine.device):
        own = [
            (batch, validation.answer(engine.module, processor, batch))
            for batch in range(rank, validation.batches, world_size)
        ]
    found = sorted(gathered(own), key=itemgetter(0))
    return validation.figures([result for _, results in found for result in results])


@contextmanager
def _undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Context after which each module's mode and torch's random state are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
