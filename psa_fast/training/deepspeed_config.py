"""The DeepSpeed JSON: where it is found, and its sections checked before anything is loaded."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

from psa_fast.files import read_json, shorten

PACKAGE = Path(__file__).resolve().parents[1]
# beside train.py in the repository, inside the package once it is installed
FOLDERS = (PACKAGE.parent / "ds_configs", PACKAGE / "ds_configs")
STAGES = (0, 1, 2, 3)
DEVICES = ("none", "cpu", "nvme")
SECTIONS = ("zero_optimization", "bf16", "fp16", "timers")
# written by train.py, or without an effect on what is learned
KNOWN = (
    *SECTIONS, "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown",
)  # fmt: skip
# they would train something else than the options say
REFUSED = (
    "optimizer", "scheduler", "amp", "elasticity", "curriculum_learning", "data_efficiency", "compression_training",
    "progressive_layer_drop", "sparse_attention", "tensor_parallel", "autotuning",
)  # fmt: skip
# what `psa-fast plan` computes with
SIZES = (
    "reduce_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters",
)  # fmt: skip


def find_deepspeed_config(name: str) -> Path:
    """Return the path of a DeepSpeed JSON: as given, else a shipped one by its file name, with or without `.json`.

    Raises:
        ValueError: there is none; the message names the shipped ones.
    """
    given = Path(name)
    if given.is_file():
        return given
    if given.parent in (Path("."), Path("ds_configs")) and given.name not in ("", ".."):
        for folder in FOLDERS:
            for file in (given.name, f"{given.name}.json"):
                if (folder / file).is_file():
                    return folder / file
    shipped = ", ".join(sorted({path.stem for folder in FOLDERS for path in folder.glob("*.json")}))
    raise ValueError(f"--deepspeed_config {name}: no such file; shipped are {shipped}")


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """Return the DeepSpeed JSON as a dict whose sections have their types.

    Raises:
        ValueError: no such file, no JSON object, or a section of another type; DeepSpeed judges the rest.
    """
    path = find_deepspeed_config(name)
    found = read_json(path, "--deepspeed_config")
    try:
        _check(found)
    except ValueError as error:
        raise ValueError(f"--deepspeed_config {path}: {error}") from None
    return found


def _check(found: dict[str, Any]) -> None:
    for key in found:
        if key in REFUSED:
            raise ValueError(f"remove {key!r}; train.py knows only its own options for it")
        near = difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.85)
        if near and key not in KNOWN:
            raise ValueError(f"{shorten(key)} is not read; is {near[0]} meant?")
    sections = {name: _mapping(found, name) for name in SECTIONS}
    _mapping(sections["timers"], "throughput")
    zero = sections["zero_optimization"]
    if not _is_int(zero.get("stage", 0)) or zero.get("stage", 0) not in STAGES:
        raise ValueError(f"zero_optimization.stage is {shorten(zero['stage'])}; expected 0, 1, 2 or 3")
    for name in ("offload_optimizer", "offload_param"):
        section = _mapping(zero, name, "zero_optimization.")
        if section.get("device", "none") not in DEVICES:
            raise ValueError(
                f"zero_optimization.{name}.device is {shorten(section['device'])}; expected one of {', '.join(DEVICES)}"
            )
        buffers = section.get("buffer_count", 1)
        if not _is_int(buffers) or buffers < 1:
            raise ValueError(f"zero_optimization.{name}.buffer_count is {shorten(buffers)}; expected a count")
    for name in SIZES:
        size = zero.get(name, 1)
        if not isinstance(size, (int, float)) or isinstance(size, bool) or not 0 <= size < math.inf:
            raise ValueError(f"zero_optimization.{name} is {shorten(size)}; expected a number of elements")


def _mapping(found: dict[str, Any], name: str, above: str = "") -> dict[str, Any]:
    section = found.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"{above}{name} is {shorten(section)}; expected an object with keys of its own")
    return section


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
