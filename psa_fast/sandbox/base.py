"""Trains the sandbox's base VLM: a stock LLaVA of about 1.4M parameters that is aligned in text and naive in vision.

It refuses what the *text* or a safety hint tells it to refuse, and answers questions about any picture, risky or not:
the gap that PSA-VLM closes. Part a teaches the vision tower (and the projector) *content* by dense supervision: every
patch names what it shows, scored against the LLM's own word table. That stands in for web-scale pre-training and never
holds a risk label. Part b freezes the tower, caches its features and trains projector and LLM on questions.
No (scene, risk pictogram) composition of the dev or test split is ever shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from psa_fast.sandbox.content import draw_scenes, scene_pictures, to_pixels
from psa_fast.sandbox.language import HintFor, all_texts, related_words
from psa_fast.sandbox.lessons import START, Lessons, pack_turns
from psa_fast.sandbox.optimise import Steps
from psa_fast.sandbox.vision import SIDE, TowerRecipe, patch_features, tower_config, train_tower
from psa_fast.sandbox.word_level import MAX_LENGTH, build_processor
from psa_fast.sandbox.world import Scene

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor


@dataclass(frozen=True)
class BaseRecipe:
    """The numbers of a base training. Steps and batches are sized for seven minutes on two CPU cores."""

    hidden_size: int = 128
    language_layers: int = 3
    heads: int = 4
    tower: TowerRecipe = field(default_factory=TowerRecipe)
    pictures: int = 4000
    language_steps: int = 660
    # of them the first, on plain questions alone: look-ups are learned sooner with nothing around them
    plain_steps: int = 150
    language_batch: int = 32
    turns: int = 6
    # at 3e-3 some seeds never learn to look up, and answer half of the questions (docs/sandbox.md)
    language_lr: float = 2e-3
    warmup: int = 50
    foreign_tokens: int = 12
    # share of steps whose rows show two or three pictures
    several: float = 0.1


def build_base(processor: LlavaProcessor, recipe: BaseRecipe) -> LlavaForConditionalGeneration:
    """An untrained stock LLaVA that fits the sandbox's processor."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = processor.tokenizer
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.language_layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=MAX_LENGTH,
        # slow rotations: matching a word with the patches that mean it must not depend on their distance
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        # near 1 / sqrt(hidden size), where so narrow a model learns to look up within 100 steps (0.02: not in 400)
        initializer_range=0.06,
        tie_word_embeddings=True,
        **special,
    )
    config = LlavaConfig(
        vision_config=tower_config(recipe.hidden_size, recipe.tower.layers, recipe.heads, recipe.tower.channels),
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=SIDE * SIDE,
        tie_word_embeddings=True,
        **special,
    )
    vlm = LlavaForConditionalGeneration(config)
    _start_as_look_up(vlm)
    return vlm


@torch.no_grad()
def _start_as_look_up(vlm: LlavaForConditionalGeneration) -> None:
    """Let every word begin by looking at what is like it (key = query projection) and copying that (output = value^T).

    "What shape is red?" needs the patches that mean red, then what else they mean. From independent projections each
    direction of look-up (colour to shape, shape to place, ...) was a circuit of its own to be found; this is all of
    them at once.
    """
    for layer in vlm.model.language_model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.mul_(1.4)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(1.5 * attention.v_proj.weight.t())


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
        content_loss = train_tower(vlm, processor, np.random.default_rng([seed, 1]), recipe.tower, progress)
        _level_norms(vlm)
        _relate_words(vlm, processor)
        answer_loss = _train_language(vlm, processor, recipe, hint_for, np.random.default_rng([seed, 2]), progress)
    vlm.eval().save_pretrained(out)
    processor.save_pretrained(out)
    return {"content_loss": content_loss, "answer_loss": answer_loss}


@torch.no_grad()
def _level_norms(vlm: LlavaForConditionalGeneration) -> None:
    """Give words and projected patches norm 1, so that the LLM's layers move both equally far.

    Part a scores directions only and leaves patches ten times as long as words.
    """
    table = vlm.model.language_model.embed_tokens.weight
    table.div_(table.norm(dim=1, keepdim=True).clamp(min=1e-3))
    projector = vlm.model.multi_modal_projector
    patches = projector(_features(vlm, draw_scenes(np.random.default_rng(0), 100)))
    projector.linear_2.weight.div_(patches.norm(dim=-1).mean())
    projector.linear_2.bias.div_(patches.norm(dim=-1).mean())


