"""`psa-fast export`: what transformers alone loads from the folder is the guarded model's language path."""

import json
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from builders import tiny_families, tiny_llava
from builders.stage2 import trained
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from psa_fast.cli import main
from psa_fast.models import PsaVLM, load_base, load_processor
from psa_fast.models.families import Rows
from psa_fast.models.lora import target_linears
from psa_fast.models.stock_folder import SAFETY_KEY, SAFETY_TOKENS
from psa_fast.safety.load import addon_hash

QUESTION = "what colour is the circle ?"


def export(addon, out, *more):
    return main([*map(str, ("export", "--model", addon, "--out", out, *more))])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llava.build_base(tmp_path_factory.mktemp("export") / "base")


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    """An add-on with an adapter and a tuned connector, and its export."""
    root = tmp_path_factory.mktemp("exported")
    addon = trained(base, root / "stage2", lora=True, full=("connector",))
    assert export(addon, root / "out") == 0
    return addon, root / "out"


def language_path(psa, processor, tokens):
    """Logits [1, T, V] of PsaVLM's own path for one picture and the question; `tokens`: with the safety tokens."""
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=tiny_llava.picture(5), text=text, return_tensors="pt")
    ids = inputs["input_ids"]
    rows = Rows(ids, psa.family.embed(psa.vlm, ids), inputs["attention_mask"], None)
    none = torch.zeros(1, 0, psa.config.hidden_size)
    features = psa.encode_images(inputs["pixel_values"]).projected
    hidden = psa.family.states(psa.vlm, rows, psa.safety_tokens if tokens else lambda n: none, features)
    return psa.family.module(psa.vlm, "lm_head")(hidden)


# run where psa_fast cannot be imported: the folder is all that it has
ALONE = """
import sys
sys.modules["psa_fast"] = None
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, picture, question, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
text = processor.apply_chat_template([turn], add_generation_prompt=True)
inputs = processor(images=Image.open(picture), text=text, return_tensors="pt")
with torch.no_grad():
    plain = model(**inputs).logits
    tokens = load_file(folder + "/psa/safety_tokens.safetensors")["safety_tokens.weight"]
    row, image = inputs["input_ids"][0], model.config.image_token_id
    first = (row == image).nonzero()[0].item()
    rows = model.get_input_embeddings()(row)
    rows[row == image] = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    embeds = torch.cat([rows[:first], tokens, rows[first:]])[None]
    safe = model(inputs_embeds=embeds).logits
    answer = model.generate(**inputs, max_new_tokens=3)
save_file({"plain": plain, "safe": safe, "answer": answer}, out)
"""


