"""Records as model inputs: the dataset of encoded rows and their batches, padded or packed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from psa_fast.data.augment import AUGMENTATIONS, Augmentation, augment
from psa_fast.data.chat import Encoded, counted_images, counts_by_size, encode
from psa_fast.data.images import ImageError, load_image, resolve, upright_size
from psa_fast.data.labels import CONCEPT_LABELS
from psa_fast.data.records import Record
from psa_fast.pictures import join
from psa_fast.taxonomy import IGNORE_INDEX

HintFor = Callable[[int, int], "str | None"]
FeaturesOf = Callable[[Sequence[str]], torch.Tensor]


class PsaDataset(torch.utils.data.Dataset):
    """Encoded rows. A row depends on (seed, epoch, index) only, whichever worker or rank reads it.

    Args:
        records: validated records.
        image_folder: folder of their images.
        processor: the model's processor (see psa_fast.data.chat.encode).
        hint_for: (type id, level id) -> hint text or None, for labelled records.
        hint_rate: share of the labelled records whose prompt gets that hint; drawn anew in each epoch.
        seed: of the draw.
        max_length: longest row in tokens, images included.
        features_of: image paths of a record -> their vision features [n, S, Dv], n may be 0. The images are then not
            read; all images must have the same number of tokens.
        augmentation: random changes of the images, drawn anew in each epoch (augment.py).
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_folder: str | Path | None,
        processor: Any,
        hint_for: HintFor | None = None,
        hint_rate: float = 0.0,
        seed: int = 0,
        max_length: int | None = None,
        features_of: FeaturesOf | None = None,
        augmentation: Augmentation = "none",
    ) -> None:
        if augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation is {augmentation!r}; expected one of {', '.join(AUGMENTATIONS)}")
        if features_of is not None and augmentation != "none":
            raise ValueError("features that are already computed are those of unchanged images: no augmentation")
        if not 0.0 <= hint_rate <= 1.0:
            raise ValueError(f"hint_rate is {hint_rate}; expected a share between 0 and 1")
        if hint_rate and hint_for is None:
            raise ValueError(f"hint_rate is {hint_rate}, but there is no hint_for to take hints from")
        if image_folder is None and any(record.images for record in records):
            raise ValueError("the records name images, but no image folder was given")
        self.records = list(records)
        self.image_folder = image_folder
        self.processor = processor
        self.hint_for = hint_for
        self.hint_rate = hint_rate
        self.seed = seed
        self.max_length = max_length
        self.features_of = features_of
        self.augmentation: Augmentation = augmentation
        #: (index, with a hint?) -> tokens, as far as they have been counted
        self.lengths: dict[tuple[int, bool], int] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int], epoch: int = 0) -> Encoded:
        """The row of an index, or of the (index, epoch) that GlobalBatchSampler gives.

        Raises ValueError (ImageError for an image) that names the record's file and line.
        """
        if isinstance(index, tuple):
            index, epoch = index
        record = self.records[index]
        hint = self._hint(record, index, epoch)
        if self.features_of is not None:
            row = encode(record, self.processor, hint=hint, max_length=self.max_length)
            return replace(row, vision_features=self.features_of(record.images[: row.image_count]))
        try:
            images = [load_image(resolve(self.image_folder or "", name)) for name in record.images]
        except ImageError as error:
            raise ImageError(f"{record.where}: {error}") from error
        if self.augmentation != "none":
            # the seed's sign is its own entry: a generator takes no negative number
            rng = np.random.default_rng([abs(self.seed), self.seed < 0, epoch, index])
            images = [augment(image, self.augmentation, rng) for image in images]
        return encode(record, self.processor, images=images, hint=hint, max_length=self.max_length)

    def length(self, index: int, epoch: int = 0) -> int:
        """Tokens of `self[index, epoch]`, images and safety tokens included; of an image at most its header is read.

        Raises ValueError naming the record's file and line.
        """
        hint = self._hint(self.records[index], index, epoch)
        key = index, hint is not None
        return self.lengths[key] if key in self.lengths else len(self.without_images(index, hint).input_ids)

    def measure(self, index: int) -> None:
        """Count a row's tokens for all epochs: its text differs between them by the hint only."""
        for hint in self.hints(index):
            if (index, hint is not None) not in self.lengths:
                self.without_images(index, hint)

    def hints(self, index: int) -> list[str | None]:
        """Every hint that the row's prompt gets in some epoch; None stands for the prompt without one."""
        hint = self._any_hint(self.records[index]) if self.hint_rate > 0 else None
        if hint is None:
            return [None]
        return [hint] if self.hint_rate == 1 else [None, hint]

    def without_images(self, index: int, hint: str | None) -> Encoded:
        """The row with the given hint, its images known by their number or size only; `lengths` keeps its length."""
        record = self.records[index]
        images = None
        if record.images and counts_by_size(self.processor):
            try:
                sizes = [upright_size(resolve(self.image_folder or "", name)) for name in record.images]
                images = counted_images(sizes, self.processor)
            except ValueError as error:
                raise ImageError(f"{record.where}: {error}") from error
        row = encode(record, self.processor, images=images, hint=hint, max_length=self.max_length)
        self.lengths[index, hint is not None] = len(row.input_ids)
        return row

    def subset(self, indices: Sequence[int]) -> PsaDataset:
        """A dataset of some of the rows, in the order given, with the lengths that are known of them."""
        chosen = copy.copy(self)
        chosen.records = [self.records[index] for index in indices]
        chosen.lengths = {
            (new, hinted): self.lengths[old, hinted]
            for new, old in enumerate(indices)
            for hinted in (False, True)
            if (old, hinted) in self.lengths
        }
        return chosen

    def _any_hint(self, record: Record) -> str | None:
        if self.hint_for is None or record.safe_type is None or record.safe_level is None:
            return None
        return self.hint_for(record.safe_type, record.safe_level)

    def _hint(self, record: Record, index: int, epoch: int) -> str | None:
        hint = self._any_hint(record)
        if hint is None or random.Random(f"hint {self.seed} {epoch} {index}").random() >= self.hint_rate:
            return None
        return hint


