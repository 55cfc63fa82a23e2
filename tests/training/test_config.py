"""Options: precedence, and one sentence for what does not fit together."""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from psa_fast.cli import plan
from psa_fast.training.config import TrainConfig, parse_args, read_recipe
from psa_fast.training.engine import accumulation_steps, resolve_deepspeed_config

ROOT = Path(__file__).resolve().parents[2]


def test_command_line_beats_recipe_beats_default(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "common: {model_name_or_path: m, data_path: d, image_folder: i, learning_rate: 1e-4, seed: 7}\n"
        "stage2: {learning_rate: 2e-4}\n"
    )
    config = parse_args(["--stage", "2", "--recipe", str(recipe), "--seed", "9"])
    assert (config.learning_rate, config.seed, config.lora_r) == (2e-4, 9, 256)
    assert parse_args(["--stage", "1", "--recipe", str(recipe)]).learning_rate == 1e-4


# the sandbox recipe's own stage 1 does without the language model
JOINT = ("--stage1_objective", "joint")
CONCEPT = ("--stage1_objective", "concept")
EVAL = ("--eval_every", "5", "--eval_data_path", "sandbox")


@pytest.mark.parametrize("name", ["sandbox", "sandbox-smollm2", "llava-1.5-7b", "llava-1.5-13b"])
@pytest.mark.parametrize("stage", [1, 2])
def test_shipped_recipes_are_accepted(name, stage):
    real = [] if name.startswith("sandbox") else ["--data_path", "d.jsonl", "--image_folder", "images"]
    assert parse_args(["--stage", str(stage), "--recipe", name, *real]).recipe == name


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--recipe", "nope"], "unknown; shipped recipes are"),
        (["--recipe", "llava-1.5-7b"], "--data_path is needed"),
        (["--recipe", "llava-1.5-7b", "--data_path", "x"], "--image_folder is needed"),
        (["--stage", "1", "--tune_type_connector", "full"], "--tune_type_connector only acts in stage 2"),
        (["--stage", "2", "--tune_type_llm", "full", "--lora_r", "8"], r"--lora_\* has no effect"),
        (["--stage", "1", "--concept_loss_weight", "0"], "must be positive in stage 1; --stage1_objective tokens"),
        ([*JOINT, "--lm_loss_weight", "0"], "must be positive in stage 1; --stage1_objective concept"),
        (["--stage", "2", "--stage1_objective", "concept"], "--stage1_objective only acts in stage 1"),
        (["--stage1_objective", "concept", "--token_learning_rate", "1e-3"], "--token_learning_rate has no effect"),
        (["--stage1_objective", "tokens", "--concept_loss_weight", "2"], "--concept_loss_weight has no effect"),
        (["--stage1_objective", "tokens", "--num_safety_tokens", "0"], "nothing to train"),
        (["--stage", "2", "--hint_rate", "1.5"], "--hint_rate is 1.5; expected a number of at least 0 and at most 1"),
        (["--stage", "2", "--hint_rate", "0", "--policy", "p.yaml"], "--policy has no effect"),
        (["--resume", "auto", "--overwrite_output_dir", "True"], "exclude each other"),
        (["--deepspeed_config", "nowhere.json"], "no such file"),
        (["--stage1_objective", "concept", "--attn_implementation", "sdpa"], "--attn_implementation has no effect"),
        ([*JOINT, "--max_tokens_per_micro_batch", "4096", "--packing", "False"], "no effect with --packing False"),
        (["--max_tokens_per_micro_batch", "4096", "--stage1_objective", "concept"], "language model's rows, which"),
        (
            [*JOINT, "--max_tokens_per_micro_batch", "4096", "--micro_batch_size", "2"],
            "--micro_batch_size exclude each other",
        ),
        ([*JOINT, "--max_tokens_per_micro_batch", "1023"], "1023 is less than --max_length 1024: a row that long"),
        (["--max_steps", "5", "--warmup_steps", "5"], "--warmup_steps 5 leaves none of the run's 5 steps"),
        (["--lr_scheduler_type", "constant", "--warmup_steps", "5"], "no effect with --lr_scheduler_type constant"),
        (["--learning_rat", "1"], "--learning_rat is not an option; did you mean --learning_rate"),
        (["words"], "words is not an option"),
        (["--seed"], "--seed: expected one argument"),
        (["--stage1_objective", "concept", "--use_liger_kernel", "True"], "--use_liger_kernel has no effect"),
        (["--num-train-epochs", "1", "--max-steps", "5"], "exclude each other"),
        (["--gradient_checkpointing", "every_0"], "'every_0'; expected none, full or every_N with N of 2 or more"),
        (["--gradient_checkpointing", "every_1"], "'every_1'; expected none, full or every_N"),
        (["--keep_best", "unsafe_auroc"], "--keep_best has no effect without --eval_every"),
        (["--eval_batch_size", "4"], "--eval_batch_size has no effect without --eval_every"),
        (["--eval_every", "5"], "--eval_every needs --eval_data_path"),
        (["--stage", "0", "--eval_every", "5"], "--eval_every only acts in stages 1 and 2"),
        ([*EVAL, "--keep_best", "loss"], "--keep_best is 'loss'; expected one of attack_success, "),
        (
            [*EVAL, *CONCEPT, "--keep_best", "attack_success"],
            "figure of answers, and --stage1_objective",
        ),
        ([*EVAL, "--deepspeed_config", "ds_configs/zero3.json"], r"partitions \(ZeRO-3\); give --deepspeed_config"),
        (["--report_to", "mlflow"], "--report_to is 'mlflow'; expected none, or of tensorboard, wandb, trackio some"),
        (["--report_to", "none,wandb"], "--report_to is 'none,wandb'; expected none, or"),
        (["--gradient_checkpointing", "True"], "'True'; expected none, full or every_N"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(argv, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        parse_args(argv)
    # by rule: each of them names an option, and one that was typed unless what lacks is another
    named = set(re.findall(r"--\w+", str(error.value)))
    typed = {word.replace("-", "_").replace("__", "--", 1) for word in argv if word.startswith("--")}
    assert named & typed or "is needed" in sentence or argv == ["words"], str(error.value)


def test_unknown_recipe_option_or_value_is_named(tmp_path):
    recipe = tmp_path / "typo.yaml"
    recipe.write_text("common: {model_name_or_path: m, data_path: d, image_folder: i, stage1_objective: both}\n")
    with pytest.raises(ValueError, match="--stage1_objective is 'both'; expected one of joint, concept, tokens"):
        parse_args(["--recipe", str(recipe)])
    recipe.write_text("common: {model_name_or_path: m, data_path: d, image_folder: i, gradient_checkpointing: true}\n")
    with pytest.raises(ValueError, match="--gradient_checkpointing is True; expected none, full or every_N"):
        parse_args(["--recipe", str(recipe)])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("common: {learning_rat: 1.0}", "common: not a training option: learning_rat"),
        ("stage2: {seed: 1, 7: 1, stage: 2}", "stage2: not a training option: 7, stage"),
        (
            "stage3: {seed: 1}",
            "expected only description, common, stage0, stage1 and stage2 at the top level, not 'stage3'",
        ),
        ("seed: 1", "at the top level, not 'seed'"),
        ("common: 3", "common is 3; expected options below it"),
        ("common: [seed]", r"common is \['seed'\]; expected options below it"),
        ("stage2: {lora_r: true}", "stage2: --lora_r is True; expected a whole number of at least 1"),
        ("stage2: {lora_r: 2.5}", "--lora_r is 2.5; expected a whole number"),
        (f"common: {{seed: {10**25}}}", "--seed is 10000000000000000000000000; expected a whole number"),
        (f"common: {{max_grad_norm: {10**400}}}", "--max_grad_norm is 1000.*expected a number of at least 0"),
        ("common: {learning_rate: .nan}", "--learning_rate is nan; expected a number of more than 0"),
        ("common: {max_grad_norm: .inf}", "--max_grad_norm is inf; expected a number of at least 0"),
        ("common: {learning_rate: [1]}", r"--learning_rate is \[1\]; expected a number"),
        ("common: {packing: 1}", "--packing is 1; expected True or False"),
        ("common: {output_dir: 2024}", "--output_dir is 2024; expected text"),
        ("common: {output_dir: ''}", "--output_dir is ''; expected text"),
        ('common: {output_dir: "a\\0b"}', "--output_dir is .*; expected text"),
        ("common: {seed: }", "--seed has no value"),
        ("common: {seed: 1, seed: 2}", "the key 'seed' stands in line 1 already"),
        ("[1, 2]", "is not a mapping of keys"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_with_its_name(tmp_path, text, sentence):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text + "\n")
    with pytest.raises(ValueError, match=sentence) as error:
        read_recipe(str(recipe), 1)
    assert str(recipe) in str(error.value)
    assert len(str(error.value)) < len(str(recipe)) + 250


def test_a_recipe_may_spell_numbers_as_yaml_has_them(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("common: {learning_rate: 1e-4, seed: 3.0, max_grad_norm: 2, max_steps: }\n")
    assert read_recipe(str(recipe), 1) == {
        "learning_rate": 1e-4, "seed": 3, "max_grad_norm": 2.0, "max_steps": None,
    }  # fmt: skip


def test_a_recipes_warm_up_may_outlast_a_run_cut_short_but_not_the_recipes_own_run(tmp_path):
    assert parse_args(["--max_steps", "2"]).warmup_steps == 20  # the sandbox recipe's; the run warns
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "common: {model_name_or_path: m, data_path: d, image_folder: i, max_steps: 30, warmup_steps: 30}\n"
    )
    with pytest.raises(ValueError, match="--warmup_steps 30 leaves none of the run's 30 steps"):
        parse_args(["--recipe", str(recipe)])
    assert parse_args(["--recipe", str(recipe), "--lr_scheduler_type", "constant"]).max_steps == 30


@pytest.mark.parametrize("form", ["--packing=False", "--packing False", "--no_packing", "--no-packing"])
def test_booleans_are_written_the_same_way_in_training_and_planning(form):
    parser = argparse.ArgumentParser()
    plan.register(parser.add_subparsers())
    machine = ["plan", "--gpus", "1", "--gpu_gb", "1", "--recipe", "llava-1.5-7b"]
    for words, expected in ((form.split(), False), (["--packing"], True), (["--no_packing", "--packing"], True)):
        assert parse_args(words).packing is expected
        assert plan.read_options(parser.parse_args([*machine, *words])).packing is expected
    hyphens = ["--max-length", "2048"]
    assert plan.read_options(parser.parse_args([*machine, *hyphens])).max_length == 2048


def test_help_lists_every_option_once_on_one_line_without_torch():
    code = "import sys; sys.modules['torch'] = None; import train; train.main(['--help'])"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert time.perf_counter() - began < 3
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0] == "usage: train.py [--stage {0,1,2}] [--recipe NAME] [--OPTION VALUE ...]"
    titles = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["options", "model and data", "method", "optimisation", "memory and speed", "run"]
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    names = {f.name for f in dataclasses.fields(TrainConfig)} - {"local_rank"}
    assert sorted(shown) == sorted(f"--{name}" for name in names)
    # an option and its default are on the same line
    assert sum("(default: " in line for line in lines if line.startswith("  --")) == len(names)
    assert "python train.py --stage 1" in done.stdout


def test_deepspeed_config_is_filled_and_contradictions_are_refused(tmp_path):
    config = parse_args(["--global_batch_size", "16", "--micro_batch_size", "4"])
    ds = resolve_deepspeed_config(config, world_size=2)
    assert (ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]) == (4, 2)
    assert "auto" not in json.dumps(ds)
    with pytest.raises(ValueError, match="not a multiple"):
        accumulation_steps(config, 3)
    # a rank's share smaller than the recipe's micro-batch
    config.micro_batch_size = 16
    assert resolve_deepspeed_config(config, world_size=4)["train_micro_batch_size_per_gpu"] == 4
    config.micro_batch_size = 4

    budget = parse_args([*JOINT, "--global_batch_size", "16", "--max_tokens_per_micro_batch", "4096"])
    ds = resolve_deepspeed_config(budget, world_size=4)
    assert (ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]) == (4, 1)
    with pytest.raises(ValueError, match="16 is not a multiple of 3 ranks"):
        accumulation_steps(budget, 3)

    mine = tmp_path / "ds.json"
    mine.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}))
    config.deepspeed_config = str(mine)
    with pytest.raises(ValueError, match="train_micro_batch_size_per_gpu is 2"):
        resolve_deepspeed_config(config, world_size=2)
