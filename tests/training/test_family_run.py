"""Both stages of a family whose images differ in their tokens, through train.py, and the guard on what they made."""

import json

import pytest
from builders import tiny, tiny_families
from PIL import Image

from psa_fast.safety import Request
from psa_fast.safety.load import load_guard, load_plain
from psa_fast.safety.looking import looked_at


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Qwen2.5-VL, in place of the LLaVA that every other run is of."""
    return tiny_families.build_folder("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def sized(world, tmp_path_factory):
    """The world's rows with pictures of many sizes."""
    folder = tmp_path_factory.mktemp("sized")
    (folder / "mixed.jsonl").write_text((world / "mixed.jsonl").read_text())
    for number, file in enumerate(sorted(world.rglob("*.png"))):
        target = folder / file.relative_to(world)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((8 + 7 * (number % 5), 40 - 6 * (number % 4))).save(target)
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(base, world, out, *options, ranks=1, expect=0):
    steps = () if "--max_steps" in options else ("--max_steps", 2)
    quick = ("--report_to", "none", "--dataloader_num_workers", 0)
    options = tiny.arguments(base, world, out, "--max_length", 2048, "--warmup_steps", 0, *quick, *steps, *options)
    codes, output = tiny.outcome(tiny.start(tiny.train_command(options), ranks))
    assert codes == [expect] * ranks, output[-4000:]
    return output


def test_two_ranks_train_both_stages_as_one_does_and_the_guard_answers(base, sized, partitioned, tmp_path):
    one, two, zero3 = tmp_path / "one", tmp_path / "two", ("--deepspeed_config", partitioned)
    text = run(base, sized, one, *zero3)
    assert "MFU is left out" in text
    run(base, sized, two, *zero3, ranks=2)
    alone, shared = rows_of(one / "stage1"), rows_of(two / "stage1")
    for name in ("loss_lm", "loss_type", "loss_level", "grad_norm"):
        assert [row[name] for row in shared] == pytest.approx([row[name] for row in alone], rel=1e-4)
    assert alone[0]["loss"] != alone[1]["loss"]
    assert alone[0]["mfu"] is None
    stage2 = ("--stage", 2, "--addon", two / "stage1", "--concept_loss_weight", 1, "--max_steps", 1)
    run(base, sized, two, *zero3, *stage2, ranks=2)

    guard = load_guard(two / "stage2", base)
    assert guard.model.config.image_tokens is None
    requests = [
        Request("what is it?", (tiny_families.picture(20, 12),)),
        Request("<image>or<image>?", (tiny_families.picture(9, 33, 1), tiny_families.picture(24, 24, 2))),
        Request("hello"),
    ]
    answers = guard.answer(requests, max_new_tokens=3)
    bare = load_plain(base)
    plain = bare.answer(requests, guarded=False, max_new_tokens=3)
    for request, answer, unguarded in zip(requests, answers, plain, strict=True):
        (single,) = guard.answer([request], max_new_tokens=3)
        assert (single.text, single.verdict.code) == (answer.text, answer.verdict.code)
        assert single.verdict.type_probs == pytest.approx(answer.verdict.type_probs, rel=1e-4)
        assert unguarded.text == bare.answer([request], guarded=False, max_new_tokens=3)[0].text
    verdict = guard.verdicts(requests[1:2])[0]
    shares = [found for found in looked_at(guard, requests[1], verdict) if found is not None]
    assert {len(found) for found in shares} <= {4, 9}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--feature_cache", "cache", "--stage1_objective", "concept"),
            "--feature_cache: not supported yet for a base of type qwen2_5_vl",
        ),
        (
            ("--adversarial_weight", 1, "--deepspeed_config", tiny.ROOT / "ds_configs" / "zero2.json"),
            "pixel attacks: not supported yet for a base of type qwen2_5_vl",
        ),
    ],
)
def test_what_the_family_lacks_is_refused_before_anything_is_loaded(base, sized, tmp_path, options, sentence):
    assert sentence in run(base, sized, tmp_path, *options, expect=2)
