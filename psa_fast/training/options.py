"""The training options: every fact of an option (help, range, when it acts) stands at the option and nowhere else."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from psa_fast.files import shorten, unwritable_text
from psa_fast.taxonomy.crosswalk import read_taxonomy
from psa_fast.taxonomy.heads import Taxonomy

# figures that choose a checkpoint (--keep_best): those that answers decide, and those that the concept head decides
SMALLER_ANSWERS = (
    "attack_success", "attack_success_text", "attack_success_joint", "over_refusal_clean", "over_refusal_twins",
    "over_refusal_text_twins", "over_refusal_joint_twins",
)  # fmt: skip
LARGER_ANSWERS = ("general_accuracy",)
SMALLER_CONCEPT, LARGER_CONCEPT = ("over_flagged",), ("unsafe_auroc", "text_risk_auroc")
# what a base or records may be called that psa-fast makes itself (psa_fast/sandbox/cache.py)
EMBEDDED = ("sandbox", "sandbox-smollm2")
REPORTERS = ("tensorboard", "wandb", "trackio")
_REPORTER = f"({'|'.join(REPORTERS)})"
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
# the groups of --help, in its order
GROUPS = ("model and data", "method", "optimisation", "memory and speed", "run")

_LARGEST = 2**31 - 1  # of a count that says nothing else
_LONGEST = 4096  # characters of a text, which is a name or a path
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
_PLAIN_NUMBER = re.compile(r"[0-9A-Za-z.+-]+")
_KINDS = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "text"}


def option(default: Any, help: str, *, group: str, **facts: Any) -> Any:
    """Return a dataclass field with what is known about the option.

    Args:
        default: its value when neither recipe nor command line set it.
        help: one line for `--help`.
        group: one of GROUPS.
        facts: `minimum`, `above`, `maximum`, `below` bound a number; `choices` lists all values, `pattern` with
            `expected` describes them; `unset` says what None stands for; `stage` is the only one in which it acts,
            or a tuple of them;
            `no_effect` names stage-1 objectives that ignore it; `may_change` allows a resumed run another value, which
            leaves its trajectory as it is.
    """
    return field(default=default, metadata={"help": help, "group": group, **facts})


_data, _method, _optim, _speed, _run = (partial(option, group=group) for group in GROUPS)
_rate = partial(_optim, minimum=0.0, maximum=1.0)


@dataclass
class TrainConfig:
    """Every option of `train.py`. A recipe sets them under `common:`, `stage0:`, `stage1:`, `stage2:`."""

    stage: int = _data(
        1, "1: safety modules, 2: language model; 0, before them: robust vision tower", choices=(0, 1, 2)
    )
    recipe: str = _data("sandbox", "name of a shipped recipe, or path of a YAML file")
    model_name_or_path: str | None = _data(
        None, "base VLM: hub id, folder, 'sandbox' or 'sandbox-smollm2'", unset="the recipe's"
    )
    addon: str | None = _data(
        None, "add-on folder to start from", unset="in stage 2 OUTPUT_DIR/stage1", may_change=True, stage=(1, 2)
    )
    data_path: str | None = _data(None, "JSONL, Parquet or folder of datasets, or as above", unset="the recipe's")
    image_folder: str | None = _data(
        None, "folder that the records' image paths are relative to", unset="in tables, their own"
    )
    output_dir: str = _data("runs/demo", "folder of stage1/ and stage2/, what a run writes", may_change=True)
    on_bad_sample: str = _data("error", "what rows that cannot be used do", choices=("error", "skip"))
    on_template_answers: str = _data(
        "error", "what rows whose answer an importer made up do",
        choices=("error", "drop", "keep"), stage=(1, 2), no_effect=("concept",),
    )  # fmt: skip
    taxonomy: str = _data("psa", "what the labels are of: a shipped taxonomy's name, or a YAML file")
    keep_keys: str | None = _data(
        None, "keys like ours, by commas, that are to be left unread", unset="none", may_change=True
    )  # fmt: skip
    clean_samples: int | None = _data(None, "at most this many clean rows, types balanced", unset="as is", minimum=0)
    max_length: int = _data(4096, "longest row in tokens, image tokens included", minimum=1)

    num_safety_tokens: int = _method(
        64, "safety tokens before an image in the language model", minimum=0, maximum=4096, stage=(1, 2)
    )
    num_head_tokens: int = _method(64, "safety tokens that the concept attention alone sees", minimum=0, maximum=4096)
    num_attention_heads: int = _method(8, "heads of the concept attention", minimum=1, maximum=1024)
    projector_depth: int = _method(3, "blocks in each of the safety projector's two stages", minimum=1, maximum=64)
    query: str = _method("prompt", "what of the prompt asks the concept head", choices=(
        "prompt", "first",
    ), stage=(1, 2))  # fmt: skip
    augment: str = _method("none", "random changes of images that keep labels", choices=(
        "none", "light", "strong",
    ), stage=(1, 2))  # fmt: skip
    query_window: int = _method(
        16, "tokens of the windows of a prompt that ask by themselves, 0: none", minimum=0, maximum=2**20, stage=(1, 2)
    )
    stage1_objective: str = _method(
        "joint", "stage 1: both losses or one half", stage=1, choices=("joint", "concept", "tokens")
    )
    feature_cache: str | None = _method(
        None, "folder of vision features for --stage1_objective concept", unset="none", stage=(1, 2)
    )
    tune_type_llm: str = _method("lora", "stage 2: tuning of the language model", stage=2, choices=("lora", "full"))
    tune_type_connector: str = _method(
        "frozen", "stage 2: the VLM's own projector", stage=2, choices=("frozen", "full")
    )
    lora_r: int = _method(256, "stage 2: LoRA rank", stage=2, minimum=1, maximum=65536)
    lora_alpha: int = _method(16, "stage 2: LoRA alpha; updates are scaled by alpha / r", stage=2, minimum=1)
    lora_dropout: float = _method(0.05, "stage 2: LoRA dropout", stage=2, minimum=0.0, below=1.0)
    hint_rate: float = _method(
        0.0, "share of risky rows whose prompt gets the policy's hint", minimum=0.0, maximum=1.0, stage=(1, 2)
    )
    policy: str | None = _method(None, "policy file of hints and evaluations", unset="the shipped one", stage=(1, 2))
    concept_loss_weight: float = _method(
        1.0, "weight of the type and level losses", minimum=0.0, maximum=1e6, no_effect=("tokens",), stage=(1, 2)
    )
    lm_loss_weight: float = _method(
        1.0, "weight of the language-model loss", minimum=0.0, maximum=1e6, no_effect=("concept",), stage=(1, 2)
    )
    label_smoothing: float = _method(
        0.0, "label smoothing of the concept losses", minimum=0.0, maximum=1.0, no_effect=("tokens",), stage=(1, 2)
    )

    adversarial_weight: float = _method(
        0.0, "stage 1: weight of the concept losses on attacked pixels", stage=1, minimum=0.0, maximum=1e6,
        no_effect=("tokens",),
    )  # fmt: skip
    adversarial_start: float = _method(
        0.0, "stage 1: share of the run before that term acts", stage=1, minimum=0.0, below=1.0, no_effect=("tokens",)
    )
    adversarial_eps: float = _method(
        8.0, "stages 0, 1: attack's L_inf budget in 255ths", stage=(0, 1), above=0.0, maximum=255.0,
        no_effect=("tokens",),
    )  # fmt: skip
    adversarial_steps: int = _method(
        2, "stages 0, 1: attack's gradient steps", stage=(0, 1), minimum=1, maximum=1000, no_effect=("tokens",)
    )
    feature_steps: int = _method(
        450, "stage 0: first, steps that tie attacked features to the original's", stage=0, minimum=0
    )
    feature_clean_weight: float = _method(
        1.0, "stage 0: weight of clean pictures' feature distance in them", stage=0, minimum=0.0, maximum=1e6
    )
    concept_steps: int = _method(
        150, "stage 0: then, steps of tower and a concept head together", stage=0, minimum=0
    )  # fmt: skip
    concept_tie: float = _method(
        2.0, "stage 0: weight of the feature distances in those", stage=0, minimum=0.0, maximum=1e6
    )
    concept_head_learning_rate: float = _method(
        1e-3, "stage 0: of that head, which is thrown away", stage=0, above=0.0, maximum=1.0
    )

    num_train_epochs: float = _optim(
        3.0, "passes over the rows, unless max_steps is given", above=0.0, maximum=1e6, stage=(1, 2)
    )
    max_steps: int | None = _optim(
        None, "optimizer steps, in place of epochs", unset="by epochs", minimum=1, stage=(1, 2)
    )
    global_batch_size: int = _optim(128, "rows per optimizer step over all ranks", minimum=1, maximum=2**20)
    learning_rate: float = _optim(
        1e-5, "concept bottleneck in stage 1, language model in stage 2", above=0.0, maximum=1.0
    )
    token_learning_rate: float | None = _rate(
        None, "safety tokens of the language model", unset="learning_rate", no_effect=("concept",), stage=(1, 2)
    )
    safety_learning_rate: float | None = _rate(None, "stage 2: concept bottleneck", unset="learning_rate", stage=2)
    connector_learning_rate: float | None = _rate(
        None, "stage 2: the VLM's own projector", unset="learning_rate", stage=2
    )
    lr_scheduler_type: str = _optim("cosine", "schedule", choices=SCHEDULERS)
    warmup_steps: int = _optim(20, "steps of linear warm-up, fewer than all steps", minimum=0)
    weight_decay: float = _optim(
        0.0, "AdamW, on matrices; not on biases, norms, safety tokens", minimum=0.0, maximum=1.0
    )
    adam_beta1: float = _optim(0.9, "AdamW", minimum=0.0, below=1.0)
    adam_beta2: float = _optim(0.999, "AdamW", minimum=0.0, below=1.0)
    max_grad_norm: float = _optim(1.0, "gradient clipping, 0 is off", minimum=0.0)

    micro_batch_size: int = _speed(
        8, "rows per rank and forward pass", minimum=1, maximum=2**20, may_change=True
    )  # fmt: skip
    max_tokens_per_micro_batch: int | None = _speed(
        None, "fill passes by tokens, not by micro_batch_size", unset="off", minimum=1, may_change=True, stage=(1, 2)
    )
    packing: bool = _speed(True, "rows end to end, not padded", may_change=True)
    attn_implementation: str = _speed(
        "auto",
        "attention",
        choices=("auto", "flash_attention_3", "flash_attention_2", "sdpa", "eager"),
        no_effect=("concept",),
        may_change=True,
        stage=(1, 2),
    )
    gradient_checkpointing: str = _speed(
        "none",
        "decoder layers run again in the backward pass: none, full, every_N",
        pattern="none|full|every_([2-9]|[1-9][0-9]{1,5})",
        expected="none, full or every_N with N of 2 or more",
        no_effect=("concept",),
        may_change=True,
        stage=(1, 2),
    )
    use_liger_kernel: bool = _speed(
        False, "Liger's RMSNorm, RoPE and SwiGLU (CUDA)", no_effect=("concept",), may_change=True, stage=(1, 2)
    )
    deepspeed_config: str = _speed("ds_configs/zero3.json", "DeepSpeed JSON, or the name of a shipped one")
    dtype: str = _speed("auto", "compute dtype, by the device", choices=("auto", "fp32", "bf16"))
    dataloader_num_workers: int = _speed(
        0, "processes per rank that prepare rows ahead", minimum=0, maximum=1024, may_change=True
    )

    # torch takes seeds of 64 bits, and each rank adds its number
    seed: int = _run(0, "initialisation, order of rows, hints", minimum=-(2**63), maximum=2**63 - 1)
    save_steps: int = _run(500, "optimizer steps between checkpoints, 0: the end only", minimum=0, may_change=True)
    save_total_limit: int = _run(2, "checkpoints kept", minimum=1, may_change=True)
    eval_every: int | None = _run(
        None, "optimizer steps between evaluations, and after the last", unset="off", minimum=1, may_change=True,
        stage=(1, 2),
    )  # fmt: skip
    eval_data_path: str | None = _run(
        None, "records of the evaluations, as data_path", may_change=True, stage=(1, 2)
    )  # fmt: skip
    eval_image_folder: str | None = _run(
        None, "folder that their image paths are relative to", unset="image_folder", may_change=True, stage=(1, 2)
    )
    eval_batch_size: int = _run(
        16, "rows per rank and forward pass of them", minimum=1, maximum=2**20, may_change=True, stage=(1, 2)
    )
    keep_best: str | None = _run(
        None, "figure of the evaluations whose best add-on is kept in best/", unset="off", may_change=True,
        stage=(1, 2), pattern="|".join(SMALLER_ANSWERS + LARGER_ANSWERS + SMALLER_CONCEPT + LARGER_CONCEPT),
        expected=f"one of {', '.join(SMALLER_ANSWERS + LARGER_ANSWERS + SMALLER_CONCEPT + LARGER_CONCEPT)}",
    )  # fmt: skip
    report_to: str = _run(
        "tensorboard", "none, or by commas tensorboard, wandb, trackio", may_change=True,
        pattern=f"none|{_REPORTER}(,{_REPORTER})*", expected=f"none, or of {', '.join(REPORTERS)} some, by commas",
    )  # fmt: skip
    resume: str = _run("none", "none, auto (the newest checkpoint) or a checkpoint folder", may_change=True)
    overwrite_output_dir: bool = _run(False, "delete an earlier run of this stage first", may_change=True)
    local_rank: int = _run(-1, "set by the launcher", minimum=-1, hidden=True, may_change=True)

    @property
    def concepts(self) -> Taxonomy:
        """What the labels are of. Raises ValueError if the option names none."""
        return read_taxonomy(self.taxonomy)

    @property
    def kept_keys(self) -> list[str]:
        """The keys of records that are to be left unread."""
        return [] if self.keep_keys is None else [key.strip() for key in self.keep_keys.split(",")]

    @property
    def runs_bottleneck(self) -> bool:
        """Whether the concept losses are computed at all."""
        return self.concept_loss_weight > 0 and not (self.stage == 1 and self.stage1_objective == "tokens")

    @property
    def runs_language_model(self) -> bool:
        """Whether the language model runs at all; it does but in stage 0 and for stage 1's `concept`."""
        return self.stage != 0 and not (self.stage == 1 and self.stage1_objective == "concept")

    @property
    def recompute_every(self) -> int:
        """One decoder layer in how many is recomputed in the backward pass; 0: none."""
        value = self.gradient_checkpointing
        return int(value == "full") if value in ("none", "full") else int(value.removeprefix("every_"))

    @property
    def clips_each_part(self) -> bool:
        """Whether gradients are clipped part by part: stage 1 with both losses, which share no trained parameter."""
        return self.max_grad_norm > 0 and self.stage == 1 and self.stage1_objective == "joint"

    @property
    def reporters(self) -> tuple[str, ...]:
        """The names in `report_to`, each once."""
        return () if self.report_to == "none" else tuple(dict.fromkeys(self.report_to.split(",")))

    @property
    def stage_dir(self) -> Path:
        """Where this stage's checkpoints, metrics and final add-on go."""
        # stage 0's result is a base, a folder without a run's own files beside it
        return Path(self.output_dir) / ("stage0-run" if self.stage == 0 else f"stage{self.stage}")

    @property
    def robust_base(self) -> Path:
        """Where stage 0 writes its result, a plain base folder."""
        return Path(self.output_dir) / "stage0"

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values."""
        return dataclasses.asdict(self)


OPTIONS: dict[str, dataclasses.Field] = {f.name: f for f in dataclasses.fields(TrainConfig)}


def kind_of(name: str) -> str:
    """Return "int", "float", "bool" or "str", the type of an option's value."""
    return str(OPTIONS[name].type).split("|")[0].strip()


