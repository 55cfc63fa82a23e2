"""Saving and loading: the base untouched, the add-on complete, anything that does not fit an error."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from builders.tiny_vlm import IMAGE_ID, SMALL, make_batch, make_vlm
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from psa_fast.models import PsaVLM, add_lora, base_model, commit_of, get_family, load_base, load_processor
from psa_fast.models.addon import base_identity, fingerprint
from psa_fast.training.config import parse_args
from psa_fast.training.model_building import build_model


@pytest.fixture
def base(tmp_path):
    make_vlm().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def build(base, tokens=3, **kwargs):
    vlm = AutoModelForImageTextToText.from_pretrained(base)
    torch.manual_seed(1)
    return PsaVLM.build(vlm, num_safety_tokens=tokens, **{**SMALL, **kwargs}).eval()


def same_outputs(a, b):
    batch = make_batch(3)
    x, y = a(**batch), b(**batch)
    assert torch.equal(x.loss, y.loss)
    assert torch.equal(x.concept_logits, y.concept_logits)


def test_stage_1_round_trip_leaves_the_base_alone(base, tmp_path):
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    psa = build(base)
    psa.vlm.requires_grad_(False)
    psa.save_addon(tmp_path / "addon")
    assert sorted(p.name for p in (tmp_path / "addon").iterdir()) == ["psa.safetensors", "psa_config.json"]
    same_outputs(psa, PsaVLM.from_pretrained(base, tmp_path / "addon").eval())
    same_outputs(psa, PsaVLM.from_pretrained(None, tmp_path / "addon").eval())  # the add-on names its base
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before
    # the head's second forward is invisible to Hugging Face: keys, class of the model, saving
    psa.vlm.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    new = PsaVLM.from_pretrained(base, dtype=torch.bfloat16)
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}


def test_missing_unexpected_and_foreign_are_errors(base, tmp_path):
    psa = build(base)
    psa.vlm.requires_grad_(False)
    psa.save_addon(tmp_path / "addon")
    file = tmp_path / "addon/psa.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "safety_tokens.weight"}, file)
    with pytest.raises(ValueError, match=r"missing.*safety_tokens\.weight"):
        PsaVLM.from_pretrained(base, tmp_path / "addon")
    save_file({**tensors, "bottleneck.extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"unexpected.*bottleneck\.extra"):
        PsaVLM.from_pretrained(base, tmp_path / "addon")
    save_file({**tensors, "safety_tokens.weight": torch.zeros(4, 40)}, file)
    with pytest.raises(ValueError, match="shape"):
        PsaVLM.from_pretrained(base, tmp_path / "addon")
    save_file(tensors, file)
    torch.manual_seed(9)
    other = make_vlm()
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another base"):
        PsaVLM.from_pretrained(tmp_path / "other", tmp_path / "addon")
    make_vlm(hidden=30).save_pretrained(tmp_path / "narrow")
    config = json.loads((tmp_path / "addon/psa_config.json").read_text())
    (tmp_path / "addon/psa_config.json").write_text(json.dumps({**config, "base_fingerprint": None}))
    with pytest.raises(ValueError, match="hidden_size 40, the base 30"):
        PsaVLM.from_pretrained(tmp_path / "narrow", tmp_path / "addon")
    with pytest.raises(ValueError, match=r"no psa_config\.json"):
        PsaVLM.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match="lacks"):
        psa.save_addon(tmp_path / "addon2", {"safety_tokens.weight": torch.zeros(3, 40)})


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Puts a commit of some/base into a cache as huggingface_hub lays it out, and makes it the main one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub/models--some--base"

    def go(commit, vlm):
        vlm.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs/main").write_text(commit)
        return repository / "snapshots" / commit

    return go


def test_a_base_from_the_hub_is_known_by_its_commit_and_its_weights(publish, tmp_path):
    first, second, third = "1" * 40, "2" * 40, "3" * 40
    snapshot = publish(first, make_vlm())
    psa = PsaVLM.build(load_base("some/base", torch.float32), num_safety_tokens=3, **SMALL).eval()
    psa.vlm.requires_grad_(False)
    psa.save_addon(tmp_path / "addon")
    saved = json.loads((tmp_path / "addon/psa_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["base_revision"]) == ("some/base", first)
    shutil.copytree(snapshot, tmp_path / "copy")
    for variant in ("consolidated.safetensors", "model.fp16.safetensors"):  # `hf download` fetches these too
        (tmp_path / "copy" / variant).write_bytes(b"the same once more, in another layout")
    same_outputs(psa, PsaVLM.from_pretrained(tmp_path / "copy", tmp_path / "addon").eval())
    publish(second, make_vlm())  # another README, say
    same_outputs(psa, PsaVLM.from_pretrained(load_base("some/base", torch.float32), tmp_path / "addon").eval())

    other = make_vlm()
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    publish(third, other)
    for base in (None, "some/base"):  # the commit that the add-on names
        same_outputs(psa, PsaVLM.from_pretrained(base, tmp_path / "addon").eval())
    # training goes on with the add-on's commit too
    options = ["--model_name_or_path", "some/base", "--num_safety_tokens", "3", "--dtype", "fp32"]
    options += ["--query_window", str(psa.config.query_window)]
    options += [f"--{name}={SMALL[name]}" for name in ("num_head_tokens", "num_attention_heads", "projector_depth")]
    for objective in ("joint", "concept"):
        config = parse_args([*options, "--stage1_objective", objective])
        model, _ = build_model(config, {"zero_optimization": {"stage": 2}}, str(tmp_path / "addon"))
        assert (commit_of(model.vlm), model.config.base_revision) == (first, first)
    sentence = f"another base than some/base: .*revision {first}, found {third}; `hf download .* --revision {first}"
    for whole in (True, False):
        base = load_base("some/base", torch.float32, language_layers=whole)
        with pytest.raises(ValueError, match=sentence):
            PsaVLM.from_pretrained(base, tmp_path / "addon")

    # without safetensors there is nothing but the commit
    (tmp_path / "addon/psa_config.json").write_text(json.dumps({**saved, "base_fingerprint": None}))
    with pytest.raises(ValueError, match=f"another base than some/base: revision {first}, found {third}"):
        PsaVLM.from_pretrained(base, tmp_path / "addon")


def test_a_commit_that_was_not_resolved_is_taken_from_the_cache_or_said_to_be_unknown(publish, monkeypatch):
    publish("1" * 40, make_vlm())
    # what transformers makes of 401, 429 and a failing proxy
    monkeypatch.setattr(base_model, "resolve_revision", lambda name, revision=None: revision)
    known = base_identity(load_base("some/base", torch.float32))
    assert known["base_revision"] == "1" * 40
    assert known["base_fingerprint"]
    monkeypatch.setattr(base_model, "cached_file", lambda *_, **__: None)
    with pytest.warns(UserWarning, match="some/base: its commit is not known"):
        unknown = base_identity(load_base("some/base", torch.float32))
    assert unknown == {"base_model_name_or_path": "some/base", "base_revision": None, "base_fingerprint": None}


def test_a_fingerprint_is_of_the_files_that_are_loaded(base):
    make_vlm().save_pretrained(base.parent / "shards", max_shard_size="40KB")
    shards = sorted((base.parent / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    before = fingerprint(base.parent / "shards")
    shutil.copy(shards[0], base.parent / "shards/model.fp16-00001-of-00002.safetensors")
    assert fingerprint(base.parent / "shards") == before
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1] + b"\x00")
    assert fingerprint(base.parent / "shards") not in (before, None)
    (base / "model.safetensors").rename(base / "model.fp16.safetensors")
    assert fingerprint(base) is None


def test_a_base_that_lacks_weights_is_refused_under_an_addon_too(base):
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "multi_modal_projector" in name)
    save_file({n: t for n, t in tensors.items() if n != name}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: .*multi_modal_projector"):
        PsaVLM.from_pretrained(base)


def train_step(psa):
    psa.train()
    optimizer = torch.optim.AdamW([p for p in psa.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # the first step of LoRA moves B only
        psa(**make_batch(3)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    psa.eval()


def test_lora_round_trip_and_use_on_the_stock_base(base, tmp_path):
    from peft import PeftModel

    psa = build(base)
    names = add_lora(psa, r=4, alpha=8, dropout=0.0)
    assert len(names) == 2 * 7
    assert all(n.startswith("model.language_model.layers.") for n in names)
    with_lora = {n.split(".lora_A")[0] for n, _ in psa.vlm.named_modules() if ".lora_A" in n}
    assert with_lora == set(names)
    assert all(p.requires_grad for n, p in psa.named_parameters() if "lora_" in n or not n.startswith("vlm."))
    assert not any(p.requires_grad for n, p in psa.vlm.named_parameters() if "lora_" not in n)
    with pytest.raises(ValueError, match="already"):
        add_lora(psa)
    train_step(psa)
    gathered = {n: p.detach().clone() for n, p in psa.named_parameters() if p.requires_grad}
    psa.save_addon(tmp_path / "addon", gathered)  # trainables only, as a ZeRO-3 trainer gathers them
    assert sorted(p.name for p in (tmp_path / "addon/adapter").iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PsaVLM.from_pretrained(base, tmp_path / "addon").eval()
    same_outputs(psa, loaded)
    loaded.save_addon(tmp_path / "again")
    first, second = (load_file(tmp_path / d / "adapter/adapter_model.safetensors") for d in ("addon", "again"))
    assert all(torch.equal(first[k], second[k]) for k in first | second)

    stock = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), tmp_path / "addon/adapter")
    embeds = torch.randn(1, 5, 40)
    torch.testing.assert_close(stock(inputs_embeds=embeds).logits, psa.vlm(inputs_embeds=embeds).logits)
    plain = LlavaForConditionalGeneration.from_pretrained(base)(inputs_embeds=embeds).logits
    assert (plain - psa.vlm(inputs_embeds=embeds).logits).abs().max() > 1e-4

    file = tmp_path / "addon/adapter/adapter_model.safetensors"
    save_file(dict(list(first.items())[1:]), file)
    with pytest.raises(ValueError, match=r"missing|other numbers"):
        PsaVLM.from_pretrained(base, tmp_path / "addon")


@pytest.mark.parametrize("tied", [False, True])
def test_full_training_round_trip(tmp_path, tied):
    make_vlm(tied=tied).save_pretrained(tmp_path / "base")
    psa = build(tmp_path / "base")
    psa.vlm.requires_grad_(False)
    psa.family.module(psa.vlm, "language").requires_grad_(True)
    psa.family.module(psa.vlm, "lm_head").requires_grad_(True)
    train_step(psa)
    psa.save_addon(tmp_path / "addon")
    saved = load_file(tmp_path / "addon/llm/model.safetensors")
    assert ("lm_head.weight" in saved) is not tied
    assert not any(n.startswith(("model.vision_tower", "model.multi_modal")) for n in saved)
    loaded = PsaVLM.from_pretrained(tmp_path / "base", tmp_path / "addon").eval()
    same_outputs(psa, loaded)
    loaded.requires_grad_(False)
    loaded.save_addon(tmp_path / "again")  # frozen by now, still part of the add-on
    same_outputs(psa, PsaVLM.from_pretrained(tmp_path / "base", tmp_path / "again").eval())


def test_base_weights_trained_beside_lora_are_kept(base, tmp_path):
    psa = build(base)
    add_lora(psa, r=2, alpha=4, dropout=0.0)
    psa.family.module(psa.vlm, "connector").requires_grad_(True)
    psa.vlm.model.language_model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    train_step(psa)
    psa.save_addon(tmp_path / "addon")
    assert len(load_file(tmp_path / "addon/llm/model.safetensors")) == 5
    same_outputs(psa, PsaVLM.from_pretrained(base, tmp_path / "addon").eval())


@pytest.mark.parametrize(
    ("tower", "strategy", "tokens"), [("clip", "default", 16), ("clip", "full", 17), ("siglip", "full", 16)]
)
def test_processor_expands_every_image_to_safety_tokens_and_image_tokens(tmp_path, tower, strategy, tokens):
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    vlm = make_vlm(tower=tower, strategy=strategy)
    family = get_family(vlm)
    assert family.image_tokens() == tokens
    vocab = {"<unk>": 0, "a": 1, **{f"w{i}": i for i in range(2, IMAGE_ID)}, "<image>": IMAGE_ID}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    vlm.save_pretrained(tmp_path)
    LlavaProcessor(images, tokenizer).save_pretrained(tmp_path)  # with the class defaults, off by one for CLIP
    picture = Image.new("RGB", (20, 16))
    for config, n in (
        (None, 0),
        (PsaVLM.build(vlm, num_safety_tokens=3, **{**SMALL}).config if tokens == 16 else None, 3),
    ):
        if config is None and n:
            continue
        processor = load_processor(tmp_path, config)
        family.extend_processor(processor, n)  # a second time changes nothing
        out = processor(images=[picture, picture], text=["a <image> a <image>"], return_tensors="pt")
        assert (out["input_ids"] == IMAGE_ID).sum() == 2 * (n + tokens)
        features = family.encode_images(vlm, out["pixel_values"])
        assert features.vision.shape == (2, tokens, 24)
        assert features.projected.shape == (2, tokens, 40)


def test_vision_features_are_the_ones_hf_projects():
    for kwargs in (
        {},
        {"layer": -1},
        {"layer": 1},
        {"layer": [1, 2]},
        {"tower": "siglip", "strategy": "full"},
    ):
        vlm = make_vlm(**kwargs)
        pixels = torch.randn(2, 3, 16, 16)
        family = get_family(vlm)
        ours = family.encode_images(vlm, pixels)
        theirs = torch.stack(vlm.model.get_image_features(pixels).pooler_output)
        assert torch.equal(ours.projected, theirs)
        assert torch.equal(family.encode_images(vlm, pixels).vision, ours.vision)
        assert len(vlm.model.vision_tower.encoder.layers) == 3


def test_other_families_are_refused_with_a_sentence():
    from types import SimpleNamespace

    with pytest.raises(ValueError, match=r"'qwen9' is not supported; supported: .*llava"):
        get_family(SimpleNamespace(config=SimpleNamespace(model_type="qwen9")))
