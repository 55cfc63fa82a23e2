"""Random changes of training pictures that keep their labels (`--augment`)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

from psa_fast.data import transforms as t

AUGMENTATIONS = ("none", "light", "strong")
Augmentation = Literal["none", "light", "strong"]

# Share of pictures whose geometry changes, of those whose light or sharpness does.
_MOVED = {"light": 0.5, "strong": 0.65}
_RELIT = {"light": 0.35, "strong": 0.5}


def augment(image: Image.Image, strength: Augmentation, rng: np.random.Generator) -> Image.Image:
    """A picture as a camera, an editor or an upload might have changed it; what it shows stays what it is.

    "light": a few percent of shift, zoom and crop, turns to 7 degrees, mild light, noise and compression. "strong":
    shifts to a tenth, zoom from .6 to 1.5, crops to .8, turns to 18 degrees, mirrored either way, shrunk onto bare
    ground down to half its size, and stronger light, blur and noise. Colours are never removed or inverted.
    """
    if strength == "none":
        return image
    if rng.random() < _MOVED[strength]:
        image = _moved(image, strength == "strong", rng)
    if rng.random() < _RELIT[strength]:
        image = _relit(image, 3 if strength == "strong" else 1, rng)
    return image


def _moved(image: Image.Image, strong: bool, rng: np.random.Generator) -> Image.Image:
    if strong:
        if rng.random() < 0.25:
            image = t.flip_horizontal(image)
        if rng.random() < 0.2:
            image = t.flip_vertical(image)
        share = rng.random()
        if share < 0.25:
            return t.inset(image, rng.uniform(0.48, 0.9), rng)
        if share < 0.45:
            return t.crop(image, rng.uniform(0.78, 1.0), rng)
    shift, zoom, turn = (0.1, 0.45, 18.0) if strong else (0.04, 0.08, 7.0)
    right, down = rng.uniform(-shift, shift, 2)
    return t.move(image, right, down, float(np.exp(rng.uniform(-zoom, zoom))), rng.uniform(-turn, turn))


def _relit(image: Image.Image, most: int, rng: np.random.Generator) -> Image.Image:
    names = ("brightness", "contrast", "saturation", "gaussian_noise", "shot_noise", "blur", "jpeg", "pixelate")
    name = names[rng.integers(len(names))]
    change, values = t.SEVERITIES[name]
    return change(image, values[rng.integers(most)], rng)
