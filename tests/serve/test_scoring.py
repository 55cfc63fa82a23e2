"""`psa-fast score`: verdicts as by the guard, whatever is damaged, and after a kill at any place."""

import json

import pytest
from builders.http_requests import QUESTION, png

from psa_fast.cli import main
from psa_fast.safety import Request
from psa_fast.safety.guard import Guard


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for seed in range(5):
        (folder / ("more" if seed > 2 else "") / f"{seed}.png").write_bytes(png(seed))
    (folder / "1.png").write_bytes(png(1)[:50])
    (folder / "notes.txt").write_text("none")
    return folder


@pytest.fixture
def score(trained, tmp_path):
    def run(*options, out=tmp_path / "scores.jsonl"):
        given = ["score", "--model", trained.addon, "--base", trained.base, "--out", out, *options]
        return main([*map(str, given)])

    return run


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_folder_is_scored_as_by_the_guard(score, guard, pictures, tmp_path, capsys):
    assert score("--images", pictures, "--question", QUESTION, "--batch_size", 2) == 0
    found = rows(tmp_path / "scores.jsonl")
    assert [row["id"] for row in found] == ["0.png", "1.png", "2.png", "more/3.png", "more/4.png"]
    for seed, row in enumerate(found):
        if seed == 1:
            assert row["verdict"]["code"] == "not_checked"
            assert "damaged" in row["verdict"]["error"]
            continue
        (verdict,) = guard.verdicts([Request(QUESTION, (png(seed),))])
        assert row["verdict"]["action"] == verdict.action
        assert row["verdict"]["unsafe_score"] == pytest.approx(verdict.unsafe_score, abs=1e-6)
        assert row["verdict"]["policy_hash"] == guard.policy.hash
    said = capsys.readouterr().out
    assert "1 files of" in said
    assert "5 verdicts" in said
    assert "1 error" in said
    assert score("--images", pictures) == 2
    assert "complete already" in capsys.readouterr().err
    assert score("--images", pictures, "--overwrite") == 0


def test_records_are_scored_by_what_their_users_ask(score, guard, tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    talk = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "red ."}]
    words = [{"from": "human", "value": "blue ?"}, {"from": "gpt", "value": "green ."}]
    data = tmp_path / "data.jsonl"
    data.write_text(
        json.dumps({"id": "x", "image": "a.png", "conversations": talk}) + "\n" + json.dumps({"conversations": words})
    )
    assert score("--data", data) == 0
    verdicts = guard.verdicts([Request(f"<image>\n{QUESTION}", (png(1),)), Request("blue ?")])
    expected = [("x", verdicts[0].unsafe_score), (f"{data}:2", verdicts[1].unsafe_score)]
    assert [(row["id"], row["verdict"]["unsafe_score"]) for row in rows(tmp_path / "scores.jsonl")] == expected


@pytest.mark.parametrize("left", ["nothing", "a batch and half a line", "a batch and a row", "everything"])
def test_a_run_that_was_cut_short_goes_on_to_the_same_file(score, pictures, tmp_path, monkeypatch, left):
    options = ("--images", pictures, "--question", QUESTION, "--batch_size", 2)
    assert score(*options, out=tmp_path / "whole.jsonl") == 0
    out, part = tmp_path / "scores.jsonl", tmp_path / "scores.jsonl.part"
    real, asked = Guard.verdicts, []

    def dies(self, requests, **kwargs):
        asked.append(len(requests))
        if len(asked) > 2:
            raise KeyboardInterrupt
        return real(self, requests, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Guard, "verdicts", dies)
        assert score(*options) == 130
    assert not out.exists()
    lines = part.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    kept = {
        "nothing": lines[:1],
        "a batch and half a line": [*lines[:3], lines[3][:40]],
        "a batch and a row": lines[:4],
        "everything": lines,
    }[left]
    part.write_text("".join(kept))
    asked.clear()
    monkeypatch.setattr(Guard, "verdicts", lambda self, r, **kw: asked.append(len(r)) or real(self, r, **kw))
    assert score(*options) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sum(asked) == {"nothing": 5, "everything": 1}.get(left, 3)
    assert not part.exists()


def test_other_settings_do_not_go_on_with_a_run(score, pictures, tmp_path, capsys):
    part = tmp_path / "scores.jsonl.part"
    part.write_text('{"run": {}}\n{"id": "0.png"}\n')
    assert score("--images", pictures) == 2
    assert "other data or settings" in capsys.readouterr().err
    assert part.exists()
    for options, message in (
        (["--images", tmp_path / "absent"], "no such folder"),
        (["--images", pictures, "--image_folder", pictures], "--image_folder goes with --data"),
        (["--images", pictures, "--batch_size", 0], "--batch_size is 0"),
        (["--data", tmp_path / "absent.jsonl"], "absent.jsonl"),
    ):
        assert score(*options) == 2
        assert message in capsys.readouterr().err
