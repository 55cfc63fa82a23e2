"""Training options resolved: dataclass defaults <- YAML recipe <- command line, in that order of precedence."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from psa_fast.data.record_tables import is_table
from psa_fast.files import read_yaml, shorten

from .arguments import typed_options
from .deepspeed_config import read_deepspeed_config as read_deepspeed_config
from .options import (
    EMBEDDED,
    LARGER_ANSWERS,
    LARGER_CONCEPT,
    OPTIONS,
    SMALLER_ANSWERS,
    SMALLER_CONCEPT,
    checked,
    from_text,
    from_yaml,
)
from .options import TrainConfig as TrainConfig

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SECTIONS = ("common", "stage0", "stage1", "stage2")
# a recipe is read for one run, so it cannot say which it is
NOT_IN_RECIPES = ("stage", "recipe", "local_rank")

# a resumed run may change these; any other difference would change the trajectory
RESUME_MAY_DIFFER = {name for name, field in OPTIONS.items() if field.metadata.get("may_change")}


def find_recipe(name: str) -> Path:
    """Path of a shipped recipe by name, or of a YAML file. Raises ValueError naming the choices."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        return path
    shipped = RECIPES / f"{name}.yaml"
    if shipped.parent == RECIPES and shipped.is_file():
        return shipped
    choices = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
    raise ValueError(f"--recipe {name}: unknown; shipped recipes are {choices}, or give the path of a .yaml file")


def read_recipe(name: str, stage: int) -> dict[str, Any]:
    """The recipe's options for one stage (`common` overlaid by `stageN`); every section's values are checked.

    Raises:
        ValueError: naming the file and the section, key or value that is wrong.
    """
    path = find_recipe(name)
    raw = read_yaml(path, "--recipe")
    unknown = [key for key in raw if key not in ("description", *SECTIONS)]
    if unknown:
        raise ValueError(
            f"{path}: expected only description, {', '.join(SECTIONS[:-1])} and {SECTIONS[-1]} at the top level, "
            f"not {shorten(unknown[0])}"
        )
    values: dict[str, Any] = {}
    for section in SECTIONS:
        found = {} if raw.get(section) is None else raw[section]
        if not isinstance(found, dict):
            raise ValueError(f"{path}: {section} is {shorten(found)}; expected options below it")
        wrong = [key for key in found if key not in OPTIONS or key in NOT_IN_RECIPES]
        if wrong:
            names = ", ".join(key if isinstance(key, str) and len(key) < 80 else shorten(key) for key in wrong)
            raise ValueError(f"{path}: {section}: not a training option: {names[:200]}")
        try:
            read = {key: from_yaml(key, value) for key, value in found.items()}
        except ValueError as error:
            raise ValueError(f"{path}: {section}: {error}") from None
        if section in ("common", f"stage{stage}"):
            values |= read
    return values


def parse_args(argv: list[str] | None = None, prog: str = "train.py") -> TrainConfig:
    """Resolve defaults, recipe and command line. Raises ValueError for options that do not fit together."""
    return resolve(typed_options(argv, prog))


def resolve(typed: Mapping[str, str]) -> TrainConfig:
    """The configuration for options typed as texts; what is not typed comes from the recipe or is the default."""
    given = {name: from_text(name, text) for name, text in typed.items()}
    chosen = TrainConfig(**{name: given[name] for name in ("stage", "recipe") if name in given})
    config = TrainConfig(**(read_recipe(chosen.recipe, chosen.stage) | given))
    if "num_train_epochs" in typed and "max_steps" not in typed:
        config.max_steps = None  # the command line beats the recipe's number of steps
    check(config, typed)
    return config


def check(config: TrainConfig, typed: Collection[str] = ()) -> None:
    """Refuse, with one sentence, values out of range and options that cannot work together.

    Args:
        config: all options.
        typed: names of the options given on the command line, which must not be without effect.
    """
    for name in OPTIONS:
        if getattr(config, name) is not None:
            checked(name, getattr(config, name))
    _check_inputs(config)
    _check_effects(config, typed)
    _check_losses(config)
    _check_attacks(config, typed)
    _check_evaluation(config, typed)
    if config.max_tokens_per_micro_batch is not None:
        _check_token_budget(config, config.max_tokens_per_micro_batch, typed)
    if {"num_train_epochs", "max_steps"} <= set(typed):
        raise ValueError("--num_train_epochs and --max_steps exclude each other")
    if config.max_steps is not None and ("max_steps" not in typed or "warmup_steps" in typed):
        # a recipe's warm-up may outlast a run that was cut short on the command line: the loop warns
        check_warmup(config, config.max_steps)
    if config.resume != "none" and config.overwrite_output_dir:
        raise ValueError("--resume and --overwrite_output_dir exclude each other")
    read_deepspeed_config(config.deepspeed_config)


