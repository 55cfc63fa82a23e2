"""Options: precedence, and one sentence for what does not fit together."""

import argparse
import json

import pytest

from psa_fast.training import commands
from psa_fast.training.config import parse_args, read_recipe
from psa_fast.training.engine import accumulation_steps, resolve_deepspeed_config


def test_command_line_beats_recipe_beats_default(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "common: {model_name_or_path: m, data_path: d, image_folder: i, learning_rate: 1e-4, seed: 7}\n"
        "stage2: {learning_rate: 2e-4}\n"
    )
    config = parse_args(["--stage", "2", "--recipe", str(recipe), "--seed", "9"])
    assert (config.learning_rate, config.seed, config.lora_r) == (2e-4, 9, 256)
    assert parse_args(["--stage", "1", "--recipe", str(recipe)]).learning_rate == 1e-4


@pytest.mark.parametrize("name", ["sandbox", "llava-1.5-7b", "llava-1.5-13b"])
@pytest.mark.parametrize("stage", [1, 2])
def test_shipped_recipes_are_accepted(name, stage):
    real = [] if name == "sandbox" else ["--data_path", "d.jsonl", "--image_folder", "images"]
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
        (["--stage", "1", "--lm_loss_weight", "0"], "must be positive in stage 1; --stage1_objective concept"),
        (["--stage", "2", "--stage1_objective", "concept"], "--stage1_objective only acts in stage 1"),
        (["--stage1_objective", "concept", "--token_learning_rate", "1e-3"], "--token_learning_rate has no effect"),
        (["--stage1_objective", "tokens", "--concept_loss_weight", "2"], "--concept_loss_weight has no effect"),
        (["--stage1_objective", "tokens", "--num_safety_tokens", "0"], "nothing to train"),
        (["--stage", "2", "--hint_rate", "1.5"], "share between 0 and 1"),
        (["--stage", "2", "--hint_rate", "0", "--policy", "p.yaml"], "--policy has no effect"),
        (["--resume", "auto", "--overwrite_output_dir", "True"], "exclude each other"),
        (["--deepspeed_config", "nowhere.json"], "no such file"),
        (["--stage1_objective", "concept", "--attn_implementation", "sdpa"], "--attn_implementation has no effect"),
        (["--max_tokens_per_micro_batch", "4096", "--packing", "False"], "no effect with --packing False"),
        (["--max_tokens_per_micro_batch", "4096", "--stage1_objective", "concept"], "language model's rows, which"),
        (["--max_tokens_per_micro_batch", "4096", "--micro_batch_size", "2"], "--micro_batch_size exclude each other"),
        (["--max_tokens_per_micro_batch", "4095"], "4095 is less than --max_length 4096: a row that long"),
        (["--stage1_objective", "concept", "--use_liger_kernel", "True"], "--use_liger_kernel has no effect"),
        (["--num-train-epochs", "1", "--max-steps", "5"], "exclude each other"),
        (["--gradient_checkpointing", "every_0"], "'every_0'; expected none, full or every_N with N of 2 or more"),
        (["--gradient_checkpointing", "every_1"], "'every_1'; expected none, full or every_N"),
        (["--gradient_checkpointing", "True"], "'True'; expected none, full or every_N"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(argv, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_args(argv)


def test_unknown_recipe_option_or_value_is_named(tmp_path):
    recipe = tmp_path / "typo.yaml"
    recipe.write_text("common: {model_name_or_path: m, data_path: d, image_folder: i, stage1_objective: both}\n")
    with pytest.raises(ValueError, match="--stage1_objective is 'both'; expected one of joint, concept, tokens"):
        parse_args(["--recipe", str(recipe)])
    recipe.write_text("common: {model_name_or_path: m, data_path: d, image_folder: i, gradient_checkpointing: true}\n")
    with pytest.raises(ValueError, match="--gradient_checkpointing is 'True'; expected none, full or every_N"):
        parse_args(["--recipe", str(recipe)])
    recipe.write_text("common: {learning_rat: 1.0}\n")
    with pytest.raises(ValueError, match=r"typo\.yaml: not a training option: learning_rat"):
        read_recipe(str(recipe), 1)


@pytest.mark.parametrize("form", ["--packing=False", "--packing False", "--no_packing", "--no-packing"])
def test_booleans_are_written_the_same_way_in_training_and_planning(form):
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())
    machine = ["plan", "--gpus", "1", "--gpu_gb", "1", "--recipe", "llava-1.5-7b"]
    for words, expected in ((form.split(), False), (["--packing"], True), (["--no_packing", "--packing"], True)):
        assert parse_args(words).packing is expected
        assert commands.read_options(parser.parse_args([*machine, *words])).packing is expected
    hyphens = ["--max-length", "2048"]
    assert commands.read_options(parser.parse_args([*machine, *hyphens])).max_length == 2048


def test_help_says_what_no_packing_does(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("lay a micro-batch's rows end to end") == 1
    assert "--no_packing, --no-packing the same as --packing False" in text


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

    budget = parse_args(["--global_batch_size", "16", "--max_tokens_per_micro_batch", "4096"])
    ds = resolve_deepspeed_config(budget, world_size=4)
    assert (ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]) == (4, 1)
    with pytest.raises(ValueError, match="16 is not a multiple of 3 ranks"):
        accumulation_steps(budget, 3)

    mine = tmp_path / "ds.json"
    mine.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}))
    config.deepspeed_config = str(mine)
    with pytest.raises(ValueError, match="train_micro_batch_size_per_gpu is 2"):
        resolve_deepspeed_config(config, world_size=2)
