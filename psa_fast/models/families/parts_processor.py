"""A processor made of a base's image processor and tokenizer, for families whose images differ in their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from psa_fast.pictures import Grid, Pictures

if TYPE_CHECKING:
    from psa_fast.models.families.family import Family


class FamilyProcessor:
    """The members of a transformers processor that psa-fast uses, and what a family knows of its images.

    Args:
        family: whose images these are.
        image_processor: the base's.
        tokenizer: the base's, with its chat template.
        safety_tokens: placeholders before each image's own.

    Raises:
        ValueError: the tokenizer has no chat template, or lacks a token that the family puts around images.
    """

    def __init__(self, family: Family, image_processor: Any, tokenizer: Any, safety_tokens: int):
        self.family, self.image_processor, self.tokenizer = family, image_processor, tokenizer
        self.safety_tokens = safety_tokens
        self.chat_template = tokenizer.chat_template
        if self.chat_template is None:
            raise ValueError("the base's tokenizer has no chat template")
        self.image_token: str = tokenizer.convert_ids_to_tokens(family.image_mark_id)
        self._placeholder: str = tokenizer.convert_ids_to_tokens(family.image_token_id)
        self._around = family.around(tokenizer)

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The conversation as text."""
        return self.tokenizer.apply_chat_template(messages, **options)

    def prepare(self, images: Sequence[Any]) -> Pictures:
        """PIL images as the model takes them."""
        return self.family.prepare(images, self.image_processor)

    def count(self, size: tuple[int, int]) -> int:
        """S of an image of that (width, height), without the image."""
        return self.family.count(size, self.image_processor)

    def placeholder(self, tokens: int, size: tuple[int, int]) -> str:
        """What stands in the text for an image of so many tokens and of that (width, height)."""
        tiles = self.family.tiles(size, self.image_processor)
        return self.family.expansion(self._placeholder, self.safety_tokens, tokens, tiles).join(self._around)

    def positions(self, input_ids: Sequence[int], grids: Sequence[Sequence[Grid]]) -> Tensor | None:
        """Position ids [P, T] of a row without padding, see Family.positions."""
        return self.family.positions(input_ids, self.safety_tokens, grids)
