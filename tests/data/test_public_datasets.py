"""Public datasets in their raw layouts become the records written down here; what is broken in them has file and line."""

import copy

import pytest
from raw_datasets import DATASETS, packed, png, put, view

from psa_fast import cli
from psa_fast.data import load_records
from psa_fast.data.importers import IMPORTERS, load_importer

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
    assert set(DATASETS) | {"figstep", "psa"} == set(IMPORTERS)


@pytest.mark.parametrize("name", DATASETS)
def test_rows_become_the_records_written_down(tmp_path, run, capsys, name):
    DATASETS[name].build(tmp_path / "raw")
    code, shown, records = run(name)
    assert code == 0, shown
    assert list(lines(records)) == DATASETS[name].lines
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
    "unknown category": (unknown_category, lambda raw: raw.category or raw.image != "image" or "metadata" in raw.rows[0], ""),
    "missing image": (lost_files, lambda raw: raw.files, "neither below"),
    "absent image": (lambda raw, folder: other_image(raw, folder, "none.png"), lambda raw: raw.image, "'none.png"),
    "path traversal": (lambda raw, folder: other_image(raw, folder, "../../x.png"), lambda raw: raw.image, "leaves the image"),
    "absolute path": (lambda raw, folder: other_image(raw, folder, "/etc/x.png"), lambda raw: raw.image, "absolute"),
    "pointer for an image": (pointer_image, lambda raw: raw.image or raw.files, "Git LFS pointer"),
    "evil archive": (evil_archive, archived, "leaves the archive"),
    "twice": (twice, lambda raw: raw.unique, ""),
}  # fmt: skip


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
