"""What a run needs in memory, per GPU and per host, before any weight is loaded.

Parameters are counted on the real model, built on the meta device and frozen as the stage freezes it. The rest is
arithmetic on bf16 training with AdamW under ZeRO-2 or ZeRO-3 (docs/scale.md names each term and what is assumed).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from psa_fast.files import shorten
from psa_fast.planning import activations
from psa_fast.planning.activations import BF16, FP32, Dims, Tuning
from psa_fast.training.config import TrainConfig, read_deepspeed_config

GIB = 2**30
# assumed, not derived: context and loaded kernels, NCCL's channels, what the allocator cannot use of its blocks
CUDA_CONTEXT, NCCL_BUFFERS, FRAGMENTATION = int(0.75 * GIB), int(0.5 * GIB), 0.05
# of a training process and of a worker that decodes images
HOST_PROCESS, HOST_WORKER = 4 * GIB, 1 * GIB

OFFLOAD_CONFIGS = ("ds_configs/zero3_offload.json", "ds_configs/zero3_nvme.json")
# DeepSpeed's defaults for what a JSON leaves out
_ZERO_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "sub_group_size": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_max_live_parameters": 1e9,
}
_SHORTEST_TEXT = 256

MOST = 1_000_000  # GPUs of a node, nodes, images of a row


@dataclass(frozen=True)
class Machine:
    """GPUs of a node, GiB of each, nodes, and GiB of a node's host memory (None: not checked)."""

    gpus: int
    gpu_gb: float
    nodes: int = 1
    host_gb: float | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "nodes"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"--{name} is {shorten(getattr(self, name))}; expected a whole number, 1 to {MOST}")
        for name in ("gpu_gb", "host_gb"):
            size = getattr(self, name)
            if size is not None and not 0 < size < math.inf:  # NaN is neither
                raise ValueError(f"--{name} is {shorten(size)}; expected a size in GiB, more than 0")

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Sizes:
    """Parameters of model, vision tower and what the stage trains, and the widths activations depend on."""

    total: int
    vision: int
    trained: int
    parts: dict[str, int]
    head_trained: bool
    dims: Dims
    tuning: Tuning


@dataclass(frozen=True)
class States:
    """Bytes of one rank's model states: standing on the GPU, extra at the optimizer step, on the host, on NVMe."""

    gpu: dict[str, int]
    gpu_at_step: int
    host: dict[str, int]
    nvme: int


@dataclass
class Estimate:
    """Bytes by part. A GPU's peak is the larger of the two moments, forward with backward and the optimizer step."""

    machine: Machine
    states: dict[str, int]
    step: dict[str, int]
    optimizer: dict[str, int]
    host: dict[str, int]
    nvme: int
    notes: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> int:
        """Bytes of all tensors on one GPU in its larger moment."""
        return sum(self.states.values()) + max(sum(self.step.values()), sum(self.optimizer.values()))

    @property
    def overhead(self) -> int:
        """Bytes of a GPU that hold no tensor."""
        contexts = CUDA_CONTEXT + (NCCL_BUFFERS if self.machine.world_size > 1 else 0)
        return contexts + int(FRAGMENTATION * self.tensors)

    @property
    def gpu_peak(self) -> int:
        """Bytes of one GPU."""
        return self.tensors + self.overhead

    @property
    def host_peak(self) -> int:
        """Bytes of one node's host memory."""
        return sum(self.host.values())

    @property
    def fits_gpu(self) -> bool:
        """Whether the GPU is large enough."""
        return self.gpu_peak <= self.machine.gpu_gb * GIB

    @property
    def fits_host(self) -> bool:
        """Whether the host is, as far as its size was given."""
        return self.machine.host_gb is None or self.host_peak <= self.machine.host_gb * GIB

    @property
    def fits(self) -> bool:
        """Whether both are."""
        return self.fits_gpu and self.fits_host


