import json
from dataclasses import replace

import pytest
from PIL import Image

from psa_fast import cli
from psa_fast.data.records import DataError, Record, Turn, find_problems, fingerprint, load_records

USER = {"from": "USER", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "ASSISTANT", "value": "A square."}


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        Image.effect_noise((32, 32), 50).save(images / name)
    whole = (images / "a.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    return images


def row(**changes):
    base = {"image": "a.png", "safe_type": 1, "safe_level": 3, "conversations": [USER, ANSWER]}
    return {name: value for name, value in (base | changes).items() if value is not ...}


def write(tmp_path, rows, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def test_good_rows_become_records(tmp_path, folder):
    text_only = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}] * 2
    rows = [
        row(id=7, source="x", source_label=["raw", 1], split="train", group="text_risk", score=0.5),
        row(image=["a.png", "b.png"], safe_type="Clean", safe_level=0)
        | {"conversations": [{"from": "user", "value": "Is <image> like <image>?"}, ANSWER]},
        "",
        row(image="a.png<split>b.png"),
        row(image=..., safe_type=..., safe_level=..., conversations=text_only),
    ]
    path = write(tmp_path, rows)
    first, second, pair, plain = load_records(path, folder)
    assert first.turns == (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A square."))
    assert (first.id, first.source_label, first.group, first.extra) == ("7", ["raw", 1], "text_risk", {"score": 0.5})
    assert (first.safe_type, first.safe_level, first.images, first.where) == (1, 3, ("a.png",), f"{path}:1")
    assert (second.safe_type, second.group, second.images) == (6, "clean", ("a.png", "b.png"))
    assert pair.images == ("a.png", "b.png")
    assert pair.line == 4
    assert pair.group == "risk"
    assert pair.turns[0].text == "<image>\n<image>\nWhat is it?"
    assert (plain.images, plain.safe_type, plain.safe_level, len(plain.turns)) == ((), None, None, 4)


def test_a_written_record_is_read_back(tmp_path, folder):
    (record,) = load_records(write(tmp_path, [row(id="x", source_label={"a": 1}, note="kept")]), folder)
    (again,) = load_records(write(tmp_path, [record.to_row()]), folder)
    assert again == record
    assert again.extra == {"note": "kept"}


BAD_ROWS = {
    "not json": ("{broken", "not a JSON object"),
    "a list": ("3", "JSON number; expected an object"),
    "unknown type": (row(safe_type=9), "safe_type is 9"),
    "unknown type name": (row(safe_type="fun"), "safe_type is 'fun'"),
    "type as bool": (row(safe_type=True), "safe_type is True"),
    "unknown level": (row(safe_level=4), "safe_level is 4"),
    "clean with a level": (row(safe_type=6, safe_level=2), "safe_level is 2, but safe_type is 6 (clean)"),
    "no conversation": (row(conversations=...), "field conversations is missing"),
    "empty conversation": (row(conversations=[]), "field conversations is empty"),
    "a turn that is text": (row(conversations=[USER, "x"]), "conversations[1] is a JSON string"),
    "unknown role": (row(conversations=[USER, ANSWER | {"from": "system"}]), "conversations[1].from is 'system'"),
    "answer first": (row(conversations=[ANSWER, USER]), "conversations[0].from is 'ASSISTANT'"),
    "no answer": (row(conversations=[USER]), "expected an answer at the end"),
    "empty answer": (row(conversations=[USER, ANSWER | {"value": " \n"}]), "conversations[1].value is empty"),
    "answer not text": (row(conversations=[USER, ANSWER | {"value": 3}]), "conversations[1].value is a JSON number"),
    "mark in an answer": (row(conversations=[USER, ANSWER | {"value": "<image>"}]), "conversations[1].value holds"),
    "more images than marks": (row(image=["a.png", "b.png"]), "names 2 image(s), but the conversation has 1"),
    "mark without image": (row(image=...), "names 0 image(s), but the conversation has 1"),
    "image not a path": (row(image=5), "field image is 5"),
    "three glued": (row(image="a<split>b<split>c"), "expected two paths around one <split>"),
    "absent image": (row(image="no.png"), "no.png' does not exist"),
    "truncated image": (row(image="cut.png"), "cut.png' is damaged"),
    "leaves the folder": (row(image="../secret.png"), "leaves the image folder"),
    "absolute": (row(image="/etc/passwd"), "is absolute"),
    "unknown group": (row(group="other"), "group is 'other'"),
    "benign group of a risk": (row(group="benign_twin"), "group is 'benign_twin', but safe_type is 1"),
    "id not text": (row(id=[1]), "field id is [1]"),
}


def test_every_bad_row_is_named_with_its_line(tmp_path, folder):
    path = write(tmp_path, [row(), *(bad for bad, _ in BAD_ROWS.values()), row(id="twice"), row(id="twice")])
    problems = find_problems(path, folder)
    lines = [problem.line for problem in problems]
    assert lines == sorted(lines)
    assert set(lines) == {*range(2, len(BAD_ROWS) + 2), len(BAD_ROWS) + 3}
    for line, (name, (_, expected)) in enumerate(BAD_ROWS.items(), start=2):
        found = [problem.message for problem in problems if problem.line == line]
        assert any(expected in message for message in found), f"{name}: {found}"
    assert "id 'twice' was used in line" in problems[-1].message

    with pytest.raises(DataError) as error:
        load_records(path, folder)
    assert all(str(problem) in str(error.value) for problem in problems)
    assert [record.line for record in load_records(path, folder, on_bad_sample="skip")] == [1, len(BAD_ROWS) + 2]


def test_one_row_may_have_several_problems(tmp_path, folder):
    path = write(tmp_path, [row(image="no.png", safe_type=8, safe_level="huge")])
    assert len(find_problems(path, folder)) == 3


def test_header_check_leaves_truncation_to_the_reader(tmp_path, folder):
    path = write(tmp_path, [row(image="cut.png")])
    assert len(load_records(path, folder, decode=False)) == 1


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["data.json", "misnamed.jsonl"])
def test_lists_are_read_with_lines(tmp_path, folder, indent, name):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([row(id=1), row(safe_type=9), row(id=2)], indent=indent).encode())
    records, (problem,) = load_records(path, folder, on_bad_sample="skip"), find_problems(path, folder)
    assert [record.id for record in records] == ["1", "2"]
    lines = path.read_text().splitlines()
    assert problem.line == (1 if indent is None else 1 + next(i for i, text in enumerate(lines) if "9" in text) - 2)


