"""Compile every shipped kernel for every architecture it is launched on; needs no GPU.

    python tests/kernels/aot.py                     a table of all kernels in psa_kernels
    python tests/kernels/aot.py --out FILE NAME...  the same of the modules NAME, as JSON lines

Every `Specialization` is compiled as a launch with 16-byte aligned pointers and sizes divisible by 16 compiles it
(vector loads, asynchronous copies, most shared memory) and, for one architecture, as one where nothing is aligned.
Run it without TRITON_INTERPRET, which would leave nothing to compile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psa_kernels
import triton
from psa_kernels.launch import Specialization
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# bytes one block may ask for; the 1 KB the system reserves per block is already deducted
SHARED_MEMORY = {arch: kib * 1024 for arch, kib in {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}.items()}
TENSOR_MEMORY_COLUMNS = 512
# odd sizes are rare and slow anyway: one architecture shows that they compile, and they may spill
UNALIGNED_ARCH = 80


@dataclass(frozen=True)
class Compiled:
    """What one compilation uses: bytes of shared and of local (spilled) memory, registers per thread."""

    module: str
    index: int
    name: str
    arch: int
    aligned: bool
    shared: int = 0
    local: int = 0
    registers: int = 0
    tensor_memory: int = 0
    accesses: dict[str, int] = field(default_factory=dict)  # PTX instructions on global memory, "ld.global.v4.b32"
    any_size: list[str] = field(default_factory=list)  # arguments about which a compilation knows nothing
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """What is wrong with it, each as a sentence with the kernel, the architecture and the figure."""
        where = f"{self.module}.{self.name} on sm_{self.arch}{'' if self.aligned else ' (unaligned)'}"
        if self.error:
            return [f"{where} does not compile: {self.error}"]
        limit, found = SHARED_MEMORY[self.arch], []
        if self.shared > limit:
            found.append(f"{where} needs {self.shared} bytes of shared memory, the limit is {limit}")
        if self.local and self.aligned:
            found.append(f"{where} keeps {self.local} bytes per thread in local memory ({self.registers} registers)")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"{where} needs {self.tensor_memory} of {TENSOR_MEMORY_COLUMNS} columns of tensor memory")
        return found


def kernel_modules() -> list[str]:
    """Modules of psa_kernels that name their compilations."""
    names = [f"psa_kernels.{m.name}" for m in pkgutil.iter_modules(psa_kernels.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "SPECIALIZATIONS")]


def compile_one(task: tuple[str, int, int, bool]) -> Compiled:
    """Compile number `index` of a module's SPECIALIZATIONS for one architecture."""
    module, index, arch, aligned = task
    spec: Specialization = importlib.import_module(module).SPECIALIZATIONS[index]
    done = Compiled(module, index, spec.name, arch, aligned)
    try:
        compiled = triton.compile(
            ASTSource(spec.kernel, dict(spec.signature), dict(spec.constexprs), _attributes(spec) if aligned else None),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
        )
        usage = _resource_usage(compiled.asm["cubin"])
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Compiled(**{**asdict(done), "error": f"{type(error).__name__}: {' / '.join(lines[:4])[:600]}"})
    return Compiled(
        **{
            **asdict(done),
            "shared": compiled.metadata.shared,
            "local": usage["STACK"] + usage["LOCAL"],
            "registers": usage["REG"],
            "accesses": dict(Counter(re.findall(r"\b(?:ld|st)\.global[\w.]*", compiled.asm["ptx"]))),
            "any_size": sorted(_any_size(spec)),
            "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        }
    )


def tasks(modules: Iterable[str]) -> list[tuple[str, int, int, bool]]:
    """Arguments of `compile_one` for every specialization of `modules`."""
    return [
        (module, index, arch, aligned)
        for module in modules
        for index, spec in enumerate(importlib.import_module(module).SPECIALIZATIONS)
        for arch in spec.archs
        for aligned in ((True, False) if arch == UNALIGNED_ARCH else (True,))
    ]


def compile_all(modules: Iterable[str], processes: int = 2) -> Iterator[Compiled]:
    """Every specialization of `modules`, in no particular order."""
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap_unordered(compile_one, tasks(modules))


def _attributes(spec: Specialization) -> dict[tuple[int, ...], list[list]]:
    """What Triton's launcher infers when every pointer and every integer it specializes on is divisible by 16."""
    exempt = _any_size(spec)
    return {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(spec.kernel.arg_names)
        if name not in exempt and re.match(r"\*|[iu](32|64)$", spec.signature[name])
    }


def _any_size(spec: Specialization) -> set[str]:
    return {p.name for p in spec.kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of a cubin with one kernel: spilled registers are on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if len(usage) != 3:
        raise RuntimeError(f"cuobjdump -res-usage prints something else than expected: {text!r}")
    return usage


def main() -> None:
    """Compile, then write JSON lines or print a table; status 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="default: all of psa_kernels")
    parser.add_argument("--out", type=Path, help="write JSON lines here instead of a table")
    arguments = parser.parse_args()
    results = list(compile_all(arguments.modules or kernel_modules()))
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(asdict(r)) + "\n" for r in results))
        return
    print("| kernel | arch | aligned | shared memory | registers | local |\n|---|---|---|---|---|---|")
    for r in sorted(results, key=lambda r: (r.module, r.index, r.arch, not r.aligned)):
        print(f"| {r.name} | {r.arch} | {r.aligned} | {r.shared} | {r.registers} | {r.local} |")
    faults = [fault for r in results for fault in r.faults]
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
