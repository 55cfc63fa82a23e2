"""Stage 0: a base's vision tower made robust under DeepSpeed, from records to a plain base folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from psa_fast.data import GlobalBatchSampler, PsaDataset
from psa_fast.data.records import fingerprint
from psa_fast.models import PsaVLM, load_base
from psa_fast.models.tower import put_tower, write_base
from psa_fast.taxonomy import IGNORE_INDEX
from psa_fast.training.metrics_log import MetricsLog, Row
from psa_fast.training.micro_batches import Schedule, micro_batches

from . import checkpoint
from .adversarial import PixelScale, random_start
from .config import TrainConfig
from .engine import build_engine, check_deepspeed_config, compute_dtype, init_distributed, resolve_deepspeed_config
from .integrity import STATE, describe, read_state_file, sync_one, write_state_file
from .optimizer_state import check_engine
from .output_folder import claim, refuse_used
from .preflight import check_family, naming_base, prepare_dataset, read_processor
from .ranks import alike, from_rank_0
from .reporters import check_reporters, open_reporters
from .robust_tower import RobustTower, picture_targets, tower_weights
from .run_setup import Resume, begin
from .stop_flag import StopFlag

FIELDS = (
    "step", "phase", "loss", "loss_concept", "distance_clean", "distance_attacked", "grad_norm", "lr", "pictures",
    "seconds", "pictures_per_s",
)  # fmt: skip
LOSSES = ("loss", "loss_concept", "distance_clean", "distance_attacked")


def train_tower(config: TrainConfig, console: Console) -> None:
    """Run stage 0 to its end, or until SIGTERM or Ctrl-C, which save first.

    Args:
        config: resolved options; `model_name_or_path`, `data_path` and `image_folder` name real files.
        console: where rank 0 prints.

    Raises:
        ValueError: options, records or checkpoints that do not fit, before any training.
        FloatingPointError: a loss that is not finite, naming the step.
    """
    rank, world_size = init_distributed()
    console.quiet = rank != 0
    try:
        _run(config, console, rank, world_size)
    finally:
        dist.destroy_process_group()


def _run(config: TrainConfig, console: Console, rank: int, world_size: int) -> None:
    run = _set_up(config, console, rank, world_size)
    if run is None:
        return
    total_steps, log = run.total_steps, None
    if rank == 0:
        reporters = open_reporters(config, run.start)
        log = MetricsLog(
            config.stage_dir, total_steps, run.start, console, "stage 0", FIELDS, LOSSES, _speed, reporters
        )
    stop = StopFlag()
    schedule = Schedule(run.sampler, config, rank, world_size, run.start, total_steps)
    batches = micro_batches(run.dataset, schedule, config, run.processor)
    run.engine.train()
    with ExitStack() as ending:  # the last comes first, and each whatever another raises
        if log:
            ending.callback(log.close)
        ending.callback(batches.close)
        ending.callback(stop.restore)
        last = _steps(run, config, console, batches, log, stop)
    if last is None:
        return
    from_rank_0(lambda: finish(config, last))
    console.print(f"stage 0 finished: {config.robust_base} is a base like the one it came from; stages 1 and 2 take it "
                  f"as --model_name_or_path", soft_wrap=True)  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """Stage 0 ready for the step after `start`; `lock` keeps other runs out of the folder as long as it lives."""

    dataset: PsaDataset
    processor: Any
    digest: str
    sampler: GlobalBatchSampler
    total_steps: int
    engine: Any
    start: int
    saved: Path | None
    lock: list[TextIO]


def _set_up(config: TrainConfig, console: Console, rank: int, world_size: int) -> _Run | None:
    """Everything up to the first step; None if the stage is finished already. A collective."""
    check_reporters(config)
    with alike():
        ds_config = resolve_deepspeed_config(config, world_size)
        check_deepspeed_config(ds_config, config.deepspeed_config)
        _require_folder(config)
        if config.resume == "auto" and checkpoint.is_finished(config.stage_dir):
            checkpoint.check_finished(config, world_size)
            console.print(f"stage 0 is already finished: {config.robust_base}")
            return None
        found = checkpoint.resume(config, world_size, console.print)
        resume = Resume(*found) if found else None
        refuse_used(config)
        _refuse_result(config)
        check_family(config, None)
        processor = read_processor(config, None)
        scale = PixelScale.of(processor.image_processor)
    dataset = _with_pictures(prepare_dataset(config, processor, None, console), config)
    digest = fingerprint(dataset.records)
    total_steps = config.feature_steps + config.concept_steps
    sampler = GlobalBatchSampler(len(dataset), config.global_batch_size, seed=config.seed)
    if resume is not None:
        with alike():
            checkpoint.check_records(resume.folder, resume.state, config, digest)
    if config.overwrite_output_dir:
        from_rank_0(lambda: _clear_result(config))
    lock = claim(config, console)
    with alike():
        model = build_model(config, scale)
        if resume is not None:
            model.load_addon(resume.folder)
    groups, factors = _groups(model, config)
    _print_run(config, console, len(dataset), groups, world_size)
    engine = build_engine(model, groups, config, ds_config, total_steps, factors)
    check_engine(engine)
    start = begin(engine, config, resume, rank, console)
    saved = resume.folder if resume else None
    return _Run(dataset, processor, digest, sampler, total_steps, engine, start, saved, lock)


def _require_folder(config: TrainConfig) -> None:
    if not Path(str(config.model_name_or_path)).is_dir():
        raise ValueError(
            f"--stage 0 writes a base with every file of the one it starts from, so --model_name_or_path must be a "
            f"folder; {config.model_name_or_path} is none (download it first)"
        )


def _print_run(config: TrainConfig, console: Console, rows: int, groups: list[dict], world_size: int) -> None:
    trained = {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}
    console.print(
        f"stage 0: {rows} records with pictures, {config.feature_steps} steps on features, then "
        f"{config.concept_steps} on features and concepts, of {config.global_batch_size} rows, {world_size} rank(s), "
        f"trained: {', '.join(f'{name} {count:,}' for name, count in trained.items())} parameters",
        soft_wrap=True,
    )


def _steps(
    run: _Run,
    config: TrainConfig,
    console: Console,
    batches: Iterator[list[dict]],
    log: MetricsLog | None,
    stop: StopFlag,
) -> Path | None:
    """Take the steps that are left, saving as they go: the last checkpoint, or None if the run was asked to stop."""
    saved, total_steps = run.saved, run.total_steps
    for step in range(run.start + 1, total_steps + 1):
        row, stopping = train_step(run.engine, batches, config, step, lambda: bool(stop.requested))
        if log:
            log.write(row)
        due = step == total_steps or bool(config.save_steps and step % config.save_steps == 0)
        if due or stopping:
            with alike():
                saved = checkpoint.save_checkpoint(run.engine, config, step, total_steps, run.digest)
        if stopping and step < total_steps:
            console.print(f"{stop.requested or 'stopped'}: saved {saved}; continue with --resume auto")
            return None
    assert saved is not None
    return saved


def train_step(
    engine: Any, batches: Iterator[list[dict]], config: TrainConfig, step: int, stopped: Callable[[], bool]
) -> tuple[Row, bool]:
    """One optimizer step over all ranks: its metrics row (`FIELDS`), and whether any rank was asked to stop.

    Raises:
        FloatingPointError: a loss that is not finite on any rank, on all of them, before the weights are saved.
    """
    began, device, world_size = time.perf_counter(), engine.device, dist.get_world_size()
    concept = step > config.feature_steps
    micros = next(batches)
    targets = [picture_targets(batch) for batch in micros]
    known = sum((labels != IGNORE_INDEX).sum(0) for labels in targets)
    assert isinstance(known, Tensor)
    counts = torch.tensor([sum(map(len, targets)), *known.tolist()], dtype=torch.float64, device=device)
    dist.all_reduce(counts)
    # the engine averages gradients over ranks, so each rank divides by the per-rank share of the global count
    shares = (counts.clamp(min=1) / world_size).float()
    found = torch.zeros(5, dtype=torch.float64, device=device)
    rate = engine.get_lr()[0]
    for index, (batch, labels) in enumerate(zip(micros, targets, strict=True)):
        engine.set_gradient_accumulation_boundary(index == len(micros) - 1)
        loss, sums = engine(
            batch["pixel_values"].to(device),
            random_start(batch, config.seed, step).to(device),
            labels.to(device),
            shares,
            concept,
        )
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        found[0] += loss.detach().double() / world_size
        found[1:4] += sums / counts[0]
    found[4] = float(stopped())
    dist.all_reduce(found)
    values = found.tolist()
    if not all(torch.isfinite(found).tolist()):
        with alike():
            raise FloatingPointError(f"the loss is not finite at step {step} of stage 0")
    seconds = time.perf_counter() - began
    norm = engine.get_global_grad_norm()
    row: Mapping[str, Any] = {
        "step": step,
        "phase": 1 if concept else 0,
        "loss": values[0],
        "loss_concept": values[3] if concept else None,
        "distance_clean": values[1],
        "distance_attacked": values[2],
        "grad_norm": None if norm is None else float(norm),
        "lr": rate,
        "pictures": int(counts[0]),
        "seconds": seconds,
        "pictures_per_s": int(counts[0]) / seconds,
    }
    return row, bool(values[4])


def build_model(config: TrainConfig, scale: PixelScale) -> RobustTower:
    """The base's tower with a new concept head, in the run's dtype; the language model's layers are not read."""
    with naming_base(config):
        vlm = load_base(str(config.model_name_or_path), compute_dtype(config), None, language_layers=False)
    torch.manual_seed(config.seed)
    psa = PsaVLM.build(
        vlm,
        num_safety_tokens=0,
        num_head_tokens=config.num_head_tokens,
        num_attention_heads=config.num_attention_heads,
        projector_depth=config.projector_depth,
    )
    return RobustTower(
        psa,
        scale,
        eps=config.adversarial_eps,
        steps=config.adversarial_steps,
        clean_weight=config.feature_clean_weight,
        tie=config.concept_tie,
        trains_head=config.concept_steps > 0,
    )


