"""The profile of several ranks: what torch.profiler calls a collective, added up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import profile_step
import pytest
from builders.tiny import free_port
from communication import _covered

ROOT = Path(__file__).resolve().parents[2]


def test_overlapping_spans_count_once():
    assert _covered([]) == 0
    assert _covered([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5


def test_two_ranks_show_their_collectives(tmp_path):
    path = tmp_path / "profile.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    options = ["--stage", "1", "--size", "tiny", "--rounds", "1", "--json", str(path)]
    done = subprocess.run(
        [*launcher, str(ROOT / "benchmarks" / "profile_step.py"), *options],
        capture_output=True, text=True, timeout=240, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(path.read_text())
    assert result["ranks"] == 2
    assert 0 < result["communication"] < 3 * result["step"]
    reduced = result["collectives"]["gloo:all_reduce"]
    # counts, losses, the largest values, and the two norms that are clipped
    assert reduced["calls"] >= 4
    assert sum(row["ms"] for row in result["collectives"].values()) >= result["communication"] * (1 - 1e-6)
    assert "with a collective under way" in done.stdout


def test_options_of_one_process_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        profile_step.main(["--stage", "1", "--trace", "x"])
    assert "--trace has no effect with several ranks" in capsys.readouterr().err
