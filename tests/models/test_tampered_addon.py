"""Whatever is done to an add-on's folder: it loads as it was, or one sentence names the file."""

import os
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
