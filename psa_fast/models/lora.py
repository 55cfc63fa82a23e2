"""LoRA on the language model's linears, through PEFT's own interface (no wrapper around the VLM).

transformers has a wrapper of its own, `vlm.add_adapter`, which refuses every PEFT below a version of its choosing.
It is not used.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from psa_fast.compat.transformers import mark_adapter
from psa_fast.files import shorten

if TYPE_CHECKING:
    from psa_fast.models.psa import PsaVLM

MAX_RANK = MAX_ALPHA = 1 << 16


def has_adapter(vlm: nn.Module) -> bool:
    """Whether PEFT has put an adapter into the model."""
    return bool(getattr(vlm, "peft_config", None))


def add_lora(psa: PsaVLM, r: int = 256, alpha: float = 16, dropout: float = 0.05) -> list[str]:
    """Add an adapter to every nn.Linear inside the language model, never to lm_head, vision tower or connector.

    Defaults are the paper's. PEFT freezes the rest of the VLM; the safety modules are left as they are.

    Returns:
        Names in `psa.vlm` of the layers that got an adapter.

    Raises:
        ValueError: there is an adapter already, r, alpha or dropout is out of range, or there is no such layer.
    """
    from peft import LoraConfig

    check_lora(r, alpha, dropout)
    targets = target_linears(psa)
    inject(
        psa.vlm,
        LoraConfig(
            r=r,
            lora_alpha=alpha,  # type: ignore[arg-type]  # a float does as well
            lora_dropout=dropout,
            bias="none",
            target_modules=target_pattern(psa),
        ),
    )
    return list(targets)


def check_lora(r: Any, alpha: Any, dropout: Any) -> None:
    """Raise ValueError for a rank, alpha or dropout that is no number in range."""
    if type(r) is not int or not 1 <= r <= MAX_RANK:
        raise ValueError(f"LoRA's r is {shorten(r)}; expected an integer from 1 to {MAX_RANK}")
    if type(alpha) not in (int, float) or not 0 < alpha <= MAX_ALPHA:
        raise ValueError(f"LoRA's alpha is {shorten(alpha)}; expected a number above 0, at most {MAX_ALPHA}")
    if type(dropout) not in (int, float) or not (math.isfinite(dropout) and 0 <= dropout < 1):
        raise ValueError(f"LoRA's dropout is {shorten(dropout)}; expected a number from 0 to below 1")


def target_linears(psa: PsaVLM) -> dict[str, nn.Linear]:
    """The layers that get an adapter, by their names in `psa.vlm`. ValueError if there is none."""
    language = psa.family.module_names["language"]
    body = psa.family.module(psa.vlm, "language")
    found = {f"{language}.{name}": module for name, module in body.named_modules() if isinstance(module, nn.Linear)}
    if not found:
        raise ValueError("the language model has no linear layers for LoRA (it was loaded without its layers)")
    return found


def target_pattern(psa: PsaVLM) -> str:
    """PEFT's `target_modules` for them: a pattern, as a list of leaves would match the vision tower's q_proj too."""
    language = psa.family.module_names["language"]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in target_linears(psa)})
    return rf"{re.escape(language)}\.(?:.*\.)?(?:{'|'.join(map(re.escape, leaves))})"


def inject(vlm: Any, config: Any, name: str = "default") -> None:
    """Put a new, trainable adapter of a LoraConfig into the model; everything else in it is frozen.

    Raises:
        ValueError: there is an adapter already.
    """
    from peft import inject_adapter_in_model

    if has_adapter(vlm):
        raise ValueError("the model has a LoRA adapter already")
    config.base_model_name_or_path = getattr(vlm, "name_or_path", None)
    inject_adapter_in_model(config, vlm, adapter_name=name)
    mark_adapter(vlm)


def merge(vlm: Any) -> None:
    """Add the adapter to the weights that it is on, and take it out: what is left is a stock model, in the same dtypes.

    The sums are formed in fp32 at least and rounded once, layer by layer. Without an adapter nothing happens.

    Raises:
        ValueError: a sum is beyond the range of the weight's dtype.
    """
    from peft.tuners.lora import LoraLayer

    layers: list[tuple[str, Any]] = [(n, module) for n, module in vlm.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in layers:
        linear = layer.get_base_layer()
        stored = linear.weight.dtype
        layer.to(
            torch.promote_types(stored, torch.float32)
        )  # the factors too: PEFT rounds their product to their dtype
        layer.merge()
        linear.to(stored)
        if not torch.isfinite(linear.weight).all():
            raise ValueError(f"{name} with its adapter holds numbers beyond the range of {stored}")
        parent, _, own = name.rpartition(".")
        setattr(vlm.get_submodule(parent), own, linear)
    if has_adapter(vlm):
        del vlm.peft_config
        mark_adapter(vlm, present=False)
