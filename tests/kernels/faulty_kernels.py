"""Kernels with one fault each, for the test of the ahead-of-time harness."""

import triton
import triton.language as tl
from psa_kernels.launch import Specialization


@triton.jit
def sound(x, y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, o < n), o < n)


@triton.jit
def spills(x, y, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    a = tl.load(x + o)
    b = tl.load(x + BLOCK + o)
    c = tl.load(x + 2 * BLOCK + o)
    s = tl.sum(a, 0) + tl.sum(b, 0) + tl.sum(c, 0)
    tl.store(y + o, a * s)
    tl.store(y + n + o, b * s)
    tl.store(y + 2 * n + o, c * s)


@triton.jit
def needs_too_much_shared_memory(x, y, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(0, n, BLOCK):
        a = tl.load(x + o[:, None] * n + i + o[None, :])
        b = tl.load(x + (i + o[:, None]) * n + o[None, :])
        acc += tl.dot(a, b)
    tl.store(y + o[:, None] * n + o[None, :], acc)


@triton.jit
def does_not_compile(x, y, n, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, 2 * BLOCK)))


def _specialization(kernel, pointer, block, **options):
    signature = {"x": pointer, "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    return Specialization(kernel, signature, {"BLOCK": block}, **options)


SPECIALIZATIONS = (
    _specialization(sound, "*fp32", 128),
    _specialization(spills, "*fp32", 4096, num_warps=1),
    _specialization(needs_too_much_shared_memory, "*bf16", 128, num_warps=8, num_stages=5, archs=(86, 90)),
    _specialization(does_not_compile, "*fp32", 128, archs=(90,)),
)
