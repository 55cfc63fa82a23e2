"""Public datasets in their raw layouts become the records written down; what is broken in them has file and line."""

import copy
import json
import sys

import pytest
from builders.raw_datasets import DATASETS
from builders.raw_layouts import packed, png, put, view
from PIL import Image

from psa_fast import cli
from psa_fast.data import DataError, ImageError, load_records, to_rgb
from psa_fast.data.importers import IMPORTERS, load_importer
from psa_fast.data.importers.taxonomy_map import read_taxonomy_map
from psa_fast.data.rows import read_entries

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
PAGE = b"<!DOCTYPE html>\n<html><title>Sign in</title></html>\n"


@pytest.fixture
def run(tmp_path, capsys):
    """Import from tmp_path/raw with images in tmp_path/images -> exit code, what is printed, records."""

    def run(name, *arguments):
        out, images = tmp_path / "out.jsonl", tmp_path / "images"
        out.unlink(missing_ok=True)
        command = ["data", "import", name, "--source", tmp_path / "raw", "--out", out, "--images", images]
        code = cli.main([str(word) for word in (*command, *arguments)])
        shown = capsys.readouterr()
        records = load_records(out, images) if out.exists() else []
        return code, shown.out + shown.err, records

    return run


def lines(records):
    twins = {}
    for record in records:
        twin = record.twin
        if record.source == "hateful_memes":  # the caption's hash
            twin = f"hateful_memes-{twins.setdefault(twin, len(twins) + 1)}"
        yield view(
            {
                "id": record.id,
                "safe_type": record.safe_type,
                "safe_level": record.safe_level,
                "group": record.group,
                "image": record.image_label,
                "text": record.text_label,
                "joint": record.joint_label,
                "label": record.source_label,
                "split": record.split,
                "twin": twin,
                "answer": record.turns[-1].text,
                "ours": record.extra.get("answer_from") == "template",
                "rejected": record.rejected,
            }
        )


def test_every_importer_has_a_dataset_here():
    assert set(DATASETS) | {"figstep", "psa", "records"} == set(IMPORTERS)


@pytest.mark.parametrize("name", DATASETS)
def test_rows_become_the_records_written_down(tmp_path, run, capsys, name):
    DATASETS[name].build(tmp_path / "raw")
    code, shown, records = run(name)
    assert code == 0, shown
    assert list(lines(records)) == DATASETS[name].lines
    shades = [[Image.open(tmp_path / "images" / image).getpixel((0, 0))[0] for image in r.images] for r in records]
    words = [record.turns[0].text.removeprefix("<image>").strip() for record in records]
    assert list(zip(shades, words, strict=True)) == [
        ([] if shade is None else [shade], question) for shade, question in DATASETS[name].asked
    ]
    licence = load_importer(name).LICENCE
    assert {(record.source, record.licence) for record in records} == {(name, licence)}
    folder = ["--image_folder", str(tmp_path / "images")]
    assert cli.main(["data", "check", str(tmp_path / "out.jsonl"), *folder]) == 0, capsys.readouterr().out
    ours = sum(line.split(" | ")[-1].startswith("(ours)") for line in DATASETS[name].lines)
    assert (f"{ours} answers are ours" in shown) == (ours > 0)


def shorter(raw, folder):
    path = raw.build(folder)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 5])


def changed(raw, folder, key, value):
    rows = copy.deepcopy(raw.rows)
    rows[0][key] = value
    raw.build(folder, rows)


def unknown_category(raw, folder):
    if raw.category is not None:
        changed(raw, folder, raw.category, 7 if raw.category == "label" else "weather")
    elif "metadata" in raw.rows[0]:
        changed(raw, folder, "metadata", {"over": "weather"})
    elif raw.image == "id":
        changed(raw, folder, "refused_to_answer", ["Maybe"])
    else:
        path = raw.build(folder)
        path.rename(path.with_name("14-Weather.json"))


def other_image(raw, folder, name):
    embedded = isinstance(raw.rows[0][raw.image], dict)
    changed(raw, folder, raw.image, {"bytes": None, "path": name} if embedded else name)


def lost_files(raw, folder):
    raw.build(folder)
    for name in raw.files:
        (folder / name).unlink()


def pointer_image(raw, folder):
    if raw.image is not None and isinstance(raw.rows[0][raw.image], dict):
        changed(raw, folder, raw.image, {"bytes": POINTER, "path": None})
        return
    raw.build(folder)
    for name in raw.files:  # archives are pointers themselves
        put(folder / name, POINTER)


def twice(raw, folder):
    raw.build(folder, [*raw.rows, raw.rows[0]])


def evil_archive(raw, folder):
    raw.build(folder)
    for name in raw.files:
        put(folder / name, packed(name, {"a/../../evil.png": png(1)}))


def archived(raw):
    return any(name.endswith((".zip", ".tar")) for name in raw.files)


