"""B0: the official PSA-VLM training step, written from its description, with correct labels.

The vision tower runs all layers and keeps every hidden state. The safety projector works on channels-first grids, whose
norms permute back and forth. The concept attention is nn.MultiheadAttention over [safety tokens ; features] with every
text position as a query and its weights returned; one position is used. The language model sees safety tokens, image
and text, padded on the right; its logits are computed for all positions, upcast, and copied by a mask before the
cross-entropy. LoRA is on every linear of the language model and on its head.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from step_forms import LORA_ALPHA, Batch, Form
from step_model import Size, same_weights
from torch import Tensor, nn

from psa_fast.data import Encoded
from psa_fast.models import PsaVLM
from psa_fast.taxonomy import IGNORE_INDEX


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return super().forward(x).permute(0, 3, 1, 2)


class ConvNormAct(nn.Module):
    """Convolution without bias, norm, SiLU or nothing."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, groups: int = 1, act: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.norm = LayerNorm2d(outputs, eps=1e-5)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class SqueezeExcite(nn.Module):
    """Channel gate."""

    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class Bottleneck(nn.Module):
    """RegNet's block as timm builds it: bottle ratio 1, group size 1."""

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.conv1 = ConvNormAct(inputs, channels)
        self.conv2 = ConvNormAct(channels, channels, 3, groups=channels)
        self.se = SqueezeExcite(channels, max(1, round(inputs * 0.25)))
        self.conv3 = ConvNormAct(channels, channels, act=False)
        self.downsample = nn.Identity() if inputs == channels else ConvNormAct(inputs, channels, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv3(self.se(self.conv2(self.conv1(x)))) + self.downsample(x))


