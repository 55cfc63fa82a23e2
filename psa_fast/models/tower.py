"""Another vision tower in a base: its weights put in place, and the base written as a plain folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from psa_fast.files import shorten, shown
from psa_fast.models.base_model import reading_base, weight_files
from psa_fast.models.families import get_family
from psa_fast.models.stock_folder import new_folder

# what decides a tower's outputs beside its weights
_DECIDING = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
             "hidden_act", "layer_norm_eps")  # fmt: skip


def read_tower(path: str | Path, vlm: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of a tower in Hugging Face format, by the names of the base's own; whole CLIP or SigLIP models too.

    Raises:
        OSError: there is no such model.
        ValueError: damaged files, or a configuration or weights that are not those of the base's tower.
    """
    with reading_base(path):
        loaded: Any = AutoModel.from_pretrained(str(path), dtype="auto", output_loading_info=True)
    found, info = loaded
    if missing := sorted(name for name in info["missing_keys"] if "text_model" not in name):
        raise ValueError(f"vision tower {shown(path)} lacks weights: {', '.join(missing[:3])}")
    config = getattr(found.config, "vision_config", found.config)
    own: Any = get_family(vlm.config).module(vlm, "vision")
    for name in _DECIDING:
        theirs, ours = getattr(config, name, None), getattr(own.config, name, None)
        if theirs != ours:
            raise ValueError(
                f"vision tower {shown(path)} has {name} {shorten(theirs)}, the base's tower has {shorten(ours)}"
            )
    tower = found.vision_model if hasattr(found.config, "vision_config") else found
    weights = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    return {name: weights[bare] for name in own.state_dict() if (bare := name.removeprefix("vision_model.")) in weights}


def put_tower(vlm: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Copy a tower's weights, by the names of its state_dict, over those of the base.

    Raises:
        ValueError: naming the first weight that is missing, unknown, of another shape or not finite; nothing is copied.
    """
    own = get_family(vlm.config).module(vlm, "vision").state_dict()
    for name in [*own, *(name for name in weights if name not in own)]:
        if name not in weights or name not in own:
            raise ValueError(f"the vision tower {'lacks' if name in own else 'has an unknown'} weight {shorten(name)}")
        if weights[name].shape != own[name].shape:
            there, here = list(weights[name].shape), list(own[name].shape)
            raise ValueError(f"the vision tower's {name} has shape {there}, the base's has {here}")
        if not torch.isfinite(weights[name]).all():
            raise ValueError(f"the vision tower's {name} is not finite")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(weights[name])


def write_base(vlm: PreTrainedModel, base: str | Path, folder: str | Path) -> None:
    """Write the model as a plain base: its weights, and every other file of `base`, a folder. Whole or not at all.

    Raises:
        ValueError: `folder` is already there.
    """
    base = Path(base)
    with new_folder(folder) as unfinished:
        vlm.save_pretrained(unfinished)
        old = {file.name for file in weight_files(base)} | {"model.safetensors.index.json"}
        for file in sorted(base.iterdir()):
            if file.is_file() and file.name not in old and not (unfinished / file.name).exists():
                shutil.copy(file, unfinished / file.name)
