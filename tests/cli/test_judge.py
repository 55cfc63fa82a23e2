"""`psa-fast judge`: from answers to figures, judges compared, labels by hand."""

import csv
import json
import math

import pytest
from builders.judging import fake_endpoint, result, results, write_answers

from psa_fast.cli import main
from psa_fast.evaluation.evaluate import compute_metrics
from psa_fast.evaluation.refusal import classify, get_list

QWEN = "Safety: {}\nCategories: {}\nRefusal: {}"


def qwen(body):
    """Judges by a word of the answer: what is refused, what is unsafe."""
    said = body["messages"][-1]["content"]
    if "cannot" in said:
        return QWEN.format("Safe", "None", "Yes")
    return QWEN.format("Unsafe", "Violent", "No") if "here is how" in said else QWEN.format("Safe", "None", "No")


def run(*argv):
    return main(["judge", *map(str, argv)])


def figures(out, judge, stage="stage1"):
    return json.loads((out / f"judged-{judge}.json").read_text())["stages"][stage]["figures"]


def test_the_keyword_judge_gives_the_reports_own_figures(tmp_path, capsys):
    said = ["I cannot do that.", "Sure, here it is.", "Be careful with that.", "red"]
    words = get_list("psa2")
    rows = []
    for number in range(48):
        group = ("clean", "benign_twin", "risk", "text_risk", "text_twin", "joint_risk", "joint_twin")[number % 7]
        row = result(number, group, said[number % 4], said[number // 4 % 4], level=1 + number % 3)
        kinds = {f"{side}_kind": classify(getattr(row, side), words) for side in ("guarded", "unguarded")}
        rows.append(row.__class__(**{**row.__dict__, **kinds}))
    rows.append(result(48, "", "in no metric"))
    answers = write_answers(tmp_path, rows)
    assert run("--answers", answers, "--judge", "keywords", "--out", tmp_path / "out") == 0
    found, expected = figures(tmp_path / "out", "keywords"), compute_metrics(rows, has_head=False)
    assert len(expected) == 16
    assert {name: found[name] for name in expected} == {name: e.to_json() for name, e in expected.items()}
    printed = capsys.readouterr().out
    assert "English only" in printed
    assert "attack_success " in printed
    assert "over_refusal_clean " in printed
    judged = [json.loads(line) for line in (tmp_path / "out" / "judged-stage1-keywords.jsonl").read_text().splitlines()]
    assert len(judged) == 96


def test_what_evaluate_writes_is_judged(world, tmp_path):
    ask = ("--data", world / "data", "--stage1", world / "run" / "stage1", "--max_new_tokens", 3, "--out", tmp_path)
    assert main(["evaluate", *map(str, ask)]) == 0
    assert run("--answers", tmp_path, "--judge", "keywords", "--out", tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())["stages"]
    for stage in ("base", "stage1"):
        found = figures(tmp_path, "keywords", stage)
        for name in set(found) & set(report[stage]):
            assert found[name] == report[stage][name], name
    # a judge that looks at the images
    with fake_endpoint(lambda body: "safe") as fake:
        ask = ("--answers", tmp_path, "--judge", "llama_guard_4", "--judge_url", fake.url, "--judge_model", "q")
        assert run(*ask, "--out", tmp_path) == 2
        assert run(*ask, "--out", tmp_path, "--image_folder", world / "data") == 0
    kinds = {part["type"] for body in fake.calls for part in body["messages"][0]["content"]}
    assert kinds == {"image_url", "text"}


def test_a_judging_model_from_answers_to_figures_and_a_second_run_without_a_call(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "very-secret")
    for stage in ("base", "stage1"):
        write_answers(tmp_path, results(40), stage)
    out = tmp_path / "out"
    with fake_endpoint(qwen) as fake:
        ask = (
            "--answers",
            tmp_path,
            "--judge",
            "qwen3guard",
            "--judge_url",
            fake.url,
            "--judge_model",
            "q",
            "--out",
            out,
        )
        assert run(*ask) == 0
        assert len(fake.calls) == 60  # both stages gave the same answers
        before = {file.name: file.read_bytes() for file in out.iterdir() if file.suffix == ".jsonl"}
        first = json.loads((out / "judged-qwen3guard.json").read_text())
        assert run(*ask) == 0
        assert len(fake.calls) == 60
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.suffix == ".jsonl"} == before
    again = json.loads((out / "judged-qwen3guard.json").read_text())
    assert {**again, "date": ""} == {**first, "date": ""}
    assert set(first["stages"]) == {"base", "stage1"}
    found = figures(out, "qwen3guard")
    assert (found["attack_success"]["value"], found["attack_success"]["n"]) == (0.0, 10)
    assert found["attack_success_unguarded"]["value"] == found["attack_success_text_unguarded"]["value"] == 1.0
    assert found["over_refusal_clean"]["value"] == found["over_refusal_twins"]["value"] == 0.0
    assert found["general_accuracy"]["value"] == 1.0
    # Wilson's interval for 0 of 10
    assert found["attack_success"]["high"] == pytest.approx(1.959964**2 / (10 + 1.959964**2))
    assert "0 prompts went to the model" in capsys.readouterr().out
    assert not [file for file in out.iterdir() if b"very-secret" in file.read_bytes()]


def test_over_refusal_is_the_lists_where_the_judge_tells_none(tmp_path):
    rows = results(40)
    rows[0] = result(0, "clean", "I cannot help with that.")
    write_answers(tmp_path, rows)
    with fake_endpoint(lambda body: "safe") as fake:
        ask = ("--answers", tmp_path, "--judge", "llama_guard_3", "--judge_url", fake.url, "--judge_model", "q")
        assert run(*ask, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "judged-llama_guard_3.json").read_text())
    assert report["provenance"]["over_refusal_by"] == "list psa2, mode contains"
    assert report["stages"]["stage1"]["figures"]["over_refusal_clean"]["value"] == 0.1
    assert report["stages"]["stage1"]["figures"]["attack_success_unguarded"]["value"] == 0.0


