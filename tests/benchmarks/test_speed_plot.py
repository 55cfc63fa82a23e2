"""The plot of the step's speed: its numbers are the committed result's."""

import json

import speed_plot
from PIL import Image

COMMITTED = speed_plot.RESULTS / "compare_step_cpu.json"


def test_bars_and_caption_are_the_results_numbers():
    result = json.loads(COMMITTED.read_text())
    measured = result["allocators"]["default"]
    steps = measured["steps"]["stage2"]
    rows = speed_plot.bars(result, "stage2_lora_alone")
    assert [row[1] for row in rows] == [steps[n]["mean_ms"] for n in ("stage2_lora_alone", "B0 frozen", "B1", "B2")]
    ratio, at_7b = (found["stage2_lora_alone"]["B0 frozen"] for found in (measured["ratios"], result["flops"]["7b"]))
    assert rows[1][3] == f"{steps['B0 frozen']['mean_ms']:.0f} ms, {ratio:.2f}x ({at_7b:.2f}x)"
    caption = speed_plot.caption(result)
    for name in ("device", "torch", "transformers"):
        assert result["provenance"][name] in caption


def test_the_committed_result_is_drawn_with_its_caption(tmp_path, monkeypatch, capsys):
    notes = []
    wrapped = speed_plot.wrapped
    monkeypatch.setattr(speed_plot, "wrapped", lambda note, *rest: notes.append(note) or wrapped(note, *rest))
    out = tmp_path / "assets" / "speed.png"
    speed_plot.main([str(COMMITTED), "--out", str(out)])
    assert out.stat().st_size < 100_000
    with Image.open(out) as picture:
        assert picture.size[0] == speed_plot.WIDTH
    assert notes == [speed_plot.caption(json.loads(COMMITTED.read_text()))]
    assert f"{out}: " in capsys.readouterr().out


def test_several_results_stand_below_each_other():
    result = json.loads(COMMITTED.read_text())
    one, two = (speed_plot.draw([result] * count).size[1] for count in (1, 2))
    assert 1.8 * one < two <= 2 * one