def may_be_unset(name: str) -> bool:
    """Return whether None is a value of the option."""
    return "None" in str(OPTIONS[name].type)


def from_text(name: str, text: str) -> Any:
    """Return the value that a text of the command line stands for; ValueError for one that stands for none."""
    kind = kind_of(name)
    if kind == "bool":
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError(f"--{name} is {shorten(text)}; expected True or False")
        return text.lower() in _TRUE
    value: Any = text
    if kind in ("int", "float"):
        try:
            if not _PLAIN_NUMBER.fullmatch(text):  # Python also takes 1_0, other scripts' digits and blanks around it
                raise ValueError
            value = int(text) if kind == "int" else float(text)
        except ValueError:
            raise ValueError(f"--{name} is {shorten(text)}; expected {expected(name)}") from None
    return checked(name, value)


def from_yaml(name: str, value: Any) -> Any:
    """Return the option's value for a decoded YAML value; ValueError for one of another type or out of range."""
    if value is None:
        if may_be_unset(name):
            return None
        raise ValueError(f"--{name} has no value")
    kind = kind_of(name)
    if kind in ("int", "float") and isinstance(value, str) and _PLAIN_NUMBER.fullmatch(value):
        value = _number(value)  # YAML reads 1e-5 as text
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = _number(value)
    if kind == "int" and isinstance(value, float) and value.is_integer():
        value = int(value)
    return checked(name, value)


