"""Checkpoints that are whole or absent, and resuming from them on the same trajectory.

`checkpoint-N/` holds the add-on as `PsaVLM.save_addon` writes it, the DeepSpeed state without frozen parameters
(`deepspeed/`), one random-generator state per rank and `trainer_state.json`. It is written under a temporary name,
checked, then renamed, so a run killed at any moment leaves the previous checkpoint intact.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from psa_fast.models import PsaVLM

from .config import RESUME_MAY_DIFFER, TrainConfig

STATE = "trainer_state.json"
TAG = "deepspeed"


def gather_addon_state(model: PsaVLM) -> dict[str, torch.Tensor]:
    """Whole CPU copies of every parameter that belongs to the add-on (safety modules, LoRA, tuned base weights).

    A collective: every rank must call it. Only rank 0 gets the tensors, the others an empty dict.
    """
    import deepspeed

    state = {}
    keep = dist.get_rank() == 0
    # one at a time: a 7B language model gathered whole would not fit beside its shards
    for name, parameter in model.named_parameters():
        changed = parameter.requires_grad or name.removeprefix("vlm.") in model.changed_base_weights
        if name.startswith("vlm.") and ".lora_" not in name and not changed:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True)
    return state


def save_checkpoint(engine: Any, config: TrainConfig, step: int, total_steps: int, records: str) -> Path:
    """Write `checkpoint-{step}` in the stage's folder, drop the oldest beyond `save_total_limit`. A collective.

    `records`: fingerprint of what is trained on, for `check_records`.
    """
    folder = config.stage_dir / f"checkpoint-{step}"
    temporary = config.stage_dir / f".checkpoint-{step}.tmp"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    state = gather_addon_state(engine.module)
    if rank == 0:
        engine.module.save_addon(temporary, state_dict=state)
        check_tensors(temporary)
    engine.save_checkpoint(str(temporary), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    save_file(_rng_state(), str(temporary / f"rng-rank{rank}.safetensors"))
    dist.barrier()
    if rank == 0:
        meta = {
            "step": step,
            "total_steps": total_steps,
            "world_size": dist.get_world_size(),
            "records": records,
            "config": config.to_dict(),
        }
        (temporary / STATE).write_text(json.dumps(meta, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        for old in checkpoints(config.stage_dir)[: -config.save_total_limit or None]:
            shutil.rmtree(old)
    dist.barrier()
    return folder


def check_tensors(folder: Path) -> None:
    """Raise RuntimeError if a saved tensor is empty or not finite: such a file must never look like a checkpoint."""
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = tensors.get_tensor(name)
                if tensor.numel() == 0 or not torch.isfinite(tensor).all():
                    problem = "is empty" if tensor.numel() == 0 else "is not finite"
                    raise RuntimeError(f"{file}: {name} {problem}; the checkpoint is not kept")


def checkpoints(stage_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in stage_dir.glob("checkpoint-*") if (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def find_resume(config: TrainConfig) -> Path | None:
    """The checkpoint `--resume` names, or None to start afresh. Raises ValueError for a folder that is none."""
    if config.resume == "none":
        return None
    if config.resume == "auto":
        found = checkpoints(config.stage_dir)
        return found[-1] if found else None
    folder = Path(config.resume)
    if not (folder / STATE).is_file():
        raise ValueError(f"--resume {folder}: no {STATE} there, so it is not a checkpoint")
    return folder


def read_state(folder: Path, config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The checkpoint's `trainer_state.json`, after checking that this run continues the same trajectory."""
    state = json.loads((folder / STATE).read_text())
    saved, now = state["config"], config.to_dict()
    changed = sorted(k for k in now if k not in RESUME_MAY_DIFFER and saved.get(k) != now[k])
    if changed:
        detail = ", ".join(f"{k} {saved.get(k)!r} -> {now[k]!r}" for k in changed)
        raise ValueError(
            f"--resume {folder}: the run was started with other options ({detail}); --overwrite_output_dir starts anew"
        )
    if state["step"] < state["total_steps"] and state["world_size"] != world_size:
        raise ValueError(
            f"--resume {folder}: it was written by {state['world_size']} ranks and this run has {world_size}"
        )
    return state


def check_records(folder: Path, state: dict[str, Any], config: TrainConfig, records: str) -> None:
    """Refuse to go on with other records: the rows after the step would not be those of the run that was stopped."""
    if state.get("records") != records:
        raise ValueError(
            f"--resume {folder}: --data_path {config.data_path} does not hold the records the run was started with; "
            f"--overwrite_output_dir starts anew"
        )


def restore(engine: Any, folder: Path) -> None:
    """Load optimizer, schedule, fp32 weights and random state into a freshly built engine. A collective."""
    path, _ = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
    if path is None:
        raise RuntimeError(f"{folder}: DeepSpeed could not load its state")
    _set_rng_state(load_file(str(folder / f"rng-rank{dist.get_rank()}.safetensors")))


def finish(config: TrainConfig, checkpoint: Path) -> None:
    """Copy the last checkpoint's add-on to the stage's folder; `trainer_state.json` comes last and marks completion."""
    items = [p for p in checkpoint.iterdir() if p.name not in {TAG, STATE} and not p.name.startswith("rng-")]
    for item in [*items, checkpoint / STATE]:
        target = config.stage_dir / item.name
        temporary = config.stage_dir / f".{item.name}.tmp"
        if item.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(item, temporary)
            shutil.rmtree(target, ignore_errors=True)
        else:
            shutil.copyfile(item, temporary)
        os.replace(temporary, target)


def is_finished(stage_dir: Path) -> bool:
    """Whether a stage ran to its end in this folder."""
    return (stage_dir / STATE).is_file()


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
