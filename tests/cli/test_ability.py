"""`psa-fast ability`: columns of the same tasks side by side; what cannot be compared is refused."""

import json

import pytest

from psa_fast.cli import main


def results(**changes):
    """What lmms-eval 0.7.3 writes, in little."""
    figures = {
        "mme": {"alias": "mme", "score,none": 1510.25, "score_stderr,none": "N/A"},
        "pope": {"acc,none": 0.8765, "acc_stderr,none": 0.012, "acc_stderr_clt,none": 0.02, "f1,strict": None},
    }
    found = {
        "results": figures,
        "versions": {"mme": 1, "pope": 1},
        "n-shot": {"mme": 0, "pope": 0},
        "higher_is_better": {"mme": {"score": True}, "pope": {"acc": True, "f1": True}},
        "n-samples": {task: {"original": 9, "effective": 8} for task in figures},
        "config": {"model": "psa", "model_args": "addon=a,guarded=True", "limit": None, "gen_kwargs": None},
        "lmms_eval_version": "0.7.3",
        "date": "20261127_090000",
    }
    return found | changes


@pytest.fixture
def run(tmp_path, capsys):
    def run(columns, *more):
        words = []
        for name, content in columns.items():
            file = tmp_path / name / "psa" / "20261127_results.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content))
            words.append(f"{name}={tmp_path / name}")
        code = main(["ability", *words, *map(str, more)])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run


def test_the_table_has_a_column_for_each_run(run, tmp_path):
    off = results(config=results()["config"] | {"model_args": "addon=a,guarded=False"})
    off["results"]["mme"]["score,none"] = 1520
    code, said = run({"on": results(), "off": off}, "--out", tmp_path / "t.md")
    assert code == 0, said
    lines = said.splitlines()
    assert lines[0] == "| task | metric | better | n | on | off |"
    assert lines[2:5] == [
        "| mme | `score` | higher | 8 | 1510.2 | 1520 |",
        "| pope | `acc` | higher | 8 | 0.8765 (0.012) | 0.8765 (0.012) |",
        "| pope | `f1,strict` | higher | 8 | n/a | n/a |",
    ]
    assert "- off: `--model psa --model_args addon=a,guarded=False`, 20261127_090000, lmms-eval 0.7.3" in lines
    assert (tmp_path / "t.md").read_text() == said


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (results(results={"mme": {"score,none": 1.0}}), "differ in tasks ('pope')"),
        (results(config={"limit": 10}), "differ in limit"),
        (results(**{"n-samples": {}}), "differ in n-samples"),
        (results(task_hashes={"mme": "x"}), "differ in task_hashes"),
        ({"results": {}}, "is not a results file of lmms-eval"),
    ],
)
def test_what_cannot_be_compared_is_refused(run, other, sentence):
    code, said = run({"on": results(), "off": other})
    assert (code, sentence in said) == (2, True), said


def test_columns_need_names_and_files(run, tmp_path, capsys):
    for words, sentence in (
        ([str(tmp_path)], "expected NAME=PATH"),
        ([f"a={tmp_path}", f"a={tmp_path}"], "each NAME once"),
        ([f"a={tmp_path}"], "holds no *_results.json"),
    ):
        assert main(["ability", *words]) == 2
        assert sentence in capsys.readouterr().err
