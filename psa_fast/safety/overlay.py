"""The picture of an explanation: for each reading the request's pictures, where it looked, and what spoke for what."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image

from psa_fast.pictures import Pictures
from psa_fast.safety.explanation import Explanation, reading_name
from psa_fast.taxonomy import RISK_TYPES

if TYPE_CHECKING:
    from psa_fast.safety.guard import Guard
    from psa_fast.safety.looking import Look
    from psa_fast.safety.request import Request

SIDE, GAP, TEXT = 112, 8, 18  # of a small picture, between two, and of a line of text; pixels
MOST_PICTURES = 4  # of a reading


def pictures_seen(guard: Guard, request: Request) -> tuple[Image.Image, ...]:
    """The request's pictures as the vision tower is shown them: cut and scaled, in their own colours."""
    images = guard.prepare(request).images
    if images is None:
        return ()
    if isinstance(images.pixel_values, Pictures):  # patches of whole pictures: nothing of them is cut off
        return tuple(request.pictures())
    assert isinstance(images.pixel_values, torch.Tensor)
    processor: Any = guard.processor.image_processor
    mean, deviation = (torch.tensor(getattr(processor, name)).view(3, 1, 1) for name in ("image_mean", "image_std"))
    found = []
    for pixels in images.pixel_values:
        shown = (pixels.double() * deviation + mean).clamp(0.0, 1.0) * 255.0
        found.append(Image.fromarray(shown.round().to(torch.uint8).permute(1, 2, 0).numpy()))
    return tuple(found)


def explanation_svg(explanation: Explanation) -> str:
    """An explanation as one SVG that loads nothing: its words, and a row of pictures for each reading and picture.

    A row shows the picture, the attention on it (dark where the reading did not look), and for each risk type, and
    the level of the verdict, what the features added to its logit: red for it, blue against it.
    """
    lines, rows = explanation.lines(), _rows(explanation)
    columns = max([len(cells) for _, cells in rows], default=0)
    # a letter is about 6.6 pixels wide; 640 is what a page has room for at least
    width = max(columns * (SIDE + GAP) + GAP, 640, GAP + math.ceil(6.6 * max(map(len, lines))))
    height = GAP + TEXT * len(lines) + len(rows) * (SIDE + 2 * TEXT + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    y = GAP
    for line in lines:
        y += TEXT
        parts.append(_text(GAP, y - 5, line))
    for title, cells in rows:
        y += TEXT
        parts.append(_text(GAP, y - 4, title))
        for column, (name, picture) in enumerate(cells):
            x = GAP + column * (SIDE + GAP)
            parts.append(
                f'<image x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" href="{_uri(picture)}">'
                f"<title>{_clean(name)}</title></image>"
            )
            parts.append(_text(x, y + SIDE + TEXT - 5, name, 9))
        y += SIDE + TEXT + GAP
    return "\n".join([*parts, "</svg>", ""])


def _rows(explanation: Explanation) -> list[tuple[str, list[tuple[str, Image.Image]]]]:
    """By reading and picture: a title, and named pictures."""
    level = explanation.verdict.level
    concepts = [*RISK_TYPES, *([] if level is None else [level])]
    rows = []
    for look in explanation.looks:
        shown = [place for place, shares in enumerate(look.attention) if shares is not None][:MOST_PICTURES]
        for place in shown:
            title = reading_name(look) + (f": picture {place + 1}" if len(explanation.seen) > 1 else "")
            rows.append((title, _cells(look, place, explanation.seen[place], concepts)))
    return rows


def _cells(look: Look, place: int, seen: Image.Image, concepts: Sequence[str]) -> list[tuple[str, Image.Image]]:
    picture = seen.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    attention = look.attention[place] or ()
    side = math.isqrt(len(attention))
    if side * side != len(attention):  # a grid of another shape is not known here; its numbers are in the JSON
        return [("picture", picture)]
    cells = [("picture", picture), (f"attention {sum(attention):.2f}", _dimmed(picture, attention, side))]
    most = max((abs(value) for concept in concepts for value in look.added[concept][place] or ()), default=0.0)
    for concept in concepts:
        added = look.added[concept][place] or ()
        cells.append((f"{concept} {sum(added):+.2f}", _coloured(picture, added, side, most)))
    return cells


def _dimmed(picture: Image.Image, shares: Sequence[float], side: int) -> Image.Image:
    """The picture, dark where the share is small beside the largest."""
    most = max(shares) or 1.0
    grid = np.array(shares).reshape(side, side) / most
    mask = Image.fromarray(np.uint8(40 + 215 * grid)).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.composite(picture, Image.new("RGB", picture.size), mask)


def _coloured(picture: Image.Image, added: Sequence[float], side: int, most: float) -> Image.Image:
    """The picture in grey, red where a feature spoke for the concept and blue where it spoke against it."""
    grid = np.array(added).reshape(side, side) / (most or 1.0)
    colours = np.zeros((side, side, 3), np.uint8)
    colours[grid > 0] = (220, 20, 20)
    colours[grid < 0] = (20, 60, 220)
    strength = Image.fromarray(np.uint8(np.sqrt(np.abs(grid)) * 230))
    # each feature keeps its own square: what lies between two of them was not looked at by anybody
    colour, mask = (
        image.resize(picture.size, Image.Resampling.NEAREST) for image in (Image.fromarray(colours), strength)
    )
    return Image.composite(colour, picture.convert("L").convert("RGB"), mask)


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _text(x: int, y: int, text: str, size: int = 13) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}">{_clean(text)}</text>'


def _clean(text: str) -> str:
    """Text of a policy or a request's fault as XML takes it."""
    return escape("".join(c if c.isprintable() else " " for c in text))
