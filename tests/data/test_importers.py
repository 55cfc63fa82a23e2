"""Public datasets as records: every row is written or named, and what is written passes the check."""

import csv
import gzip
import json

import pytest
from PIL import Image

from psa_fast import cli
from psa_fast.data import load_records
from psa_fast.data.records import Turn

HEAD = "dataset,category_id,task_id,category_name,question,instruction\n"


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png", "query_ForbidQI_7_1_6.png", "query_ForbidQI_8_2_6.png"):
        Image.new("RGB", (9, 7)).save(images / name)
    return images


@pytest.fixture
def run(tmp_path, folder, capsys):
    """Import -> exit code, standard output, the lines that were written (None: no file)."""

    def run(source, *arguments):
        out = tmp_path / "new" / "out.jsonl"
        code = cli.main(["data", "import", source, "--out", str(out), *map(str, arguments)])
        shown = capsys.readouterr()
        left = [path.name for path in out.parent.iterdir()] if out.parent.exists() else []
        assert left in ([], ["out.jsonl"]), "nothing else is left behind"
        rows = [json.loads(line) for line in out.read_text().splitlines()] if left else None
        out.unlink(missing_ok=True)
        return code, shown.out + shown.err, rows

    return run


def write(path, rows):
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    path.write_text(text)
    return path


def test_figstep_rows_keep_the_source_label_and_pass_the_check(tmp_path, folder, run):
    table = tmp_path / "SafeBench.csv"
    table.write_text(HEAD + 'ForbidQI,7,1,Privacy Violation,"Who,\nme?",x\nForbidQI,8,2,Legal Opinion,q,x\n')
    code, shown, rows = run("figstep", "--csv", table, "--image_folder", folder)
    assert (code, "read 2 rows, wrote 2 records" in shown, "0 rows cannot be read" in shown) == (0, True, True)
    privacy, legal = load_records(write(tmp_path / "again.jsonl", rows), folder)
    assert (privacy.safe_type, privacy.safe_level, privacy.source_label) == (4, 3, "Privacy Violation")
    assert (legal.safe_type, legal.safe_level, legal.id) == (5, 1, "figstep_ForbidQI_8_2")

    table.write_text(table.read_text().replace("Legal Opinion", "Weather"))
    code, shown, rows = run("figstep", "--csv", table, "--image_folder", folder)
    assert (code, [row["safe_type"] for row in rows]) == (2, [4])
    assert f"{table}:4: category_name is 'Weather'; expected one of: Illegal Activity" in shown
    assert "1 x unknown category_name" in shown
    code, shown, rows = run("figstep", "--csv", table, "--image_folder", folder, "--on_bad_sample", "error")
    assert (code, rows, "wrote nothing" in shown) == (2, None, True)


def test_a_long_cell_is_read(tmp_path, folder, run):
    limit = csv.field_size_limit()
    table = tmp_path / "SafeBench.csv"
    table.write_text(HEAD + f'ForbidQI,7,1,Privacy Violation,"{"x" * 200_000}",x\n')
    code, _, rows = run("figstep", "--csv", table, "--image_folder", folder)
    assert (code, len(rows)) == (0, 1)
    assert csv.field_size_limit() == limit


BROKEN_TABLES = {
    "latin 1": (HEAD.encode() + b"ForbidQI,7,1,Privacy \xe9,q,x\n", "SafeBench.csv is not UTF-8 text"),
    "gzip": (gzip.compress(HEAD.encode()), "SafeBench.csv is gzip, not UTF-8 text"),
    "a cell without end": (
        HEAD.encode() + b'ForbidQI,"' + b"x" * (2**24 + 9),
        "SafeBench.csv:2: FigStep CSV cannot be",
    ),
    "no column": (
        b"dataset,category_id\n",
        "SafeBench.csv:1: no column task_id, category_name; is this a FigStep CSV?",
    ),
    "empty": (b"", "SafeBench.csv:1: no column dataset"),
}


@pytest.mark.parametrize("name", BROKEN_TABLES)
def test_broken_tables_are_one_sentence(tmp_path, folder, run, name):
    content, message = BROKEN_TABLES[name]
    (tmp_path / "SafeBench.csv").write_bytes(content)
    code, shown, rows = run("figstep", "--csv", tmp_path / "SafeBench.csv", "--image_folder", folder)
    assert (code, rows) == (2, None)
    assert shown.startswith("psa-fast: error: ")
    assert message in shown
    assert len(shown.splitlines()) == 1


def test_absent_sources_and_folders_are_one_sentence(tmp_path, folder, run):
    for arguments in (
        ("figstep", "--csv", tmp_path / "none.csv", "--image_folder", folder),
        ("psa", "--source", tmp_path / "none.jsonl"),
        ("psa", "--source", write(tmp_path / "a.jsonl", []), "--image_folder", tmp_path / "none"),
        ("psa", "--source", write(tmp_path / "a.jsonl", []), "--map_path", "/data"),
        ("psa", "--source", write(tmp_path / "a.jsonl", []), "--map_path", "/data=a", "--map_path", "/data/=b"),
    ):
        code, shown, rows = run(*arguments)
        assert (code, rows, len(shown.splitlines())) == (2, None, 1), shown


