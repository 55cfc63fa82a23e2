"""From folders on disk to a Guard: the add-on, the base its config names, the processor and the policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psa_fast.safety.guard import Guard
from psa_fast.safety.plain import PlainVLM
from psa_fast.safety.policy import Policy

CONFIG = "psa_config.json"
ADDON_PARTS = (CONFIG, "psa.safetensors", "adapter", "llm")


def base_of(addon: str | Path) -> str:
    """The base that an add-on was trained on, from its config. Raises ValueError if the folder is no add-on."""
    file = Path(addon) / CONFIG
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except OSError as error:
        raise ValueError(f"{addon} is not an add-on folder: {file.name} cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from error
    if not base:
        raise ValueError(f"{file} names no base model; give it with --base")
    return str(base)


def addon_hash(addon: str | Path) -> str:
    """SHA-256 over names and contents of the add-on's own files (checkpoints and logs beside them do not count)."""
    folder, digest = Path(addon), hashlib.sha256()
    parts = [folder / name for name in ADDON_PARTS]
    for file in sorted(f for part in parts for f in (part.rglob("*") if part.is_dir() else [part]) if f.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def load_guard(addon: str | Path, base: str | None = None, policy: Policy | None = None, dtype: Any = None) -> Guard:
    """A guard around base + add-on; `base` replaces the one the add-on's config names. On a GPU if there is one."""
    from psa_fast.models import PsaVLM, commit_of, load_processor

    base = base or base_of(addon)
    with _named(base):
        model = PsaVLM.from_pretrained(base, addon, dtype=dtype or default_dtype())
        processor = load_processor(base, model.config, commit_of(model.vlm))
    return Guard(_to_device(model), processor, policy, model_hash=addon_hash(addon))


def load_plain(base: str, dtype: Any = None) -> Guard:
    """A base without an add-on, to be asked unguarded."""
    from psa_fast.models import commit_of, load_base, load_processor

    with _named(base):
        vlm = load_base(base, dtype or default_dtype())
        processor = load_processor(base, revision=commit_of(vlm))
    return Guard(_to_device(PlainVLM(vlm)), processor)


def default_dtype() -> Any:
    """bf16 on a GPU, fp32 on a CPU, as in training."""
    import torch

    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


@contextmanager
def _named(base: str) -> Iterator[None]:
    """transformers raises OSError, pages long, for a base that is not there."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"base model {base} cannot be loaded: {str(error).splitlines()[0]}") from error


def _to_device(model: Any) -> Any:
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model