# fault -> (what makes it, the sets that can have it, the message)
FAULTS = {
    "truncated": (shorter, lambda raw: True, ""),
    "pointer": (lambda raw, folder: put(raw.build(folder), POINTER), lambda raw: True, "Git LFS pointer"),
    "page": (lambda raw, folder: put(raw.build(folder), PAGE), lambda raw: True, "HTML page"),
    "unknown category": (
        unknown_category,
        lambda raw: raw.category or raw.image != "image" or "metadata" in raw.rows[0],
        "",
    ),
    "missing image": (lost_files, lambda raw: raw.files, "neither below"),
    "absent image": (lambda raw, folder: other_image(raw, folder, "none.png"), lambda raw: raw.image, "'none.png"),
    "path traversal": (
        lambda raw, folder: other_image(raw, folder, "../../x.png"),
        lambda raw: raw.image,
        "leaves the image",
    ),
    "absolute path": (lambda raw, folder: other_image(raw, folder, "/etc/x.png"), lambda raw: raw.image, "absolute"),
    "pointer for an image": (pointer_image, lambda raw: raw.image or raw.files, "Git LFS pointer"),
    "evil archive": (evil_archive, archived, "leaves the archive"),
    "twice": (twice, lambda raw: raw.unique, ""),
}


@pytest.mark.parametrize(
    ("name", "fault"), [(name, fault) for name in DATASETS for fault in FAULTS if FAULTS[fault][1](DATASETS[name])]
)
def test_what_is_broken_has_file_and_line_and_is_not_written(tmp_path, run, name, fault):
    raw = DATASETS[name]
    if name == "xstest" and fault == "truncated":
        raw.build(tmp_path / "raw", [raw.rows[0] | {"prompt": 'an "open'}, *raw.rows[1:]])
        path = tmp_path / "raw" / raw.file
        path.write_text(path.read_text()[:-30])
    else:
        FAULTS[fault][0](raw, tmp_path / "raw")
    code, shown, records = run(name)
    assert code == 2, shown
    assert not (tmp_path / "evil.png").exists()
    message = FAULTS[fault][2]
    at = [text for text in shown.splitlines() if str(tmp_path / "raw") in text and message in text]
    assert at, shown
    place = at[0].removeprefix("psa-fast: error: ").split(": ")[0]
    assert place.rpartition(":")[2].isdigit(), shown
    good = list(lines(records))
    assert all(line in raw.lines for line in good), "a row that is written is a good one"
    assert len(good) < len(raw.lines) or fault == "twice"
    if fault in ("unknown category", "absent image", "path traversal", "absolute path"):
        assert f":{raw.line}: " in at[0], at[0]
        assert raw.lines[0] not in good
    if fault == "twice":
        assert good == raw.lines


def test_images_are_written_once_and_lie_where_they_are_without_a_folder(tmp_path, run, capsys):
    raw = DATASETS["holisafe"]
    raw.build(tmp_path / "raw")
    code, shown, records = run("holisafe")
    assert (code, len(records)) == (0, 5)
    written = [path for path in (tmp_path / "images").rglob("*") if path.is_file()]
    assert [path.read_bytes() for path in written] == [png(1)]
    assert "; 4 were there already" in shown
    out = tmp_path / "beside.jsonl"
    plain = ["data", "import", "holisafe", "--source", str(tmp_path / "raw"), "--out", str(out)]
    assert cli.main(plain) == 0
    assert [record.images for record in load_records(out, tmp_path / "raw")] == [("images/a.png",)] * 5


@pytest.mark.parametrize("name", ["spa_vl", "vlguard", "vlsbench"])
def test_images_without_a_file_of_their_own_need_a_folder(tmp_path, capsys, name):
    DATASETS[name].build(tmp_path / "raw")
    out = tmp_path / "out.jsonl"
    assert cli.main(["data", "import", name, "--source", str(tmp_path / "raw"), "--out", str(out)]) == 2
    assert "--images DIR says where" in capsys.readouterr().err
    assert not out.exists()


def test_what_is_missing_is_counted(tmp_path, run):
    DATASETS["vlguard"].build(tmp_path / "raw")
    _, shown, _ = run("vlguard")
    assert "split train: 3 entries of 2000 published, 1997 missing" in shown
    assert "split test: 0 entries of 1000 published, 1000 missing" in shown
    _, shown, records = run("vlguard", "--split", "train")
    assert ("split test" in shown, len(records)) == (False, 5)
    for split, message in (("test", "has none of: test.json"), ("dev", "--split is 'dev'; vlguard has: train, test")):
        code, shown, records = run("vlguard", "--split", split)
        assert (code, records, message in shown) == (2, [], True), shown


def test_of_two_members_that_fit_none_is_guessed(tmp_path, run):
    raw = DATASETS["vlguard"]
    raw.build(tmp_path / "raw")
    members = {"a/train/HOD/2.png": png(1), "b/train/HOD/2.png": png(2), "train/bad_ads/1.png": png(3)}
    put(tmp_path / "raw" / "train.zip", packed("train.zip", members))
    code, shown, records = run("vlguard")
    assert (code, len(records)) == (2, 1)
    assert "is in the archives 2 times: train.zip:a/train/HOD/2.png, train.zip:b/train/HOD/2.png" in shown


