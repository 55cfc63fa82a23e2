"""Training options: dataclass defaults <- YAML recipe <- command line, in that order of precedence."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def option(default: Any, help: str, **kwargs: Any) -> Any:
    """A dataclass field with its help text and, for a closed set of values, its `choices`."""
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class TrainConfig:
    """Every option of `train.py`. A recipe sets them under `common:`, `stage1:` and `stage2:`."""

    stage: int = option(
        1, "1 trains the safety modules beside a frozen model, 2 tunes the language model", choices=[1, 2]
    )
    recipe: str = option("sandbox", "name of a shipped recipe or path of a YAML file")

    model_name_or_path: str | None = option(None, "base VLM: a Hugging Face id or folder ('sandbox': the embedded one)")
    addon: str | None = option(
        None, "add-on folder to start from; stage 2 takes OUTPUT_DIR/stage1 unless told otherwise"
    )
    data_path: str | None = option(None, "JSONL records ('sandbox': the embedded world)")
    image_folder: str | None = option(None, "folder that the records' image paths are relative to")
    output_dir: str = option("runs/demo", "stages are written to OUTPUT_DIR/stage1 and OUTPUT_DIR/stage2")
    on_bad_sample: str = option("error", "what a bad record does", choices=["error", "skip"])
    clean_samples: int | None = option(
        None, "at most this many clean records, classes balanced (default: all records as they are)"
    )
    max_length: int = option(4096, "longest row in tokens, image tokens included")

    num_safety_tokens: int = option(64, "safety tokens before each image's tokens in the language model")
    num_head_tokens: int = option(64, "safety tokens before the features in the concept attention")
    num_attention_heads: int = option(8, "heads of the concept attention")
    query: str = option(
        "prompt", "concept query: the prompt's text, or its first position as in the paper", choices=["prompt", "first"]
    )

    stage1_objective: str = option(
        "joint",
        "stage 1: both losses; the concept loss alone, without the language model's layers; the safety tokens alone",
        choices=["joint", "concept", "tokens"],
    )

    feature_cache: str | None = option(
        None, "folder that keeps vision features for --stage1_objective concept (built first, used by any later run)"
    )

    tune_type_llm: str = option("lora", "stage 2: how the language model is tuned", choices=["lora", "full"])
    tune_type_connector: str = option("frozen", "stage 2: the VLM's own projector", choices=["frozen", "full"])
    lora_r: int = option(256, "LoRA rank")
    lora_alpha: int = option(16, "LoRA alpha (the update is scaled by alpha / r)")
    lora_dropout: float = option(0.05, "LoRA dropout")
    hint_rate: float = option(0.0, "share of risky records whose prompt gets the policy's hint")
    policy: str | None = option(None, "policy file the hints come from (default: the shipped one)")

    concept_loss_weight: float = option(
        1.0, "weight of the type and level losses (the paper writes 1, its code uses 10)"
    )
    lm_loss_weight: float = option(1.0, "weight of the language-model loss")
    label_smoothing: float = option(0.0, "label smoothing of the concept losses")

    num_train_epochs: float = option(3.0, "passes over the records, unless max_steps is given")
    max_steps: int | None = option(None, "optimizer steps (overrides num_train_epochs)")
    global_batch_size: int = option(128, "rows per optimizer step over all ranks and accumulation steps")
    micro_batch_size: int = option(8, "rows per rank and forward pass")
    max_tokens_per_micro_batch: int | None = option(
        None,
        "instead of micro_batch_size: as many packed rows per rank and forward pass as fit this many tokens, "
        "max_length or more (default: off)",
    )
    learning_rate: float = option(1e-5, "safety projector, attention and heads in stage 1; language model in stage 2")
    token_learning_rate: float | None = option(None, "the safety tokens of the language model (default: learning_rate)")
    safety_learning_rate: float | None = option(
        None, "stage 2: the concept bottleneck, trained while concept_loss_weight > 0 (default: learning_rate)"
    )
    connector_learning_rate: float | None = option(None, "stage 2: the VLM's own projector (default: learning_rate)")
    lr_scheduler_type: str = option("cosine", "linear, cosine, constant or constant_with_warmup")
    warmup_steps: int = option(20, "steps of linear warm-up")
    weight_decay: float = option(0.0, "AdamW weight decay, on matrices only")
    adam_beta1: float = option(0.9, "AdamW beta 1")
    adam_beta2: float = option(0.999, "AdamW beta 2")
    max_grad_norm: float = option(
        1.0, "gradient clipping (0: off): stage 1 clips bottleneck and tokens each by itself, stage 2 all together"
    )
    packing: bool = option(True, "lay a micro-batch's rows end to end instead of padding them to the longest")
    attn_implementation: str = option(
        "auto",
        "attention of the language model; auto: FlashAttention 3, then 2, then SDPA",
        choices=["auto", "flash_attention_3", "flash_attention_2", "sdpa", "eager"],
    )
    gradient_checkpointing: str = option(
        "none", "decoder layers recomputed in the backward pass: none, full (all) or every_N (one in N)"
    )
    use_liger_kernel: bool = option(False, "Liger's RMSNorm, RoPE and SwiGLU in the language model (CUDA)")

    deepspeed_config: str = option(
        "ds_configs/zero3.json", "DeepSpeed JSON; 'auto' values are filled from these options"
    )
    dtype: str = option(
        "auto", "compute dtype: bf16 on GPUs, fp32 on CPU unless told otherwise", choices=["auto", "fp32", "bf16"]
    )
    seed: int = option(0, "initialisation, sample order, hints")
    dataloader_num_workers: int = option(0, "processes that decode and tokenise ahead")
    save_steps: int = option(500, "optimizer steps between checkpoints (0: only at the end)")
    save_total_limit: int = option(2, "checkpoints kept")
    resume: str = option("none", "'none', 'auto' (newest checkpoint of the output folder) or a checkpoint folder")
    overwrite_output_dir: bool = option(False, "delete an earlier run of this stage first")
    local_rank: int = option(-1, "set by the deepspeed launcher")

    @property
    def runs_bottleneck(self) -> bool:
        """Whether the concept losses are computed at all."""
        return self.concept_loss_weight > 0 and not (self.stage == 1 and self.stage1_objective == "tokens")

    @property
    def runs_language_model(self) -> bool:
        """Whether the language model runs at all; it does but for stage 1's `concept`."""
        return not (self.stage == 1 and self.stage1_objective == "concept")

    @property
    def recompute_every(self) -> int:
        """One decoder layer in how many is recomputed in the backward pass; 0: none. ValueError for no such value."""
        value = self.gradient_checkpointing
        if value in ("none", "full"):
            return int(value == "full")
        if not re.fullmatch("every_([2-9]|[1-9][0-9]+)", value):
            raise ValueError(
                f"--gradient_checkpointing is {value!r}; expected none, full or every_N with N of 2 or more"
            )
        return int(value.removeprefix("every_"))

    @property
    def clips_each_part(self) -> bool:
        """Whether gradients are clipped part by part: stage 1 with both losses, which share no trained parameter."""
        return self.max_grad_norm > 0 and self.stage == 1 and self.stage1_objective == "joint"

    @property
    def stage_dir(self) -> Path:
        """Where this stage's checkpoints, metrics and final add-on go."""
        return Path(self.output_dir) / f"stage{self.stage}"

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values."""
        return dataclasses.asdict(self)


# a resumed run may change these; any other difference would change the trajectory
RESUME_MAY_DIFFER = {
    "output_dir", "save_steps", "save_total_limit", "resume", "overwrite_output_dir", "local_rank",
    "dataloader_num_workers", "micro_batch_size", "max_tokens_per_micro_batch", "gradient_checkpointing", "addon",
    "packing", "attn_implementation", "use_liger_kernel",
}  # fmt: skip

# options without an effect under a stage-1 objective that leaves one of the two losses out
NO_EFFECT = {
    "joint": (),
    "concept": (
        "lm_loss_weight", "token_learning_rate", "gradient_checkpointing", "use_liger_kernel", "attn_implementation",
    ),
    "tokens": ("concept_loss_weight", "label_smoothing"),
}  # fmt: skip

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")

STAGE_2_ONLY = (
    "tune_type_llm", "tune_type_connector", "connector_learning_rate", "safety_learning_rate",
    "lora_r", "lora_alpha", "lora_dropout",
)  # fmt: skip


def find_recipe(name: str) -> Path:
    """Path of a shipped recipe by name, or of a YAML file. Raises ValueError naming the choices."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise ValueError(f"--recipe {name}: no such file")
    shipped = RECIPES / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    choices = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
    raise ValueError(f"--recipe {name}: unknown; shipped recipes are {choices}, or give the path of a .yaml file")