def finish(config: TrainConfig, last: Path) -> None:
    """Write the result, a plain base with the last checkpoint's tower; the run's `trainer_state.json` comes last.

    Raises:
        ValueError: the folder is already there.
        OSError: it cannot be written; `--resume auto` tries again.
    """
    base = str(config.model_name_or_path)
    with naming_base(config):
        vlm = load_base(base, None)
    put_tower(vlm, tower_weights(last))
    write_base(vlm, base, config.robust_base)
    unfinished = config.stage_dir / f".{STATE}.tmp"
    files = {"files": {}, "base": describe(config.robust_base)}
    write_state_file(unfinished, read_state_file(last) | {"finished": True} | files)
    sync_one(unfinished)
    unfinished.replace(config.stage_dir / STATE)
    sync_one(config.stage_dir)


def _refuse_result(config: TrainConfig) -> None:
    """Refuse to start where the result could not be written."""
    if config.robust_base.exists() and not (config.overwrite_output_dir and checkpoint.is_finished(config.stage_dir)):
        raise ValueError(
            f"{config.robust_base} is already there and this run would write it: delete it, or give another "
            f"--output_dir"
        )


def _clear_result(config: TrainConfig) -> None:
    """Delete the base that a finished run wrote, if nothing else lies in its folder."""
    if not config.robust_base.exists():
        return
    written = read_state_file(config.stage_dir).get("base", {})
    files = sorted(p for p in config.robust_base.rglob("*") if p.is_file())
    strange = [path for path in files if path.relative_to(config.robust_base).as_posix() not in written]
    if strange:
        raise ValueError(f"{strange[0]} was not written by stage 0, so --overwrite_output_dir deletes nothing there")
    for path in files:
        path.unlink()
    config.robust_base.rmdir()


