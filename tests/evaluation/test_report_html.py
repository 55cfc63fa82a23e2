"""The page: of hostile records and answers, of older reports, parsed and, where there is one, shown by a browser."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from builders.browser import dumped
from builders.judging import result, write_answers
from builders.tiny_llava import picture

from psa_fast.cli import main
from psa_fast.evaluation.evaluate import compute_metrics, per_source, per_type
from psa_fast.evaluation.output import REPORT
from psa_fast.evaluation.paired import differences
from psa_fast.evaluation.report import StageReport, write_report
from psa_fast.evaluation.report_html import PAGE, Kept, write_page
from psa_fast.taxonomy import CLEAN

HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "</dd></dl></article><img src=x onerror=\"document.title='owned'\">",
    "\" onmouseover='alert(1)' x=\"",
    "javascript:alert(1)",
    "[x](javascript:alert(1)) ![y](http://127.0.0.1:9/y.png)",
    "{{ 7 * 7 }} {% raw %} {# #}",
    "&lt;b&gt; &amp; <!-- ]]> <svg/onload=alert(1)> <style>@import 'http://127.0.0.1:9/z.css'</style>",
    "\u202egnp.evil\u0000\u0007 " + "long " * 400,
]
VOID = {"meta", "img", "br"}


def rows(read=True, number=40):
    """Answers with every hostile text in every place that a record or a model can put one."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(number):
        group = ("risk", "clean", "benign_twin", "text_risk", "joint_risk")[i % 5]
        risky, text = "risk" in group, HOSTILE[i % len(HOSTILE)]
        score = float(np.clip(rng.normal(0.7 if risky else 0.3, 0.2), 0.01, 0.99))
        one = result(i, group, text, pictures=("a.png", "gone.png") if i % 2 else ())
        fields = {
            "where": text, "id": text if i % 3 else None, "target": text, "request": (("user", text),) * (1 + i % 2),
            "source": HOSTILE[i % 2], "rule": text, "guarded_kind": "answer" if risky else "refusal",
        }  # fmt: skip
        if read:
            probs = [0.01] * 6 + [0.94] if not risky else [0.94] + [0.01] * 6
            fields |= {
                "unsafe_score": score, "highest_score": score, "read_type": 0 if risky else CLEAN, "read_level": 1,
                "type_probs": probs, "level_probs": [0.25] * 4, "query": "window", "query_number": 2, "images": 2,
                "why": (f"why: {text}",), "looked": (tuple(i / 45 for i in range(1, 10)), None) if i % 2 else None,
            }  # fmt: skip
        found.append(dataclasses.replace(one, **fields))
    return found


@pytest.fixture
def folder(tmp_path):
    """An evaluation of three stages, its pictures beside it."""
    picture(0).save(tmp_path / "a.png")
    stages = {"base": rows(read=False), "stage1": rows(), "stage2": rows()}
    reports = {}
    for name, found in stages.items():
        write_answers(tmp_path, found, name)
        head = name != "base"
        sources = [per_source(found, head, left_out=left_out) for left_out in (False, True)]
        facts = {"path": HOSTILE[0], "batch_seconds": {"p50": 1.0, "p95": 2.0, "batches": 3}}
        reports[name] = StageReport(compute_metrics(found, head), per_type(found), facts, *sources)
    data = {"path": f"{tmp_path}/test.jsonl", "sha256": HOSTILE[2], "images_sha256": "", "rows": 40,
            "rows_in_file": 40, "groups": {HOSTILE[1]: 3, "not labelled": 2}}  # fmt: skip
    labelled = {kind: {kind: 1} for kind in ("refusal", "caution", "answer")}
    refusal = {"list": "psa2", "mode": "contains", "patterns": [], "refusals": [HOSTILE[0]], "cautions": [],
               "unread": {}, "on_labelled_answers": labelled}  # fmt: skip
    provenance = {
        "data": data, "refusal": refusal, "date": "2026-11-27", "versions": {HOSTILE[3]: HOSTILE[4]}, "hardware": {},
        "decoding": {"method": "greedy", "max_new_tokens": 4, "batch_size": 8, "dtype": "float32"},
        "bootstrap": {"samples": 1000, "seed": 0}, 
        "policy": {"path": HOSTILE[5], "sha256": "", "unsafe_threshold": 0.5},
    }  # fmt: skip
    write_report(tmp_path, reports, provenance, differences(stages))
    return tmp_path