@pytest.mark.parametrize("text", ["[{}", "[{} {}]", "[{},]", "[{}] x", "[", "[]", "", "\n", "{}\n\xff"])
def test_broken_files_are_problems(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_bytes(text.encode("latin-1"))
    assert find_problems(path, None)
    with pytest.raises(ValueError, match=r"data\.json"):
        load_records(path, None)


def test_absent_file_and_folder_are_sentences(tmp_path, folder):
    with pytest.raises(ValueError, match=r"data file .*none.jsonl' does not exist"):
        load_records(tmp_path / "none.jsonl", folder)
    with pytest.raises(ValueError, match=r"image folder .*none' does not exist"):
        load_records(write(tmp_path, [row()]), tmp_path / "none")
    assert "needs an image folder" in find_problems(write(tmp_path, [row()]), None)[0].message


def test_check_without_an_image_folder_says_so_in_a_few_lines(tmp_path, capsys):
    path = write(tmp_path, [*[row() for _ in range(6)], row(group="other"), row()])
    assert cli.main(["data", "check", str(path)]) == 1
    output = capsys.readouterr()
    *lines, last = output.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{number}" for number in (1, 2, 3, 7)]
    assert "group is 'other'" in lines[3]
    assert last == f"... and 5 more image(s) in {path}: each needs an image folder (--image_folder)"
    assert "9 problem(s); 0 good record(s)" in output.err
    path = write(tmp_path, [row() for _ in range(3)])
    assert cli.main(["data", "check", str(path)]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_fingerprint_changes_with_what_is_trained_on_only():
    turns = (Turn("user", "what ?"), Turn("assistant", "a dog"))
    record = Record(("a.png",), 0, 1, turns, id="1", path="a.jsonl", line=1)
    first = fingerprint([record])
    assert fingerprint([replace(record, id="2", line=7)]) == first
    others = [
        replace(record, images=("b.png",)),
        replace(record, safe_level=2),
        replace(record, safe_type=None),
        replace(record, turns=(turns[0], Turn("assistant", "a cat"))),
    ]
    assert len({first, fingerprint([record, record]), *(fingerprint([other]) for other in others)}) == 6
