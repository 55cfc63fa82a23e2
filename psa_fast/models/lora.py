"""LoRA on the language model's linears, through transformers' own PEFT integration (no wrapper around the VLM)."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from psa_fast.models.psa import PsaVLM


def add_lora(psa: PsaVLM, r: int = 256, alpha: int = 16, dropout: float = 0.05) -> list[str]:
    """Add an adapter to every nn.Linear inside the language model, never to lm_head, vision tower or connector.

    Defaults are the paper's. PEFT freezes the rest of the VLM; the safety modules are left as they are.

    Returns:
        Names in `psa.vlm` of the layers that got an adapter.

    Raises:
        ValueError: there is an adapter already.
    """
    from peft import LoraConfig

    vlm: Any = psa.vlm
    if getattr(vlm, "peft_config", None):
        raise ValueError("the model has a LoRA adapter already")
    language = psa.family.module_names["language"]
    body = psa.family.module(vlm, "language")
    names = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    # a pattern instead of a list of leaves: the vision tower has a q_proj too
    pattern = rf"{re.escape(language)}\.(?:.*\.)?(?:{'|'.join(map(re.escape, leaves))})"
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=pattern)
    vlm.add_adapter(config)
    return [f"{language}.{name}" for name in names]
