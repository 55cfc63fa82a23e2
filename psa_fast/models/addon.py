"""Files of an add-on: everything a PsaVLM has beyond its base, which stays untouched on disk.

psa_config.json            PsaConfig, and checksums of what the other files held when they were saved
psa.safetensors            safety projector, tokens, attention, heads
adapter/                   a PEFT adapter, loadable on the stock base too (after stage 2 with LoRA)
llm/model.safetensors      base weights that were trained in full, under the base's own names (after stage 2 in full)

An add-on may come from anybody, so it is data and nothing else: names, shapes and types are compared before memory is
taken, and every number is checked. What does not fit is a ValueError that names the file.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import PreTrainedModel

from psa_fast.compat.deepspeed import full_shape, gathered
from psa_fast.files import shorten
from psa_fast.models import adapter
from psa_fast.models.base_model import check_base, commit_of, is_folder_name, load_base, weight_files
from psa_fast.models.bottleneck import ConceptBottleneck
from psa_fast.models.lora import has_adapter
from psa_fast.models.psa_config import PsaConfig
from psa_fast.models.tensors import Shapes, checksum_of, read_shapes, read_tensors, require_shapes, write_tensors
from psa_fast.models.tokens import SafetyTokens

if TYPE_CHECKING:
    from psa_fast.models.psa import PsaVLM

CONFIG, WEIGHTS, ADAPTER, CHANGED = "psa_config.json", "psa.safetensors", "adapter", "llm/model.safetensors"
_SAMPLE = 1 << 16


def base_identity(vlm: PreTrainedModel) -> dict[str, str | None]:
    """Absolute folder or hub name, hub revision and content fingerprint of a base, as PsaConfig keeps them.

    A base from the hub is known if `load_base` loaded it: transformers does not say which commit it took.
    """
    name = vlm.config.name_or_path or None
    commit = commit_of(vlm)
    folder: Path | None = Path(name).absolute() if name and Path(name).is_dir() else None
    # the words typed mean another folder, or a name on the hub, to whoever stands elsewhere
    stored = str(folder) if folder else name
    if folder is None and name and commit:
        cached = try_to_load_from_cache(name, "config.json", revision=commit)
        folder = Path(cached).parent if isinstance(cached, str) else None
    return {
        "base_model_name_or_path": stored,
        "base_revision": commit,
        "base_fingerprint": fingerprint(folder) if folder else None,
    }


def base_of(addon: str | Path, config: PsaConfig) -> str:
    """The base to load where none is given: the folder that the add-on names, or its hub name if it has a commit.

    Raises:
        ValueError: it names none, or a folder that is not here.
    """
    name = config.base_model_name_or_path
    if not name:
        raise ValueError(f"{Path(addon) / CONFIG} names no base model; give it with --base")
    # without a commit on record a stranger's model of that name could take the base's place
    if (is_folder_name(name) or config.base_revision is None) and not Path(name).is_dir():
        raise ValueError(
            f"{Path(addon) / CONFIG}: the base was at {shorten(name, 120)}, no folder here; give it with --base"
        )
    return name


def _check_base(addon: str | Path, config: PsaConfig, vlm: PreTrainedModel) -> None:
    """Refuse a base whose weights are not those the add-on was trained on, as far as either side knows them.

    One agreement is enough: a commit may change no more than a README, a folder of the hub's cache hold more files.
    """
    found = base_identity(vlm)
    pairs = {name: (getattr(config, name), found[name]) for name in ("base_fingerprint", "base_revision")}
    known = {name: pair for name, pair in pairs.items() if all(pair)}
    if not known or any(expected == other for expected, other in known.values()):
        return
    differing = "; ".join(f"{name.removeprefix('base_')} {a}, found {b}" for name, (a, b) in known.items())
    if "base_revision" in known:
        command = f"hf download {config.base_model_name_or_path} --revision {config.base_revision} --local-dir DIR"
        differing += f"; `{command}` fetches the one it was trained on"
    raise ValueError(f"{addon} was trained on another base than {found['base_model_name_or_path']}: {differing}")


def check_base_folder(addon: str | Path, config: PsaConfig, base: str | Path) -> None:
    """Refuse a base's folder that is damaged, or is not the one that the add-on was trained on; no tensor is read.

    Raises:
        ValueError: naming both.
    """
    check_base(base)
    if not Path(base).is_dir() or config.base_fingerprint is None:
        return
    found = fingerprint(base)
    if found is not None and found != config.base_fingerprint:
        raise ValueError(
            f"{addon} was trained on another base than {base}: fingerprint {config.base_fingerprint}, found {found}"
        )


def fingerprint(folder: str | Path) -> str | None:
    """SHA-256 over the size and 64 evenly spread 64 KB samples of each weight file: quick, but sees retraining.

    None for an older .bin checkpoint, which has a name and a revision only.
    """
    digest = hashlib.sha256()
    files = weight_files(folder)
    if not files:
        return None
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as stream:
            if size <= 64 * _SAMPLE:
                digest.update(stream.read())
                continue
            for i in range(64):
                stream.seek((size - _SAMPLE) * i // 63)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:32]


def read_config(addon: str | Path) -> PsaConfig:
    """An add-on's configuration. Raises ValueError if the folder is none."""
    for name in (CONFIG, WEIGHTS):
        if not (Path(addon) / name).is_file():
            raise ValueError(f"{addon} is not a PSA add-on: it has no {name}")
    return PsaConfig.from_json_file(Path(addon) / CONFIG)


