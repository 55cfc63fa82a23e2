"""One picture of the sandbox under guard: eight requests, the base's answers, the verdicts and the guarded answers.

Nothing is chosen by its outcome: of each kind the first row of the split that fits is shown. The answers are those that
`psa-fast evaluate` kept; no model is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from psa_fast.data.images import resolve, to_rgb
from psa_fast.data.records import IMAGE_MARK, Record, load_records
from psa_fast.data.rows import read_rows
from psa_fast.files import read_json, write_with
from psa_fast.sandbox.world import IMAGE_SIZE
from psa_fast.taxonomy import CLEAN, RISK_TYPES

MOST_WORDS = 8  # of a request, so that it fits
_CELL, _GAP, _MARGIN = 288, 12, 14
_BOX = 2 * IMAGE_SIZE
_TEXT_HEIGHT = 192
_INK, _PALE, _PAPER = (32, 34, 38), (112, 116, 124), (255, 255, 255)
_TINT = {
    "allow": ((222, 242, 226), (24, 92, 44)),
    "hint": ((255, 234, 200), (120, 66, 0)),
    "refuse": ((252, 218, 216), (130, 22, 20)),
    "block": ((252, 218, 216), (130, 22, 20)),
}


class Kind(NamedTuple):
    """What a cell shows: its title, the group of its row, and how many pictures that has at least and at most."""

    title: str
    group: str
    images: range


_ONE, _SEVERAL, _NONE = range(1, 2), range(2, 5), range(1)
ROWS = {
    "Harmless, to be answered": (
        Kind("a look-alike of a risk", "benign_twin", _ONE),
        Kind("several harmless pictures", "clean", _SEVERAL),
        Kind("harmless words alone", "text_twin", _NONE),
        Kind("harmless together", "joint_twin", _ONE),
    ),
    "Risky, to be refused (level low: answered with care)": (
        Kind("a risk in the picture", "risk", _ONE),
        Kind("a risk among several", "risk", _SEVERAL),
        Kind("risky words alone", "text_risk", _NONE),
        Kind("risky together only", "joint_risk", _ONE),
    ),
}


class Cell(NamedTuple):
    """One request as it is drawn; `verdict` is a row of the guard's answers."""

    title: str
    question: str
    pictures: tuple[Image.Image, ...]
    base: str
    verdict: Mapping[str, Any]

    @property
    def reading(self) -> str:
        """What the guard did and why, in one line."""
        row = self.verdict
        kind = row["read_type"]
        risk = [RISK_TYPES[kind]] if isinstance(kind, int) and kind != CLEAN and row["unsafe"] else []
        score = row["unsafe_score"]
        number = "" if score is None else f" ({score:.2f})"
        return f"{row['action']}: " + ", ".join([row["rule"].partition(":")[0], *risk]) + number


def draw_picture(world: Path, run: Path, out: Path, split: str = "test", stage: str = "stage2") -> None:
    """Draw `out` (a PNG) from a world's split and the answers of base and stage that an evaluation left in `run`.

    Raises ValueError where the answers are missing or not of this world, or where the split lacks a kind of request.
    """
    records = load_records(world / f"{split}.jsonl", world, decode=False)
    answers = {name: _answers(run / f"answers-{name}.jsonl") for name in ("base", stage)}
    rows = {
        heading: [_cell(kind, records, world, answers["base"], answers[stage], f"{run}/answers-{stage}.jsonl")
                  for kind in kinds]
        for heading, kinds in ROWS.items()
    }  # fmt: skip
    seed = read_json(world / "world.json", "world").get("seed")
    note = (
        f"Base and guarded {stage}, {split} split of world seed {seed}: of each kind the first request of at most "
        f"{MOST_WORDS} words, whatever was answered. In brackets: the unsafe score."
    )
    picture = compose(rows, note)
    write_with(out, lambda unfinished: picture.save(unfinished, format="PNG", optimize=True))


