"""The sandbox's vision tower, and part a of the base's training: what it is taught in place of web-scale pre-training.

The tower is transformers' own hybrid of a small residual network and a transformer (DPTModel with a BiT backbone). A
plain CLIP tower of this size cannot be taught in minutes to know a pictogram at any place: one matrix takes a patch to
its features, and must learn every offset by itself; convolutions share what they learn.

Dense supervision: every patch names what it shows, scored against the LLM's own word table, so that projected patches
mean words from the start. First the residual network alone learns on small windows, at a quarter of a picture's cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psa_fast.sandbox.content import CONTENT, OF_PLACES, changed, draw_pictures, patch_labels
from psa_fast.sandbox.optimise import Steps
from psa_fast.sandbox.word_level import PATCH
from psa_fast.sandbox.world import IMAGE_SIZE

if TYPE_CHECKING:
    from transformers import DPTConfig, LlavaForConditionalGeneration, LlavaProcessor

SIDE = IMAGE_SIZE // PATCH
# What is learned last weighs most.
LINE_WEIGHTS = (6.0, 1.0, 3.0, 1.0, 2.0, 2.0)


@dataclass(frozen=True)
class TowerRecipe:
    """The numbers of the tower's training."""

    layers: int = 2
    # channels of the residual network: its stem, its three stages
    channels: tuple[int, int, int, int] = (24, 64, 192, 256)
    window_side: int = 48
    windows: int = 8000
    window_steps: int = 1400
    window_batch: int = 64
    window_lr: float = 4e-3
    pictures: int = 4000
    mosaics: float = 0.5
    steps: int = 1150
    batch: int = 32
    lr: float = 2e-3
    warmup: int = 50


def tower_config(hidden_size: int, layers: int, heads: int, channels: tuple[int, ...]) -> DPTConfig:
    """The tower's configuration: a residual network of `channels` (TowerRecipe), then 36 patches and a class token."""
    from transformers import DPTConfig

    stem, *sizes = channels
    return DPTConfig(
        is_hybrid=True,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        layer_norm_eps=1e-5,
        backbone_featmap_shape=[1, sizes[-1], SIDE, SIDE],
        neck_ignore_stages=[0, 1],
        backbone_config={
            "model_type": "bit",
            "embedding_size": stem,
            "hidden_sizes": sizes,
            "depths": [1, 1, 2],
            "num_groups": 8,
            "layer_type": "preactivation",
            "hidden_act": "relu",
            "global_padding": "same",
            "embedding_dynamic_padding": True,
            "out_features": ["stage1", "stage2", "stage3"],
        },
    )


class _WordScores(nn.Module):
    """Scores patches against words of the LLM's table: logits [N, S, words] = scale * normed patch . normed word."""

    def __init__(self, word_ids: list[int]):
        super().__init__()
        self.word_ids = torch.tensor(word_ids)
        self.log_scale = nn.Parameter(torch.tensor(math.log(16.0)))

    def forward(self, patches: Tensor, table: Tensor) -> Tensor:
        words = F.normalize(table[self.word_ids], dim=-1)
        return F.normalize(patches, dim=-1) @ words.t() * self.log_scale.exp()


def content_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Weighted mean cross-entropy over the lines of CONTENT; among each line's words a free "none of it" at score 0."""
    losses, start = [], 0
    for i, words in enumerate(CONTENT):
        part = F.pad(scores[..., start : start + len(words)], (0, 1))
        target = torch.where(labels[..., i] == -1, len(words), labels[..., i])
        weight = torch.ones(len(words) + 1)
        weight[-1] = 0.25
        losses.append(F.cross_entropy(part.flatten(0, -2), target.flatten(), weight=weight, ignore_index=-100))
        start += len(words)
    return torch.stack(losses) @ torch.tensor(LINE_WEIGHTS) / sum(LINE_WEIGHTS)


def patch_features(vlm: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The tower's features as LLaVA takes them (last layer, no class token): [N, 3, 96, 96] -> [N, 36, hidden]."""
    tower: Any = vlm.model.vision_tower
    return tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def train_tower(
    vlm: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rng: np.random.Generator,
    recipe: TowerRecipe,
    progress: bool,
) -> float:
    """Train tower, projector and word table on content, in place; returns the smoothed last loss."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    tower: Any = vlm.model.vision_tower
    # convolutions are a third faster with the channels last; the weights are the same
    tower.to(memory_format=torch.channels_last)
    nn.init.normal_(tower.embeddings.position_embeddings, std=0.02)
    _train_windows(tower.embeddings, rng, generator, recipe, progress)

    vocabulary = processor.tokenizer.get_vocab()
    scorer = _WordScores([vocabulary[word] for words in CONTENT for word in words])
    table = vlm.model.language_model.embed_tokens.weight
    modules = (tower.embeddings, tower.encoder, vlm.model.multi_modal_projector, scorer)
    parameters = [p for module in modules for p in module.parameters()]
    pictures = draw_pictures(rng, recipe.pictures, recipe.mosaics)
    run = Steps("base, part a (content)", [*parameters, table], recipe.lr, recipe.steps, recipe.warmup, progress)
    for _ in run:
        chosen = pictures.take(torch.from_numpy(rng.integers(recipe.pictures, size=recipe.batch)))
        pixels, owners = changed(chosen, generator)
        patches = vlm.model.multi_modal_projector(patch_features(vlm, pixels))
        run.step(content_loss(scorer(patches, table), patch_labels(owners, chosen.items)))
    tower.to(memory_format=torch.contiguous_format)
    return run.smoothed


def _train_windows(
    embeddings: Any, rng: np.random.Generator, generator: torch.Generator, recipe: TowerRecipe, progress: bool
) -> None:
    """Let the residual network learn what patches show, on windows, with a classifier that is thrown away."""
    windows = draw_pictures(rng, recipe.windows, 1.0, recipe.window_side)
    lines = CONTENT[:OF_PLACES]
    classify = nn.Linear(embeddings.projection.out_channels, sum(map(len, lines)))
    parameters = [p for m in (embeddings.backbone, embeddings.projection, classify) for p in m.parameters()]
    run = Steps("base, part a (windows)", parameters, recipe.window_lr, recipe.window_steps, recipe.warmup, progress)
    for _ in run:
        chosen = windows.take(torch.from_numpy(rng.integers(recipe.windows, size=recipe.window_batch)))
        pixels, owners = changed(chosen, generator)
        labels = patch_labels(owners, chosen.items)
        features = embeddings.projection(embeddings.backbone(pixels).feature_maps[-1]).flatten(2).transpose(1, 2)
        scores = classify(features).split([len(words) for words in lines], dim=-1)
        losses = [
            F.cross_entropy(part.flatten(0, -2), labels[..., i].clamp_min(-1).flatten(), ignore_index=-1)
            for i, part in enumerate(scores)
        ]
        run.step(torch.stack(losses) @ torch.tensor(LINE_WEIGHTS[:OF_PLACES]) / sum(LINE_WEIGHTS[:OF_PLACES]))
