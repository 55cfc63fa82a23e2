"""The adapter folder of an add-on: LoRA as PEFT writes it, read as data from a stranger.

`PeftModel.from_pretrained` loads it on the stock base. Here PEFT gets nothing of the file's but numbers that were
checked: which layers it is on follows from the base, and must be what the file says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from psa_fast.files import named, read_json, shorten
from psa_fast.models.lora import check_lora, inject, target_linears, target_pattern
from psa_fast.models.tensors import Shapes, checksum_of, read_shapes, require_shapes, write_tensors

if TYPE_CHECKING:
    from psa_fast.models.psa import PsaVLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = "default"
# keys that are read, or say nothing about what the adapter computes
_READ = {"r", "lora_alpha", "lora_dropout", "target_modules"}
_NOTES = {"peft_version", "base_model_name_or_path", "revision", "inference_mode"}
# keys with one accepted value that is not off (None, False, empty), as every PEFT from 0.18 on writes it
_FIXED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
}


def save_adapter(vlm: Any, folder: Path, state: dict[str, Tensor]) -> str:
    """Write the one adapter of `vlm`, whose tensors are in `state` under `vlm.` and their own names.

    Returns:
        The checksum for `psa_config.json`.
    """
    from peft import get_peft_model_state_dict

    names = list(vlm.peft_config)
    if len(names) != 1:
        raise ValueError(f"exactly one adapter can be saved, the model has {', '.join(names)}")
    own = {name.removeprefix("vlm."): t for name, t in state.items() if name.startswith("vlm.")}
    tensors = get_peft_model_state_dict(vlm, state_dict=own, adapter_name=names[0], save_embedding_layers=False)
    if not tensors:
        raise ValueError("state_dict holds no adapter weights")
    tensors = {_PREFIX + name: tensor for name, tensor in tensors.items()}
    config = vlm.peft_config[names[0]]
    with named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    mode, config.inference_mode = config.inference_mode, True
    try:
        with named(folder / CONFIG):
            config.save_pretrained(str(folder))
    finally:
        config.inference_mode = mode
    write_tensors(folder / WEIGHTS, tensors)
    return checksum_of(tensors, _text(config.r, config.lora_alpha, config.lora_dropout))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return r, lora_alpha, lora_dropout and target_modules of an adapter, the first three checked.

    Raises:
        ValueError: naming the file: not LoRA as `add_lora` makes it.
    """
    file = folder / CONFIG
    raw = read_json(file, "adapter")
    missing = sorted((_READ | {"peft_type"}) - set(raw))
    if missing:
        raise ValueError(f"{file} lacks: {', '.join(missing)}")
    for key, value in raw.items():
        off = value is None or value is False or value == {} or value == []
        fixed = key in _FIXED and type(value) is type(_FIXED[key]) and value == _FIXED[key]
        if key in _READ | _NOTES or fixed or (off and key not in ("peft_type", "bias", "init_lora_weights")):
            continue
        raise ValueError(f"{file}: {shorten(key)} is {shorten(value)}; an add-on's adapter is plain LoRA without it")
    try:
        check_lora(raw["r"], raw["lora_alpha"], raw["lora_dropout"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return {key: raw[key] for key in _READ}


def check_adapter_files(folder: Path) -> dict[str, Any]:
    """Check what can be known of an adapter without its base, and return its configuration.

    Raises:
        ValueError: naming the file.
    """
    config = read_adapter_config(folder)
    for name, shape in read_shapes(folder / WEIGHTS).items():
        if len(shape) != 2 or shape[1 if name.endswith(".lora_B.weight") else 0] != config["r"]:
            raise ValueError(f"{folder / WEIGHTS}: {shorten(name)} has shape {shape}, which is not rank {config['r']}")
    return config


def inject_adapter(psa: PsaVLM, folder: Path) -> dict[str, Any]:
    """Give the model the adapter of a folder, still without its weights, once their shapes are known to fit.

    Returns:
        The model's parameters by the names that the file has for them.

    Raises:
        ValueError: naming the file.
    """
    from peft import LoraConfig

    config = check_adapter_files(folder)
    try:
        pattern, expected = target_pattern(psa), _expected_shapes(psa, config["r"])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    # never handed on: it is a regular expression, and one that is matched for hours is easily written
    if config["target_modules"] != pattern:
        raise ValueError(
            f"{folder / CONFIG}: target_modules is {shorten(config['target_modules'])}; "
            f"an add-on's adapter is on every linear layer of the language model"
        )
    require_shapes(folder / WEIGHTS, expected)
    vlm: Any = psa.vlm
    options = {key: config[key] for key in ("r", "lora_alpha", "lora_dropout")}
    inject(vlm, LoraConfig(**options, bias="none", target_modules=pattern), _NAME)
    return {_PREFIX + n.replace(f".{_NAME}.", "."): p for n, p in vlm.named_parameters() if ".lora_" in n}


def text_of(config: dict[str, Any]) -> str:
    """What belongs to the tensors' checksum: the numbers of the configuration that act on them."""
    return _text(config["r"], config["lora_alpha"], config["lora_dropout"])


def _text(r: int, alpha: float, dropout: float) -> str:
    return json.dumps([r, float(alpha), float(dropout)])


def _expected_shapes(psa: PsaVLM, r: int) -> Shapes:
    shapes: Shapes = {}
    for name, linear in target_linears(psa).items():
        shapes[f"{_PREFIX}{name}.lora_A.weight"] = (r, linear.in_features)
        shapes[f"{_PREFIX}{name}.lora_B.weight"] = (linear.out_features, r)
    return shapes
