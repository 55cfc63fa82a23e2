"""Loading an add-on: its own faults under its own name, and no folder's name ever looked up on the hub."""

import json
import shutil

import huggingface_hub
import pytest

from psa_fast.models.base_model import is_folder_name
from psa_fast.safety import Request
from psa_fast.safety.load import base_of, load_guard, load_plain, load_prompter


@pytest.fixture
def addon(folders, tmp_path):
    return shutil.copytree(folders[1], tmp_path / "addon")


def configure(addon, **changes):
    file = addon / "psa_config.json"
    content = {**json.loads(file.read_text()), **changes}
    content.pop("checksums", None)  # a deliberate edit
    file.write_text(json.dumps(content))


@pytest.fixture
def no_hub(monkeypatch):
    """Any request that leaves for the hub fails the test."""

    def request(*args, **kwargs):
        pytest.fail("the hub was asked")

    for session in (huggingface_hub.HfApi, huggingface_hub.hf_api.HfApi):
        for name in ("model_info", "repo_info", "list_repo_files"):
            monkeypatch.setattr(session, name, request)
    monkeypatch.setattr(huggingface_hub.file_download, "hf_hub_download", request)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", request)


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("/data/models/base", None),
        ("/data/models/base", "a" * 40),
        ("./base", "a" * 40),
        ("../base", None),
        ("~/base", None),
        ("runs/models/base", "a" * 40),
        ("runs/base", None),  # the words typed for a folder, or the hub's name of a stranger's model
        ("base", None),
    ],
)
def test_a_base_in_a_folder_that_is_gone_is_never_looked_up(addon, no_hub, monkeypatch, tmp_path, name, revision):
    monkeypatch.chdir(tmp_path)
    configure(addon, base_model_name_or_path=name, base_revision=revision)
    for ask in (base_of, load_guard):
        with pytest.raises(ValueError, match=r"the base was at .*no folder here; give it with --base") as caught:
            ask(addon)
        assert name in str(caught.value)


def test_a_base_of_the_hub_keeps_its_name(addon):
    configure(addon, base_model_name_or_path="some/base", base_revision="a" * 40)
    assert base_of(addon) == "some/base"
    assert [is_folder_name(name) for name in ("base", "some/base", "a/b/c", "/a", "./a", "~", "a/")] == [
        False, False, True, True, True, True, True
    ]  # fmt: skip


def test_a_folder_given_as_base_is_not_looked_up_either(addon, no_hub, tmp_path):
    for load in (load_plain, load_prompter, lambda base: load_guard(addon, base)):
        with pytest.raises(ValueError, match=r"base model .*nowhere cannot be loaded: there is no such folder"):
            load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a": 1, "a": 2}', '{"base_model_name_or_path": 3}', "{}", "\ud83d"]
)
def test_a_config_that_is_none_is_named(addon, content):
    file = addon / "psa_config.json"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"psa_config\.json"):
        load_guard(addon)


def test_missing_files_are_the_addons_fault_not_the_bases(addon, folders):
    (addon / "adapter").mkdir()
    with pytest.raises(ValueError, match=r"adapter/adapter_config\.json"):
        load_guard(addon)
    (addon / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter/adapter_"):
        load_guard(addon, str(folders[0]))
    shutil.rmtree(addon / "adapter")
    (addon / "psa.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is not a PSA add-on: it has no psa\.safetensors"):
        load_guard(addon)
    with pytest.raises(ValueError, match="is not a PSA add-on"):
        load_guard(addon / "adapter")


def test_a_prompter_needs_no_weights(folders, tmp_path):
    base = shutil.copytree(folders[0], tmp_path / "base")
    (base / "model.safetensors").unlink()
    prompter = load_prompter(str(base), folders[1])
    assert prompter.max_length == 256
    guard = load_guard(folders[1])
    turns = Request("<image> red ?", (b"",)).turns
    assert prompter.prompt(turns, None, 0).input_ids == guard._prompter.prompt(turns, None, 0).input_ids
    plain = load_prompter(str(base)).prompt(turns, None, 0).input_ids
    assert len(plain) == len(prompter.prompt(turns, None, 0).input_ids) - 3  # the add-on's safety tokens
