"""Files of an add-on: everything a PsaVLM has beyond its base, which stays untouched on disk.

psa_config.json            PsaConfig
psa.safetensors            safety projector, tokens, attention, heads
adapter/                   a PEFT adapter, loadable on the stock base too (after stage 2 with LoRA)
llm/model.safetensors      base weights that were trained in full, under the base's own names (after stage 2 in full)
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from psa_fast.models.base_model import commit_of, load_base
from psa_fast.models.config import PsaConfig

if TYPE_CHECKING:
    from psa_fast.models.psa import PsaVLM

CONFIG, WEIGHTS, ADAPTER, CHANGED = "psa_config.json", "psa.safetensors", "adapter", "llm/model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_SAMPLE = 1 << 16


def base_identity(vlm: PreTrainedModel) -> dict[str, str | None]:
    """Name, hub revision and content fingerprint of a base, as PsaConfig keeps them.

    A base from the hub is known if `load_base` loaded it: transformers does not say which commit it took.
    """
    name = getattr(vlm.config, "_name_or_path", "") or None
    commit = commit_of(vlm)
    folder: Path | None = Path(name) if name and Path(name).is_dir() else None
    if folder is None and name and commit:
        cached = try_to_load_from_cache(name, "config.json", revision=commit)
        folder = Path(cached).parent if isinstance(cached, str) else None
    return {
        "base_model_name_or_path": name,
        "base_revision": commit,
        "base_fingerprint": fingerprint(folder) if folder else None,
    }


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


def fingerprint(folder: str | Path) -> str | None:
    """SHA-256 over the size and 64 evenly spread 64 KB samples of each weight file: quick, but sees retraining.

    None for an older .bin checkpoint, which has a name and a revision only.
    """
    digest = hashlib.sha256()
    files = _weight_files(Path(folder))
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


def _weight_files(folder: Path) -> list[Path]:
    """What transformers reads; a repository may hold variants and other layouts beside it, the hub's cache does not."""
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def read_config(addon: str | Path) -> PsaConfig:
    """An add-on's configuration. Raises ValueError if the folder is none."""
    for name in (CONFIG, WEIGHTS):
        if not (Path(addon) / name).is_file():
            raise ValueError(f"{addon} is not a PSA add-on: it has no {name}")
    return PsaConfig.from_json_file(Path(addon) / CONFIG)


def save(psa: PsaVLM, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write the add-on. `state_dict`: gathered tensors named as in `psa.named_parameters()`; None: the model's own."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(psa.state_dict()) if state_dict is None else state_dict
    names = list(psa.psa_state_dict())
    changed = _changed_base_weights(psa)
    _require(state, [*names, *changed.values()], "state_dict")
    psa.config.to_json_file(folder / CONFIG)
    _write({name: state[name] for name in names}, folder / WEIGHTS)
    if getattr(psa.vlm, "peft_config", None):
        _save_adapter(psa.vlm, folder / ADAPTER, state)
    if changed:
        (folder / CHANGED).parent.mkdir(exist_ok=True)
        _write({name: state[own] for name, own in changed.items()}, folder / CHANGED)


def load(cls: type[PsaVLM], base: str | Path | PreTrainedModel | None, addon: str | Path | None, dtype: Any) -> PsaVLM:
    """See PsaVLM.from_pretrained."""
    config = None
    if addon is not None:
        config = read_config(addon)
        base = base if base is not None else config.base_model_name_or_path
    if base is None:
        raise ValueError("no base model is given" + ("" if addon is None else f" and {addon}/{CONFIG} names none"))
    if isinstance(base, PreTrainedModel):
        vlm: Any = base
    else:
        vlm = load_base(base, dtype, revision=config.revision_of(base) if config else None)
    if addon is None or config is None:
        return cls.build(vlm)

    _check_base(addon, config, vlm)
    psa = cls.build(vlm, config)
    file = Path(addon) / WEIGHTS
    _copy_into(dict(psa.named_parameters()), load_file(file), list(psa.psa_state_dict()), file)
    if (Path(addon) / ADAPTER).is_dir():
        _load_adapter(vlm, Path(addon) / ADAPTER)
    if (Path(addon) / CHANGED).is_file():
        file = Path(addon) / CHANGED
        tensors = load_file(file)
        parameters = _base_parameters(vlm)
        _copy_into(parameters, tensors, [n for n in tensors if n in parameters], file)
        psa.changed_base_weights = set(tensors)
    return psa


def _stock_name(name: str) -> str:
    """The name a base weight has without an adapter around it."""
    return name.replace(".base_layer.", ".")


def _base_parameters(vlm: nn.Module) -> dict[str, nn.Parameter]:
    return {_stock_name(n): p for n, p in vlm.named_parameters() if ".lora_" not in n}


def _changed_base_weights(psa: PsaVLM) -> dict[str, str]:
    """Base weights that are trained in full now or were when the add-on was loaded: stock name -> name in `psa`."""
    own = {_stock_name(n): (n, p) for n, p in psa.vlm.named_parameters() if ".lora_" not in n}
    return {stock: "vlm." + n for stock, (n, p) in own.items() if p.requires_grad or stock in psa.changed_base_weights}


def _save_adapter(vlm: Any, folder: Path, state: dict[str, Tensor]) -> None:
    from peft import get_peft_model_state_dict

    folder.mkdir(exist_ok=True)
    names = vlm.active_adapters()
    if len(names) != 1:
        raise ValueError(f"exactly one adapter must be active to be saved, got {names}")
    own = {name.removeprefix("vlm."): t for name, t in state.items() if name.startswith("vlm.")}
    tensors = get_peft_model_state_dict(vlm, state_dict=own, adapter_name=names[0], save_embedding_layers=False)
    if not tensors:
        raise ValueError("state_dict holds no adapter weights")
    config = vlm.peft_config[names[0]]
    mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = mode
    _write({_PEFT_PREFIX + name: t for name, t in tensors.items()}, folder / ADAPTER_WEIGHTS)


def _load_adapter(vlm: Any, folder: Path) -> None:
    """Through add_adapter, not load_adapter, which only logs missing and unexpected keys."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    vlm.add_adapter(config)
    adapter = vlm.active_adapters()[0]
    parameters = {_PEFT_PREFIX + n.replace(f".{adapter}.", "."): p for n, p in vlm.named_parameters() if ".lora_" in n}
    file = folder / ADAPTER_WEIGHTS
    _copy_into(parameters, load_file(file), list(parameters), file)


def _copy_into(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], wanted: list[str], file: Path) -> None:
    missing, unexpected = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        raise ValueError(f"{file} does not fit: missing keys {missing or 'none'}, unexpected {unexpected or 'none'}")
    for name in wanted:
        parameter = parameters[name]
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{file}: {name} has shape {tuple(tensors[name].shape)}, the model {shape}")
        with torch.no_grad(), _gathered(parameter):
            if parameter.numel() or not tensors[name].numel():
                parameter.copy_(tensors[name])


def _gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """Write access to a parameter that ZeRO-3 may have partitioned."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _require(state: dict[str, Tensor], names: list[str], what: str) -> None:
    missing = sorted(set(names) - set(state))
    if missing:
        raise ValueError(f"{what} lacks {missing}")


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.numel() == 0 and tensor.shape[:1] != (0,):
            raise ValueError(f"{name} is empty: a ZeRO-3 shard must be gathered before it is saved")
    save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, file, metadata={"format": "pt"})
