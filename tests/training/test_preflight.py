"""Before a model is loaded: rows that cannot be used are dropped or all named, and what nothing can be learnt from."""

import json
import math

import pytest
import torch
from rich.console import Console

from psa_fast.data.records import fingerprint
from psa_fast.training import loop, run_setup
from psa_fast.training.config import check_warmup, parse_args

LONG = (3, 7, 40)


@pytest.fixture
def rows(world, tmp_path):
    """Writes rows of the world's file, three of which have no answer within 120 tokens."""

    def write(change=lambda row: row, count=50):
        lines = [json.loads(line) for line in (world / "mixed.jsonl").read_text().splitlines()[:count]]
        for index in LONG:
            lines[index]["conversations"][0]["value"] += " what" * 200
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))
        return path

    return write


@pytest.fixture
def unloaded(monkeypatch):
    """A run stops where the model would be loaded."""

    class Loaded(Exception):
        pass

    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(run_setup, "build_model", load)
    monkeypatch.setattr(run_setup, "shared_matrix_rate", lambda dtype: 1.0)
    return Loaded


@pytest.fixture
def start(base, world, tmp_path, group_of_one):
    """Runs until it ends; returns what was printed."""

    def go(data, *options, expect=None):
        argv = ["--model_name_or_path", base, "--data_path", data, "--image_folder", world, "--hint_rate", 0]
        if "--stage1_objective" not in options:  # the recipe's own does without the language model
            argv += ["--stage1_objective", "joint"]
        config = parse_args([str(x) for x in (*argv, "--output_dir", tmp_path / "out", *options)])
        console = Console(record=True, width=500)
        try:
            loop._run(config, None, console, 0, 1)
        except Exception as error:
            if expect is None or not isinstance(error, expect):
                raise
        return console.export_text()

    return go


# padded rows, the concept objective and one micro-batch a step need no lengths, and yet must not meet such a row later
MODES = [
    (),
    ("--packing", "False"),
    ("--stage1_objective", "concept"),
    ("--global_batch_size", "8", "--micro_batch_size", "8"),
]


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_cannot_be_encoded_are_all_named_before_the_first_step(rows, start, mode):
    path = rows()
    with pytest.raises(ValueError, match=r"3 problem\(s\) in .*rows\.jsonl") as error:
        start(path, "--max_length", 120, *mode)
    for index in LONG:
        assert f"{path}:{index + 1}: no supervised token within max_length 120" in str(error.value)


@pytest.mark.parametrize("mode", MODES)
def test_they_are_dropped_counted_and_named_where_the_run_may_skip_them(rows, start, unloaded, monkeypatch, mode):
    path, seen = rows(), []
    monkeypatch.setattr(run_setup, "fingerprint", lambda records: seen.append(records) or fingerprint(records))
    said = start(path, "--max_length", 120, "--on_bad_sample", "skip", *mode, expect=unloaded)
    assert "skipped 3 row(s) that cannot be encoded:" in said
    for index in LONG:
        assert f"{path}:{index + 1}: no supervised token" in said
    (records,) = seen
    assert sorted(record.line for record in records) == [n + 1 for n in range(50) if n not in LONG]


def test_the_fingerprint_is_that_of_the_rows_that_are_left(rows, start, unloaded, monkeypatch):
    digests = []
    monkeypatch.setattr(run_setup, "fingerprint", lambda records: digests.append(fingerprint(records)) or digests[-1])
    options = ["--max_length", 120, "--on_bad_sample", "skip"]
    path = rows()
    start(path, *options, expect=unloaded)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for index, line in enumerate(lines) if index not in LONG) + "\n")
    start(path, *options, expect=unloaded)
    assert digests[0] == digests[1]


def test_the_lengths_survive_dropping_and_balancing(rows, start, unloaded, monkeypatch):
    kept = []
    prepared = run_setup.prepare_dataset
    monkeypatch.setattr(run_setup, "prepare_dataset", lambda *a: kept.append(prepared(*a)) or kept[-1])
    start(rows(), "--max_length", 120, "--on_bad_sample", "skip", "--clean_samples", 4, expect=unloaded)
    (dataset,) = kept
    assert sum(record.safe_type == 6 for record in dataset.records) == 4
    for index in range(len(dataset)):
        assert dataset.lengths[index, False] == len(dataset.without_images(index, None).input_ids)