def _number(value: str | int) -> Any:
    """The value as a float, or as it is where it is none."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def checked(name: str, value: Any) -> Any:
    """Return the value if the option can have it; a ValueError names the option and what is expected otherwise."""
    facts, kind = OPTIONS[name].metadata, kind_of(name)
    types: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
    wrong = not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "bool")
    if not wrong and "choices" in facts:
        wrong = value not in facts["choices"]
    elif not wrong and kind in ("int", "float"):
        wrong = not _within(value, kind, facts)
    elif not wrong and kind == "str":
        wrong = not value or len(value) > _LONGEST or "\0" in value or unwritable_text(value) is not None
        wrong = wrong or ("pattern" in facts and not re.fullmatch(facts["pattern"], value))
    if wrong:
        raise ValueError(f"--{name} is {shorten(value)}; expected {expected(name)}")
    return value


def expected(name: str) -> str:
    """Return in words which values the option can have."""
    facts, kind = OPTIONS[name].metadata, kind_of(name)
    if "choices" in facts:
        return f"one of {', '.join(map(str, facts['choices']))}"
    if "expected" in facts:
        return str(facts["expected"])
    if kind == "str":
        return f"text of 1 to {_LONGEST} characters"
    if kind == "bool":
        return _KINDS[kind]
    words = {"minimum": "at least", "above": "more than", "maximum": "at most", "below": "less than"}
    bounds = [f"{words[key]} {facts[key]:g}" if kind == "float" else f"{words[key]} {facts[key]}"
              for key in words if key in facts]  # fmt: skip
    if kind == "int" and "maximum" not in facts:
        bounds.append(f"at most {_LARGEST}")
    return f"{_KINDS[kind]}{' of' if bounds else ''} {' and '.join(bounds)}".strip()


def _within(value: Any, kind: str, facts: Mapping[str, Any]) -> bool:
    if kind == "float" and not (isinstance(_number(value), float) and math.isfinite(_number(value))):
        return False
    largest = _LARGEST if kind == "int" else math.inf
    above, below = facts.get("above", -math.inf), facts.get("below", math.inf)
    return facts.get("minimum", -math.inf) <= value <= facts.get("maximum", largest) and above < value < below
