"""Records in Parquet and in folders of Hugging Face datasets become the JSONL that they stand for."""

import io
import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet
import pytest
from PIL import Image

from psa_fast.cli import main
from psa_fast.data import load_records, to_rgb
from psa_fast.data.record_tables import EVALUATED_ON, TRAINED_ON, as_records, is_table
from psa_fast.data.records import read_records
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.crosswalk import read_taxonomy
from psa_fast.train import resolve_inputs
from psa_fast.training.config import resolve

IMAGE = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
TURN = arrow.struct([("from", arrow.string()), ("value", arrow.string()), ("weight", arrow.float64())])


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def turns(marks=1):
    asked = {"from": "user", "value": "<image>\n" * marks + "what is this ?"}
    return [asked, {"from": "assistant", "value": "a circle ."}]


def columns(shades, **more):
    """A table with one image a row; 0 is no image."""
    return {
        "id": arrow.array([f"row-{n}" for n in range(len(shades))]),
        "image": arrow.array([{"bytes": png(shade), "path": None} if shade else None for shade in shades], IMAGE),
        "safe_type": arrow.array([6 if shade == 1 else None for shade in shades], arrow.int64()),
        "conversations": arrow.array([turns(bool(shade)) for shade in shades], arrow.list_(TURN)),
        **more,
    }


def save_to_disk(folder, table, files=2):
    """The layout of `datasets.Dataset.save_to_disk`."""
    folder.mkdir(parents=True)
    size = -(-table.num_rows // files)
    names = [f"data-{n:05d}-of-{files:05d}.arrow" for n in range(files)]
    for n, name in enumerate(names):
        with arrow.OSFile(str(folder / name), "wb") as file, arrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table.slice(n * size, size))
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path, capsys):
    """Import -> exit code, what was said, records."""

    def run(source, *more):
        out, images = tmp_path / "out.jsonl", tmp_path / "images"
        command = ["data", "import", "records", "--source", source, "--out", out, "--images", images, *more]
        code = main([str(word) for word in command])
        shown = capsys.readouterr()
        return code, shown.out + shown.err, load_records(out, images) if code == 0 else []

    return run


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_both_forms_give_the_same_records(tmp_path, run, form):
    table = arrow.table(columns([1, 2, 0, 1, 3]))
    if form == "parquet":
        source = tmp_path / "x.parquet"
        arrow.parquet.write_table(table, source, row_group_size=2)
    else:
        source = save_to_disk(tmp_path / "saved", table)
    code, said, records = run(source)
    assert code == 0, said
    assert [record.id for record in records] == [f"row-{n}" for n in range(5)]
    assert [record.safe_type for record in records] == [6, None, None, 6, None]
    assert [len(record.images) for record in records] == [1, 1, 0, 1, 1]
    assert records[0].images == records[3].images  # one content, one file
    assert to_rgb(tmp_path / "images" / records[4].images[0]).getpixel((0, 0)) == (3, 0, 0)
    assert records[1].turns[-1].text == "a circle ."
    assert [record.split for record in records] == [None] * 5


