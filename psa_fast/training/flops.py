"""What a stage's step must compute, and what the device can: the two numbers of MFU.

FLOPs are counted from the model's modules and from what a batch holds, two for a multiplication with its addition:

    per token        2 (W + W [gradient reaches it] + W_t)   W: weights of the language model's linears with LoRA's own
                                                             small ones, W_t: those of them that are trained
    per pair         4 Q layers (1 + 2 [gradient reaches])   causal attention: a position with itself and each earlier
                                                             one of its sample; Q = heads x their width
    per supervised   2 E V (1 + [gradient reaches] + [head trained])
    per image        tower up to its used layer, forward only; connector; safety projector, all of it trained: x 3
                     less the gradient of h_o; both meet each of an image's positions
    per row read     projections, absorbed readout and heads of the concept attention, x 3, for each query; the windows
                     that the worst is chosen among, forward only

"Gradient reaches": something in the language model or below it (safety tokens, connector) is trained. Recomputed
activations, padding, the blank image of a batch without images, norms, activations and the optimizer do not count. The
first decoder layer's input gradient counts even where only LoRA is trained and nothing below asks for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from psa_fast.models import PsaConfig, PsaVLM
from psa_fast.models.projector import DepthwiseConv3x3, SqueezeExcite
from psa_fast.models.queries import TRAINED_WINDOWS
from psa_fast.taxonomy import IGNORE_INDEX

from .config import TrainConfig


@dataclass(frozen=True)
class Load:
    """What a micro-batch holds, on one rank.

    Attributes:
        samples: rows of the data.
        tokens: their tokens, placeholders included, padding not.
        positions: tokens with padding.
        pairs: a position with itself or an earlier one of its sample.
        supervised: positions with a label.
        typed, levelled: rows of the type loss and of the level loss: a request's label by its whole prompt, again by
            its worst window, its picture's own label, and that of its words by themselves, as far as the add-on is
            trained on them.
        images, concept_rows, word_rows: images, and samples that the concept head reads with their images (an older
            add-on: or without any), and by their words alone.
    """

    samples: int
    tokens: int
    positions: int
    pairs: int
    supervised: int
    typed: int
    levelled: int
    images: int
    concept_rows: int
    word_rows: int

    @classmethod
    def of(cls, batch: dict[str, Any], psa: PsaConfig) -> Load:
        """From a collated batch (data.pack or data.collate) that is still on the CPU."""
        labels, counts = batch["labels"], batch["image_counts"]
        lengths = batch["lengths"] if "lengths" in batch else batch["attention_mask"].sum(1).tolist()
        return cls(
            samples=len(lengths),
            tokens=sum(lengths),
            positions=labels.numel(),
            pairs=sum(n * (n + 1) // 2 for n in lengths),
            supervised=int((labels[:, 1:] != IGNORE_INDEX).sum()),
            typed=_concept_rows(batch, "type", psa),
            levelled=_concept_rows(batch, "level", psa),
            images=int(counts.sum()),
            concept_rows=len(counts) if psa.reads_text and not psa.num_text_tokens else int((counts > 0).sum()),
            word_rows=len(counts) if psa.num_text_tokens else 0,
        )


@dataclass(frozen=True)
class StageFlops:
    """FLOPs of a stage's parts: of a token, a pair, a supervised position, an image, a sample with one, its words."""

    language_model: int
    attention: int
    lm_head: int
    vision: int
    connector: int
    bottleneck: int
    pooling: int
    words: int

    @classmethod
    def of(cls, model: PsaVLM, config: TrainConfig) -> StageFlops:
        """From a model whose parameters are frozen as the stage freezes them."""
        family, vlm = model.family, model.vlm
        parts: dict[str, int] = dict.fromkeys(cls.__dataclass_fields__, 0)
        if config.feature_cache is None:
            parts["vision"] = _tower(model)
        if config.runs_language_model:
            language, head, connector = (family.module(vlm, name) for name in ("language", "lm_head", "connector"))
            tokens_trained = model.config.num_safety_tokens > 0 and _trained(model.safety_tokens)
            reached = tokens_trained or _trained(language) or _trained(connector)
            text: Any = family.config.get_text_config()
            width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            weights, tuned = _weights(language), _weights(language, trained=True)
            parts["language_model"] = 2 * (weights * (1 + reached) + tuned)
            parts["attention"] = 4 * text.num_attention_heads * width * text.num_hidden_layers * (1 + 2 * reached)
            parts["lm_head"] = 2 * _weights(head) * (1 + reached + _trained(head))
            parts["connector"] = _connector(connector, model.config.fixed_image_tokens)
        if config.runs_bottleneck:
            parts["bottleneck"], parts["pooling"], parts["words"] = _bottleneck(model)
        return cls(**parts)

    def parts(self, load: Load) -> dict[str, int]:
        """FLOPs of a batch, part by part."""
        return {
            "language_model": self.language_model * load.tokens,
            "attention": self.attention * load.pairs,
            "lm_head": self.lm_head * load.supervised,
            "vision": self.vision * load.images,
            "connector": self.connector * load.images,
            "bottleneck": self.bottleneck * load.images,
            "pooling": self.pooling * load.concept_rows,
            "words": self.words * load.word_rows,
        }

    def total(self, load: Load) -> int:
        """FLOPs of a batch."""
        return sum(self.parts(load).values())


