"""Whatever is done to an add-on's folder: it loads as it was, or one sentence names the file."""

import json
import os
import shutil
import time

import pytest
from builders.tiny_vlm import make_vlm
from fuzz.addons import DAMAGES, judge, make_addon, outputs, tamper

from psa_fast.models import PsaVLM

COUNT = int(os.environ.get("PSA_FUZZ_ADDONS", 3 * len(DAMAGES)))
SEED = int(os.environ.get("PSA_FUZZ_SEED", 0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make_addon(folder)
    return folder


def test_a_tampered_addon_loads_as_it_was_or_is_refused_with_its_path(whole, tmp_path):
    original = outputs(whole / "addon")
    assert judge(whole / "addon", original)[0] == "ok"
    assert judge(whole / "addon", {**original, "loss": original["loss"] + 1})[0] == "silent"
    found = [(what, *judge(copy, original)) for what, copy in tamper(whole / "addon", tmp_path, SEED, COUNT)]
    wrong = [" ".join(one) for one in found if one[1] not in ("ok", "named")]
    assert not wrong, "\n".join(wrong)
    assert sum(verdict == "named" for _, verdict, _ in found) > COUNT / 2  # most damage is no other spelling


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
