"""docs/speed.md holds what the committed results say, and a difference from the FLOPs is explained in full."""

import json

import pytest
import speed_tables

RESULT = json.loads((speed_tables.RESULTS / "compare_step_cpu.json").read_text())


@pytest.mark.parametrize("page", speed_tables.PAGES, ids=lambda page: page.name)
def test_the_page_has_the_committed_tables(page):
    found, text = speed_tables.committed(), page.read_text()
    assert speed_tables.fill(text, found) == text, "run python benchmarks/speed_tables.py --write"
    assert speed_tables.MARK.search(text)


def test_every_table_is_on_a_page_once():
    named = [match[1] for page in speed_tables.PAGES for match in speed_tables.MARK.findall(page.read_text())]
    assert sorted(named) == sorted(speed_tables.committed())


def test_a_mark_without_a_table_is_refused():
    with pytest.raises(ValueError, match="there is no table 'nothing'"):
        speed_tables.fill("<!-- table nothing -->\n<!-- end -->", {"shares": []})


def test_the_parts_bring_the_whole_difference():
    parts = {
        "ours": {"vision": _part(10, 1), "loss": _part(30, 3), "step": _part(40, 4)},
        "B0": {"vision": _part(10, 1), "loss": _part(90, 5), "optimizer": _part(4, 0), "step": _part(104, 6)},
    }
    found = speed_tables.differences(parts, "ours", "B0")
    assert found == [("loss", 1.0), ("optimizer", 0.1), ("vision", 0.0)]
    assert sum(value for _, value in found) == pytest.approx(104 / 40 - 6 / 4)


def test_only_unlike_ratios_are_explained():
    measured = RESULT["allocators"]["default"]
    counted = RESULT["flops"]["proportionate"]
    unlike = json.loads(json.dumps(RESULT))
    for target, found in counted.items():
        for name, flops in found.items():
            for allocator in unlike["allocators"].values():
                allocator["ratios"][target][name] = 1.14 * flops
    assert speed_tables.difference_table(unlike) == ["Every timed ratio is within 15% of its ratio of FLOPs."]
    unlike["allocators"]["keep"]["ratios"]["stage1_joint"]["B0"] = 1.2 * counted["stage1_joint"]["B0"]
    (row,) = speed_tables.difference_table(unlike)[2:]
    assert row.startswith(f"| {speed_tables.NAMES['stage1_joint']} | B0 | {speed_tables.ALLOCATOR_NAMES['keep']} | ")
    assert measured["ratios"]["stage1_joint"]["B0"] > 0


def _part(ms, gflop):
    return {"ms": ms, "gflop": gflop}
