"""Private names of DeepSpeed (0.19.8 and later 0.19), each without importing it where it is not needed.

ZeRO's marks on a parameter (`ds_id`, `ds_shape`, `ds_numel`) and the layout of its optimizers are in no reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has cut a parameter into shards; there is no public question for it."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's shape; under ZeRO-3 the local tensor is an empty shard, and only a mark holds the true shape."""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(parameters: Iterable[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager[Any]:
    """Context in which parameters are whole on every rank, if ZeRO-3 has cut them. A collective.

    Args:
        parameters: may be whole, on which nothing is done.
        modifier_rank: whose changes all ranks get at the end; None: nobody changes them.
    """
    parameters = list(parameters)
    if not any(map(is_partitioned, parameters)):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


@contextmanager
def bit_under_zero_init() -> Iterator[None]:
    """Context in which BiT, the first part of a hybrid tower, can be built under DeepSpeed's `zero.Init`.

    BiT makes a tensor of numbers with torch.Tensor(array) (transformers 5.20 to 5.24). `zero.Init` puts a constructor
    in that one's place which takes any argument for a size, and keeps torch's as `__old_new__`. A BiT that calls
    torch.tensor needs none of this.
    """
    from transformers.models.bit.modeling_bit import BitEncoder

    build = BitEncoder.__init__

    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced = torch.Tensor.__new__
        torch.Tensor.__new__ = getattr(torch.Tensor, "__old_new__", replaced)  # type: ignore[method-assign]
        try:
            build(self, *args, **kwargs)
        finally:
            torch.Tensor.__new__ = replaced  # type: ignore[method-assign]

    BitEncoder.__init__ = built  # type: ignore[method-assign]
    try:
        yield
    finally:
        BitEncoder.__init__ = build  # type: ignore[method-assign]


def compile_no_shared_memory_reduce() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce for CPUs; to be called before `init_distributed`.

    Compiling takes 40 s at the first start, and a run killed meanwhile leaves a lock that every later run waits for
    without end. Gloo does the same work. No option turns it off, so the table of what can be compiled says no.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Group(NamedTuple):
    """One parameter group of an optimizer, with the master weights it steps.

    `masters` is one flat tensor that holds this rank's shares of all `parameters`, or a tensor for each of them.
    """

    parameters: list[Any]
    masters: Any


def base_optimizer(optimizer: Any) -> Any:
    """The optimizer that DeepSpeed was given, below its wrapper, which has another name in no class that wraps none."""
    return getattr(optimizer, "optimizer", optimizer)


def layout(optimizer: Any) -> tuple[str, list[Group]]:
    """How an engine's optimizer holds its master weights, which `state_dict` would give as one rank's pickle.

    Returns:
        "shards" (ZeRO-3), "fragments" (ZeRO-1, 2) or "whole", and the parameter groups.

    Raises:
        ValueError: an optimizer of another kind.
    """
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return "shards", _paired(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat)
    if kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        masters = getattr(optimizer, "single_partition_of_fp32_groups", None)
        masters = optimizer.fp32_groups_flat_partition if masters is None else masters
        trained = optimizer.bit16_groups if kind == "DeepSpeedZeroOptimizer" else optimizer.bf16_groups
        return "fragments", _paired(trained, masters)
    if kind == "AdamW":
        trained = [group["params"] for group in optimizer.param_groups]
        return "whole", _paired(trained, trained)
    if kind == "FP16_UnfusedOptimizer":
        return "whole", _paired(optimizer.fp16_groups, optimizer.fp32_groups)
    raise ValueError(f"--deepspeed_config: the state of DeepSpeed's {kind} cannot be saved")


def _paired(trained: Iterable[Any], masters: Any) -> list[Group]:
    return [Group(list(parameters), masters[i]) for i, parameters in enumerate(trained)]


def shard(parameter: Any, rank: int) -> tuple[int, int, int]:
    """Where a rank's shard of a parameter begins under ZeRO-3, its values, and the room it takes in the flat tensor.

    All ranks' shards are of one size; the last ones are padded, or nothing but padding.
    """
    room = parameter.partition_numel()
    start = rank * room
    numel = max(0, min(room, parameter.ds_numel - start))
    return (start if numel else 0), numel, room


def fragment(parameter: Any) -> tuple[int, int, int]:
    """Where this rank's cut of a parameter begins under ZeRO-1 and 2, its values, and their place in the flat tensor.

    `safe_get_full_optimizer_state` is the public way to what is there, and gathers it on every rank at once.
    """
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, 0, 0
    own, place = mapping.lp_fragment_address, mapping.hp_fragment_address.start
    return (own.start, own.numel, place) if own is not None else (0, 0, place)


@contextmanager
def swapped_in(optimizer: Any, index: int, changed: bool = False) -> Iterator[None]:
    """Bring a group's state into memory where it lies on NVMe (`offload_optimizer`), and back if it was changed.

    DeepSpeed does so in its own step alone.
    """
    swappable = getattr(optimizer, "_swappable_optimizer_subgroup", None)
    if swappable is None or not swappable(index):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(index)
    yield
    if changed:
        optimizer._optimizer_states_and_gradient_swap_out(index)
    else:
        optimizer._release_swap_buffers(index)
