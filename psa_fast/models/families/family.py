"""What psa-fast asks of a VLM family."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from psa_fast.models.families.parts_processor import FamilyProcessor
from psa_fast.models.image_features import Features, GridFeatures
from psa_fast.pictures import Grid, Images, Pictures


class Tokens(Protocol):
    """Safety tokens, `count` of them, S0."""

    count: int

    def __call__(self, n: int, /) -> Tensor:
        """s_llm n times, [n, S0, E]."""
        ...


#: what a family may lack, by the name that messages use -> what it is
PARTS = {
    "packing": "packed rows",
    "FlashAttention": "kernels that take no mask",
    "--feature_cache": "the cache of vision features",
    "plan": "the memory that a run needs, known before it starts",
    "MFU": "the FLOPs of a step",
    "pixel attacks": "attacks on pixels, and training against them (stages 0 and 1)",
}


class Rows(NamedTuple):
    """What the language model reads: padded rows, or one packed row.

    `embeds` are the word embeddings [B, T, E]; `attention_mask` is [B, T], or what else the model takes; `position_ids`
    [B, T] or [P, B, T], None: they count the tokens.
    """

    input_ids: Tensor
    embeds: Tensor
    attention_mask: Any
    position_ids: Tensor | None


class Family(ABC):
    """Adapter of one family; stateless but for the config, the model is an argument.

    What is the same for nearly all is here: the language model is run from token ids, with what stands at the image
    placeholders handed over as transformers' `mm_encoder_outputs`, which keeps all that a stock forward does.
    """

    #: dotted names inside the VLM: vision, connector, language, lm_head
    module_names: dict[str, str]
    #: names of PARTS that work
    works: frozenset[str] = frozenset({"packing", "FlashAttention"})
    #: whether the model takes the features of all images as one tensor [1, rows, E]; else it takes one for each image
    one_tensor = False

    def __init__(self, config: Any):
        self.config = config

    @property
    def image_token_id(self) -> int:
        """Id of the image placeholder."""
        return self.config.image_token_id

    @property
    def image_mark_id(self) -> int:
        """Id of the token that stands for an image in the chat template's text."""
        return self.image_token_id

    @property
    @abstractmethod
    def vision_hidden_size(self) -> int:
        """Dv, width of the vision features."""

    @property
    def hidden_size(self) -> int:
        """E, width of the language model."""
        return self.config.get_text_config().hidden_size

    @abstractmethod
    def image_tokens(self, config: Any | None = None) -> int | None:
        """S, tokens of one image; None: it varies with the image's size."""

    def require(self, part: str) -> None:
        """Raise ValueError for one of PARTS that does not work with this family."""
        if part not in self.works:
            raise ValueError(f"{part}: not supported yet for a base of type {self.config.model_type} ({PARTS[part]})")

    def without_language_layers(self, config: Any) -> Any:
        """A copy of the base's config whose language model has no decoder layer; its embeddings and head stay."""
        config = copy.deepcopy(config)
        text = config.get_text_config()
        text.num_hidden_layers = 0
        if getattr(text, "layer_types", None):
            text.layer_types = []
        return config

    def vision_choices(self) -> dict[str, Any]:
        """JSON values that decide, beside the tower's weights, what `vision_features` returns."""
        self.require("--feature_cache")
        raise NotImplementedError

    def vision_run(self) -> tuple[int, int]:
        """Encoder layers that `vision_features` runs, and an image's positions in them."""
        self.require("MFU")
        raise NotImplementedError

    @abstractmethod
    def blank_image(self, device: torch.device) -> Images:
        """One small image, which keeps a rank without images in step with the others."""

    @abstractmethod
    def vision_features(self, vlm: nn.Module, images: Images) -> Tensor | GridFeatures:
        """h_o: [N, S, Dv] of [N, 3, H, W], or of images of different sizes, without h_i."""

    def features_of_tower(self, tower: nn.Module, pixel_values: Tensor) -> Tensor:
        """`vision_features` of a tower like the model's own that stands by itself."""
        self.require("pixel attacks")
        raise NotImplementedError

    @abstractmethod
    def project(self, vlm: nn.Module, vision: Any) -> Any:
        """The VLM's own connector: h_o [N, S, Dv] -> h_i [N, S, E], or GridFeatures -> the same with h_i."""

    def taken(self, images: Images) -> Pictures:
        """`images` if they are Pictures, ValueError if not."""
        if not isinstance(images, Pictures):
            raise ValueError(f"images are {type(images).__name__}; {self.config.model_type} takes Pictures")
        return images

    def encode_images(self, vlm: nn.Module, images: Images) -> Features:
        """One vision pass over images, as `Images` of the family's kind."""
        return self.project(vlm, self.vision_features(vlm, images))

    def embed(self, vlm: nn.Module, input_ids: Tensor) -> Tensor:
        """Word embeddings [B, T, E]; placeholders are embedded too and overwritten later."""
        return vlm.get_input_embeddings()(input_ids)  # type: ignore[operator]

    def positions(self, input_ids: Sequence[int], safety_tokens: int, grids: Sequence[Sequence[Grid]]) -> Tensor | None:
        """Position ids of one row without padding, int64 [P, T]; None: they count its tokens.

        Args:
            input_ids: the row's.
            safety_tokens: placeholders before each image's own.
            grids: of the row's images, as Pictures has them.
        """
        return None

    def token_types(self, input_ids: Tensor, safety_tokens: int) -> dict[str, Tensor]:
        """What the model takes beside ids to tell text from images, [B, T], by its names; padded or packed rows."""
        return {}

    def visual(self, tokens: Tokens, features: GridFeatures) -> Any:
        """[s_llm ; h_i] of each image, as transformers takes it in place of pixels. Made anew for each call, which may
        change it.
        """
        assert features.projected is not None
        rows = zip(tokens(features.images), features.projected.split(), strict=True)
        laid: Any = tuple(torch.cat([s.to(h.dtype), h]) for s, h in rows)
        return BaseModelOutputWithPooling(pooler_output=torch.cat(laid).unsqueeze(0) if self.one_tensor else laid)

    def states(
        self, vlm: nn.Module, rows: Rows, tokens: Tokens, features: Any, has_images: bool = True, **kwargs: Any
    ) -> Tensor:
        """Last hidden states [B, T, E] of the language model, without a cache.

        Args:
            vlm: the model.
            rows: what it reads.
            tokens: the safety tokens.
            features: what `project` returned.
            has_images: False: there are none, and `features` are a blank image's, which stay in the graph only.
            kwargs: reach the attention.
        """
        visual, body = self.visual(tokens, features), cast(Any, vlm).model
        read = {
            "input_ids": rows.input_ids,
            "mm_encoder_outputs": {"image": visual} if has_images else None,
            "attention_mask": rows.attention_mask,
            "position_ids": rows.position_ids,
            **self.token_types(rows.input_ids, tokens.count),
            "use_cache": False,  # with a cache transformers builds no mask from packed position ids: samples would leak
        }
        if has_images:
            return body(**read, **kwargs).last_hidden_state
        # the same modules and gradients in the same order as on a rank that has images, or ZeRO-3 would hang
        unseen = 0.0 * torch.cat(list(visual.pooler_output)).sum()
        embedding = cast(Any, vlm).get_input_embeddings()
        hook = embedding.register_forward_hook(lambda _module, _inputs, output: output + unseen.to(output.dtype))
        try:
            return body(**read, **kwargs).last_hidden_state
        finally:
            hook.remove()

    def answer(self, vlm: nn.Module, rows: Rows, tokens: Tokens, features: Any | None, **kwargs: Any) -> Tensor:
        """New ids only, [B, t], of left-padded rows; features None: no images. kwargs are transformers' options."""
        visual = {} if features is None else {"mm_encoder_outputs": {"image": self.visual(tokens, features)}}
        given = self.token_types(rows.input_ids, tokens.count)
        if rows.position_ids is not None:
            given["position_ids"] = rows.position_ids
        ids = cast(Any, vlm).generate(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, **given, **visual, **kwargs
        )
        return ids[:, rows.input_ids.shape[1] :]

    def insert_images(
        self, embeds: Tensor, input_ids: Tensor, tokens: Tokens, projected: Tensor, has_images: bool = True
    ) -> Tensor:
        """Put [s_llm ; h_i] of images that are all alike, [N, S, E], in place of the placeholders of [B, T, E]."""
        visual = torch.cat([tokens(projected.shape[0]).to(embeds.dtype), projected.to(embeds.dtype)], dim=1)
        if not has_images:  # same modules, same graph as on a rank that has images
            return embeds + 0.0 * visual.sum()
        mask = (input_ids == self.image_token_id).unsqueeze(-1)
        return embeds.masked_scatter(mask, visual)

    def read_processor(self, base: str, **options: Any) -> Any:
        """What `extend_processor` needs of the base's files.

        Image processor and tokenizer alone: a whole processor may have a part for videos, which needs torchvision.
        """
        image_processor = AutoImageProcessor.from_pretrained(base, **options)
        tokenizer = AutoTokenizer.from_pretrained(base, **options)
        return SimpleNamespace(image_processor=image_processor, tokenizer=tokenizer)

    def extend_processor(self, processor: Any, num_safety_tokens: int) -> Any:
        """A processor every image of which expands to num_safety_tokens + S placeholders.

        Raises ValueError for one that cannot be used.
        """
        return FamilyProcessor(self, processor.image_processor, processor.tokenizer, num_safety_tokens)

    def around(self, tokenizer: Any) -> tuple[str, str]:
        """Text that stands before and behind an image's placeholders. ValueError: the tokenizer lacks a token of it."""
        return "", ""

    def expansion(self, placeholder: str, safety_tokens: int, tokens: int, tiles: Grid | None) -> str:
        """What stands between for an image of so many tokens, safety tokens not among them; `tiles` as below."""
        return placeholder * (safety_tokens + tokens)

    def tiles(self, size: tuple[int, int], image_processor: Any) -> Grid | None:
        """Rows and columns of tiles of an image of that (width, height), if its text depends on them; else None."""
        return None

    def prepare(self, images: Sequence[Any], image_processor: Any) -> Pictures:
        """Run the image processor on PIL images."""
        raise NotImplementedError

    def count(self, size: tuple[int, int], image_processor: Any) -> int:
        """S of an image of that (width, height), from these numbers alone."""
        raise NotImplementedError

    def module(self, vlm: nn.Module, part: str) -> nn.Module:
        """The module of one part: vision, connector, language or lm_head."""
        return vlm.get_submodule(self.module_names[part])