def check_files(addon: str | Path) -> PsaConfig:
    """Check all of an add-on that can be known without its base, reading no tensor, and return its configuration.

    Raises:
        ValueError: naming the file.
    """
    folder, config = Path(addon), read_config(addon)
    require_shapes(folder / WEIGHTS, _expected_shapes(config, folder))
    if _has(folder, ADAPTER):
        adapter.check_adapter_files(folder / ADAPTER)
    if _has(folder, CHANGED):
        read_shapes(folder / CHANGED)
    if config.checksums is not None:
        if config.checksums.get(CONFIG) != config.digest():
            raise ValueError(
                f"{folder / CONFIG} was changed after it was saved; without its checksums it is read as is"
            )
        for name in (ADAPTER, CHANGED):
            if (name in config.checksums) != _has(folder, name):
                problem = "is missing" if name in config.checksums else "does not belong to it"
                raise ValueError(f"{addon} is not the add-on that was saved: {folder / name} {problem}")
        if WEIGHTS not in config.checksums:
            raise ValueError(f"{folder / CONFIG}: checksums lacks {WEIGHTS}")
    return config


def changes_base(addon: str | Path) -> bool:
    """Whether the add-on holds more than the safety modules: an adapter, or base weights that were trained."""
    return any(_has(Path(addon), name) for name in (ADAPTER, CHANGED))


def _has(folder: Path, name: str) -> bool:
    """Whether there is anything under this name, be it a link to nowhere: it is read or refused, never passed over."""
    first = folder / Path(name).parts[0]
    return first.exists() or first.is_symlink()


def _expected_shapes(config: PsaConfig, folder: Path) -> Shapes:
    """Names and shapes of the safety modules, from modules without memory, two blocks deep at most."""
    count = len(read_shapes(folder / WEIGHTS))
    if config.projector_depth > count:
        raise ValueError(
            f"{folder / CONFIG}: projector_depth {config.projector_depth} does not fit {WEIGHTS}, "
            f"which holds {count} tensors"
        )
    small = replace(config, projector_depth=min(config.projector_depth, 2))
    with torch.device("meta"):
        modules = nn.ModuleDict(
            {
                "bottleneck": ConceptBottleneck(small),
                "safety_tokens": SafetyTokens(config.num_safety_tokens, config.hidden_size),
            }
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in modules.state_dict().items()}
    for stage in ("bottleneck.projector.stage1.", "bottleneck.projector.stage2."):
        repeated = {n.removeprefix(stage + "1."): s for n, s in shapes.items() if n.startswith(stage + "1.")}
        for block in range(2, config.projector_depth):
            shapes.update({f"{stage}{block}.{n}": s for n, s in repeated.items()})
    return shapes