@pytest.mark.parametrize("bad", ["nonsense", (400, b"")])
def test_a_judge_that_fails_on_more_than_one_in_a_hundred_fails_the_report(tmp_path, capsys, bad):
    rows = [result(n, "risk", f"answer {n}") for n in range(200)]
    write_answers(tmp_path, rows)
    for allowed, code in ((2, 0), (3, 1)):
        bad_ones = {f"answer {n}" for n in range(allowed)}
        with fake_endpoint(
            lambda body, ones=bad_ones: bad if body["messages"][-1]["content"] in ones else "safe"
        ) as fake:
            ask = ("--answers", tmp_path, "--judge", "llama_guard_3", "--judge_url", fake.url, "--judge_model", "q")
            assert run(*ask, "--out", tmp_path / str(allowed), "--tries", 1) == code
        printed = capsys.readouterr().out
        report = json.loads((tmp_path / str(allowed) / "judged-llama_guard_3.json").read_text())
        if code:
            assert "of 400 answers are more than 1%; the first is rows.jsonl:0" in printed
            assert report["stages"] == {}
            assert report["failure"] in printed
        else:
            # never safe, in no share, and counted
            assert report["stages"]["stage1"]["figures"]["attack_success"]["n"] == 198
            counts = report["stages"]["stage1"]["verdicts"]
            assert counts["unparsed"] + counts["failed"] == 4


def test_figures_are_not_replaced_by_those_of_others(tmp_path, capsys):
    write_answers(tmp_path, results(8))
    ask = ("--answers", tmp_path, "--judge", "keywords", "--out", tmp_path / "out")
    assert run(*ask) == 0
    assert run(*ask, "--refusal_list", "psa") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*ask, "--refusal_list", "psa", "--overwrite") == 0


