"""The folder of an evaluation: two runs never meet in it, and nothing is lost or replaced in silence."""

import json
import os

import pytest

from psa_fast.evaluation.output import OutputFolder


def test_a_second_run_is_kept_out_until_the_first_ends(tmp_path):
    with OutputFolder(tmp_path / "out").claim():
        with (
            pytest.raises(ValueError, match=r"another evaluation is under way in .*out"),
            OutputFolder(tmp_path / "out").claim(),
        ):
            pass
        with OutputFolder(tmp_path / "other").claim():
            pass
    with pytest.raises(ZeroDivisionError), OutputFolder(tmp_path / "out").claim():
        1 / 0  # noqa: B018
    with OutputFolder(tmp_path / "out").claim():
        pass


@pytest.mark.parametrize("place", ["/dev/null/x", "/proc/x"])
def test_a_folder_that_cannot_be_written_is_named(place):
    with pytest.raises(OSError, match=place), OutputFolder(__import__("pathlib").Path(place)).claim():
        pass


def test_answers_are_kept_as_they_come_and_named_when_all_are_there(tmp_path):
    for old in ("answers-base.jsonl", "answers-gone.jsonl", "answers-mine.jsonl"):
        (tmp_path / old).write_text("old")
    (tmp_path / "report.json").write_text('{"stages": {"base": {}, "gone": {}}}')
    with OutputFolder(tmp_path).claim() as out:
        out.check_older_report({}, overwrite=True)
        with out.answers("base") as stream:
            out.append(stream, [{"a": "é"}])
            # a run that is killed here leaves this
            assert (tmp_path / "answers-base.jsonl.part").read_text(encoding="utf-8") == '{"a": "é"}\n'
            out.append(stream, [{"a": 3}, {"a": 2}])
        out.complete("base", [{"a": "é"}, {"a": 2}, {"a": 3}])
        with out.answers("stage1"):
            pass
        assert (tmp_path / "answers-base.jsonl").read_text() == "old"
        out.finish()
    assert sorted(file.name for file in tmp_path.glob("answers*")) == [
        "answers-base.jsonl",
        "answers-mine.jsonl",  # of no report: not ours to remove
        "answers-stage1.jsonl",
    ]
    rows = [json.loads(line) for line in (tmp_path / "answers-base.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["a"] for row in rows] == ["é", 2, 3]


def test_a_full_disk_is_one_sentence_with_the_file(tmp_path):
    os.symlink("/dev/full", tmp_path / "answers-base.jsonl.part")
    with (
        OutputFolder(tmp_path).claim() as out,
        pytest.raises(OSError, match=r"No space left.*answers-base"),
        out.answers("base") as stream,
    ):
        out.append(stream, [{"a": 1}])


def test_a_report_is_replaced_by_its_like_only(tmp_path):
    settings = {"data": "world", "limit": None, "stages": {"a": "b"}}
    out = OutputFolder(tmp_path)
    out.check_older_report(settings)
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"stages": {}, "provenance": {"settings": settings}}))
    out.check_older_report(dict(reversed(settings.items())))
    for content in (
        {"provenance": {"settings": {**settings, "limit": 32}}},
        {"provenance": {}},
        {"provenance": []},
        {},
    ):
        report.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"report\.json is of other data or settings.*--overwrite"):
            out.check_older_report(settings)
    report.write_text("{")
    with pytest.raises(ValueError, match="--overwrite"):
        out.check_older_report(settings)


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "answers-base.jsonl.part")
    with (
        OutputFolder(tmp_path).claim() as out,
        pytest.raises(ValueError, match=r"answers-base.jsonl.part is a pipe, not a file"),
        out.answers("base"),
    ):
        pass
    (tmp_path / ".evaluate.lock").unlink()
    os.mkfifo(tmp_path / ".evaluate.lock")
    with pytest.raises(ValueError, match=r"lock is a pipe, not a file"), OutputFolder(tmp_path).claim():
        pass
