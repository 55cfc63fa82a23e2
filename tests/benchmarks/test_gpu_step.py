"""The GPU's step benchmark on a tiny model: every part goes through, and what is measured is not measured again."""

import json
from pathlib import Path

import gpu_step
import pytest
import speed_tables
from ladder import CUDA


def test_every_part_goes_through_once(tmp_path, capsys):
    (tmp_path / "dry-step-stage1.json").write_text("{}")
    assert gpu_step.main(["--dry_run", "--out", str(tmp_path)]) == ["stage2", "guard"]
    printed = capsys.readouterr().out
    assert "stage1: " in printed
    assert "skipped" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"dry-step-{p}.json" for p in sorted(gpu_step.DEFAULT)]
    stage2 = json.loads((tmp_path / "dry-step-stage2.json").read_text())
    assert speed_tables.markdown(stage2) in printed
    assert set(json.loads((tmp_path / "dry-step-guard.json").read_text())["prompts"]) == {"short", "long"}
    assert gpu_step.main(["--dry_run", "--out", str(tmp_path)]) == []


def test_a_part_that_was_stopped_is_measured_again(tmp_path, monkeypatch):
    def stopped(options):
        Path(options[-1]).write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu_step.PARTS, "guard", (stopped, [], []))
    with pytest.raises(KeyboardInterrupt):
        gpu_step.main(["guard", "--dry_run", "--out", str(tmp_path)])
    monkeypatch.setitem(gpu_step.PARTS, "guard", (lambda options: Path(options[-1]).write_text("{}"), [], []))
    assert gpu_step.main(["guard", "--dry_run", "--out", str(tmp_path)]) == ["guard"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["stage3", "--dry_run"], "there is no part 'stage3'; there are stage1, stage2, guard, fp8"),
        pytest.param(["stage1"], "torch finds no CUDA device", marks=pytest.mark.skipif(CUDA, reason="there is one")),
    ],
)
def test_refusals_are_sentences(options, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_step.main([*options, "--out", str(tmp_path)])
    assert sentence in capsys.readouterr().err


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "dry-step-guard.json").write_text("{")
    with pytest.raises(SystemExit, match=r"dry-step-guard\.json is no whole result"):
        gpu_step.main(["guard", "--dry_run", "--out", str(tmp_path)])
