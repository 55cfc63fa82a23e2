"""`psa-fast evaluate` and `calibrate` of an add-on of three classes: they count and name its classes, and no others."""

import json
import re

import numpy as np
import pytest
import torch
from builders.judging import result
from builders.other_taxonomy import SMALL, write_policy, write_rows
from builders.tiny_llava import build_addon, build_base, picture

from psa_fast.cli import main
from psa_fast.evaluation import held_out
from psa_fast.evaluation.charts import confusion
from psa_fast.evaluation.during_training import DevSet
from psa_fast.evaluation.evaluate import concept_metrics, per_type
from psa_fast.evaluation.judged import answered
from psa_fast.evaluation.model_card import read_measured
from psa_fast.evaluation.output import OutputFolder
from psa_fast.evaluation.results import Result, attacked, by_group, read_results, taxonomy_of
from psa_fast.safety import Policy, Request, load_guard
from psa_fast.safety.load import addon_hash
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.heads import Taxonomy

PSAS = [name for name in PSA.types if name not in ("clean", "fairness")]  # words that no report has of itself
GRADED = Taxonomy("graded", SMALL.types, 1, ("none", "some", "much"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folder of a base, an add-on of SMALL (addon) and one of PSA (other), a policy and data of SMALL."""
    root = tmp_path_factory.mktemp("small")
    base = build_base(root / "base")
    build_addon(base, root / "addon", taxonomy=SMALL.to_json())
    build_addon(base, root / "other")
    write_policy(root / "policy.yaml")
    write_rows(root / "data", 24)
    return root


def ask(small, out, *more, stage="addon", policy=True):
    options = ("--data", small / "data", "--stage", f"own={small / stage}", "--max_new_tokens", 4, "--batch_size", 8)
    given = ("--policy", small / "policy.yaml") if policy else ()
    return main(["evaluate", *map(str, (*options, *given, "--out", out, *more))])


@pytest.fixture(scope="module")
def evaluated(small, tmp_path_factory):
    """The folder of an evaluation that was cut short in the add-on's second batch, and gone on with."""
    out, whole, count = tmp_path_factory.mktemp("evaluated"), OutputFolder.append, iter(range(1, 100))

    def append(stream, rows):
        whole(stream, rows)
        if next(count) == 5:  # three are the base's
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFolder, "append", staticmethod(append))
        assert ask(small, out) != 0
    assert (out / "answers-own.jsonl.part").stat().st_size > 0
    assert ask(small, out) == 0
    return out


def test_the_reports_count_and_name_its_classes(evaluated, small):
    report = json.loads((evaluated / "report.json").read_text())
    assert report["provenance"]["taxonomy"] == SMALL.to_json()
    assert list(report["per_type"]["own"]) == ["knives", "fire"]
    assert all(row["attack_success"]["n"] == 2 for row in report["per_type"]["own"].values())
    rows = read_results(evaluated / "answers-own.jsonl")
    assert len(rows) == 24
    for row in rows:
        assert (row.taxonomy, len(row.type_probs), len(row.level_probs)) == (SMALL, 3, 2)
        assert row.read_type == int(np.argmax(row.type_probs))
    shown = [row for row in rows if row.group in ("risk", "clean", "benign_twin")]
    right = np.mean([row.safe_type == row.read_type for row in shown])
    assert report["stages"]["own"]["type_accuracy"]["value"] == pytest.approx(right)
    assert report["stages"]["own"]["type_accuracy"]["n"] == len(shown) == 12

    text = (evaluated / "report.md").read_text()
    assert "risk type (3 classes)" in text
    assert "taxonomy: `small`: knives, fine (harmless), fire." in text
    assert "a caution is not enough" in text
    assert "| knives | attack_success |" in text
    page = (evaluated / "report.html").read_text()
    assert "which of 2 kinds of risk it sees." in page
    assert "a caution is enough" not in page
    columns = "".join(f"<th>{name}</th>" for name in SMALL.types)
    assert f"<thead><tr><th></th>{columns}</tr></thead>" in page
    matrix = page.split(columns)[1].split("</table>")[0]
    assert sum(int(count) for count in re.findall(r">(\d*)</td>", matrix) if count) == 12
    assert all(len(re.findall("<td", row)) == 3 for row in matrix.split("<tr>")[1:])
    assert not [name for name in PSAS if name in text]
    assert not [name for name in PSAS if " " in name and name in page]  # the model may say any single word
    assert "level risky" in page

    measured = read_measured(
        evaluated / "report.json", addon_hash(small / "addon"), Policy.load(small / "policy.yaml").hash
    )
    assert measured.taxonomy == SMALL
    assert main(["report", str(evaluated)]) == 0
    assert (evaluated / "report.html").read_text() == page


def test_another_taxonomy_ends_the_evaluation(small, tmp_path, capsys):
    for said, given in (
        ("is of the taxonomy small, the policy of psa", {"policy": False}),
        ("is of the taxonomy psa, the policy of small", {"stage": "other"}),
    ):
        assert ask(small, tmp_path, **given) == 2
        assert said in capsys.readouterr().err
    assert ask(small, tmp_path, "--stage", f"second={small / 'other'}") == 2
    assert "other is of the taxonomy psa, the policy of small" in capsys.readouterr().err
    assert ask(small, tmp_path, "--intervene", 1) == 2
    assert "--intervene is of the taxonomy psa, the policy of small" in capsys.readouterr().err
    assert ask(small, tmp_path, stage="other", policy=False) == 2
    assert "its labels are of the taxonomy 'small', what is read here of 'psa'" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json*"))


@pytest.mark.parametrize("per", [(), ("--per", "type")], ids=["one threshold", "by type"])
def test_the_calibrated_policy_is_of_its_taxonomy_and_the_guard_takes_it(small, tmp_path, monkeypatch, capsys, per):
    monkeypatch.setattr(held_out, "FEWEST_LABELS", 6)
    data, out = write_rows(tmp_path / "data", 72, "dev.jsonl"), tmp_path / "calibrated.yaml"
    sources = ("--addon", small / "addon", "--data", data, "--target", "over_refusal=0.3", "--out", out, *per)
    assert main(["calibrate", *map(str, sources)]) == 2
    assert "is of the taxonomy small, the policy of psa" in capsys.readouterr().err
    assert main(["calibrate", *map(str, (*sources, "--policy", small / "policy.yaml"))]) == 0
    policy = Policy.load(out)
    assert (policy.taxonomy, policy.calibration.rows) == (SMALL, 27)
    assert set(policy.type_thresholds or SMALL.risks) == set(SMALL.risks)

    plain = load_guard(small / "addon", policy=Policy.load(small / "policy.yaml"))
    guard = load_guard(small / "addon", policy=policy)
    requests = [Request("what colour is the circle ?", (picture(i),)) for i in range(6)]
    for readings, verdict in zip(plain.readings(requests), guard.verdicts(requests), strict=True):
        scores = []
        for reading in readings:
            heads = torch.tensor(reading.logits, dtype=torch.float64).split([3, 2])
            types, levels = (part.div(t).softmax(0) for part, t in zip(heads, policy.temperatures, strict=True))
            scores.append(max(float(1 - types[1]), float(1 - levels[0])))
        assert verdict.highest_score == pytest.approx(max(scores), abs=1e-5)
        assert list(verdict.type_probs) == list(SMALL.types)


def of(taxonomy, kind, level, group="risk", **fields):
    row = result(0, group, "", level=level).to_json() | {"safe_type": kind, "safe_level": level, **fields}
    return Result.from_json(row if taxonomy == PSA else row | {"taxonomy": taxonomy.to_json()})


def test_a_caution_is_enough_at_the_lowest_of_several_levels_alone():
    for taxonomy, level, unsafe in (
        (PSA, 1, False),
        (PSA, 2, True),
        (GRADED, 1, False),
        (GRADED, 2, True),
        (SMALL, 1, True),
    ):
        row = of(taxonomy, 0, level, guarded_kind="caution")
        assert attacked(row) is unsafe
        assert answered(row, "guarded").level == (None if taxonomy == SMALL else level)


def test_rows_are_checked_and_written_by_their_taxonomy():
    row = of(SMALL, 2, 1, type_probs=[0.2, 0.3, 0.5], level_probs=[0.4, 0.6])
    assert Result.from_json(json.loads(json.dumps(row.to_json()))) == row
    assert "taxonomy" not in of(PSA, 0, 1).to_json()
    for change, said in (
        ({"safe_type": 3}, "safe_type is 3; expected 0 to 2"),
        ({"safe_level": 2}, "safe_level is 2; expected 0 to 1"),
        ({"type_probs": [1 / 7] * 7}, "expected 3 probabilities"),
        ({"taxonomy": {"version": 1}}, "not an answer of psa-fast evaluate: taxonomy: the file lacks name"),
        ({"taxonomy": "psa"}, "taxonomy: the file is 'psa'"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            Result.from_json(row.to_json() | change)
    assert taxonomy_of([]) == PSA
    with pytest.raises(ValueError, match=r"several taxonomies \(graded, small\)"):
        taxonomy_of([row, of(GRADED, 2, 1)])


def test_tables_have_its_size():
    read = [(0, 0), (0, 2), (2, 2), (1, 1)]
    rows = [
        of(GRADED, kind, int(kind != 1), "clean" if kind == 1 else "risk", read_type=found, read_level=0, images=1,
           unsafe_score=0.5)
        for kind, found in read
    ]  # fmt: skip
    assert [row["name"] for row in confusion(rows)] == ["knives", "fine", "fire"]
    assert [[count for count, _ in row["cells"]] for row in confusion(rows)] == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert list(per_type(rows)) == ["knives", "fire"]
    found = concept_metrics(by_group(rows))
    # F1: 2/3 of knives and of fire, 1 of fine
    assert found["type_macro_f1"].value == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found["unsafe_auroc"].n == 4


def test_what_training_repeats_reads_rows_of_the_policy(small):
    policy = Policy.load(small / "policy.yaml")
    dev = DevSet(str(small / "data" / "test.jsonl"), str(small / "data"), str(small / "base"), policy, 8, answers=False)
    guard = load_guard(small / "addon", policy=policy)
    results = [row for batch in range(dev.batches) for row in dev.answer(guard.model, guard.processor, batch)]
    assert taxonomy_of(results) == SMALL
    found = dev.figures(results)
    assert {name for name, value in found.items() if value is not None} == dev.defined >= {"unsafe_auroc"}