def _concept_rows(batch: dict[str, Any], head: str, psa: PsaConfig) -> int:
    """Targets of a head that PsaVLM.forward stacks for the batch."""
    pictured = batch["image_counts"] > 0
    times = 2 if psa.query_window else 1  # by the prompt and by its worst window
    request = batch[f"safe_{head}"] != IGNORE_INDEX
    words = batch.get(f"words_{head}")
    if psa.num_text_tokens:
        kind = batch.get("words_type", torch.full_like(batch["image_counts"], IGNORE_INDEX))
        request = request & pictured & ((kind == IGNORE_INDEX) | (kind == psa.concepts.harmless))
    elif not psa.reads_text:
        request = request & pictured
    count = times * int(request.sum())
    if psa.num_text_tokens and words is not None:
        count += times * int((words != IGNORE_INDEX).sum())
    if psa.neutral_query and f"picture_{head}" in batch:
        count += int(((batch[f"picture_{head}"] != IGNORE_INDEX) & pictured).sum())
    return count


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _weights(module: nn.Module, trained: bool = False) -> int:
    """Elements of the matrices of all nn.Linear (LoRA's are such too), or of the trained ones; also under ZeRO-3."""
    linears = (m for m in module.modules() if isinstance(m, nn.Linear))
    return sum(m.in_features * m.out_features for m in linears if m.weight.requires_grad or not trained)


def _tower(model: PsaVLM) -> int:
    vision = model.family.config.vision_config
    layers, positions = model.family.vision_run()
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    linears = 2 * positions * (4 * width**2 + 2 * width * vision.intermediate_size)
    embedding = 2 * patches * vision.num_channels * vision.patch_size**2 * width
    if getattr(vision, "is_hybrid", False):  # a residual network in place of one matrix
        embedding = _hybrid_embedding(model.family.module(model.vlm, "vision"), vision.image_size)
    return layers * (linears + 4 * positions**2 * width) + embedding


