import gzip
import json
from dataclasses import replace

import pytest
from PIL import Image

from psa_fast import cli
from psa_fast.data.keys import meant_field
from psa_fast.data.records import DataError, Record, Turn, find_problems, fingerprint, load_records, read_records

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
    assert plain.group == "", "nothing is known of its risk, so it counts in no safety metric"


def test_a_written_record_is_read_back(tmp_path, folder):
    (record,) = load_records(write(tmp_path, [row(id="x", source_label={"a": 1}, note="kept")]), folder)
    (again,) = load_records(write(tmp_path, [record.to_row()]), folder)
    assert again == record
    assert again.extra == {"note": "kept"}
    (plain,) = load_records(write(tmp_path, [row(safe_type=..., safe_level=...)]), folder)
    assert load_records(write(tmp_path, [plain.to_row()]), folder) == [plain]


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
    "level without type": (row(safe_type=...), "safe_level is 3, but the row has no safe_type"),
    "level of no type": (row(safe_type=None, safe_level="low"), "safe_level is 1, but the row has no safe_type"),
    "image under another name": (row(image=..., images=["a.png"]), "key 'images' is not read; did you mean image?"),
    "type under another name": (
        row(safe_type=..., safe_level=0, label=4),
        "'label' is not read; did you mean safe_type",
    ),
    "another spelling": (row(Safe_Type=4), "key 'Safe_Type' is not read; did you mean safe_type?"),
    "a slip": (row(conversatons=[]), "key 'conversatons' is not read; did you mean conversations?"),
    "a system prompt": (row(system="be kind"), "key 'system' is not read; did you mean conversations?"),
    "chat roles": (
        row(conversations=[{"role": "user", "content": "x"}, ANSWER]),
        "has role and content; expected from",
    ),
    "half a character": (
        row(conversations=[USER, ANSWER | {"value": "a \ud800"}]),
        "conversations[1].value holds '\\ud800'",
    ),
    "half a character in a path": (row(image="\udc00.png"), "image holds '\\udc00' at character 0, which is no text"),
    "half a character in a key": (row(**{"\ud800": 1}), "a key of the object holds '\\ud800'"),
    "half a character below": (row(source_label={"a": ["\udfff"]}), "source_label.a[0] holds '\\udfff'"),
    "a key twice": (json.dumps(row())[:-1] + ', "safe_type": 6}', "the key 'safe_type' stands twice in one object"),
    "a turn's key twice": (json.dumps(row()).replace('{"from"', '{"from": "gpt", "from"', 1), "'from' stands twice"),
    "an endless number": (
        json.dumps(row(id=0)).replace('"id": 0', f'"id": {"7" * 5000}'),
        "id: an integer has 5000 digits",
    ),
    "nested": (
        json.dumps(row(source_label=0)).replace('"source_label": 0', f'"source_label": {"[" * 200 + "]" * 200}'),
        "deep",
    ),
    "nested without end": ('{"source_label": ' + "[" * 100_000, "nested too deeply"),
    "a long value": (row(safe_type="x" * 10**6), "safe_type is 'xxx"),
    "a long path": (row(image=["x" * 10**6, 5]), "field image is ['xxx"),
    "a URI": (row(image="data:image/png;base64," + "x" * 10**6), "is a data: URI"),
    "missing": (json.dumps(row(image=0)).replace('"image": 0', '"image": NaN'), "field image is nan"),
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
        assert all(len(message) < 300 for message in found), name
    assert "id 'twice' was used in line" in problems[-1].message

    with pytest.raises(DataError) as error:
        load_records(path, folder)
    assert all(str(problem) in str(error.value) for problem in problems)
    assert [record.line for record in load_records(path, folder, on_bad_sample="skip")] == [1, len(BAD_ROWS) + 2]


@pytest.mark.parametrize("form", ["lines", "list", "indented list"])
def test_a_bad_value_does_not_hide_the_rows_behind_it(tmp_path, form):
    good = row(image=..., conversations=[{"from": "user", "value": "?"}, ANSWER])
    twice = json.dumps(good)[:-1] + ', "safe_type": 6}'
    texts = [json.dumps(good), twice, json.dumps(good | {"id": 0}).replace('"id": 0', f'"id": {"7" * 5000}')]
    texts += [json.dumps(good | {"source": "\ud800"}), json.dumps(good | {"safe_type": 9}), json.dumps(good)]
    path = tmp_path / "data.json"
    joined = {
        "lines": "\n".join(texts),
        "list": f"[{', '.join(texts)}]",
        "indented list": "[\n" + ",\n".join(texts) + "\n]",
    }
    path.write_text(joined[form])
    records, problems, _ = read_records(path, None)
    first = {"lines": 1, "list": 1, "indented list": 2}[form]
    step = 0 if form == "list" else 1
    assert [record.line for record in records] == [first, first + 5 * step]
    assert [(problem.line, problem.message.split(";")[0]) for problem in problems] == [
        (first + step, "the key 'safe_type' stands twice in one object"),
        (first + 2 * step, "id: an integer has 5000 digits"),
        (first + 3 * step, "source holds '\\ud800' at character 0, which is no text"),
        (first + 4 * step, "safe_type is 9"),
    ]


