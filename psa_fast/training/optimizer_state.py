"""Master weights and Adam's moments as plain tensors by name: any number of ranks and any ZeRO stage can read them.

optimizer-00001.safetensors, ...   NAME.weight, NAME.exp_avg, NAME.exp_avg_sq (fp32), NAME.step of each parameter

DeepSpeed's own files hold each rank's shards as pickles; these hold whole tensors and no code. A parameter is gathered
at a time, and the ranks take turns in keeping and writing a file's worth, so that no rank ever holds the whole state.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from psa_fast.compat.deepspeed import Group, base_optimizer, fragment, full_shape, layout, shard, swapped_in
from psa_fast.files import named

MOMENTS = ("exp_avg", "exp_avg_sq")
FILE_BYTES = 2 << 30  # of a file; a larger parameter has one of its own


@dataclass
class Piece:
    """This rank's share of a parameter: `numel` values from `start` on, which lie at `offset` in `flat`."""

    name: str
    shape: torch.Size
    flat: Tensor
    start: int
    offset: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        """The share's part of `flat` or of a moment that is laid out like it."""
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)


def check_engine(engine: Any) -> None:
    """Raise ValueError for an optimizer whose state could not be saved: hours of steps must not find that out."""
    _groups(engine)


@torch.no_grad()
def save(engine: Any, folder: Path) -> OSError | None:
    """Write the files of the optimizer's state into `folder`. A collective.

    Returns:
        Why this rank could not write, None if it could: the other ranks wait in the next collective, so the caller
        shares it with them.
    """
    groups, base, device = _groups(engine), _adam(engine), engine.device
    rank, world_size = dist.get_rank(), dist.get_world_size()
    steps, numbers = _steps(groups, base, device), _numbers(groups)
    failure: OSError | None = None
    kept: dict[str, Tensor] = {}
    at = 0

    def write() -> None:
        """Write what this rank keeps; every rank does so at once."""
        nonlocal failure
        if kept and failure is None:
            file = folder / f"optimizer-{next(numbers[name.rsplit('.', 1)[0]] for name in kept) + 1:05d}.safetensors"
            try:
                with named(file):
                    save_file(kept, file)
            except OSError as error:
                failure = error
        kept.clear()

    for index, group in enumerate(groups):
        with swapped_in(engine.optimizer, index):
            for piece in group:
                number = numbers[piece.name]
                if number // world_size != at // world_size:
                    write()
                at = number
                moments = base.state.get(piece.flat, {})
                for key in ("weight", *MOMENTS):
                    flat = piece.flat if key == "weight" else moments.get(key)
                    whole = _gathered(piece, flat, device, number % world_size, sharded=_is_sharded(engine))
                    if rank == number % world_size:
                        if not torch.isfinite(whole).all():
                            raise RuntimeError(f"{piece.name}: its {key} is not finite; the checkpoint is not kept")
                        kept[f"{piece.name}.{key}"] = whole.cpu()
                if rank == number % world_size:
                    kept[f"{piece.name}.step"] = torch.tensor(steps[piece.name])
    write()
    return failure


@torch.no_grad()
def restore(engine: Any, files: Sequence[Path]) -> None:
    """Give a new engine the state that `files` hold; each rank reads what it needs of them.

    Raises ValueError if they hold other parameters than the engine trains.
    """
    groups, base = _groups(engine), _adam(engine)
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            where |= dict.fromkeys(opened.keys(), opened)
        wanted = {f"{piece.name}.{key}" for group in groups for piece in group for key in ("weight", *MOMENTS, "step")}
        if differing := sorted(wanted ^ set(where)):
            raise ValueError(
                f"{files[0].parent if files else 'the checkpoint'} is of another model: {len(differing)} tensors of "
                f"its optimizer do not fit, {differing[0]} for one"
            )
        for index, group in enumerate(groups):
            with swapped_in(engine.optimizer, index, changed=True):
                for piece in group:
                    _restore(piece, base, where)


def _restore(piece: Piece, base: Any, where: dict[str, Any]) -> None:
    step = int(where[f"{piece.name}.step"].get_tensor(f"{piece.name}.step"))
    targets = {"weight": piece.flat}
    if step and piece.numel:
        targets |= _moments(base, piece.flat, step)
    for key, target in targets.items():
        name = f"{piece.name}.{key}"
        stored = where[name].get_tensor(name)
        if stored.shape != piece.shape:
            raise ValueError(f"{name} of the checkpoint has shape {list(stored.shape)}, the model {list(piece.shape)}")
        piece.of(target).copy_(stored.view(-1)[piece.start : piece.start + piece.numel])


