"""Fresh memory for large results on the CPU."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence

from torch import Tensor

_LARGE = 8 << 20
_MADV_HUGEPAGE = 14


def empty_large(shape: Sequence[int], like: Tensor) -> Tensor:
    """`like.new_empty(shape)`; on Linux CPUs a large one asks for huge pages before it is touched.

    A gradient is fresh memory at every step, and at large widths touching it costs more than computing it: 192 MB took
    46 ms in pages of 4 KB and 11 ms in huge ones, once the machine had handed them out for the first time (2 cores of
    an AMD EPYC in a virtual machine). A hint only: where the system has no huge pages nothing changes.
    """
    out = like.new_empty(shape)
    advise = _madvise() if out.device.type == "cpu" and out.nbytes >= _LARGE else None
    if advise is not None:
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (out.data_ptr() + out.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, end - start, _MADV_HUGEPAGE)
    return out


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's madvise, or None where there is no such hint."""
    function = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform.startswith("linux") else None
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
