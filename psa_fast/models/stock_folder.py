"""A trained model as a folder that transformers, and what builds on it, loads without psa-fast.

config.json, generation_config.json, model*.safetensors    the base with all that stage 2 trained in it, LoRA merged
tokenizer*, *processor_config.json, chat_template*, ...     the base's own, as they were
psa/safety_tokens.safetensors                               s_llm, which no stock model has a place for
README.md                                                   what is in the folder, and what is not
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download

from psa_fast.files import named, shown, write_text
from psa_fast.models.lora import merge
from psa_fast.models.tensors import write_tensors

if TYPE_CHECKING:
    from psa_fast.models.psa import PsaVLM

#: below a folder of its own: vLLM loads every safetensors file that stands beside config.json
SAFETY_TOKENS = "psa/safety_tokens.safetensors"
#: the tensor in it, [num_safety_tokens, E]
SAFETY_KEY = "safety_tokens.weight"
# named one by one: another layout's weights (consolidated.safetensors, say), taken along, would be the untrained ones
KEPT = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "LICENSE*", "LICENCE*", "NOTICE*",
)  # fmt: skip


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Context with an unfinished folder beside `folder`, which takes its name at the end; if it fails, nothing is left.

    Raises:
        ValueError: `folder` is already there.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise ValueError(f"{shown(folder)} is already there")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}.", suffix=".part", dir=folder.parent))
    try:
        unfinished.chmod(0o777 & ~_umask())
        yield unfinished
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def base_files(base: str | Path, revision: str | None = None) -> Path:
    """The folder with a base's files: its own, or the one in the hub's cache, to which those of `KEPT` are fetched."""
    if Path(base).is_dir():
        return Path(base)
    return Path(snapshot_download(str(base), revision=revision, allow_patterns=list(KEPT)))


def write_merged(psa: PsaVLM, base: Path, folder: str | Path, card: str) -> None:
    """Merge the adapter into `psa.vlm`, which stays so, and write the stock folder, whole or not at all.

    Args:
        psa: on the CPU, none of it sharded.
        base: the folder of `base_files`.
        folder: must not be there.
        card: text of README.md.

    Raises:
        ValueError: `folder` is already there, or a weight is beyond the range of its dtype.
        OSError: naming the file that cannot be written.
    """
    folder = Path(folder)
    merge(psa.vlm)
    for name, parameter in psa.vlm.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds numbers that are not finite in {parameter.dtype}: nothing is written")
    with named(folder), new_folder(folder) as unfinished:
        psa.vlm.save_pretrained(unfinished)
        for file in sorted({file for pattern in KEPT for file in base.glob(pattern) if file.is_file()}):
            target = unfinished / file.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        if psa.config.num_safety_tokens:
            write_tensors(unfinished / SAFETY_TOKENS, {SAFETY_KEY: psa.safety_tokens.weight})
        write_text(unfinished / "README.md", card)
