"""Part a of the base's training: what a vision tower is taught in place of web-scale pre-training.

Dense supervision: every patch names what is in its cell, scored against the LLM's own word table, so that projected
patches mean words from the start. Content only, never a risk label.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psa_fast.sandbox.language import NUMBERS
from psa_fast.sandbox.optimise import Steps
from psa_fast.sandbox.processor import PATCH
from psa_fast.sandbox.world import (
    CELL,
    COLOURS,
    GLYPHS,
    GRID,
    IMAGE_SIZE,
    MARKS,
    PLACES,
    SHAPES,
    Group,
    Scene,
    paint,
    sample_scene,
)

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

# Pictures shown: content only, so risky ones are as good as any. Labels of risk are never shown.
GROUP_SHARES: dict[Group, float] = {"clean": 0.5, "benign_twin": 0.25, "risk": 0.25}
SIDE = IMAGE_SIZE // PATCH
# A patch names one word of each line (or none of it): what CLIP's features would tell of a picture.
CONTENT = (SHAPES, tuple(COLOURS), GLYPHS, MARKS, NUMBERS, PLACES)
# Shapes span four patches and are learned last: at equal weight they stayed at .85 where the rest was at 1.0.
LINE_WEIGHTS = (4.0, 1.0, 1.0, 1.0, 1.0, 1.0)


class _WordScores(nn.Module):
    """Scores patches against words of the LLM's table: logits [N, S, words] = scale * normed patch . normed word."""

    def __init__(self, word_ids: list[int]):
        super().__init__()
        self.word_ids = torch.tensor(word_ids)
        self.log_scale = nn.Parameter(torch.tensor(math.log(16.0)))

    def forward(self, patches: Tensor, table: Tensor) -> Tensor:
        words = F.normalize(table[self.word_ids], dim=-1)
        return F.normalize(patches, dim=-1) @ words.t() * self.log_scale.exp()


def content_labels(scene: Scene) -> np.ndarray:
    """What each patch must name: int64 [36, 6], one index into each line of CONTENT, -1 for none of it."""
    labels = np.full((GRID * GRID, len(CONTENT)), -1, dtype=np.int64)
    labels[:, 5] = np.arange(GRID * GRID)
    for thing in scene.things:
        labels[thing.cell, :2] = SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)
    if scene.sign is not None:
        sign = scene.sign
        labels[sign.cell, 2:5] = GLYPHS.index(sign.glyph), MARKS.index(sign.marks), sign.count - 1
    rows, columns = np.divmod(np.arange(SIDE * SIDE), SIDE)
    per_cell = CELL // PATCH
    return labels[rows // per_cell * GRID + columns // per_cell]


def content_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Weighted mean cross-entropy over the lines of CONTENT; among each line's words a free "none of it" at score 0."""
    losses, start = [], 0
    for i, words in enumerate(CONTENT):
        part = F.pad(scores[..., start : start + len(words)], (0, 1))
        target = torch.where(labels[..., i] < 0, len(words), labels[..., i])
        weight = torch.ones(len(words) + 1)
        weight[-1] = 0.25 if i < 5 else 1.0
        losses.append(F.cross_entropy(part.flatten(0, -2), target.flatten(), weight=weight))
        start += len(words)
    return torch.stack(losses) @ torch.tensor(LINE_WEIGHTS) / sum(LINE_WEIGHTS)


def patch_features(vlm: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The tower's features as LLaVA takes them (layer -2, no CLS): [N, 3, 96, 96] -> [N, 36, hidden].

    Stops at the layer that is used, where the tower itself would run one more for nothing.
    """
    tower = vlm.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden[:, 1:]


def to_pixels(scenes: list[Scene]) -> Tensor:
    """The pictures as the processor prepares them: float [N, 3, 96, 96] in -1..1."""
    stacked = np.stack([paint(scene) for scene in scenes]).astype(np.float32)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous() / 127.5 - 1.0


def draw_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Scenes in training compositions, in the shares of GROUP_SHARES."""
    groups = rng.choice(len(GROUP_SHARES), count, p=list(GROUP_SHARES.values()))
    names = list(GROUP_SHARES)
    return [sample_scene(rng, names[g], "train") for g in groups]


def train_tower(
    vlm: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rng: np.random.Generator,
    steps: int,
    batch: int,
    lr: float,
    warmup: int,
    progress: bool,
) -> float:
    """Train tower, projector and word table on content, in place; returns the smoothed last loss."""
    vocabulary = processor.tokenizer.get_vocab()
    scorer = _WordScores([vocabulary[word] for words in CONTENT for word in words])
    table = vlm.model.language_model.embed_tokens.weight
    modules = (vlm.model.vision_tower.embeddings, vlm.model.vision_tower.pre_layrnorm)
    layers = vlm.model.vision_tower.encoder.layers[:-1]
    parameters = [p for m in (*modules, *layers, vlm.model.multi_modal_projector, scorer) for p in m.parameters()]
    run = Steps("base, part a (content)", [*parameters, table], lr, steps, warmup, progress)
    for _ in run:
        scenes = draw_scenes(rng, batch)
        labels = torch.from_numpy(np.stack([content_labels(scene) for scene in scenes]))
        patches = vlm.model.multi_modal_projector(patch_features(vlm, to_pixels(scenes)))
        run.step(content_loss(scorer(patches, table), labels))
    return run.smoothed
