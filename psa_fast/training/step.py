"""One optimizer step over all ranks. Nothing here waits for the device: what a step computed is read one step later."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from psa_fast.data.labels import CONCEPT_LABELS
from psa_fast.models import PsaOutput
from psa_fast.models.transfer import to_device
from psa_fast.pictures import Pictures
from psa_fast.training.metrics_log import LOSSES, Row

from .adversarial import ConceptAttack
from .clipping import clip_each
from .config import TrainConfig
from .flops import Load, Meter
from .ranks import alike
from .stages import clip_groups

# what StepReport reads back, in this order: sums over all ranks, this rank's losses, the largest of all ranks, the norm
_COUNTS = ("supervised", "typed", "levelled", "tokens", "positions", "samples")
_VALUES = (
    *_COUNTS, "flops", *LOSSES, *(f"own_{name}" for name in LOSSES),
    "stop", "peak_memory_gb", "data_seconds", "grad_norm",
)  # fmt: skip

# what each loss is a mean over
_COUNTED = {"loss_lm": "supervised", "loss_type": "typed", "loss_level": "levelled", "loss_adversarial": "typed"}


def train_step(
    engine: Any,
    batches: Iterator[list[dict]],
    config: TrainConfig,
    meter: Meter,
    step: int,
    stopped: Callable[[], bool],
    adversary: ConceptAttack | None = None,
) -> StepReport:
    """Launch one optimizer step. Losses are means over the *global* batch's supervised tokens and concept rows.

    A loss that is not finite ends the run when the report is read: the caller reads every report before it saves.
    """
    device, world_size = engine.device, dist.get_world_size()
    began, asked = _Moment(device), time.perf_counter()
    micros = next(batches)
    data_seconds = time.perf_counter() - asked
    counts = _counts([Load.of(batch, engine.module.config) for batch in micros], meter, device)
    dist.all_reduce(counts)
    learning_rate = engine.get_lr()[0]  # of this step: the engine's step sets the next one's
    attacked = adversary if adversary is not None and step >= adversary.first_step else None
    # the engine averages gradients over ranks, so each rank divides by the per-rank share of the global count
    passes = _Passes(engine, config, counts[:3].clamp(min=1.0) / world_size)
    own = torch.zeros(len(LOSSES), dtype=torch.float64, device=device)
    for index, batch in enumerate(micros):
        own += passes.losses(batch, step, attacked, last=index == len(micros) - 1)
    norm = passes.norm if config.clips_each_part else engine.get_global_grad_norm()
    means = own / world_size
    dist.all_reduce(means)
    # as late as possible, so that a signal during the step ends the run after it
    largest = to_device([float(stopped()), _peak_memory_gb(device), data_seconds], device, torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    values = torch.cat([counts, means, own, largest, _on_device(norm, device)])
    return StepReport(
        step=step,
        values=_copied(values),
        began=began,
        ended=_Moment(device),
        learning_rate=learning_rate,
        all_devices=0.0 if meter.flops is None else meter.rate * world_size,
        micro_batches=len(micros),
        computed=(*_computed(config), *(("loss_adversarial",) if attacked is not None else ())),
        where=[where for batch in micros for where in batch["where"]],
    )


class _Passes:
    """The forward and backward passes of one step; `norm` is the gradient's where it is clipped part by part.

    Args:
        engine: DeepSpeed's.
        config: of the run.
        shares: fp64 [3], this rank's share of the supervised tokens, typed and levelled rows of the global batch.
    """

    def __init__(self, engine: Any, config: TrainConfig, shares: Tensor) -> None:
        self.engine, self.config, self.shares = engine, config, shares
        self.norm: Any = None
        # without its labels a loss is not computed at all, on every rank alike
        self._skipped = {"where"} | (set() if config.runs_bottleneck else set(CONCEPT_LABELS))
        self._skipped |= set() if config.runs_language_model else {"labels"}

    def losses(self, batch: dict[str, Any], step: int, attacked: ConceptAttack | None, last: bool) -> Tensor:
        """fp64 [len(LOSSES)] of one micro-batch, which has gone forward and backward; the last takes the step."""
        inputs = {
            k: v.to(self.engine.device, non_blocking=True)
            if isinstance(v, Tensor | Pictures) and k != "image_counts"
            else v
            for k, v in batch.items()
            if k not in self._skipped
        }
        out = self._run(inputs, self.config.concept_loss_weight, last and attacked is None)
        losses = [out.loss, out.loss_lm, out.loss_type, out.loss_level, None]
        if attacked is not None:
            extra = self._run(attacked.inputs(self.engine.module, batch, inputs, step), attacked.weight, last).loss
            assert out.loss is not None
            assert extra is not None
            losses[0], losses[-1] = out.loss + extra, extra / attacked.weight
        zero = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        return torch.stack([zero if loss is None else loss.detach().double() for loss in losses])

    def _run(self, inputs: dict[str, Any], weight: float, last: bool) -> PsaOutput:
        """Forward and backward pass, and the optimizer's step after the last of them."""
        # a token budget makes their number vary, so DeepSpeed must not count them itself
        self.engine.set_gradient_accumulation_boundary(last)
        out = self.engine(
            **inputs,
            num_items=self.shares[0],
            num_concept_rows=self.shares[1:].float(),
            concept_loss_weight=weight,
            lm_loss_weight=self.config.lm_loss_weight,
            label_smoothing=self.config.label_smoothing,
        )
        self.engine.backward(out.loss, scale_wrt_gas=False)
        if last and self.config.clips_each_part:
            self.norm = clip_each(clip_groups(self.engine.module), self.config.max_grad_norm).norm()
        self.engine.step()
        return out


