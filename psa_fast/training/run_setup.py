"""What stages 1 and 2 need before their first step, made in one order on every rank and kept as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from psa_fast.data import GlobalBatchSampler, PsaDataset
from psa_fast.data.records import fingerprint
from psa_fast.models.packing import SDPA_BY_SAMPLE
from psa_fast.training.attention_backend import choose_attention, fit_family
from psa_fast.training.recompute import check_liger, prepare_language_model

from . import checkpoint
from .adversarial import ConceptAttack, PixelScale
from .best import Best
from .config import TrainConfig, check_warmup, warmup_is_too_long
from .engine import build_engine, check_deepspeed_config, compute_dtype, resolve_deepspeed_config
from .features import cached_features
from .flops import Meter, StageFlops, shared_matrix_rate
from .model_building import build_model
from .optimizer_state import check_engine
from .output_folder import claim, refuse_used
from .preflight import check_family, check_positions, commit_for, prepare_dataset, read_processor
from .ranks import alike
from .reporters import BOARD, check_reporters
from .stages import optimizer_groups, prepare, print_table
from .supervision import unlearnt_readings
from .validation import Validation, check_validation, overlap_warning
from .vision_tower import keep_whole

HintFor = Callable[[int, int], "str | None"]
ATTENTION_IN_WORDS = {SDPA_BY_SAMPLE: "SDPA, one call per row"}


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from: its folder and its `trainer_state.json`."""

    folder: Path
    state: dict[str, Any]


@dataclass(frozen=True)
class Checked:
    """What was found out from options and files, before records or weights are read.

    `attention` is None where no language model runs, `addon` the folder that weights come from, `commit` the base's.
    """

    ds_config: dict[str, Any]
    attention: str | None
    resume: Resume | None
    addon: str | None
    commit: str | None
    processor: Any


@dataclass(frozen=True)
class Records:
    """The rows to train on, their fingerprint, their order, and the optimizer steps of the run."""

    dataset: PsaDataset
    digest: str
    sampler: GlobalBatchSampler
    total_steps: int


@dataclass(frozen=True)
class Run:
    """A run that is ready for the step after `start`; `saved` is the checkpoint it goes on from.

    `claimed` keeps other runs out of the folder for as long as this value lives.
    """

    config: TrainConfig
    console: Console
    rank: int
    world_size: int
    processor: Any
    records: Records
    engine: Any
    meter: Meter
    adversary: ConceptAttack | None
    validation: Validation | None
    best: Best | None
    start: int
    saved: Path | None
    claimed: list[TextIO]


def set_up(
    config: TrainConfig,
    hint_for: HintFor | None,
    validation: Validation | None,
    console: Console,
    rank: int,
    world_size: int,
) -> Run | None:
    """Everything up to the first step; None if the stage is finished already. A collective.

    Raises:
        ValueError: options, records or checkpoints that do not fit.
    """
    check_reporters(config)
    with alike():
        checked = _check(config, validation, world_size, console)
    if checked is None:
        return None
    # before the model, so that a bad record costs seconds
    records = _read_records(config, checked, hint_for, console)
    if validation is not None and (warning := overlap_warning(config, validation, records.dataset.records)):
        console.print(warning, soft_wrap=True)
    claimed = claim(config, console)
    best = None
    if config.keep_best is not None and validation is not None:
        best = Best(config.keep_best, config, validation.digest)
    rate = shared_matrix_rate(compute_dtype(config))
    engine, meter = _build(config, checked, records, rate, console, world_size)
    start = begin(engine, config, checked.resume, rank, console)
    return Run(
        config=config,
        console=console,
        rank=rank,
        world_size=world_size,
        processor=checked.processor,
        records=records,
        engine=engine,
        meter=meter,
        adversary=_adversary(config, checked.processor, records.total_steps),
        validation=validation,
        best=best,
        start=start,
        saved=checked.resume.folder if checked.resume else None,
        claimed=claimed,
    )


def _check(config: TrainConfig, validation: Validation | None, world_size: int, console: Console) -> Checked | None:
    ds_config = resolve_deepspeed_config(config, world_size)
    check_deepspeed_config(ds_config, config.deepspeed_config)
    attention = choose_attention(config) if config.runs_language_model else None
    check_liger(config)
    if config.resume == "auto" and checkpoint.is_finished(config.stage_dir):
        checkpoint.check_finished(config, world_size)
        console.print(f"stage {config.stage} is already finished in {config.stage_dir}")
        return None
    found = checkpoint.resume(config, world_size, console.print)
    resume = Resume(*found) if found else None
    if resume is None and config.addon:
        checkpoint.check_addon(config.addon)
    refuse_used(config)
    addon = str(resume.folder) if resume else config.addon
    commit = commit_for(config, addon)
    check_positions(config, commit)
    family = check_family(config, commit)
    attention = attention and fit_family(attention, config, family)
    processor = read_processor(config, commit)
    if validation is not None:
        check_validation(config, validation, processor, commit)
    return Checked(ds_config, attention, resume, addon, commit, processor)


