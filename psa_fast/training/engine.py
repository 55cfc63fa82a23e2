"""DeepSpeed set-up: the resolved configuration, the optimizer, the schedule and the engine."""

from __future__ import annotations

import copy
import errno
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from psa_fast.compat.deepspeed import compile_no_shared_memory_reduce
from psa_fast.files import shorten

from .config import TrainConfig, read_deepspeed_config


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """bf16 on GPUs that have it, fp32 elsewhere, unless `--dtype` says otherwise."""
    if config.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]


def accumulation_steps(config: TrainConfig, world_size: int) -> int:
    """Micro-batches per optimizer step and rank; lowers a `micro_batch_size` above the rank's share to that share.

    Under a token budget their number varies and the loop sets the boundaries: DeepSpeed is told one.

    Raises ValueError when the global batch does not divide.
    """
    if config.max_tokens_per_micro_batch is not None:
        if config.global_batch_size % world_size:
            raise ValueError(f"--global_batch_size {config.global_batch_size} is not a multiple of {world_size} ranks")
        return 1
    # more ranks than the recipe's micro-batch foresaw: same objective, smaller passes
    config.micro_batch_size = max(1, min(config.micro_batch_size, config.global_batch_size // world_size))
    per_pass = config.micro_batch_size * world_size
    if config.global_batch_size % per_pass:
        raise ValueError(
            f"--global_batch_size {config.global_batch_size} is not a multiple of --micro_batch_size "
            f"{config.micro_batch_size} x {world_size} ranks"
        )
    return config.global_batch_size // per_pass


def resolve_deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Fill the JSON's "auto" values from the options; a number there that contradicts an option is refused."""
    ds = read_deepspeed_config(config.deepspeed_config)
    on_gpu = torch.cuda.is_available()
    accumulation = accumulation_steps(config, world_size)
    values = {
        "train_micro_batch_size_per_gpu": config.global_batch_size // (accumulation * world_size),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.max_grad_norm,
        "train_batch_size": config.global_batch_size,
    }
    for key, value in values.items():
        if ds.get(key, "auto") not in ("auto", value):
            raise ValueError(
                f"{config.deepspeed_config}: {key} is {shorten(ds[key])}, but the training options say {value}; "
                f'use "auto"'
            )
        ds[key] = value
    if config.clips_each_part:  # DeepSpeed has one norm for all, see clipping.py
        ds["gradient_clipping"] = 0.0
    if ds.get("fp16", {}).get("enabled"):
        raise ValueError(f"{config.deepspeed_config}: fp16 is not supported; use bf16 or fp32 (--dtype)")
    bf16 = ds.setdefault("bf16", {})
    wanted = compute_dtype(config) == torch.bfloat16
    if bf16.get("enabled", "auto") not in ("auto", wanted):
        raise ValueError(f'{config.deepspeed_config}: bf16.enabled contradicts --dtype {config.dtype}; use "auto"')
    bf16["enabled"] = wanted
    # DeepSpeed's own timer would wait for the device twice in every micro-batch
    ds.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    zero = ds.setdefault("zero_optimization", {})
    zero.setdefault("stage", 0)
    # without streams (CPU) there is nothing to overlap
    if zero.get("overlap_comm", "auto") == "auto":
        zero["overlap_comm"] = on_gpu
    for section in ("offload_optimizer", "offload_param"):
        if zero.get(section, {}).get("pin_memory") == "auto":
            zero[section]["pin_memory"] = on_gpu
    return ds


def check_deepspeed_config(ds_config: dict[str, Any], name: str) -> None:
    """Let DeepSpeed read a resolved configuration before a model is loaded; it needs the process group.

    Raises:
        ValueError: naming the file and the key that DeepSpeed refuses, if it tells.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(copy.deepcopy(ds_config))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"--deepspeed_config {name}: {where}: {first['msg']} ({shorten(first['input'])})") from None
    except Exception as error:  # its reader takes types for granted and raises nearly anything
        reason = shorten(str(error).splitlines()[0] if str(error) else "", 160)
        raise ValueError(f"--deepspeed_config {name}: DeepSpeed cannot read it ({reason})") from None


def build_optimizer(groups: list[dict], config: TrainConfig, ds_config: dict[str, Any]) -> torch.optim.Optimizer:
    """torch AdamW; DeepSpeed's CPU Adam where a GPU run offloads its optimizer."""
    betas = (config.adam_beta1, config.adam_beta2)
    if torch.cuda.is_available():
        if ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, lr=config.learning_rate, betas=betas, adamw_mode=True)
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas)


def build_engine(
    model: torch.nn.Module,
    groups: list[dict],
    config: TrainConfig,
    ds_config: dict[str, Any],
    total_steps: int,
    factors: list[Callable[[int], float]] | None = None,
) -> Any:
    """`deepspeed.initialize` with our optimizer and a transformers schedule counted in optimizer steps.

    `factors` are the groups' own schedules instead: optimizer step -> what the learning rate is multiplied with.
    """
    import deepspeed
    from transformers import get_scheduler

    optimizer = build_optimizer(groups, config, ds_config)
    if factors is not None:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    else:
        scheduler = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, total_steps)
    trainable = [p for group in groups for p in group["params"]]
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=trainable, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config
    )
    return engine


def init_distributed() -> tuple[int, int]:
    """Join the process group the launcher described (or a group of one) and return (rank, world size).

    Raises ValueError if the port where the ranks meet is taken.
    """
    import deepspeed
    import torch.distributed as dist

    if "RANK" not in os.environ:
        defaults = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
        }
        os.environ.update(defaults)
    if deepspeed.get_accelerator().device_name() == "cpu":
        compile_no_shared_memory_reduce()
        if "OMP_NUM_THREADS" not in os.environ:
            # ranks that share a machine share its cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_SIZE", "1"))))
    try:
        deepspeed.init_distributed(verbose=False)
    except dist.DistNetworkError as error:  # tried, not asked beforehand: the port may be taken in between
        port = int(os.environ["MASTER_PORT"])
        if not _is_taken(port):
            raise
        raise ValueError(
            f"port {port} is taken, by another run perhaps; "
            f"give the launcher another one: deepspeed --master_port N train.py ..."
        ) from error
    # before any collective: objects travel by way of the current device, which is the first one on every rank
    deepspeed.get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return dist.get_rank(), dist.get_world_size()


def _is_taken(port: int) -> bool:
    """Whether nothing can listen at a port of this machine; the error of torch says so in words only."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
