"""Changes of a picture, each a function of the picture and a number: what cameras, editors and uploads do to pictures.

Pictures are 8-bit RGB of any size and keep their size. What enters at an edge repeats the edge. Severities 1 to 5 are
after the corruptions of Hendrycks & Dietterich (arXiv 1903.12261), geometry beside them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

Change = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def _affine(image: Image.Image, matrix: np.ndarray) -> Image.Image:
    """The picture under a map [2, 3] from places of the result to places of the source, in pixels from the centre."""
    width, height = image.size
    # as far as the map reaches, the edge is repeated, so that nothing black enters
    corners = np.array([[x, y, 1.0] for x in (-width / 2, width / 2) for y in (-height / 2, height / 2)]) @ matrix.T
    pad_x = max(0, math.ceil(np.abs(corners[:, 0]).max() - width / 2)) + 2
    pad_y = max(0, math.ceil(np.abs(corners[:, 1]).max() - height / 2)) + 2
    padded = np.pad(np.asarray(image), ((pad_y, pad_y), (pad_x, pad_x), (0, 0)), mode="edge")
    (a, b, c), (d, e, f) = matrix
    x0, y0 = width / 2, height / 2
    data = (a, b, c - a * x0 - b * y0 + x0 + pad_x, d, e, f - d * x0 - e * y0 + y0 + pad_y)
    return Image.fromarray(padded).transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)


def move(
    image: Image.Image, right: float = 0.0, down: float = 0.0, scale: float = 1.0, degrees: float = 0.0
) -> Image.Image:
    """Shift by shares of the sides, scale about the centre (above 1 is nearer), turn anticlockwise."""
    if (right, down, scale, degrees) == (0.0, 0.0, 1.0, 0.0):
        return image
    if scale < 1.0:  # smoothed before it is sampled more coarsely
        image = image.filter(ImageFilter.GaussianBlur(0.35 * (1.0 / scale - 1.0)))
    sine, cosine = (f(math.radians(degrees)) / scale for f in (math.sin, math.cos))
    width, height = image.size
    turn = np.array([[cosine, -sine], [sine, cosine]])
    return _affine(image, np.hstack([turn, -turn @ np.array([[right * width], [down * height]])]))


def shift(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Move by a share of the sides, in one of eight directions."""
    right, down = ((-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1))[rng.integers(8)]
    return move(image, right * share, down * share)


def crop(image: Image.Image, kept: float, rng: np.random.Generator) -> Image.Image:
    """Cut out a share of both sides, at a random place, and enlarge it to the picture's size."""
    width, height = image.size
    w, h = max(1, round(width * kept)), max(1, round(height * kept))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return image.resize(image.size, Image.Resampling.BICUBIC, (left, top, left + w, top + h))


def turn(image: Image.Image, degrees: float, rng: np.random.Generator) -> Image.Image:
    """Turn about the centre, to either side."""
    return move(image, degrees=degrees if rng.random() < 0.5 else -degrees)


def scale(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Scale about the centre."""
    return move(image, scale=factor)


def flip_horizontal(image: Image.Image, _: float = 0.0, rng: np.random.Generator | None = None) -> Image.Image:
    """Mirror left and right."""
    return ImageOps.mirror(image)


def flip_vertical(image: Image.Image, _: float = 0.0, rng: np.random.Generator | None = None) -> Image.Image:
    """Mirror top and bottom."""
    return ImageOps.flip(image)


def inset(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Shrink to a share of both sides and lay it on bare ground, at a random place."""
    ground = Image.new("RGB", image.size, tuple(int(v) for v in rng.integers(30, 226, 3)))
    return paste(image, ground, share, rng)


def paste(image: Image.Image, ground: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Shrink to a share of both sides and lay it on another picture, at a random place."""
    ground = ground.resize(image.size, Image.Resampling.BICUBIC)
    w, h = (max(1, round(side * share)) for side in image.size)
    left, top = int(rng.integers(image.size[0] - w + 1)), int(rng.integers(image.size[1] - h + 1))
    ground.paste(image.resize((w, h), Image.Resampling.LANCZOS), (left, top))
    return ground


def collage(images: list[Image.Image]) -> Image.Image:
    """Four pictures at half size in one of the size of the first, row by row."""
    width, height = images[0].size
    out = images[0].copy()
    for i, image in enumerate(images[:4]):
        left, top = i % 2 * (width // 2), i // 2 * (height // 2)
        right, bottom = (width if i % 2 else width // 2), (height if i // 2 else height // 2)
        out.paste(image.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
    return out


def sticker(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Cover a square of this share of the area with one colour, at a random place."""
    out = image.copy()
    w, h = (max(1, round(side * math.sqrt(share))) for side in image.size)
    left, top = int(rng.integers(image.size[0] - w + 1)), int(rng.integers(image.size[1] - h + 1))
    out.paste(tuple(int(v) for v in rng.integers(0, 256, 3)), (left, top, left + w, top + h))
    return out


def _from_array(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def gaussian_noise(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    """Add normal noise, `sigma` in shares of the full range."""
    pixels = np.asarray(image, dtype=np.float32)
    return _from_array(pixels + 255 * sigma * rng.standard_normal(pixels.shape, dtype=np.float32))


def shot_noise(image: Image.Image, photons: float, rng: np.random.Generator) -> Image.Image:
    """Poisson noise of so many photons at full brightness."""
    return _from_array(rng.poisson(np.asarray(image) / 255.0 * photons) / photons * 255.0)


def impulse_noise(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Turn a share of the values black or white."""
    pixels = np.array(image)
    hit = rng.random(pixels.shape) < share
    pixels[hit] = 255 * rng.integers(0, 2, int(hit.sum()))
    return Image.fromarray(pixels)


def blur(image: Image.Image, radius: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur, the radius in thousandths of the longer side."""
    return image.filter(ImageFilter.GaussianBlur(radius * max(image.size) / 1000))


def jpeg(image: Image.Image, quality: float, rng: np.random.Generator) -> Image.Image:
    """Compress as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(quality))
    with Image.open(buffer) as opened:
        return opened.convert("RGB")


def brightness(image: Image.Image, added: float, rng: np.random.Generator) -> Image.Image:
    """Add a share of the full range, or take it away."""
    sign = 1 if rng.random() < 0.5 else -1
    return _from_array(np.asarray(image, dtype=np.float32) + 255 * added * sign)


def contrast(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Scale the distance from the mean grey."""
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    """Scale the distance from grey."""
    return ImageEnhance.Color(image).enhance(factor)


def pixelate(image: Image.Image, kept: float, rng: np.random.Generator) -> Image.Image:
    """Average over blocks: a share of both sides is kept."""
    small = image.resize([max(1, round(side * kept)) for side in image.size], Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


# The change, and its number at severities 1 to 5.
SEVERITIES: dict[str, tuple[Change, tuple[float, ...]]] = {
    "shift": (shift, (2 / 96, 4 / 96, 8 / 96, 12 / 96, 16 / 96)),
    "crop": (crop, (0.92, 0.86, 0.80, 0.72, 0.64)),
    "turn": (turn, (3, 7, 15, 30, 90)),
    "shrink": (scale, (0.9, 0.75, 0.6, 0.5, 0.4)),
    "enlarge": (scale, (1.1, 1.25, 1.5, 1.75, 2.0)),
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "blur": (blur, (4, 6, 8, 10, 15)),
    "jpeg": (jpeg, (80, 65, 58, 50, 40)),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.65, 0.55, 0.45, 0.35)),
    "saturation": (saturation, (0.8, 0.65, 0.5, 0.3, 2.0)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}