def measure(config: TrainConfig) -> Sizes:
    """Count the parameters of the stage's model on the meta device; no weight is read or allocated."""
    import torch
    from transformers import AutoModelForImageTextToText

    from psa_fast.models import PsaVLM, get_family
    from psa_fast.planning.architectures import base_config
    from psa_fast.training.stages import part_parameters, prepare

    base = base_config(str(config.model_name_or_path))
    get_family(base).require("plan")
    with torch.device("meta"):
        whole = config.runs_language_model
        vlm = AutoModelForImageTextToText.from_config(base if whole else get_family(base).without_language_layers(base))
        model = PsaVLM.build(
            vlm,
            num_safety_tokens=config.num_safety_tokens,
            num_head_tokens=config.num_head_tokens,
            num_attention_heads=config.num_attention_heads,
            projector_depth=config.projector_depth,
            query=config.query,
            query_window=config.query_window if config.query == "prompt" else 0,
        )
        parts = prepare(model, config)
    counted = {part.name: sum(p.numel() for _, p in part_parameters(model, part) if p.requires_grad) for part in parts}
    lora = config.stage == 2 and config.tune_type_llm == "lora"
    kind = "frozen" if config.stage == 1 else config.tune_type_llm
    return Sizes(
        total=sum(p.numel() for p in model.parameters()),
        vision=sum(p.numel() for p in model.family.module(vlm, "vision").parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        parts=counted,
        head_trained=any(p.requires_grad for p in model.family.module(vlm, "lm_head").parameters()),
        dims=Dims.of(base, model.config),
        tuning=Tuning(kind, config.lora_r, config.lora_dropout) if lora else Tuning(kind),
    )


def model_states(total: int, trained: int, zero: dict[str, Any], world_size: int) -> States:
    """One rank's share of weights, gradients, fp32 master weights and Adam's two moments.

    Frozen parameters have weights only. ZeRO-3 divides everything by the ranks, ZeRO-2 all but the bf16 weights.

    Args:
        total: parameters of the model.
        trained: those with a gradient.
        zero: `zero_optimization` of the DeepSpeed configuration.
        world_size: ranks.

    Raises ValueError for a ZeRO stage other than 2 and 3.
    """
    stage = zero.get("stage", 0)
    if stage not in (2, 3):
        raise ValueError(f"a plan can be made for ZeRO-2 and ZeRO-3, the DeepSpeed configuration says stage {stage}")
    sizes = {name: int(zero.get(name, default)) for name, default in _ZERO_DEFAULTS.items()}
    shard, share = -(-trained // world_size), -(-total // world_size)
    where = {part: zero.get(f"offload_{part}", {}).get("device", "none") for part in ("param", "optimizer")}
    gpu, host, nvme, at_step = {}, {}, 0, 0

    weights = BF16 * (share if stage == 3 else total)
    if where["param"] == "none":
        gpu["weights (bf16)"] = weights
    elif where["param"] == "cpu":
        host["weights (bf16)"] = weights
    else:
        nvme += weights
    adam, gradients = 3 * FP32 * shard, BF16 * shard
    if where["optimizer"] == "none":
        gpu["gradients (bf16)"] = gradients
        gpu["master weights, Adam (fp32)"] = adam
        # widened for one group of parameters after another
        at_step = FP32 * (min(shard, sizes["sub_group_size"]) if stage == 3 else shard)
    else:
        host["gradients (bf16)"] = gradients
        if where["optimizer"] == "cpu":
            host["master weights, Adam, gradients (fp32)"] = adam + FP32 * shard
        else:
            nvme += adam + FP32 * shard
            buffers = int(zero["offload_optimizer"].get("buffer_count", 4))
            host["NVMe swap buffers"] = buffers * FP32 * min(shard, sizes["sub_group_size"])

    bucket = BF16 * sizes["reduce_bucket_size"]
    if stage == 3:
        gpu["reduce bucket"] = bucket
        # one rank that holds its weights on the GPU has nothing to gather
        if world_size > 1 or where["param"] != "none":
            live = sizes["stage3_max_live_parameters"] + sizes["stage3_prefetch_bucket_size"]
            gpu["gathered layers"] = BF16 * min(total, live)
    else:
        gpu["reduce buckets"] = bucket * (2 if zero.get("overlap_comm", "auto") else 1)
    return States(gpu, at_step, host, nvme)


def estimate(config: TrainConfig, sizes: Sizes, machine: Machine, images_per_row: int = 1) -> Estimate:
    """All parts for one configuration; every row is taken to be `max_length` long and to hold `images_per_row` images.

    Under a token budget every micro-batch is taken to be full.

    Raises ValueError when the batch does not divide over the ranks or the ZeRO stage is not known.
    """
    from psa_fast.training.engine import accumulation_steps

    config = replace(config)
    accumulation_steps(config, machine.world_size)
    zero = read_deepspeed_config(config.deepspeed_config).get("zero_optimization", {})
    whole = sizes.vision if zero.get("stage") == 3 else 0  # vision_tower.keep_whole
    states = model_states(sizes.total - whole, sizes.trained, zero, machine.world_size)
    states.gpu.update({"vision tower (bf16)": BF16 * whole} if whole else {})
    dims, layout = sizes.dims, _layout(config)
    images = config.micro_batch_size * images_per_row
    if config.max_tokens_per_micro_batch is not None and images_per_row:
        # as many as could lie in its tokens
        images = config.max_tokens_per_micro_batch // (config.num_safety_tokens + dims.image_tokens)

    step: dict[str, int] = {}
    if config.runs_language_model:
        step |= activations.language_model(dims, sizes.tuning, layout, config.recompute_every)
        step["LM loss"] = activations.lm_loss(dims, layout.tokens, sizes.head_trained)
    if config.runs_bottleneck:
        step["concept bottleneck"] = activations.bottleneck(dims, images)
    connector_trained = config.stage == 2 and config.tune_type_connector == "full"
    step["vision tower and connector"] = activations.vision(dims, images, connector_trained)

    host = {name: bytes_ * machine.gpus for name, bytes_ in states.host.items()}
    host["processes and workers"] = machine.gpus * (HOST_PROCESS + config.dataloader_num_workers * HOST_WORKER)
    # ZeRO-3 reads the checkpoint on the first rank only, ZeRO-2 on every rank
    host["weights while loading"] = BF16 * sizes.total * (1 if zero.get("stage") == 3 else machine.gpus)
    notes = []
    if config.max_length > dims.positions and config.runs_language_model:
        notes.append(
            f"--max_length {config.max_length}: the base has {dims.positions} positions, so training refuses it"
        )
    placeholders = images_per_row * (config.num_safety_tokens + dims.image_tokens)
    if placeholders >= config.max_length:
        raise ValueError(
            f"--max_length {config.max_length} leaves no room for text: {images_per_row} image(s) take "
            f"{placeholders} tokens"
        )
    return Estimate(machine, states.gpu, step, {"fp32 gradients": states.gpu_at_step}, host, states.nvme, notes)


def _layout(config: TrainConfig) -> activations.Layout:
    """How attention sees a micro-batch; `auto` is taken for SDPA, which needs no less than FlashAttention."""
    length = config.max_length
    tokens = config.max_tokens_per_micro_batch or config.micro_batch_size * length
    if config.attn_implementation == "eager":
        # packed rows are one row to it
        return activations.Layout(tokens, tokens if config.packing else length, "scores")
    masked = config.attn_implementation in ("auto", "sdpa") and not config.packing
    return activations.Layout(tokens, length, "mask" if masked else "nothing")


@dataclass(frozen=True)
class Remedy:
    """Options that would make the run fit."""

    options: dict[str, Any]
    estimate: Estimate

    def flags(self) -> str:
        """As typed on the command line."""
        return " ".join(f"--{name} {value}" for name, value in self.options.items())


def remedies(config: TrainConfig, sizes: Sizes, machine: Machine, images_per_row: int = 1) -> list[Remedy]:
    """Each single option that makes a run fit that does not, the cheapest first; else the first combination that does.

    Empty if even all of them together are not enough.
    """
    single: list[Remedy] = []
    together: dict[str, Any] = {}
    for steps in _ladder(config, sizes, machine, images_per_row):
        for options in steps:
            found = estimate(replace(config, **options), sizes, machine, images_per_row)
            if found.fits:
                single.append(Remedy(options, found))
                break
    if single:
        return single
    for steps in _ladder(config, sizes, machine, images_per_row):
        for options in steps:
            together |= options
            found = estimate(replace(config, **together), sizes, machine, images_per_row)
            if found.fits:
                return [Remedy(together, found)]
    return []


def _ladder(config: TrainConfig, sizes: Sizes, machine: Machine, images_per_row: int) -> Iterator[list[dict[str, Any]]]:
    """Options to try, what costs the least time first, each with the values that save more and more."""
    budget = config.max_tokens_per_micro_batch
    if config.recompute_every != 1 and config.runs_language_model:
        kinds = ["full"] if config.recompute_every == 2 else ["every_2", "full"]
        yield [{"gradient_checkpointing": kind} for kind in kinds]
    if budget is None:
        most = min(config.micro_batch_size, max(1, config.global_batch_size // machine.world_size))
        smaller = [m for m in range(most - 1, 0, -1) if config.global_batch_size % (m * machine.world_size) == 0]
        yield [{"micro_batch_size": m} for m in smaller]
    else:
        yield [{"max_tokens_per_micro_batch": n} for n in _halves(budget, config.max_length)]
    zero = read_deepspeed_config(config.deepspeed_config).get("zero_optimization", {})
    configs = [] if zero.get("stage") == 3 else ["ds_configs/zero3.json"]
    if zero.get("offload_optimizer", {}).get("device", "none") == "none":
        configs += OFFLOAD_CONFIGS
    elif zero["offload_optimizer"]["device"] == "cpu":
        configs += OFFLOAD_CONFIGS[1:]
    yield [{"deepspeed_config": name} for name in configs]
    shortest = images_per_row * (config.num_safety_tokens + sizes.dims.image_tokens) + _SHORTEST_TEXT
    # rows of half the length let a budget be half as large
    yield [
        {"max_length": n} | ({} if budget is None else {"max_tokens_per_micro_batch": n})
        for n in _halves(config.max_length, shortest)
    ]


def _halves(value: int, least: int) -> list[int]:
    """value / 2, / 4 and so on down to `least`."""
    found = []
    while (value := value // 2) >= least:
        found.append(value)
    return found
