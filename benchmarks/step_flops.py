"""What each form of a training step multiplies, at any size: arithmetic, no weight is held and nothing is run.

Ours is counted by `psa_fast.training.flops`, on a model of the same dimensions without weights. The baselines are
counted here from what baselines/ computes. Two FLOPs are a multiplication with its addition; attention counts a
position with itself and each earlier one of its row (or of the padded row); recomputation, norms, activations, masks
and the optimizer do not count. Where something is trained in or below the language model, a frozen weight is met twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from step_model import Size, build_base
from step_rows import RowShape

from psa_fast.models import PsaVLM
from psa_fast.training.config import TrainConfig
from psa_fast.training.flops import Load, StageFlops
from psa_fast.training.stages import prepare

Flops = dict[str, float]
PARTS = ("lm_head", "vision", "safety", "language_model", "attention")

#: options of TrainConfig of each of our steps
OURS: dict[str, dict[str, Any]] = {
    "stage1_joint": {"stage": 1},
    "stage1_concept": {"stage": 1, "stage1_objective": "concept"},
    "stage2_lora": {"stage": 2, "concept_loss_weight": 10.0},
    "stage2_lora_alone": {"stage": 2, "concept_loss_weight": 0.0},
}
#: what each of them is held against
AGAINST = {
    "stage1_joint": ("B0", "B1", "B2"),
    "stage1_concept": ("B0 concept",),
    "stage2_lora": ("B0", "B1", "B2"),
    "stage2_lora_alone": ("B0 frozen", "B1", "B2"),
}


def ours(size: Size, target: str, rows: Sequence[RowShape]) -> Flops:
    """FLOPs of all rows, by PARTS."""
    lengths = [row.text + size.image_tokens + size.safety_tokens for row in rows]
    # what a stage without language model has of the others is 0
    load = Load(
        samples=len(rows),
        tokens=sum(lengths),
        positions=sum(lengths),
        pairs=_pairs(lengths),
        supervised=sum(row.supervised for row in rows),
        typed=len(rows),
        levelled=len(rows),
        images=len(rows),
        concept_rows=len(rows),
        word_rows=len(rows),
    )
    found = stage_flops(size, target).parts(load)
    return {
        "lm_head": found["lm_head"],
        "vision": found["vision"] + found["connector"],
        "safety": found["bottleneck"] + found["pooling"] + found["words"],
        "language_model": found["language_model"],
        "attention": found["attention"],
    }


@cache
def stage_flops(size: Size, target: str) -> StageFlops:
    """Ours, from a model on the meta device, frozen as the stage freezes it."""
    model = PsaVLM.build(build_base(size, "meta"), **safety_options(size))
    config = TrainConfig(lora_r=size.lora_r, **OURS[target])
    prepare(model, config)
    return StageFlops.of(model, config)


def safety_options(size: Size) -> dict[str, int]:
    """PsaConfig's sizes of the safety modules."""
    return {
        "num_safety_tokens": size.safety_tokens,
        "num_head_tokens": size.safety_tokens,
        "projector_hidden_size": size.safety_width,
        "num_attention_heads": size.concept_heads,
    }


def official(size: Size, target: str, batches: Sequence[Sequence[RowShape]]) -> Flops:
    """B0 of a target, rows padded to the longest of their batch; "stage2_lora_alone": with its safety modules frozen.

    What is frozen there still runs forward.
    """
    rows, longest = sum(map(len, batches)), [max(row.text for row in batch) for batch in batches]
    texts = sum(len(batch) * most for batch, most in zip(batches, longest, strict=True))
    extra = size.image_tokens + size.safety_tokens
    lengths = [most + extra for batch, most in zip(batches, longest, strict=True) for _ in batch]
    joint, stage = target != "stage1_concept", 2 if target.startswith("stage2") else 1
    found = dict.fromkeys(PARTS, 0.0)
    found["vision"] = rows * (tower(size, size.vision_layers) + joint * connector(size))
    found["safety"] = _official_safety(size, rows, texts, passes=1 if target == "stage2_lora_alone" else 3)
    if joint:
        on_head = size.lora_r * (size.width + size.vocabulary) if stage == 2 else 0
        found |= _language(size, lengths, stage, below=target != "stage2_lora_alone")
        found |= _full_head(size, sum(lengths), on_head)
    return found


