"""Which implementation an op runs: plain torch, or the Triton kernels of `psa_kernels`."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]


def resolve(backend: Backend, tensor: Tensor) -> Literal["torch", "triton"]:
    """The implementation for `tensor`; never a silent fallback from an explicit choice.

    Raises:
        ValueError: an unknown backend, or "triton" where its kernels cannot run on `tensor`.
    """
    return _choose(backend, tensor)[0]


def within(choice: Literal["torch", "triton"], backend: Backend, limit: str | None) -> Literal["torch", "triton"]:
    """`choice`, unless it is "triton" and an op's kernels have a `limit`: then "torch", or ValueError if asked for."""
    if choice == "torch" or limit is None:
        return choice
    if backend == "triton":
        raise ValueError(f'backend="triton" cannot run here: {limit}')
    return "torch"


def explain(backend: Backend, tensor: Tensor) -> str:
    """The implementation `resolve` picks and the reason, as one sentence."""
    choice, reason = _choose(backend, tensor)
    return f"{choice}: {reason}"


def _choose(backend: Backend, tensor: Tensor) -> tuple[Literal["torch", "triton"], str]:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f'backend must be "auto", "torch" or "triton", got {backend!r}')
    if backend == "torch":
        return "torch", "asked for"
    obstacle = _obstacle(tensor)
    if backend == "triton":
        if obstacle:
            raise ValueError(f'backend="triton" cannot run here: {obstacle}')
        return "triton", "asked for"
    if tensor.device.type != "cuda":
        return "torch", f"the tensors are on {tensor.device.type}"
    if obstacle:
        return "torch", obstacle
    return "triton", "the tensors are on a CUDA device"


def _obstacle(tensor: Tensor) -> str | None:
    """Why the kernels cannot run on `tensor`, or None."""
    if tensor.device.type == "cuda":
        if torch.version.hip:
            return "the kernels are compiled and tested for NVIDIA only"
        capability = torch.cuda.get_device_capability(tensor.device)
        return None if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {tensor.device.type} and TRITON_INTERPRET=1 is not set"
    if tensor.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None