def _hybrid_embedding(tower: Any, image_size: int) -> int:
    """FLOPs of the residual network (BiT) and the projection before a hybrid tower's layers."""

    def conv(layer: nn.Conv2d, side: int) -> int:
        return 2 * layer.in_channels * layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1] * side**2

    embeddings = tower.embeddings
    backbone = embeddings.backbone.bit
    total, side = conv(backbone.embedder.convolution, image_size // 2), image_size // 4
    for number, stage in enumerate(backbone.encoder.stages):
        for index, layer in enumerate(stage.layers):
            total += conv(layer.conv1, side)
            side = side // 2 if number and not index else side  # a stage halves its input, but for the first
            total += conv(layer.conv2, side) + conv(layer.conv3, side)
            if layer.downsample is not None:
                total += conv(layer.downsample.conv, side)
    return total + conv(embeddings.projection, side)


def _connector(connector: nn.Module, image_tokens: int) -> int:
    linears = [m for m in connector.modules() if isinstance(m, nn.Linear)]
    weights = sum(m.in_features * m.out_features for m in linears)
    first = linears[0].in_features * linears[0].out_features if linears else 0
    return 2 * image_tokens * (3 * weights - first if _trained(connector) else weights)


def _bottleneck(model: PsaVLM) -> tuple[int, int, int]:
    """Of an image (safety projector, its keys in the attention), of a sample with one, and of its words alone."""
    projector, attention, heads = model.bottleneck.projector, model.bottleneck.attention, model.bottleneck.heads
    tokens, width, rows = model.config.fixed_image_tokens, attention.embed_dim, attention.num_heads
    gates = sum(_weights(m) for m in projector.modules() if isinstance(m, SqueezeExcite))
    depthwise = sum(9 * m.in_channels for m in projector.modules() if isinstance(m, DepthwiseConv3x3))
    met = _weights(projector) - gates + depthwise
    first: Any = projector.stage1[0]
    unasked = _weights(first.conv1) + _weights(first.downsample)
    key = 2 * rows * width  # multiplications of a key: scores and weighted sum
    # query, key, value and output projection; the readout before and after the pool, for each head
    projections = (4 + 2 * rows) * width**2 + heads.in_features * heads.out_features
    queries = 1 + bool(model.config.neutral_query) + bool(model.config.query_window)
    tried = TRAINED_WINDOWS if model.config.query_window else 0  # of which one is trained
    image = tokens * (met + queries * key) + gates
    pooling = projections + model.config.num_head_tokens * key
    passes = 3 if _trained(model.bottleneck) else 1
    unasked = unasked if passes == 3 else 0
    texts = model.config.num_text_tokens or 0
    by_words = passes * (1 + bool(tried)) + tried
    return (
        2 * (passes * image - tokens * unasked + tokens * tried * key),
        2 * (passes * queries + tried) * pooling,
        2 * by_words * (pooling + texts * key) if texts else 0,
    )


@dataclass(frozen=True)
class Meter:
    """What a run's MFU is measured with: the stage's FLOPs, None if not known, and `matrix_rate` of a rank's device."""

    flops: StageFlops | None
    rate: float


#: side of the matrices that are multiplied to measure a device
SIDES = {"cuda": 8192, "cpu": 512}


def matrix_rate(device: torch.device, dtype: torch.dtype, n: int | None = None, seconds: float | None = None) -> float:
    """FLOP/s of a square matrix product in `dtype`, the best of some: what a step could reach at most.

    Args:
        device: where.
        dtype: of both factors.
        n: their side; None: SIDES.
        seconds: how long products are repeated (three at least); None: 0.2 on a GPU, 0.1 on a CPU.
    """
    on_gpu = device.type == "cuda"
    n = n or SIDES[device.type]
    seconds = (0.2 if on_gpu else 0.1) if seconds is None else seconds
    # its own generator: the run's random numbers must not depend on a measurement
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    best, began, runs = float("inf"), time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        a @ b
        if on_gpu:
            torch.cuda.synchronize(device)
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return 2 * n**3 / best


def shared_matrix_rate(dtype: torch.dtype) -> float:
    """Rank 0's `matrix_rate` on every rank. A collective; call it while the device has nothing else to hold."""
    found: list[float] = [0.0]
    if dist.get_rank() == 0:
        on_gpu = torch.cuda.is_available()
        found[0] = matrix_rate(torch.device("cuda" if on_gpu else "cpu"), dtype)
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    dist.broadcast_object_list(found)
    return found[0]
