"""What the launchers share: the description of a compiled kernel, and questions about where kernels run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

ARCHS = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Specialization:
    """One shipped compilation of a kernel, for the ahead-of-time tests.

    `signature` maps every argument to its Triton type ("*bf16", "i32", "fp32", "constexpr"), `constexprs` gives the
    values of the constexpr ones; `archs` are the compute capabilities it is launched on, times ten.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    archs: tuple[int, ...] = field(default=ARCHS)

    @property
    def name(self) -> str:
        """The kernel's name and its constexprs, as "score[BLOCK_S=32, ...]"."""
        values = ", ".join(f"{k}={v}" for k, v in self.constexprs.items())
        return f"{self.kernel.__name__}[{values}, warps={self.num_warps}, stages={self.num_stages}]"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton was imported): CPU tensors, slow."""
    return triton.knobs.runtime.interpret


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return triton.next_power_of_2(n)


def float32_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision for operands of `dtype`: "tf32" for fp32 where torch's own CUDA products use it."""
    # reading the older allow_tf32 raises in a program that has set this one
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over values of `dtype` are kept in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def triton_dtype(wide: torch.dtype) -> tl.dtype:
    """Triton's name of an accumulator's dtype, fp32 or fp64."""
    return tl.float64 if wide == torch.float64 else tl.float32
