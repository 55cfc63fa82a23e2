"""The training loop of both stages: one path for every rank, from records to a finished add-on."""

from __future__ import annotations

import fcntl
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from rich.console import Console

from psa_fast.data import GlobalBatchSampler, PsaDataset, Record, balance, load_records
from psa_fast.data.records import fingerprint
from psa_fast.models import PsaVLM, commit_of, load_base, load_processor
from psa_fast.models.addon import ADAPTER, CHANGED, read_config

from . import checkpoint
from .attention import choose_attention
from .config import TrainConfig
from .engine import build_engine, compute_dtype, init_distributed, resolve_deepspeed_config
from .features import cached_features
from .flops import Meter, StageFlops, shared_matrix_rate
from .language_model import check_liger, prepare_language_model
from .metrics import MetricsLog
from .optimizer_state import check_engine
from .schedule import Schedule, measure_lengths, micro_batches, needs_lengths
from .stages import optimizer_groups, prepare, print_table
from .step import StepReport, train_step
from .vision_tower import keep_whole

HintFor = Callable[[int, int], str | None]
# seconds that a failing run waits for the step before: DeepSpeed has waited for most of it already
_LAST_WAIT = 10.0


def train(config: TrainConfig, hint_for: HintFor | None = None, console: Console | None = None) -> None:
    """Run one stage to its end, or until SIGTERM or Ctrl-C, which save first.

    Args:
        config: resolved options; `model_name_or_path`, `data_path` and `image_folder` name real files.
        hint_for: (type id, level id) -> the policy's hint text, mixed into prompts at `hint_rate`.
        console: where rank 0 prints.

    Raises:
        ValueError: options, records or checkpoints that do not fit, before any training.
        FloatingPointError: a loss that is not finite, naming the step and the rows of the batch.
    """
    rank, world_size = init_distributed()
    console = console or Console()
    console.quiet = rank != 0
    try:
        _run(config, hint_for, console, rank, world_size)
    finally:
        # gloo ranks may abort at exit otherwise
        dist.destroy_process_group()


