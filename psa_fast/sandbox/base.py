"""Trains the sandbox's base VLM: a stock LLaVA of about 1.5M parameters that is aligned in text and naive in vision.

It refuses what the *text* or a safety hint tells it to refuse, and answers questions about any picture, risky or not:
the gap that PSA-VLM closes. Part a teaches the vision tower (and the projector) *content* by dense supervision: every
patch names what is in its cell, scored against the LLM's own word table. That stands in for web-scale pre-training
and never holds a risk label. Part b freezes the tower, caches its features and trains projector and LLM on questions.
No (scene, risk pictogram) composition of the dev or test split is ever shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psa_fast.sandbox.language import HintFor, all_texts
from psa_fast.sandbox.lessons import Lessons, pack_turns
from psa_fast.sandbox.processor import PATCH, build_processor
from psa_fast.sandbox.world import (
    CELL, COLOURS, COLUMNS, GLYPHS, GRID, IMAGE_SIZE, MARKS, ROWS, SHAPES, Group, Scene, paint, sample_scene,
)  # fmt: skip

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

# Counted up whenever the same seed no longer gives the same base.
BASE_VERSION = 1
# Pictures shown: content only, so risky ones are as good as any. Labels of risk are never shown.
GROUP_SHARES: dict[Group, float] = {"clean": 0.5, "benign_twin": 0.25, "risk": 0.25}
SIDE = IMAGE_SIZE // PATCH
# A patch names one word of each line (or none of it): what CLIP's features would tell of a picture.
CONTENT = (SHAPES, tuple(COLOURS), GLYPHS, MARKS, ("one", "two", "three"), ROWS, COLUMNS)


@dataclass(frozen=True)
class BaseRecipe:
    """The numbers of a base training. Steps and batches are sized for about four minutes on two CPU cores."""

    hidden_size: int = 128
    vision_layers: int = 4
    language_layers: int = 3
    heads: int = 4
    tower_steps: int = 300
    tower_batch: int = 64
    tower_lr: float = 1.5e-3
    pictures: int = 6000
    language_steps: int = 700
    language_batch: int = 32
    turns: int = 6
    language_lr: float = 3e-3
    lookup_share: float = 0.3
    warmup: int = 50
    position_jitter: int = 16


def build_base(processor: LlavaProcessor, recipe: BaseRecipe) -> LlavaForConditionalGeneration:
    """An untrained stock LLaVA that fits the sandbox's processor."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = processor.tokenizer
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=recipe.hidden_size,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.language_layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=SIDE * SIDE,
        tie_word_embeddings=True,
        **special,
    )
    return LlavaForConditionalGeneration(config)


def train_base(
    out: str | Path, seed: int, hint_for: HintFor, recipe: BaseRecipe | None = None, progress: bool = True
) -> dict[str, float]:
    """Train a base and save it, with its processor, as a plain Hugging Face checkpoint folder.

    `hint_for(type_id, level_id)` gives the hint texts the base must understand (None: no such hint). The same seed
    gives the same base on the same machine and number of threads. Returns the final losses of both parts.
    Raises ValueError where `out` already holds something.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: already holds something; name a new or empty folder")
    recipe = recipe or BaseRecipe()
    processor = build_processor(all_texts(hint_for))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = build_base(processor, recipe)
    vlm.train()
    content_loss = _train_tower(vlm, processor, recipe, np.random.default_rng([seed, 1]), progress)
    answer_loss = _train_language(vlm, processor, recipe, hint_for, np.random.default_rng([seed, 2]), progress)
    vlm.eval().save_pretrained(out)
    processor.save_pretrained(out)
    return {"content_loss": content_loss, "answer_loss": answer_loss}


# --------------------------------------------------------------------------------------------------- part a: the tower
class _WordScores(nn.Module):
    """Scores patches against words of the LLM's table: logits [N, S, words] = scale * normed patch . normed word."""

    def __init__(self, word_ids: list[int]):
        super().__init__()
        self.register_buffer("word_ids", torch.tensor(word_ids))
        self.scale = nn.Parameter(torch.tensor(math.log(8.0)))

    def forward(self, patches: Tensor, table: Tensor) -> Tensor:
        words = F.normalize(table[self.word_ids], dim=-1)
        return F.normalize(patches, dim=-1) @ words.t() * self.scale.exp() * 2.0


