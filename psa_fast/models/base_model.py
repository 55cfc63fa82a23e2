"""Loading a stock base, whole or without the language model's layers, from one known commit if it is on the hub."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging, resolve_revision
from transformers.utils.hub import extract_commit_hash

from psa_fast.compat.deepspeed import bit_under_zero_init
from psa_fast.compat.transformers import commit_at, raised_by_loading, set_commit
from psa_fast.files import read_json, shorten, shown
from psa_fast.models.families import get_family
from psa_fast.models.tensors import check_header


def is_folder_name(base: str) -> bool:
    """Whether a base's name can only be a folder's; the hub's are NAME or OWNER/NAME."""
    return base.startswith(("/", ".", "~")) or base.count("/") > 1 or base.endswith("/") or "\\" in base


@contextmanager
def reading_base(name: str | Path) -> Iterator[None]:
    """Context in which what transformers raises about the content of a base's files is a ValueError of one sentence.

    An OSError, that there is no such base, is left to the caller, and so is a RuntimeError of another origin.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # readers that take what a file holds for granted raise nearly anything
        if isinstance(error, RuntimeError) and not isinstance(error, RecursionError) and not raised_by_loading(error):
            raise
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0][:160]}"
        raise ValueError(f"base model {shown(name)} cannot be loaded, its files are damaged ({reason})") from error


def check_base(name: str | Path) -> None:
    """Check what can be known of a base's folder without a tensor; a name on the hub is left to transformers.

    Raises:
        ValueError: naming the folder without a configuration, or the file that is damaged.
    """
    if not Path(name).is_dir():
        return
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"base model {shown(name)} cannot be loaded: it has no config.json")
    for file in weight_files(name):
        check_header(file)


def read_base_config(name: str | Path, revision: str | None = None) -> Any:
    """A base's transformers config.

    Raises:
        OSError: there is no such base.
        ValueError: its config.json is damaged, or of a model that is not supported.
    """
    with reading_base(name):
        config = AutoConfig.from_pretrained(str(name), **({} if revision is None else {"revision": revision}))
    try:
        get_family(config)
    except ValueError as error:
        raise ValueError(f"base model {shown(name)}: {error}") from None
    return config


def load_base(
    name: str | Path,
    dtype: torch.dtype | None,
    attention: str | None = None,
    language_layers: bool = True,
    revision: str | None = None,
) -> PreTrainedModel:
    """The base VLM of a folder or hub name; `commit_of` tells the commit.

    Args:
        name: folder or hub name.
        dtype: of its weights; None: as stored.
        attention: transformers' name of the language model's attention; None: transformers' choice.
        language_layers: False: vision tower, connector, embeddings and head only; the decoder layers are neither built
            nor read. What the concept bottleneck needs, and nothing that could answer.
        revision: commit, branch or tag of a base on the hub; None: the main branch. A folder has none.

    Raises:
        OSError: there is no such base.
        ValueError: weights are missing or of another shape, which transformers would fill with random numbers, a file
            is damaged, or a folder's list of weight files leads out of it.
    """
    check_base(name)
    commit = resolve_commit(str(name), revision)
    options: dict[str, Any] = {} if Path(name).is_dir() else {"revision": commit or revision}
    if not language_layers:
        config = read_base_config(name, options.get("revision"))
        options["config"] = get_family(config).without_language_layers(config)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # tables of what is missing, which is said below, or left out on purpose
    try:
        with reading_base(name), bit_under_zero_init():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                str(name),
                dtype="auto" if dtype is None else dtype,
                output_loading_info=True,
                **options,
            )
        vlm, info = loaded
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{name}: the base lacks weights: {', '.join(missing[:3])}{more}")
    set_commit(vlm.config, commit)
    if attention is not None:
        # of the language model alone: asked of the whole, transformers refuses a tower that has another choice
        get_family(vlm).module(vlm, "language").set_attn_implementation(attention)  # type: ignore[operator]
    return vlm


def commit_of(vlm: PreTrainedModel) -> str | None:
    """The hub's commit that `load_base` loaded; None for a folder, and for a model that something else loaded."""
    return commit_at(vlm.config)


def resolve_commit(name: str, revision: str | None) -> str | None:
    """One commit for all files of a base on the hub; None for a folder."""
    if Path(name).is_dir():
        return None
    commit = getattr(resolve_revision(name, revision), "resolved", None)
    if commit is None:
        # not resolved, which transformers passes over, but the files may be in its cache all the same
        commit = extract_commit_hash(cached_file(name, "config.json", revision=revision), None)
    if commit is None:
        warnings.warn(f"{name}: its commit is not known, so an add-on on it will not know its base", stacklevel=3)
    return commit


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files that transformers reads from a base's folder; none for an older .bin checkpoint.

    A repository may hold variants and other layouts beside them, the hub's cache does not.

    Raises:
        ValueError: naming the index of the files, if it lists what is no file of this folder.
    """
    folder = Path(folder)
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    shards = read_json(index, "base").get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"base {index}: weight_map is {shorten(shards)}; expected file names by weights")
    files = []
    for name in shards.values():
        path = PurePosixPath(name) if isinstance(name, str) else None
        if path is None or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise ValueError(f"base {index} lists {shorten(name)}, which is no file of that folder")
        files.append(str(path))
    for name in sorted(set(files)):
        if not (folder / name).is_file():
            raise ValueError(f"base {index} lists {shorten(name)}, which is not there")
    return [folder / name for name in sorted(set(files))]