def collate(
    items: Sequence[Encoded], pad_token_id: int, padding_side: Literal["left", "right"] = "right"
) -> dict[str, Any]:
    """Pad rows to one batch of PsaVLM.forward's arguments, plus "where": the rows' file:line.

    Returns input_ids, attention_mask, labels int64 [B, T], query_mask bool [B, T], pixel_values [N, 3, H, W], Pictures
    or None, image_counts and the CONCEPT_LABELS int64 [B], and where the family has them position_ids [P, B, T].
    """
    if not items:
        raise ValueError("a batch needs at least one row")
    if pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; set one (EOS will do: padding is masked)")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}; expected 'left' or 'right'")
    longest = max(len(item.input_ids) for item in items)

    def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        fill = [[value] * (longest - len(row)) for row in rows]
        left = padding_side == "left"
        return torch.tensor([[*f, *row] if left else [*row, *f] for f, row in zip(fill, rows, strict=True)])

    positions = [item.position_ids for item in items if item.position_ids is not None]
    return {
        **({"position_ids": _padded_positions(positions, longest, padding_side)} if positions else {}),
        "input_ids": padded([item.input_ids for item in items], pad_token_id),
        "attention_mask": padded([[1] * len(item.input_ids) for item in items], 0),
        "labels": padded([item.labels for item in items], IGNORE_INDEX),
        "query_mask": padded([item.query_mask for item in items], False).bool(),
        **_per_sample(items),
    }


def pack(items: Sequence[Encoded]) -> dict[str, Any]:
    """Lay rows end to end: one row of PsaVLM.forward's arguments without padding, plus "where" as in `collate`.

    Returns input_ids, labels int64 [1, T], query_mask bool [1, T], lengths (python ints, one for each sample), and
    pixel_values, image_counts, position_ids and the labels as `collate`. The first label of each sample is -100.
    """
    if not items:
        raise ValueError("a batch needs at least one row")
    labels = [label for item in items for label in (IGNORE_INDEX, *item.labels[1:])]
    positions = [item.position_ids for item in items if item.position_ids is not None]
    return {
        **({"position_ids": torch.cat(positions, 1).unsqueeze(1)} if positions else {}),
        "input_ids": torch.tensor([[token for item in items for token in item.input_ids]]),
        "labels": torch.tensor([labels]),
        "query_mask": torch.tensor([[asked for item in items for asked in item.query_mask]]),
        "lengths": [len(item.input_ids) for item in items],
        **_per_sample(items),
    }


def _padded_positions(rows: Sequence[torch.Tensor], longest: int, side: str) -> torch.Tensor:
    """[P, T] of each row -> [P, B, longest], zeros where there is padding."""
    laid = torch.zeros(rows[0].shape[0], len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        first = longest - row.shape[1] if side == "left" else 0
        laid[:, number, first : first + row.shape[1]] = row
    return laid


def _per_sample(items: Sequence[Encoded]) -> dict[str, Any]:
    pixels = [item.pixel_values for item in items if item.pixel_values is not None]
    features = [item.vision_features for item in items if item.vision_features is not None]
    return {
        # rows of a cached run all have features, if of no image: then no rank runs the tower
        **({"vision_features": torch.cat(features)} if features else {}),
        "pixel_values": join(pixels) if pixels else None,
        "image_counts": torch.tensor([item.image_count for item in items]),
        **{name: torch.tensor([getattr(item, name) for item in items]) for name in CONCEPT_LABELS},
        "where": [item.where for item in items],
    }
