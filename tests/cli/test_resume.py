"""`psa-fast evaluate` ended at any moment and begun again: the same answers and metrics as in one go."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from psa_fast.cli import main
from psa_fast.evaluation.output import BEGUN, OutputFolder


def ask(world, out, batch_size=3):
    stage = ("--stage1", world / "run" / "stage1", "--max_new_tokens", 3, "--batch_size", batch_size)
    return [*map(str, ("evaluate", "--data", world / "data", *stage, "--out", out))]


def told(out):
    """What a run says, without date and times."""
    report = json.loads((out / "report.json").read_text())
    del report["provenance"]["date"]
    for stage in report["provenance"]["stages"].values():
        del stage["seconds"]
        del stage["batch_seconds"]
    report["provenance"]["settings"].pop("out", None)
    answers = {file.name: file.read_bytes() for file in sorted(out.glob("answers-*"))}
    assert list(answers) == ["answers-base.jsonl", "answers-stage1.jsonl"]
    return json.dumps(report), answers


@pytest.fixture(scope="module")
def in_one_go(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert main(ask(world, out)) == 0
    assert not (out / BEGUN).exists()
    return told(out)


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


# appends 1 to 7 are the base's batches, 8 to 14 those of stage1
@pytest.mark.parametrize(("calls", "cut"), [((1,), 0), ((4, 3), 25), ((7,), 0), ((9, 2), 400)])
def test_killed_and_begun_again_it_is_the_same_run(world, tmp_path, in_one_go, monkeypatch, calls, cut):
    whole, asked = OutputFolder.append, []
    for left in calls:
        count = iter(range(1, 100))

        def append(stream, rows, left=left, count=count):
            whole(stream, rows)
            if next(count) == left:
                os.truncate(stream.name, os.path.getsize(stream.name) - cut)
                raise Killed

        monkeypatch.setattr(OutputFolder, "append", staticmethod(append))
        with pytest.raises(Killed):
            main(ask(world, tmp_path))
    monkeypatch.setattr(
        OutputFolder, "append", staticmethod(lambda stream, rows: (asked.append(1), whole(stream, rows)))
    )
    assert main(ask(world, tmp_path)) == 0
    assert told(tmp_path) == in_one_go
    lost = len(calls) if cut else 0  # the batches that were cut are asked again
    assert len(asked) == 14 - sum(calls) + lost


@pytest.mark.parametrize("moment", ["after complete", "within finish"])
def test_killed_between_batches_and_names(world, tmp_path, in_one_go, monkeypatch, moment):
    whole = OutputFolder.complete

    def complete(out, stage, rows):
        whole(out, stage, rows)
        raise Killed

    def finish(out):
        os.replace(tmp_path / "answers-base.jsonl.part", tmp_path / "answers-base.jsonl")
        raise Killed

    monkeypatch.setattr(OutputFolder, *(("complete", complete) if moment == "after complete" else ("finish", finish)))
    with pytest.raises(Killed):
        main(ask(world, tmp_path))
    monkeypatch.undo()
    assert main(ask(world, tmp_path)) == 0
    assert told(tmp_path) == in_one_go


def test_what_another_run_left_is_not_taken_for_ones_own(world, tmp_path, in_one_go, monkeypatch):
    out = OutputFolder(tmp_path)
    assert not out.begin({"run": 1})
    with out.answers("base") as stream:
        out.append(stream, [{"where": "x"}])
    again = OutputFolder(tmp_path)
    assert again.begin({"run": 1})
    assert again.kept("base") == [{"where": "x"}]
    assert again.kept("stage1") == []
    (tmp_path / "answers-stage1.jsonl.part").write_text('{"where": "stale"}\n')
    other = OutputFolder(tmp_path)
    with pytest.raises(ValueError, match=r"a run that was cut short and differs in run;.*--overwrite"):
        other.begin({"run": 2})
    assert (tmp_path / "answers-base.jsonl.part").exists()
    assert not other.begin({"run": 2}, overwrite=True)
    assert other.kept("base") == []
    assert list(tmp_path.glob("*.part")) == []
    third = OutputFolder(tmp_path)
    assert third.begin({"run": 2})
    (tmp_path / "answers-base.jsonl.part").write_text('{"a": 1}\n{"a": \n{"a"')
    with pytest.raises(ValueError, match=r"answers-base.jsonl.part:2: not JSON.*remove the file"):
        third.kept("base")
    (tmp_path / BEGUN).write_text('{"run"')  # cut short
    with pytest.raises(ValueError, match="differs in run"):
        OutputFolder(tmp_path).begin({"run": 2})


def test_other_settings_do_not_go_on_with_it(world, tmp_path, monkeypatch, capsys):
    def killed(stream, rows):
        stream.write("".join(json.dumps(row) + "\n" for row in rows))
        raise Killed

    monkeypatch.setattr(OutputFolder, "append", staticmethod(killed))
    with pytest.raises(Killed):
        main(ask(world, tmp_path))
    assert main(ask(world, tmp_path, batch_size=4)) == 2
    assert "differs in batch_size;" in capsys.readouterr().err


def test_a_real_kill(world, tmp_path, in_one_go):
    command = [sys.executable, "-m", "psa_fast.cli", *ask(world, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "answers-base.jsonl.part"
    deadline = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)  # 0: it was done before the signal came
    assert main(ask(world, tmp_path)) == 0
    assert told(tmp_path) == in_one_go