def test_whole_characters_beyond_16_bits_are_text(tmp_path):
    values = ["\U0001f600", "\\ud83d \U0001f600 \\\\", "\\ud800"]  # the last: a backslash, then letters
    rows = [row(image=..., conversations=[{"from": "user", "value": value}, ANSWER]) for value in values]
    for path in (write(tmp_path, rows), write(tmp_path, [json.dumps(each, ensure_ascii=False) for each in rows])):
        assert [record.turns[0].text for record in load_records(path, None)] == values


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (gzip.compress(b"{}", mtime=0), "the file is gzip"),
        ('{"a": 1}'.encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "the file is UTF-16 or binary"),
        (b"PAR1" + bytes(40), "the file is Parquet"),
        (b"PK\x03\x04" + bytes(40), "the file is zip"),
        (b'{\n "a": 1\n}\n', "an object stands on several lines"),
        (b'{"a": 1}\r{"a": 2}\r', "carriage return"),
    ],
)
def test_files_of_another_kind_are_named_once(tmp_path, content, expected):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    (problem,) = find_problems(path, None)
    assert (problem.line, expected in problem.message) == (1, True), problem


LAYOUTS = {
    "VLGuard's own format": {"id": "1", "image": "a.png", "safe": True, "instr-resp": []},
    "VLGuard in LLaVA's format": {"image": "a.png", "safe": False, "conversations": [USER, ANSWER]},
    "the Hateful Memes format": {"id": 1, "img": "a.png", "label": 0, "text": "a"},
    "a chat dataset with messages": {"messages": [], "images": ["a.png"]},
    "preference pairs": {"image": "a.png", "question": "q", "chosen": "c", "rejected": "r"},
    "a test file of the official PSA-VLM": {"image_path": "a.png", "question": "q", "answer": "a", "type": "x"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_well_known_layouts_are_named_in_one_sentence(tmp_path, folder, capsys, name):
    path = write(tmp_path, [LAYOUTS[name]] * 50)
    assert cli.main(["data", "check", str(path), "--image_folder", str(folder)]) == 2
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(f"this looks like {name}: " in line for line in lines)
    assert last.startswith(f"... and 47 more in {path}: this looks like {name}")
    with pytest.raises(DataError, match="50 problem") as error:
        load_records(path, folder)
    assert len(str(error.value).splitlines()) == 5


def test_keys_that_are_not_read_are_counted(tmp_path, folder, capsys):
    rows = [row(harmful_category=5, note=1), row(harmful_category=2), row(label=3)]
    path = write(tmp_path, rows)
    command = ["data", "check", str(path), "--image_folder", str(folder)]
    assert cli.main(command) == 2
    output = capsys.readouterr()
    assert output.out == f"{path}:3: key 'label' is not read; did you mean safe_type? (--keep_keys leaves it unread)\n"
    assert "not read: harmful_category (2 rows), note (1 rows), label (1 rows)" in output.err
    assert cli.main([*command, "--keep_keys", "label"]) == 0
    assert "not read: harmful_category (2 rows), note (1 rows), label (1 rows)" in capsys.readouterr().out
    assert [record.extra for record in load_records(path, folder, keep_keys=["label"])][2] == {"label": 3}
    kept = load_records(
        write(tmp_path, [LAYOUTS["VLGuard in LLaVA's format"]], "safe.jsonl"), folder, keep_keys=["safe"]
    )
    assert (kept[0].safe_type, kept[0].group) == (None, "")
    with pytest.raises(DataError, match="'label' is not read"):
        load_records(path, folder)
    rows = [row(**{f"key{i}": 1}) for i in range(100)]
    assert cli.main(["data", "check", str(write(tmp_path, rows)), "--image_folder", str(folder)]) == 0
    assert "and 80 more keys" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["image", "source", "category", "question", "image_id", "width", "split_name", "scene"])
def test_other_names_say_something_else(key):
    assert meant_field(key) in (None, key)


def test_a_question_may_be_an_image_alone(tmp_path, folder):
    (record,) = load_records(write(tmp_path, [row(conversations=[USER | {"value": "<image>"}, ANSWER])]), folder)
    assert record.turns[0] == Turn("user", "<image>")
    (problem,) = find_problems(write(tmp_path, [row(image=..., conversations=[USER | {"value": " "}, ANSWER])]), folder)
    assert problem.message == "conversations[0].value is empty; a question needs text or an image"


def test_regions_are_a_box_or_null_for_each_image(tmp_path, folder):
    box = [0.1, 0.2, 0.5, 1]
    (record,) = load_records(write(tmp_path, [row(regions=[box])]), folder)
    assert record.regions == ((0.1, 0.2, 0.5, 1.0),)
    assert load_records(write(tmp_path, [record.to_row()]), folder)[0] == record
    assert load_records(write(tmp_path, [row(regions=[None])]), folder)[0].regions == (None,)
    assert "regions" not in row()
    assert "regions" not in load_records(write(tmp_path, [row()]), folder)[0].to_row()
    reversed_box, pixels, words = [0.5, 0.2, 0.1, 1], [10, 20, 50, 90], ["0", "0", "1", "1"]
    wrong = [[], box, [box, box], [box[:3]], [reversed_box], [pixels], [words], [[True, 0.2, 0.5, 1]], "all"]
    problems = find_problems(write(tmp_path, [row(regions=value) for value in wrong]), folder)
    assert [problem.line for problem in problems] == list(range(1, len(wrong) + 1))
    assert all(problem.message.startswith("field regions is") for problem in problems)


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
    assert cli.main(["data", "check", str(path)]) == 2
    output = capsys.readouterr()
    *lines, last = output.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{number}" for number in (1, 2, 3, 7)]
    assert "group is 'other'" in lines[3]
    assert last == f"... and 5 more in {path}: needs an image folder (--image_folder)"
    assert "9 problem(s); 0 good record(s)" in output.err
    path = write(tmp_path, [row() for _ in range(3)])
    assert cli.main(["data", "check", str(path)]) == 2
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
