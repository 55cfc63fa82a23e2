"""Records of other taxonomies: read as what they say, refused as anything else, converted by a cross-walk."""

import json

import pytest

from psa_fast.cli import main
from psa_fast.data.convert import convert_record
from psa_fast.data.problems import DataError
from psa_fast.data.records import fingerprint, load_records
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.crosswalk import read_crosswalk, read_taxonomy

HOLISAFE = read_taxonomy("holisafe-20")
TURNS = [{"from": "user", "value": "What is this?"}, {"from": "assistant", "value": "A sign."}]
SMALL = "version: 1\nname: small\nheads:\n  type: {harmless: fine, classes: [knives, fire, fine]}\n"


def write(path, *rows):
    path.write_text("".join(json.dumps({"conversations": TURNS, **row}) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path):
    return write(
        tmp_path / "holisafe.jsonl",
        {"taxonomy": "holisafe-20", "safe_type": "suicide", "source_label": "UUU/self_harm/suicide"},
        {"taxonomy": "holisafe-20", "safe_type": 0, "group": "text_twin"},
        {"taxonomy": "holisafe-20", "safe_type": "race", "safe_level": "risky"},
        {},
    )


def test_rows_are_read_as_the_taxonomy_that_they_name(rows):
    records = load_records(rows, None, taxonomy=HOLISAFE)
    assert [(r.safe_type, r.safe_level, r.group) for r in records] == [
        (11, 1, "risk"), (0, 0, "text_twin"), (2, 1, "risk"), (None, None, "")
    ]  # fmt: skip
    assert [r.words for r in records[:2]] == [(11, 1), (0, 0)], "id 0 is harmless here, a risk in PSA"
    again = write(rows.parent / "again.jsonl", *(r.to_row() for r in records))
    assert load_records(again, None, taxonomy=HOLISAFE) == [
        type(r)(**{**r.__dict__, "path": str(again)}) for r in records
    ]  # fmt: skip
    assert [r.to_row().get("taxonomy") for r in records] == ["holisafe-20"] * 3 + [None]


def test_ids_of_another_taxonomy_are_never_taken_for_ours(rows, tmp_path):
    with pytest.raises(DataError, match=r"holisafe.jsonl:1: its labels are of the taxonomy 'holisafe-20'.*of 'psa'"):
        load_records(rows, None)
    plain = write(tmp_path / "psa.jsonl", {"safe_type": 6}, {})
    with pytest.raises(DataError, match=r"psa.jsonl:1: its labels are of the taxonomy 'psa', as it names no other"):
        load_records(plain, None, taxonomy=HOLISAFE)
    assert [r.to_row().get("taxonomy") for r in load_records(plain, None)] == [None, None]
    with pytest.raises(DataError, match=r"field taxonomy is 3; expected the name of one"):
        load_records(write(plain, {"taxonomy": 3, "safe_type": 0}), None)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"safe_type": "privacy"}, "safe_type is 'privacy'; expected one of: 0 safe, 1 gender"),
        ({"safe_type": 20}, "safe_type is 20"),
        ({"safe_type": "race", "safe_level": "high"}, "safe_level is 'high'; expected one of: 0 none, 1 risky"),
        ({"safe_type": "race", "safe_level": 0}, r"safe_level is 0, but safe_type is 2 \(race\), which is a risk"),
        ({"safe_type": "safe", "safe_level": 1}, r"safe_level is 1, but safe_type is 0 \(safe\)"),
        ({"safe_type": "safe", "text_label": "unsafe"}, r"text_label is 'unsafe', but safe_type is 0 \(safe\)"),
        ({"safe_type": "race", "group": "text_twin"}, "safe_type is 2, which is not safe"),
    ],
)
def test_labels_are_checked_against_the_taxonomy(tmp_path, row, said):
    file = write(tmp_path / "bad.jsonl", {"taxonomy": "holisafe-20", **row})
    with pytest.raises(DataError, match=rf"bad\.jsonl:1: .*{said}"):
        load_records(file, None, taxonomy=HOLISAFE)


def test_the_fingerprint_tells_taxonomies_apart(rows):
    (record, *_) = load_records(rows, None, taxonomy=HOLISAFE)
    other = read_taxonomy("mlcommons")
    assert fingerprint([record]) != fingerprint([type(record)(**{**record.__dict__, "taxonomy": other})])


def test_converting_keeps_the_sources_label_word_for_word(rows):
    walk = read_crosswalk(HOLISAFE, PSA)
    found = [convert_record(record, walk) for record in load_records(rows, None, taxonomy=HOLISAFE)]
    assert [(r.safe_type, r.safe_level) for r in found] == [(1, 3), (6, 0), (3, 2), (None, None)]
    assert [r.source_label for r in found] == [
        "UUU/self_harm/suicide", "holisafe-20/safe", "holisafe-20/race", None
    ]  # fmt: skip
    back = convert_record(found[2], read_crosswalk(PSA, HOLISAFE))
    assert (back.safe_type, back.group, back.source_label) == (None, "risk", "holisafe-20/race")


def test_the_commands(rows, tmp_path, capsys):
    out = tmp_path / "psa.jsonl"
    assert main(["data", "convert", str(rows), "--taxonomy", "holisafe-20", "--to", "psa", "--out", str(out)]) == 0
    assert "1 x suicide -> illegal risk" in capsys.readouterr().out
    assert main(["data", "check", str(out)]) == 0
    assert main(["data", "check", str(rows)]) == 2
    assert main(["data", "check", str(rows), "--taxonomy", "holisafe-20"]) == 0
    shown = capsys.readouterr().out
    assert "11 suicide 1" in shown
    assert main(["data", "taxonomies"]) == 0
    assert "mlcommons: 15 types, no levels" in capsys.readouterr().out
    assert main(["data", "taxonomies", "llavaguard"]) == 0
    assert "  0 safe (harmless)" in capsys.readouterr().out
    for arguments in (["--to", "psa"], ["--to", "llavaguard"]):
        refused = tmp_path / "refused.jsonl"
        assert main(["data", "convert", str(rows), *arguments, "--out", str(refused)]) == 2
        assert not refused.exists()


def test_a_taxonomy_of_ones_own(tmp_path, capsys):
    own, walk = tmp_path / "small.yaml", tmp_path / "walk.yaml"
    own.write_text(SMALL)
    walk.write_text("from: small\nto: psa\ntypes: {knives: [illegal risk, high], fire: null, fine: clean}\n")
    file = write(
        tmp_path / "mine.jsonl",
        *({"taxonomy": "small", "safe_type": kind} for kind in ("knives", "fire", "fine")),
    )
    out = tmp_path / "out.jsonl"
    arguments = ["--taxonomy", str(own), "--to", "psa", "--crosswalk", str(walk), "--out", str(out)]
    assert main(["data", "convert", str(file), *arguments]) == 0
    assert "1 x fire -> not labelled" in capsys.readouterr().out
    records = load_records(out, None)
    assert [(r.safe_type, r.safe_level, r.group) for r in records] == [
        (1, 3, "risk"),
        (None, None, "risk"),
        (6, 0, "clean"),
    ]
