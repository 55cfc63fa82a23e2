"""PsaVLM: a stock Hugging Face VLM with safety tokens and a concept bottleneck around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from psa_fast.models import addon as addon_files
from psa_fast.models.batch import Batch, positions_of, read_batch_inputs, tokens_of_features
from psa_fast.models.bottleneck import ConceptBottleneck
from psa_fast.models.concept_readings import ConceptLabels, by_row, read_batch
from psa_fast.models.families import Family, Rows, get_family
from psa_fast.models.image_features import Features, GridFeatures, Ragged
from psa_fast.models.lm_head import supervise
from psa_fast.models.packing import Packing
from psa_fast.models.placeholders import as_list, count_images
from psa_fast.models.psa_config import PsaConfig
from psa_fast.models.tokens import SafetyTokens
from psa_fast.pictures import Images
from psa_fast.taxonomy import IGNORE_INDEX


@dataclass
class PsaOutput(ModelOutput):
    """What PsaVLM.forward returns; a part that was not asked for is None.

    Attributes:
        loss: weighted sum of the losses below.
        loss_lm: next-token loss; None without labels.
        loss_type, loss_level: concept losses; None without concept targets.
        concept_logits: [R, 7 + 4] by the whole prompt, of the pictures or, in rows without one, of the words, for the R
            rows that are read: those with an image, or all of them if the add-on reads text.
        concept_rows: int64 [R], their row numbers.
    """

    loss: Tensor | None = None
    loss_lm: Tensor | None = None
    loss_type: Tensor | None = None
    loss_level: Tensor | None = None
    concept_logits: Tensor | None = None
    concept_rows: Tensor | None = None


class PsaVLM(nn.Module):
    """PSA-VLM (arXiv 2411.11543) composed around a stock model: `vlm`, `bottleneck`, `safety_tokens`.

    Build one with `PsaVLM.build` or `PsaVLM.from_pretrained`.
    """

    def __init__(self, vlm: PreTrainedModel, config: PsaConfig):
        super().__init__()
        self.config = config
        self.family: Family = get_family(vlm)
        _check_fit(config, self.family)
        supervise(self.family.module(vlm, "lm_head"))
        self.vlm = vlm
        self.bottleneck = ConceptBottleneck(config)
        self.safety_tokens = SafetyTokens(config.num_safety_tokens, config.hidden_size)
        #: names in `vlm` of base weights that an add-on has changed, see addon.py
        self.changed_base_weights: set[str] = set()

    @classmethod
    def build(cls, vlm: PreTrainedModel, config: PsaConfig | None = None, **overrides: Any) -> PsaVLM:
        """A new, untrained add-on for a loaded base, in the base's dtype and on its device.

        Args:
            vlm: the base, LlavaForConditionalGeneration for one.
            config: the whole configuration; None: taken from the base.
            overrides: PsaConfig fields that differ from the base's or the default value.
        """
        if config is None:
            family = get_family(vlm)
            fields: dict[str, Any] = {
                "vision_hidden_size": family.vision_hidden_size,
                "hidden_size": family.hidden_size,
                "image_tokens": family.image_tokens(),
                **addon_files.base_identity(vlm),
            }
            config = PsaConfig(**{**fields, **overrides})
        elif overrides:
            raise ValueError("give either a config or single fields, not both")
        psa = cls(vlm, config)
        for module in (psa.bottleneck, psa.safety_tokens):
            module.to(device=vlm.device, dtype=vlm.dtype)
        return psa

    @classmethod
    def from_pretrained(
        cls, base: str | Path | PreTrainedModel | None, addon: str | Path | None = None, dtype: Any = None
    ) -> PsaVLM:
        """Load a base and, if given, an add-on (with its adapter or changed base weights) on it.

        Args:
            base: path, hub name or loaded model; None: the one that the add-on names.
            addon: folder written by `save_addon`; None: a new add-on.
            dtype: of the base; None: as stored.

        Raises:
            ValueError: the add-on does not fit the base, or has missing or unexpected keys.
        """
        return addon_files.load(cls, base, addon, dtype)

    def save_addon(self, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write everything but the untouched base: see addon.py for the files.

        Args:
            directory: created if absent.
            state_dict: full tensors named as in `named_parameters()`, where the model's own are sharded (ZeRO-3).
        """
        addon_files.save(self, directory, state_dict)

    def psa_state_dict(self) -> dict[str, Tensor]:
        """The safety modules' tensors, named as in `named_parameters()`."""
        return {name: p for name, p in self.state_dict().items() if not name.startswith("vlm.")}

    def encode_images(self, pixel_values: Images) -> Features:
        """The one vision pass: [N, 3, H, W] -> h_o [N, S, Dv] and h_i [N, S, E]; Pictures -> GridFeatures."""
        return self.family.encode_images(self.vlm, pixel_values)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Images | None = None,
        image_counts: Tensor | None = None,
        labels: Tensor | None = None,
        query_mask: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        vision_features: Tensor | None = None,
        position_ids: Tensor | None = None,
        safe_type: Tensor | None = None,
        safe_level: Tensor | None = None,
        picture_type: Tensor | None = None,
        picture_level: Tensor | None = None,
        words_type: Tensor | None = None,
        words_level: Tensor | None = None,
        num_items: float | Tensor | None = None,
        num_concept_rows: float | Tensor | None = None,
        concept_loss_weight: float = 1.0,
        lm_loss_weight: float = 1.0,
        class_weights: Tensor | Sequence[Tensor | None] | None = None,
        label_smoothing: float = 0.0,
    ) -> PsaOutput:
        """Losses of one batch from one vision pass. Every rank runs the same modules, whatever its batch holds.

        A batch is B padded rows or, with `lengths`, one packed row of B samples end to end ([1, T] below): the same
        losses. image_counts, safe_type, safe_level and the concept rows are per sample in either case.

        Args:
            input_ids: int64 [B, T]; each image has num_safety_tokens + S placeholders.
            attention_mask: [B, T], 1 = real; left or right padding. None: no padding.
            pixel_values: the batch's images in order, [N, 3, H, W] or, of a family whose images differ in their
                tokens, Pictures; None: no row has an image.
            image_counts: int64 [B], images of each row (kept on the CPU it costs no synchronisation); None: counted.
            labels: int64 [B, T], unshifted as in transformers; -100 ignored. None: the language model is not run.
            query_mask: bool [B, T], the prompt's text positions; None: all text that is not padding and has no label.
            lengths: tokens of each sample of a packed row, as python ints; None: the rows are padded.
            vision_features: h_o of the batch's images, [N, S, Dv], N may be 0; the vision tower is not run. In place of
                pixel_values.
            position_ids: int64 [P, B, T], where the family has its own (data.collate and data.pack give them); None:
                made here, which reads input_ids back from the device.
            safe_type, safe_level: int64 [B], the request's label, -100 = none: asked of rows with an image whose
                words are not risky by themselves (concept_readings.py). Each counts once by its whole prompt and, if
                the add-on has windows, once more by the worst of them (the prompt itself if it is no longer).
            picture_type, picture_level: int64 [B], the picture's own label, -100 = unknown: asked of the learned query
                alone, in rows with an image; unused by an add-on without neutral_query.
            words_type, words_level: int64 [B], the label of the words by themselves, -100 = unknown: asked of all rows,
                by prompt and window; unused by an add-on without text tokens. If all six labels are None but `labels`
                is given, the bottleneck is not run.
            num_items, num_concept_rows: divisors of the summed losses, for batches spread over ranks or accumulation
                steps; None: this batch's own counts. num_concept_rows may be one value per head [2]; what counts is
                told by training.flops.Load.
            concept_loss_weight: w in L = L_LM + w (L_type + L_level); the paper writes 1, its code uses 10.
            lm_loss_weight: factor of L_LM.
            class_weights, label_smoothing: of the concept losses, see ops.concept_loss.

        Raises:
            ValueError: images, image_counts and placeholders do not agree, or input_ids and lengths.
        """
        batch = read_batch_inputs(
            self, input_ids, attention_mask, lengths, pixel_values, vision_features, image_counts, position_ids
        )
        targets = ConceptLabels((safe_type, safe_level), (picture_type, picture_level), (words_type, words_level))
        out, concepts = PsaOutput(), None
        if labels is None or targets.given:
            text = self.query_text(input_ids, attention_mask, labels, query_mask, batch.packing)
            concepts = self._concepts(out, batch, text, targets, class_weights, label_smoothing, num_concept_rows)
        if labels is not None:
            out.loss_lm = self._language_loss(batch, labels, num_items)
        weighted = ((concept_loss_weight, concepts), (lm_loss_weight, out.loss_lm))
        if losses := [weight * loss for weight, loss in weighted if loss is not None]:
            out.loss = torch.stack([loss.to(torch.promote_types(loss.dtype, torch.float32)) for loss in losses]).sum()
        return out

    def _concepts(
        self,
        out: PsaOutput,
        batch: Batch,
        text: Tensor,
        targets: ConceptLabels,
        class_weights: Tensor | Sequence[Tensor | None] | None,
        label_smoothing: float,
        num_rows: float | Tensor | None,
    ) -> Tensor | None:
        """Read the batch into `out`; the concept losses' sum, None without targets."""
        read = read_batch(self.bottleneck, self.config, batch.features, batch.counts, batch.rows.embeds, text, targets)
        concept = self.bottleneck.loss(read.pooled, read.targets, class_weights, label_smoothing, num_rows)
        out.concept_rows, out.concept_logits = read.rows, concept.logits[read.places]
        if not targets.given:
            return None
        out.loss_type, out.loss_level = concept.losses.unbind()
        # the zero keeps every parameter in the graph of a rank whose rows have no target
        return concept.loss + 0.0 * concept.logits.sum().to(concept.loss.dtype)

    def _language_loss(self, batch: Batch, labels: Tensor, num_items: float | Tensor | None) -> Tensor:
        projected = self.family.project(self.vlm, batch.features)
        aligned = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        packing, rows, attention = batch.packing, batch.rows, {}
        if packing is not None:
            attention = packing.attention_kwargs()
            rows = rows if rows.position_ids is not None else rows._replace(position_ids=packing.position_ids)
            aligned = aligned.index_fill(1, packing.last(), IGNORE_INDEX)  # the next sample is no continuation
        elif rows.position_ids is None and rows.attention_mask is not None:
            rows = rows._replace(position_ids=_position_ids(rows.attention_mask))
        hidden = self.family.states(self.vlm, rows, self.safety_tokens, projected, any(batch.counts), **attention)
        head: Any = self.family.module(self.vlm, "lm_head")
        return head(hidden, labels=aligned, num_items=num_items)

    def concept_logits(
        self,
        features: Features | None,
        image_counts: Tensor | Sequence[int],
        input_ids: Tensor,
        query_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        projected: Tensor | Ragged | None = None,
    ) -> Tensor:
        """Logits from features already computed, differentiable.

        Args:
            features: of all rows' images in order; None where no row has one, or where `projected` is given.
            projected: in place of features: what `bottleneck.project_images` made of them.
            image_counts: int [B]; a row without an image (0) is read by its words alone.
            input_ids: int64 [B, T], of which only text is read: placeholders need not fit the images.
            query_mask: bool [B, T], or [B, Q, T] for Q queries from one launch. A mask without any True is the learned
                query alone. None: all text that is not padding.
            attention_mask: [B, T]; with a query_mask it has no effect.

        Returns:
            [B, 7 + 4], or [B, Q, 7 + 4].

        Raises ValueError for another number of images, and for a row with neither images nor head tokens.
        """
        counts = as_list(image_counts)
        if features is not None:
            projected = self.bottleneck.project_images(features)
        if (0 if projected is None else len(projected)) != sum(counts):
            raise ValueError(f"image_counts names {sum(counts)} images, features hold another number")
        if 0 in counts and self.config.num_head_tokens == 0:
            raise ValueError("a row has no image, and the add-on no head tokens: there is nothing to read")
        embeds = self.family.embed(self.vlm, input_ids)
        query = self.bottleneck.queries(embeds, self.query_text(input_ids, attention_mask, None, query_mask))
        shown = [row for row, count in enumerate(counts) if count or self.bottleneck.text_tokens is None]
        bare = sorted(set(range(len(counts))) - set(shown))
        pooled = []
        if shown:
            if projected is None:
                cells = 1 if self.config.image_tokens is None else self.config.image_tokens
                blank = torch.zeros(1, cells, self.config.vision_hidden_size, dtype=query.dtype)
                projected = self.bottleneck.project(blank.to(query.device))
            rows, mask = by_row(projected, [counts[row] for row in shown])
            pooled.append(self.bottleneck.pool(rows, query[shown], mask))
        if bare:
            pooled.append(self.bottleneck.read_words(query[bare]))
        logits = self.bottleneck.heads(torch.cat(pooled))
        assert isinstance(logits, Tensor)
        order = shown + bare
        return logits if order == sorted(order) else logits[[order.index(row) for row in range(len(order))]]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        features: Features | None = None,
        image_counts: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """New ids only, [B, t], greedy unless asked otherwise.

        Args:
            input_ids: [B, T], left padded.
            attention_mask: [B, T]; None: no padding.
            features: from `encode_images`, all images of the batch in order; None: no images.
            image_counts: int [B]; None: counted from the placeholders.
            kwargs: transformers' generation options, such as max_new_tokens.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not bool(attention_mask[:, -1].all()):
            raise ValueError("generate needs left padding: the last position of every row must be a token")
        placeholders = input_ids == self.family.image_token_id
        counts = count_images(self.config, placeholders, tokens_of_features(features), image_counts)
        grids = features.grids if isinstance(features, GridFeatures) else []
        safety = self.config.num_safety_tokens
        positions = positions_of(self.family, safety, input_ids, grids, counts, attention_mask=attention_mask)
        rows = Rows(input_ids, self.family.embed(self.vlm, input_ids), attention_mask, positions)
        if not kwargs.setdefault("do_sample", False):
            kwargs = {"temperature": None, "top_p": None, "top_k": None, **kwargs}  # a base may have sampling defaults
        return self.family.answer(self.vlm, rows, self.safety_tokens, features if any(counts) else None, **kwargs)

    def insert_images(self, embeds: Tensor, input_ids: Tensor, projected: Tensor, has_images: bool = True) -> Tensor:
        """Put [s_llm ; h_i] in place of the placeholders.

        Args:
            embeds: word embeddings [B, T, E].
            input_ids: int64 [B, T].
            projected: h_i of the images in order, [N, S, E].
            has_images: False: there are none, and `projected` is a blank image's, which stays in the graph only.
        """
        return self.family.insert_images(embeds, input_ids, self.safety_tokens, projected, has_images)

    def image_rows(self, features: Features) -> Tensor:
        """[s_llm ; h_i] of each image, [N, S0 + S, E]: what stands at its placeholders in the language model's input.

        Raises ValueError for images that differ in their tokens.
        """
        if isinstance(features, GridFeatures):
            raise ValueError("the images differ in their tokens: their rows do not tell all that the model reads")
        tokens = self.safety_tokens(features.images).to(features.projected.dtype)
        return torch.cat([tokens, features.projected], dim=1)

    def query_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        query_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Text that the concept attention may ask with, bool [B, T] or as query_mask; of B samples of a packed row.

        Never an answer's tokens, which would leak the label: with a query_mask [B, T] or [B, Q, T] what that says but
        placeholders, else all that is neither padding nor labelled. Arguments as for `forward`.
        """
        text = input_ids != self.family.image_token_id
        if query_mask is not None:
            text = (text.unsqueeze(1) if query_mask.dim() == 3 else text) & query_mask
        else:
            if attention_mask is not None:
                text = text & attention_mask.bool()
            if labels is not None:
                text = text & (labels == IGNORE_INDEX)
        return text if packing is None else packing.by_sample(text)


def _position_ids(attention_mask: Tensor) -> Tensor:
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def _check_fit(config: PsaConfig, family: Family) -> None:
    for name, wanted in (
        ("vision_hidden_size", family.vision_hidden_size),
        ("hidden_size", family.hidden_size),
        ("image_tokens", family.image_tokens()),
    ):
        if getattr(config, name) != wanted:
            raise ValueError(f"the add-on has {name} {getattr(config, name)}, the base {wanted}: they do not fit")
