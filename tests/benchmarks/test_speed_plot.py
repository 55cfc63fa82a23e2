"""The plot of the step's speed: its numbers are the result's, and what the ratios do not say stands below."""

import json

import compare_step
import speed_plot
from PIL import Image

COMMITTED = speed_plot.RESULTS / "compare_step_cpu.json"


def test_bars_and_caption_are_the_results_numbers():
    result = json.loads(COMMITTED.read_text())
    steps = result["provenance"]["steps"]["stage2_lora"]
    rows = speed_plot.bars(result, "stage2_lora")
    assert [row[1] for row in rows] == [steps[name]["p50_ms"] for name in ("stage2_lora", "B0", "B1", "B2")]
    assert rows[1][3] == f"{steps['B0']['p50_ms']:.0f} ms, {result['ratios']['stage2_lora']['B0']:.2f}x"
    caption = speed_plot.caption(result["provenance"])
    for name in ("device", "torch", "transformers"):
        assert result["provenance"][name] in caption


def test_the_committed_result_is_drawn_with_its_caveats(tmp_path, monkeypatch, capsys):
    notes = []
    wrapped = speed_plot.wrapped
    monkeypatch.setattr(speed_plot, "wrapped", lambda note, *rest: notes.append(note) or wrapped(note, *rest))
    out = tmp_path / "assets" / "speed.png"
    speed_plot.main([str(COMMITTED), "--out", str(out)])
    assert out.stat().st_size < 100_000
    with Image.open(out) as picture:
        assert picture.size[0] == speed_plot.WIDTH
    for target in speed_plot.TARGETS:
        assert any(compare_step.caveat(target, "proportionate") in note for note in notes)
    assert f"{out}: " in capsys.readouterr().out


def test_several_results_stand_below_each_other():
    result = json.loads(COMMITTED.read_text())
    one, two = (speed_plot.draw([result] * count).size[1] for count in (1, 2))
    assert 1.8 * one < two <= 2 * one