def test_columns_that_repeat_and_cells_beyond_them_are_refused(tmp_path, folder, run):
    table = tmp_path / "SafeBench.csv"
    arguments = ("figstep", "--csv", table, "--image_folder", folder)
    table.write_text(HEAD + "ForbidQI,7,1,Privacy Violation,Who, me?,x\nForbidQI,8,2,Legal Opinion,q,x\n")
    code, shown, rows = run(*arguments)
    assert (code, [row["id"] for row in rows]) == (2, ["figstep_ForbidQI_8_2"])
    assert f"{table}:2: the row has more cells than the table has columns" in shown
    table.write_text("category_name," + HEAD + "Fraud,ForbidQI,7,1,Privacy Violation,q,x\n")
    code, shown, rows = run(*arguments)
    assert (code, rows) == (2, None)
    assert f"{table}:1: the column category_name is there twice" in shown


def test_an_import_does_not_write_over_its_source(tmp_path, capsys):
    source = write(tmp_path / "only.jsonl", [training_row("a.png")])
    before = source.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(source)
    for out in (source, tmp_path / "link.jsonl"):
        assert cli.main(["data", "import", "psa", "--source", str(source), "--out", str(out)]) == 2
        assert "is the file that is imported" in capsys.readouterr().err
        assert source.read_bytes() == before


def training_row(image, question="What is it?", **changes):
    turns = [{"from": "USER", "value": question}, {"from": "ASSISTANT", "value": "A square."}]
    return {"safe_type": 2, "safe_level": 2, "image": image, "conversations": turns} | changes


def test_official_training_rows_become_records(tmp_path, folder, run):
    first = [
        training_row("/data/x/images/a.png"),  # no mark
        training_row("/data/x/images/b.png", "<image>\nWhat is it?", id=7),
        training_row("/data/x/images/a.png<split>/other/c.png", safe_type=6, safe_level=0),
        training_row("/data/x/images/a.png<split>/other/c.png", "<image>\nWhat is it?"),
    ]
    second = [training_row("sub/c.png", safe_type="privacy"), training_row(["a.png", "b.png"])]
    sources = write(tmp_path / "train.jsonl", first), tmp_path / "list.json"
    sources[1].write_text(json.dumps(second, indent=1))
    maps = ("--map_path", "/data/x=nowhere", f"/other={folder}/sub", "--map_path", "/data/x/images=")
    code, shown, rows = run("psa", "--source", sources[0], "--source", sources[1], *maps, "--image_folder", folder)
    assert code == 0, shown
    assert "read 6 rows, wrote 6 records" in shown
    assert "by type: 2 insults and bullying 4, 4 privacy 1, 6 clean 1" in shown
    records = load_records(write(tmp_path / "again.jsonl", rows), folder)
    assert [record.images for record in records] == [
        ("a.png",),
        ("b.png",),
        ("a.png", "sub/c.png"),
        ("a.png", "sub/c.png"),
        ("sub/c.png",),
        ("a.png", "b.png"),
    ]
    asked = Turn("user", "<image>\nWhat is it?")
    twice = Turn("user", "<image>\n<image>\nWhat is it?")
    assert [record.turns[0] for record in records] == [asked, asked, twice, twice, asked, twice]
    assert [record.id for record in records] == ["train-1", "train-2", "train-3", "train-4", "list-1", "list-2"]
    assert records[1].source_label == {"safe_type": 2, "safe_level": 2, "id": 7}
    assert records[4].source_label == {"safe_type": "privacy", "safe_level": 2}
    assert {record.source for record in records} == {"psa"}


def test_every_official_row_is_accounted_for(tmp_path, folder, run):
    rows = [
        *[training_row(f"/data/{n}.png") for n in range(5)],
        training_row("a.png"),
        training_row("a.png", safe_type=9),
        training_row("a.png", safe_type=6),
        training_row("none.png"),
        training_row("../a.png"),
        training_row(5),
        "3",
        "{broken",
        training_row("a.png", conversations=[]),
        training_row("a.png", "\ud800"),
        training_row("b.png"),
    ]
    source = write(tmp_path / "data.jsonl", rows)
    code, shown, written = run("psa", "--source", source, "--image_folder", folder)
    assert code == 2
    assert [row["image"] for row in written] == ["a.png", "b.png"]
    assert f"read {len(rows)} rows, wrote 2 records" in shown
    assert f"{len(rows) - 2} rows cannot be read" in shown
    assert "5 x image path is absolute, and no --map_path fits it" in shown
    assert "2 x an image that cannot be used" in shown
    for line, message in {
        1: "image path '/data/0.png' is absolute, and no --map_path fits it: --map_path '/data'=FOLDER would",
        7: "safe_type is 9",
        8: "safe_level is 2, but safe_type is 6 (clean)",
        9: "does not exist",
        10: "leaves the image folder",
        11: "field image is 5",
        12: "the row is 3; expected an object",
        13: "the line is not a JSON object",
        14: "field conversations is empty",
        15: "conversations[0].value holds '\\ud800'",
    }.items():
        assert any(text.startswith(f"{source}:{line}: ") and message in text for text in shown.splitlines()), message
    counted = sum(int(text.split(" x ")[0]) for text in shown.splitlines() if " x " in text)
    assert counted == len(rows) - 2, "each row stands under one reason"