def test_transformers_alone_computes_what_the_guarded_model_does(base, exported, tmp_path):
    addon, out = exported
    tiny_llava.picture(5).save(tmp_path / "picture.png")
    argv = [sys.executable, "-c", ALONE, out, tmp_path / "picture.png", QUESTION, tmp_path / "logits.safetensors"]
    done = subprocess.run([*map(str, argv)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")
    psa = PsaVLM.from_pretrained(base, addon).eval()
    with torch.no_grad():
        plain = language_path(psa, load_processor(base), tokens=False)
        safe = language_path(psa, load_processor(base, psa.config), tokens=True)
    torch.testing.assert_close(found["plain"], plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["safe"], safe, atol=1e-5, rtol=1e-5)
    assert (plain[0, -1] - safe[0, -1]).abs().max() > 1e-3  # the tokens matter
    stock = AutoModelForImageTextToText.from_pretrained(base)
    changed = [n for n, p in stock.state_dict().items() if not torch.equal(p, psa_weights(out)[n])]
    assert any("multi_modal_projector" in name for name in changed)
    assert not any("vision_tower" in name or "embed_tokens" in name for name in changed)


def psa_weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_the_folder_holds_no_more_than_it_says(exported, tmp_path, capsys):
    addon, out = exported
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "processor_config.json", SAFETY_TOKENS, "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    for words in ("Not guarded", "3 safety tokens", SAFETY_TOKENS, "folder named `stage2`", addon_hash(addon)):
        assert words in card
    assert str(addon.parent) not in card + (out / "config.json").read_text()  # whose machine it was
    assert export(addon, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "Not guarded" in printed
    assert "Without its 3 safety tokens" in printed
    assert "float32" in printed


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_merged_weights_are_the_sums_of_fp64(family, tmp_path):
    base = tiny_families.build_folder(family, tmp_path / "base")
    addon = trained(base, tmp_path / "addon", lora=True, tokens=0)
    assert export(addon, tmp_path / "out") == 0
    found, wanted = psa_weights(tmp_path / "out"), psa_weights(base)
    saved = load_file(addon / "adapter" / "adapter_model.safetensors")
    on = {name: f"base_model.model.{name}" for name in target_linears(PsaVLM.from_pretrained(base))}
    for name, key in on.items():
        a, b = (saved[f"{key}.lora_{which}.weight"].double() for which in "AB")
        weight = wanted[f"{name}.weight"].double() + 8 / 2 * b @ a
        torch.testing.assert_close(found[f"{name}.weight"].double(), weight, atol=1e-6, rtol=1e-6)
        assert (weight - wanted[f"{name}.weight"]).abs().max() > 1e-3
    assert found.keys() == wanted.keys()
    others = found.keys() - {f"{name}.weight" for name in on}
    assert all(torch.equal(found[name], wanted[name]) for name in others)
    assert not (tmp_path / "out" / "psa").exists()  # no safety tokens: nothing is missing from the language path
    assert "safety tokens" not in (tmp_path / "out" / "README.md").read_text()
    AutoTokenizer.from_pretrained(tmp_path / "out")
    AutoImageProcessor.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_weights_trained_in_full_are_in_place_and_a_tied_head_stays_tied(tied, tmp_path):
    vlm, tokenizer = tiny_families.build("llava", torch.float32, tied)
    base = tiny_families.build_folder("llava", tmp_path / "base")
    vlm.save_pretrained(base)
    addon = trained(base, tmp_path / "addon", full=("language", "lm_head"))
    assert export(addon, tmp_path / "out") == 0
    trained_weights = load_file(addon / "llm" / "model.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in trained_weights.items())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.endswith("lm_head.weight") for name in stored) is not tied
    own = PsaVLM.from_pretrained(base, addon).eval().vlm
    ids = torch.tensor([tokenizer("what is this ?")["input_ids"]])
    torch.testing.assert_close(model.eval()(ids).logits, own(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_merge_in_half_precision_is_rounded_once(base, tmp_path):
    addon = trained(base, tmp_path / "addon", lora=True)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert export(addon, tmp_path / name, "--dtype", name) == 0
        half, whole = load_base(base, dtype), PsaVLM.from_pretrained(base, addon, dtype)
        found = psa_weights(tmp_path / name)
        for layer in target_linears(PsaVLM.from_pretrained(base)):
            a, b = (whole.vlm.get_submodule(f"{layer}.lora_{w}.default").weight.float() for w in "AB")
            exact = half.get_submodule(layer).weight.float() + 4 * b @ a
            assert found[f"{layer}.weight"].dtype == dtype
            torch.testing.assert_close(
                found[f"{layer}.weight"].float(), exact, atol=1e-6, rtol=torch.finfo(dtype).eps / 2
            )
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(base, exported, tmp_path, capsys):
    addon, out = exported
    first = trained(base, tmp_path / "stage1")
    for argv, sentence in (
        ((first, tmp_path / "out"), "so there is nothing to merge: the stock folder is the base itself"),
        ((addon, out), "exists; name a folder that is not there yet"),
        ((tmp_path, tmp_path / "out"), "is not a PSA add-on"),
        ((addon, tmp_path / "out", "--base", tmp_path / "none"), "there is no such folder"),
        ((addon, tmp_path / "out", "--base", out), "was trained on another base"),
    ):
        assert export(*argv) == 2
        assert sentence in capsys.readouterr().err
    huge = trained(base, tmp_path / "huge", lora=True)
    weights = load_file(huge / "adapter" / "adapter_model.safetensors")
    save_file(
        {name: torch.full_like(t, 3e4) for name, t in weights.items()}, huge / "adapter/adapter_model.safetensors"
    )
    config = json.loads((huge / "psa_config.json").read_text()) | {"checksums": None}
    (huge / "psa_config.json").write_text(json.dumps(config))
    assert export(huge, tmp_path / "out", "--dtype", "fp16") == 2
    assert "beyond the range of torch.float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_is_full_leaves_nothing(exported, tmp_path, monkeypatch, capsys):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("psa_fast.models.stock_folder.write_tensors", fail)
    assert export(exported[0], tmp_path / "out") == 2
    assert "out: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_layout_are_not_taken_along(base, exported, tmp_path):
    # vLLM would load consolidated.safetensors in place of what was merged
    shutil.copytree(base, tmp_path / "base")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md", "LICENSE.txt"):
        (tmp_path / "base" / name).write_text("the base's")
    assert export(exported[0], tmp_path / "out", "--base", tmp_path / "base") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names & {"consolidated.safetensors", "pytorch_model.bin", "LICENSE.txt"} == {"LICENSE.txt"}
    assert "the base's" not in (tmp_path / "out" / "README.md").read_text()
    assert load_file(tmp_path / "out" / SAFETY_TOKENS).keys() == {SAFETY_KEY}


def test_a_base_of_the_hub_is_named_with_its_commit(base, tmp_path, monkeypatch):
    commit, cache = "1" * 40, tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = cache / "models--some--base"
    shutil.copytree(base, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    addon = trained("some/base", tmp_path / "addon", lora=True)
    assert export(addon, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: some/base\n" in card
    assert f"`some/base`, commit `{commit}`" in card
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
