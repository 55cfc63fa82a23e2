"""Stage 1's adversarial term: its gradient against an independent computation, and runs with it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from psa_fast.data import PsaDataset, collate, load_records
from psa_fast.models import PsaVLM, load_base
from psa_fast.training.adversarial import ConceptAttack, PixelScale, random_start

ZERO2 = ["--deepspeed_config", "ds_configs/zero2.json"]
TERM = [*ZERO2, "--stage1_objective", "concept", "--adversarial_weight", 0.5, "--adversarial_eps", 6]


def rows_of(out):
    rows = [json.loads(line) for line in (out / "stage1" / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key.startswith("loss") or key == "grad_norm"} for row in rows]


@pytest.fixture
def batch(base, world):
    from psa_fast.models import load_processor
    from psa_fast.training.config import TrainConfig

    config = TrainConfig(num_safety_tokens=8)
    processor = load_processor(str(base), config)
    records = load_records(str(world / "mixed.jsonl"), str(world))
    chosen = [next(r for r in records if r.images and r.safe_type != 6), next(r for r in records if not r.images)]
    chosen += [next(r for r in records if r.images and r.safe_type == 6)]
    dataset = PsaDataset(chosen, str(world), processor)
    return collate([dataset[i] for i in range(3)], 0), PixelScale.of(processor.image_processor)


def test_one_step_is_the_sign_of_an_independent_gradient(batch, base):
    rows, scale = batch
    torch.manual_seed(0)
    model = PsaVLM.build(load_base(str(base), torch.float64, None), num_safety_tokens=8, num_head_tokens=4)
    model.requires_grad_(False)
    model.bottleneck.requires_grad_(True)
    inputs = {name: value for name, value in rows.items() if name != "where"}
    eps = 6
    attack = ConceptAttack(1.0, eps, 1, 1, 3, scale)
    changed = attack.inputs(model, rows, inputs, step=5)
    assert "labels" not in changed
    assert changed["safe_type"].tolist()[1] == -100  # the row without a picture
    assert all(p.grad is None for p in model.parameters())

    # the same by hand: 8-bit values, the start within the budget, a step of the whole budget along the sign
    clean = rows["pixel_values"].double()
    mean, std = scale.mean.double(), scale.std.double()
    byte = ((clean * std + mean) * 255).round()
    start = ((2 * random_start(rows, 3, 5).double() - 1) * eps).clamp(-byte, 255 - byte)
    pixels = clean + start / 255 / std
    pixels.requires_grad_(True)
    features = model.family.vision_features(model.vlm, pixels)
    given = {**inputs, "pixel_values": None, "vision_features": features, "labels": None}
    model(**given).loss.backward()
    after = (start + eps * pixels.grad.sign()).clamp(-eps, eps)
    want = torch.maximum(torch.minimum(after, 255 - byte), -byte).round()
    got = (changed["pixel_values"].double() - clean) * std * 255
    sure = pixels.grad.abs() > pixels.grad.abs().max() * 1e-5
    assert sure.double().mean() > 0.9
    assert (got - want).abs()[sure].max() < 0.51  # a half may be rounded either way
    assert ((got - want).abs()[sure] < 1e-2).double().mean() > 0.999

    def loss_on(values):
        return model(**{**changed, "pixel_values": values}).loss

    assert loss_on(changed["pixel_values"]) > loss_on(rows["pixel_values"])


def test_starts_depend_on_seed_step_and_line_alone(batch):
    rows, _ = batch
    first = random_start(rows, 0, 1)
    alone = {"pixel_values": rows["pixel_values"][1:], "where": ["/elsewhere/" + rows["where"][2]],
             "image_counts": rows["image_counts"][2:]}  # fmt: skip
    assert torch.equal(random_start(alone, 0, 1), first[1:])
    assert not torch.equal(random_start(rows, 1, 1), first)
    assert not torch.equal(random_start(rows, 0, 2), first)
    assert not torch.equal(first[0], first[1])


def test_runs_with_the_term(direct, tmp_path):
    plain, late, one, two, again = (tmp_path / name for name in ("plain", "late", "one", "two", "again"))
    direct(plain, *ZERO2, "--stage1_objective", "concept", "--max_steps", 3)
    direct(late, *TERM, "--adversarial_start", 0.5, "--max_steps", 3)
    direct(one, *TERM, "--save_steps", 2)
    direct(two, *TERM, ranks=2)
    # until it begins nothing is changed
    assert rows_of(late)[0] == rows_of(plain)[0]
    assert [row["loss_adversarial"] is None for row in rows_of(late)] == [True, False, False]
    for left, right in zip(rows_of(one), rows_of(two), strict=True):
        assert left["loss"] == pytest.approx(left["loss_type"] + left["loss_level"] + 0.5 * left["loss_adversarial"])
        for key in ("loss", "loss_type", "loss_adversarial", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=1e-3), key
    # a resumed run follows the whole one to the bit
    shutil.copytree(one / "stage1" / "checkpoint-2", again / "stage1" / "checkpoint-2")
    direct(again, *TERM, "--save_steps", 2, "--resume", "auto")
    assert rows_of(again) == rows_of(one)[2:]
    want = load_file(one / "stage1" / "psa.safetensors")
    for name, value in load_file(again / "stage1" / "psa.safetensors").items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--adversarial_weight", "1", "--deepspeed_config", "ds_configs/zero3.json"], "zero2.json"),
        (["--adversarial_weight", "1", "--stage1_objective", "tokens"], "no effect"),
        (["--adversarial_weight", "1", "--stage1_objective", "concept", "--feature_cache", "x"], "--feature_cache"),
        (["--adversarial_weight", "1", "--stage", "2"], "only acts in stage 1"),
        (["--adversarial_eps", "4"], "--adversarial_weight 0"),
    ],
)
def test_what_it_cannot_work_with_is_refused(options, sentence):
    from psa_fast.training.config import parse_args

    with pytest.raises(ValueError, match=sentence):
        parse_args(options)