def read_recipe(name: str, stage: int) -> dict[str, Any]:
    """The recipe's options for one stage (`common` overlaid by `stageN`), checked against `TrainConfig`."""
    path = find_recipe(name)
    raw = yaml.safe_load(path.read_text()) or {}
    if not isinstance(raw, dict) or set(raw) - {"description", "common", "stage1", "stage2"}:
        raise ValueError(f"{path}: expected only description, common, stage1 and stage2 at the top level")
    values = {**(raw.get("common") or {}), **(raw.get(f"stage{stage}") or {})}
    types = {f.name: str(f.type) for f in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(values) - set(types) | set(values) & {"stage", "recipe", "local_rank"})
    if unknown:
        raise ValueError(f"{path}: not a training option: {', '.join(unknown)}")
    return {key: _coerce(value, types[key], f"{path}: {key}") for key, value in values.items()}


def _coerce(value: Any, kind: str, where: str) -> Any:
    """YAML value -> option value; YAML reads 1e-5 as a string, so numbers are converted here."""
    if value is None:
        if "None" in kind:
            return None
        raise ValueError(f"{where} has no value")
    base = kind.split("|")[0].strip()
    try:
        if base == "bool":
            if not isinstance(value, bool):
                raise ValueError
            return value
        if base == "int":
            if isinstance(value, bool) or int(value) != float(value):
                raise ValueError
            return int(value)
        if base == "float":
            return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {value!r}, expected {base}") from None
    return str(value)


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    """Resolve defaults, recipe and command line. Raises ValueError for options that do not fit together."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        """HfArgumentParser, which gives a `--no_...` form the help of the option that it turns off."""

        def add_argument(self, *names: str, **kwargs: Any) -> Any:
            if kwargs.get("action") == "store_false":
                kwargs |= {"help": f"the same as --{kwargs['dest']} False", "default": argparse.SUPPRESS}
            return super().add_argument(*names, **kwargs)

    parser = Parser(
        TrainConfig,  # type: ignore[arg-type]
        prog="train.py",
        description="Train PSA-VLM: deepspeed train.py --stage 1, then --stage 2; the sandbox recipe by default.",
        allow_abbrev=False,
    )
    # first pass only to learn which recipe supplies the defaults of the second
    chosen = parser.parse_args(argv)
    parser.set_defaults(**read_recipe(chosen.recipe, chosen.stage))
    given = parser.parse_args(argv)
    config = TrainConfig(**{f.name: getattr(given, f.name) for f in dataclasses.fields(TrainConfig)})
    words = (a.split("=")[0] for a in (sys.argv[1:] if argv is None else argv) if a.startswith("--"))
    typed = {word.lstrip("-").replace("-", "_") for word in words}  # each option has a form with hyphens too
    if "num_train_epochs" in typed and "max_steps" not in typed:
        config.max_steps = None  # the command line beats the recipe's number of steps
    check(config, typed)
    return config


def check(config: TrainConfig, typed: Collection[str] = ()) -> None:
    """Refuse, with one sentence, options that cannot work together. `typed`: option names given on the command line."""
    for f in dataclasses.fields(config):  # the command line's values are checked already, a recipe's are not
        choices = f.metadata.get("choices")
        if choices and getattr(config, f.name) not in choices:
            allowed = ", ".join(map(str, choices))
            raise ValueError(f"--{f.name} is {getattr(config, f.name)!r}; expected one of {allowed}")
    for name in STAGE_2_ONLY:
        if config.stage == 1 and name in typed:
            raise ValueError(f"--{name} only acts in stage 2; stage 1 keeps the whole VLM frozen")
    if config.stage == 2 and "stage1_objective" in typed:
        raise ValueError("--stage1_objective only acts in stage 1")
    for name in NO_EFFECT[config.stage1_objective] if config.stage == 1 else ():
        if name in typed:
            raise ValueError(f"--{name} has no effect with --stage1_objective {config.stage1_objective}")
    if config.feature_cache is not None and config.runs_language_model:
        raise ValueError("--feature_cache needs --stage1_objective concept: elsewhere the tower's share is too small")
    for name in ("model_name_or_path", "data_path"):
        if getattr(config, name) is None:
            raise ValueError(f"--{name} is needed: the recipe {config.recipe!r} does not set it")
    base = str(config.model_name_or_path)
    if base[0] in "/.~" and not Path(base).is_dir():  # anything else may be a name on the hub
        raise ValueError(f"--model_name_or_path {base}: no such folder")
    if config.data_path != "sandbox" and config.image_folder is None:
        raise ValueError("--image_folder is needed with --data_path: image paths in the records are relative to it")
    if config.data_path == "sandbox" and config.image_folder is not None:
        raise ValueError("--image_folder has no effect on the sandbox's own records; give --data_path too")
    if not 0.0 <= config.hint_rate <= 1.0:
        raise ValueError(f"--hint_rate is {config.hint_rate}; it is a share between 0 and 1")
    if config.hint_rate == 0 and "policy" in typed:
        raise ValueError("--policy has no effect in training with --hint_rate 0: it is where the hints come from")
    if config.stage == 1 and config.concept_loss_weight <= 0:
        raise ValueError(
            "--concept_loss_weight must be positive in stage 1; --stage1_objective tokens leaves the concept loss out"
        )
    if config.stage == 1 and config.lm_loss_weight <= 0:
        raise ValueError(
            "--lm_loss_weight must be positive in stage 1; --stage1_objective concept leaves the language loss out"
        )
    if config.stage == 1 and config.stage1_objective == "tokens" and config.num_safety_tokens < 1:
        raise ValueError("--stage1_objective tokens has nothing to train with --num_safety_tokens 0")
    if config.concept_loss_weight < 0 or config.lm_loss_weight < 0:
        raise ValueError("--concept_loss_weight and --lm_loss_weight cannot be negative")
    if config.stage == 2 and config.lm_loss_weight <= 0:
        raise ValueError("--lm_loss_weight must be positive in stage 2: it is what tunes the language model")
    if config.global_batch_size < 1 or config.micro_batch_size < 1:
        raise ValueError("--global_batch_size and --micro_batch_size must be at least 1")
    if config.max_tokens_per_micro_batch is not None:
        _check_token_budget(config, config.max_tokens_per_micro_batch, typed)
    if config.save_total_limit < 1:
        raise ValueError("--save_total_limit must be at least 1: the newest checkpoint is always kept")
    if config.learning_rate <= 0:
        raise ValueError("--learning_rate must be positive")
    if config.lora_r < 1:
        raise ValueError("--lora_r must be at least 1")
    if config.lr_scheduler_type not in SCHEDULERS:
        raise ValueError(
            f"--lr_scheduler_type is {config.lr_scheduler_type!r}; expected one of {', '.join(SCHEDULERS)}"
        )
    if {"num_train_epochs", "max_steps"} <= set(typed):
        raise ValueError("--num_train_epochs and --max_steps exclude each other")
    if config.max_steps is not None and config.max_steps < 1:
        raise ValueError("--max_steps must be at least 1")
    if config.tune_type_llm == "full" and {"lora_r", "lora_alpha", "lora_dropout"} & set(typed):
        raise ValueError("--lora_* has no effect with --tune_type_llm full")
    if config.tune_type_connector == "frozen" and "connector_learning_rate" in typed:
        raise ValueError("--connector_learning_rate has no effect while --tune_type_connector is frozen")
    if config.stage == 2 and config.concept_loss_weight == 0 and "safety_learning_rate" in typed:
        raise ValueError("--safety_learning_rate has no effect in stage 2 with --concept_loss_weight 0")
    if config.resume != "none" and config.overwrite_output_dir:
        raise ValueError("--resume and --overwrite_output_dir exclude each other")
    _ = config.recompute_every
    read_deepspeed_config(config.deepspeed_config)


def _check_token_budget(config: TrainConfig, budget: int, typed: Collection[str]) -> None:
    name = f"--max_tokens_per_micro_batch {budget}"
    if not config.packing:
        raise ValueError(f"{name} counts the tokens of packed rows; it has no effect with --packing False")
    if not config.runs_language_model:
        raise ValueError(f"{name} bounds the language model's rows, which --stage1_objective concept does not run")
    if "micro_batch_size" in typed:
        raise ValueError(f"{name} and --micro_batch_size exclude each other: either tokens or rows fill a pass")
    if budget < config.max_length:
        raise ValueError(
            f"{name} is less than --max_length {config.max_length}: a row that long would fit no micro-batch"
        )


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """The DeepSpeed JSON as a dict. Relative paths are tried from here, then beside train.py."""
    for path in (Path(name), Path(__file__).resolve().parents[2] / name):
        if path.is_file():
            try:
                return json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"--deepspeed_config {path}: not JSON ({error})") from None
    raise ValueError(f"--deepspeed_config {name}: no such file")