class Page(HTMLParser):
    """What a page holds; every tag must be closed in its turn."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text, self.ids = [], set(), [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_nothing_that_records_hold_becomes_markup(folder):
    file = write_page(folder).path
    assert file == folder / PAGE
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "form", "input", "base", "audio", "video"}
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for tag, name, value in page.attributes:
        if name == "href":
            assert re.fullmatch(r"#\w+", value), value
            assert value[1:] in page.ids
        if name == "src":
            assert (tag, value[:22]) == ("img", "data:image/png;base64,")
        if name == "style":
            assert re.fullmatch(r"(--p|width|margin-top): [\d.]+(%|rem)?", value), value
    assert "http" not in re.sub(
        r"<style>.*?</style>", "", text.split("<body>")[0].replace("http-equiv", ""), flags=re.S
    )
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    shown = "".join(page.text)
    for hostile in HOSTILE[:-1]:
        assert hostile in shown, hostile
    assert "\\x00\\x07" in shown
    assert "\\u202e" in shown, "what turns the direction of writing shows as its escape"
    assert "more characters)" in shown
    assert "[picture 2 cannot be read]" in shown
    assert any(value == "where the head looked in picture 1" for _, name, value in page.attributes if name == "alt")
    assert "why: " in shown
    assert "dark where the reading that decided did not look" in shown
    assert "owned" not in shown.split("What was compared")[0]


def test_the_page_says_what_was_done_what_it_cost_and_where_it_fails(folder):
    shown = " ".join("".join(Page(write_page(folder).path.read_text()).text).split())
    assert "Of 24 risky requests, base answered 100.0% unsafely; stage2, under guard, 100.0%." in shown
    assert "of 16 harmless requests 100.0% are refused" in shown
    assert "base is a vision-language model as it was. stage1, stage2: the same model with an add-on." in shown
    assert "stage1 and stage2, which read the same" in shown
    assert "24 risky requests were answered unsafely under guard" in shown
    assert "2 of these rows have no label and are in no number." in shown
    for title in ("Every threshold", "Reliability", "By source", "With one source left out", "Differences on the same"):
        assert title in shown, title
    assert "Seconds for a batch of 8 requests, median (95th percentile)" in shown
    hidden = [part for part in shown.split("more rows: nothing to count in any stage")[1:]]
    assert any("over_refusal_text_twins" in part for part in hidden)


def test_an_older_report_has_its_page_too(folder):
    report = json.loads((folder / REPORT).read_text())
    for key in ("per_source", "without_source", "differences"):
        del report[key]
    del report["provenance"]["policy"]["unsafe_threshold"]
    (folder / REPORT).write_text(json.dumps(report))
    new = (
        "source",
        "highest_score",
        "type_probs",
        "level_probs",
        "query_number",
        "picture",
        "words_alone",
        "looked",
        "why",
    )
    for stage in report["stages"]:
        file = folder / f"answers-{stage}.jsonl"
        kept = [{k: v for k, v in json.loads(line).items() if k not in new} for line in file.read_text().splitlines()]
        file.write_text("\n".join(map(json.dumps, kept)))
    shown = "".join(Page(write_page(folder).path.read_text()).text)
    assert "Every threshold" not in shown
    assert "Reliability" in shown
    assert "By source" not in shown


def test_the_command_makes_the_page_from_the_files_alone(folder, capsys, monkeypatch):
    monkeypatch.setattr("psa_fast.safety.load.load_guard", lambda *args: pytest.fail("a model was loaded"))
    assert main(["report", str(folder)]) == 0
    assert f"wrote {folder / PAGE}" in capsys.readouterr().out
    first = (folder / PAGE).read_bytes()
    assert b"data:image/png" in first
    (folder / "empty").mkdir()
    assert main(["report", str(folder), "--image_folder", str(folder / "empty")]) == 0
    output = capsys.readouterr().out
    assert b"data:image/png" not in (folder / PAGE).read_bytes()
    assert "no picture was found" in output
    assert main(["report", str(folder)]) == 0
    assert (folder / PAGE).read_bytes() == first


def test_what_is_no_evaluation_is_named(folder, tmp_path, capsys):
    for argv, message in (
        (["report", str(folder / "absent")], "is no folder"),
        (["report", str(folder), "--image_folder", "/nowhere"], "--image_folder /nowhere"),
    ):
        assert main(argv) == 2
        assert message in capsys.readouterr().err
    file = folder / "answers-stage2.jsonl"
    lines = file.read_text().splitlines()
    for spoilt, message in (
        (lines[:-1], "not to the same requests"),
        ([lines[1], lines[0], *lines[2:]], "not to the same requests"),
        (["{}", *lines[1:]], r"answers-stage2.jsonl:1: group is None"),
        ([lines[0].replace('"query_number": 2', '"query_number": "x"'), *lines[1:]], r":1: .*query_number"),
        ([lines[0].replace('"unsafe_score"', '"x": 1, "unsafe_score"'), *lines[1:]], ":1: .*unknown key 'x'"),
        ([re.sub(r'"unsafe_score": [\d.]+', '"unsafe_score": NaN', lines[0]), *lines[1:]], ":1: unsafe_score is nan"),
        ([lines[0].replace('"safe_type": 1', '"safe_type": true'), *lines[1:]], ":1: safe_type is True"),
        ([lines[0].replace("[0.94,", "["), *lines[1:]], ":1: type_probs is"),
        ([lines[0], lines[1].replace('"looked": [[', '"looked": [["x",'), *lines[2:]], ":2: looked is"),
        ([lines[0], lines[1].replace(", null]", "]"), *lines[2:]], ":2: looked is"),
    ):
        file.write_text("\n".join(spoilt))
        with pytest.raises(ValueError, match=message):
            write_page(folder)
    report = json.loads((folder / REPORT).read_text())
    for change, message in (
        ({"stages": {"../x": {}}}, "'../x' names no stage"),
        ({"stages": {"base": {"a": {"value": "x"}}}}, r"stages.base.a.value"),
        ({"provenance": []}, "provenance"),
    ):
        (folder / REPORT).write_text(json.dumps(report | change))
        with pytest.raises(ValueError, match=message):
            Kept.load(folder)


def show(page, profile):
    """(the document after loading, what the console said, the addresses that the page asked for)."""
    log = profile / "net.json"
    quiet = ("background-networking", "component-update", "default-apps", "sync")
    options = [
        "--no-first-run",
        f"--log-net-log={log}",
        "--enable-logging=stderr",
        *(f"--disable-{name}" for name in quiet),
    ]
    done = dumped(page.as_uri(), profile, *options)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # the browser asks its maker for this and that; what a page asks for is kept apart under the page's origin
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = {one["url"] for one in events if "url" in one and one.get("network_isolation_key", "").startswith("file:")}
    return done.stdout, console, asked


def test_a_browser_asks_for_nothing_and_complains_of_nothing(folder, tmp_path):
    page = write_page(folder).path
    document, console, asked = show(page, tmp_path / "profile")
    assert "<title>Safety evaluation</title>" in document
    assert document.count("<article") > 10
    assert (console, asked) == ([], set())
    # the same two checks see what a page that is not escaped would do
    text = page.read_text()
    page.write_text(text.replace("</h1>", "</h1><script>document.title = 'owned'</script>"))
    assert show(page, tmp_path / "second")[1]
    page.write_text(re.sub(r"<meta http-equiv.*?>", "", text).replace("</h1>", "</h1><img src='http://127.0.0.1:9/x'>"))
    assert show(page, tmp_path / "third")[2] == {"http://127.0.0.1:9/x"}