def test_the_table_of_categories_can_be_replaced(tmp_path, run):
    DATASETS["siuo"].build(tmp_path / "raw")
    own = tmp_path / "own.yaml"
    own.write_text("types:\n  Privacy Violation: [politics, low]\n")
    code, _, records = run("siuo", "--taxonomy_map", own)
    assert (code, {(record.safe_type, record.safe_level) for record in records}) == (0, {(0, 1)})
    own.write_text("types:\n  other: [politics, low]\n")
    code, shown, records = run("siuo", "--taxonomy_map", own)
    assert (code, records) == (2, [])
    assert f"siuo_gen.json:2: category 'privacy violation' is not in {own}" in shown


BAD_MAPS = {
    "types: {a: [weather, low]}": "'a': safe_type is 'weather'",
    "types: {a: [politics, dire]}": "'a': safe_level is 'dire'",
    "types: {a: [clean, low]}": "'a' has a level above none, but no risk type",
    "types: {a: politics}": "'a' is 'politics'; expected [type, level]",
    "types: {a_b: [politics, low], A-B: [politics, low]}": "'A-B' is there twice",
    "types: {}": "types is empty",
    "type: {a: [politics, low]}": "unknown key 'type'",
    "types: [a]": "types is ['a']; expected a mapping",
    "types: {a: [politics, low]}\nlevels: {1: dire}": "1: safe_level is 'dire'",
}


@pytest.mark.parametrize("text", BAD_MAPS)
def test_a_bad_table_is_one_sentence(tmp_path, text):
    path = tmp_path / "map.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="taxonomy map") as error:
        read_taxonomy_map(path)
    assert BAD_MAPS[text] in str(error.value)


def test_the_list_names_every_importer(capsys):
    assert cli.main(["data", "import", "--list"]) == 0
    printed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == list(IMPORTERS)
    assert cli.main(["data", "import"]) == 2
    assert "needs a DATASET" in capsys.readouterr().err
    assert cli.main(["data", "import", "--list", "siuo", "--source", "a", "--out", "b"]) == 2
    assert "--list prints all datasets" in capsys.readouterr().err


def test_without_pyarrow_one_sentence_says_what_to_install(tmp_path, run, monkeypatch):
    put(tmp_path / "raw" / "data" / "train-0.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, shown, _ = run("spa_vl")
    assert (code, len(shown.splitlines())) == (2, 1)
    assert "pip install 'psa-fast[data]'" in shown


def test_twin_licence_and_worse_answers_are_fields_of_a_record(tmp_path):
    turns = [{"from": "user", "value": "Who?"}, {"from": "assistant", "value": "No."}]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"conversations": turns, "twin": "a", "licence": "MIT", "rejected": "Yes."}))
    (record,) = load_records(path, None)
    assert (record.twin, record.licence, record.rejected) == ("a", "MIT", ("Yes.",))
    row = {"twin": "a", "licence": "MIT", "rejected": ["Yes."], "conversations": turns}
    assert record.to_row() == row
    for wrong in ({"twin": 3}, {"licence": ["MIT"]}, {"rejected": [3]}, {"rejected": [""]}, {"Rejected": "Yes."}):
        path.write_text("\n" + json.dumps({"conversations": turns} | wrong))
        with pytest.raises(DataError, match=r"data\.jsonl:2: (field|key)"):
            load_records(path, None)


def test_an_image_that_was_not_downloaded_is_told_as_such_everywhere(tmp_path):
    put(tmp_path / "a.png", POINTER)
    for source in (POINTER, tmp_path / "a.png"):
        with pytest.raises(ImageError, match=r"is a Git LFS pointer, not the file itself"):
            to_rgb(source)
    with pytest.raises(ImageError, match="is an HTML page"):
        to_rgb(PAGE)


OBJECTS = {
    '{"a": 1,\n"b": [2]}\n': [("a", 1, 1, None), ("b", 2, [2], None)],
    "{}": [],
    '{"a": 1,\n}': [("a", 1, 1, None), ("", 2, None, "not JSON from here on")],
    '{"a": 1\n"b": 2}': [("a", 1, 1, None), ("", 2, None, "expected ',' or '}'")],
    '{"a": 1,\n"a": 2}': [("a", 1, 1, None), ("", 2, None, "'a' stands twice")],
    '{"a": 1}\nx': [("a", 1, 1, None), ("", 2, None, "text after the end")],
    "{1: 2}": [("", 1, None, "expected a key")],
    '{"a":\n': [("", 1, None, "not JSON from here on")],
    '{"a": "\\ud800"}': [("a", 1, None, "which is no text")],
}


@pytest.mark.parametrize("text", OBJECTS)
def test_the_entries_of_an_object_have_their_lines(tmp_path, text):
    put(tmp_path / "a.json", text)
    found = list(read_entries(tmp_path / "a.json", "an object"))
    assert [(key, row.line, row.value) for key, row in found] == [each[:3] for each in OBJECTS[text]]
    for (_, row), (*_, message) in zip(found, OBJECTS[text], strict=True):
        assert row.error is None if message is None else message in row.error