class CAbstractor(nn.Module):
    """Honeybee's C-Abstractor: three blocks, pooling, three blocks, then Linear, SiLU, Linear."""

    def __init__(self, inputs: int, width: int, outputs: int, tokens: int, depth: int = 3):
        super().__init__()
        self.s1 = nn.Sequential(*(Bottleneck(inputs if i == 0 else width, width) for i in range(depth)))
        self.sampler = nn.AdaptiveAvgPool2d((isqrt(tokens), isqrt(tokens)))
        self.s2 = nn.Sequential(*(Bottleneck(width, width) for _ in range(depth)))
        self.readout = nn.Sequential(nn.Linear(width, outputs), nn.SiLU(), nn.Linear(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[N, S, Dv] -> [N, S, E]."""
        side = isqrt(x.shape[1])
        x = x.transpose(1, 2).unflatten(2, (side, side))
        x = self.s2(self.sampler(self.s1(x)))
        return self.readout(x.flatten(2).transpose(1, 2))


class OfficialPsa(nn.Module):
    """The stock model, both sets of safety tokens, the abstractor, the attention and two heads."""

    def __init__(self, vlm: nn.Module, psa: PsaVLM):
        """`vlm`: the base; `psa`: our model, whose safety modules' values are taken over."""
        super().__init__()
        config = psa.config
        width, e = config.projector_hidden_size, config.hidden_size
        self.vlm = vlm
        self.projector = CAbstractor(
            config.vision_hidden_size, width, e, config.image_tokens, depth=config.projector_depth
        )
        self.attention = nn.MultiheadAttention(e, config.num_attention_heads, batch_first=True)
        self.type_head, self.level_head = (nn.Linear(e, n) for n in config.head_sizes)
        self.safety_tokens = nn.Parameter(psa.safety_tokens.weight.detach().clone())
        self.head_tokens = nn.Parameter(psa.bottleneck.head_tokens.weight.detach().clone())
        weight = psa.bottleneck.heads.weight
        for module in (self.projector, self.attention, self.type_head, self.level_head):
            module.to(device=weight.device, dtype=weight.dtype)
        self._take_over(psa)

    @torch.no_grad()
    def _take_over(self, psa: PsaVLM) -> None:
        ours = psa.bottleneck
        for stage, blocks in ((self.projector.s1, ours.projector.stage1), (self.projector.s2, ours.projector.stage2)):
            for block, source in zip(stage, blocks, strict=True):
                for i in (1, 2, 3):
                    target: Any = getattr(block, f"conv{i}")
                    _copy(target.conv, getattr(source, f"conv{i}"))
                    _copy(target.norm, getattr(source, f"norm{i}"))
                _copy(block.se.fc1, source.se.fc1)
                _copy(block.se.fc2, source.se.fc2)
                if isinstance(block.downsample, ConvNormAct):
                    _copy(block.downsample.conv, source.downsample[0])
                    _copy(block.downsample.norm, source.downsample[1])
        first, _, last = self.projector.readout
        first.weight.copy_(ours.projector.expand.weight)
        first.bias.copy_(ours.attention.feature_bias)
        last.weight.copy_(ours.attention.readout_weight)
        last.bias.copy_(ours.attention.readout_bias)
        self.attention.in_proj_weight.copy_(ours.attention.in_proj_weight)
        self.attention.in_proj_bias.copy_(ours.attention.in_proj_bias)
        _copy(self.attention.out_proj, ours.attention.out_proj)
        sizes = list(ours.heads.head_sizes)
        for head, weight, bias in zip(
            (self.type_head, self.level_head), ours.heads.weight.split(sizes), ours.heads.bias.split(sizes), strict=True
        ):
            head.weight.copy_(weight)
            head.bias.copy_(bias)


def _copy(target: nn.Module, source: nn.Module) -> None:
    target.weight.copy_(source.weight.view_as(target.weight))
    if target.bias is not None:
        target.bias.copy_(source.bias)


class Official(Form):
    """B0. One image a row.

    Args:
        base: its parameters are shared, not copied.
        psa: our model before its first step; its safety modules and LoRA adapters are taken over.
        size: dimensions.
        stage: 1 or 2.
        dropout: of LoRA.
        lora_on_head: as the official code; False where the losses of several steps are compared.
        objective: "joint", or "concept": stage 1 without the language model, which the official forward can skip
            (`return_cls_only`).
        frozen: stage 2 as the official code trains it: LoRA alone. Safety modules and both kinds of safety tokens are
            frozen; they still run forward.
    """

    def __init__(
        self,
        base: nn.Module,
        psa: PsaVLM,
        size: Size,
        stage: int,
        dropout: float = 0.05,
        lora_on_head: bool = True,
        objective: str = "joint",
        frozen: bool = False,
    ):
        vlm = same_weights(base)
        if stage == 2:
            add_lora(vlm, size, dropout, lora_on_head)
            _same_adapters(vlm, psa.vlm)
        model = OfficialPsa(vlm, psa).train()
        parts = ("projector.", "attention.", "type_head.", "level_head.", "head_tokens")
        if frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and ".lora_" in name)
        self.has_language = objective == "joint"
        super().__init__("B0", model, model.safety_tokens.shape[0], parts)
        self.vlm: Any = vlm

    def batch(self, rows: Sequence[Encoded]) -> Batch:
        """The texts apart from the image too, answers included."""
        batch = super().batch(rows)
        ids, image = batch["input_ids"], self.vlm.config.image_token_id
        texts = [row[(row != image) & mask.bool()] for row, mask in zip(ids, batch["attention_mask"], strict=True)]
        batch["text_ids"] = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        return batch

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        features = self.vision(batch)
        losses = {"concept": self.concept(batch, features)}
        return losses | ({"lm": self.head(self.hidden(batch, features), batch)} if self.has_language else {})

    def vision(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """h_o, and h_i where the language model runs."""
        states = self.vlm.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
        features = states[-2][:, 1:]
        return features, self.vlm.model.multi_modal_projector(features) if self.has_language else None

    def concept(self, batch: Batch, features: tuple[Tensor, Tensor | None]) -> Tensor:
        model: Any = self.model
        h_s = model.projector(features[0])
        keys = torch.cat([model.head_tokens.expand(h_s.shape[0], -1, -1), h_s], dim=1)
        query = self.vlm.get_input_embeddings()(batch["text_ids"])
        pooled, _ = model.attention(query, keys, keys, need_weights=True)
        pooled = pooled[:, 0]
        kind = F.cross_entropy(model.type_head(pooled), batch["safe_type"], ignore_index=IGNORE_INDEX)
        level = F.cross_entropy(model.level_head(pooled), batch["safe_level"], ignore_index=IGNORE_INDEX)
        return kind + level

    def hidden(self, batch: Batch, features: Any) -> Tensor:
        """Row by row: text before the image, safety tokens, image, text after it."""
        model: Any = self.model
        rows = []
        for ids, image in zip(batch["input_ids"], features[1], strict=True):
            places = (ids == self.vlm.config.image_token_id).nonzero()
            start, end = int(places[0]), int(places[-1]) + 1
            before, after = (self.vlm.get_input_embeddings()(part) for part in (ids[:start], ids[end:]))
            rows.append(torch.cat([before, model.safety_tokens, image, after]))
        return self.vlm.model.language_model(
            inputs_embeds=torch.stack(rows), attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state

    def head(self, hidden: Tensor, batch: Batch) -> Tensor:
        logits = self.vlm.lm_head(hidden).float()
        real = batch["attention_mask"][:, 1:] != 0
        shifted, labels = logits[:, :-1][real].contiguous(), batch["labels"][:, 1:][real].contiguous()
        return F.cross_entropy(shifted, labels, ignore_index=IGNORE_INDEX)


@torch.no_grad()
def _same_adapters(vlm: nn.Module, source: nn.Module) -> None:
    values = dict(source.named_parameters())
    for name, parameter in vlm.named_parameters():
        if ".lora_" in name and name in values:
            parameter.copy_(values[name])


def add_lora(vlm: Any, size: Size, dropout: float, on_head: bool) -> None:
    """PEFT's LoRA on every linear of the language model, and on its head if asked."""
    from peft import LoraConfig

    from psa_fast.models.lora import inject

    pattern = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"
    pattern = rf"({pattern}|lm_head)" if on_head else pattern
    inject(
        vlm,
        LoraConfig(r=size.lora_r, lora_alpha=LORA_ALPHA, lora_dropout=dropout, bias="none", target_modules=pattern),
    )
