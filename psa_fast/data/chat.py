"""Conversations as tokens, through the model's own chat template, with only the answers supervised.

One function serves training and inference, so that the two can never drift apart. Its rules:
- an answer begins where the generation prompt ends and closes with the special token that the template puts after it
  (`<|im_end|>`, say); a template that puts none (LLaVA-1.5's) gets the EOS token there, or the model would never learn
  to stop. Earlier answers in a prompt are closed in the same way;
- an image mark becomes what the processor makes of it: safety tokens plus image tokens;
- special tokens typed into a text are broken up by a blank: a user cannot close a turn or smuggle in an image. What
  still becomes one (by the template's joining of texts, by the tokenizer's normalisation) is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from psa_fast.data.labels import CONCEPT_LABELS
from psa_fast.data.records import IMAGE_MARK, Record, Turn
from psa_fast.data.template import ChatTemplate, Span
from psa_fast.files import shorten
from psa_fast.taxonomy import IGNORE_INDEX

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from psa_fast.pictures import Images


@dataclass(frozen=True)
class Encoded:
    """One row as the model takes it.

    `input_ids`, `labels` (unshifted, -100 where nothing is supervised) and `query_mask` (prompt text, which the concept
    query is made of) have the same length. `pixel_values` is [image_count, 3, H, W], or Pictures of a family whose
    images differ in their tokens, None if no images were given; `vision_features` [image_count, S, Dv] where they stand
    in for the images. `position_ids` are [P, length] where the family has its own. Where `max_length` cuts the row,
    `cut_answer` says that supervised tokens were lost, `cut_images` how many images; then all labels are -100, since
    what they are about may be gone. `picture_type` and `picture_level` are the picture's own, whatever the request,
    `words_type` and `words_level` those of its text by itself, -100 where there is none.
    """

    input_ids: list[int]
    labels: list[int]
    query_mask: list[bool]
    pixel_values: Images | None = None
    image_count: int = 0
    safe_type: int = IGNORE_INDEX
    safe_level: int = IGNORE_INDEX
    picture_type: int = IGNORE_INDEX
    picture_level: int = IGNORE_INDEX
    words_type: int = IGNORE_INDEX
    words_level: int = IGNORE_INDEX
    where: str = ""
    vision_features: Tensor | None = None
    cut_answer: bool = False
    cut_images: int = 0
    position_ids: Tensor | None = None


class ImageInputs(NamedTuple):
    """Images after the processor, and the placeholder text of each. Reusable for several prompts.

    `pixel_values` is [N, 3, H, W] or Pictures; None: they are counted only (`count_images`).
    """

    pixel_values: Images | None
    placeholders: tuple[str, ...]

    def only(self, place: int) -> ImageInputs:
        """One of the images by itself."""
        pixels = None if self.pixel_values is None else self.pixel_values[place : place + 1]
        return ImageInputs(pixels, self.placeholders[place : place + 1])


def prepare_images(images: Sequence[Image.Image], processor: Any) -> ImageInputs:
    """Run the image processor once on `images` (at least one), which have come through `psa_fast.data.to_rgb`."""
    from PIL import Image

    for image in images:  # a processor of transformers would open a path and fetch an address
        if not isinstance(image, Image.Image):
            raise ValueError(f"an image is {shorten(image)}; expected a PIL image")
    if counts_by_size(processor):
        pictures = processor.prepare(images)
        counted = zip(pictures.tokens, images, strict=True)
        return ImageInputs(pictures, tuple(processor.placeholder(tokens, image.size) for tokens, image in counted))
    processed = processor.image_processor(images=list(images), return_tensors="pt")
    placeholders = tuple(processor.replace_image_token(processed, image_idx=i) for i in range(len(images)))
    return ImageInputs(processed["pixel_values"], placeholders)


def counts_by_size(processor: Any) -> bool:
    """Whether an image's tokens depend on its size (see models.families.FamilyProcessor)."""
    return hasattr(processor, "count")


def counted_images(sizes: Sequence[tuple[int, int]], processor: Any) -> ImageInputs | None:
    """Images of these (width, height), known by their tokens alone; None for none. For `counts_by_size`."""
    placeholders = tuple(processor.placeholder(processor.count(size), size) for size in sizes)
    return ImageInputs(None, placeholders) if placeholders else None


def encode(
    record_or_turns: Record | Sequence[Turn],
    processor: Any,
    *,
    images: Sequence[Image.Image] | ImageInputs | None = None,
    hint: str | None = None,
    add_generation_prompt: bool = False,
    max_length: int | None = None,
) -> Encoded:
    """Token ids, labels and query mask of a conversation.

    Args:
        record_or_turns: a record, or turns that begin with the user's.
        processor: the model's processor, which expands an image to safety tokens + image tokens.
        images: one per `<image>` mark, as PIL images or already prepared. None: `pixel_values` stays None, which is
            possible if all images have the same number of tokens; else `counted_images` tells them apart.
        hint: a line before the text of the last user's turn, no part of the concept query (it would tell the label).
        add_generation_prompt: the prompt for the next answer, nothing supervised; a last answer is left out.
        max_length: cut the end of a longer conversation, never an image; images behind the cut are dropped, and with
            them the record's labels.

    Raises ValueError, naming the record's file and line, if marks and images do not agree, if no supervised token is
    left, if a prompt is longer than max_length, for a text that becomes a special token, or for a chat template whose
    answers cannot be told from the rest.
    """
    where = record_or_turns.where if isinstance(record_or_turns, Record) else ""
    turns = list(record_or_turns.turns if isinstance(record_or_turns, Record) else record_or_turns)
    try:
        encoded = _encode(turns, processor, images, hint, add_generation_prompt, max_length)
    except ValueError as error:
        if not where:
            raise
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(record_or_turns, Record):
        return encoded
    record = record_or_turns
    words = record.words if any(encoded.query_mask) else (None, None)
    labels: tuple[int | None, ...] = (record.safe_type, record.safe_level, *record.picture, *words)
    if encoded.cut_images:  # a label never outlives its picture
        labels = (None,) * len(CONCEPT_LABELS)
    pairs = zip(CONCEPT_LABELS, labels, strict=True)
    known: dict[str, Any] = {name: IGNORE_INDEX if label is None else label for name, label in pairs}
    return replace(encoded, where=where, **known)


