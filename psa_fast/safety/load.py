"""From folders on disk to a Guard: the add-on, the base its config names, the processor and the policy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psa_fast.files import shorten, shown
from psa_fast.safety.guard import Guard
from psa_fast.safety.plain import PlainVLM
from psa_fast.safety.policy import Policy, require_policy
from psa_fast.safety.request import Prompter, text_positions

CONFIG = "psa_config.json"
ADDON_PARTS = (CONFIG, "psa.safetensors", "adapter", "llm")


def base_of(addon: str | Path) -> str:
    """The base that an add-on was trained on, from its config. Raises ValueError as `psa_fast.models.addon.base_of`."""
    from psa_fast.models import addon as files

    return files.base_of(addon, files.read_config(addon))


def addon_hash(addon: str | Path) -> str:
    """SHA-256 over names and contents of the add-on's own files (checkpoints and logs beside them do not count).

    Raises ValueError, naming the file, for one that cannot be read.
    """
    folder, digest = Path(addon), hashlib.sha256()
    parts = [folder / name for name in ADDON_PARTS]
    for file in sorted(f for part in parts for f in (part.rglob("*") if part.is_dir() else [part]) if f.is_file()):
        try:
            digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise ValueError(f"add-on file {file} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def checked_hash(addon: str | Path, policy: Policy | None = None) -> str:
    """The hash of an add-on whose files fit each other, as far as that is known without the base.

    Raises ValueError, naming the file, or for a `policy` that was calibrated on another add-on.
    """
    from psa_fast.models.addon import check_files

    config = check_files(addon)
    found = addon_hash(addon)
    if policy is not None:
        policy.require_taxonomy(config.concepts, f"the add-on {addon}")
        policy.require_model(found)
    return found


def load_guard(
    addon: str | Path, base: str | Path | None = None, policy: Policy | None = None, dtype: Any = None
) -> Guard:
    """A guard around base + add-on; `base` replaces the one the add-on's config names. On a GPU if there is one."""
    from psa_fast.models import PsaVLM, commit_of, load_processor

    require_policy(policy)  # before the model
    base = base_of(addon) if base is None else os.fspath(base)
    model_hash = checked_hash(addon, policy)
    with named_base(base):
        model = PsaVLM.from_pretrained(base, addon, dtype=dtype or default_dtype())
        processor = load_processor(base, model.config, commit_of(model.vlm))
    return Guard(_to_device(model), processor, policy, model_hash=model_hash)


def load_plain(base: str | Path, dtype: Any = None) -> Guard:
    """A base without an add-on, to be asked unguarded."""
    from psa_fast.models import commit_of, load_base, load_processor

    base = os.fspath(base)
    with named_base(base):
        vlm = load_base(base, dtype or default_dtype())
        processor = load_processor(base, revision=commit_of(vlm))
    return Guard(_to_device(PlainVLM(vlm)), processor)


def load_prompter(base: str | Path, addon: str | Path | None = None) -> Prompter:
    """What makes the prompts of `load_guard` (without an add-on: of `load_plain`); no weights are loaded."""
    from psa_fast.models import PsaConfig, load_processor
    from psa_fast.models.addon import check_base_folder
    from psa_fast.models.base_model import check_base, read_base_config

    base = os.fspath(base)
    config = None if addon is None else PsaConfig.from_json_file(Path(addon) / CONFIG)
    with named_base(base):
        if addon is None or config is None:
            check_base(base)
        else:
            check_base_folder(addon, config, base)
        revision = config.revision_of(base) if config else None
        processor = load_processor(base, config, revision)
        return Prompter(processor, text_positions(read_base_config(base, revision)))


def default_dtype() -> Any:
    """bf16 on a GPU, fp32 on a CPU, as in training."""
    import torch

    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


@contextmanager
def named_base(base: str) -> Iterator[None]:
    """The errors about a base that cannot be loaded, which transformers raises pages long, as one sentence.

    A name that can only be a folder's is not looked up on the hub.
    """
    from psa_fast.models.base_model import is_folder_name

    if not base.strip() or "\0" in base:
        raise ValueError(f"base model {shorten(base)} is no name")
    if is_folder_name(base) and not Path(base).is_dir():
        raise ValueError(f"base model {shown(base)} cannot be loaded: there is no such folder")
    try:
        yield
    except OSError as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"base model {shown(base)} cannot be loaded: {reason[0][:200] if reason else error!r}"
        ) from error


def _to_device(model: Any) -> Any:
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model
