"""The arithmetic of the step benchmarks against torch's own counter, and the small model's proportions against 7B's."""

import proportions
import pytest
import step_flops
import torch
from baselines.stock import Stock
from compare_step import official_form, our_form
from step_measure import Counter
from step_model import SIZES, build_base
from step_rows import MIX, Rows, draw_shapes, turns_of

SIZE = SIZES["tiny"]


@pytest.fixture(scope="module")
def base():
    return build_base(SIZE)


@pytest.fixture(scope="module")
def rows(base, tmp_path_factory):
    return Rows(tmp_path_factory.mktemp("rows"), base, SIZE, 8)


@pytest.mark.parametrize("target", step_flops.AGAINST)
def test_the_baselines_cost_what_torch_counts(base, rows, target):
    ours = our_form(base, SIZE, target)
    forms = [official_form(base, ours, SIZE, target)]
    forms += [] if target == "stage1_concept" else [Stock(base, SIZE, int(target[5]))]
    pair = [max(range(8), key=lambda i: rows.lengths[i]), min(range(8), key=lambda i: rows.lengths[i])]
    shapes = [[rows.shapes[i] for i in pair]]
    assert shapes[0][0].text > shapes[0][1].text  # something is padded
    for form in forms:
        count = Counter()
        with count("step"):
            form.step(form.batch([rows[form.safety_tokens][i] for i in pair]))
        found = (step_flops.stock if form.name == "B1" else step_flops.official)(SIZE, target, shapes)
        # the counter takes the masked half of attention too, and its backward for five products of a pair instead of
        # four: it computes the scores again
        if found["attention"]:
            length = shapes[0][0].text + SIZE.image_tokens + form.safety_tokens
            found["attention"] *= 2 * length / (length + 1) * 7 / 6
        assert sum(found.values()) == pytest.approx(count.flops["step"], rel=0.015), form.name


def test_rows_have_the_shapes_that_were_drawn(rows):
    assert [n - SIZE.image_tokens for n in rows.lengths] == [shape.text for shape in rows.shapes]
    assert rows.supervised == sum(shape.supervised for shape in rows.shapes)
    assert all(0 < shape.supervised < shape.text for shape in rows.shapes)


def test_a_smaller_size_has_the_same_rows_in_little():
    whole, small = (draw_shapes(500, SIZES[name]) for name in ("7b", "proportionate"))
    assert max(shape.text for shape in whole) <= 2048 - 576 - 64
    long = [(a, b) for a, b in zip(whole, small, strict=True) if a.text > 100]
    assert all(b.text == pytest.approx(a.text / 4, abs=1) for a, b in long)
    answers = sum(kind.records * kind.median * kind.answers for kind in MIX.values())
    texts = sum(kind.records * kind.median for kind in MIX.values())
    for shapes in (whole, small):
        supervised = sum(shape.supervised for shape in shapes) / sum(shape.text for shape in shapes)
        assert supervised == pytest.approx(answers / texts, abs=0.12)
    assert turns_of(40) == 1
    assert turns_of(400) == 10


def test_the_small_model_has_the_proportions_of_7b():
    whole, small = (proportions.features(SIZES[name]) for name in ("7b", "proportionate"))
    for part in ("lm_head", "vision", "safety", "rest", "attention"):
        assert small[part] == pytest.approx(whole[part], abs=1.0), part  # percentage points
    for baseline in ("B0", "B1", "B0 concept"):
        assert small[baseline] == pytest.approx(whole[baseline], abs=2.0), baseline  # percent of the ratio
    assert proportions.distance(SIZES["proportionate"], whole)[0] < 2


def test_candidates_are_of_the_wanted_size():
    size = next(iter(proportions.candidates(SIZES["7b"])))
    assert size.lora_r / size.width == SIZES["7b"].lora_r / SIZES["7b"].width
    rows = draw_shapes(100, size)
    flops = proportions.BATCH * sum(step_flops.ours(size, "stage1_joint", rows).values()) / len(rows)
    low, high = proportions.WANTED
    assert 0.8 * low < flops < 1.2 * high
    assert torch.get_default_device().type == "cpu"
