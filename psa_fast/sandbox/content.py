"""What the sandbox's tower learns from: crowded pictures beside scenes, changed at random, and what each patch shows.

A scene holds one sign at most, so a tower that sees scenes alone meets few pictograms. A *mosaic* is a picture full of
signs and things on scene textures or bare ground. Content only, never a risk label, and no (scene, risk pictogram)
composition of the dev or test split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from psa_fast.sandbox.language import NUMBERS
from psa_fast.sandbox.paint import lay, lit, render, texture
from psa_fast.sandbox.word_level import PATCH
from psa_fast.sandbox.world import (
    COLOURS,
    GLYPHS,
    GRID,
    HARMLESS_GLYPHS,
    IMAGE_SIZE,
    MARKS,
    PLACES,
    RISK_GLYPHS,
    SCENES,
    SHAPES,
    UNCLEAR,
    Group,
    Place,
    Scene,
    Sign,
    Thing,
    sample_scene,
    split_of,
)

# A patch names one word of each line (or none of it): what CLIP's features would tell of a picture.
CONTENT = (SHAPES, tuple(COLOURS), GLYPHS, MARKS, NUMBERS, PLACES)
OF_THINGS, OF_SIGNS, OF_PLACES = (0, 1), (2, 3, 4), 5
# Scenes shown: content only, so risky ones are as good as any. Labels of risk are never shown.
GROUP_SHARES: dict[Group, float] = {"clean": 0.4, "benign_twin": 0.3, "risk": 0.3}
MOST_ITEMS = 16
# Sizes and turns of what is in a mosaic, in steps, so that what is drawn can be kept. A picture that is shrunk to half
# its size has signs as small as the smallest.
MOSAIC_SCALES = tuple(round(0.4 * 1.2**i, 2) for i in range(8))
MOSAIC_TURNS = (-18, -12, -6, 0, 6, 12, 18)
# A patch shows what covers this share of it. Between that and `GLIMPSE` nothing is asked of it.
SHOWN, GLIMPSE = 0.25, 0.04


class Pictures(NamedTuple):
    """Pictures and what is in them: `pixels` uint8 [N, h, w, 3]; `owners` uint8 [N, h, w], the number of the item that
    a pixel belongs to, 0 for the ground; `items` int64 [N, MOST_ITEMS + 1, 5], an index into each line of CONTENT but
    the last, -1 for none of it."""

    pixels: Tensor
    owners: Tensor
    items: Tensor

    def take(self, chosen: Tensor) -> Pictures:
        """Some of the pictures, by their numbers int64 [n]."""
        return Pictures(*(tensor[chosen] for tensor in (self.pixels, self.owners, self.items)))


_Picture = tuple[np.ndarray, np.ndarray, np.ndarray]


def draw_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Scenes in training compositions, in the shares of GROUP_SHARES."""
    groups = rng.choice(len(GROUP_SHARES), count, p=list(GROUP_SHARES.values()))
    names = list(GROUP_SHARES)
    return [sample_scene(rng, names[g], "train") for g in groups]


def draw_pictures(rng: np.random.Generator, count: int, mosaics: float, side: int = IMAGE_SIZE) -> Pictures:
    """`count` pictures, a share of them mosaics; a `side` of less than the usual one leaves no room for scenes."""
    drawn = [
        _mosaic(rng, side) if side < IMAGE_SIZE or rng.random() < mosaics else _scene(draw_scenes(rng, 1)[0])
        for _ in range(count)
    ]
    return Pictures(*(torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True)))


def scene_pictures(scenes: list[Scene]) -> Pictures:
    """The pictures of given scenes."""
    drawn = [_scene(scene) for scene in scenes]
    return Pictures(*(torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True)))


def _facts(items: list[tuple[int, Sign | Thing]]) -> np.ndarray:
    facts = np.full((MOST_ITEMS + 1, 5), -1, dtype=np.int64)
    for number, item in items:
        if isinstance(item, Sign):
            facts[number, 2:] = GLYPHS.index(item.glyph), MARKS.index(item.marks), item.count - 1
        else:
            facts[number, :2] = SHAPES.index(item.shape), list(COLOURS).index(item.colour)
    return facts


