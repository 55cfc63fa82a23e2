"""What each stage trains, at which learning rate: freezing, optimizer groups, and the table of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from psa_fast.compat.deepspeed import full_shape
from psa_fast.models import PsaVLM, add_lora
from psa_fast.models.lora import has_adapter
from psa_fast.models.tokens import SafetyTokens

from .config import TrainConfig


@dataclass
class Part:
    """A named part of the model with one learning rate. `modules` are dotted names below PsaVLM.

    `adapter`: of these modules the LoRA adapter alone is trained.
    """

    name: str
    modules: tuple[str, ...]
    learning_rate: float
    adapter: bool = False


def trained_parts(model: PsaVLM, config: TrainConfig) -> list[Part]:
    """The parts the stage trains (paper, section 3.3: stage 1 the safety modules, stage 2 the language model)."""
    token_lr = config.token_learning_rate if config.token_learning_rate is not None else config.learning_rate
    tokens = Part("safety tokens (LLM)", ("safety_tokens",), token_lr)
    if config.stage == 1:
        bottleneck = Part("concept bottleneck", ("bottleneck",), config.learning_rate)
        return {"joint": [bottleneck, tokens], "concept": [bottleneck], "tokens": [tokens]}[config.stage1_objective]
    names = model.family.module_names
    if config.tune_type_llm == "lora":
        title, modules = f"LoRA r={config.lora_r} on the language model", (f"vlm.{names['language']}",)
        parts = [Part(title, modules, config.learning_rate, adapter=True), tokens]
    else:
        parts = [
            Part("language model", (f"vlm.{names['language']}", f"vlm.{names['lm_head']}"), config.learning_rate),
            tokens,
        ]
    if config.concept_loss_weight > 0:
        lr = config.safety_learning_rate
        parts.append(Part("concept bottleneck", ("bottleneck",), config.learning_rate if lr is None else lr))
    if config.tune_type_connector == "full":
        lr = config.connector_learning_rate
        parts.append(Part("VLM projector", (f"vlm.{names['connector']}",), config.learning_rate if lr is None else lr))
    return parts


def prepare(model: PsaVLM, config: TrainConfig, resuming: bool = False) -> list[Part]:
    """Freeze all, add LoRA where asked, unfreeze the stage's parts. A learning rate of 0 leaves a part frozen."""
    model.requires_grad_(False)
    lora = config.stage == 2 and config.tune_type_llm == "lora"
    if lora and not resuming:
        if has_adapter(model.vlm):
            raise ValueError(
                f"--addon {config.addon} already holds a LoRA adapter; stage 2 starts from a stage-1 add-on"
            )
        add_lora(model, r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout)
    parts = [part for part in trained_parts(model, config) if part.learning_rate > 0]
    for part in parts:
        for name, parameter in part_parameters(model, part):
            if not part.adapter or ".lora_" in name:
                parameter.requires_grad_(True)
    return parts


def part_parameters(model: PsaVLM, part: Part) -> list[tuple[str, torch.nn.Parameter]]:
    """The named parameters below a part's modules, frozen ones included."""
    prefixes = tuple(f"{module}." for module in part.modules)
    return [(name, parameter) for name, parameter in model.named_parameters() if name.startswith(prefixes)]


def clip_groups(model: PsaVLM) -> list[list[torch.nn.Parameter]]:
    """Trained parameters of stage 1's two parts, which no loss has in common. A part that is frozen is left out."""
    parts = (model.bottleneck, model.safety_tokens)
    groups = [[p for p in part.parameters() if p.requires_grad and full_shape(p).numel()] for part in parts]
    return [group for group in groups if group]


def optimizer_groups(model: PsaVLM, parts: list[Part], weight_decay: float, format_1: bool = False) -> list[dict]:
    """AdamW groups, one or two per part: weights that decay and others.

    As is usual every matrix decays, embeddings included; biases and norms, which are vectors, do not. Nor do learned
    tokens and the concept query (`SafetyTokens`), which are inputs to layers and no layers.

    Args:
        model: with the stage's parts unfrozen.
        parts: their learning rates.
        weight_decay: of the first kind.
        format_1: group as runs did whose checkpoints are of format 1. DeepSpeed's own state, which those hold, fits no
            other grouping: all matrices decayed, but those with "tokens" in their name.
    """
    kept_whole = {id(p) for module in model.modules() if isinstance(module, SafetyTokens) for p in module.parameters()}
    groups = []
    for part in parts:
        trained = [(name, p) for name, p in part_parameters(model, part) if p.requires_grad]
        decayed = [
            p
            for name, p in trained
            if len(full_shape(p)) > 1 and ("tokens" not in name if format_1 else id(p) not in kept_whole)
        ]
        known = {id(p) for p in decayed}
        others = [p for _, p in trained if id(p) not in known]
        for params, decay in ((decayed, weight_decay), (others, 0.0)):
            if params:
                groups.append({"params": params, "lr": part.learning_rate, "weight_decay": decay, "name": part.name})
    return groups


def print_table(model: PsaVLM, parts: list[Part], weight_decay: float, console: Console) -> None:
    """The table of what is trained, with its size and learning rate, and what stays frozen."""
    table = Table(title="What is trained")
    for column, justify in (
        ("part", "left"),
        ("parameters", "right"),
        ("learning rate", "right"),
        ("weight decay", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    trained = 0
    for part in parts:
        count = sum(full_shape(p).numel() for _, p in part_parameters(model, part) if p.requires_grad)
        trained += count
        table.add_row(part.name, f"{count:,}", f"{part.learning_rate:g}", f"{weight_decay:g}")
    total = sum(full_shape(p).numel() for p in model.parameters())
    table.add_row("frozen", f"{total - trained:,}", "-", "-")
    console.print(table)