def _encode(
    turns: list[Turn],
    processor: Any,
    images: Sequence[Image.Image] | ImageInputs | None,
    hint: str | None,
    add_generation_prompt: bool,
    max_length: int | None,
) -> Encoded:
    if add_generation_prompt and turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if not turns or turns[0].role != "user":
        raise ValueError("a conversation begins with a user's turn")
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    pixel_values, placeholders = _image_inputs(images, marks, processor)
    template = ChatTemplate(processor)
    text, answers, silent = template.render(turns, hint, add_generation_prompt, placeholders)
    input_ids, offsets = template.tokenize(text)
    template.refuse_forged(input_ids, turns, add_generation_prompt, placeholders)
    in_answer = _covered(offsets, answers)
    in_image = _covered(offsets, silent.images)
    in_hint = _covered(offsets, silent.hints)
    for i in [i for i, hinted in enumerate(in_hint) if hinted and offsets[i][1] > silent.hints[0][1]]:
        in_hint[i] = False  # the line break behind the hint may be one token with the first word of the question
    query = [not any(parts) for parts in zip(in_answer, in_image, in_hint, strict=True)]
    if add_generation_prompt:
        if max_length is not None and len(input_ids) > max_length:
            raise ValueError(f"the prompt has {len(input_ids)} tokens, more than max_length {max_length}")
        unlabelled = [IGNORE_INDEX] * len(input_ids)
        positions = _positions(processor, input_ids, pixel_values, marks)
        return Encoded(input_ids, unlabelled, query, pixel_values, marks, position_ids=positions)

    length = len(input_ids) if max_length is None else min(max_length, len(input_ids))
    while 0 < length < len(input_ids) and in_image[length] and in_image[length - 1]:
        length -= 1
    supervised = [i for i in range(length) if in_answer[i]]
    if not supervised:
        cut = (
            "" if length == len(input_ids) else f" within max_length {max_length} (the row has {len(input_ids)} tokens)"
        )
        raise ValueError(f"no supervised token{cut}")
    if length < len(input_ids):  # what is left of an unanswered turn is of no use
        length = supervised[-1] + 1
    labels = [token if answer else IGNORE_INDEX for token, answer in zip(input_ids, in_answer, strict=True)]
    # what follows the last answer is no prompt; with this the query is the one that inference sees
    query = [q and i < supervised[-1] for i, q in enumerate(query)]
    kept = sum(end <= offsets[length - 1][1] for _, end in silent.images)
    if pixel_values is not None:
        pixel_values = pixel_values[:kept] if kept else None
    lost = len(supervised) < sum(in_answer)
    return Encoded(
        input_ids[:length],
        labels[:length],
        query[:length],
        pixel_values,
        kept,
        cut_answer=lost,
        cut_images=marks - kept,
        position_ids=_positions(processor, input_ids[:length], pixel_values, kept),
    )


def _positions(processor: Any, input_ids: list[int], pixel_values: Images | None, images: int) -> Tensor | None:
    """The family's own position ids; None where it has none, or where the images are only counted."""
    if not counts_by_size(processor) or (images and pixel_values is None):
        return None
    return processor.positions(input_ids, getattr(pixel_values, "grids", []))


def _image_inputs(
    images: Sequence[Image.Image] | ImageInputs | None, marks: int, processor: Any
) -> tuple[Images | None, tuple[str, ...]]:
    if images is None:
        return None, (fixed_placeholder(processor),) * marks if marks else ()
    prepared = images if isinstance(images, ImageInputs) else prepare_images(images, processor) if images else None
    count = len(prepared.placeholders) if prepared else 0
    if count != marks:
        raise ValueError(f"the conversation has {marks} {IMAGE_MARK} mark(s), but {count} image(s) were given")
    return (prepared.pixel_values, prepared.placeholders) if prepared else (None, ())


_blank_images: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def fixed_placeholder(processor: Any) -> str:
    """Return the placeholder text of any image; ValueError for a processor whose images differ in their tokens."""
    from PIL import Image

    if counts_by_size(processor):
        raise ValueError("this model's images have different numbers of tokens: pass the images to encode")
    image_processor = processor.image_processor
    if image_processor not in _blank_images:
        blank = [Image.new("RGB", (64, 64)), Image.new("RGB", (64, 128))]
        _blank_images[image_processor] = image_processor(images=blank, return_tensors="pt")
    first, second = (processor.replace_image_token(_blank_images[image_processor], image_idx=i) for i in range(2))
    if first != second:
        raise ValueError("this model's images have different numbers of tokens: pass the images to encode")
    return str(first)


def _covered(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token whether it overlaps a span; both are in order. An empty token counts where it stands."""
    covered, current = [], 0
    for start, end in offsets:
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        covered.append(current < len(spans) and spans[current][0] < max(end, start + 1))
    return covered
