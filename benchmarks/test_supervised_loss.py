"""Forward and backward of the supervised language loss beside everything else it could be computed with.

Every baseline is first compared with fp64 and left out of the table if it is wrong, then timed in turn with the op,
round by round, in one process: the ratios survive the machine's other load, the times do not. CPU: fp32, the sweep at a
reduced size. CUDA: 7B sizes in bf16, with the peak memory above the inputs.
"""

import statistics
import time
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from baselines.lm_loss import baselines

from psa_fast.ops import supervised_linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Size(NamedTuple):
    rows: int
    width: int
    dtype: torch.dtype
    rounds: int
    vocabulary: int = 32064


SWEEP = Size(8192, 4096, torch.bfloat16, 20) if DEVICE == "cuda" else Size(1024, 512, torch.float32, 3)
TARGET = SWEEP if DEVICE == "cuda" else Size(4096, 1024, torch.float32, 3)
CASES = [(SWEEP, share, head) for head in ("frozen", "trained") for share in (0.05, 0.25, 0.5, 1.0)]
CASES.append((TARGET, 0.1, "frozen"))
# relative errors of the loss, and of gradients in the norm
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs(size, share, head):
    torch.manual_seed(0)
    hidden = torch.randn(size.rows, size.width, device=DEVICE).to(size.dtype).requires_grad_()
    weight = (torch.randn(size.vocabulary, size.width, device=DEVICE) / size.width**0.5).to(size.dtype)
    labels = torch.randint(size.vocabulary, (size.rows,), device=DEVICE)
    labels[torch.randperm(size.rows, device=DEVICE)[round(share * size.rows) :]] = -100
    return hidden, weight.requires_grad_(head == "trained"), labels


def truth(hidden, weight, labels):
    """Loss and gradients in fp64; rows without a label have none."""
    kept = labels != -100
    h, w = hidden.detach()[kept].double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = F.cross_entropy(h @ w.t(), labels[kept])
    loss.backward()
    d_hidden = torch.zeros_like(hidden, dtype=torch.float64)
    d_hidden[kept] = h.grad
    return loss.detach(), d_hidden, w.grad if weight.requires_grad else None


def error(loss, data, expected):
    """The largest relative error of the loss and the gradients."""
    leaves = [t for t in data[:2] if t.requires_grad]
    got = loss(*data)
    pairs = zip((got.detach(), *torch.autograd.grad(got, leaves)), (e for e in expected if e is not None), strict=True)
    return max(((g.double() - e).norm() / e.norm()).item() for g, e in pairs)


def run(loss, data):
    for leaf in data[:2]:
        leaf.grad = None
    loss(*data).backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(loss, data):
    start = time.perf_counter()
    run(loss, data)
    return time.perf_counter() - start


def peak_memory(loss, data):
    """MB above the inputs, the gradients included; None on a CPU."""
    if DEVICE != "cuda":
        return None
    for leaf in data[:2]:
        leaf.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(loss, data)
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def checked(data, dtype):
    """The baselines that are right here, and what is wrong with the others."""
    expected = truth(*data)
    right, wrong = {}, {}
    for name, loss in baselines(DEVICE).items():
        try:
            off = error(loss, data, expected)
        except Exception as failure:  # a package that does not run here must not stop the others
            wrong[name] = f"failed: {failure}".splitlines()[0][:120]
            continue
        if off <= TOLERANCE[dtype]:
            right[name] = loss
        else:
            wrong[name] = f"wrong by {off:.1e}"
    off = error(supervised_linear_cross_entropy, data, expected)
    assert off <= TOLERANCE[dtype], f"the op itself is wrong by {off:.1e}"
    return right, wrong


@pytest.mark.parametrize(("size", "share", "head"), CASES, ids=[f"{s.rows}x{s.width}-{p:.0%}-{h}" for s, p, h in CASES])
def test_supervised_loss(benchmark, capsys, size, share, head):
    data = inputs(size, share, head)
    right, wrong = checked(data, size.dtype)
    times = {name: [] for name in right}

    def others():
        for name, loss in right.items():
            times[name].append(timed(loss, data))

    ours = supervised_linear_cross_entropy
    benchmark.group = f"supervised loss, {DEVICE}, {size.dtype}, V={size.vocabulary}"
    benchmark.pedantic(run, args=(ours, data), setup=others, rounds=size.rounds)
    if benchmark.disabled:
        return
    median = benchmark.stats.stats.median
    rows = {"ours": (median, 1.0, peak_memory(ours, data))}
    for name, loss in right.items():
        seconds = statistics.median(times[name])
        rows[name] = (seconds, seconds / median, peak_memory(loss, data))
    benchmark.extra_info |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "excluded": wrong}
    benchmark.extra_info |= {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}
    benchmark.extra_info["median_s, ratio, peak_MB"] = rows
    with capsys.disabled():
        print(f"\n{size.rows} rows, {share:.0%} supervised, E={size.width}, {head} head")
        for name, (seconds, ratio, memory) in rows.items():
            print(f"  {name:22s}{seconds * 1e3:10.2f} ms{ratio:8.2f}x" + (f"{memory:10.1f} MB" if memory else ""))
        for name, reason in wrong.items():
            print(f"  {name:22s} {reason}")
