"""`psa-fast evaluate` shared by two ranks: the same report as on one, killed and begun again on any number of them."""

import json
import sys
import time

import pytest
from builders import tiny

from psa_fast.cli import launch, main
from psa_fast.evaluation.evaluate import batches_of
from psa_fast.evaluation.output import LOCK
from psa_fast.evaluation.sharding import share_of
from psa_fast.files import lock


def ask(world, out):
    stage = ("--stage1", world / "run" / "stage1", "--max_new_tokens", 3, "--batch_size", 3)
    return [*map(str, ("evaluate", "--data", world / "data", *stage, "--out", out))]


def start(options, ranks):
    return tiny.start([sys.executable, str(tiny.ROOT / "psa_fast" / "cli" / "__main__.py"), *options], ranks)


def launcher(options):
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", tiny.free_port()]
    return tiny.start([*command, "--module", "psa_fast.cli", *options])


def told(out):
    """What a run says, without date and seconds; what it leaves is a whole run's."""
    report = json.loads((out / "report.json").read_text())
    del report["provenance"]["date"]
    for stage in report["provenance"]["stages"].values():
        del stage["seconds"], stage["batch_seconds"]
    names = ["answers-base.jsonl", "answers-stage1.jsonl", "report.html", "report.json", "report.md"]
    assert sorted(file.name for file in out.iterdir() if file.name != LOCK) == names
    return json.dumps(report), [(out / name).read_bytes() for name in names[:2]]


@pytest.fixture(scope="module")
def on_one(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    codes, output = tiny.outcome(start(ask(world, out), 1))
    assert codes == [0], output
    return told(out)


def test_through_the_launcher_two_ranks_give_the_report_of_one(world, tmp_path, on_one):
    codes, output = tiny.outcome(launcher(ask(world, tmp_path)))
    assert codes == [0], output
    assert told(tmp_path) == on_one
    assert output.count("wrote ") == 1


def test_a_folder_that_another_run_holds_is_refused_by_the_first_rank_alone(world, tmp_path):
    with lock(tmp_path / LOCK, "busy"):
        first, second = start(ask(world, tmp_path), 2)
        codes, output = tiny.outcome([first])
        assert second.poll() is None  # it waits for the launcher, which ends it
        tiny.kill([second])
    assert codes == [2], output
    assert "another evaluation is under way" in output
    assert "under way" not in second.communicate()[0]


@pytest.mark.parametrize("then", [1, 2])
def test_killed_on_two_ranks_it_goes_on(world, tmp_path, on_one, then):
    processes = start(ask(world, tmp_path), 2)
    deadline = time.monotonic() + 120
    waiting = [tmp_path / f"answers-stage1{rank}.jsonl.part" for rank in ("", ".rank1")]
    while any(not part.exists() or not part.stat().st_size for part in waiting) and time.monotonic() < deadline:
        if all(process.poll() is not None for process in processes):
            break
        time.sleep(0.002)
    tiny.kill(processes)
    codes, output = tiny.outcome(start(ask(world, tmp_path), then))
    assert codes == [0] * then, output
    assert told(tmp_path) == on_one


def test_a_rank_that_ends_ends_the_other_with_a_sentence(world, tmp_path):
    first, second = start(ask(world, tmp_path), 2)
    deadline = time.monotonic() + 120
    while not (tmp_path / "answers-base.jsonl.part").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    tiny.kill([second])
    codes, output = tiny.outcome([first], 60)
    assert codes in ([2], [0]), output  # 0: it was done before
    assert codes == [0] or "another rank has ended" in output


def test_shares_are_whole_batches_of_the_undivided_run():
    class Row:
        def __init__(self, number):
            self.images, self.turns = (), [type("Turn", (), {"text": "x" * (number * 7 % 5)})]

    records = [Row(number) for number in range(23)]
    whole = batches_of(records, 4)
    shares = [share_of(records, 4, rank, 3) for rank in range(3)]
    assert sorted(place for share in shares for place in share) == list(range(23))
    for rank, share in enumerate(shares):
        batches = batches_of([records[place] for place in share], 4)
        assert [[share[place] for place in batch] for batch in batches] == whole[rank::3]
    assert share_of(records[:3], 4, 2, 3) == []


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ],
)
def test_variables_of_no_launcher_are_refused(monkeypatch, variables, sentence):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        launch.shared(lambda ranks: 0)


def test_errors_of_ones_own_work_are_not_taken_for_another_ranks(monkeypatch):
    def fails():
        raise RuntimeError("out of memory")

    monkeypatch.setattr("psa_fast.training.ranks.from_rank_0", lambda work: work())
    with pytest.raises(RuntimeError, match="out of memory"):
        launch.Ranks(0, 2).from_first(fails)
    monkeypatch.setattr("psa_fast.training.ranks.from_rank_0", lambda work: fails())
    with pytest.raises(ChildProcessError, match="another rank has ended"):
        launch.Ranks(0, 2).from_first(lambda: 1)


def test_other_commands_are_not_started_by_a_launcher(capsys):
    assert main(["--local_rank=1", "data", "import", "--list"]) == 2
    assert "data is not shared by ranks" in capsys.readouterr().err