def _with_pictures(dataset: PsaDataset, config: TrainConfig) -> PsaDataset:
    """The rows that have a picture. The others hold nothing to train on."""
    kept = [index for index, record in enumerate(dataset.records) if record.images]
    with alike():
        if not kept:
            raise ValueError(
                f"--data_path {config.data_path}: no row has a picture, and stage 0 trains on nothing else"
            )
    return dataset.subset(kept)


def _groups(model: RobustTower, config: TrainConfig) -> tuple[list[dict], list[Callable[[int], float]]]:
    """Optimizer groups and their schedules. Each phase warms up and decays by itself."""
    features, concept = (_schedule(config, steps) for steps in (config.feature_steps, config.concept_steps))

    def factor(step: int) -> float:
        return features(step) if step < config.feature_steps else concept(step - config.feature_steps)

    rates = {"vision tower": config.learning_rate, "concept head": config.concept_head_learning_rate}
    groups: list[dict] = []
    factors: list[Callable[[int], float]] = []
    for name, module in (("vision tower", model.tower), ("concept head", model.bottleneck)):
        params = [p for p in module.parameters() if p.requires_grad]
        if params:
            groups.append({"params": params, "lr": rates[name], "weight_decay": 0.0, "name": name})
            factors.append(factor)
    return groups, factors


def _schedule(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """transformers' schedule as a factor of the learning rate."""
    from transformers import get_scheduler

    nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler: Any = get_scheduler(config.lr_scheduler_type, nothing, config.warmup_steps, max(steps, 1))
    return scheduler.lr_lambdas[0]


def _speed(row: Row) -> str:
    return f"{row['pictures_per_s'] or 0.0:.1f} pictures/s"
