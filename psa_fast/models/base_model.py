"""Loading a stock base for training, whole or without the language model's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging, resolve_revision

from psa_fast.models.families import get_family


def load_base(
    name: str | Path, dtype: torch.dtype, attention: str | None = None, language_layers: bool = True
) -> PreTrainedModel:
    """The base VLM of a folder or hub name.

    Args:
        name: folder or hub name.
        dtype: of its weights.
        attention: transformers' name of the language model's attention; None: transformers' choice.
        language_layers: False: vision tower, connector, embeddings and head only; the decoder layers are neither built
            nor read. What the concept bottleneck needs, and nothing that could answer.

    Raises:
        ValueError: weights are missing, which transformers would fill with random numbers.
    """
    # one commit for all files; None for a folder
    revision = resolve_revision(str(name))
    options: dict[str, Any] = {"revision": revision}
    verbosity = logging.get_verbosity()
    if not language_layers:
        config = AutoConfig.from_pretrained(str(name), revision=revision)
        options["config"] = get_family(config).without_language_layers(config)
        logging.set_verbosity_error()  # the layers left out would be listed as unexpected
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            str(name), dtype=dtype, output_loading_info=True, **options
        )
        vlm, info = loaded
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise ValueError(f"{name}: the base lacks weights: {', '.join(sorted(info['missing_keys']))}")
    remember_commit(vlm, revision)
    if attention is not None:
        vlm.set_attn_implementation({"text_config": attention})
    return vlm


def remember_commit(vlm: PreTrainedModel, revision: str | None) -> None:
    """Keep the commit that `resolve_revision` found in the config of what was loaded; it is not saved with it."""
    vlm.config._commit_hash = getattr(revision, "resolved", None)