def _read_records(config: TrainConfig, checked: Checked, hint_for: HintFor | None, console: Console) -> Records:
    dataset = prepare_dataset(config, checked.processor, hint_for, console)
    digest = fingerprint(dataset.records)
    sampler = GlobalBatchSampler(len(dataset), config.global_batch_size, seed=config.seed)
    total_steps = config.max_steps or sampler.steps(config.num_train_epochs)
    with alike():
        if checked.resume is not None:
            checkpoint.check_records(checked.resume.folder, checked.resume.state, config, digest)
        _check_length_of_run(config, total_steps, console)
    return Records(dataset, digest, sampler, total_steps)


def _build(
    config: TrainConfig, checked: Checked, records: Records, rate: float, console: Console, world_size: int
) -> tuple[Any, Meter]:
    """The model with its trained parts in DeepSpeed's engine, and what counts a step's FLOPs."""
    ds_config, dataset, resume = checked.ds_config, records.dataset, checked.resume
    with alike():
        model, keep_alive = build_model(
            config, ds_config, checked.addon, checked.attention, checked.commit, unlearnt_readings(dataset.records)
        )
    parts = prepare(model, config, resuming=resume is not None)
    meter = Meter(StageFlops.of(model, config) if "MFU" in model.family.works else None, rate)
    prepare_language_model(model, config)
    if config.feature_cache is not None:
        dataset.features_of = cached_features(config, model, checked.processor, dataset.records, console)
    print_table(model, parts, config.weight_decay, console)
    _print_run(config, checked, records, meter, console, world_size)
    keep_whole(model)
    format_1 = resume is not None and "format" not in resume.state
    groups = optimizer_groups(model, parts, config.weight_decay, format_1)
    engine = build_engine(model, groups, config, ds_config, records.total_steps)
    del keep_alive
    check_engine(engine)
    return engine, meter


def _print_run(
    config: TrainConfig, checked: Checked, records: Records, meter: Meter, console: Console, world_size: int
) -> None:
    attention = checked.attention
    console.print(
        f"stage {config.stage}: {len(records.dataset)} records, {records.total_steps} steps of "
        f"{config.global_batch_size} rows, {world_size} rank(s), "
        f"ZeRO-{checked.ds_config['zero_optimization']['stage']}, "
        f"{str(compute_dtype(config)).removeprefix('torch.')}, "
        f"{f'attention {ATTENTION_IN_WORDS.get(attention, attention)}' if attention else 'no language model'}, "
        f"{'packed rows' if config.packing else 'padded rows'}"
    )
    share = "MFU is the share of it that a step's work makes use of"
    if meter.flops is None:
        share = "MFU is left out, as the FLOPs of a step are not known for this base"
    console.print(
        f"matrix rate measured on rank 0: {meter.rate / 1e9:,.0f} GFLOP/s, what this device reaches when it does "
        f"nothing but multiply; {share}",
        soft_wrap=True,
    )
    if BOARD in config.reporters:
        console.print(f"curves of the run: tensorboard --logdir {config.stage_dir}", soft_wrap=True)


def begin(engine: Any, config: TrainConfig, resume: Resume | None, rank: int, console: Console) -> int:
    """Restore a checkpoint's state, or seed a new run; the number of steps already taken."""
    if resume is None:
        # every rank draws its own dropout from here on; a checkpoint keeps each rank's state
        torch.manual_seed(config.seed + rank)
        return 0
    checkpoint.restore(engine, resume.folder, resume.state)
    console.print(f"resumed from {resume.folder} at step {resume.state['step']}")
    return resume.state["step"]


def _adversary(config: TrainConfig, processor: Any, total_steps: int) -> ConceptAttack | None:
    """Stage 1's adversarial term, if the run has one.

    Raises:
        ValueError: the processor's pixels have no known scale.
    """
    if config.stage != 1 or config.adversarial_weight == 0:
        return None
    with alike():
        scale = PixelScale.of(processor.image_processor)
    first = int(config.adversarial_start * total_steps) + 1
    return ConceptAttack(
        config.adversarial_weight,
        config.adversarial_eps,
        config.adversarial_steps,
        first,
        config.seed,
        scale,
        config.label_smoothing,
    )


def _check_length_of_run(config: TrainConfig, total_steps: int, console: Console) -> None:
    """Refuse a warm-up that outlasts the run; where the command line cut the run short, say so and go on."""
    if config.max_steps is None:
        check_warmup(config, total_steps)
    elif warmup_is_too_long(config, total_steps):
        console.print(
            f"warning: {config.warmup_steps} warm-up steps outlast the run of {total_steps}: the learning rates are "
            f"not reached; --warmup_steps changes that",
            soft_wrap=True,
        )
