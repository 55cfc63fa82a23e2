"""Bytes of activations in a bf16 step: what autograd keeps for the backward pass, and the working set beside it.

Llama blocks as transformers writes them (norms widen their input to fp32), the concept bottleneck, the vision tower
under no_grad, the language-model loss. A frozen weight has no gradient, so a frozen linear keeps no input.
`tests/planning/test_activations.py` holds the formulas against the tensors that autograd really saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psa_fast.models import PsaConfig

BF16, FP32 = 2, 4
#: logits of one chunk of the LM loss, see ops.supervised_linear_cross_entropy
_CHUNK_ELEMENTS, _CHUNK_ROWS = 1 << 26, 256


@dataclass(frozen=True)
class Dims:
    """Widths and depths that activations depend on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    vision_hidden: int
    tower_hidden: int
    tower_intermediate: int
    image_tokens: int
    image_size: int
    projector_hidden: int
    projector_depth: int

    @classmethod
    def of(cls, base: Any, psa: PsaConfig) -> Dims:
        """From a base's transformers config and the add-on's."""
        text, vision = base.get_text_config(), base.vision_config
        assert psa.projector_hidden_size is not None  # PsaConfig filled it in
        return cls(
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocabulary=text.vocab_size,
            positions=text.max_position_embeddings,
            vision_hidden=psa.vision_hidden_size,
            tower_hidden=vision.hidden_size,
            tower_intermediate=vision.intermediate_size,
            image_tokens=psa.fixed_image_tokens,
            image_size=vision.image_size,
            projector_hidden=psa.projector_hidden_size,
            projector_depth=psa.projector_depth,
        )


@dataclass(frozen=True)
class Tuning:
    """How the language model is tuned: "frozen" (stage 1), "lora" or "full"."""

    kind: str
    lora_r: int = 0
    lora_dropout: float = 0.0


@dataclass(frozen=True)
class Layout:
    """Tokens of a micro-batch, tokens that attention takes as one row, and what it holds beside queries, keys, values.

    `holds` is "scores" (eager: [heads, length] in fp32 and bf16 for each token and layer), "mask" (SDPA on padded
    rows: one [length, length] for each row) or "nothing".
    """

    tokens: int
    length: int
    holds: str = "nothing"


def layer_saved(dims: Dims, tuning: Tuning, layout: Layout) -> int:
    """Bytes per token that one decoder block keeps."""
    eager = layout.holds == "scores"
    e, i = dims.hidden, dims.intermediate
    q, kv = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    norms = 2 * FP32 * (e + 1)
    scores = (FP32 + BF16) * dims.heads * layout.length if eager else BF16 * q + FP32 * dims.heads
    saved = norms + BF16 * (q + 2 * kv) + scores + BF16 * 3 * i
    if tuning.kind == "full":
        # the normalised states twice (for the norm's weight before it is applied, for the linears after), down's input
        saved += 2 * 2 * BF16 * e + BF16 * i + (BF16 * q if eager else 0)
    if tuning.kind == "lora":
        saved += 7 * BF16 * tuning.lora_r
        if tuning.lora_dropout > 0:  # each linear's own dropped input and its mask
            saved += (BF16 + 1) * (5 * e + q + i)
        else:
            saved += 2 * BF16 * e + BF16 * i + (BF16 * q if eager else 0)
    return saved


def layer_working_set(dims: Dims, layout: Layout) -> int:
    """Bytes per token of gradients that live at once while a block's backward runs (its MLP, or its eager scores)."""
    mlp = BF16 * 4 * dims.intermediate + FP32 * 4 * dims.hidden
    scores = (2 * FP32 + BF16) * dims.heads * layout.length if layout.holds == "scores" else 0
    return max(mlp, scores)


def layers_saved(layers: int, block: int, state: int, recompute_every: int) -> int:
    """Bytes that all decoder blocks keep at the backward pass's fullest moment.

    Args:
        layers: blocks.
        block: bytes that one keeps.
        state: bytes of its input, all that is kept of a block that is recomputed.
        recompute_every: one block in how many is, from the first on; 0: none.
    """
    if not recompute_every:
        return layers * block
    recomputed = -(-layers // recompute_every)
    kept = (layers - recomputed) * block + recomputed * state
    # one block at a time comes back in full, the last of them when the blocks behind it are gone already
    return kept + (block if (layers - 1) % recompute_every == 0 else 0)


def language_model(dims: Dims, tuning: Tuning, layout: Layout, recompute_every: int) -> dict[str, int]:
    """Bytes for a micro-batch; `recompute_every` as in `layers_saved`."""
    tokens = layout.tokens
    kept = layers_saved(dims.layers, layer_saved(dims, tuning, layout), BF16 * dims.hidden, recompute_every)
    norm = FP32 * (dims.hidden + 1)
    mask = tokens * layout.length * BF16 if layout.holds == "mask" else 0
    return {
        "language model activations": tokens * (kept + norm) + mask,
        "backward working set": tokens * layer_working_set(dims, layout),
        # embeddings, embeddings with images, last hidden states, the supervised ones, their gradient
        "embeddings and last states": tokens * 5 * BF16 * dims.hidden,
    }


def lm_loss(dims: Dims, tokens: int, head_trained: bool) -> int:
    """Bytes of one chunk of logits, and of a trained head's gradient."""
    logits = min(_CHUNK_ELEMENTS, max(_CHUNK_ROWS * dims.vocabulary, tokens * dims.hidden))
    return BF16 * logits + (FP32 * dims.vocabulary * dims.hidden if head_trained else 0)


def bottleneck_saved(dims: Dims) -> int:
    """Bytes per image that the trained concept bottleneck keeps."""
    c = dims.projector_hidden
    # inputs of three norms, three SiLUs, the 3x3 and the second 1x1 convolution and the gate; of the first 1x1 apart
    blocks = 2 * dims.projector_depth * (9 * BF16 * c + 3 * 2 * FP32)
    inputs = BF16 * (dims.vision_hidden + (2 * dims.projector_depth - 1) * c)
    downsample = BF16 * c if dims.vision_hidden != c else 0
    return dims.image_tokens * (blocks + inputs + downsample + BF16 * (c + dims.hidden))


def bottleneck(dims: Dims, images: int) -> int:
    """Bytes for `images` images: what is kept, and six gradients of the widest tensor."""
    working = 6 * BF16 * dims.image_tokens * max(dims.hidden, dims.projector_hidden)
    return images * (bottleneck_saved(dims) + working)


def vision(dims: Dims, images: int, connector_trained: bool) -> int:
    """Bytes for `images` images: pixels, the tower's widest moment, h_o and h_i; nothing is kept inside the tower."""
    pixels = FP32 * 3 * dims.image_size**2
    tower = (dims.image_tokens + 1) * BF16 * (6 * dims.tower_hidden + 4 * dims.tower_intermediate)
    features = dims.image_tokens * BF16 * (dims.vision_hidden + dims.hidden)
    connector = dims.image_tokens * BF16 * (dims.vision_hidden + 2 * dims.hidden) if connector_trained else 0
    return images * (pixels + tower + features + connector)
