"""`psa-fast plan`: what does not fit, what would, and the table in the docs."""

import runpy
from pathlib import Path

import pytest

from psa_fast import cli
from psa_fast.planning.memory import measure
from psa_fast.training.config import parse_args

ROOT = Path(__file__).resolve().parents[2]
LLAVA_7B = 7_063_427_072
GIB = 2**30


def plan(*argv):
    return cli.main(["plan", "--recipe", "llava-1.5-7b", "--stage", "1", *map(str, argv)])


def test_command_says_what_does_not_fit_and_what_would(capsys):
    assert plan("--gpus", 8, "--gpu_gb", 80) == 0
    output = capsys.readouterr().out
    assert "fits: " in output
    assert f"{LLAVA_7B:,}" not in output  # the safety modules are counted too
    assert plan("--gpus", 1, "--gpu_gb", 24, "--gradient_checkpointing", "none", "--micro_batch_size", 8) == 1
    output = capsys.readouterr().out
    assert "does not fit: " in output
    assert "the largest part is language model activations" in output
    assert "checkpointing none" in output
    assert "would fit with --gradient_checkpointing full" in output
    assert plan("--gpus", 1, "--gpu_gb", 4) == 1
    assert "more or larger GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--gpus", 0, "--gpu_gb", 80), "--gpus is 0; expected"),
        (("--gpus", "9" * 50, "--gpu_gb", 80), "--gpus is 999"),
        (("--gpus", 1, "--gpu_gb", "nan"), "--gpu_gb is nan; expected"),
        (("--gpus", 1, "--gpu_gb", "1e999"), "--gpu_gb is inf; expected"),
        (("--gpus", 1, "--gpu_gb", 80, "--nodes", -1), "--nodes is -1; expected"),
        (("--gpus", 1, "--gpu_gb", 80, "--host_gb", "nan"), "--host_gb is nan; expected"),
        (("--gpus", 1, "--gpu_gb", 80, "--host_gb", 0), "--host_gb is 0.0; expected"),
        (("--gpus", 1, "--gpu_gb", 80, "--images_per_row", -1), "--images_per_row is -1; expected"),
        (("--gpus", 3, "--gpu_gb", 80), "not a multiple of --micro_batch_size"),
        (("--gpus", 1, "--gpu_gb", 80, "--lora_r", 8), "--lora_r only acts in stage 2"),
        (("--gpus", 1, "--gpu_gb", 80, "--max_length", 500), "leaves no room for text"),
        (("--gpus", 1, "--gpu_gb", 80, "--model_name_or_path", "gpt2"), "neither a folder nor one of"),
    ],
)
def test_command_refuses_with_a_sentence(argv, sentence, capsys):
    assert plan(*argv) == 2
    assert sentence in capsys.readouterr().err


def test_a_local_folder_is_counted_from_its_config(base, capsys):
    given = ["--recipe", "sandbox", "--model_name_or_path", str(base), "--stage1_objective", "joint"]
    found = measure(parse_args([*given, "--data_path", "-", "--image_folder", "-"]))
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base)
    assert found.total - found.trained == sum(p.numel() for p in model.parameters())


def test_the_table_in_the_docs_is_the_one_that_is_printed():
    printed = runpy.run_path(str(ROOT / "benchmarks" / "scale_table.py"))["rows"]()
    assert "\n".join(printed) in (ROOT / "docs" / "scale.md").read_text()
