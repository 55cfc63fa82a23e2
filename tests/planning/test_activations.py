"""What activations take: the formulas against the tensors that autograd really saves."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaConfig, LlamaModel

from psa_fast.models import ConceptBottleneck, PsaConfig
from psa_fast.planning import activations
from psa_fast.planning.activations import Dims, Layout, Tuning
from psa_fast.training.recompute import recompute

ROOT = Path(__file__).resolve().parents[2]
LLAVA_7B = 7_063_427_072
GIB = 2**30


TINY = dict(hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=4, vocab_size=50)


def dims(**changes):
    psa = PsaConfig(48, 64, 36, num_attention_heads=4, projector_hidden_size=56, projector_depth=2)
    text = LlamaConfig(**TINY, num_hidden_layers=3)
    base = PretendBase(text, vision_config=PretendVision())
    return dataclasses.replace(Dims.of(base, psa), **changes), psa


@dataclasses.dataclass
class PretendVision:
    hidden_size: int = 48
    intermediate_size: int = 96
    image_size: int = 84


@dataclasses.dataclass
class PretendBase:
    text: LlamaConfig
    vision_config: PretendVision

    def get_text_config(self):
        return self.text


def bytes_saved(module, run):
    """Bytes of distinct storages that autograd keeps while `run` computes, parameters left out."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["frozen", "lora", "full"])
def test_decoder_layer_keeps_what_autograd_saves(kind, attention):
    tokens, found = 96, []
    for layers in (1, 3):
        torch.manual_seed(0)
        config = LlamaConfig(**TINY, num_hidden_layers=layers, attn_implementation=attention)
        model = LlamaModel(config).to(torch.bfloat16).train().requires_grad_(kind == "full")
        if kind == "lora":
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            inject_adapter_in_model(LoraConfig(r=8, lora_dropout=0.0, target_modules=targets), model)
            model.to(torch.bfloat16)
        embeds = torch.randn(1, tokens, 64, dtype=torch.bfloat16, requires_grad=True)
        found.append(
            bytes_saved(model, lambda m=model, x=embeds: m(inputs_embeds=x, use_cache=False).last_hidden_state)
        )
    layout = Layout(tokens, tokens, "scores" if attention == "eager" else "nothing")
    per_layer = (found[1] - found[0]) / 2 / tokens
    tuning = Tuning(kind, 8, 0.0) if kind == "lora" else Tuning(kind)
    assert activations.layer_saved(dims()[0], tuning, layout) == pytest.approx(per_layer, rel=0.02)


@pytest.mark.parametrize(("every", "back"), [(0, 0), (1, 1), (2, 1), (3, 0), (9, 0)])
def test_layers_keep_what_autograd_saves_when_some_are_recomputed(every, back):
    """Of five layers; `back`: whether the last is recomputed, which is in full again while the others are held."""
    found = {}
    for layers in (1, 2, 5):
        torch.manual_seed(0)
        model = LlamaModel(LlamaConfig(**TINY, num_hidden_layers=layers)).to(torch.bfloat16).train()
        if every and layers == 5:
            recompute(model, every)
        embeds = torch.randn(1, 96, 64, dtype=torch.bfloat16, requires_grad=True)
        found[layers] = bytes_saved(
            model, lambda m=model, x=embeds: m(inputs_embeds=x, use_cache=False).last_hidden_state
        )
    block, state = found[2] - found[1], 96 * 64 * 2
    kept = found[5] - (found[1] - block)
    # the rotation's table, which the layers share, is in `found[1]` and not kept where all are recomputed
    assert activations.layers_saved(5, block, state, every) - back * block == pytest.approx(kept, abs=0.03 * block)


def test_bottleneck_keeps_what_autograd_saves():
    shape, psa = dims()
    torch.manual_seed(0)
    model = ConceptBottleneck(psa).to(torch.bfloat16)
    found = []
    for images in (2, 6):
        vision = torch.randn(images, 36, 48, dtype=torch.bfloat16)
        query = torch.randn(images, 64, dtype=torch.bfloat16)
        found.append(bytes_saved(model, lambda v=vision, q=query: model(v, q)))
    assert activations.bottleneck_saved(shape) == pytest.approx((found[1] - found[0]) / 4, rel=0.1)