def _scene(scene: Scene) -> _Picture:
    items: list[tuple[int, Sign | Thing]] = list(enumerate(scene.things, 2))
    return *render(scene), _facts([*items, (1, scene.sign)] if scene.sign else items)


def _mosaic(rng: np.random.Generator, side: int) -> _Picture:
    """Rows and columns of signs and things, each a little out of line, with an edge that cuts some of them."""
    glyphs = [*GLYPHS]
    if rng.random() < 0.5:
        canvas = np.empty((side, side, 3), dtype=np.float32)
        canvas[:] = rng.uniform(20, 230, 3)
        canvas += rng.normal(0, rng.uniform(0, 14), (side, side, 1)).astype(np.float32)
    else:
        background = SCENES[rng.integers(len(SCENES))]
        canvas = texture(background, rng)[:side, :side].copy()
        glyphs = [g for g in RISK_GLYPHS if split_of(background, g) == "train"] + [*HARMLESS_GLYPHS]
    pitch = rng.uniform(15, 50)
    owners = np.zeros((side, side), dtype=np.uint8)
    items: list[tuple[int, Sign | Thing]] = []
    offset = rng.uniform(0, pitch, 2)
    for y in np.arange(offset[0], side + pitch / 3, pitch):
        for x in np.arange(offset[1], side + pitch / 3, pitch):
            if len(items) == MOST_ITEMS or rng.random() < 0.1:
                continue
            scale = _nearest(MOSAIC_SCALES, pitch / 33 * rng.uniform(0.75, 1.1))
            slack = max(0.0, (pitch - 30 * scale) / 2)
            y_at, x_at = y + rng.uniform(-slack, slack), x + rng.uniform(-slack, slack)
            place = Place(float(y_at), float(x_at), scale, MOSAIC_TURNS[rng.integers(len(MOSAIC_TURNS))])
            item: Sign | Thing
            if rng.random() < 0.45:
                glyph, marks = glyphs[rng.integers(len(glyphs))], MARKS[rng.integers(len(MARKS))]
                item = Sign(glyph, marks, int(rng.integers(1, 4)), place)
            else:
                item = Thing(SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[rng.integers(len(COLOURS))], place)
            items.append((len(items) + 1, item))
            lay(canvas, owners, len(items), item, rng)
    canvas = lit(canvas, rng) + 4.0 * rng.integers(-1, 2, (side, side, 1))
    return np.clip(canvas, 0, 255).astype(np.uint8), owners, _facts(items)


