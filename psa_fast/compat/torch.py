"""Private names of torch (2.13 and 2.14)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and a device but no data, while torch traces a program.

    An op whose output depends on data has to know. Public are `is_meta` and `torch.compiler.is_compiling()` only, and
    neither is true of a fake tensor outside torch.compile and torch.export (`make_fx`, `opcheck`).
    """
    return isinstance(tensor, FakeTensor)


def graph_is_kept() -> bool:
    """Whether the backward pass that runs now was asked to keep its graph (`retain_graph`), so may run again.

    A gradient saved for one backward may be scaled in place if not: a [V, E] one then exists once. Nothing public tells
    a Function's backward; torch's own compiled functions (AOTAutograd) ask in this way.
    """
    return torch._C._autograd._get_current_graph_task_keep_graph()


def assert_on_device(condition: Tensor, message: str) -> None:
    """Stop the device, not the host, if a bool tensor of one element is False.

    `torch._check` and a plain `assert` would read the value, a synchronisation in every step. There is no public form.
    """
    torch._assert_async(condition, message)


def set_lambda_steps(schedule: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Put a LambdaLR where `step` of its steps lead, with the learning rates of its optimizer.

    Its public way there is that many calls of `step()`: `load_state_dict` takes these very names, as another class's
    state need not have them.
    """
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule.last_epoch, schedule._step_count, schedule._last_lr = step, step + 1, rates
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def end_workers(loader: Any) -> None:
    """End the worker processes of a DataLoader's iterator (`num_workers` above 0) now, busy or not.

    Publicly they end with the last reference to the iterator, which the traceback of an exception keeps, and Python's
    exit waits for workers that ignore SIGTERM.
    """
    try:
        loader._shutdown_workers()
    finally:
        for worker in loader._workers:
            worker.kill()  # one that was busy is alive still: it was terminated only