def check_warmup(config: TrainConfig, total_steps: int) -> None:
    """Refuse a warm-up that is not over before the run is: its learning rate would never be reached."""
    if warmup_is_too_long(config, total_steps):
        raise ValueError(
            f"--warmup_steps {config.warmup_steps} leaves none of the run's {total_steps} steps; give fewer, "
            f"or --lr_scheduler_type constant"
        )


def warmup_is_too_long(config: TrainConfig, total_steps: int) -> bool:
    """Whether the learning rate is never reached."""
    return config.warmup_steps >= total_steps and config.lr_scheduler_type != "constant"


def _check_inputs(config: TrainConfig) -> None:
    for name in ("model_name_or_path", "data_path"):
        if getattr(config, name) is None:
            raise ValueError(f"--{name} is needed: the recipe {config.recipe!r} does not set it")
    base = str(config.model_name_or_path)
    if base[0] in "/.~" and not Path(base).is_dir():  # anything else may be a name on the hub
        raise ValueError(f"--model_name_or_path {base}: no such folder")
    if config.data_path not in EMBEDDED and config.image_folder is None and not is_table(str(config.data_path)):
        raise ValueError("--image_folder is needed with --data_path: image paths in the records are relative to it")
    if config.data_path in EMBEDDED and config.image_folder is not None:
        raise ValueError("--image_folder has no effect on the sandbox's own records; give --data_path too")


def _check_effects(config: TrainConfig, typed: Collection[str]) -> None:
    """Refuse typed options that the others leave without an effect."""
    for name in (name for name in OPTIONS if name in typed):
        facts = OPTIONS[name].metadata
        stages = facts.get("stage", config.stage)
        stages = stages if isinstance(stages, tuple) else (stages,)
        if config.stage not in stages:
            why = "; stage 1 keeps the whole VLM frozen" if config.stage == 1 and stages == (2,) else ""
            many = f"stages {stages[0]} and {stages[1]}" if len(stages) == 2 else f"stage {stages[0]}"
            raise ValueError(f"--{name} only acts in {many}{why}")
        if config.stage == 1 and config.stage1_objective in facts.get("no_effect", ()):
            raise ValueError(f"--{name} has no effect with --stage1_objective {config.stage1_objective}")
    if config.feature_cache is not None and config.runs_language_model:
        raise ValueError("--feature_cache needs --stage1_objective concept: elsewhere the tower's share is too small")
    if config.feature_cache is not None and config.augment != "none":
        raise ValueError("--feature_cache holds the features of unchanged images: give --augment none beside it")
    if config.query == "first" and "query_window" in typed:
        raise ValueError("--query_window has no effect with --query first, which reads no text")
    if config.hint_rate == 0 and config.eval_every is None and "policy" in typed:
        raise ValueError("--policy has no effect in training with --hint_rate 0: it is where the hints come from")
    if config.lr_scheduler_type == "constant" and "warmup_steps" in typed:
        raise ValueError("--warmup_steps has no effect with --lr_scheduler_type constant; see constant_with_warmup")
    if config.tune_type_llm == "full" and {"lora_r", "lora_alpha", "lora_dropout"} & set(typed):
        raise ValueError("--lora_* has no effect with --tune_type_llm full")
    if config.tune_type_connector == "frozen" and "connector_learning_rate" in typed:
        raise ValueError("--connector_learning_rate has no effect while --tune_type_connector is frozen")
    if config.stage == 2 and config.concept_loss_weight == 0 and "safety_learning_rate" in typed:
        raise ValueError("--safety_learning_rate has no effect in stage 2 with --concept_loss_weight 0")


