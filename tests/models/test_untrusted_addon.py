"""What an add-on may say, and what is refused: its configuration, its adapter, its base's list of files."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from builders.tiny_vlm import SMALL, make_batch, make_vlm
from safetensors.torch import load_file, save_file

from psa_fast.models import PsaConfig, PsaVLM, add_lora, load_base
from psa_fast.models.addon import base_of, check_files, fingerprint, read_config
from psa_fast.models.lora import has_adapter, target_pattern
from psa_fast.training.recompute import recompute

FIELDS = {"vision_hidden_size": 24, "hidden_size": 40, "image_tokens": 16, "num_attention_heads": 5}


@pytest.fixture
def lora(tmp_path):
    """An add-on with LoRA; `build` makes its base."""
    torch.manual_seed(1)
    psa = PsaVLM.build(make_vlm(), num_safety_tokens=3, **SMALL).eval()
    add_lora(psa, r=4, alpha=8, dropout=0.0)
    with torch.no_grad():
        for name, parameter in psa.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    psa.save_addon(tmp_path / "addon")
    return psa, tmp_path / "addon"


def rewrite(file, **changes):
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def loss_of(psa):
    return psa.eval()(**make_batch(3)).loss


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 0),
        ("num_attention_heads", True),
        ("num_attention_heads", 7),
        ("hidden_size", 40.0),
        ("hidden_size", -40),
        ("hidden_size", 2**63),
        ("image_tokens", "16"),
        ("image_tokens", 0),
        ("image_tokens", 15),
        ("projector_depth", 10**7),
        ("projector_hidden_size", 0),
        ("num_head_tokens", 3 * 10**7),
        ("num_safety_tokens", -1),
        ("num_safety_tokens", None),
        ("layer_norm_eps", 0),
        ("layer_norm_eps", True),
        ("layer_norm_eps", 1e30),
        ("query", ["prompt"]),
        ("compat", False),
        ("risk_types", "politics"),
        ("risk_types", ["a", "a"]),
        ("risk_levels", [1, 2, 3, 4]),
        ("risk_levels", []),
        ("base_model_name_or_path", 7),
        ("base_model_name_or_path", ""),
        ("base_revision", "main"),
        ("base_fingerprint", {}),
        ("version", 6),
        ("version", True),
        ("version", "2"),
        ("checksums", "none"),
        ("checksums", {"psa.safetensors": 1}),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value(tmp_path, field, value):
    with pytest.raises(ValueError, match=re.escape(field) + ".*"):
        PsaConfig(**{**FIELDS, field: value})
    file = tmp_path / "psa_config.json"
    PsaConfig(**FIELDS).to_json_file(file)
    rewrite(file, **{field: value})
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: .*{field}"):
        PsaConfig.from_json_file(file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a":' * 100_000,
        '{"hidden_size": 1, "hidden_size": 2}',
        '{"hidden_size": NaN}',
        '{"x": "\\ud800"}',
    ],
)
def test_a_configuration_that_is_no_json_object_names_the_file(tmp_path, text):
    file = tmp_path / "psa_config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(file))) as error:
        PsaConfig.from_json_file(file)
    assert len(str(error.value)) < 200 + len(str(file))
    file.write_bytes(b'{"query": "pr\xf6mpt"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        PsaConfig.from_json_file(file)


def test_classes_of_another_taxonomy_are_refused(tmp_path):
    file = tmp_path / "psa_config.json"
    PsaConfig(**FIELDS).to_json_file(file)
    rewrite(file, risk_levels=["none", "medium", "low", "high"])
    with pytest.raises(ValueError, match=r"risk_levels is .*; this psa-fast knows none, low, medium, high"):
        PsaConfig.from_json_file(file)


def test_version_1_keeps_the_eps_it_was_trained_with(tmp_path):
    torch.manual_seed(1)
    psa = PsaVLM.build(
        make_vlm(),
        num_safety_tokens=3,
        layer_norm_eps=1e-6,
        query_window=0,
        neutral_query=False,
        reads_text=False,
        **SMALL,
    ).eval()
    psa.vlm.requires_grad_(False)
    psa.save_addon(tmp_path / "addon")
    # as version 1 wrote it: relative path of the base, neither eps nor checksums
    rewrite(
        tmp_path / "addon/psa_config.json",
        version=1,
        layer_norm_eps=...,
        checksums=...,
        neutral_query=...,
        query_window=...,
        reads_text=...,
        num_text_tokens=...,
        base_model_name_or_path="runs/base",
    )
    loaded = PsaVLM.from_pretrained(make_vlm(), tmp_path / "addon")
    assert torch.equal(loss_of(loaded), loss_of(psa))
    norms = [m for m in loaded.bottleneck.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert norms
    assert {m.eps for m in norms} == {1e-6}
    loaded.vlm.requires_grad_(False)
    loaded.save_addon(tmp_path / "again")  # stage 2 writes version 2, which says so
    again = json.loads((tmp_path / "again/psa_config.json").read_text())
    assert (again["version"], again["layer_norm_eps"]) == (5, 1e-6)
    assert torch.equal(loss_of(PsaVLM.from_pretrained(make_vlm(), tmp_path / "again")), loss_of(psa))
    new = PsaVLM.build(make_vlm(), num_safety_tokens=3, **SMALL)
    assert {m.eps for m in new.bottleneck.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
        ({"peft_type": ...}, "lacks: peft_type"),
        ({"target_modules": "(.*.*)*x"}, "target_modules is"),
        ({"target_modules": ["q_proj"]}, "target_modules is"),
        ({"target_modules": "all-linear"}, "target_modules is"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": 5}, "not rank 5"),
        ({"lora_alpha": 1e30}, r"alpha is 1e\+30"),
        ({"lora_alpha": -8}, "alpha is -8"),
        ({"lora_alpha": "8"}, "alpha is '8'"),
        ({"lora_dropout": 1}, "dropout is 1"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"bias": None}, "bias is None"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": False}, "init_lora_weights is False"),
        ({"use_dora": True}, "use_dora is True"),
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"megatron_core": "os"}, "megatron_core is 'os'"),
        ({"exclude_modules": "x"}, "exclude_modules is 'x'"),
        ({"of_a_later_peft": "on"}, "of_a_later_peft is 'on'"),
    ],
)
def test_an_adapter_is_plain_lora_on_every_linear_of_the_language_model(lora, changes, sentence):
    _, addon = lora
    file = addon / "adapter/adapter_config.json"
    rewrite(file, **changes)
    vlm = make_vlm()
    with pytest.raises(ValueError, match=re.escape(str(addon)) + ".*" + sentence.replace(" is", "'? is", 1)):
        PsaVLM.from_pretrained(vlm, addon)
    assert not has_adapter(vlm)


def test_what_other_versions_of_peft_write_beside_it_does_not_matter(lora):
    psa, addon = lora
    file = addon / "adapter/adapter_config.json"
    # of_a_later_peft is off; 0.18 has no monteclora_config
    rewrite(
        file,
        peft_version="0.18.0",
        of_a_later_peft=None,
        another={},
        monteclora_config=...,
        base_model_name_or_path="somebody/else",
    )
    loaded = PsaVLM.from_pretrained(make_vlm(), addon)
    assert torch.equal(loss_of(loaded), loss_of(psa))
    # the pattern that every version of psa-fast has written
    leaves = "down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj"
    assert json.loads(file.read_text())["target_modules"] == rf"model\.language_model\.(?:.*\.)?(?:{leaves})"
    with pytest.raises(ValueError, match="no linear layers"):
        target_pattern(PsaVLM.build(make_vlm(layers=0), num_safety_tokens=3, **SMALL))


def test_transformers_knows_of_the_adapter(lora, tmp_path):
    """Its own paths that ask for one: saving writes no stock weights, checkpointing and generating go on."""
    psa, _ = lora
    assert has_adapter(psa.vlm)
    assert not has_adapter(make_vlm())
    with pytest.raises(ValueError, match="already"):
        add_lora(psa, r=2, alpha=2)
    with contextlib.suppress(ValueError):  # transformers 5.24 asks for a PEFT that there is not
        psa.vlm.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved/adapter_model.safetensors").exists()
    assert not (tmp_path / "saved/model.safetensors").exists()
    batch = make_batch(3)
    expected = {}
    for checkpointing in (False, True):
        psa.train()
        if checkpointing:
            recompute(psa.vlm, 1)
        psa.zero_grad()
        psa(**batch).loss.backward()
        got = {n: p.grad.clone() for n, p in psa.named_parameters() if ".lora_" in n}
        assert all(g.abs().max() > 0 for n, g in got.items())
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient)
        expected = got
    psa.vlm.gradient_checkpointing_disable()
    psa.eval()
    ids = batch["input_ids"][2:, :8]
    assert psa.generate(ids, image_counts=[0], max_new_tokens=3).shape == (1, 3)


def test_stale_parts_of_an_older_addon_in_the_folder_go(lora, tmp_path):
    _, addon = lora
    (addon / "notes.txt").write_text("mine")
    plain = PsaVLM.build(make_vlm(), num_safety_tokens=3, **SMALL)
    plain.vlm.requires_grad_(False)
    plain.save_addon(addon)
    assert sorted(p.name for p in addon.iterdir()) == ["notes.txt", "psa.safetensors", "psa_config.json"]
    assert not has_adapter(PsaVLM.from_pretrained(make_vlm(), addon).vlm)


@pytest.mark.parametrize("name", ["adapter", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"])
def test_half_an_addon_is_not_loaded_as_a_whole_one(lora, name):
    _, addon = lora
    path = addon / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=re.escape(str(path))):
        check_files(addon)


@pytest.mark.parametrize("shape", [(), (4,), (40, 4, 1), (40, 5), (0, 4)])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapters_tensor_of_another_shape_is_refused(lora, part, shape):
    _, addon = lora
    file = addon / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if f"q_proj.{part}" in n)
    save_file({**tensors, name: torch.zeros(shape[::-1] if part == "lora_A" else shape)}, file)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}: .*shape"):
        PsaVLM.from_pretrained(make_vlm(), addon)


def test_numbers_that_changed_after_saving_are_seen_and_may_be_meant(lora):
    psa, addon = lora
    file = addon / "adapter/adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} holds other numbers than were saved"):
        PsaVLM.from_pretrained(make_vlm(), addon)
    rewrite(addon / "psa_config.json", checksums=...)
    assert not torch.equal(loss_of(PsaVLM.from_pretrained(make_vlm(), addon)), loss_of(psa))


def test_numbers_beyond_the_bases_dtype_are_refused(lora):
    _, addon = lora
    rewrite(addon / "psa_config.json", checksums=...)
    file = addon / "psa.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "safety_tokens.weight": torch.full((3, 40), 1e30)}, file)
    with pytest.raises(ValueError, match=r"safety_tokens.weight holds numbers beyond the range of torch\.float16"):
        PsaVLM.from_pretrained(make_vlm(dtype=torch.float16), addon)


def test_reading_the_files_draws_no_random_number(lora):
    _, addon = lora
    torch.manual_seed(5)
    check_files(addon)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


def test_changed_base_weights_must_be_the_bases(lora):
    _, addon = lora
    rewrite(addon / "psa_config.json", checksums=...)
    (addon / "llm").mkdir()
    file = addon / "llm/model.safetensors"
    for tensors, sentence in (
        ({"model.language_model.norm.weights": torch.ones(40)}, "unexpected"),
        ({"bottleneck.heads.bias": torch.ones(11)}, "unexpected"),
        ({"lm_head.weight": torch.ones(98, 40)}, "shape"),
        ({"lm_head.weight": torch.ones(99, 40, dtype=torch.int8)}, "holds I8; expected F16, BF16, F32, F64"),
        ({"lm_head.weight": torch.full((99, 40), float("nan"))}, "not finite"),
    ):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{sentence}"):
            PsaVLM.from_pretrained(make_vlm(), addon)


def test_a_local_base_is_remembered_by_its_absolute_folder(tmp_path, monkeypatch):
    make_vlm().save_pretrained(tmp_path / "here/base")
    monkeypatch.chdir(tmp_path / "here")
    psa = PsaVLM.build(load_base("base", torch.float32), num_safety_tokens=3, **SMALL)
    psa.vlm.requires_grad_(False)
    psa.save_addon(tmp_path / "addon")
    assert read_config(tmp_path / "addon").base_model_name_or_path == str(tmp_path / "here/base")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    assert torch.equal(loss_of(PsaVLM.from_pretrained(None, tmp_path / "addon")), loss_of(psa))
    shutil.move(tmp_path / "here", tmp_path / "moved")

    def no_hub(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("psa_fast.models.base_model.resolve_revision", no_hub)
    sentence = r"psa_config\.json: the base was at '.*here/base'.*; give it with --base"
    with pytest.raises(ValueError, match=sentence):
        PsaVLM.from_pretrained(None, tmp_path / "addon")
    # an older add-on, which kept the words typed
    rewrite(tmp_path / "addon/psa_config.json", base_model_name_or_path="here/base")
    with pytest.raises(ValueError, match="the base was at 'here/base'"):
        PsaVLM.from_pretrained(None, tmp_path / "addon")
    on_hub = PsaConfig(**FIELDS, base_model_name_or_path="some/base", base_revision="1" * 40)
    assert base_of(tmp_path / "addon", on_hub) == "some/base"
    assert on_hub.revision_of("some/base") == "1" * 40


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/etc/passwd", "a/../../b", "..\\x", 7, None, "gone.safetensors"]
)
def test_a_base_whose_index_leads_elsewhere_is_not_read(tmp_path, name):
    base = tmp_path / "base"
    make_vlm().save_pretrained(base, max_shard_size="40KB")
    index = base / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    assert fingerprint(base)
    whole["weight_map"][next(iter(whole["weight_map"]))] = name
    index.write_text(json.dumps(whole))
    for read in (fingerprint, lambda folder: load_base(folder, torch.float32)):
        with pytest.raises(ValueError, match=f"base {re.escape(str(index))} lists "):
            read(base)
    index.write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match="weight_map is"):
        fingerprint(base)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(lora):
    _, addon = lora
    for name in ("psa.safetensors", "psa_config.json"):
        file = addon / name
        kept = Path(f"{file}.kept")
        file.rename(kept)
        os.mkfifo(file)
        with pytest.raises(ValueError, match=re.escape(name)):
            check_files(addon)
        file.unlink()
        kept.rename(file)
    check_files(addon)
