"""Who writes the answers that the policy lets be written: the guarded model itself, or another process in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from psa_fast.data.chat import Encoded
from psa_fast.data.records import Turn
from psa_fast.data.template import stop_token_ids
from psa_fast.safety.reading import take


class Generated(NamedTuple):
    """A text of the language model, with the fields of `Answer`."""

    text: str
    prompt_tokens: int
    new_tokens: int
    complete: bool


class Job(NamedTuple):
    """An answer to write: its prompt, the turns and the hint that it is made of, its images' places in the features."""

    prompt: Encoded
    turns: tuple[Turn, ...]
    hint: str | None
    images: list[int]


class Writer(Protocol):
    """Writes answers greedily."""

    def write(self, jobs: Sequence[Job], features: Any, max_new_tokens: int) -> list[Generated]:
        """One answer for each job, in their order; `features` are of all images of the batch, None without any."""


class OwnWriter:
    """The guarded model's own language model.

    Args:
        model: a PsaVLM or PlainVLM.
        processor: the model's.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.tokenizer = model, processor.tokenizer
        self.stop_ids = stop_token_ids(processor)

    def write(self, jobs: Sequence[Job], features: Any, max_new_tokens: int) -> list[Generated]:
        """See `Writer`."""
        pad_id = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        device = next(self.model.parameters()).device
        ids = pad([job.prompt.input_ids for job in jobs], pad_id, "left", device)
        images = [image for job in jobs for image in job.images]
        new_ids = self.model.generate(
            input_ids=ids,
            attention_mask=pad([[1] * len(job.prompt.input_ids) for job in jobs], 0, "left", device),
            features=take(features, images) if images else None,
            image_counts=torch.tensor([len(job.images) for job in jobs], device=device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad_id,
            eos_token_id=self.stop_ids,
        )
        texts = self.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        generated = []
        for text, new, job in zip(texts, new_ids.tolist(), jobs, strict=True):
            end = next((place for place, token in enumerate(new, 1) if token in self.stop_ids), None)
            generated.append(Generated(text.strip(), len(job.prompt.input_ids), end or len(new), end is not None))
        return generated


def pad(rows: Sequence[Sequence[int]], value: int, side: str, device: torch.device) -> torch.Tensor:
    """The rows as int64 [rows, longest], filled up on one side."""
    longest = max(map(len, rows))
    filled = [
        [*row, *[value] * (longest - len(row))] if side == "right" else [*[value] * (longest - len(row)), *row]
        for row in rows
    ]
    return torch.tensor(filled, dtype=torch.int64, device=device)