def _run(config: TrainConfig, hint_for: HintFor | None, console: Console, rank: int, world_size: int) -> None:
    ds_config = resolve_deepspeed_config(config, world_size)
    attention = choose_attention(config) if config.runs_language_model else None
    check_liger(config)
    if config.resume == "auto" and checkpoint.is_finished(config.stage_dir):
        checkpoint.check_finished(config, world_size)
        console.print(f"stage {config.stage} is already finished in {config.stage_dir}")
        return
    resume_from, state = checkpoint.resume(config, world_size, console.print) or (None, None)
    if state is None and config.addon:
        checkpoint.check_addon(config.addon)
    _refuse_used_output_dir(config)
    # before the model, so that a bad record costs seconds
    records = _shared_records(config, rank)
    digest = fingerprint(records)
    if state is not None:
        assert resume_from is not None
        checkpoint.check_records(resume_from, state, config, digest)
    _lock = _claim_output_dir(config, rank, console)  # held as long as this function runs
    rate = shared_matrix_rate(compute_dtype(config))
    model, keep_alive = build_model(config, ds_config, str(resume_from) if resume_from else config.addon, attention)
    parts = prepare(model, config, resuming=state is not None)
    meter = Meter(StageFlops.of(model, config), rate)
    prepare_language_model(model, config)
    processor = load_processor(str(config.model_name_or_path), model.config, commit_of(model.vlm))
    features_of = None
    if config.feature_cache is not None:
        features_of = cached_features(config, model, processor, records, console)
    dataset = PsaDataset(
        records,
        config.image_folder,
        processor,
        hint_for=hint_for,
        hint_rate=config.hint_rate,
        seed=config.seed,
        max_length=config.max_length,
        features_of=features_of,
    )
    sampler = GlobalBatchSampler(len(dataset), config.global_batch_size, seed=config.seed)
    total_steps = config.max_steps or sampler.steps(config.num_train_epochs)
    print_table(model, parts, config.weight_decay, console)
    zero = ds_config["zero_optimization"]["stage"]
    console.print(
        f"stage {config.stage}: {len(dataset)} records, {total_steps} steps of {config.global_batch_size} rows, "
        f"{world_size} rank(s), ZeRO-{zero}, {str(compute_dtype(config)).removeprefix('torch.')}, "
        f"{f'attention {attention}' if attention else 'no language model'}, "
        f"{'packed rows' if config.packing else 'padded rows'}"
    )
    console.print(
        f"matrix rate measured on rank 0: {rate / 1e9:,.0f} GFLOP/s; MFU is a step's share of that on each rank"
    )

    keep_whole(model)
    engine = build_engine(model, optimizer_groups(model, parts, config.weight_decay), config, ds_config, total_steps)
    del keep_alive
    check_engine(engine)
    start = 0
    if state is not None:
        assert resume_from is not None
        checkpoint.restore(engine, resume_from, state)
        start = state["step"]
        console.print(f"resumed from {resume_from} at step {start}")
    else:
        # every rank draws its own dropout from here on; a checkpoint keeps each rank's state
        torch.manual_seed(config.seed + rank)

    length = None
    if needs_lengths(config):
        began = time.perf_counter()
        measure_lengths(dataset, sampler, start, total_steps, rank, world_size)
        length = dataset.length
        console.print(f"{len(dataset.lengths)} row lengths counted in {time.perf_counter() - began:.1f} s")
    log = None
    if rank == 0:
        absent = [] if config.runs_language_model else ["loss_lm"]
        absent += [] if config.runs_bottleneck else ["loss_type", "loss_level"]
        log = MetricsLog(config.stage_dir, total_steps, start, console, f"stage {config.stage}", absent)
    stop = _StopFlag()
    schedule = Schedule(sampler, config, rank, world_size, start, total_steps, length)
    batches = micro_batches(dataset, schedule, config, processor)
    engine.train()
    saved = resume_from
    launched: deque[StepReport] = deque()

    def read(unread: int) -> bool:
        """Log all launched steps but the last `unread`; whether any rank was asked to stop."""
        stopping = False
        while len(launched) > unread:
            row, asked = launched[0].read()
            launched.popleft()
            stopping |= asked
            if log:
                log.write(row)
        return stopping

    try:
        for step in range(start + 1, total_steps + 1):
            launched.append(train_step(engine, batches, config, meter, step, lambda: bool(stop.requested)))
            due = step == total_steps or bool(config.save_steps and step % config.save_steps == 0)
            # the device works on one step while the host reads the one before; what is saved has been read
            stopping = read(0 if due else 1)
            if stopping:
                read(0)
            if due or stopping:
                saved = checkpoint.save_checkpoint(engine, config, step, total_steps, digest)
            if stopping and step < total_steps:
                console.print(f"{stop.requested or 'stopped'}: saved {saved}; continue with --resume auto")
                return
    except Exception:  # a second Ctrl-C waits for nothing
        if log:
            _log_unread(log, launched, console)
        raise
    finally:
        stop.restore()
        try:
            batches.close()
        finally:
            if log:
                log.close()
    if rank == 0:
        assert saved is not None
        checkpoint.finish(config, saved)
    dist.barrier()
    console.print(f"stage {config.stage} finished: {config.stage_dir}")


def _log_unread(log: MetricsLog, launched: Iterable[StepReport], console: Console) -> None:
    """Log the steps that were done when the run failed, up to one whose loss is not finite."""
    try:
        for report in launched:
            row = report.read_alone(limit=_LAST_WAIT)
            if row is None:
                return
            log.write(row)
    except Exception as error:  # said, not raised: it must not take the place of the failure
        console.print(f"the last step's figures are lost: {error}")