@dataclass
class StepReport:
    """A launched step: `values` [len(_VALUES)] on the host, there once `ended` has passed."""

    step: int
    values: Tensor
    began: _Moment
    ended: _Moment
    learning_rate: float
    all_devices: float
    micro_batches: int
    computed: tuple[str, ...]
    where: list[str]

    def read(self) -> tuple[Row, bool]:
        """Wait for the step; its metrics row (`metrics.FIELDS`), and whether any rank was asked to stop.

        All ranks call it at the same point: if the loss is not finite anywhere they exchange their rows.

        Raises:
            FloatingPointError: naming the step and the rows of the ranks whose loss is not finite.
        """
        self.ended.wait()
        found = self._found()
        if not _finite(found):
            bad = [] if all(math.isfinite(found[f"own_{name}"]) for name in LOSSES) else self.where
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, bad)
            rows = ", ".join(where for rank_rows in gathered for where in rank_rows)
            with alike():
                raise FloatingPointError(f"the loss is not finite at step {self.step}; rows of the batch: {rows}")
        return self._row(found), bool(found["stop"])

    def read_alone(self, limit: float) -> Row | None:
        """The metrics row when this rank is about to fail: no collective, and not much of a wait for the device.

        Args:
            limit: seconds. A device that waits for a rank that is gone never comes to the end of its step.

        Returns:
            None if the loss is not finite.

        Raises:
            TimeoutError: the device was not done in time.
        """
        self.ended.wait(limit)
        found = self._found()
        return self._row(found) if _finite(found) else None

    def _found(self) -> dict[str, float]:
        return dict(zip(_VALUES, self.values.tolist(), strict=True))

    def _row(self, found: dict[str, float]) -> Row:
        seconds = self.ended.since(self.began)
        # a mean over nothing is no loss of 0, which would look perfect
        reached = [name for name in self.computed if found[_COUNTED[name]]]
        return {
            "step": self.step,
            "loss": found["loss"] if reached else None,
            **{name: found[name] if name in reached else None for name in LOSSES[1:]},
            "grad_norm": found["grad_norm"],
            "lr": self.learning_rate,
            "micro_batches": self.micro_batches,
            "tokens": int(found["tokens"]),
            "supervised_tokens": int(found["supervised"]),
            "padding_share": 1.0 - found["tokens"] / found["positions"],
            "seconds": seconds,
            "data_seconds": found["data_seconds"],
            "tokens_per_s": found["tokens"] / seconds,
            "samples_per_s": found["samples"] / seconds,
            "mfu": found["flops"] / seconds / self.all_devices if self.all_devices else None,
            "peak_memory_gb": found["peak_memory_gb"],
        }


def _computed(config: TrainConfig) -> tuple[str, ...]:
    """The losses that a run adds up."""
    lm = ("loss_lm",) if config.runs_language_model else ()
    return (*lm, "loss_type", "loss_level") if config.runs_bottleneck else lm


class _Moment:
    """A moment of the device's work: an event in its stream; on a CPU, which has no stream, the clock's time."""

    def __init__(self, device: torch.device) -> None:
        self.time = time.perf_counter()
        self.event: Any = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def wait(self, limit: float | None = None) -> None:
        """Until the device has passed it; TimeoutError if that takes more than `limit` seconds."""
        if self.event is None:
            return
        if limit is None:
            self.event.synchronize()
            return
        end = time.perf_counter() + limit
        while not self.event.query():
            if time.perf_counter() > end:
                raise TimeoutError(f"the device has not finished its step after {limit:g} s")
            time.sleep(0.01)

    def since(self, earlier: _Moment) -> float:
        """Seconds of the device between the two."""
        if self.event is not None:
            return earlier.event.elapsed_time(self.event) / 1e3
        return self.time - earlier.time


def _finite(found: dict[str, float]) -> bool:
    """Whether the losses of all ranks are."""
    return all(math.isfinite(found[name]) for name in LOSSES)


def _counts(loads: list[Load], meter: Meter, device: torch.device) -> Tensor:
    """fp64 [7]: the first values of _VALUES, of this rank's micro-batches."""
    flops = meter.flops
    each = [(*(getattr(load, name) for name in _COUNTS), flops.total(load) if flops else 0) for load in loads]
    return to_device([sum(column) for column in zip(*each, strict=True)], device, torch.float64)


def _on_device(norm: Tensor | float | None, device: torch.device) -> Tensor:
    """fp64 [1]; DeepSpeed's norm is a tensor here or there, and a number after a step it skipped."""
    if isinstance(norm, Tensor):
        return norm.detach().to(device, torch.float64, non_blocking=True).reshape(1)
    return to_device([0.0 if norm is None else norm], device, torch.float64)


def _copied(values: Tensor) -> Tensor:
    """On the host, once the device has come that far."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return host.copy_(values, non_blocking=True)


def _peak_memory_gb(device: torch.device) -> float:
    """GiB this rank has used at most so far: the CUDA allocator's tensors, or on a CPU the resident process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