@torch.no_grad()
def _relate_words(vlm: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Let words of related meaning begin near one another, as in any language model that has read much.

    A guard's queries are made of these embeddings; where every verb is a direction of its own, what it learned of
    "forge" or of a house says nothing of "steal" or "unlock". Words only: no risk is told apart from what is harmless.
    """
    table = vlm.model.language_model.embed_tokens.weight
    vocabulary = processor.tokenizer.get_vocab()
    for centre, words in related_words():
        shared = torch.randn(table.shape[1]) if centre is None else table[vocabulary[centre]]
        rows = torch.tensor([vocabulary[word] for word in words])
        table[rows] = F.normalize(F.normalize(table[rows], dim=-1) + F.normalize(shared, dim=0), dim=-1)


def _train_language(
    vlm: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    recipe: BaseRecipe,
    hint_for: HintFor,
    rng: np.random.Generator,
    progress: bool,
) -> float:
    scenes = draw_scenes(rng, recipe.pictures)
    cached = _features(vlm, scenes)
    lessons = Lessons(processor.tokenizer, hint_for, rng)
    prefix = lessons.ids(START)
    embed = vlm.get_input_embeddings()
    # the word table stays: trained, rarely spoken words drift into one direction, and a guard's queries become alike
    embed.weight.requires_grad_(False)
    language = [p for p in vlm.model.language_model.parameters() if p.requires_grad]
    trained = [*vlm.model.multi_modal_projector.parameters(), *language]
    steps = Steps("base, part b (answers)", trained, recipe.language_lr, recipe.language_steps, recipe.warmup, progress)
    for step in steps:
        several = int(rng.integers(2, 4)) if rng.random() < recipe.several else 1
        rows = max(1, recipe.language_batch // several)
        chosen = rng.integers(len(scenes), size=(rows, several))
        plain = step < recipe.plain_steps
        turns = [lessons.draw([scenes[i] for i in row], recipe.turns, plain) for row in chosen]
        foreign = _foreign_tokens(rng, rows * several, int(rng.integers(recipe.foreign_tokens + 1)), recipe.hidden_size)
        pictures = torch.cat([foreign, vlm.model.multi_modal_projector(cached[chosen.flatten()])], dim=1)
        pictures = pictures.reshape(rows, -1, recipe.hidden_size)
        width = len(prefix) + pictures.shape[1]
        pack = pack_turns(turns, width)
        start = embed(torch.tensor(prefix)).expand(rows, -1, -1)
        embeds = torch.cat([start, pictures, embed(pack.ids)], dim=1)
        hidden = vlm.model.language_model(
            inputs_embeds=embeds, attention_mask=pack.mask, position_ids=pack.positions, use_cache=False
        ).last_hidden_state
        rows = hidden[:, width:][pack.supervised]
        losses = F.cross_entropy(vlm.lm_head(rows), pack.targets, reduction="none")
        steps.step((losses * pack.weights).sum() / pack.weights.sum())
    embed.weight.requires_grad_(True)
    return steps.smoothed


@torch.no_grad()
def _features(vlm: LlavaForConditionalGeneration, scenes: list[Scene]) -> torch.Tensor:
    """The tower's features of scenes, [N, 36, hidden]."""
    parts = [scene_pictures(scenes[i : i + 100]).pixels for i in range(0, len(scenes), 100)]
    return torch.cat([patch_features(vlm, to_pixels(part)) for part in parts])


def _foreign_tokens(rng: np.random.Generator, rows: int, count: int, width: int) -> torch.Tensor:
    """[rows, count, width] meaningless vectors before the picture, up to twice as long as words.

    A large language model shrugs off embeddings it has never seen; one of this size takes them for a reason to refuse,
    and an add-on's safety tokens would cost a third of the clean answers before they are trained.
    """
    lengths = rng.uniform(0.02, 2.0, size=(rows, 1, 1))
    return torch.from_numpy((rng.standard_normal((rows, count, width)) * lengths / width**0.5).astype(np.float32))