def build_model(
    config: TrainConfig, ds_config: dict, addon: str | None, attention: str | None = None
) -> tuple[PsaVLM, Any]:
    """The PSA model on its base, from an add-on or new. The second value must live until the engine is built."""
    from transformers.integrations import HfDeepSpeedConfig

    assert config.model_name_or_path is not None  # parse_args saw to it
    keep_alive = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None
    overrides: dict[str, Any] = {
        "num_safety_tokens": config.num_safety_tokens,
        "num_head_tokens": config.num_head_tokens,
        "num_attention_heads": config.num_attention_heads,
        "query": config.query,
    }
    if addon and not config.runs_language_model:
        changes = [name for name in (ADAPTER, CHANGED) if (Path(addon) / name).exists()]
        if changes:
            raise ValueError(
                f"--stage1_objective concept does not load the language model's layers, so it cannot start from "
                f"{addon}, which changes them ({', '.join(changes)})"
            )
    base = config.model_name_or_path
    revision = read_config(addon).revision_of(base) if addon else None
    try:
        vlm = load_base(base, compute_dtype(config), attention, config.runs_language_model, revision)
    except OSError as error:  # neither a folder here nor a name that the hub can be asked for
        raise ValueError(f"--model_name_or_path {base}: {str(error).splitlines()[0]}") from error
    # whatever the base drew while it was loaded: every objective starts from the same safety modules
    torch.manual_seed(config.seed)
    model = PsaVLM.from_pretrained(vlm, addon) if addon else PsaVLM.build(vlm, **overrides)
    if addon:
        differing = [
            f"{k} {getattr(model.config, k)!r} != {v!r}" for k, v in overrides.items() if getattr(model.config, k) != v
        ]
        if differing:
            raise ValueError(f"{addon}: the add-on was built with other options ({', '.join(differing)})")
    return model, keep_alive


def _shared_records(config: TrainConfig, rank: int) -> list[Record]:
    """Rank 0's records on every rank: it alone looks at every pixel, so it alone knows what `skip` drops."""
    message: list[Any] = [None, None]
    if rank == 0:
        try:
            records = load_records(
                str(config.data_path),
                config.image_folder,
                on_bad_sample="skip" if config.on_bad_sample == "skip" else "error",
            )
            if config.clean_samples is not None:
                records = balance(records, clean_samples=config.clean_samples, seed=config.seed)
            message[0] = records
        except ValueError as error:
            message[1] = str(error)
    dist.broadcast_object_list(message)
    if message[1] is not None:
        raise ValueError(message[1])
    return message[0]


def _refuse_used_output_dir(config: TrainConfig) -> None:
    """Refuse to mix two runs in one folder."""
    used = config.stage_dir.exists() and any(config.stage_dir.iterdir())
    dist.barrier()
    if used and config.resume == "none" and not config.overwrite_output_dir:
        raise ValueError(
            f"{config.stage_dir} holds an earlier run; --resume auto continues it, --overwrite_output_dir deletes it, "
            f"another --output_dir leaves it alone"
        )


def _claim_output_dir(config: TrainConfig, rank: int, console: Console) -> TextIO | None:
    """Make the folder and keep other runs out of it for as long as the returned file, rank 0's, stays open.

    An earlier run that may be overwritten goes only now, after records and options were read.
    """
    lock: TextIO | None = None
    message: list[str | None] = [None]
    if rank == 0:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        lock = (Path(config.output_dir) / f".stage{config.stage}.lock").open("w")
        try:
            # the kernel lets go of it however the run ends
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message[0] = f"another run is under way in {config.stage_dir}; give this one an --output_dir of its own"
        except OSError as error:  # some network file systems have no locks
            console.print(f"{lock.name} cannot be locked ({error.strerror}): see to it that no other run writes here")
        if message[0] is None:
            if config.overwrite_output_dir and config.stage_dir.exists():
                shutil.rmtree(config.stage_dir)
            config.stage_dir.mkdir(parents=True, exist_ok=True)
    dist.broadcast_object_list(message)
    if message[0] is not None:
        raise ValueError(message[0])
    if not config.stage_dir.is_dir():
        raise ValueError(f"--output_dir {config.output_dir} must be one folder that every node shares")
    return lock


class _StopFlag:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours after a step; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame: Any) -> None:
        self.requested = self.requested or signal.Signals(number).name  # the launcher answers Ctrl-C with SIGTERM
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
