"""The sandbox world: what a scene may hold, how one is sampled, and how it is painted (96x96, a 3x3 grid of cells).

A scene has a textured background, one to three objects of distinct shapes and colours, and at most one sign: a white
plate with a pictogram and one to three marks. Six pictograms stand for the six risk types, four are harmless; only a
risk pictogram with *red* marks is a risk, and the number of marks is its level. Everything else is a clean scene or a
look-alike (a "benign twin"): a risk pictogram with blue marks, or a harmless one with red marks. No picture shows
anything harmful.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from psa_fast.taxonomy import CLEAN, RISK_LEVELS

IMAGE_SIZE = 96
GRID = 3
CELL = IMAGE_SIZE // GRID

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (214, 36, 44),
    "green": (40, 160, 62),
    "blue": (36, 78, 214),
    "yellow": (240, 214, 40),
    "purple": (142, 48, 170),
    "orange": (246, 138, 22),
}
SCENES = ("field", "street", "beach", "room", "night", "wall")
# The pictogram of risk type i is RISK_GLYPHS[i].
RISK_GLYPHS = ("flag", "chain", "bolt", "scales", "eye", "mask")
HARMLESS_GLYPHS = ("house", "tree", "sun", "cup")
GLYPHS = RISK_GLYPHS + HARMLESS_GLYPHS
MARKS = ("red", "blue")
# The cells by name, row by row, as on a map: one word each, so that a place is looked up like a colour.
PLACES = ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast")

Group = Literal["clean", "benign_twin", "risk"]
GROUPS_WITH_PICTURES: tuple[Group, ...] = ("clean", "benign_twin", "risk")
Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Thing:
    """A coloured shape in a cell (an index into PLACES)."""

    shape: str
    colour: str
    cell: int


@dataclass(frozen=True)
class Sign:
    """A plate with a pictogram and `count` marks of one colour."""

    glyph: str
    marks: str
    count: int
    cell: int


@dataclass(frozen=True)
class Scene:
    """Everything that is in a picture; `things` are ordered by cell. `seed` fixes textures, sizes and positions."""

    background: str
    things: tuple[Thing, ...]
    sign: Sign | None
    seed: int

    @property
    def safe_type(self) -> int:
        """Risk type id of the picture."""
        if self.sign is None or self.sign.glyph not in RISK_GLYPHS or self.sign.marks != "red":
            return CLEAN
        return RISK_GLYPHS.index(self.sign.glyph)

    @property
    def safe_level(self) -> int:
        """Risk level id of the picture: the number of red marks."""
        return 0 if self.sign is None or self.safe_type == CLEAN else self.sign.count


def split_of(background: str, glyph: str) -> Split:
    """The split a (scene, risk pictogram) composition belongs to: a sixth is for test, a sixth for dev.

    It does not depend on any seed, so no world shares a test composition with what any base or guard was trained on.
    """
    place = (SCENES.index(background) + RISK_GLYPHS.index(glyph)) % len(SCENES)
    return {0: "test", 1: "dev"}.get(place, "train")  # type: ignore[return-value]


@functools.lru_cache
def _compositions(split: Split) -> tuple[tuple[str, str], ...]:
    return tuple((scene, glyph) for scene in SCENES for glyph in RISK_GLYPHS if split_of(scene, glyph) == split)


def sample_scene(rng: np.random.Generator, group: Group, split: Split) -> Scene:
    """Draw a scene of a group. Risk pictograms appear only in the compositions of `split`."""
    background, sign_glyph, marks = SCENES[rng.integers(len(SCENES))], None, "blue"
    if group == "risk" or (group == "benign_twin" and rng.random() < 0.6):
        compositions = _compositions(split)
        background, sign_glyph = compositions[rng.integers(len(compositions))]
        marks = "red" if group == "risk" else "blue"
    elif group == "benign_twin":
        sign_glyph, marks = HARMLESS_GLYPHS[rng.integers(len(HARMLESS_GLYPHS))], "red"
    elif rng.random() < 0.4:
        sign_glyph = HARMLESS_GLYPHS[rng.integers(len(HARMLESS_GLYPHS))]
    number = int(rng.integers(1, 4))
    cells = rng.permutation(GRID * GRID)[: number + 1].tolist()
    shapes = rng.permutation(len(SHAPES))[:number]
    colours = rng.permutation(len(COLOURS))[:number]
    names = tuple(COLOURS)
    things = [Thing(SHAPES[s], names[c], cell) for s, c, cell in zip(shapes, colours, cells, strict=False)]
    sign = None
    if sign_glyph is not None:
        sign = Sign(sign_glyph, marks, int(rng.integers(1, len(RISK_LEVELS))), cells[number])
    return Scene(background, tuple(sorted(things, key=lambda t: t.cell)), sign, int(rng.integers(2**31)))


# ---------------------------------------------------------------------------------------------------------- painting
_OVERSAMPLE = 4


def _stencil(size: int, paint: Callable[[ImageDraw.ImageDraw, int], None]) -> np.ndarray:
    """A [size, size] float mask in 0..1 of what `paint(draw, edge)` draws, antialiased by oversampling."""
    edge = size * _OVERSAMPLE
    canvas = Image.new("L", (edge, edge), 0)
    paint(ImageDraw.Draw(canvas), edge)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255.0


def _paint_shape(draw: ImageDraw.ImageDraw, e: int, shape: str) -> None:
    if shape == "circle":
        draw.ellipse((0, 0, e - 1, e - 1), fill=255)
    elif shape == "square":
        draw.rectangle((e * 0.06, e * 0.06, e * 0.94, e * 0.94), fill=255)
    elif shape == "triangle":
        draw.polygon([(e * 0.5, 0), (e, e * 0.95), (0, e * 0.95)], fill=255)
    elif shape == "star":
        points = []
        for i in range(10):
            radius = e * (0.52 if i % 2 == 0 else 0.21)
            angle = math.pi * (i / 5 - 0.5)
            points.append((e * 0.5 + radius * math.cos(angle), e * 0.52 + radius * math.sin(angle)))
        draw.polygon(points, fill=255)
    else:
        draw.rectangle((e * 0.35, 0, e * 0.65, e), fill=255)
        draw.rectangle((0, e * 0.35, e, e * 0.65), fill=255)


def _paint_glyph(draw: ImageDraw.ImageDraw, e: int, glyph: str) -> None:
    pen = max(1, round(e * 0.11))

    def box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        return x0 * e, y0 * e, x1 * e, y1 * e

    if glyph == "flag":
        draw.rectangle(box(0.14, 0.0, 0.26, 1.0), fill=255)
        draw.polygon([(0.26 * e, 0.02 * e), (0.95 * e, 0.28 * e), (0.26 * e, 0.55 * e)], fill=255)
    elif glyph == "chain":
        draw.ellipse(box(0.0, 0.25, 0.58, 0.75), outline=255, width=pen)
        draw.ellipse(box(0.42, 0.25, 1.0, 0.75), outline=255, width=pen)
    elif glyph == "bolt":
        corners = [(0.7, 0.0), (0.0, 0.6), (0.42, 0.6), (0.25, 1.0), (1.0, 0.36), (0.58, 0.36)]
        draw.polygon([(x * e, y * e) for x, y in corners], fill=255)
    elif glyph == "scales":
        draw.rectangle(box(0.45, 0.05, 0.55, 0.95), fill=255)
        draw.line((0.05 * e, 0.35 * e, 0.95 * e, 0.1 * e), fill=255, width=pen)
        draw.pieslice(box(0.0, 0.3, 0.4, 0.8), 0, 180, fill=255)
        draw.pieslice(box(0.6, 0.02, 1.0, 0.52), 0, 180, fill=255)
    elif glyph == "eye":
        draw.ellipse(box(0.0, 0.22, 1.0, 0.78), outline=255, width=pen)
        draw.ellipse(box(0.36, 0.36, 0.64, 0.64), fill=255)
    elif glyph == "mask":
        draw.rectangle(box(0.02, 0.25, 0.98, 0.62), fill=255)
        draw.polygon([(0.1 * e, 0.6 * e), (0.9 * e, 0.6 * e), (0.5 * e, 0.95 * e)], fill=255)
        draw.ellipse(box(0.14, 0.34, 0.4, 0.54), fill=0)
        draw.ellipse(box(0.6, 0.34, 0.86, 0.54), fill=0)
    elif glyph == "house":
        draw.polygon([(0.5 * e, 0.0), (e, 0.48 * e), (0.0, 0.48 * e)], fill=255)
        draw.rectangle(box(0.16, 0.48, 0.84, 1.0), fill=255)
        draw.rectangle(box(0.4, 0.65, 0.6, 1.0), fill=0)
    elif glyph == "tree":
        draw.ellipse(box(0.14, 0.0, 0.86, 0.66), fill=255)
        draw.rectangle(box(0.42, 0.6, 0.58, 1.0), fill=255)
    elif glyph == "sun":
        draw.ellipse(box(0.22, 0.22, 0.78, 0.78), fill=255)
        for i in range(8):
            dx, dy = math.cos(i * math.pi / 4), math.sin(i * math.pi / 4)
            ray = (0.5 + 0.32 * dx, 0.5 + 0.32 * dy, 0.5 + 0.5 * dx, 0.5 + 0.5 * dy)
            draw.line([v * e for v in ray], fill=255, width=pen)
    else:
        draw.rectangle(box(0.05, 0.2, 0.65, 0.95), fill=255)
        draw.ellipse(box(0.5, 0.32, 0.98, 0.8), outline=255, width=pen)


@functools.cache
def _shape_mask(shape: str, size: int) -> np.ndarray:
    return _stencil(size, lambda draw, e: _paint_shape(draw, e, shape))


@functools.cache
def _glyph_mask(glyph: str) -> np.ndarray:
    return _stencil(18, lambda draw, e: _paint_glyph(draw, e, glyph))


@functools.cache
def _background(scene: str) -> np.ndarray:
    """The texture of a scene: float32 [2 * size, 2 * size, 3], of which every picture shows a random window."""
    y, x = np.mgrid[0 : 2 * IMAGE_SIZE, 0 : 2 * IMAGE_SIZE].astype(np.float32)
    wave = {
        "field": np.sin(x * 0.9 + 2.0 * np.sin(y * 0.23)),
        "street": np.sign(np.sin(y * 0.26)),
        "beach": np.sin(y * 0.35 + np.sin(x * 0.12) * 2.0),
        "room": np.sign(np.sin(x * 0.33) * np.sin(y * 0.33)),
        "night": (np.sin(x * 1.7) * np.sin(y * 1.3) > 0.9) * 2.0 - 0.6,
        "wall": np.maximum(np.sin(y * 0.52), np.sin(x * 0.4 + np.floor(y * 0.52 / (2 * math.pi)) * 1.9)),
    }[scene]
    base, swing = {
        "field": ((128, 150, 104), 12),
        "street": ((120, 120, 126), 12),
        "beach": ((206, 190, 150), 14),
        "room": ((176, 160, 142), 12),
        "night": ((38, 42, 66), 16),
        "wall": ((150, 112, 98), 13),
    }[scene]
    return np.asarray(base, dtype=np.float32) + swing * wave[..., None].astype(np.float32)


def _blend(canvas: np.ndarray, mask: np.ndarray, colour: Sequence[float] | np.ndarray, top: int, left: int) -> None:
    area = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    area += mask[..., None] * (np.asarray(colour, dtype=np.float32) - area)


def paint(scene: Scene) -> np.ndarray:
    """Paint a scene: uint8 [96, 96, 3] RGB, the same pixels for the same scene."""
    rng = np.random.default_rng(scene.seed)
    top, left = rng.integers(0, IMAGE_SIZE, 2)
    canvas = _background(scene.background)[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE].copy()
    canvas += rng.integers(-12, 13)
    for thing in scene.things:
        size = int(rng.integers(23, 29))
        y, x = rng.integers(1, CELL - size, 2)
        colour = np.asarray(COLOURS[thing.colour]) + rng.integers(-10, 11, 3)
        row, column = divmod(thing.cell, GRID)
        _blend(canvas, _shape_mask(thing.shape, size), colour, row * CELL + y, column * CELL + x)
    if scene.sign is not None:
        row, column = divmod(scene.sign.cell, GRID)
        y, x = row * CELL + int(rng.integers(0, 3)), column * CELL + int(rng.integers(0, 5))
        canvas[y : y + 30, x : x + 28] = 60
        canvas[y + 1 : y + 29, x + 1 : x + 27] = 246
        _blend(canvas, _glyph_mask(scene.sign.glyph), (30, 30, 34), y + 2, x + 5)
        for i in range(scene.sign.count):
            canvas[y + 21 : y + 28, x + 2 + 8 * i : x + 9 + 8 * i] = COLOURS[scene.sign.marks]
    # grey, in three steps only: film grain that a PNG still packs well
    canvas += 4.0 * rng.integers(-1, 2, (IMAGE_SIZE, IMAGE_SIZE, 1))
    return np.clip(canvas, 0, 255).astype(np.uint8)