def _check_losses(config: TrainConfig) -> None:
    if config.stage == 1 and config.concept_loss_weight == 0:
        raise ValueError(
            "--concept_loss_weight must be positive in stage 1; --stage1_objective tokens leaves the concept loss out"
        )
    if config.stage == 1 and config.lm_loss_weight == 0:
        raise ValueError(
            "--lm_loss_weight must be positive in stage 1; --stage1_objective concept leaves the language loss out"
        )
    if config.stage == 1 and config.stage1_objective == "tokens" and config.num_safety_tokens == 0:
        raise ValueError("--stage1_objective tokens has nothing to train with --num_safety_tokens 0")
    if config.stage == 2 and config.lm_loss_weight == 0:
        raise ValueError("--lm_loss_weight must be positive in stage 2: it is what tunes the language model")


def _check_attacks(config: TrainConfig, typed: Collection[str]) -> None:
    """Refuse what stage 0 and stage 1's adversarial term cannot work with, and options of theirs without effect."""
    if config.stage == 0:
        if config.feature_steps + config.concept_steps == 0:
            raise ValueError("--feature_steps and --concept_steps are both 0: stage 0 has nothing to do")
        for steps, names in (("feature_steps", {"feature_clean_weight"}),
                             ("concept_steps", {"concept_tie", "concept_head_learning_rate"})):  # fmt: skip
            for name in sorted(names & set(typed)):
                if getattr(config, steps) == 0:
                    raise ValueError(f"--{name} has no effect with --{steps} 0")
        if config.weight_decay:
            raise ValueError("--weight_decay must be 0 in stage 0, which keeps the tower near the original one")
        shortest = min(steps for steps in (config.feature_steps, config.concept_steps) if steps)
        check_warmup(config, shortest)
        name = "--stage 0"
    elif config.stage == 1:
        if config.adversarial_weight == 0:
            for option in ("adversarial_eps", "adversarial_steps", "adversarial_start"):
                if option in typed:
                    raise ValueError(f"--{option} has no effect in stage 1 with --adversarial_weight 0")
            return
        name = "--adversarial_weight"
        if config.stage1_objective == "tokens":
            raise ValueError(f"{name} has no effect with --stage1_objective tokens, which leaves the concept loss out")
        if config.feature_cache is not None:
            raise ValueError(f"{name} changes the pixels, and --feature_cache keeps features of unchanged ones")
    else:
        return
    ds = read_deepspeed_config(config.deepspeed_config)
    if ds.get("zero_optimization", {}).get("stage", 0) == 3:
        raise ValueError(
            f"{name} needs gradients of pixels through whole weights, which {config.deepspeed_config} partitions "
            f"(ZeRO-3); give --deepspeed_config ds_configs/zero2.json"
        )


def _check_evaluation(config: TrainConfig, typed: Collection[str]) -> None:
    """Refuse evaluations that cannot be made, and options of theirs without effect."""
    if config.stage == 0:
        return
    if config.eval_every is None:
        given = ("keep_best", "eval_data_path", "eval_image_folder")
        for name in (*given, "eval_batch_size"):
            if name in typed or (name in given and getattr(config, name) is not None):
                raise ValueError(f"--{name} has no effect without --eval_every")
        return
    if config.eval_data_path is None:
        raise ValueError("--eval_every needs --eval_data_path, records that are not trained on")
    if config.eval_data_path in EMBEDDED and config.eval_image_folder is not None:
        raise ValueError("--eval_image_folder has no effect on the sandbox's own records")
    if config.keep_best in SMALLER_ANSWERS + LARGER_ANSWERS and not config.runs_language_model:
        concept = ", ".join(SMALLER_CONCEPT + LARGER_CONCEPT)
        raise ValueError(
            f"--keep_best {config.keep_best} is a figure of answers, and --stage1_objective concept has no language "
            f"model to give any; it has {concept}"
        )
    ds = read_deepspeed_config(config.deepspeed_config)
    if ds.get("zero_optimization", {}).get("stage", 0) == 3:
        raise ValueError(
            f"--eval_every answers with whole weights, which {config.deepspeed_config} partitions (ZeRO-3); give "
            f"--deepspeed_config ds_configs/zero2.json, or evaluate checkpoints with psa-fast evaluate"
        )


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
