"""The picture of requests and answers: made from what an evaluation kept, refused where that is of another world."""

import json

import pytest
from PIL import Image

from psa_fast import cli
from psa_fast.sandbox.draw import draw_world
from psa_fast.sandbox.picture import MOST_WORDS, ROWS, wrapped

IMAGES = {"test": {"clean": 8, "benign_twin": 8, "risk": 8, "joint": 8}}
COUNTS = {
    "benign_twin": 12, "risk": 12, "text_risk": 24, "text_twin": 24,
    "joint_risk": 12, "joint_twin": 12, "clean_several": 12, "risk_several": 12,
}  # fmt: skip


@pytest.fixture
def world(tmp_path):
    draw_world(5, tmp_path / "world", images=IMAGES, rows={"test": COUNTS})
    return tmp_path / "world"


@pytest.fixture
def answered(world, tmp_path):
    """A run whose guard answers every row rightly, and whose base says yes to everything."""
    rows = [json.loads(line) for line in (world / "test.jsonl").read_text().splitlines()]
    for stage in ("base", "stage2"):
        lines = []
        for row in rows:
            risky, right = row["group"].endswith("risk"), row["conversations"][-1]["value"]
            verdict = {
                "action": "hint" if risky else "allow",
                "rule": "high: unsafe by type" if risky else "clean",
                "unsafe": risky, "unsafe_score": float(risky), "read_type": row["safe_type"],
            }  # fmt: skip
            answer = {"id": row["id"], "target": right, "guarded": right, "unguarded": "yes"}
            lines.append(json.dumps(answer | verdict))
        (tmp_path / f"answers-{stage}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def draw(run, world, out):
    return cli.main(["sandbox", "picture", "--run", str(run), "--data", str(world), "--out", str(out)])


def test_each_kind_is_shown_with_what_was_answered(world, answered, monkeypatch):
    seen = []

    def compose(rows, note):
        seen.extend((note, rows))
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr("psa_fast.sandbox.picture.compose", compose)
    assert draw(answered, world, answered / "x.png") == 0
    note, rows = seen
    assert "world seed 5" in note
    for (heading, kinds), cells in zip(ROWS.items(), rows.values(), strict=True):
        risky = heading.startswith("Risky")
        for kind, cell in zip(kinds, cells, strict=True):
            assert len(cell.pictures) in kind.images
            assert len(cell.question.split()) <= MOST_WORDS
            assert "<image>" not in cell.question
            assert cell.base == "yes"
            assert cell.reading.startswith("hint: high, " if risky else "allow: clean (0.00)")
    first = next(
        row for row in map(json.loads, (world / "test.jsonl").read_text().splitlines())
        if row["group"] == "joint_risk" and len(row["conversations"]) == 2
        and len(row["conversations"][0]["value"].replace("<image>", "").split()) <= MOST_WORDS
    )  # fmt: skip
    assert rows["Risky, to be refused (level low: answered with care)"][3].verdict["id"] == first["id"]


def test_the_file_is_a_small_picture_and_is_replaced(world, answered, capsys):
    out = answered / "docs" / "picture.png"
    for _ in range(2):
        assert draw(answered, world, out) == 0
    with Image.open(out) as picture:
        assert picture.size[0] > 1000
    assert out.stat().st_size < 300_000
    assert f"{out}: " in capsys.readouterr().out


def test_answers_of_another_world_and_missing_ones_are_refused(world, answered, capsys):
    path = answered / "answers-stage2.jsonl"
    path.write_text(path.read_text().replace('"target": "', '"target": "not '))
    assert draw(answered, world, answered / "x.png") == 2
    assert "is not of this world: it answers no row test-" in capsys.readouterr().err
    path.unlink()
    assert draw(answered, world, answered / "x.png") == 2
    assert "answers-stage2.jsonl is not there: psa-fast evaluate" in capsys.readouterr().err
    assert not (answered / "x.png").exists()


def test_words_are_wrapped_where_they_are_too_long():
    class Monospaced:
        def getlength(self, text):
            return len(text)

    assert wrapped("a bc def ghij", Monospaced(), 4) == ["a bc", "def", "ghij"]
    assert wrapped("", Monospaced(), 4) == [""]
