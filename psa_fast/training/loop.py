"""The training loop of both stages: one path for every rank, from records to a finished add-on."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from psa_fast.data import GlobalBatchSampler
from psa_fast.data.records import fingerprint
from psa_fast.models import PsaVLM, load_base
from psa_fast.models.addon import ADAPTER, CHANGED, check_files
from psa_fast.models.packing import SDPA_BY_SAMPLE
from psa_fast.training.attention_backend import choose_attention
from psa_fast.training.metrics_log import MetricsLog
from psa_fast.training.micro_batches import Schedule, micro_batches, needs_lengths
from psa_fast.training.recompute import check_liger, prepare_language_model

from . import checkpoint
from .adversarial import ConceptAttack, PixelScale
from .config import TrainConfig, check_warmup, warmup_is_too_long
from .engine import build_engine, check_deepspeed_config, compute_dtype, init_distributed, resolve_deepspeed_config
from .features import cached_features
from .flops import Meter, StageFlops, shared_matrix_rate
from .optimizer_state import check_engine
from .output_folder import claim, refuse_used
from .preflight import check_positions, commit_for, naming_base, prepare_dataset, read_processor
from .ranks import alike
from .stages import optimizer_groups, prepare, print_table
from .step import StepReport, train_step
from .supervision import unlearnt_readings
from .vision_tower import keep_whole

HintFor = Callable[[int, int], str | None]
# seconds that a failing run waits for the step before: DeepSpeed has waited for most of it already
_LAST_WAIT = 10.0
ATTENTION_IN_WORDS = {SDPA_BY_SAMPLE: "SDPA, one call per row"}


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
    console = console or Console(markup=False, emoji=False)
    console.quiet = rank != 0
    try:
        _run(config, hint_for, console, rank, world_size)
    finally:
        # gloo ranks may abort at exit otherwise
        dist.destroy_process_group()


def _run(config: TrainConfig, hint_for: HintFor | None, console: Console, rank: int, world_size: int) -> None:
    with alike():
        ds_config = resolve_deepspeed_config(config, world_size)
        check_deepspeed_config(ds_config, config.deepspeed_config)
        attention = choose_attention(config) if config.runs_language_model else None
        check_liger(config)
        if config.resume == "auto" and checkpoint.is_finished(config.stage_dir):
            checkpoint.check_finished(config, world_size)
            console.print(f"stage {config.stage} is already finished in {config.stage_dir}")
            return
        resume_from, state = checkpoint.resume(config, world_size, console.print) or (None, None)
        if state is None and config.addon:
            checkpoint.check_addon(config.addon)
        refuse_used(config)
        addon = str(resume_from) if resume_from else config.addon
        commit = commit_for(config, addon)
        check_positions(config, commit)
        processor = read_processor(config, commit)
    # before the model, so that a bad record costs seconds
    dataset = prepare_dataset(config, processor, hint_for, console)
    digest = fingerprint(dataset.records)
    sampler = GlobalBatchSampler(len(dataset), config.global_batch_size, seed=config.seed)
    total_steps = config.max_steps or sampler.steps(config.num_train_epochs)
    with alike():
        if state is not None:
            assert resume_from is not None
            checkpoint.check_records(resume_from, state, config, digest)
        _check_length_of_run(config, total_steps, console)
    _lock = claim(config, console)  # held as long as this function runs
    rate = shared_matrix_rate(compute_dtype(config))
    with alike():
        model, keep_alive = build_model(config, ds_config, addon, attention, commit, unlearnt_readings(dataset.records))
    parts = prepare(model, config, resuming=state is not None)
    meter = Meter(StageFlops.of(model, config), rate)
    prepare_language_model(model, config)
    if config.feature_cache is not None:
        dataset.features_of = cached_features(config, model, processor, dataset.records, console)
    print_table(model, parts, config.weight_decay, console)
    zero = ds_config["zero_optimization"]["stage"]
    console.print(
        f"stage {config.stage}: {len(dataset)} records, {total_steps} steps of {config.global_batch_size} rows, "
        f"{world_size} rank(s), ZeRO-{zero}, {str(compute_dtype(config)).removeprefix('torch.')}, "
        f"{f'attention {ATTENTION_IN_WORDS.get(attention, attention)}' if attention else 'no language model'}, "
        f"{'packed rows' if config.packing else 'padded rows'}"
    )
    console.print(
        f"matrix rate measured on rank 0: {rate / 1e9:,.0f} GFLOP/s, what this device reaches when it does nothing but "
        f"multiply; MFU is the share of it that a step's work makes use of",
        soft_wrap=True,
    )
    console.print(f"curves of the run: tensorboard --logdir {config.stage_dir}", soft_wrap=True)

    keep_whole(model)
    format_1 = state is not None and "format" not in state
    groups = optimizer_groups(model, parts, config.weight_decay, format_1)
    engine = build_engine(model, groups, config, ds_config, total_steps)
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

    length = dataset.length if needs_lengths(config) else None
    adversary = _adversary(config, processor, total_steps)
    log = MetricsLog(config.stage_dir, total_steps, start, console, f"stage {config.stage}") if rank == 0 else None
    stop = StopFlag()
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

    def asked() -> bool:
        return bool(stop.requested)

    try:
        for step in range(start + 1, total_steps + 1):
            launched.append(train_step(engine, batches, config, meter, step, asked, adversary))
            due = step == total_steps or bool(config.save_steps and step % config.save_steps == 0)
            # the device works on one step while the host reads the one before; what is saved has been read
            stopping = read(0 if due else 1)
            if stopping:
                read(0)
            if due or stopping:
                with alike():
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


def _log_unread(log: MetricsLog, launched: Iterable[StepReport], console: Console) -> None:
    """Log the steps that were done when the run failed, up to one whose loss is not finite."""
    try:
        for report in launched:
            row = report.read_alone(limit=_LAST_WAIT)
            if row is None:
                return
            log.write(row)
    except Exception as error:  # printed only: raised, it would take the place of the failure
        console.print(f"the last step's figures are lost: {error}")


def build_model(
    config: TrainConfig,
    ds_config: dict,
    addon: str | None,
    attention: str | None = None,
    commit: str | None = None,
    unlearnt: Mapping[str, bool] | None = None,
) -> tuple[PsaVLM, Any]:
    """The PSA model on its base, from an add-on or new. The second value must live until the engine is built.

    `commit` is that of a base on the hub; None: the add-on's, else the main branch's. `unlearnt` are fields of a new
    add-on's configuration that the records do not teach.
    """
    from transformers.integrations import HfDeepSpeedConfig

    assert config.model_name_or_path is not None  # parse_args saw to it
    keep_alive = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None
    overrides: dict[str, Any] = {
        "num_safety_tokens": config.num_safety_tokens,
        "num_head_tokens": config.num_head_tokens,
        "num_attention_heads": config.num_attention_heads,
        "projector_depth": config.projector_depth,
        "query": config.query,
        "query_window": config.query_window if config.query == "prompt" else 0,
    }
    if addon and not config.runs_language_model:
        changes = [name for name in (ADAPTER, CHANGED) if (Path(addon) / name).exists()]
        if changes:
            raise ValueError(
                f"--stage1_objective concept does not load the language model's layers, so it cannot start from "
                f"{addon}, which changes them ({', '.join(changes)})"
            )
    base = config.model_name_or_path
    # the add-on's files are judged before the base is read
    recorded = check_files(addon).revision_of(base) if addon else None
    revision = commit or recorded
    with naming_base(config):  # neither a folder here nor a name that the hub can be asked for, or a damaged file
        vlm = load_base(base, compute_dtype(config), attention, config.runs_language_model, revision)
    # whatever the base drew while it was loaded: every objective starts from the same safety modules
    torch.manual_seed(config.seed)
    model = PsaVLM.from_pretrained(vlm, addon) if addon else PsaVLM.build(vlm, **{**overrides, **(unlearnt or {})})
    if addon:
        differing = [
            f"{k} {getattr(model.config, k)!r} != {v!r}" for k, v in overrides.items() if getattr(model.config, k) != v
        ]
        if differing:
            raise ValueError(f"{addon}: the add-on was built with other options ({', '.join(differing)})")
    return model, keep_alive


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


class StopFlag:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours after a step; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame: Any) -> None:
        self.requested = self.requested or signal.Signals(number).name  # the launcher answers Ctrl-C with SIGTERM
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def restore(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
