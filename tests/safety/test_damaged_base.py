"""A base's folder with a damaged or foreign file: one sentence, before weights are loaded where that can be."""

import json
import shutil

import pytest
from builders.tiny_llava import build_base

from psa_fast import cli
from psa_fast.safety import load_guard
from psa_fast.safety.load import load_plain, load_prompter

# (file, its content; None: removed)
BEFORE_WEIGHTS = [
    ("config.json", None),
    ("config.json", b"{"),
    ("config.json", b"[]"),
    ("config.json", b"\xff"),
    ("config.json", b"[" * 100_000),
    ("config.json", b'{"model_type": "nope"}'),
    ("config.json", b'{"model_type": "llama"}'),
    ("config.json", b'{"model_type": "llava", "vision_config": 5}'),
    ("tokenizer.json", b""),
    ("tokenizer.json", b"{}"),
    ("tokenizer.json", b"[]"),
    ("tokenizer_config.json", b"[]"),
    ("processor_config.json", None),
    ("processor_config.json", b"[1]"),
    ("processor_config.json", b'{"processor_class": "LlamaTokenizer"}'),
    ("model.safetensors", b""),
    ("model.safetensors", b"\xff" * 16),
]
WITH_WEIGHTS = [
    ("generation_config.json", b'{"max_new_tokens": "x"}'),
    ("generation_config.json", b"[]"),
]


def damaged(folders, tmp_path, name, content):
    base = tmp_path / "damaged"
    shutil.copytree(folders[0], base)
    (base / name).unlink()
    if content is not None:
        (base / name).write_bytes(content)
    return base


def one_sentence(error):
    text = str(error.value)
    assert "damaged" in text  # the folder's name
    assert len(text.splitlines()) == 1
    assert len(text) < 600


@pytest.mark.parametrize(("name", "content"), BEFORE_WEIGHTS)
def test_a_damaged_file_is_named_before_weights_are_loaded(folders, tmp_path, monkeypatch, name, content):
    base = damaged(folders, tmp_path, name, content)
    monkeypatch.setattr("psa_fast.models.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="model") as error:
        load_prompter(base)
    one_sentence(error)


@pytest.mark.parametrize(("name", "content"), WITH_WEIGHTS)
def test_what_only_the_weights_show_is_a_sentence_too(folders, tmp_path, name, content):
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_plain(damaged(folders, tmp_path, name, content))
    one_sentence(error)


def test_weights_of_other_shapes_than_the_configuration_says_are_a_sentence(folders, tmp_path):
    config = json.loads((folders[0] / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_plain(damaged(folders, tmp_path, "config.json", json.dumps(config).encode()))
    one_sentence(error)


@pytest.mark.parametrize("template", ["{% for", "{{ x.y.z }}", "{% for i in range(10**9) %}x{% endfor %}"])
def test_a_chat_template_that_cannot_be_used_is_a_sentence(folders, tmp_path, capsys, template):
    base = damaged(folders, tmp_path, "chat_template.jinja", template.encode())
    code = cli.main(["generate", "--model", str(folders[1]), "--base", str(base), "--prompt", "what ?"])
    printed = capsys.readouterr().err
    assert code == 2
    assert "chat template cannot be used" in printed
    assert len(printed.splitlines()) == 1


def test_another_base_is_refused_before_its_weights_are_loaded(folders, tmp_path, monkeypatch, capsys):
    other = build_base(tmp_path / "other", seed=7)
    monkeypatch.setattr("psa_fast.models.addon.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="was trained on another base than"):
        load_guard(folders[1], other)
    assert cli.main(["generate", "--model", str(folders[1]), "--base", str(other), "--prompt", "what ?"]) == 2
    assert "was trained on another base than" in capsys.readouterr().err


def test_a_base_is_given_as_text_or_path_and_never_as_nothing(folders, capsys):
    for base in (folders[0], str(folders[0])):
        assert load_guard(folders[1], base).has_head
    assert not load_plain(folders[0]).has_head
    for base in ("", " ", "a\0b"):
        with pytest.raises(ValueError, match="is no name"):
            load_guard(folders[1], base)
        capsys.readouterr()
        assert cli.main(["generate", "--model", str(folders[1]), "--base", base, "--prompt", "what ?"]) == 2
        assert capsys.readouterr().err.startswith(("psa-fast: error: --base is ", "psa-fast: error: base model "))
