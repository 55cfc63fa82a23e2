"""The models of the step benchmarks: LLaVAs with random weights.

"proportionate" is LLaVA-1.5-7B in little, for a CPU: LM head, vision, safety modules and the rest of the language model
have the same shares of a step's FLOPs, and the baselines as much to compute beside ours, as at 7B. proportions.py found
its dimensions and says how near they come. Rows are a quarter as long, image and safety tokens too: with 7B's lengths a
narrow model would spend its time in attention. "7b" and "13b" have LLaVA-1.5's own dimensions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fractions import Fraction

import torch
from ladder import DEVICE, DTYPE
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from psa_fast.models import get_family
from psa_fast.sandbox.word_level import CHAT_TEMPLATE, build_tokenizer


@dataclass(frozen=True)
class Size:
    """Dimensions of a model with its safety modules.

    `projector_width`: inside the safety projector; `concept_heads`: of the concept attention.
    """

    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    width: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int = 32064
    image_size: int = 336
    patch: int = 14
    safety_tokens: int = 64
    lora_r: int = 256
    projector_width: int | None = None
    concept_heads: int = 8

    @property
    def image_tokens(self) -> int:
        """S, of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def length_scale(self) -> Fraction:
        """Tokens of an image over LLaVA-1.5's 576: by as much are the rows shorter."""
        return Fraction(self.image_tokens, 576)

    @property
    def safety_width(self) -> int:
        """Width inside the safety projector."""
        return self.projector_width or self.vision_width + 64


SIZES = {
    "proportionate": Size(
        96, 12, 6, 384, 320, 10, 5, 3072, 2144, 168, safety_tokens=16, lora_r=20, projector_width=80, concept_heads=4
    ),
    "7b": Size(1024, 24, 16, 4096, 4096, 32, 32, 11008),
    # for arithmetic alone
    "13b": Size(1024, 24, 16, 4096, 5120, 40, 40, 13824),
    # for tests of the benchmarks themselves
    "tiny": Size(32, 2, 2, 64, 64, 2, 2, 96, 512, image_size=112, safety_tokens=4, lora_r=4),
}
#: those that are timed
TIMED = tuple(name for name in SIZES if name != "13b")


def build_base(size: Size, device: str = DEVICE) -> LlavaForConditionalGeneration:
    """The stock model with random weights, frozen, in training mode; on "meta" it has dimensions only."""
    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=size.vision_mlp,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.image_size,
        patch_size=size.patch,
    )
    text = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=size.image_tokens,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        vlm = LlavaForConditionalGeneration._from_config(config, dtype=DTYPE, attn_implementation=attention())
    return vlm.requires_grad_(False).train()


def attention() -> str:
    """FlashAttention 2 where it can run, else torch's own."""
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def same_weights(vlm: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A second model on the same parameters, so that adapters and patches of one never reach another."""
    return copy.deepcopy(vlm, {id(p): p for p in vlm.parameters()})


def build_processor(vlm: LlavaForConditionalGeneration, size: Size, safety_tokens: int, texts: list[str]):
    """A LLaVA processor with exactly the model's vocabulary: the words of `texts`, then words that no text holds."""
    known = len(build_tokenizer(texts))
    if known > size.vocabulary:
        raise ValueError(f"the texts have {known} words, the model's vocabulary holds {size.vocabulary}")
    tokenizer = build_tokenizer([*texts, " ".join(f"zq{i}" for i in range(size.vocabulary - known))])
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size.image_size}, crop_size={"height": size.image_size, "width": size.image_size}
    )
    processor = LlavaProcessor(image_processor=image_processor, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)
    return get_family(vlm).extend_processor(processor, safety_tokens)
