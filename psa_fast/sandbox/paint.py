"""How a scene of the sandbox world is painted: 96x96 pixels, the same for the same scene."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from psa_fast.sandbox.world import COLOURS, IMAGE_SIZE, SHAPE_SIZE, SIGN_SIZE, Scene, Sign, Thing

_OVERSAMPLE = 4


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
def _shape_mask(shape: str, size: float, turn: int) -> np.ndarray:
    """Mask [h, w] of a shape whose upright box has an edge of `size` pixels."""
    edge = round(size * _OVERSAMPLE)
    canvas = Image.new("L", (edge, edge), 0)
    _paint_shape(ImageDraw.Draw(canvas), edge, shape)
    return _shrunk(canvas.rotate(turn, Image.Resampling.BICUBIC, expand=True))[..., 0]


@functools.lru_cache(maxsize=20_000)
def _sign_parts(glyph: str, marks: str, count: int, scale: float, turn: int) -> tuple[np.ndarray, np.ndarray]:
    """Colours [h, w, 3] and mask [h, w] of a sign."""
    unit = scale * _OVERSAMPLE
    height, width = (round(v * unit) for v in SIGN_SIZE)
    canvas = Image.new("RGB", (width, height), (60, 60, 60))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((unit, unit, width - 1 - unit, height - 1 - unit), fill=(246, 246, 246))
    edge = round(18 * unit)
    pictogram = Image.new("L", (edge, edge), 0)
    _paint_glyph(ImageDraw.Draw(pictogram), edge, glyph)
    canvas.paste((30, 30, 34), (round(5 * unit), round(2 * unit)), pictogram)
    for i in range(count):
        box = (2 + 8 * i, 21, 2 + 8 * i + 7, 28)
        draw.rectangle([round(v * unit) - (k > 1) for k, v in enumerate(box)], fill=COLOURS[marks])
    plate = Image.new("L", canvas.size, 255)
    turned = [part.rotate(turn, Image.Resampling.BICUBIC, expand=True) for part in (canvas, plate)]
    mask = _shrunk(turned[1])[..., 0]
    # colours were mixed with the black around a turned plate; undo it where there is plate at all
    return _shrunk(turned[0]) * 255.0 / np.maximum(mask, 1e-3)[..., None], mask


def _shrunk(canvas: Image.Image) -> np.ndarray:
    """float32 [h, w, channels] in 0..1: the picture on the pixel grid, averaged over the oversampled pixels."""
    pixels = np.asarray(canvas, dtype=np.float32) / 255.0
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    rows, columns = (-(-n // _OVERSAMPLE) for n in pixels.shape[:2])
    padded = np.zeros((rows * _OVERSAMPLE, columns * _OVERSAMPLE, pixels.shape[2]), dtype=np.float32)
    top, left = ((n * _OVERSAMPLE - m) // 2 for n, m in zip((rows, columns), pixels.shape[:2], strict=True))
    padded[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return padded.reshape(rows, _OVERSAMPLE, columns, _OVERSAMPLE, -1).mean(axis=(1, 3))


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


def lay(
    canvas: np.ndarray, owners: np.ndarray, number: int, item: Sign | Thing, rng: np.random.Generator, zoom: float = 1.0
) -> None:
    """Draw a sign or a thing, in place: on the canvas (float32 [h, w, 3]), and its number on the owners ([h, w])."""
    place = item.place
    if isinstance(item, Sign):
        # the scale in steps, so that what is drawn can be kept
        colour, mask = _sign_parts(item.glyph, item.marks, item.count, round(place.scale * zoom, 2), place.turn)
    else:
        mask = _shape_mask(item.shape, round(SHAPE_SIZE[0] * place.scale * zoom, 1), place.turn)
        colour = (np.asarray(COLOURS[item.colour]) + rng.integers(-10, 11, 3)).astype(np.float32)
    top, left = round(place.y - mask.shape[0] / 2), round(place.x - mask.shape[1] / 2)
    rows, columns = (
        slice(max(0, -start), max(0, -start, min(length, edge - start)))
        for start, length, edge in zip((top, left), mask.shape, canvas.shape, strict=False)
    )
    mask = mask[rows, columns]
    spot = slice(top + rows.start, top + rows.stop), slice(left + columns.start, left + columns.stop)
    area = canvas[spot]
    area += mask[..., None] * ((colour if colour.ndim == 1 else colour[rows, columns]) - area)
    owners[spot][mask >= 0.5] = number


def paint(scene: Scene) -> np.ndarray:
    """Paint a scene: uint8 [96, 96, 3] RGB, the same pixels for the same scene."""
    return render(scene)[0]


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Paint a scene and say what is where: uint8 [96, 96, 3] RGB and uint8 [96, 96] owners.

    A pixel's owner is 0 for the ground, 1 for the sign, 2, 3, 4 for the things in their order.
    """
    rng = np.random.default_rng(scene.seed)
    canvas = texture(scene.background, rng)
    zoom = 1.0
    if scene.frame is not None:
        top, left, side = scene.frame
        zoom = side / IMAGE_SIZE
        ground = np.empty_like(canvas)
        ground[:] = rng.uniform(30, 225, 3)
        ground[top : top + side, left : left + side] = canvas[:side, :side]
        canvas = ground
    owners = np.zeros(canvas.shape[:2], dtype=np.uint8)
    items: list[tuple[int, Sign | Thing]] = list(enumerate(scene.things, 2))
    if scene.sign is not None:
        items.insert(0 if rng.random() < 0.5 else len(items), (1, scene.sign))
    for number, item in items:
        lay(canvas, owners, number, item, rng, zoom)
    canvas = lit(canvas, rng)
    # grey, in three steps only: film grain that a PNG still packs well
    canvas += 4.0 * rng.integers(-1, 2, (IMAGE_SIZE, IMAGE_SIZE, 1))
    return np.clip(canvas, 0, 255).astype(np.uint8), owners


def texture(background: str, rng: np.random.Generator) -> np.ndarray:
    """A window of a scene's texture, float32 [96, 96, 3]."""
    top, left = rng.integers(0, IMAGE_SIZE, 2)
    canvas = _background(background)[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE].copy()
    canvas += rng.integers(-12, 13)
    return canvas


def lit(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture in another light: brightness, contrast and a tint."""
    mean = canvas.mean()
    canvas = (canvas - mean) * rng.uniform(0.8, 1.1) + mean
    return canvas * rng.uniform(0.82, 1.15) * rng.uniform(0.95, 1.05, 3).astype(np.float32)
