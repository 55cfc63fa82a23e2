"""Evaluation during training: no weight changes, the best add-on is kept, any number of ranks finds the same."""

import dataclasses
import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from psa_fast.data.records import Record, Turn
from psa_fast.evaluation import during_training
from psa_fast.training import best as best_module
from psa_fast.training import options, reporters
from psa_fast.training.best import Best
from psa_fast.training.config import TrainConfig
from psa_fast.training.validation import overlap_warning

ZERO2 = ["--deepspeed_config", "zero2", "--query_window", 0]
REPORTED = ("loss", "loss_lm", "loss_type", "loss_level", "grad_norm", "lr")


@pytest.fixture(scope="module")
def dev(world, tmp_path_factory):
    """A dozen rows of several groups, short answers."""
    rows = (world / "mixed.jsonl").read_text().splitlines()
    chosen, found = [], {}
    for line in rows:
        group = json.loads(line).get("group", "clean")
        found[group] = found.get(group, 0) + 1
        if found[group] <= 2:
            chosen.append(line)
    path = tmp_path_factory.mktemp("dev") / "dev.jsonl"
    path.write_text("\n".join(chosen) + "\n")
    return ["--eval_data_path", path, "--eval_batch_size", 2]


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    return [row for row in rows if row not in evaluated], evaluated