def content_labels(scene: Scene) -> np.ndarray:
    """What each patch must name: int64 [36, 7], one index into each line of CONTENT, -1 for none of it."""
    labels = np.full((GRID * GRID, len(CONTENT)), -1, dtype=np.int64)
    labels[:, 5], labels[:, 6] = np.divmod(np.arange(GRID * GRID), GRID)
    for thing in scene.things:
        labels[thing.cell, :2] = SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)
    if scene.sign is not None:
        sign = scene.sign
        labels[sign.cell, 2:5] = GLYPHS.index(sign.glyph), MARKS.index(sign.marks), sign.count - 1
    rows, columns = np.divmod(np.arange(SIDE * SIDE), SIDE)
    per_cell = CELL // PATCH
    return labels[rows // per_cell * GRID + columns // per_cell]


def content_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the lines of CONTENT, a free "nothing of it" at score 0 among each line's words."""
    losses, start = [], 0
    for i, words in enumerate(CONTENT):
        part = F.pad(scores[..., start : start + len(words)], (0, 1))
        target = torch.where(labels[..., i] < 0, len(words), labels[..., i])
        weight = torch.ones(len(words) + 1)
        weight[-1] = 0.25 if i < 5 else 1.0
        losses.append(F.cross_entropy(part.flatten(0, -2), target.flatten(), weight=weight))
        start += len(words)
    return torch.stack(losses).mean()


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


def _train_tower(vlm, processor, recipe: BaseRecipe, rng: np.random.Generator, progress: bool) -> float:
    vocabulary = processor.tokenizer.get_vocab()
    scorer = _WordScores([vocabulary[word] for words in CONTENT for word in words])
    table = vlm.get_input_embeddings().weight
    modules = (vlm.model.vision_tower.embeddings, vlm.model.vision_tower.pre_layrnorm)
    layers = vlm.model.vision_tower.encoder.layers[:-1]
    parameters = [p for m in (*modules, *layers, vlm.model.multi_modal_projector, scorer) for p in m.parameters()]
    steps = _Steps("base, part a (content)", [*parameters, table], recipe.tower_lr, recipe.tower_steps, recipe, progress)
    for _ in steps:
        scenes = draw_scenes(rng, recipe.tower_batch)
        labels = torch.from_numpy(np.stack([content_labels(scene) for scene in scenes]))
        patches = vlm.model.multi_modal_projector(patch_features(vlm, to_pixels(scenes)))
        steps.step(content_loss(scorer(patches, table), labels))
    return steps.smoothed


# ------------------------------------------------------------------------------------------------ part b: the language
def _train_language(
    vlm, processor, recipe: BaseRecipe, hint_for: HintFor, rng: np.random.Generator, progress: bool
) -> float:
    scenes = draw_scenes(rng, recipe.pictures)
    with torch.no_grad():
        cached = torch.cat([patch_features(vlm, to_pixels(scenes[i : i + 100])) for i in range(0, len(scenes), 100)])
    lessons = Lessons(processor.tokenizer, hint_for, rng)
    prefix = lessons.ids("<s> USER:")
    embed = vlm.get_input_embeddings()
    trained = [*vlm.model.multi_modal_projector.parameters(), *vlm.model.language_model.parameters()]
    steps = _Steps("base, part b (answers)", trained, recipe.language_lr, recipe.language_steps, recipe, progress)
    for step in steps:
        lookups_only = step < recipe.lookup_share * recipe.language_steps
        chosen = rng.integers(len(scenes), size=recipe.language_batch)
        turns = [lessons.draw(scenes[i], recipe.turns, lookups_only) for i in chosen]
        pack = pack_turns(turns, len(prefix) + SIDE * SIDE, rng.integers(recipe.position_jitter + 1, size=len(turns)))
        patches = vlm.model.multi_modal_projector(cached[chosen])
        start = embed(torch.tensor(prefix)).expand(len(turns), -1, -1)
        embeds = torch.cat([start, patches, embed(pack.ids)], dim=1)
        hidden = vlm.model.language_model(
            inputs_embeds=embeds, attention_mask=pack.mask, position_ids=pack.positions, use_cache=False
        ).last_hidden_state
        rows = hidden[:, len(prefix) + SIDE * SIDE :][pack.supervised]
        losses = F.cross_entropy(vlm.lm_head(rows), pack.targets, reduction="none")
        steps.step((losses * pack.weights).sum() / pack.weights.sum())
    return steps.smoothed


class _Steps:
    """An optimisation: iterates over step numbers under a progress bar; `step(loss)` updates the parameters.

    AdamW with betas .9/.98, gradients clipped to norm 1, linear warm-up, cosine decay to zero.
    """

    def __init__(self, name: str, parameters: list[Tensor], lr: float, steps: int, recipe: BaseRecipe, progress: bool):
        from tqdm import tqdm

        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        warmup = min(recipe.warmup, max(1, steps // 4))

        def factor(step: int) -> float:
            return min((step + 1) / warmup, 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps))))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.smoothed = math.nan
        self.bar = tqdm(range(steps), desc=name, unit="step", disable=not progress)

    def __iter__(self) -> Iterator[int]:
        return iter(self.bar)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        value = loss.item()
        self.smoothed = value if math.isnan(self.smoothed) else 0.9 * self.smoothed + 0.1 * value
        self.bar.set_postfix(loss=f"{self.smoothed:.3f}", refresh=False)
