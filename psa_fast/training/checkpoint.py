"""Checkpoints that are whole or absent, and resuming from them on the same trajectory.

`checkpoint-N/` holds the add-on as `PsaVLM.save_addon` writes it, the optimizer's state (`optimizer_state.py`), one
random-generator state per rank and `trainer_state.json`, with size and SHA-256 of them all. It is written under a
temporary name, checked, then renamed, so a run killed at any moment leaves the previous checkpoint intact. Another
number of ranks may continue it. Those of format 1 hold DeepSpeed's own state (`deepspeed/`) for one number of ranks.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from psa_fast.compat.deepspeed import gathered
from psa_fast.compat.torch import set_lambda_steps
from psa_fast.files import named, shorten
from psa_fast.models import PsaVLM

from . import optimizer_state
from .config import RESUME_MAY_DIFFER, TrainConfig
from .integrity import (
    ADDON,
    PICKLES,
    STATE,
    Damaged,
    check_pickles,
    describe,
    is_of_addon,
    only_known_pickles,
    read_state_file,
    sync,
    sync_one,
    verify,
    write_state_file,
)
from .ranks import from_rank_0


def gather_addon_state(model: PsaVLM) -> dict[str, torch.Tensor]:
    """Whole CPU copies of every parameter that belongs to the add-on (safety modules, LoRA, tuned base weights).

    A collective: every rank must call it. Only rank 0 gets the tensors, the others an empty dict.
    """
    state = {}
    keep = dist.get_rank() == 0
    # one at a time: a 7B language model gathered whole would not fit beside its shards
    for name, parameter in model.named_parameters():
        changed = parameter.requires_grad or name.removeprefix("vlm.") in model.changed_base_weights
        if name.startswith("vlm.") and ".lora_" not in name and not changed:
            continue
        with gathered([parameter]):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True)
    return state


def save_checkpoint(engine: Any, config: TrainConfig, step: int, total_steps: int, records: str) -> Path:
    """Write `checkpoint-{step}` in the stage's folder, drop the oldest beyond `save_total_limit`. A collective.

    Args:
        engine: DeepSpeed's.
        config: of the run.
        step: optimizer steps taken.
        total_steps: of the run.
        records: fingerprint of what is trained on, for `check_records`.

    Raises OSError on every rank if one cannot write: naming the path and the newest whole checkpoint.
    """
    folder = config.stage_dir / f"checkpoint-{step}"
    temporary = config.stage_dir / f".checkpoint-{step}.tmp"
    rank = dist.get_rank()
    failure: OSError | None = None

    def attempt(action: Callable[[], object]) -> None:
        """Act, unless something has failed already: the ranks must meet again in `_agree` whatever happens."""
        nonlocal failure
        if failure is None:
            try:
                with named(temporary):
                    action()
            except OSError as error:
                failure = error

    def begin() -> None:
        for left in config.stage_dir.glob(".checkpoint-*"):  # by a run that was killed
            _delete(left)
        temporary.mkdir(parents=True)

    def end() -> None:
        write_state_file(temporary / STATE, meta | {"files": describe(temporary)})
        sync(temporary)
        _remove(folder)
        os.replace(temporary, folder)
        sync_one(config.stage_dir)
        # later ones are of a run that this one resumed before their time: they are replaced when it comes to them
        for old in [c for c in checkpoints(config.stage_dir) if step_of(c) <= step][: -config.save_total_limit or None]:
            _remove(old)

    if rank == 0:
        attempt(begin)
    _agree(failure, temporary)
    addon = gather_addon_state(engine.module)
    if rank == 0:
        attempt(lambda: engine.module.save_addon(temporary, state_dict=addon))
        attempt(lambda: check_tensors(temporary))
    # its collectives are taken part in even by a rank that could not write
    written = optimizer_state.save(engine, temporary)
    failure = failure or written
    attempt(lambda: save_file(_rng_state(), str(temporary / f"rng-rank{rank}.safetensors")))
    _agree(failure, temporary)
    meta = {
        "step": step,
        "total_steps": total_steps,
        "world_size": dist.get_world_size(),
        "records": records,
        "scheduler_step": engine.lr_scheduler.last_epoch,
        "skipped_steps": engine.skipped_steps,
        "config": config.to_dict(),
    }
    if rank == 0:
        attempt(end)
    _agree(failure, temporary)
    return folder


def _agree(failure: OSError | None, temporary: Path) -> None:
    """Go on if no rank has failed; otherwise remove what was written and raise OSError on every rank. A collective."""
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, None if failure is None else str(failure))
    first = next((text for text in failures if text is not None), None)
    if first is None:
        return
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    whole = checkpoints(temporary.parent)
    kept = f"{whole[-1]} is whole: --resume auto continues from it" if whole else "there is no earlier checkpoint"
    raise OSError(f"the checkpoint is not written: {first}; {kept}")


def _remove(folder: Path) -> None:
    """Delete a checkpoint; a kill in the middle leaves no folder that looks like one with files missing."""
    if os.path.lexists(folder):
        doomed = folder.with_name(f".{folder.name}.old")
        if os.path.lexists(doomed):
            _delete(doomed)
        os.replace(folder, doomed)
        _delete(doomed)


def _delete(path: Path) -> None:
    """Delete a folder, or the file or link that stands in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


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
    """Folders named like checkpoints, oldest first; whether their files are whole is for `resume` to find out."""
    found = [p for p in stage_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.split("-")[1])


