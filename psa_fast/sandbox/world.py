"""The sandbox world: what a scene may hold and how one is sampled (96x96 pixels, no grid; paint.py paints it).

A scene has a textured background, one to three objects of distinct shapes and colours, and at most one sign: a white
plate with a pictogram and one to three marks. Six pictograms stand for the six risk types, four are harmless; only a
risk pictogram with *red* marks is a risk, and the number of marks is its level. Everything else is a clean scene or a
look-alike (a "benign twin"): a risk pictogram with blue marks, or a harmless one with red marks. No picture shows
anything harmful.

Objects and signs stand anywhere, in sizes from .75 to 1.35, turned by up to 12 degrees, under changing light; some
scenes are a picture within a picture. An object's place is named after the third of the picture that holds its centre;
near a border between thirds it is unclear, and is not asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from psa_fast.taxonomy import CLEAN, RISK_LEVELS

IMAGE_SIZE = 96
GRID = 3
# of objects and signs, as a factor of their usual size, and in degrees; in steps, so that what is drawn can be kept
SCALES = tuple(round(0.75 * 1.8 ** (i / 12), 3) for i in range(13))
TURNS = tuple(range(-12, 13, 3))

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

# height and width in pixels at scale 1
SIGN_SIZE, SHAPE_SIZE = (30, 28), (26, 26)
# the least size factor, of what stands in a picture within a picture too
SMALLEST = 0.6
# pixels on both sides of a border between thirds where a centre's place is unclear
UNCLEAR = 4.0
# share of scenes that are a picture within a picture
FRAMED = 0.15

Group = Literal["clean", "benign_twin", "risk"]
GROUPS_WITH_PICTURES: tuple[Group, ...] = ("clean", "benign_twin", "risk")
Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Place:
    """Where and how something is drawn: its centre (pixels from the top and the left), size factor, turn in degrees."""

    y: float
    x: float
    scale: float
    turn: int

    @property
    def cell(self) -> int:
        """The third of the picture that holds the centre, an index into PLACES."""
        row, column = (min(GRID - 1, int(v * GRID / IMAGE_SIZE)) for v in (self.y, self.x))
        return row * GRID + column

    @property
    def clear(self) -> bool:
        """Whether the centre is away from the borders between cells, so that its place can be asked for."""
        third = IMAGE_SIZE / GRID
        return all(abs(v - third * border) >= UNCLEAR for v in (self.y, self.x) for border in range(1, GRID))


@dataclass(frozen=True)
class Thing:
    """A coloured shape."""

    shape: str
    colour: str
    place: Place

    @property
    def cell(self) -> int:
        """Where its centre is, an index into PLACES."""
        return self.place.cell


@dataclass(frozen=True)
class Sign:
    """A plate with a pictogram and `count` marks of one colour."""

    glyph: str
    marks: str
    count: int
    place: Place

    @property
    def cell(self) -> int:
        """Where its centre is, an index into PLACES."""
        return self.place.cell


@dataclass(frozen=True)
class Scene:
    """Everything that is in a picture; `things` are ordered by cell. `seed` fixes textures, light and colours.

    `frame` (top, left, side) is the part of the picture that shows the scene, where that is not all of it: a picture
    within a picture. Around it is bare ground.
    """

    background: str
    things: tuple[Thing, ...]
    sign: Sign | None
    seed: int
    frame: tuple[int, int, int] | None = None

    @property
    def sign_box(self) -> tuple[float, float, float, float] | None:
        """The box around the sign: left, top, right, bottom in shares of the picture; None without one."""
        if self.sign is None:
            return None
        place, zoom = self.sign.place, 1.0 if self.frame is None else self.frame[2] / IMAGE_SIZE
        tall, wide = _turned(SIGN_SIZE[0] * place.scale * zoom, SIGN_SIZE[1] * place.scale * zoom, place.turn)
        box = place.x - wide / 2, place.y - tall / 2, place.x + wide / 2, place.y + tall / 2
        left, top, right, bottom = (round(min(max(edge / IMAGE_SIZE, 0.0), 1.0), 4) for edge in box)
        return left, top, right, bottom

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
    shapes = rng.permutation(len(SHAPES))[:number]
    colours = rng.permutation(len(COLOURS))[:number]
    names = tuple(COLOURS)
    frame = _frame(rng) if rng.random() < FRAMED else None
    places = _places(rng, [SIGN_SIZE] * (sign_glyph is not None) + [SHAPE_SIZE] * number, frame)
    sign = None
    if sign_glyph is not None:
        sign = Sign(sign_glyph, marks, int(rng.integers(1, len(RISK_LEVELS))), places.pop(0))
    things = [Thing(SHAPES[s], names[c], place) for s, c, place in zip(shapes, colours, places, strict=True)]
    return Scene(background, tuple(sorted(things, key=lambda t: t.cell)), sign, int(rng.integers(2**31)), frame)


def _frame(rng: np.random.Generator) -> tuple[int, int, int]:
    side = int(rng.integers(64, 88))
    return int(rng.integers(0, IMAGE_SIZE - side + 1)), int(rng.integers(0, IMAGE_SIZE - side + 1)), side


def _places(
    rng: np.random.Generator, sizes: Sequence[tuple[int, int]], frame: tuple[int, int, int] | None
) -> list[Place]:
    """A place for each of some sizes (height, width), in distinct cells, so that hardly anything is covered.

    Each begins with a size of its own; what finds no room is drawn smaller.
    """
    top, left, side = frame or (0, 0, IMAGE_SIZE)
    zoom = side / IMAGE_SIZE
    while True:
        found: list[tuple[Place, float, float]] = []
        for height, width in sizes:
            scales = [scale for scale in SCALES if scale * zoom >= SMALLEST]
            largest = int(rng.integers(len(scales)))
            for attempt in range(24):
                scale = scales[max(0, largest - attempt)]
                turn = TURNS[rng.integers(len(TURNS))]
                tall, wide = _turned(height * scale * zoom, width * scale * zoom, turn)
                y = rng.uniform(top + tall / 2, top + side - tall / 2)
                x = rng.uniform(left + wide / 2, left + side - wide / 2)
                place = Place(round(float(y), 2), round(float(x), 2), scale, turn)
                if all(_stand_apart(place, tall, wide, *other) for other in found):
                    found.append((place, tall, wide))
                    break
            else:
                break
        if len(found) == len(sizes):
            return [place for place, _, _ in found]


def _turned(height: float, width: float, turn: int) -> tuple[float, float]:
    """Height and width of the box around a turned rectangle."""
    s, c = abs(math.sin(math.radians(turn))), math.cos(math.radians(turn))
    return height * c + width * s, width * c + height * s


def _stand_apart(a: Place, tall: float, wide: float, b: Place, other_tall: float, other_wide: float) -> bool:
    """Whether two boxes are in different cells and share at most a tenth of the smaller one."""
    rows = min(a.y + tall / 2, b.y + other_tall / 2) - max(a.y - tall / 2, b.y - other_tall / 2)
    columns = min(a.x + wide / 2, b.x + other_wide / 2) - max(a.x - wide / 2, b.x - other_wide / 2)
    shared = max(0.0, rows) * max(0.0, columns)
    return a.cell != b.cell and shared <= 0.1 * min(tall * wide, other_tall * other_wide)