def _moments(base: Any, flat: Tensor, step: int) -> dict[str, Tensor]:
    """Adam's moments for a tensor, made as its first step would make them, with its count of steps set."""
    state = base.state[flat]
    if not state:
        torch_adam = isinstance(base, torch.optim.AdamW)
        wide = not torch_adam and getattr(base, "fp32_optimizer_states", True)
        # torch counts in a tensor, DeepSpeed's CPU Adam in an integer
        on = flat.device if torch_adam and base.defaults.get("fused") else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=on) if torch_adam else 0
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat.detach(), dtype=torch.float32 if wide else flat.dtype)
    if isinstance(state["step"], Tensor):
        state["step"].fill_(max(step, int(state["step"])))
    else:
        state["step"] = max(step, state["step"])
    return {key: state[key] for key in MOMENTS}


def _steps(groups: list[list[Piece]], base: Any, device: torch.device) -> dict[str, int]:
    """Steps that Adam has taken with each parameter: not every rank has a share of every parameter."""
    pieces = [piece for group in groups for piece in group]
    found = [int(base.state.get(piece.flat, {}).get("step", 0)) if piece.numel else 0 for piece in pieces]
    steps = torch.tensor(found, dtype=torch.int64, device=device)
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    return {piece.name: step for piece, step in zip(pieces, steps.tolist(), strict=True)}


def _numbers(groups: list[list[Piece]]) -> dict[str, int]:
    """The file, counted from 0, that each parameter goes to."""
    numbers: dict[str, int] = {}
    number = used = 0
    for piece in (piece for group in groups for piece in group):
        size = 4 * (1 + len(MOMENTS)) * piece.shape.numel()
        if used and used + size > FILE_BYTES:
            number, used = number + 1, 0
        numbers[piece.name] = number
        used += size
    return numbers


def _gathered(piece: Piece, flat: Tensor | None, device: torch.device, keeper: int, sharded: bool) -> Tensor:
    """The whole parameter or moment, fp32, to the bit on the rank that keeps it; zeros for moments not yet made."""
    whole = torch.zeros(piece.shape.numel(), dtype=torch.float32, device=device)
    if flat is not None and piece.numel:
        whole.narrow(0, piece.start, piece.numel).copy_(piece.of(flat))
    if sharded:
        # shares do not overlap; sums of integers keep the bits, where -0.0 + 0.0 would not
        dist.reduce(whole.view(torch.int32), keeper)
    return whole.view(piece.shape)


def _adam(engine: Any) -> Any:
    """The optimizer that `build_optimizer` made."""
    return base_optimizer(engine.optimizer)


def _is_sharded(engine: Any) -> bool:
    return layout(engine.optimizer)[0] != "whole"


def _groups(engine: Any) -> list[list[Piece]]:
    """The pieces of every trained parameter, in an order that all ranks share, by DeepSpeed's flat groups."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    kind, groups = layout(engine.optimizer)
    of = {"shards": _of_shards, "fragments": _of_fragments, "whole": _of_whole}[kind]
    # a parameter without values (no safety tokens) has no state
    return [[piece for piece in of(group, names) if piece.shape.numel()] for group in groups]


def _of_shards(group: Group, names: dict[int, str]) -> list[Piece]:
    """ZeRO-3: equal shards of each parameter, one after another."""
    pieces, offset = [], 0
    for parameter in group.parameters:
        start, numel, room = shard(parameter, dist.get_rank())
        pieces.append(Piece(names[id(parameter)], full_shape(parameter), group.masters, start, offset, numel))
        offset += room
    return pieces


def _of_fragments(group: Group, names: dict[int, str]) -> list[Piece]:
    """ZeRO-1 and 2: equal cuts of the group's parameters laid end to end; a rank may have none of a parameter."""
    pieces = []
    for parameter in group.parameters:
        start, numel, place = fragment(parameter)
        pieces.append(Piece(names[id(parameter)], parameter.shape, group.masters, start, place, numel))
    return pieces


def _of_whole(group: Group, names: dict[int, str]) -> list[Piece]:
    """ZeRO-0: every rank has everything."""
    pairs = zip(group.parameters, group.masters, strict=True)
    return [Piece(names[id(p)], p.shape, master, 0, 0, p.numel()) for p, master in pairs]