def find_resume(config: TrainConfig) -> Path | None:
    """The checkpoint `--resume` names, unread, or None to start afresh. Raises ValueError for a folder that is none."""
    if config.resume == "none":
        return None
    if config.resume == "auto":
        found = checkpoints(config.stage_dir)
        return found[-1] if found else None
    folder = Path(config.resume)
    if not (folder / STATE).is_file():
        raise ValueError(f"--resume {folder}: no {STATE} there, so it is not a checkpoint")
    return folder


def resume(config: TrainConfig, world_size: int, say: Callable[[str], Any]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from, every file of it compared with what was written, and its state. A collective.

    `auto` goes back to the newest one that is whole, and says so.

    Raises ValueError, on all ranks, if there is none or the run's options are others.
    """
    return from_rank_0(lambda: choose(config, world_size, say))


def choose(config: TrainConfig, world_size: int, say: Callable[[str], Any]) -> tuple[Path, dict[str, Any]] | None:
    """`resume` on one rank alone."""
    newest = find_resume(config)
    if newest is None:
        return None
    if config.resume != "auto":
        try:
            return newest, _whole(newest, config, world_size)
        except Damaged as error:
            raise ValueError(f"--resume {newest}: {error}{_before(newest)}") from None
    damage: list[Damaged] = []
    for folder in reversed(checkpoints(config.stage_dir)):
        try:
            state = _whole(folder, config, world_size)
        except Damaged as error:
            damage.append(error)
            continue
        for found in damage:
            say(f"warning: {found}; going back to {folder}")
        return folder, state
    raise ValueError(f"--resume auto: no checkpoint is whole ({damage[0]}); --overwrite_output_dir starts anew")


def _before(damaged: Path) -> str:
    """Advice: the newest earlier checkpoint beside a damaged one that is whole."""
    if not re.fullmatch(r"checkpoint-\d+", damaged.name):
        return ""
    for folder in reversed([c for c in checkpoints(damaged.parent) if step_of(c) < step_of(damaged)]):
        try:
            _verify(folder, read_state_file(folder))
        except ValueError:
            continue
        return f"; --resume {folder} continues from the whole one before it"
    return "; no earlier checkpoint is whole"


def _whole(folder: Path, config: TrainConfig, world_size: int) -> dict[str, Any]:
    """A checkpoint's state, once its options and files have been checked."""
    state = read_state(folder, config, world_size)
    _verify(folder, state)
    return state


def _verify(folder: Path, state: dict[str, Any]) -> None:
    if state.get("finished"):
        raise ValueError(f"--resume {folder}: a finished add-on has nothing to resume; name a checkpoint-N beside it")
    if "format" in state:
        verify(folder, state["files"])
    else:
        check_pickles(folder / PICKLES)


def read_state(folder: Path, config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The folder's `trainer_state.json`, after checking that this run continues the same trajectory.

    Raises ValueError for other options, its subclass Damaged for a file that is not as it was written.
    """
    state = read_state_file(folder)
    # an option that a checkpoint does not know yet had no effect when it was written, as its default has none
    saved, now = TrainConfig().to_dict() | state["config"], config.to_dict()
    if "query_window" not in state["config"] and saved["query"] == "prompt":
        saved["query_window"] = 0  # but this one: runs without it had no windows
    changed = sorted(k for k in now if k not in RESUME_MAY_DIFFER and saved[k] != now[k])
    if changed:
        detail = ", ".join(f"{k} {shorten(saved[k])} -> {shorten(now[k])}" for k in changed)
        raise ValueError(
            f"--resume {folder}: the run was started with other options ({detail}); --overwrite_output_dir starts anew"
        )
    if (folder / PICKLES).is_dir() and state["world_size"] != world_size:
        raise ValueError(
            f"--resume {folder}: it is of an earlier version, whose checkpoints only as many ranks can continue as "
            f"wrote them: {state['world_size']}, and this run has {world_size}"
        )
    return state


def check_finished(config: TrainConfig, world_size: int) -> None:
    """Raise ValueError if the finished stage was run with other options, or its add-on is not as it was written."""
    try:
        state = read_state(config.stage_dir, config, world_size)
        verify(config.stage_dir, state.get("files", {}))
    except Damaged as error:
        raise ValueError(f"{error}; delete {config.stage_dir / STATE} and --resume auto copies it anew") from None


def check_addon(folder: str | Path) -> None:
    """Raise ValueError if the folder is a stage's or a checkpoint whose add-on is not as it was written."""
    path = Path(folder)
    if (path / STATE).is_file():
        files = read_state_file(path).get("files", {})
        verify(path, {name: entry for name, entry in files.items() if is_of_addon(name)})


def check_records(folder: Path, state: dict[str, Any], config: TrainConfig, records: str) -> None:
    """Refuse to go on with other records: the rows after the step would not be those of the run that was stopped."""
    if state.get("records") != records:
        raise ValueError(
            f"--resume {folder}: --data_path {config.data_path} does not hold the records the run was started with; "
            f"--overwrite_output_dir starts anew"
        )


def restore(engine: Any, folder: Path, state: dict[str, Any]) -> None:
    """Load optimizer, schedule, fp32 weights and random state into a freshly built engine. A collective.

    Ranks in another number than wrote the checkpoint draw dropout of their own from here on.
    """
    if "format" not in state:
        with only_known_pickles():
            path, _ = engine.load_checkpoint(str(folder), tag=PICKLES, load_module_strict=False)
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed could not load its state")
    else:
        optimizer_state.restore(engine, sorted(folder.glob("optimizer-*.safetensors")))
        set_lambda_steps(engine.lr_scheduler, state["scheduler_step"])
        engine.global_steps, engine.skipped_steps = state["step"], state["skipped_steps"]
        engine.global_samples = state["step"] * engine.train_batch_size()
    rank = dist.get_rank()
    if state["world_size"] == dist.get_world_size():
        _set_rng_state(load_file(str(folder / f"rng-rank{rank}.safetensors")))
    else:
        torch.manual_seed((state["step"] << 32) + state["config"]["seed"] + rank)


def finish(config: TrainConfig, checkpoint: Path) -> None:
    """Copy the last checkpoint's add-on to the stage's folder; `trainer_state.json` comes last and marks completion.

    Raises OSError, naming the path, if it cannot be written; `--resume auto` tries again.
    """
    state = read_state_file(checkpoint)
    names = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
    files = state.get("files") or describe(checkpoint, filter(is_of_addon, names))
    files = {name: entry for name, entry in files.items() if is_of_addon(name)}
    with named(config.stage_dir):
        for name in ADDON:
            item, target = checkpoint / name, config.stage_dir / name
            temporary = config.stage_dir / f".{name}.tmp"
            if item.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(item, temporary)
                shutil.rmtree(target, ignore_errors=True)
                sync(temporary)
            elif item.is_file():
                shutil.copyfile(item, temporary)
                sync_one(temporary)
            else:
                continue
            os.replace(temporary, target)
        unfinished = config.stage_dir / f".{STATE}.tmp"
        write_state_file(unfinished, state | {"finished": True, "files": files})
        sync_one(unfinished)
        os.replace(unfinished, config.stage_dir / STATE)
        sync_one(config.stage_dir)


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