def save(psa: PsaVLM, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write the add-on. `state_dict`: gathered tensors named as in `psa.named_parameters()`; None: the model's own.

    Raises:
        ValueError: `state_dict` lacks tensors.
        OSError: naming the file that cannot be written.
    """
    folder = Path(directory)
    state = dict(psa.state_dict()) if state_dict is None else state_dict
    names = list(psa.psa_state_dict())
    changed = _changed_base_weights(psa)
    _require(state, [*names, *changed.values()], "state_dict")
    parts = {WEIGHTS: {name: state[name] for name in names}}
    if changed:
        parts[CHANGED] = {name: state[own] for name, own in changed.items()}
    checksums = {}
    for file, tensors in parts.items():
        write_tensors(folder / file, tensors)
        checksums[file] = checksum_of(tensors)
    if has_adapter(psa.vlm):
        checksums[ADAPTER] = adapter.save_adapter(psa.vlm, folder / ADAPTER, state)
    _remove_stale(folder, checksums)
    # last: what it says of the other files is true by now
    saved = replace(psa.config, checksums={**checksums, CONFIG: psa.config.digest()})
    saved.to_json_file(folder / CONFIG)


def _remove_stale(folder: Path, kept: dict[str, str]) -> None:
    """Files of an add-on that stood here before and had parts that this one has not: they would be loaded with it."""
    for name, files in ((CHANGED, [CHANGED]), (ADAPTER, [f"{ADAPTER}/{n}" for n in (adapter.CONFIG, adapter.WEIGHTS)])):
        if name in kept or not _has(folder, name):
            continue
        for file in files:
            (folder / file).unlink(missing_ok=True)
        top = folder / Path(name).parts[0]
        if top.is_dir() and not any(top.iterdir()):
            top.rmdir()


def load(cls: type[PsaVLM], base: str | Path | PreTrainedModel | None, addon: str | Path | None, dtype: Any) -> PsaVLM:
    """See PsaVLM.from_pretrained."""
    config = None
    if addon is not None:
        config = check_files(addon)
        base = base if base is not None else base_of(addon, config)
    if base is None:
        raise ValueError("no base model is given")
    tensors: dict[str, Tensor] = {}
    if addon is not None and config is not None:
        # read whole before the base, which takes minutes where these take seconds
        tensors = dict(read_tensors(Path(addon) / WEIGHTS, (config.checksums or {}).get(WEIGHTS)))
        if not isinstance(base, PreTrainedModel):
            _check_adapter(Path(addon), config)
    if isinstance(base, PreTrainedModel):
        vlm: Any = base
    else:
        if addon is not None and config is not None:
            check_base_folder(addon, config, base)
        vlm = load_base(base, dtype, revision=config.revision_of(base) if config else None)
    if addon is None or config is None:
        return cls.build(vlm)

    folder, checksums = Path(addon), config.checksums or {}
    _check_base(addon, config, vlm)
    psa = cls.build(vlm, replace(config, checksums=None))
    own = dict(psa.named_parameters())
    for name, tensor in tensors.items():
        _copy_into(own[name], tensor, name, folder / WEIGHTS)
    if _has(folder, CHANGED):
        psa.changed_base_weights = _load_changed(psa, folder / CHANGED, checksums.get(CHANGED))
    if _has(folder, ADAPTER):
        _load_adapter(psa, folder / ADAPTER, checksums.get(ADAPTER))
    return psa


def _check_adapter(addon: Path, config: PsaConfig) -> None:
    """Raise ValueError for an adapter whose numbers are not those that were saved; nothing is kept."""
    if _has(addon, ADAPTER):
        text = adapter.text_of(adapter.read_adapter_config(addon / ADAPTER))
        for _ in read_tensors(addon / ADAPTER / adapter.WEIGHTS, (config.checksums or {}).get(ADAPTER), text):
            continue


def _load_changed(psa: PsaVLM, file: Path, checksum: str | None) -> set[str]:
    """Put in base weights that were trained in full, and return their names."""
    parameters = _base_parameters(psa.vlm)
    found = read_shapes(file)
    # any of the base's may be there, nothing else
    require_shapes(file, {n: tuple(full_shape(p)) for n, p in parameters.items() if n in found})
    for name, tensor in read_tensors(file, checksum):
        _copy_into(parameters[name], tensor, name, file)
    return set(found)


def _load_adapter(psa: PsaVLM, folder: Path, checksum: str | None) -> None:
    text = adapter.text_of(adapter.read_adapter_config(folder))
    parameters = adapter.inject_adapter(psa, folder)
    file = folder / adapter.WEIGHTS
    for name, tensor in read_tensors(file, checksum, text):
        _copy_into(parameters[name], tensor, name, file)


def _stock_name(name: str) -> str:
    """The name a base weight has without an adapter around it."""
    return name.replace(".base_layer.", ".")


def _base_parameters(vlm: nn.Module) -> dict[str, nn.Parameter]:
    return {_stock_name(n): p for n, p in vlm.named_parameters() if ".lora_" not in n}


def _changed_base_weights(psa: PsaVLM) -> dict[str, str]:
    """Base weights that are trained in full now or were when the add-on was loaded: stock name -> name in `psa`."""
    own = {_stock_name(n): (n, p) for n, p in psa.vlm.named_parameters() if ".lora_" not in n}
    return {stock: "vlm." + n for stock, (n, p) in own.items() if p.requires_grad or stock in psa.changed_base_weights}


def _copy_into(parameter: nn.Parameter, tensor: Tensor, name: str, file: Path) -> None:
    cast = tensor.to(parameter.dtype)
    if cast.dtype != tensor.dtype and not torch.isfinite(cast).all():
        raise ValueError(f"{file}: {name} holds numbers beyond the range of {parameter.dtype}")
    with torch.no_grad(), gathered([parameter], modifier_rank=0):
        if parameter.numel() or not tensor.numel():
            parameter.copy_(cast)


def _require(state: dict[str, Tensor], names: list[str], what: str) -> None:
    missing = sorted(set(names) - set(state))
    if missing:
        raise ValueError(f"{what} lacks {missing}")
