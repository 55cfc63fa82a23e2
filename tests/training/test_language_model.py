"""Options of the language model's layers: recomputed activations and Liger's kernels."""

from itertools import chain

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaModel
from transformers.models.llama import modeling_llama

from psa_fast.models import PsaVLM
from psa_fast.models.packing import SDPA_BY_SAMPLE
from psa_fast.training import recompute as language_model
from psa_fast.training.config import parse_args
from psa_fast.training.recompute import apply_liger, check_liger, prepare_language_model
from psa_fast.training.stages import prepare

LAYERS = 5
MODES = {
    "none": [1, 1, 1, 1, 1],
    "full": [2, 2, 2, 2, 2],
    "every_2": [2, 1, 2, 1, 2],
    "every_3": [2, 1, 1, 2, 1],
    "every_9": [2, 1, 1, 1, 1],
}


def build(base, packed=True, stage=2, dtype=torch.float64, device="cpu", mode="none"):
    """The tiny base with five decoder layers of random weights, prepared as a stage prepares it."""
    config = AutoConfig.from_pretrained(base)
    config.text_config.num_hidden_layers = LAYERS
    torch.manual_seed(0)
    vlm = AutoModelForImageTextToText.from_config(config).to(device=device, dtype=dtype)
    vlm.model.language_model.set_attn_implementation(SDPA_BY_SAMPLE if packed else "sdpa")
    psa = PsaVLM.build(vlm, num_safety_tokens=3, num_head_tokens=3)
    lora = ["--lora_r", "4", "--lora_dropout", "0.2", "--concept_loss_weight", "1"] if stage == 2 else []
    losses = ["--stage1_objective", "joint"] if stage == 1 else []
    options = parse_args(["--stage", str(stage), "--gradient_checkpointing", mode, *losses, *lora])
    prepare(psa, options)
    for name, parameter in psa.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    prepare_language_model(psa, options)
    return psa.train()