def test_several_images_paths_and_splits(tmp_path, run):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "a.png").write_bytes(png(9))
    several = {
        "images": arrow.array([[{"bytes": png(1), "path": "x"}, {"bytes": None, "path": "a.png"}]], arrow.list_(IMAGE)),
        "conversations": arrow.array([turns(2)], arrow.list_(TURN)),
        "score": arrow.array([0.5]),
    }
    path = {
        "image": arrow.array(["a.png"]),
        "split": arrow.array([None], arrow.string()),
        "conversations": arrow.array([turns()], arrow.list_(TURN)),
    }
    arrow.parquet.write_table(arrow.table(several), tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    arrow.parquet.write_table(arrow.table(path), tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    code, said, records = run(tmp_path / "hub")
    assert code == 0, said
    assert [(record.split, len(record.images)) for record in records] == [("test", 1), ("train", 2)]
    assert records[0].images[0] == records[1].images[1]
    assert records[1].extra == {"score": 0.5}
    code, said, records = run(tmp_path / "hub", "--split", "train")
    assert [record.split for record in records] == ["train"]
    code, said, _ = run(tmp_path / "hub", "--split", "dev")
    assert code == 2
    assert "no folder of save_to_disk of the split dev" in said


def test_a_folder_of_splits(tmp_path, run):
    for name, shades in (("train", [1, 2]), ("test", [3])):
        more = {"id": arrow.array([f"{name}-{n}" for n in shades])}
        save_to_disk(tmp_path / "saved" / name, arrow.table(columns(shades, **more)), files=1)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    code, said, records = run(tmp_path / "saved")
    assert code == 0, said
    assert [record.split for record in records] == ["train", "train", "test"]
    (tmp_path / "saved" / "test" / "data-00000-of-00001.arrow").unlink()
    code, said, _ = run(tmp_path / "saved")
    assert (code, "data-00000-of-00001.arrow is not there" in said) == (2, True)


def test_what_is_wrong_has_file_and_row(tmp_path, run):
    source = tmp_path / "x.parquet"
    bad = columns([1, 2, 1], when=arrow.array([None, None, 5], arrow.timestamp("s")))
    bad["image"] = arrow.array([{"bytes": b"no picture", "path": None}, {"bytes": png(2), "path": None}] * 2, IMAGE)[:3]
    bad["safe_type"] = arrow.array([6, 77, 6])
    arrow.parquet.write_table(arrow.table(bad), source)
    code, said, _ = run(source)
    assert code == 2
    assert f"{source}:1: " in said
    assert f"{source}:2: safe_type is 77" in said
    assert f"{source}:3: " in said
    good = columns([1], when=arrow.array([5], arrow.timestamp("s")))
    arrow.parquet.write_table(arrow.table(good), source)
    code, said, _ = run(source)
    assert f"{source}:1: column 'when' holds what JSON has no word for (datetime); leave the column out" in said
    arrow.parquet.write_table(arrow.table({"image": good["image"]}), source)
    assert "no column conversations; the table has image" in run(source)[1]
    source.write_bytes(source.read_bytes()[:-9])
    assert "the table cannot be read" in run(source)[1]
    assert "there is no Parquet file" in run(tmp_path / "images")[1]


def test_tables_in_the_place_of_records_say_what_makes_records_of_them(tmp_path):
    saved = save_to_disk(tmp_path / "saved", arrow.table(columns([1])), files=1)
    source = tmp_path / "x.parquet"
    arrow.parquet.write_table(arrow.table(columns([1])), source)
    with pytest.raises(ValueError, match="it is a folder of datasets; `psa-fast data import records"):
        load_records(saved, tmp_path)
    (problem,) = read_records(source, tmp_path).problems
    assert "Parquet; `psa-fast data import records --source PATH" in problem.message


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("PSA_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_training_reads_the_table_that_it_is_pointed_at(tmp_path, cached):
    folder = tmp_path / "saved"
    for split, shades in {"train": [10, 20, 10], "test": [30]}.items():
        save_to_disk(folder / split, arrow.table(columns(shades)), files=1)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert is_table(folder)
    for splits, shades in ((TRAINED_ON, [10, 20, 10]), (EVALUATED_ON, [30])):
        file, images = as_records(folder, None, splits, "--data_path", "error")
        records = load_records(file, images)
        assert [to_rgb(Path(images, *record.images)).getpixel((0, 0))[0] for record in records] == shades
        # made once: what is there is what the next run reads
        before = Path(file).stat().st_mtime_ns
        assert as_records(folder, None, splits, "--data_path", "error") == (file, images)
        assert Path(file).stat().st_mtime_ns == before
    config = resolve({"recipe": "llava-1.5-7b", "data_path": str(folder)})
    told = resolve_inputs(config, lambda kind, level: None)
    assert (told.data_path, told.image_folder) == as_records(folder, None, TRAINED_ON, "--data_path", "error")


def test_a_table_that_has_changed_is_read_again(tmp_path, cached):
    file = tmp_path / "rows.parquet"
    for shades in ([10], [20, 30]):
        pyarrow.parquet.write_table(arrow.table(columns(shades)), file)
        made, images = as_records(file, None, TRAINED_ON, "--data_path", "error")
        assert len(load_records(made, images)) == len(shades)


def test_rows_that_cannot_be_used_end_the_run_or_are_left_out(tmp_path, cached, capsys):
    file = tmp_path / "rows.parquet"
    broken = arrow.array([{"bytes": png(5), "path": None}, {"bytes": b"no picture", "path": None}], IMAGE)
    pyarrow.parquet.write_table(arrow.table(columns([5, 6]) | {"image": broken}), file)
    with pytest.raises(ValueError, match=r"(?s)1 problem\(s\).*rows.parquet:2: ") as error:
        as_records(file, None, TRAINED_ON, "--data_path", "error")
    assert "no picture" not in str(error.value)
    made, images = as_records(file, None, TRAINED_ON, "--data_path", "skip")
    assert len(load_records(made, images)) == 1
    assert "left out 1 row(s)" in capsys.readouterr().out


def test_splits_that_are_not_meant_are_named(tmp_path, cached):
    for name in ("harm-0.parquet", "help-0.parquet"):
        pyarrow.parquet.write_table(arrow.table(columns([10])), tmp_path / name)
    with pytest.raises(ValueError, match=r"--data_path .* has the splits harm, help; expected train"):
        as_records(tmp_path, None, TRAINED_ON, "--data_path", "error")
    with pytest.raises(ValueError, match="there is no Parquet file"):
        as_records(cached.parent / "nothing", None, TRAINED_ON, "--data_path", "error")
    with pytest.raises(ValueError, match="leave --image_folder out"):
        as_records(tmp_path / "harm-0.parquet", tmp_path, TRAINED_ON, "--data_path", "error")


def test_a_folder_without_tables_is_named_by_the_option_that_named_it(tmp_path):
    with pytest.raises(ValueError, match=f"^--data_path {tmp_path}: there is no Parquet file"):
        as_records(tmp_path, None, TRAINED_ON, "--data_path", "error")


def test_tables_are_read_with_the_options_of_the_run(tmp_path, cached):
    """Labels of another taxonomy and keys like ours: what JSONL may have, a table may have too."""
    other, file = read_taxonomy("llavaguard"), tmp_path / "rows.parquet"
    table = columns([5, 6]) | {
        "safe_type": arrow.array([other.risks[0], other.types[other.harmless]]),
        "taxonomy": arrow.array([other.name] * 2),
        "label": arrow.array(["a", "b"]),
    }
    pyarrow.parquet.write_table(arrow.table(table), file)
    for keys, taxonomy, told in (([], other, "key 'label'"), (["label"], PSA, "llavaguard")):
        with pytest.raises(ValueError, match=told):
            as_records(file, None, TRAINED_ON, "--data_path", "error", keys, taxonomy)
    made, images = as_records(file, None, TRAINED_ON, "--data_path", "error", ["label"], other)
    records = load_records(made, images, keep_keys=["label"], taxonomy=other)
    assert [other.types[record.safe_type] for record in records] == [other.risks[0], other.types[other.harmless]]
    pyarrow.parquet.write_table(arrow.table({name: table[name] for name in table if name != "label"}), file)
    command = [
        "data",
        "import",
        "records",
        "--source",
        file,
        "--out",
        tmp_path / "out.jsonl",
        "--images",
        tmp_path / "i",
    ]
    assert main([*map(str, command), "--taxonomy", "llavaguard"]) == 0
    assert len(load_records(tmp_path / "out.jsonl", tmp_path / "i", taxonomy=other)) == 2
    assert main([*map(str, command)]) == 2