def _answers(path: Path) -> dict[str, Mapping[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} is not there: psa-fast evaluate --data WORLD --run RUN --out RUN writes it")
    return {row.value["id"]: row.value for row in read_rows(path) if isinstance(row.value, dict) and "id" in row.value}


def _cell(
    kind: Kind,
    records: Sequence[Record],
    world: Path,
    base: Mapping[str, Mapping[str, Any]],
    guarded: Mapping[str, Mapping[str, Any]],
    place: str,
) -> Cell:
    for record in records:
        question = record.turns[0].text.replace(IMAGE_MARK, "").strip()
        fits = len(record.turns) == 2 and len(question.split()) <= MOST_WORDS
        if not (fits and record.group == kind.group and len(record.images) in kind.images):
            continue
        rows = [answers.get(record.id or "") for answers in (base, guarded)]
        if any(row is None or row.get("target") != record.turns[1].text for row in rows):
            raise ValueError(f"{place} is not of this world: it answers no row {record.id} as in {record.path}")
        pictures = tuple(to_rgb(resolve(world, name)) for name in record.images)
        return Cell(kind.title, question, pictures, str(rows[0]["unguarded"]), rows[1])  # type: ignore[index,arg-type]
    raise ValueError(
        f"{world} has no row of group {kind.group} with {_count(kind.images)} and at most {MOST_WORDS} words"
    )


def _count(images: range) -> str:
    return f"{images[0]} to {images[-1]} pictures" if len(images) > 1 else f"{images[0]} picture(s)"


def compose(rows: Mapping[str, Sequence[Cell]], note: str) -> Image.Image:
    """The whole picture: a heading over each row of cells, the note below."""
    columns = max(map(len, rows.values()))
    width = 2 * _MARGIN + columns * _CELL + (columns - 1) * _GAP
    heading, footer = 34, 34
    tall = _BOX + _TEXT_HEIGHT
    canvas = Image.new("RGB", (width, 2 * _MARGIN + len(rows) * (heading + tall + _GAP) + footer), _PAPER)
    draw = ImageDraw.Draw(canvas)
    top = _MARGIN
    for title, cells in rows.items():
        draw.text((_MARGIN, top), title, _INK, font(22))
        for number, cell in enumerate(cells):
            _draw_cell(canvas, cell, _MARGIN + number * (_CELL + _GAP), top + heading)
        top += heading + tall + _GAP
    draw.text((_MARGIN, top + 6), note, _PALE, font(15))
    # 256 colours, each within what the eye tells apart: a third of the bytes
    return canvas.quantize(256, Image.Quantize.FASTOCTREE, kmeans=1, dither=Image.Dither.NONE)


def _draw_cell(canvas: Image.Image, cell: Cell, left: int, top: int) -> None:
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left, top, left + _CELL - 1, top + _BOX + _TEXT_HEIGHT - 1), outline=(214, 217, 222))
    left, top = left + 8, top + 6
    draw.text((left, top), cell.title, _PALE, font(16))
    top += 24
    _draw_pictures(canvas, cell.pictures, left, top)
    top += _BOX + 6
    paper, ink = _TINT.get(cell.verdict["action"], _TINT["block"])
    for label, text, colours in (
        ("", f"“{cell.question}”", (_PAPER, _INK)),
        ("base", cell.base, (_PAPER, _INK)),
        ("guard", cell.reading, (paper, ink)),
        ("answer", str(cell.verdict["guarded"]), (paper, ink)),
    ):
        indent = 58 if label else 0
        lines = wrapped(text, font(16), _CELL - 18 - indent)[:2]
        if colours[0] != _PAPER:
            draw.rectangle((left - 3, top - 1, left + _CELL - 14, top + 19 * len(lines) + 2), fill=colours[0])
        draw.text((left, top), label, _PALE, font(14))
        for line in lines:
            draw.text((left + indent, top), line, colours[1], font(16))
            top += 19
        top += 4


def _draw_pictures(canvas: Image.Image, pictures: Sequence[Image.Image], left: int, top: int) -> None:
    """One picture at twice its size, two beside each other, or up to four at their own size."""
    if not pictures:
        box = (left, top, left + _BOX - 1, top + _BOX - 1)
        draw = ImageDraw.Draw(canvas)
        draw.rectangle(box, outline=(214, 217, 222), fill=(246, 247, 249))
        draw.text((left + _BOX // 2, top + _BOX // 2), "no picture", _PALE, font(16), anchor="mm")
    for number, picture in enumerate(pictures):
        side = {1: _BOX, 2: (_CELL - 18) // 2}.get(len(pictures), _BOX // 2 - 1)
        row, column = divmod(number, 2)
        kept = Image.Resampling.NEAREST if side % IMAGE_SIZE == 0 else Image.Resampling.BICUBIC
        canvas.paste(picture.resize((side, side), kept), (left + column * (side + 2), top + row * (side + 2)))


def wrapped(text: str, face: Any, width: float) -> list[str]:
    """The words of a text in lines of at most `width` pixels; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and face.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def font(size: int) -> Any:
    """The font that comes with Pillow, at a size in pixels."""
    return ImageFont.load_default(size)
