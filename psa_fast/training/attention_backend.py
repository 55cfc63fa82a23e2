"""Which attention the language model runs with: chosen before anything is loaded, printed once."""

from __future__ import annotations

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from psa_fast.models import Family
from psa_fast.models.packing import SDPA_BY_SAMPLE
from psa_fast.training.config import TrainConfig
from psa_fast.training.engine import compute_dtype

# name -> whether it is there beside a CUDA device, its package, the compute capabilities (major) `auto` takes it on
_FLASH = {
    "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3", (9,)),
    "flash_attention_2": (is_flash_attn_2_available, "flash-attn", (8, 9, 10, 12)),
}


def choose_attention(config: TrainConfig) -> str:
    """transformers' name of the attention for `--attn_implementation`.

    auto: FlashAttention 3 (on Hopper), then 2, then SDPA; FlashAttention in bf16 only. SDPA takes packed rows sample by
    sample (psa_fast.models.packing), as a mask over the whole row would cost its square.

    Raises:
        ValueError: an explicit choice that this machine or `--dtype` does not allow.
    """
    wanted, bf16 = config.attn_implementation, compute_dtype(config) == torch.bfloat16
    for name, (available, package, capabilities) in _FLASH.items():
        if wanted == name:
            if not available():
                raise ValueError(f"--attn_implementation {name} needs the package {package} and a CUDA device")
            if not bf16:
                raise ValueError(f"--attn_implementation {name} needs bf16, and --dtype is {config.dtype}")
            return name
        if wanted == "auto" and bf16 and available() and torch.cuda.get_device_capability()[0] in capabilities:
            return name
    if wanted == "eager":
        return wanted
    return SDPA_BY_SAMPLE if config.packing else "sdpa"


def fit_family(attention: str, config: TrainConfig, family: Family) -> str:
    """`attention`, or SDPA where it was `auto`'s choice and the base cannot have FlashAttention.

    Raises:
        ValueError: an explicit choice that the base cannot have.
    """
    if attention not in _FLASH or "FlashAttention" in family.works:
        return attention
    if config.attn_implementation != "auto":
        family.require("FlashAttention")
    return SDPA_BY_SAMPLE if config.packing else "sdpa"
