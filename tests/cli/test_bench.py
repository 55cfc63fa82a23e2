"""`psa-fast bench`: recipes that hold, a report that says where it comes from, steps that go on."""

import hashlib
import json
import shutil

import pytest
import yaml
from builders import benchmark, tiny
from builders.judging import fake_endpoint
from builders.raw_datasets import DATASETS
from builders.raw_layouts import png, put

from psa_fast.cli import main
from psa_fast.data.importers import load_importer
from psa_fast.evaluation.benchmark_recipe import BENCHMARKS, FOLDER, read_recipe
from psa_fast.evaluation.benchmark_steps import LOCK
from psa_fast.files import lock

SAFE = "Safety: Safe\nCategories: None\nRefusal: No"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return benchmark.build_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def command(world, source, tmp_path):
    """The command line in a folder of its own, with further options."""
    run = tmp_path / "run"
    shutil.copytree(world / "run" / "stage1", run / "stage1")
    return lambda *more: benchmark.options(source, run, tmp_path / "bench", *more)


def test_the_list_names_every_benchmark_and_its_judge(capsys):
    assert main(["bench", "--list"]) == 0
    said = capsys.readouterr().out
    expected = ["figstep", "holisafe", "jailbreakv", "mm_safetybench", "mossbench"]
    expected += ["mssbench", "siuo", "vlguard", "vlsbench", "xstest"]
    assert sorted(expected) == list(BENCHMARKS)
    for name in expected:
        recipe, _ = read_recipe(name)
        assert f"{name}: {recipe.title}" in said
        assert recipe.split is None or recipe.split in load_importer(recipe.importer).SPLITS
    assert "judge: vlsbench, a model: give --judge_url" in said
    assert "judge: keywords\n" in said


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"judge": "nobody"}, "judge is 'nobody'; expected one of keywords"),
        ({"metrics": ["attack"]}, "metrics is .*expected a list of figures"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"split": 3}, "split is 3"),
        ({"published": " "}, "published is ' '; expected text"),
        ({"files": {"csv": "a"}}, "files is"),
        ({"tokens": 3}, "missing or none of a recipe: tokens"),
    ],
)
def test_a_recipe_that_says_nonsense_is_refused(tmp_path, change, sentence):
    raw = yaml.safe_load((FOLDER / "siuo.yaml").read_text()) | change
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match=rf"x.yaml: .*{sentence}"):
        read_recipe("x", tmp_path)


def test_the_report_tells_where_its_figures_come_from(command, tmp_path, capsys):
    out = benchmark.begin(tmp_path / "bench")
    assert main(command("--judge", "keywords")) == 0
    report = json.loads((out / "report.json").read_text())
    # the words judge as the evaluation's own report does, which has another way there
    own = json.loads((out / "answers" / "report.json").read_text())
    for stage in ("base", "stage1"):
        for name in ("attack_success_joint", "over_refusal_joint_twins_unguarded"):
            assert report["stages"][stage]["keywords"][name] == own["stages"][stage][name]
    assert report["stages"]["stage1"]["concept head"]["joint_risk_recall"]["n"] == 8
    assert report["date"] == benchmark.DATE
    assert report["recipe"]["judge"] == "qwen3guard"
    assert report["recipe"]["sha256"] == hashlib.sha256((FOLDER / "mssbench.yaml").read_bytes()).hexdigest()
    assert report["answers"]["data"]["sha256"] == hashlib.sha256((out / "records.jsonl").read_bytes()).hexdigest()
    assert report["answers"]["decoding"]["max_new_tokens"] == 3
    assert report["asked"]["records"]["split"] is None
    assert report["import"]["entries"] == {"chat": 8}
    assert report["judges"]["keywords"]["judge"]["list"] == "psa2"
    text = (out / "report.md").read_text()
    for words in (benchmark.DATE, report["recipe"]["differs"], report["recipe"]["prompt"], "the recipe says 256"):
        assert words in text

    # the same command is done at once; another one is refused; what it changes alone is made anew
    capsys.readouterr()
    assert main(command("--judge", "keywords")) == 0
    assert "list psa2" not in capsys.readouterr().out
    assert main(command("--judge", "keywords", "--limit", 4)) == 2
    assert "its answers are those of a run with other limit; name another --out" in capsys.readouterr().err
    assert main(command("--judge", "keywords", "--limit", 4, "--overwrite")) == 0
    shown = capsys.readouterr().out
    assert "rows of MSSBench" not in shown
    report = json.loads((out / "report.json").read_text())
    assert report["answers"]["data"]["rows"] == 4
    assert report["date"] != benchmark.DATE
    (out / "records.jsonl").write_text("{}")
    assert main(command("--judge", "keywords", "--limit", 4)) == 2
    assert "records.jsonl is no longer what the step records made" in capsys.readouterr().err
    with lock(out / LOCK, "busy"):
        assert main(command("--judge", "keywords")) == 2
    assert "another benchmark is under way" in capsys.readouterr().err


