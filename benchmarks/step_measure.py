"""Measures forms of a training step: whole steps in turn, their parts, their FLOPs and their peak memory."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from ladder import CUDA
from step_forms import PARTS, Batch, Form, synchronize
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _convolution_backward(grad, x, weight, *rest, **_) -> int:
    needed = rest[-1]  # input, weight, bias
    return (needed[0] + needed[1]) * 2 * math.prod(grad) * math.prod(weight[1:])


# torch counts the attention of GPUs only, whose arguments begin as here: (gradient,) query, key, value; and in a
# convolution's backward it overlooks that the convolution may be depthwise
_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
    torch.ops.aten.convolution_backward: _convolution_backward,
}


Now = Callable[[], float]
#: "cpu" counts this process's own seconds: on a CPU shared with others, and with one thread, its time alone
CLOCKS: dict[str, Now] = {"wall": time.perf_counter, "cpu": time.process_time}


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """--seed, --clock and --json."""
    parser.add_argument("--seed", type=int, default=0, help="of the records and their order")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: this process's CPU seconds")
    parser.add_argument("--json", help="file for the result")


def check_shared_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse, before anything is measured, what --clock and --json cannot do here."""
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json {args.json}: no such folder")
    if args.clock == "cpu" and (CUDA or torch.get_num_threads() > 1):
        parser.error("--clock cpu measures one thread on a CPU: set OMP_NUM_THREADS=1")


class Clock:
    """Context managers by name that add up seconds."""

    def __init__(self, now: Now) -> None:
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronize()
        start = self.now()
        yield
        synchronize()
        self.seconds[name] += self.now() - start


class Counter:
    """Context managers by name that add up FLOPs and, on a GPU, keep the most memory that was allocated.

    Causal attention counts in full.
    """

    def __init__(self) -> None:
        self.flops: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            yield
        self.flops[name] += counter.get_total_flops()
        if CUDA:
            self.bytes[name] = max(self.bytes[name], torch.cuda.max_memory_allocated())


def time_steps(
    forms: dict[str, Form], batches: dict[str, Sequence[Batch]], warmup: int, now: Now = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each form's step on each of its batches after the first `warmup`, one form after the other.

    The form that begins changes from step to step, so that none always follows the same one.
    """
    times: dict[str, list[float]] = {name: [] for name in forms}
    names = list(forms)
    for i in range(len(next(iter(batches.values())))):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize()
            start = now()
            forms[name].step(batches[name][i])
            synchronize()
            if i >= warmup:
                times[name].append(now() - start)
    return times


def time_parts(
    forms: dict[str, Form], batches: dict[str, Sequence[Batch]], rounds: int, now: Now = time.perf_counter
) -> dict[str, list[dict[str, float]]]:
    """Seconds of each part of each form's step, round by round in turn, after one round that does not count."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    for i in range(rounds + 1):
        for name, form in forms.items():
            clock = Clock(now)
            form.step_in_parts(batches[name][i % len(batches[name])], clock)
            if i:
                found[name].append(dict(clock.seconds))
    return found


def table_of_parts(
    form: Form, batches: Sequence[Batch], times: list[dict[str, float]], rate: float
) -> dict[str, dict[str, float | None]]:
    """Each part's time and FLOPs, and the step's: medians over the rounds of `time_parts`.

    Args:
        form: the form.
        batches: its batches.
        times: of `time_parts` on them.
        rate: GFLOP/s of a matrix product, for `of_matrix_rate`.
    """
    counts, peaks = [], defaultdict(int)
    for i in range(1, len(times) + 1):
        count = Counter()
        form.step_in_parts(batches[i % len(batches)], count)
        counts.append(count.flops)
        for part, held in count.bytes.items():
            peaks[part] = max(peaks[part], held)
    rows: dict[str, dict[str, float | None]] = {}
    for part in (*PARTS, "step"):
        if part != "step" and part not in times[0]:
            continue
        seconds = statistics.median(sum(t.values()) if part == "step" else t[part] for t in times)
        flops = statistics.median(sum(found.values()) if part == "step" else found[part] for found in counts)
        held = max(peaks.values()) if part == "step" and CUDA else peaks[part]
        rows[part] = {
            "ms": 1e3 * seconds,
            "gflop": flops / 1e9,
            "of_matrix_rate": flops / 1e9 / seconds / rate,
            "peak_mb": held / 2**20 if CUDA else None,
        }
    return rows


LLM = ("LLM forward", "loss", "backward")


def overhead(
    parts: dict[str, list[dict[str, float]]], form: str, without_tokens: str, stock: str = "B1"
) -> dict[str, float]:
    """What a form's safety modules add to plain fine-tuning, in percent of its step.

    Args:
        parts: of `time_parts`.
        form: the form.
        without_tokens: the same form without safety tokens in the language model.
        stock: plain fine-tuning.

    Returns:
        bottleneck_and_losses_percent: safety projector, attention, heads and both losses, backward and optimizer.
        extra_llm_tokens_percent: the language model with the safety tokens less the language model without them.
    """
    step = statistics.median(sum(found.values()) for found in parts[stock])
    bottleneck = statistics.median(found["safety modules"] for found in parts[form])
    pairs = zip(parts[form], parts[without_tokens], strict=True)  # the same rows, one right after the other
    extra = statistics.median(sum(a[part] - b[part] for part in LLM) for a, b in pairs)
    return {
        "bottleneck_and_losses_percent": 100 * bottleneck / step,
        "extra_llm_tokens_percent": 100 * extra / step,
    }


def peak_memory(form: Form, batch: Batch) -> dict[str, float]:
    """MB of one step: its peak above what there was before it, and that with weights and optimizer state.

    On a GPU the allocator's peak. On a CPU the running sum of what torch allocates and frees, from the profiler's
    memory events: exact and free of noise, unlike the process's resident size; scratch of MKL and oneDNN is not in it.
    """
    if CUDA:
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form.step(batch)
        synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            form.step(batch)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    state = [t for o in form.optimizers.values() for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
    kept = sum(t.nbytes for t in (*form.model.parameters(), *state))
    return {"step_mb": peak / 2**20, "total_mb": (kept + peak) / 2**20}
