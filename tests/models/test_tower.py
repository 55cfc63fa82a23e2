"""A base with another vision tower is a stock base that differs in the tower's weights only."""

import pytest
import torch
from builders.tiny_vlm import make_vlm
from safetensors.torch import load_file
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from psa_fast.models.tower import put_tower, read_tower, write_base


@pytest.fixture
def base(tmp_path):
    make_vlm().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "processor_config.json").write_text("{}")
    return tmp_path / "base"


def other_tower(vlm, **changes):
    config = type(vlm.config.vision_config)(**{**vlm.config.vision_config.to_dict(), **changes})
    torch.manual_seed(9)
    return CLIPVisionModel(config)


def test_a_tower_from_a_folder_changes_the_tower_alone(base, tmp_path):
    vlm = make_vlm()
    other = other_tower(vlm)
    other.save_pretrained(tmp_path / "tower")
    put_tower(vlm, read_tower(tmp_path / "tower", vlm))
    write_base(vlm, base, tmp_path / "out" / "stage0")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out" / "stage0"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("vision_tower" in name for name in changed)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "stage0").eval()
    pixels = torch.randn(2, 3, 16, 16)
    want = other.eval()(pixels).last_hidden_state
    assert torch.equal(loaded.model.vision_tower(pixels).last_hidden_state, want)
    assert (tmp_path / "out" / "stage0" / "processor_config.json").read_text() == "{}"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["stage0"]


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"num_hidden_layers": 2}, {"patch_size": 8}])
def test_a_tower_of_another_configuration_is_refused(tmp_path, changes):
    vlm = make_vlm()
    other_tower(vlm, **changes).save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match=f"has {next(iter(changes))} "):
        read_tower(tmp_path / "tower", vlm)


def test_weights_that_do_not_fit_leave_the_base_as_it_was():
    vlm = make_vlm()
    weights = {name: value + 1 for name, value in vlm.model.vision_tower.state_dict().items()}
    name = sorted(weights)[-1]
    before = {k: v.clone() for k, v in vlm.state_dict().items()}
    for bad in ({**weights, name: torch.zeros(1, 1, 7)}, {**weights, name: weights[name] * float("nan")},
                {k: v for k, v in weights.items() if k != name}, {**weights, "more": torch.zeros(1)}):  # fmt: skip
        with pytest.raises(ValueError, match="the vision tower"):
            put_tower(vlm, bad)
    assert all(torch.equal(v, before[k]) for k, v in vlm.state_dict().items())


def test_a_write_that_fails_leaves_nothing(base, tmp_path, monkeypatch):
    vlm = make_vlm()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(vlm), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        write_base(vlm, base, tmp_path / "out" / "stage0")
    assert list((tmp_path / "out").iterdir()) == []
