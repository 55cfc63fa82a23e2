"""Ahead-of-time compilation of every shipped kernel for every architecture, without a GPU."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import aot
import psa_kernels

SPECIALIZATIONS = [
    pytest.param(name, i, id=f"{name.removeprefix('psa_kernels.')}-{spec.name}")
    for name in aot.kernel_modules()
    for i, spec in enumerate(importlib.import_module(name).SPECIALIZATIONS)
]


def compile_in_subprocess(modules: list[str], out: Path) -> list[aot.Compiled]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Triton prints the whole PTX of a kernel that ptxas refuses
    done = subprocess.run(
        [sys.executable, aot.__file__, "--out", out, *modules],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [aot.Compiled(**json.loads(line)) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compile_in_subprocess(aot.kernel_modules(), tmp_path_factory.mktemp("aot") / "compiled.jsonl")


@pytest.mark.parametrize(("module", "index"), SPECIALIZATIONS)
def test_compiles_within_the_limits_of_every_architecture(compiled, module, index):
    mine = [c for c in compiled if (c.module, c.index) == (module, index)]
    assert len(mine) == sum(task[1] == index for task in aot.tasks([module]))
    faults = [fault for c in mine for fault in c.faults]
    assert not faults, "\n".join(faults)


def test_rows_of_logits_are_read_and_written_as_vectors_whatever_the_vocabulary(compiled):
    """Only the padded width is known to be divisible by 16; V, which stands in comparisons, is not."""
    name = "psa_kernels.supervised_linear_cross_entropy"
    kernels = importlib.import_module(name)
    for c in compiled:
        spec = kernels.SPECIALIZATIONS[c.index] if c.module == name else None
        if spec is None or c.arch != 90 or spec.signature["logits_ptr"] == "*fp64":
            continue
        assert c.any_size == ["V"]
        per_thread = spec.constexprs["BLOCK_V"] // (32 * spec.num_warps)
        vectors = per_thread * {"*bf16": 2, "*fp16": 2, "*fp32": 4}[spec.signature["logits_ptr"]] // 16
        bias_vectors = 0 if "bias_ptr" in spec.constexprs else per_thread * 4 // 16
        walks = 2 if spec.constexprs["WRITE_GRAD"] else 1
        assert c.accesses["ld.global.v4.b32"] == walks * (vectors + bias_vectors), (c.name, c.accesses)
        assert c.accesses.get("st.global.v4.b32", 0) == (walks - 1) * vectors, (c.name, c.accesses)
        # label, its logit and its bias, the weight: one each; the loss and the padding's -inf
        scalars = {k: n for k, n in c.accesses.items() if ".v4." not in k}
        assert sum(n for k, n in scalars.items() if k.startswith("ld")) <= 4, (c.name, c.accesses)
        assert sum(n for k, n in scalars.items() if k.startswith("st")) <= 2, (c.name, c.accesses)


def test_the_harness_catches_what_it_is_for(tmp_path):
    compiled = compile_in_subprocess(["faulty_kernels"], tmp_path / "compiled.jsonl")
    assert all(0 < c.registers <= 255 for c in compiled if not c.error)

    def faults(kernel, aligned=True):
        return {c.arch: " ".join(c.faults) for c in compiled if c.name.startswith(kernel) and c.aligned == aligned}

    archs = set(aot.SHARED_MEMORY)
    assert faults("sound") == dict.fromkeys(archs, "")
    assert faults("sound", aligned=False) == {aot.UNALIGNED_ARCH: ""}
    spills = faults("spills")
    assert set(spills) == archs
    assert all(f"sm_{arch}" in text and "bytes per thread in local memory" in text for arch, text in spills.items())
    shared = faults("needs_too_much_shared_memory")
    assert set(shared) == {86, 90}
    assert all(f"the limit is {aot.SHARED_MEMORY[arch]}" in text for arch, text in shared.items())
    assert "does not compile" in faults("does_not_compile")[90]


FILES = [importlib.import_module(f"psa_kernels.{p.stem}") for p in Path(psa_kernels.__path__[0]).glob("[!_]*.py")]


def launches(module) -> list[tuple[str, ast.Call]]:
    """Each launch in a module, `kernel[grid](...)`, with the kernel's name."""
    nodes = ast.walk(ast.parse(Path(module.__file__).read_text()))
    calls = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
    named = [(call.func.value.id, call) for call in calls if isinstance(call.func.value, ast.Name)]
    return [(name, call) for name, call in named if hasattr(getattr(module, name, None), "arg_names")]


def launched(module) -> set[str]:
    return {name for name, _ in launches(module)}


def jitted(module) -> dict[str, set[str]]:
    """Functions under @triton.jit, each with the names it calls."""
    nodes = ast.walk(ast.parse(Path(module.__file__).read_text()))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
    return {
        f.name: {c.func.id for c in ast.walk(f) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)}
        for f in functions
        if any("jit" in ast.unparse(d) for d in f.decorator_list)
    }


@pytest.mark.parametrize("module", FILES, ids=lambda module: module.__name__)
def test_every_launched_kernel_is_compiled_ahead_of_time(module):
    specializations = getattr(module, "SPECIALIZATIONS", ())
    assert launched(module) == {spec.kernel.__name__ for spec in specializations}
    for spec in specializations:
        assert list(spec.signature) == list(spec.kernel.arg_names), spec.name
        assert {k for k, v in spec.signature.items() if v == "constexpr"} == set(spec.constexprs), spec.name


@pytest.mark.parametrize("module", FILES, ids=lambda module: module.__name__)
def test_a_launch_names_its_arguments(module):
    """Long lists are misread; the interpreter passes over a name that the kernel does not have."""
    for name, call in launches(module):
        assert not call.args, name
        given = {keyword.arg for keyword in call.keywords if keyword.arg}  # a **dict has no name
        assert given <= {*getattr(module, name).arg_names, "num_warps", "num_stages"}, name


def test_every_kernel_is_launched_or_called_by_one():
    used = set().union(*(launched(module) for module in FILES), *(c for m in FILES for c in jitted(m).values()))
    assert {name for module in FILES for name in jitted(module)} <= used