def stock(size: Size, target: str, batches: Sequence[Sequence[RowShape]]) -> Flops:
    """B1, or B2 on batches of like length: no safety tokens; stage 1 trains the connector."""
    lengths = [max(row.text for row in batch) + size.image_tokens for batch in batches for _ in batch]
    stage = 2 if target.startswith("stage2") else 1
    found = dict.fromkeys(PARTS, 0.0)
    found["vision"] = sum(map(len, batches)) * (tower(size, size.vision_layers) + connector(size, trained=stage == 1))
    return found | _language(size, lengths, stage, below=stage == 1) | _full_head(size, sum(lengths), 0)


def tower(size: Size, layers: int) -> int:
    """The first `layers` of the vision tower, of one image."""
    width, positions = size.vision_width, size.image_tokens + 1
    layer = 2 * positions * (4 * width**2 + 2 * width * size.vision_mlp) + 4 * positions**2 * width
    return layers * layer + 2 * size.image_tokens * 3 * size.patch**2 * width


def connector(size: Size, trained: bool = False) -> int:
    """Two linear layers over one image's tokens; its input asks for no gradient."""
    first, second = size.vision_width * size.width, size.width**2
    return 2 * size.image_tokens * (2 * first + 3 * second if trained else first + second)


def _language(size: Size, lengths: Sequence[int], stage: int, below: bool = True) -> Flops:
    """`below`: something is trained that lies below the layers, so that the first one's input asks for a gradient."""
    width, mlp = size.width, size.mlp
    weights = size.layers * (4 * width**2 + 3 * width * mlp)
    lora = size.layers * size.lora_r * (8 * width + 3 * (width + mlp)) if stage == 2 else 0
    unasked = 0 if below else 3 * width * (width + size.lora_r)  # of query, key and value
    return {
        "language_model": 2 * (2 * (weights + lora) + lora - unasked) * sum(lengths),
        "attention": 3 * 4 * width * size.layers * _pairs(lengths),
    }


def _full_head(size: Size, positions: int, lora: int) -> Flops:
    return {"lm_head": 2 * (2 * (size.width * size.vocabulary + lora) + lora) * positions}


def _official_safety(size: Size, images: int, texts: int, passes: int) -> int:
    """C-Abstractor, attention of every text position over all keys, two heads; the features ask for no gradient."""
    width, inside, keys = size.width, size.safety_width, size.safety_tokens + size.image_tokens
    first = 2 * size.vision_width * inside
    convolutions = first + inside**2 + 5 * 2 * inside**2 + 6 * 9 * inside
    readout = inside * width + width**2
    per_image = size.image_tokens * (passes * (convolutions + readout) - (first if passes == 3 else 0))
    per_image += passes * 2 * keys * width**2
    # query and output projection, scores and weighted sum; the frozen embeddings ask for no gradient
    per_text = (passes - (passes == 3)) * width**2 + passes * (width**2 + 2 * keys * width)
    return 2 * (per_image * images + per_text * texts)


def _pairs(lengths: Sequence[int]) -> int:
    return sum(n * (n + 1) // 2 for n in lengths)


def ratios(
    size: Size,
    batches: Sequence[Sequence[RowShape]],
    grouped: Sequence[Sequence[RowShape]],
    targets: Sequence[str] = tuple(AGAINST),
) -> dict[str, Any]:
    """Of each target and each baseline: its FLOPs over ours. `grouped`: the batches of B2, the same rows."""
    found: dict[str, Any] = {}
    for target in targets:
        names = AGAINST[target]
        mine = sum(ours(size, target, [row for batch in batches for row in batch]).values())
        theirs = {
            name: official(size, target, batches)
            if name.startswith("B0")
            else stock(size, target, grouped if name == "B2" else batches)
            for name in names
        }
        found[target] = {name: sum(flops.values()) / mine for name, flops in theirs.items()}
    return found
