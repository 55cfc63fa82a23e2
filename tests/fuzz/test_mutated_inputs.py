"""A small seeded sample of damaged files: each is read as it stands, or refused in a sentence with its name.

A longer run, over add-ons too: `python tests/fuzz/run.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pictures
import policies
import pytest
import record_judge
import records
import run

HERE = Path(__file__).resolve().parent


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow on damaged TIFF
@pytest.mark.parametrize(("part", "count"), [("records", 330), ("pictures", 225), ("policies", 180)])
def test_every_damaged_file_is_read_as_it_stands_or_named(tmp_path, part, count):
    found = list(run.cases(part, count, 11, tmp_path))
    assert len(found) == count
    faults = [f"{what}: {verdict}: {word}" for what, verdict, word in found if verdict not in run.RIGHT]
    assert not faults, "\n".join(faults[:20])
    verdicts = {verdict for _, verdict, _ in found}
    assert verdicts == set(run.RIGHT)  # a mutator of which nothing is left whole, or nothing damaged, tests nothing


def test_mutators_are_seeded():
    for make in (
        lambda seed: list(records.mutate(records.rows(), seed, 60)),
        lambda seed: list(pictures.mutate(seed, 60)),
        lambda seed: list(policies.mutate("version: 1\ntypes:\n  a: on\n", seed, 60)),
    ):
        assert make(5) == make(5)
        assert make(5) != make(6)


ROW = records.rows()[0]


@pytest.mark.parametrize(
    ("text", "change"),
    [
        (json.dumps(ROW), lambda r: {"safe_type": 3}),
        (json.dumps(ROW), lambda r: {"turns": r.turns[:1]}),
        (json.dumps(ROW), lambda r: {"images": ("b.jpg",)}),
        (json.dumps(ROW), lambda r: {"id": "2"}),
        (json.dumps(ROW)[:-1] + ', "safe_level": 2}', lambda r: {}),
        (json.dumps({**ROW, "Safe_Type": 1}), lambda r: {}),
        (json.dumps({**ROW, "source_label": "\ud800"}), lambda r: {}),
        (json.dumps({**ROW, "safe_level": 2.0}), lambda r: {}),
        (json.dumps(ROW) + "\n" + json.dumps(ROW)[:30], lambda r: {}),
        (json.dumps(ROW) + "\n" + json.dumps(ROW), lambda r: {}),
    ],
)
def test_the_judge_of_records_sees_what_was_read_otherwise(tmp_path, monkeypatch, text, change):
    """A reader that passes over what is wrong with a row, or changes it, is found out."""
    from dataclasses import replace

    import psa_fast.data.records as module

    images, path = records.make_images(tmp_path / "images"), tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROW))
    assert record_judge.judge(path, images)[0] == "ok"
    (record,) = module.read_records(path, images)[0]
    path.write_text(text)
    monkeypatch.setattr(module, "read_records", lambda *_: ([replace(record, **change(record))], []))
    assert record_judge.judge(path, images)[0] == "silent"


def test_the_judges_tell_faults_apart(tmp_path, monkeypatch):
    import psa_fast.data.images as images
    import psa_fast.data.records as module
    from psa_fast.safety.policy import Policy

    def fail(error):
        def function(*_, **__):
            raise error

        return function

    path, picture, policy = tmp_path / "data.jsonl", tmp_path / "rgb.png", tmp_path / "policy.yaml"
    path.write_text(json.dumps(ROW))
    picture.write_bytes(pictures.encoded()["rgb.png"])
    shipped = run.ROOT.joinpath("psa_fast/safety/policy.yaml").read_text()
    policy.write_text(shipped)
    assert policies.judge(policy)[0] == pictures.judge(picture)[0] == "ok"
    for error, verdict in (
        (KeyError("x"), "foreign exception"),
        (ValueError("something is wrong"), "no sentence"),
        (ValueError(f"{path}:1: {policy}: {picture}: wrong"), "named"),
        (ValueError(f"{path} {policy} " + "a" * 9000), "no sentence"),
    ):
        monkeypatch.setattr(module, "read_records", fail(error))
        monkeypatch.setattr(Policy, "load", fail(error))
        assert record_judge.judge(path, tmp_path)[0] == policies.judge(policy)[0] == verdict
    monkeypatch.setattr(images, "load_image", fail(OSError("broken")))
    assert pictures.judge(picture)[0] == "foreign exception"
    monkeypatch.setattr(images, "load_image", fail(images.ImageError("broken")))
    assert pictures.judge(picture)[0] == "no sentence"
    monkeypatch.undo()

    loaded = Policy.load(policy)
    monkeypatch.setattr(Policy, "load", lambda path: loaded)
    for changed in (
        shipped.replace("unsafe_threshold: 0.5", "unsafe_threshold: 0.4"),
        shipped.replace("privacy: on", "privacy: off"),
        shipped.replace("privacy: on", "privacy: 1"),
        shipped.replace("version: 1", "version: 1\nversion: 1"),
        shipped.replace("politics: on", "politics: on\n  'politics': on"),
        shipped.replace("serious", "no"),
        "[" * 5,
    ):
        policy.write_text(changed)
        assert policies.judge(policy)[0] == "silent", changed


def test_a_reader_that_never_ends_is_a_hang(tmp_path, monkeypatch):
    import limits

    import psa_fast.data.records as module

    def for_ever(*_):
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue

    monkeypatch.setattr(module, "read_records", for_ever)
    monkeypatch.setattr(record_judge, "limit", lambda: limits.limit(1))
    assert record_judge.judge(tmp_path, tmp_path)[0] == "hang"


def test_the_runner_prints_a_table_and_writes_what_it_found(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(HERE / "run.py"), "--records", "11", "--pictures", "25", "--policies", "6"]
    done = subprocess.run(
        [*command, "--addons", "0", "--seed", "3", "--json", str(out)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| records | 11 |" in done.stdout
    result = json.loads(out.read_text())
    assert {part: sum(result[part]["verdicts"].values()) for part in ("records", "pictures", "policies")} == {
        "records": 11,
        "pictures": 25,
        "policies": 6,
    }