def test_a_judge_that_fails_gives_no_report_until_it_answers(command, tmp_path, capsys):
    out = tmp_path / "bench"

    def replies(body):
        return "I would rather not say" if fails and len(fake.calls) == 1 else SAFE

    with fake_endpoint(replies) as fake:
        fails = True
        model = ("--judge_url", fake.url, "--judge_model", "m", "--workers", 1)
        assert main(command(*model)) == 1
        assert "no figures: qwen3guard on" in capsys.readouterr().out
        assert not (out / "report.json").exists()
        fails = False
        (out / "verdicts" / "replies.jsonl").unlink()  # a malformed reply is kept as well
        assert main(command(*model)) == 0
        calls = len(fake.calls)
        assert main(command(*model)) == 0
        assert len(fake.calls) == calls
    report = json.loads((out / "report.json").read_text())
    assert report["stages"]["base"]["qwen3guard"]["attack_success_joint"]["value"] == 0.0
    assert report["stages"]["base"]["keywords"]["attack_success_joint"]["value"] == 1.0
    assert sum(report["verdicts"]["qwen3guard"]["base"].values()) == 32


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "the judge of mssbench is qwen3guard, a model: give --judge_url"),
        (("--judge", "human"), "--judge human cannot judge a benchmark"),
        (("--judge", "harmbench", "--judge_url", "http://h/v1", "--judge_model", "m"), "give it with --judge_template"),
        (("--judge", "holisafe", "--judge_local", "d"), "needs images or log-probabilities"),
        (("--judge", "keywords", "--workers", "2"), "--workers does nothing with --judge keywords"),
        (("--judge", "keywords", "--limit", "0"), "--limit is 0"),
        (("--judge", "keywords", "--split", "train"), "--split is 'train'; mssbench has: chat, embodied"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_answered(command, tmp_path, capsys, options, sentence):
    assert main(command(*options)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "bench" / "answers").exists()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["nothing"], "bench needs a NAME (or --list), one of: figstep"),
        (["siuo", "--out", "o", "--base", "b"], "bench siuo needs --source"),
        (["siuo", "--out", "o", "--source", "s"], "nothing to measure"),
        (["siuo", "--list"], "--list prints all benchmarks"),
    ],
)
def test_what_is_missing_is_said(capsys, argv, sentence):
    assert main(["bench", *argv]) == 2
    assert sentence in capsys.readouterr().err


def test_bad_rows_end_the_run_or_are_counted(world, tmp_path, capsys):
    raw = DATASETS["siuo"]
    raw.build(tmp_path / "siuo")
    (tmp_path / "siuo" / "images" / "b.png").unlink()
    run = ["bench", "siuo", "--source", tmp_path / "siuo", "--base", world / "base", "--out", tmp_path / "out"]
    run = [*map(str, run), "--judge", "keywords", "--max_new_tokens", "2"]
    assert main(run) == 2
    assert "image 'b.png' is neither below" in capsys.readouterr().err
    assert main([*run, "--on_bad_sample", "skip"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["import"]["read"], report["import"]["left_out"]) == (2, 1)
    assert "left out 1." in (tmp_path / "out" / "report.md").read_text()


def test_figstep_is_found_in_its_own_layout(world, tmp_path):
    source = tmp_path / "figstep"
    rows = "dataset,category_id,task_id,category_name,question,instruction\nSafeBench,1,1,Fraud,q,i\n"
    put(source / "data/question/safebench.csv", rows)
    put(source / "data/images/SafeBench/query_SafeBench_1_1_6.png", png(3))
    run = ["bench", "figstep", "--source", source, "--base", world / "base", "--out", tmp_path / "out"]
    assert main([*map(str, run), "--judge", "keywords", "--max_new_tokens", "2"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["stages"]["base"]["keywords"]["attack_success"]["n"] == 1
    assert json.loads((tmp_path / "out" / "records.jsonl").read_text())["answer_from"] == "template"


def test_two_ranks_give_the_report_of_one(world, source, tmp_path):
    out, reports = tmp_path / "bench", []
    command = benchmark.options(source, world / "run", out, "--judge", "keywords", "--limit", 8)
    for ranks in (1, 2):
        benchmark.begin(out)
        codes, output = tiny.outcome(benchmark.start(command, ranks))
        assert not any(codes), output
        reports.append(benchmark.told(out))
    assert reports[0] == reports[1]
