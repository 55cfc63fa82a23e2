"""An add-on as stage 2 leaves it, of random numbers."""

import torch

from psa_fast.models import PsaVLM, add_lora, load_base

SMALL = dict(num_head_tokens=2, num_attention_heads=2, projector_depth=1)


def trained(base, folder, lora=False, full=(), tokens=3):
    """Save an add-on as stage 2 leaves it: an adapter, parts of the base trained in full, or both."""
    torch.manual_seed(1)
    psa = PsaVLM.build(load_base(base, None), num_safety_tokens=tokens, **SMALL)
    psa.requires_grad_(False)
    if lora:
        add_lora(psa, r=2, alpha=8)
    parts = [psa.family.module(psa.vlm, part) for part in full]
    for name, parameter in psa.named_parameters():
        if ".lora_" in name or any(parameter is p for part in parts for p in part.parameters()):
            parameter.requires_grad_(True)
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    psa.save_addon(folder)
    return folder