def test_without_an_image_folder_images_are_not_looked_at_and_that_is_said(tmp_path, run):
    source = write(tmp_path / "data.jsonl", [training_row("/data/img/a.png"), training_row("/data/b.png")])
    code, shown, rows = run("psa", "--source", source, "--map_path", "/data/img=pictures", "/data=/mnt")
    assert (code, [row["image"] for row in rows]) == (2, ["pictures/a.png"])
    assert "--map_path makes '/data/b.png' an absolute path without --image_folder: '/mnt/b.png'" in shown
    assert "the images were not looked at" in shown


REFUSE, CAUTION, SAFE = "Refuse to Answer", "Proceed with Caution", "Safe to Answer"
# type, refused_to_answer -> our type, level and group
GRADED = [
    ("politics", [REFUSE, CAUTION], (0, 3, "risk")),
    ("Illegal_Risk", [CAUTION], (1, 1, "risk")),
    (2, [SAFE, CAUTION], (2, 1, "risk")),
    ("3", [SAFE], (6, 0, "benign_twin")),
    ("racial", True, (3, 3, "risk")),
    ("misleading", False, (5, None, "risk")),
    ("privacy", None, (4, None, "risk")),
    ("clean", [SAFE], (6, 0, "clean")),
    (None, [REFUSE], (None, None, "")),
]


def test_official_test_rows_are_graded(tmp_path, folder, run):
    rows = [
        {"image_path": "/t/a.png", "question": "Who?", "answer": "No.", "type": kind, "refused_to_answer": grade}
        for kind, grade, _ in GRADED
    ]
    source = write(tmp_path / "test.jsonl", rows)
    code, shown, written = run("psa", "--source", source, "--map_path", "/t=", "--image_folder", folder)
    assert code == 0, shown
    records = load_records(write(tmp_path / "again.jsonl", written), folder)
    assert [(record.safe_type, record.safe_level, record.group) for record in records] == [each for *_, each in GRADED]
    assert records[0].source_label == {"type": "politics", "refused_to_answer": [REFUSE, CAUTION]}
    assert records[0].turns == (Turn("user", "<image>\nWho?"), Turn("assistant", "No."))


def test_what_a_test_row_lacks_is_said(tmp_path, folder, run):
    good = {"image_path": "a.png", "question": "Who?", "answer": "No.", "type": 1}
    bad = {
        "the row has no answer": {**good, "answer": None},
        "field question is 5": good | {"question": 5},
        "type is 'weather'; expected 0 to 6 or one of: politics": good | {"type": "weather"},
        "type is 7": good | {"type": 7},
        "type is ['x']": good | {"type": ["x"]},
        "refused_to_answer is ['Maybe']": good | {"refused_to_answer": ["Maybe"]},
        "refused_to_answer is [3]": good | {"refused_to_answer": [3]},
        "safe_level is 3, but safe_type is 6": good | {"type": 6, "refused_to_answer": [REFUSE]},
    }
    source = write(tmp_path / "test.jsonl", [good, *bad.values()])
    code, shown, written = run("psa", "--source", source, "--image_folder", folder)
    assert (code, len(written)) == (2, 1)
    for line, message in enumerate(bad, start=2):
        assert any(text.startswith(f"{source}:{line}: {message}") for text in shown.splitlines()), message


def test_two_rows_of_one_id_are_a_problem(tmp_path, folder, run):
    table = tmp_path / "SafeBench.csv"
    table.write_text(HEAD + "ForbidQI,7,1,Fraud,q,x\n" * 2)
    code, shown, rows = run("figstep", "--csv", table, "--image_folder", folder)
    assert (code, len(rows)) == (2, 1)
    assert f"{table}:3: id 'figstep_ForbidQI_7_1' was used in {table}:2" in shown


def test_a_failed_write_leaves_what_was_there(tmp_path, folder, capsys):
    source = write(tmp_path / "data.jsonl", [training_row("a.png")])
    (tmp_path / "file").write_text("mine")
    code = None
    try:
        code = cli.main(
            ["data", "import", "psa", "--source", str(source), "--out", str(tmp_path / "file" / "out.jsonl")]
        )
    except OSError as error:  # the command line turns it into a sentence
        assert str(tmp_path / "file") in str(error)  # noqa: PT017
    assert code in (None, 2)
    assert (tmp_path / "file").read_text() == "mine"
