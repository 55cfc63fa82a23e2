"""What an op refuses in a sentence where torch would otherwise compute something else in silence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError, naming the arguments, unless all tensors are on one device.

    On two devices some of torch's products read memory that nobody filled: a CPU tensor times one on `meta` does.
    """
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first, *others = given.values()
    if any(device != first for device in others):
        places = ", ".join(f"{name} on {device}" for name, device in given.items())
        raise ValueError(f"{op} needs all tensors on one device, got {places}")


def no_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError where a tensor carries a tangent: a custom operator's result would have none."""
    if any(t is not None and _has_tangent(t) for t in tensors):
        raise NotImplementedError(f"{op} has no forward-mode derivative (jvp, jacfwd, dual numbers); use the backward")


def _has_tangent(tensor: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:  # a tensor of vmap's within forward mode, which torch cannot unpack: it may have one
        return True


def no_second_order(op: str) -> NoReturn:
    """Raise what every op without a double backward raises."""
    raise NotImplementedError(f"{op} has no double backward: a penalty on its gradient needs plain torch in its place")


def refuse_second_order(op: str) -> Callable[..., NoReturn]:
    """The autograd formula of an operator that is itself a backward: it raises."""

    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        no_second_order(op)

    return backward


def once(op: str, sources: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients that a Function's backward returns, in a graph whose own backward raises.

    `once_differentiable` raises only where the incoming gradient requires one. In a penalty on the gradient it does
    not, so that the second backward would pass over the op without a word.

    Args:
        op: name for the message.
        sources: what the gradients depend on: an output of the Function, saved for backward, through which the graph
            reaches the Function's inputs, and the incoming gradients.
        gradients: new tensors without history; None where an input needs none.
    """
    if not torch.is_grad_enabled():  # the ordinary backward, without create_graph
        return tuple(gradients)
    present = [g for g in gradients if g is not None]
    found = iter(_Once.apply(op, len(present), *present, *sources))
    return tuple(None if g is None else next(found) for g in gradients)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        ctx.mark_dirty(*tensors[:count])  # neither copies nor views, which nobody could change in place
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        no_second_order(ctx.op)