def _nearest(values: tuple[float, ...], wanted: float) -> float:
    return min(values, key=lambda value: abs(value - wanted))


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 [N, h, w, 3] as the processor prepares them: float [N, 3, h, w] in -1..1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def changed(pictures: Pictures, generator: torch.Generator, share: float = 0.6) -> tuple[Tensor, Tensor]:
    """Pixels float [N, 3, h, w] and owners int64 [N, h, w]: a share of the pictures moved, turned, zoomed, under other
    light, blurred, with paler or coarser colours; three in ten mirrored, three upside down. What enters at the edge
    repeats it.
    """
    n, side = len(pictures.pixels), pictures.pixels.shape[1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    moved = (uniform(0, 1) < share).float()
    angle, zoom = uniform(-0.27, 0.27) * moved, torch.exp(uniform(-0.4, 0.4) * moved)
    shift = uniform(-0.25, 0.25, 2) * moved[:, None]
    mirrored, upside = 1 - 2 * (uniform(0, 1) < 0.3).float(), 1 - 2 * (uniform(0, 1) < 0.3).float()
    rows = (
        torch.stack([angle.cos() * zoom * mirrored, -angle.sin() * zoom * upside, shift[:, 0]], 1),
        torch.stack([angle.sin() * zoom * mirrored, angle.cos() * zoom * upside, shift[:, 1]], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), [n, 3, side, side], align_corners=False)
    pixels = F.grid_sample(to_pixels(pictures.pixels), grid, padding_mode="border", align_corners=False)
    owners = F.grid_sample(pictures.owners[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0].long()
    lighter, contrast = uniform(-0.25, 0.25, 1, 1, 1), torch.exp(uniform(-0.3, 0.2, 1, 1, 1))
    pixels = torch.where(moved[:, None, None, None] > 0, pixels * contrast + lighter, pixels)
    pixels = _recoloured(pixels, uniform)
    softened = (uniform(0, 1) < 0.2)[:, None, None, None]
    pixels = torch.where(softened, F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False), pixels)
    noisy = uniform(0, 1, 1, 1, 1).lt(0.2) * uniform(0, 0.15, 1, 1, 1)
    return (pixels + noisy * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1), owners


def _recoloured(pixels: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
    """A third of the pictures with paler colours, a fifth with colours at half the resolution, as JPEG keeps them."""
    grey = pixels.mean(1, keepdim=True)
    colour = pixels - grey
    paler = torch.where(uniform(0, 1, 1, 1, 1) < 0.33, torch.exp(uniform(-1.0, 0.2, 1, 1, 1)), 1.0)
    coarse = F.interpolate(F.avg_pool2d(colour, 2), scale_factor=2, mode="nearest")
    return grey + paler * torch.where(uniform(0, 1, 1, 1, 1) < 0.2, coarse, colour)


def patch_labels(owners: Tensor, items: Tensor) -> Tensor:
    """What each patch must name: int64 [N, S, 6], an index into each line of CONTENT, -1 for none of it, -100 where
    too little is seen to ask.

    Args:
        owners: int64 [N, h, w].
        items: int64 [N, K, 5].

    A patch shows the item that covers most of it, and every item is shown by the patch that it covers most. Its place
    is that of the item's centre, and is not asked for where that is near a border between thirds. Bare ground has none:
    it would outvote the few patches of the thing that a question is about.
    """
    n, h, w = owners.shape
    count = int(owners.max()) + 1
    rows, columns = h // PATCH, w // PATCH
    # items of each patch counted by index, which is ten times as fast as comparing every pixel with every item
    own = owners.reshape(n, rows, PATCH, columns, PATCH).transpose(2, 3).reshape(n, rows * columns, PATCH * PATCH)
    cover = torch.zeros(n, rows * columns, count).scatter_add_(2, own, torch.ones(own.shape)) / PATCH**2
    cover = cover.transpose(1, 2)  # [N, K, S]
    third, certain = _thirds(owners, count)
    facts = items[:, :count]
    labels = torch.full((n, cover.shape[2], len(CONTENT)), -1)
    place = torch.where(certain, third, -100)
    most = torch.zeros(n, cover.shape[2])
    for lines in (OF_THINGS, OF_SIGNS):
        of_kind = cover * (facts[:, :, lines[0]] >= 0)[..., None]
        share, owner = of_kind.max(1)  # [N, S]
        best = of_kind.amax(2).gather(1, owner)
        shown = (share >= SHOWN) | ((share >= best - 1e-6) & (share > GLIMPSE))
        for line in lines:
            named = facts[:, :, line].gather(1, owner)
            labels[..., line] = torch.where(shown, named, torch.where(share > GLIMPSE, -100, -1))
        labels[..., OF_PLACES] = torch.where(shown & (share > most), place.gather(1, owner), labels[..., OF_PLACES])
        most = torch.where(shown, torch.maximum(most, share), most)
    return labels


def _thirds(owners: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The third of the picture that holds each item's centre, int64 [N, count], and whether it is clear which."""
    n, h, w = owners.shape
    flat = owners.reshape(n, h * w)
    ys = torch.arange(h, dtype=torch.float32).repeat_interleave(w).expand(n, -1)
    xs = torch.arange(w, dtype=torch.float32).repeat(h).expand(n, -1)
    area, y, x = (torch.zeros(n, count).scatter_add_(1, flat, weight) for weight in (torch.ones(flat.shape), ys, xs))
    centre = torch.stack([(y / area.clamp_min(1) + 0.5) / h, (x / area.clamp_min(1) + 0.5) / w]) * GRID
    row, column = centre.long().clamp(0, GRID - 1)
    border = UNCLEAR * GRID / IMAGE_SIZE
    certain = ((centre - centre.round()).abs() >= border) | (centre.round() % GRID == 0)
    return row * GRID + column, certain.all(0)