def test_what_is_cut_is_said_in_one_line(rows, start, unloaded):
    def two_pictures(row):
        if isinstance(row.get("image"), str):
            row["image"] = [row["image"]] * 2
            row["conversations"][0]["value"] = "<image>\n<image>\n" + row["conversations"][0]["value"][8:]
            row["conversations"] += [
                {"from": "human", "value": "what is this ? " * 40}, {"from": "gpt", "value": "a red circle ."},
            ]  # fmt: skip
        return row

    said = start(rows(two_pictures), "--max_length", 120, "--on_bad_sample", "skip", expect=unloaded)
    (line,) = [line for line in said.splitlines() if "max_length 120 cuts" in line]
    assert "lose the end of an answer" in line


def test_a_key_that_looks_like_ours_may_be_left_unread(rows, start, unloaded):
    path = rows(lambda row: row | {"label": "street", "severity": 2})
    options = ["--max_length", 120, "--on_bad_sample", "skip"]
    with pytest.raises(ValueError, match="no usable record"):
        start(path, *options)
    assert "skipped 3 row(s)" in start(path, *options, "--keep_keys", "label, other", expect=unloaded)


def test_nothing_to_learn_ends_the_run_before_a_model_is_loaded(rows, start):
    def unlabelled(row):
        return {key: value for key, value in row.items() if key not in ("safe_type", "safe_level", "group")}

    with pytest.raises(ValueError, match="none of 50 rows has both a picture and a label"):
        start(rows(unlabelled))


def test_more_than_the_base_s_positions_is_refused_with_both_numbers(rows, start, unloaded):
    path = rows()
    with pytest.raises(ValueError, match="--max_length 4097 is more than the 4096 positions of"):
        start(path, "--max_length", 4097)
    # without the language model no position is used
    start(path, "--max_length", 4097, "--stage1_objective", "concept", expect=unloaded)


def test_a_warm_up_that_outlasts_the_run_is_refused_once_the_rows_are_known(rows, start, unloaded):
    path = rows()
    # 50 rows, 3 epochs, 128 rows a step: 2 steps
    epochs = ["--num_train_epochs", 3, "--global_batch_size", 128, "--micro_batch_size", 128]
    with pytest.raises(ValueError, match="--warmup_steps 2 leaves none of the run's 2 steps"):
        start(path, *epochs, "--warmup_steps", 2)
    start(path, *epochs, "--warmup_steps", 1, expect=unloaded)
    assert "20 warm-up steps outlast the run of 4" in start(path, "--max_steps", 4, expect=unloaded)


def test_a_base_that_is_damaged_is_a_sentence(rows, start, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"--model_name_or_path .*broken"):
        start(rows(), "--model_name_or_path", broken)


def test_the_rate_in_the_metrics_is_the_step_s_own(world, base, tmp_path, group_of_one):
    """Against the schedule's formula: linear warm-up from 0, then a cosine to 0 at the last step's end."""
    argv = {
        "model_name_or_path": base, "data_path": world / "mixed.jsonl", "image_folder": world, "hint_rate": 0,
        "output_dir": tmp_path, "max_steps": 6, "warmup_steps": 2, "global_batch_size": 2, "micro_batch_size": 2,
        "learning_rate": 1e-2, "dtype": "fp32", "stage1_objective": "concept", "deepspeed_config": "zero2",
        "dataloader_num_workers": 0,
    }  # fmt: skip
    config = parse_args([f"--{name}={value}" for name, value in argv.items()])
    torch.manual_seed(0)
    loop._run(config, None, Console(quiet=True), 0, 1)
    found = [json.loads(line)["lr"] for line in (tmp_path / "stage1" / "metrics.jsonl").read_text().splitlines()]
    warm = [0.0, 0.5e-2]
    cosine = [1e-2 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert found == pytest.approx([*warm, *cosine], rel=1e-6)
    with pytest.raises(ValueError, match="--warmup_steps 2 leaves none of the run's 2 steps"):
        check_warmup(config, 2)


def test_rows_with_an_answer_of_an_importer_end_the_run_or_are_dropped(rows, start, unloaded, monkeypatch):
    seen = []
    monkeypatch.setattr(run_setup, "fingerprint", lambda records: seen.append(records) or fingerprint(records))
    path = rows(lambda row: row | ({"answer_from": "template"} if row["safe_type"] == 2 else {}))
    options = ["--max_length", 2000]
    marked = sum("template" in line for line in path.read_text().splitlines())
    assert 0 < marked < 50
    with pytest.raises(ValueError, match=f"the answers of {marked} of 50 rows are the importer's"):
        start(path, *options)
    said = start(path, *options, "--on_template_answers", "drop", expect=unloaded)
    assert f"left out {marked} row(s) whose answer an importer made up" in said
    assert all(record.safe_type != 2 for record in seen[0])
    start(path, *options, "--stage1_objective", "concept", expect=unloaded)
    assert [len(records) for records in seen] == [50 - marked, 50]
