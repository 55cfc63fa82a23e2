"""The base's processor, with room for the safety tokens in front of every image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from psa_fast.files import shown
from psa_fast.models.base_model import read_base_config, reading_base
from psa_fast.models.families import get_family
from psa_fast.models.psa_config import PsaConfig


def load_processor(base: str | Path, config: PsaConfig | None = None, revision: str | None = None) -> Any:
    """The processor of `base`, whose images expand to num_safety_tokens + S placeholders.

    Args:
        base: folder or hub name of the base model.
        config: the add-on's; None: the bare base, without safety tokens.
        revision: of a base on the hub, so that tokenizer and chat template are the weights' own (`commit_of`); None:
            the main branch, or a folder.

    Raises:
        OSError: there is no such base, or no processor with it.
        ValueError: one of its files is damaged, or no processor of images and text.
    """
    options = {} if revision is None else {"revision": revision}
    family = get_family(read_base_config(base, revision))
    with reading_base(base):
        processor = family.read_processor(str(base), **options)
    if not all(hasattr(processor, part) for part in ("tokenizer", "image_processor")):
        raise ValueError(f"base model {shown(base)} has no processor of images and text")
    return family.extend_processor(processor, 0 if config is None else config.num_safety_tokens)
