"""Weight decay by the kind of a parameter, whatever its name is."""

import pytest
import torch
from torch import nn

from psa_fast.models import PsaVLM, load_base
from psa_fast.training.config import TrainConfig
from psa_fast.training.stages import optimizer_groups, prepare


def grouped(base, format_1=False, **options):
    """Names of the decayed and of the other trained parameters, and the model."""
    config = TrainConfig(**options)
    model = PsaVLM.build(load_base(base, torch.float32), num_safety_tokens=2, num_head_tokens=2, num_attention_heads=4)
    groups = optimizer_groups(model, prepare(model, config), 0.1, format_1)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] == 0.1 for p in group["params"]}
    others = {names[id(p)] for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    assert len(decayed | others) == len(decayed) + len(others) == sum(p.requires_grad for p in model.parameters())
    return decayed, others, model


@pytest.mark.parametrize("options", [{}, {"stage": 2}, {"stage": 2, "tune_type_llm": "full"}])
def test_layers_and_embeddings_decay_biases_norms_tokens_and_the_query_do_not(base, options):
    decayed, others, model = grouped(base, **options)
    layers = (nn.Linear, nn.Conv2d, nn.Embedding)
    names = {id(p): name for name, p in model.named_parameters()}  # a head may share its weight with the embeddings
    found = [module.weight for module in model.modules() if isinstance(module, layers)]
    weights = {names[id(weight)] for weight in found if weight.requires_grad}
    assert weights
    assert weights <= decayed
    assert {"bottleneck.query.weight", "bottleneck.head_tokens.weight", "safety_tokens.weight"} <= others
    assert not [name for name in decayed if name.endswith("bias") or "norm" in name]
    if options.get("tune_type_llm") == "full":
        assert any("embed_tokens" in name for name in decayed)


def test_checkpoints_of_format_1_keep_the_groups_they_were_written_with(base):
    decayed, others, _ = grouped(base, format_1=True, stage=2, tune_type_llm="full")
    assert "bottleneck.query.weight" in decayed
    assert any("embed_tokens" in name for name in others)
