"""Times an op beside the forms it replaces, in turn and in one process, and writes down what is needed to read it.

The ratios survive the machine's other load, the times do not. A form whose result is wrong gets no time.
"""

from __future__ import annotations

import functools
import gc
import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
Form = Callable[[], Tensor]


def relative_errors(form: Form, leaves: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest error of a form's value and gradients, in the norm and relative to the expected ones (fp64).

    Infinite where anything is NaN.
    """
    value = form()
    got = (value.detach(), *torch.autograd.grad(value.sum(), list(leaves), materialize_grads=True, allow_unused=True))
    scale = max(e.norm().item() for e in expected[1:])
    # a gradient that is nothing beside the others is compared with those
    pairs = zip(got, expected, strict=True)
    errors = [((g.double() - e).norm() / max(e.norm().item(), 1e-6 * scale)).item() for g, e in pairs]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def check(
    forms: dict[str, Form], leaves: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float
) -> tuple[dict[str, Form], dict[str, str]]:
    """The forms whose value and every gradient are right, and what is wrong with the others; "ours" must be right."""
    right, wrong = {}, {}
    for name, form in forms.items():
        try:
            error = relative_errors(form, leaves, expected)
        except Exception as failure:  # a package that does not run here must not stop the others
            wrong[name] = f"failed: {failure}".splitlines()[0][:120]
            continue
        if error <= tolerance:
            right[name] = form
        else:
            wrong[name] = f"wrong by {error:.1e}"
    assert "ours" in right, wrong
    return right, wrong


def run(form: Form, leaves: Sequence[Tensor]) -> None:
    """Forward and backward, with fresh gradients."""
    for leaf in leaves:
        leaf.grad = None
    form().sum().backward()
    if CUDA:
        torch.cuda.synchronize()


def timed(form: Form, leaves: Sequence[Tensor]) -> float:
    """Seconds of a run, host included."""
    start = time.perf_counter()
    run(form, leaves)
    return time.perf_counter() - start


def climb(
    benchmark,
    capsys,
    title: str,
    forms: dict[str, Form],
    leaves: Sequence[Tensor],
    rounds: int,
    bytes_moved: int | None = None,
    wrong: dict[str, str] | None = None,
) -> None:
    """Time "ours" under pytest-benchmark and every other form in turn with it; print and keep the table.

    `bytes_moved`: what must cross the memory at least; on a GPU the share of the measured copy bandwidth is reported.
    """
    ours = forms["ours"]
    others = {name: form for name, form in forms.items() if name != "ours"}
    times: dict[str, list[float]] = {name: [] for name in others}

    def setup() -> None:
        for name, form in others.items():
            times[name].append(timed(form, leaves))

    benchmark.group = title
    for name, form in forms.items():
        for _ in range(2 if name == "ours" or CUDA else 0):
            run(form, leaves)
    benchmark.pedantic(run, args=(ours, leaves), setup=setup, rounds=rounds)
    if benchmark.disabled:
        return
    medians = {"ours": benchmark.stats.stats.median}
    medians |= {name: statistics.median(found) for name, found in times.items()}
    rows = {}
    for name, seconds in medians.items():
        form = forms[name]
        rows[name] = {"ms": seconds * 1e3, "ratio": seconds / medians["ours"], "peak_mb": peak_memory(form, leaves)}
        if CUDA:
            found = gpu_times(form, leaves)
            rows[name] |= found
            if bytes_moved and found["graph_cold_ms"]:
                rows[name]["of_copy_bandwidth"] = bytes_moved / (found["graph_cold_ms"] * 1e-3) / copy_bandwidth()
    benchmark.extra_info |= {"title": title, "rows": rows, "wrong": wrong or {}, **where()}
    with capsys.disabled():
        print(f"\n{title}")
        for name, row in rows.items():
            values = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items() if v)
            print(f"  {name:34s}{values}")
        for name, reason in (wrong or {}).items():
            print(f"  {name:34s}{reason}")


def peak_memory(form: Form, leaves: Sequence[Tensor]) -> float | None:
    """MB above the inputs, gradients included."""
    if not CUDA:
        return _peak_on_cpu(form, leaves)
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(form, leaves)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peak_on_cpu(form: Form, leaves: Sequence[Tensor]) -> float:
    """The highest sum of allocations less frees that torch's profiler sees."""
    from torch.profiler import ProfilerActivity, profile

    for leaf in leaves:
        leaf.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(form, leaves)
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def gpu_times(form: Form, leaves: Sequence[Tensor], rounds: int = 30) -> dict[str, Any]:
    """Milliseconds with nothing of the inputs in the L2 cache, host included; and of a graph, with and without them.

    A graph's times are the device's alone: other work is queued before it, so that its launch waits for nothing. Where
    none can be captured they are None and `no_graph` says why.
    """
    flush = torch.empty(512 << 20, dtype=torch.int8, device="cuda")
    cold = []
    for _ in range(rounds):
        flush.zero_()
        torch.cuda.synchronize()
        cold.append(timed(form, leaves))
    times: dict[str, Any] = {"cold_ms": statistics.median(cold) * 1e3, "graph_ms": None, "graph_cold_ms": None}
    graph = _captured(form, leaves)
    if isinstance(graph, str):
        return times | {"no_graph": graph}
    for column, before in (("graph_ms", graph.replay), ("graph_cold_ms", flush.zero_)):
        found = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end))
        times[column] = statistics.median(found)
    return times


def _captured(form: Form, leaves: Sequence[Tensor]) -> torch.cuda.CUDAGraph | str:
    """The form's run as a graph, or why there can be none."""
    for leaf in leaves:
        leaf.grad = None
    gc.collect()  # what an earlier form left in a cycle may hold gradients' nodes of another stream
    graph = torch.cuda.CUDAGraph()
    try:
        # a form that waits for the device is found here: a capture that fails can spoil the process's random numbers
        torch.cuda.set_sync_debug_mode("error")
        form().sum().backward()
        torch.cuda.set_sync_debug_mode("default")
        for leaf in leaves:
            leaf.grad = None
        with torch.cuda.graph(graph):
            form().sum().backward()
    except RuntimeError as reason:
        return str(reason).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return graph


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second read and written by a copy of 1 GB, the best of ten."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * source.nbytes / (start.elapsed_time(end) * 1e-3))
    return best


def where() -> dict[str, object]:
    """Hardware, versions and commit."""
    root = Path(__file__).resolve().parents[1]
    found: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": str(DTYPE)}
    # a copy of the tree without its history says the commit in PSA_COMMIT
    found["commit"] = os.environ.get("PSA_COMMIT") or _said_by("git", "-C", str(root), "rev-parse", "HEAD")
    if CUDA:
        import triton

        driver = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {"triton": triton.__version__, "cuda": torch.version.cuda, "driver": driver}
        found["device"] = torch.cuda.get_device_name()
    else:
        cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        found["device"] = cpu[0].split(":")[1].strip() if cpu else "cpu"
        settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("MALLOC_"))
        found["malloc"] = " ".join(settings) or "default"
    return found


def _said_by(*command: str) -> str | None:
    """What a program prints, or None where there is none or it fails."""
    if not shutil.which(command[0]):
        return None
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
