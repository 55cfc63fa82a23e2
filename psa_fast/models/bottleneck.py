"""The concept bottleneck: vision features and a text query in, risk type and risk level out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from psa_fast.models.attention import ConceptReadout
from psa_fast.models.config import PsaConfig
from psa_fast.models.projector import SafetyProjector
from psa_fast.models.tokens import SafetyTokens
from psa_fast.ops import ConceptLoss, concept_loss


class ConceptHeads(nn.Linear):
    """Type and level head as one Linear(E, 7 + 4), whose forward holds the loss: ZeRO-3 has its weight only there."""

    def __init__(self, embed_dim: int, head_sizes: Sequence[int]):
        super().__init__(embed_dim, sum(head_sizes))
        self.head_sizes = tuple(head_sizes)

    def forward(  # type: ignore[override]
        self,
        pooled: Tensor,
        targets: Tensor | None = None,
        class_weights: Tensor | Sequence[Tensor | None] | None = None,
        label_smoothing: float = 0.0,
        num_items: float | Tensor | None = None,
    ) -> Tensor | ConceptLoss:
        """pooled [B, E] -> logits [B, 11], or with targets [B, 2] the ConceptLoss."""
        if targets is None:
            return super().forward(pooled)
        return concept_loss(
            pooled,
            self.weight,
            self.bias,
            targets,
            self.head_sizes,
            class_weights=class_weights,
            label_smoothing=label_smoothing,
            num_items=num_items,
        )


class ConceptBottleneck(nn.Module):
    """Safety projector, head tokens, concept attention and heads (arXiv 2411.11543, section 3.2)."""

    def __init__(self, config: PsaConfig):
        super().__init__()
        self.image_tokens = config.image_tokens
        width = config.projector_hidden_size
        assert width is not None  # PsaConfig filled it in
        self.projector = SafetyProjector(
            config.vision_hidden_size,
            config.hidden_size,
            width=width,
            depth=config.projector_depth,
            eps=config.layer_norm_eps,
        )
        self.head_tokens = SafetyTokens(config.num_head_tokens, config.hidden_size)
        self.query = SafetyTokens(1, config.hidden_size) if config.query == "prompt" else None
        self.attention = ConceptReadout(config.hidden_size, config.num_attention_heads)
        self.heads = ConceptHeads(config.hidden_size, config.head_sizes)

    def forward(self, vision_features: Tensor, query_embeds: Tensor, features_mask: Tensor | None = None) -> Tensor:
        """Pool what the query finds in the image.

        Args:
            vision_features: h_o, [B, S1, Dv]; S1 = images per row times image_tokens.
            query_embeds: [B, E], a summary of the prompt; the learned query is added to it.
            features_mask: bool [B, S1], True = valid; None: all are. Masks whole images of rows that have fewer.

        Returns:
            pooled [B, E].
        """
        b, s1, width = vision_features.shape
        dtype = self.heads.weight.dtype
        grids = vision_features.to(dtype).reshape(b * s1 // self.image_tokens, self.image_tokens, width)
        features = self.projector(grids).reshape(b, s1, -1)
        query = query_embeds.to(dtype)
        if self.query is not None:
            query = query + self.query(1)[0]
        return self.attention(query.unsqueeze(1), self.head_tokens(1)[0], features, features_mask).squeeze(1)

    def loss(
        self,
        pooled: Tensor,
        targets: Tensor,
        class_weights: Tensor | Sequence[Tensor | None] | None = None,
        label_smoothing: float = 0.0,
        num_items: float | Tensor | None = None,
    ) -> ConceptLoss:
        """Losses of both heads; targets int64 [B, 2] (type, level), -100 ignored. See ops.concept_loss."""
        out = self.heads(pooled, targets, class_weights, label_smoothing, num_items)
        assert isinstance(out, ConceptLoss)
        return out


def prompt_query(embeds: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean of the embeddings [B, T, E] where mask [B, T] is True, scaled to root mean square 1: [B, E].

    Embeddings [1, T, E] serve all rows of the mask, as in a packed row.

    Word embeddings of real language models are tiny (Llama: 0.02 per entry, their mean smaller still): without the
    scale the query would start as good as constant and its projection would need a hundredfold learning rate.
    A row without any True, a request of images only, gets zeros: the learned query alone then asks. Computed in fp32
    at least.
    """
    wide = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    weights = mask.to(wide.dtype)
    total = weights @ wide[0] if wide.shape[0] == 1 else torch.bmm(weights.unsqueeze(1), wide).squeeze(1)
    mean = total / weights.sum(1, keepdim=True).clamp_min(1)
    return mean * torch.rsqrt(mean.square().mean(-1, keepdim=True) + eps)


def first_query(embeds: Tensor, mask: Tensor) -> Tensor:
    """Embedding of the prompt's first token (BOS), as in the paper's code, never padding: [B, T, E] -> [B, E].

    Embeddings [1, T, E] serve all rows of the mask [B, T], as in a packed row. A row without any True gets zeros, not
    whatever token stands first.
    """
    first = mask.to(torch.int64).argmax(dim=1)
    if embeds.shape[0] == 1:
        picked = embeds[0, first]
    else:
        picked = embeds[torch.arange(embeds.shape[0], device=embeds.device), first]
    return picked * mask.any(dim=1, keepdim=True).to(picked.dtype)
