"""A step that fails ends every rank, data-loading workers included, and leaves the row of the step before."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FAIL = """
import os, sys
sys.path.insert(0, os.getcwd())
from psa_fast.models import PsaVLM
forward, calls = PsaVLM.forward, []
def failing(self, *args, **kwargs):
    calls.append(None)
    if len(calls) == 3 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        raise RuntimeError("not about the loss")
    return forward(self, *args, **kwargs)
PsaVLM.forward = failing
import train
sys.exit(train.main(sys.argv[1:]))
"""


def test_an_error_in_a_step_leaves_the_row_of_the_step_before(command, run, tmp_path):
    script = tmp_path / "fail.py"
    script.write_text(FAIL)
    arguments = command(tmp_path, ranks=2)
    output = run([str(script) if a == str(ROOT / "train.py") else a for a in arguments], expect=1)
    assert "RuntimeError: not about the loss" in output
    rows = [json.loads(line) for line in (tmp_path / "stage1" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
