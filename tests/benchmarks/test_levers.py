"""What each choice of our step is worth: the arithmetic against torch's counter, the committed figures against it."""

import json

import levers
import pytest
import speed_tables
from step_forms import Ours
from step_measure import Counter
from step_model import SIZES, build_base
from step_rows import Rows, draw_shapes, in_order


def test_choices_are_worth_what_torch_counts(tmp_path):
    size = SIZES["tiny"]
    base = build_base(size)
    rows = Rows(tmp_path, base, size, 8)
    ranked = sorted(range(8), key=lambda i: rows.lengths[i])
    order = [i for pair in zip(ranked[4:], ranked[:4], strict=True) for i in pair]  # long beside short: much padding

    def counted(part, **options):
        form, count = Ours(base, size, 1, **options), Counter()
        for numbers in in_order(8, 2):
            picked = [rows[form.safety_tokens][order[i]] for i in numbers]
            if part:
                form.step_in_parts(form.batch(picked), count)
            else:
                with count("step"):
                    form.step(form.batch(picked))
        return count.flops[part or "step"]

    found, whole = levers.flops(size, [rows.shapes[i] for i in order]), counted(None)
    # the counter takes the masked half of attention too
    assert found["no_recomputation"] == pytest.approx(counted(None, recomputes=True) / whole, abs=0.02)
    assert found["packing"] == pytest.approx(counted(None, packs=False) / whole, abs=0.01)  # excludes 1
    assert found["packing"] > 1.015
    assert found["one_vision_pass"] == pytest.approx(1 + counted("vision") / whole, abs=0.005)
    # the concept step is tests/training/test_flops.py's: this counter does not see into the pool


def test_the_committed_figures_are_those_of_the_code():
    committed = json.loads((speed_tables.RESULTS / "levers_7b.json").read_text())
    size = SIZES["proportionate"]
    found = levers.flops(size, draw_shapes(levers.ROWS, size))
    assert found == pytest.approx(committed["flops"]["proportionate"])
    assert set(found) == set(speed_tables.LEVERS)


def test_recomputation_lets_larger_micro_batches_in():
    for stages in json.loads((speed_tables.RESULTS / "levers_7b.json").read_text())["micro_batches_7b"].values():
        assert all(0 < found["none"] < found["full"] <= levers.LARGEST for found in stages.values())
