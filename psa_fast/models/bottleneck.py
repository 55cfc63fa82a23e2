"""The concept bottleneck: vision features and a text query in, risk type and risk level out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from psa_fast.models.concept_attention import ConceptReadout
from psa_fast.models.image_features import Features, GridFeatures, Ragged
from psa_fast.models.projector import SafetyProjector
from psa_fast.models.psa_config import PsaConfig
from psa_fast.models.queries import unsafe_log_odds
from psa_fast.models.tokens import SafetyTokens
from psa_fast.ops import ConceptLoss, concept_loss
from psa_fast.pictures import Grid


class ConceptHeads(nn.Linear):
    """Type and level head as one Linear(E, 7 + 4), whose forward holds the loss: ZeRO-3 has its weight only there."""

    def __init__(self, embed_dim: int, head_sizes: Sequence[int]):
        super().__init__(embed_dim, sum(head_sizes))
        types, levels = head_sizes
        self.head_sizes = (types, levels)

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
    """Safety projector, head tokens, concept attention and heads (arXiv 2411.11543, 3.2); the text tokens are ours."""

    def __init__(self, config: PsaConfig):
        super().__init__()
        self.image_tokens = config.image_tokens
        self.harmless = config.concepts.harmless
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
        # as wide as a query: what is as alike as the paper's 0.02 makes it cannot tell one request from another
        texts = config.num_text_tokens
        self.text_tokens = SafetyTokens(texts, config.hidden_size, std=1.0) if texts else None
        self.asks_first = config.query == "first"
        self.query = SafetyTokens(1, config.hidden_size) if config.query == "prompt" else None
        self.attention = ConceptReadout(config.hidden_size, config.num_attention_heads)
        self.heads = ConceptHeads(config.hidden_size, config.head_sizes)

    def forward(
        self,
        vision_features: Tensor,
        query_embeds: Tensor,
        features_mask: Tensor | None = None,
        windows: Tensor | None = None,
    ) -> Tensor:
        """Pool what the query finds in the image.

        Args:
            vision_features: h_o, [B, S1, Dv]; S1 = images per row times image_tokens.
            query_embeds: [B, E], a summary of the prompt; the learned query is added to it. Or [B, Q, E], several.
            features_mask: bool [B, S1], True = valid; None: all are. Masks whole images of rows that have fewer, or
                single cells of grids. A row without any is read from the head tokens alone.
            windows: [B, W, E], further queries, of which the row's worst, the one that the heads call risky most
                strongly, is pooled after the others; it is chosen without a gradient. Needs query_embeds [B, Q, E].

        Returns:
            pooled [B, E], or [B, Q, E], or [B, Q + 1, E] with windows.
        """
        b, s1, width = vision_features.shape
        assert self.image_tokens is not None  # images of different sizes go through project_images and pool
        features = self.project(vision_features.reshape(-1, self.image_tokens, width)).reshape(b, s1, -1)
        return self.pool(features, query_embeds, features_mask, windows)

    def project(self, vision_features: Tensor, grids: Sequence[Grid] | None = None) -> Tensor:
        """h_o [N, S, Dv] of images -> their features [N, S, E]; an image that is read several times needs it once.

        With `grids`, flat: [cells, Dv] -> [cells, E] (see SafetyProjector); `pool` takes rows of them, padded, with a
        mask of their cells.
        """
        return self.projector(vision_features.to(self.heads.weight.dtype), grids)

    def project_images(self, features: Features | Tensor) -> Tensor | Ragged:
        """`project` of a vision pass: [N, S, E], or each image's cells where they differ in number."""
        if isinstance(features, GridFeatures):
            return Ragged(self.project(features.vision.values, features.flat_grids), features.vision.sizes)
        return self.project(features if isinstance(features, Tensor) else features.vision)

    def pool(
        self,
        features: Tensor,
        query_embeds: Tensor,
        features_mask: Tensor | None = None,
        windows: Tensor | None = None,
    ) -> Tensor:
        """As `forward`, from projected features [B, S1, E]."""
        b, dtype = features.shape[0], self.heads.weight.dtype
        query = query_embeds.to(dtype)
        query = query.unsqueeze(1) if query.dim() == 2 else query
        tokens = self.head_tokens(1)[0]
        learned = None if self.query is None else self.query(1)[0]
        if windows is not None:
            asked = windows.to(dtype)
            with torch.no_grad():
                tried = asked if learned is None else asked + learned
                logits = self.heads(self.attention(tried, tokens, features, features_mask))
                worst = unsafe_log_odds(logits, self.heads.head_sizes, self.harmless).argmax(1)
            query = torch.cat([query, asked[torch.arange(b, device=asked.device), worst].unsqueeze(1)], 1)
        if learned is not None:
            query = query + learned
        pooled = self.attention(query, tokens, features, features_mask)
        return pooled.squeeze(1) if query_embeds.dim() == 2 else pooled

    def looked_at(self, features: Tensor, query_embeds: Tensor) -> Tensor:
        """The share of its attention that a query gives to each projected feature: [B, S1, E], [B, E] -> [B, S1].

        The rest goes to the head tokens.
        """
        query, tokens = self._asking(query_embeds), self.head_tokens(1)[0]
        return self.attention.weights(query, tokens, features)[:, 0, tokens.shape[0] :]

    def contributions(self, features: Tensor, query_embeds: Tensor) -> Tensor:
        """What each projected feature adds to the logits: [B, S1, E], [B, E] -> [B, 7 + 4, S1].

        Pool and heads are linear once the attention is known, so the logits are the sums over features and head tokens,
        and a constant. What a feature adds to all logits of a head alike changes no probability and is taken off: each
        feature's numbers of a head sum to 0.
        """
        query, tokens = self._asking(query_embeds), self.head_tokens(1)[0]
        added = self.attention.contributions(query, tokens, features, self.heads.weight)[:, 0, :, tokens.shape[0] :]
        return torch.cat([part - part.mean(1, keepdim=True) for part in added.split(self.heads.head_sizes, 1)], 1)

    def _asking(self, query_embeds: Tensor) -> Tensor:
        """Queries [B, E] as the attention takes them: [B, 1, E], the learned one added."""
        query = query_embeds.to(self.heads.weight.dtype).unsqueeze(1)
        return query if self.query is None else query + self.query(1)[0]

    def read_words(self, query_embeds: Tensor, windows: Tensor | None = None) -> Tensor:
        """As `forward`, without a picture: what the query finds in the head and text tokens.

        Raises ValueError without text tokens (`PsaConfig.num_text_tokens`).
        """
        if self.text_tokens is None:
            raise ValueError("the add-on has no text tokens, so it reads no words by themselves")
        tokens = self.text_tokens(query_embeds.shape[0]).to(self.heads.weight.dtype)
        return self.pool(tokens, query_embeds, None, windows)

    def queries(self, embeds: Tensor, text: Tensor) -> Tensor:
        """What asks: word embeddings [B, T, E] and a mask bool [B, T] or [B, Q, T] -> [B, E] or [B, Q, E]."""
        return first_query(embeds, text) if self.asks_first else prompt_query(embeds, text)

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

    Embeddings [1, T, E] serve all rows of the mask, as in a packed row. A mask [B, Q, T] gives [B, Q, E].

    Word embeddings of real language models are tiny (Llama: 0.02 per entry, their mean smaller still): without the
    scale the query would start as good as constant and its projection would need a hundredfold learning rate.
    A row without any True, a request of images only, gets zeros: the learned query alone then asks. Computed in fp32
    at least.
    """
    wide = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
    weights = mask.to(wide.dtype)
    if wide.shape[0] == 1:
        total = weights @ wide[0]
    else:
        total = torch.bmm(weights if mask.dim() == 3 else weights.unsqueeze(1), wide)
        total = total if mask.dim() == 3 else total.squeeze(1)
    mean = total / weights.sum(-1, keepdim=True).clamp_min(1)
    return mean * torch.rsqrt(mean.square().mean(-1, keepdim=True) + eps)


def first_query(embeds: Tensor, mask: Tensor) -> Tensor:
    """Embedding of the prompt's first token (BOS), as in the paper's code, never padding: [B, T, E] -> [B, E].

    Embeddings [1, T, E] serve all rows of the mask [B, T], as in a packed row; a mask [B, Q, T] gives
    [B, Q, E]. A row without any True gets zeros, not
    whatever token stands first.
    """
    first = mask.to(torch.int64).argmax(dim=-1)
    if embeds.shape[0] == 1:
        picked = embeds[0, first]
    else:
        rows = torch.arange(embeds.shape[0], device=embeds.device)
        picked = embeds[rows if mask.dim() == 2 else rows.unsqueeze(1), first]
    return picked * mask.any(dim=-1, keepdim=True).to(picked.dtype)