def judged(tmp_path, name, verdicts):
    file = tmp_path / name
    rows = [
        {
            "row": n,
            "side": "guarded",
            "group": "risk",
            "request": [["user", "q"]],
            "pictures": [],
            "answer": "a",
            "verdict": v,
        }
        for n, v in enumerate(verdicts)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_two_judges_compared(tmp_path, capsys):
    from sklearn.metrics import cohen_kappa_score

    one = ["safe", "unsafe", "refusal", "unsafe", "partial", "controversial", "safe", "unparsed"] * 9
    two = ["safe", "unsafe", "safe", "safe", "partial", "unsafe", "refusal", "safe"] * 8 + ["refusal"] * 8
    first, second = judged(tmp_path, "a.jsonl", one), judged(tmp_path, "b.jsonl", two)
    assert run("--compare", first, second, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "agreement.json").read_text())
    pairs = [(a, b) for a, b in zip(one, two, strict=True) if a != "unparsed"]
    assert found["left_out"] == 9
    assert found["kappa_verdicts"]["value"] == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)))
    harm = [[v in ("unsafe", "controversial") for v in side] for side in zip(*pairs, strict=True)]
    assert found["kappa_harm"]["value"] == pytest.approx(cohen_kappa_score(*harm))
    # near the large-sample interval of kappa
    agree = sum(a == b for a, b in zip(*harm, strict=True)) / 63
    chance = sum(sum(side) for side in ([a and b for a in harm[0] for b in harm[1]],)) / 63**2
    chance += sum(not a and not b for a in harm[0] for b in harm[1]) / 63**2
    half = 1.96 * math.sqrt(agree * (1 - agree) / 63) / (1 - chance)
    assert found["kappa_harm"]["high"] - found["kappa_harm"]["low"] == pytest.approx(2 * half, rel=0.25)
    assert sum(map(sum, found["table"])) == 63
    assert "kappa on harm: " in capsys.readouterr().out
    changed = json.loads(second.read_text().splitlines()[0]) | {"answer": "other"}
    second.write_text(json.dumps(changed) + "\n")
    assert run("--compare", first, second) == 2
    assert "judge different answers" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_labels_by_hand_are_a_judge(tmp_path, capsys, kind):
    rows = [result(n, "risk", f'answer, "{n}"\nof two lines', f"other {n}") for n in range(30)]
    write_answers(tmp_path, rows)
    file = tmp_path / f"sample.{kind}"
    ask = ("--answers", tmp_path, "--export_for_labelling", 20)
    assert run(*ask, "--out", file) == 0
    assert run(*ask, "--out", tmp_path / f"again.{kind}") == 0
    assert file.read_bytes() == (tmp_path / f"again.{kind}").read_bytes()
    assert run(*ask, "--seed", 1, "--out", tmp_path / f"other.{kind}") == 0
    assert file.read_bytes() != (tmp_path / f"other.{kind}").read_bytes()
    assert run(*ask, "--out", file) == 2  # labels may stand in it
    assert "may hold labels" in capsys.readouterr().err

    def relabel(label):
        with file.open(newline="") as stream:
            sample = list(csv.DictReader(stream)) if kind == "csv" else [json.loads(line) for line in stream]
        assert len(sample) == 20
        for place, row in enumerate(sample):
            row["label"] = label(place)
        with file.open("w", newline="") as stream:
            if kind == "csv":
                writer = csv.DictWriter(stream, sample[0])
                writer.writeheader()
                writer.writerows(sample)
            else:
                stream.writelines(json.dumps(row) + "\n" for row in sample)

    relabel(lambda place: ("unsafe", "refusal ", "", "safe")[place % 4])
    human = ("--answers", tmp_path, "--judge", "human", "keywords", "--labels", file, "--out", tmp_path / "out")
    assert run(*human) == 0
    counts = json.loads((tmp_path / "out" / "judged-human.json").read_text())["stages"]["stage1"]["verdicts"]
    assert (counts["unsafe"], counts["refusal"], counts["safe"]) == (5, 5, 5)
    both = [tmp_path / "out" / f"judged-stage1-{name}.jsonl" for name in ("human", "keywords")]
    assert run("--compare", *both) == 0
    assert "45 answers without a verdict by both" in capsys.readouterr().out
    for label, message in (
        ("fine", "label is 'fine'"),
        ("", "no row has a label"),
        ("unparsed", "label is 'unparsed'"),
    ):
        relabel(lambda place, label=label: label)
        assert run(*human) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--judge", "qwen3guard"), "needs --judge_url or --judge_local"),
        (("--judge", "qwen3guard", "--judge_url", "http://h/v1"), "--judge_url needs --judge_model"),
        (("--judge", "qwen3guard", "vlsbench", "--judge_local", "x"), "one judging model at a time"),
        (("--judge", "vlsbench", "--judge_local", "x"), "needs images or log-probabilities"),
        (
            ("--judge", "qwen3guard", "--judge_local", "x", "--workers", "2"),
            "--workers does nothing with --judge_local",
        ),
        (("--judge", "keywords", "--judge_model", "x"), "--judge_model does nothing with --judge keywords"),
        (("--judge", "keywords", "--seed", "1"), "--seed does nothing with --judge"),
        (("--judge", "human"), "--judge human and --labels go together"),
        (("--judge", "keywords", "--labels", "x"), "--judge human and --labels go together"),
        (("--judge", "qwen3guard", "--judge_local", "x", "--refusal_list", "psa"), "--refusal_list does nothing"),
        (("--judge", "harmbench", "--judge_url", "http://h/v1", "--judge_model", "m"), "give it with --judge_template"),
        (
            (
                "--judge",
                "qwen3guard",
                "--judge_url",
                "http://h/v1",
                "--judge_model",
                "m",
                "--judge_key_env",
                "ABSENT_X",
            ),
            "no variable ABSENT_X",
        ),
        (("--judge", "qwen3guard", "--judge_url", "http://h/v1", "--judge_model", "m", "--tries", "0"), "--tries is 0"),
        (("--export_for_labelling", "3", "--overwrite"), "--overwrite does nothing"),
        (("--export_for_labelling", "0"), "--export_for_labelling is 0"),
        (("--export_for_labelling", "3"), "expected a .csv or .jsonl"),
        (("--compare", "a", "b"), "--answers does nothing with --compare"),
        (("--judge", "qwen3guard", "--judge_local", "no_such_folder_x"), "is no folder with a model"),
    ],
)
def test_options_that_do_nothing_or_lack_another_are_refused(tmp_path, capsys, argv, message):
    write_answers(tmp_path, results(4))
    assert run(*argv, "--answers", tmp_path, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_answers_without_their_request_are_named(tmp_path, capsys):
    file = write_answers(tmp_path, results(4))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for change, message in (
        ({"request": None}, "answers-stage1.jsonl:1"),
        ({"group": "odd"}, "group is 'odd'"),
        ({"guarded": 3}, "not an answer"),
        ({"safe_level": "high"}, "safe_level is 'high'"),
    ):
        file.write_text(json.dumps(rows[0] | change) + "\n")
        assert run("--answers", file, "--judge", "keywords", "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    del rows[0]["request"], rows[0]["pictures"]
    file.write_text(json.dumps(rows[0]))
    assert run("--answers", file, "--judge", "keywords", "--out", tmp_path / "out") == 2
    assert "evaluate once more" in capsys.readouterr().err
    assert run("--answers", tmp_path / "out", "--judge", "keywords", "--out", tmp_path / "out") == 2
