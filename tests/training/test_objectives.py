"""Stage 1's two losses share no trained parameter: together they do what they do apart."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "stage1" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def train(command, run):
    """Train as a group of one without the launcher, which takes as long as the run."""

    def go(out, *options):
        arguments = command(out, *options)
        run([sys.executable, *arguments[arguments.index(str(ROOT / "train.py")) :]])

    return go


def test_joint_equals_concept_and_tokens_apart(train, command, run, tmp_path, partitioned):
    joint, concept, tokens = (tmp_path / name for name in ("joint", "concept", "tokens"))
    # every gradient norm is far above the limit, so that one norm over both parts would show
    shared = ["--deepspeed_config", partitioned, "--max_grad_norm", 0.01, "--warmup_steps", 0, "--max_steps", 3]
    train(joint, *shared)
    train(concept, *shared, "--stage1_objective", "concept")
    train(tokens, *shared, "--stage1_objective", "tokens", "--addon", concept / "stage1")

    weights = {folder.name: load_file(folder / "stage1" / "psa.safetensors") for folder in (joint, concept, tokens)}
    for name, tensor in weights["joint"].items():
        apart = weights["tokens" if name.startswith("safety_tokens") else "concept"][name]
        torch.testing.assert_close(apart, tensor, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
        # the tokens were trained on top of the bottleneck, which they left alone
        torch.testing.assert_close(weights["tokens"][name], apart, rtol=0, atol=0)
    # ZeRO-2 keeps whole gradients where ZeRO-3 has shards
    run(command(tmp_path / "zero2", *shared[2:], "--deepspeed_config", ROOT / "ds_configs" / "zero2.json", ranks=2))
    for name, tensor in load_file(tmp_path / "zero2" / "stage1" / "psa.safetensors").items():
        torch.testing.assert_close(tensor, weights["joint"][name], rtol=1e-4, atol=1e-5)
    moved = weights["joint"]["safety_tokens.weight"] - weights["concept"]["safety_tokens.weight"]
    assert moved.abs().max() > 1e-4
    for both, first, second in zip(rows_of(joint), rows_of(concept), rows_of(tokens), strict=True):
        assert both["grad_norm"] ** 2 == pytest.approx(first["grad_norm"] ** 2 + second["grad_norm"] ** 2, rel=1e-5)
        assert min(first["grad_norm"], second["grad_norm"]) > 0.01
        assert both["loss_lm"] == pytest.approx(second["loss_lm"], rel=1e-6)
        assert both["loss_type"] == pytest.approx(first["loss_type"], rel=1e-6)
        assert first["loss_lm"] is None
        assert second["loss_type"] is None


def test_the_concept_objective_has_no_language_model(base, tmp_path):
    from psa_fast.models import load_base
    from psa_fast.training.config import parse_args
    from psa_fast.training.model_building import build_model

    whole, cut = (load_base(base, torch.float32, language_layers=kept) for kept in (True, False))
    assert len(cut.model.language_model.layers) == 0 < len(whole.model.language_model.layers)
    state = whole.state_dict()
    assert {n for n in state if ".language_model.layers." not in n} == set(cut.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in cut.state_dict().items())

    (tmp_path / "adapter").mkdir()
    options = ["--stage1_objective", "concept", "--addon", str(tmp_path), "--model_name_or_path", str(base)]
    with pytest.raises(ValueError, match="does not load the language model's layers"):
        build_model(parse_args(options), {"zero_optimization": {"stage": 2}}, str(tmp_path))
