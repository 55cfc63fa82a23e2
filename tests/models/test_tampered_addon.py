"""Whatever is done to an add-on's folder: it loads as it was, or one sentence names the file."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_vlm import SMALL, make_batch, make_vlm

from psa_fast.models import PsaVLM, add_lora

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
from addons import DAMAGES, judge, tamper

COUNT = int(os.environ.get("PSA_FUZZ_ADDONS", 3 * len(DAMAGES)))
SEED = int(os.environ.get("PSA_FUZZ_SEED", 0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An add-on with all of its parts: LoRA, and base weights that were trained beside it."""
    folder = tmp_path_factory.mktemp("whole")
    make_vlm(layers=1).save_pretrained(folder / "base")
    vlm = make_vlm(layers=1)
    torch.manual_seed(1)
    psa = PsaVLM.build(vlm, num_safety_tokens=3, **SMALL)
    add_lora(psa, r=4, alpha=8, dropout=0.1)
    psa.family.module(psa.vlm, "connector").requires_grad_(True)
    with torch.no_grad():
        for name, parameter in psa.named_parameters():
            if "lora_B" in name or "multi_modal_projector" in name:
                parameter.normal_(std=0.05)
    psa.save_addon(folder / "addon")
    return folder


def outputs(addon):
    psa = PsaVLM.from_pretrained(make_vlm(layers=1), addon).eval()
    with torch.no_grad():
        out = psa(**make_batch(3))
    # in training LoRA's dropout acts as well
    dropout = torch.tensor([m.p for m in psa.modules() if isinstance(m, torch.nn.Dropout)])
    return {"loss": out.loss, "concept_logits": out.concept_logits, "dropout": dropout}


def test_a_tampered_addon_loads_as_it_was_or_is_refused_with_its_path(whole, tmp_path):
    original = outputs(whole / "addon")
    assert judge(whole / "addon", outputs, original) is None
    assert judge(whole / "addon", outputs, {**original, "loss": original["loss"] + 1}) is not None
    wrong = []
    for what, folder in tamper(whole / "addon", tmp_path, SEED, COUNT):
        problem = judge(folder, outputs, original)
        if problem:
            wrong.append(f"{what}: {problem}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("key", "value"), [("projector_depth", 10_000), ("num_head_tokens", 1_000_000)])
def test_sizes_are_compared_before_memory_is_taken(whole, tmp_path, key, value):
    import json
    import shutil

    shutil.copytree(whole / "addon", tmp_path / "addon")
    file = tmp_path / "addon/psa_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, key: value}))
    start = time.perf_counter()
    # before the base is asked for: there is none of that name
    with pytest.raises(ValueError, match=f"{file}.*{key} {value}|{file.parent}/psa.safetensors: .*shape"):
        PsaVLM.from_pretrained(tmp_path / "no-base", tmp_path / "addon")
    assert time.perf_counter() - start < 2


def swap_bytes(file, place=-3):
    """Change a byte among the numbers, which stay finite."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("part", ["psa.safetensors", "adapter/adapter_model.safetensors"])
def test_other_numbers_are_refused_before_the_base_is_read(whole, tmp_path, monkeypatch, part):
    shutil.copytree(whole / "addon", tmp_path / "addon")
    swap_bytes(tmp_path / "addon" / part)
    monkeypatch.setattr("psa_fast.models.addon.load_base", lambda *_, **__: pytest.fail("the base was read"))
    with pytest.raises(ValueError, match=f"{part}.* holds other numbers than were saved"):
        PsaVLM.from_pretrained(whole / "base", tmp_path / "addon")


@pytest.mark.parametrize("part", ["psa.safetensors", "llm/model.safetensors", "adapter/adapter_model.safetensors"])
def test_a_tensor_that_is_named_twice_is_refused(whole, tmp_path, part):
    shutil.copytree(whole / "addon", tmp_path / "addon")
    file = tmp_path / "addon" / part
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode().rstrip()
    name, place = next((n, p) for n, p in json.loads(header).items() if n != "__metadata__")
    twice = f"{header[:-1]}, {json.dumps(name)}: {json.dumps(place)}}}".encode()
    file.write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + size :])
    with pytest.raises(ValueError, match=f"{part}.*stands twice"):
        PsaVLM.from_pretrained(make_vlm(layers=1), tmp_path / "addon")