def assert_equal_weights(left, right):
    left, right = load_file(left / "psa.safetensors"), load_file(right / "psa.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


EVALUATED = [*ZERO2, "--eval_every", 2, "--keep_best", "unsafe_auroc", "--save_steps", 2]


@pytest.fixture(scope="module")
def evaluated(direct, dev, tmp_path_factory):
    """The folder of a run that evaluates and keeps its best add-on, and what it said."""
    out = tmp_path_factory.mktemp("evaluated")
    return out, direct(out, *EVALUATED, *dev)


def test_evaluation_leaves_training_as_it_is_to_the_bit_and_ranks_agree(direct, evaluated, dev, tmp_path):
    plain, two = tmp_path / "plain", tmp_path / "two"
    direct(plain, *ZERO2)
    evaluated, said = evaluated
    assert "step 2/4 evaluation: attack_success " in said
    assert "shares with the rows that are trained on: " in said  # the dev rows are some of them
    assert_equal_weights(plain / "stage1", evaluated / "stage1")
    (left, nothing), (right, rows) = rows_of(plain / "stage1"), rows_of(evaluated / "stage1")
    assert not nothing
    for one, other in zip(left, right, strict=True):
        assert [one[name] for name in REPORTED] == [other[name] for name in REPORTED]
    assert [row["step"] for row in rows] == [2, 4]
    names = {f"eval/{name}" for name in (*during_training.ANSWERS, *during_training.CONCEPT)}
    assert all(set(row) == names | {"step"} for row in rows)
    # two ranks share the batches
    direct(two, *ZERO2, *dev, "--eval_every", 4, ranks=2)
    (last,) = rows_of(two / "stage1")[1]
    assert last["eval/unsafe_auroc"] == pytest.approx(rows[-1]["eval/unsafe_auroc"], abs=1e-6)
    assert last["eval/attack_success"] == rows[-1]["eval/attack_success"]


def test_the_best_add_on_says_what_it_is_and_survives_a_resume(direct, evaluated, dev, tmp_path):
    from psa_fast.safety.load import load_guard

    out = shutil.copytree(evaluated[0], tmp_path / "run")
    stage = out / "stage1"
    _, rows = rows_of(stage)
    about = json.loads((stage / "best" / "best.json").read_text())
    wanted = max(rows, key=lambda row: (row["eval/unsafe_auroc"], -row["step"]))
    assert (about["step"], about["value"]) == (wanted["step"], wanted["eval/unsafe_auroc"])
    assert about["figures"] == {name.removeprefix("eval/"): v for name, v in wanted.items() if name != "step"}
    assert load_guard(stage / "best").has_head
    assert_equal_weights(stage / "best", stage / f"checkpoint-{about['step']}")
    # what a kill between the two moves of best/ and before checkpoint-4 leaves
    (stage / "best").rename(stage / ".best.old")
    shutil.rmtree(stage / "checkpoint-4")
    for path in stage.iterdir():
        if path.is_file() and path.name != "metrics.jsonl":
            path.unlink()
    direct(out, *EVALUATED, *dev, "--resume", "auto")
    assert rows_of(stage)[1] == rows
    assert json.loads((stage / "best" / "best.json").read_text()) == about
    assert not (stage / ".best.old").exists()


def test_without_a_language_model_there_are_concept_figures_only(direct, dev, tmp_path):
    concept = [*ZERO2, *dev, "--stage1_objective", "concept", "--max_steps", 2, "--eval_every", 1]
    direct(tmp_path, *concept, "--keep_best", "over_flagged", "--report_to", "none")
    _, rows = rows_of(tmp_path / "stage1")
    assert all(set(row) == {"step", *(f"eval/{name}" for name in during_training.CONCEPT)} for row in rows)
    assert not (tmp_path / "stage1" / "tensorboard").exists()
    assert (tmp_path / "stage1" / "best" / "psa.safetensors").is_file()
    said = direct(tmp_path / "no", *concept, "--keep_best", "text_risk_auroc", "--resume", "auto", "--eval_data_path",
                  clean_only(dev, tmp_path), expect=2)  # fmt: skip
    assert "--keep_best text_risk_auroc has no value on the rows of --eval_data_path" in said


def clean_only(dev, folder):
    rows = [line for line in dev[1].read_text().splitlines() if json.loads(line).get("group", "clean") == "clean"]
    (folder / "clean.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "clean.jsonl"


def test_the_option_knows_the_figures_of_the_evaluation():
    answers = options.SMALLER_ANSWERS + options.LARGER_ANSWERS
    assert sorted(answers) == sorted(during_training.ANSWERS)
    assert sorted(options.SMALLER_CONCEPT + options.LARGER_CONCEPT) == sorted(during_training.CONCEPT)


class Addon:
    """An engine and its module, which writes its number."""

    def __init__(self, number):
        self.module, self.number = self, number

    def save_addon(self, folder, state_dict):
        (folder / "number").write_text(str(self.number))


@pytest.mark.parametrize(
    ("metric", "values", "kept"),
    [("unsafe_auroc", [0.5, None, 0.8, 0.8, 0.7], 2), ("attack_success", [0.5, 0.2, None, 0.2, 0.3], 1)],
)
def test_the_best_is_the_first_of_the_largest_or_smallest(metric, values, kept, tmp_path, group_of_one, monkeypatch):
    monkeypatch.setattr(best_module, "gather_addon_state", lambda model: {})
    config = TrainConfig(output_dir=str(tmp_path))
    config.stage_dir.mkdir()
    for number, value in enumerate(values):  # each time as a run that goes on
        best = Best(metric, config, "digest")
        best.offer(Addon(number), number, {metric: value})
    assert (config.stage_dir / "best" / "number").read_text() == str(kept)
    with pytest.raises(ValueError, match=f"holds the best add-on by {metric!r}"):
        Best("general_accuracy", config, "digest")
    with pytest.raises(ValueError, match="on other --eval_data_path records"):
        Best(metric, config, "of others")


def test_a_failure_while_the_best_is_written_leaves_the_one_before(tmp_path, group_of_one, monkeypatch):
    monkeypatch.setattr(best_module, "gather_addon_state", lambda model: {})
    config = TrainConfig(output_dir=str(tmp_path))
    config.stage_dir.mkdir()
    best = Best("unsafe_auroc", config, "digest")
    assert best.offer(Addon(1), 1, {"unsafe_auroc": 0.5})

    def full(folder, state_dict):
        raise OSError(28, "No space left on device", str(folder))

    with pytest.raises(OSError, match="No space left"):
        best.offer(SimpleNamespace(module=SimpleNamespace(save_addon=full)), 2, {"unsafe_auroc": 0.9})
    assert (best.folder / "number").read_text() == "1"
    assert Best("unsafe_auroc", config, "digest").value == 0.5


@pytest.mark.parametrize("name", reporters.TRACKERS)
def test_a_tracker_gets_the_options_and_the_figures(name, tmp_path, monkeypatch, group_of_one):
    calls = []
    package = ModuleType(name)
    package.init = lambda **given: calls.append(given)
    package.log = lambda figures, step: calls.append((figures, step))
    package.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    config = TrainConfig(output_dir=str(tmp_path), report_to=f"{name},{name}")
    reporters.check_reporters(config)
    (reporter,) = reporters.open_reporters(config, 0)
    reporter.log({"loss": 0.5}, 3)
    reporter.close()
    first, *rest = calls
    assert first == {"project": "psa-fast", "name": str(config.stage_dir), "config": config.to_dict()}
    assert rest == [({"loss": 0.5}, 3), "finished"]

    def refuse(**given):
        raise RuntimeError("no API key\nand more")

    package.init = refuse
    with pytest.raises(ValueError, match=rf"--report_to {name}: it cannot start a run \(.*no API key"):
        reporters.open_reporters(config, 0)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"needs the package {name}: pip install 'psa-fast\[{name}\]'"):
        reporters.check_reporters(config)


def test_rows_that_are_trained_on_are_counted_and_others_are_not():
    def record(line, image, text, twin=None):
        turns = (Turn("user", f"<image>\n{text}"), Turn("assistant", "yes"))
        return Record((image,), 6, 0, turns, path="dev.jsonl", line=line, twin=twin)

    trained = [record(1, "a.png", "what?", "t1"), record(2, "b.png", "who?")]
    config = TrainConfig(eval_data_path="dev.jsonl", image_folder="pictures")
    fresh = SimpleNamespace(records=[record(7, "c.png", "what?")])
    assert overlap_warning(config, fresh, trained) is None
    same = SimpleNamespace(records=[*fresh.records, record(8, "a.png", "What?"), record(9, "d.png", "x", "t1")])
    said = overlap_warning(config, same, trained)
    assert "1 request(s), the images of 1 row(s), the twins of 1 (first: dev.jsonl:8)" in said
    elsewhere = dataclasses.replace(config, eval_image_folder="other")
    assert "0 request(s), the images of 0 row(s), the twins of 1 (first: dev.jsonl:9)" in overlap_warning(
        elsewhere, same, trained
    )
