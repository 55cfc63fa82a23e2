"""The DeepSpeed JSON: found where it is shipped, and sentences for what it cannot be."""

import json

import pytest

from psa_fast.training import deepspeed_config
from psa_fast.training.config import parse_args, read_deepspeed_config
from psa_fast.training.engine import check_deepspeed_config, resolve_deepspeed_config


@pytest.mark.parametrize("name", ["ds_configs/zero2.json", "zero2.json", "zero2"])
@pytest.mark.parametrize("place", ["repository", "package"])
def test_a_shipped_configuration_is_found_by_name_from_anywhere(tmp_path, monkeypatch, name, place):
    shipped = json.loads(deepspeed_config.find_deepspeed_config("ds_configs/zero2.json").read_text())
    package = tmp_path / "site-packages" / "psa_fast" / "ds_configs"
    package.mkdir(parents=True)
    (package / "zero2.json").write_text(json.dumps(shipped))
    if place == "package":
        monkeypatch.setattr(deepspeed_config, "FOLDERS", (tmp_path / "ds_configs", package))
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed_config(name) == shipped
    with pytest.raises(ValueError, match=r"--deepspeed_config zero9: no such file; shipped are .*zero2"):
        read_deepspeed_config("zero9")
    # a path of one's own is never looked for elsewhere
    with pytest.raises(ValueError, match="no such file"):
        read_deepspeed_config("elsewhere/zero2.json")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"zero_optimization": 3}', "zero_optimization is 3; expected an object"),
        ('{"zero_optimization": null}', "zero_optimization is None; expected an object"),
        ('{"bf16": true}', "bf16 is True; expected an object"),
        ('{"fp16": "auto"}', "fp16 is 'auto'; expected an object"),
        ('{"timers": []}', r"timers is \[\]; expected an object"),
        ('{"timers": {"throughput": 1}}', "throughput is 1; expected an object"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage is 4; expected 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": "3"}}', "zero_optimization.stage is '3'; expected 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": true}}', "zero_optimization.stage is True; expected"),
        ('{"zero_optimization": {"stage": [3]}}', r"zero_optimization.stage is \[3\]; expected"),
        ('{"zero_optimization": {"offload_param": "cpu"}}', "offload_param is 'cpu'; expected an object"),
        (
            '{"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}',
            "device is 'gpu'; expected one of none, cpu",
        ),
        ('{"zero_optimization": {"offload_optimizer": {"buffer_count": 0}}}', "buffer_count is 0; expected a count"),
        ('{"zero_optimization": {"sub_group_size": "auto"}}', "sub_group_size is 'auto'; expected a number"),
        ('{"zero_optimisation": {"stage": 3}}', "'zero_optimisation' is not read; is zero_optimization meant"),
        ('{"zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 0}}', "stands twice in one object"),
        ('{"gradient_cliping": 1.0}', "'gradient_cliping' is not read; is gradient_clipping meant"),
        ('{"optimizer": {"type": "Adam"}}', "remove 'optimizer'"),
        ('{"elasticity": {"enabled": true}}', "remove 'elasticity'"),
        ("[]", "must hold one JSON object"),
        ('{"zero_optimization": {"stage": 1e999}}', "expected 0, 1, 2 or 3"),
        ("{", "not JSON"),
    ],
)
def test_a_wrong_section_is_a_sentence_before_anything_is_loaded(tmp_path, text, sentence):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence) as error:
        parse_args(["--deepspeed_config", str(path)])
    assert str(error.value).startswith(f"--deepspeed_config {path}")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"zero_optimization": {"stage": 3, "stage3_typo": 1}}, "stage3_typo: Extra inputs are not permitted"),
        ({"flops_profiler": 5}, "DeepSpeed cannot read it"),
        ({"wall_clock_breakdown": "yes"}, "DeepSpeed cannot read it"),
        ({"communication_data_type": "fp17"}, "Invalid communication_data_type"),
    ],
)
def test_what_only_deepspeed_knows_is_asked_of_it(tmp_path, group_of_one, change, sentence):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(change))
    resolved = resolve_deepspeed_config(parse_args(["--deepspeed_config", str(path)]), 1)
    with pytest.raises(ValueError, match=sentence):
        check_deepspeed_config(resolved, str(path))


def test_the_shipped_ones_pass_and_a_stage_left_out_is_0(tmp_path, group_of_one):
    for name in ("zero2", "zero3", "zero3_offload", "zero3_nvme"):
        check_deepspeed_config(resolve_deepspeed_config(parse_args(["--deepspeed_config", name]), 1), name)
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {}}')
    config = parse_args(["--deepspeed_config", str(path)])
    assert resolve_deepspeed_config(config, 1)["zero_optimization"]["stage"] == 0
