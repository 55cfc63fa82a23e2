"""The model and the data of the step benchmarks: a LLaVA with random weights, and conversations of mixed length.

"proportionate" has LLaVA-1.5-7B's widths in proportion, for a CPU: vision width 256, language width 512, 4 layers each,
a LoRA rank that is the same share of the width as 256 is of 4096. The vocabulary and the 576 tokens an image are not
scaled: the LM head is 56% of the language weights instead of 2%, so ratios of step times do not carry over to 7B. "7b"
has LLaVA-1.5-7B's own dimensions. Pictures and questions are the sandbox's; a row has one picture and 1 to 16 turns.
"""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ladder import DEVICE, DTYPE
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from psa_fast.data import Encoded, PsaDataset, load_records
from psa_fast.models import get_family
from psa_fast.sandbox.language import QUESTIONS, question, safe_answer
from psa_fast.sandbox.paint import paint
from psa_fast.sandbox.word_level import CHAT_TEMPLATE, build_tokenizer
from psa_fast.sandbox.world import GROUPS_WITH_PICTURES, sample_scene
from psa_fast.taxonomy import IGNORE_INDEX


@dataclass(frozen=True)
class Size:
    """Dimensions of a model with its safety modules, and the longest conversation."""

    vision_width: int = 256
    vision_layers: int = 4
    vision_heads: int = 4
    vision_mlp: int = 1024
    width: int = 512
    layers: int = 4
    heads: int = 8
    mlp: int = 1376
    vocabulary: int = 32064
    image_size: int = 336
    patch: int = 14
    safety_tokens: int = 64
    lora_r: int = 32
    max_turns: int = 16


SIZES = {
    "proportionate": Size(),
    "7b": Size(1024, 24, 16, 4096, 4096, 32, 32, 11008, lora_r=256),
    # for tests of the benchmarks themselves
    "tiny": Size(32, 2, 2, 64, 64, 2, 2, 96, vocabulary=512, image_size=56, safety_tokens=4, lora_r=4, max_turns=2),
}


def build_base(size: Size) -> LlavaForConditionalGeneration:
    """The stock model with random weights, frozen, in training mode."""
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
        image_seq_length=(size.image_size // size.patch) ** 2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
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


def draw_records(folder: Path, size: Size, count: int, seed: int = 0) -> list:
    """`count` labelled records, read back through the package's own reader."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        scene = sample_scene(rng, GROUPS_WITH_PICTURES[i % len(GROUPS_WITH_PICTURES)], "train")
        Image.fromarray(paint(scene)).save(folder / f"{i:04d}.png")
        conversation = []
        # as many conversations of 1 to 2 turns as of 8 to 16
        for _ in range(round(math.exp(rng.uniform(0, math.log(size.max_turns))))):
            told = [question(scene, kind, rng) for kind in rng.permutation(list(QUESTIONS))[: rng.integers(1, 7)]]
            asked, _ = told[0] or question(scene, "colour", rng)
            answer = ". ".join(pair[1] for pair in told if pair) or "nothing"
            mark = "" if conversation else "<image>\n"
            conversation += [
                {"from": "human", "value": mark + asked},
                {"from": "gpt", "value": safe_answer(scene.safe_type, scene.safe_level, answer)},
            ]
        rows.append(
            {
                "image": f"{i:04d}.png",
                "safe_type": scene.safe_type,
                "safe_level": scene.safe_level,
                "conversations": conversation,
            }
        )
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_records(path, folder)


class Rows:
    """Encoded records, with as many placeholders an image as a form wants: `rows[safety tokens][index]`."""

    def __init__(self, folder: Path, vlm: LlavaForConditionalGeneration, size: Size, count: int, seed: int = 0):
        records = draw_records(folder, size, count, seed)
        texts = [turn.text for record in records for turn in record.turns]
        self.by_tokens: dict[int, list[Encoded]] = {}
        for tokens in (0, size.safety_tokens):
            dataset = PsaDataset(records, folder, build_processor(vlm, size, tokens, texts))
            self.by_tokens[tokens] = [dataset[i] for i in range(len(records))]
        #: tokens of each row without safety tokens and padding: what every form must work through
        self.lengths = [len(row.input_ids) for row in self.by_tokens[0]]
        self.supervised = sum(label != IGNORE_INDEX for row in self.by_tokens[0] for label in row.labels)

    def __getitem__(self, tokens: int) -> list[Encoded]:
        return self.by_tokens[tokens]


def in_order(count: int, batch: int) -> list[list[int]]:
    """Row numbers of each batch, as the records come."""
    return [list(range(i, i + batch)) for i in range(0, count, batch)]


def grouped_by_length(lengths: list[int], batch: int, seed: int = 0) -> list[list[int]]:
    """The same rows, those of like length together, batches in random order."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    random.Random(seed).shuffle(batches)
    return batches