def batch(psa, packed):
    """One sample with an image, one without."""
    image = psa.family.image_token_id
    text = [token for token in range(1, 14) if token != image][:12]
    span = psa.config.num_safety_tokens + psa.config.image_tokens
    samples = [[text[0], *[image] * span, *text[1:7]], text]
    width = max(map(len, samples))
    labels = [[-100] * (len(ids) - 4) + ids[-4:] for ids in samples]
    tensors = {
        "pixel_values": psa.family.blank_image(torch.device("cpu")).to(psa.vlm.dtype) + 0.3,
        "image_counts": torch.tensor([1, 0]),
        "safe_type": torch.tensor([2, -100]),
        "safe_level": torch.tensor([1, -100]),
    }
    if packed:
        tensors |= {"input_ids": torch.tensor([[*chain(*samples)]]), "labels": torch.tensor([[*chain(*labels)]])}
    else:
        tensors["input_ids"] = torch.tensor([ids + [text[0]] * (width - len(ids)) for ids in samples])
        tensors["labels"] = torch.tensor([ids + [-100] * (width - len(ids)) for ids in labels])
        tensors["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in samples])
    placed = {name: tensor.to(psa.vlm.device) for name, tensor in tensors.items()}
    return placed | ({"lengths": [len(ids) for ids in samples]} if packed else {})


def losses_and_gradients(psa, packed):
    torch.manual_seed(1)  # of LoRA's dropout
    out = psa(**batch(psa, packed))
    out.loss.backward()
    gradients = {name: p.grad for name, p in psa.named_parameters() if p.requires_grad}
    return torch.stack([out.loss_lm, out.loss_type, out.loss_level]), gradients


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
def test_recomputation_changes_nothing_but_how_often_layers_run(base, packed, stage):
    expected = None
    for mode, times in MODES.items():
        psa = build(base, packed, stage, mode=mode)
        ran = [0] * LAYERS

        def count(*_, layer, ran=ran):
            ran[layer] += 1

        for number, layer in enumerate(psa.vlm.model.language_model.layers):
            layer.self_attn.register_forward_pre_hook(lambda *_, n=number, count=count: count(layer=n))
        losses, gradients = losses_and_gradients(psa, packed)
        assert ran == times, mode
        tower = psa.vlm.model.vision_tower.modules()
        assert not any(getattr(module, "gradient_checkpointing", False) for module in tower)
        assert all(gradient is not None for gradient in gradients.values())
        expected = expected or (losses, gradients)
        torch.testing.assert_close(losses, expected[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients, expected[1], rtol=1e-9, atol=1e-12)


def test_liger_is_refused_where_it_cannot_run(base, tmp_path, monkeypatch):
    def check(folder):
        options = ["--stage1_objective", "joint", "--use_liger_kernel", "True", "--model_name_or_path", str(folder)]
        check_liger(parse_args(options))

    monkeypatch.setattr(language_model, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match=r"--use_liger_kernel needs .* pip install 'psa-fast\[gpu\]'"):
        check(base)
    monkeypatch.setattr(language_model, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--use_liger_kernel needs a CUDA device"):
        check(base)

    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check(base)
    config = AutoConfig.from_pretrained(base)
    config.text_config.hidden_act = "gelu"
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type 'llama', activation 'gelu'"):
        check(tmp_path)
    config.text_config = AutoConfig.for_model("stablelm", hidden_act="silu")
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Liger has no RMSNorm, RoPE and SwiGLU .* 'stablelm'"):
        check(tmp_path)


@pytest.fixture
def liger():
    """Liger's modules; what its patch changes for the whole process is put back."""
    liger = pytest.importorskip("liger_kernel.transformers")
    before = dict(vars(modeling_llama))
    yield liger
    vars(modeling_llama).update(before)


def test_liger_is_in_the_language_model_and_nowhere_else(base, liger):
    def with_own_forward(model):
        return {name for name, module in model.named_modules() if "forward" in vars(module)}

    psa = build(base)
    cross_entropy = torch.nn.functional.cross_entropy
    parameters, others = dict(psa.named_parameters()), with_own_forward(psa)
    language = psa.vlm.model.language_model
    apply_liger(language)

    parts = ("input_layernorm", "post_attention_layernorm", "mlp")
    wanted = {f"layers.{layer}.{part}" for layer in range(LAYERS) for part in parts} | {"norm"}
    assert with_own_forward(psa) - others == {f"vlm.model.language_model.{name}" for name in wanted}
    layer = language.layers[0]
    for norm in (language.norm, layer.input_layernorm, layer.post_attention_layernorm):
        assert norm.forward.__func__ is liger.LigerRMSNorm.forward
    assert layer.mlp.forward.__func__ is liger.LigerSwiGLUMLP.forward
    assert modeling_llama.apply_rotary_pos_emb is liger.liger_rotary_pos_emb
    # the loss, LoRA, names and parameters are as they were
    assert torch.nn.functional.cross_entropy is cross_entropy
    now = dict(psa.named_parameters())
    assert now.keys() == parameters.keys()
    assert all(now[name] is parameters[name] for name in now)


def test_liger_needs_no_weight_to_be_there(liger):
    """Under ZeRO-3 a rank holds empty shards when the model is patched; here no tensor has data at all."""
    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2))
    apply_liger(model)
    assert model.norm.forward.__func__ is liger.LigerRMSNorm.forward
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a CUDA device")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mode", ["none", "every_2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_liger_computes_what_transformers_does(base, liger, packed, mode, dtype, tolerance):
    losses, gradients = losses_and_gradients(build(base, packed, dtype=dtype, device="cuda", mode=mode), packed)
    patched = build(base, packed, dtype=dtype, device="cuda", mode=mode)
    apply_liger(patched.vlm.model.language_model)
    found_losses, found = losses_and_gradients(patched, packed)
    torch.testing.assert_close(found_losses, losses, rtol=tolerance, atol=tolerance)
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < tolerance, name
