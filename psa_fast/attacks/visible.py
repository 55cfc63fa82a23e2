"""Whether a change of a picture leaves in it what its label rests on.

An enlarged or shifted picture may lose the half of a sign that made it a risk: such a picture is no attack that got
through, its label is wrong. Records may say where their label rests (`regions`); a risk whose region a change cuts off
or covers is left out of the change's figures, and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from psa_fast.attacks.conditions import Case
from psa_fast.data.fields import Box

# the share of a region that must be left
ENOUGH = 0.85
# boxes whose share tells how much larger or smaller a change makes things; no change here hides all of them
_SIDE = 0.2
_WHOLE: tuple[Box, ...] = tuple(
    (x - _SIDE / 2, y - _SIDE / 2, x + _SIDE / 2, y + _SIDE / 2) for x, y in ((0.5, 0.5), (0.3, 0.3), (0.7, 0.7))
)


def keeps_regions(case: Case, change: Callable[[Case], Case]) -> bool:
    """Whether `change` leaves at least ENOUGH of each region that the case's record names.

    `change` must draw the same at every call. It is tried on black pictures with and without a white box in the
    region's place: what differs between the two is what is left of the region.
    """
    for place, region in enumerate(case.record.regions):
        if region is None:
            continue
        ground = _left(case, place, None, change)
        scale = max(_share(case, place, box, change, ground) for box in _WHOLE)
        if _share(case, place, region, change, ground) < ENOUGH * scale:
            return False
    return True


def _share(case: Case, place: int, box: Box, change: Callable[[Case], Case], ground: np.ndarray) -> float:
    """Pixels that the box has after the change for each that it had before."""
    before = np.count_nonzero(np.asarray(_marked(case.pictures[place].size, box))[..., 0])
    after = np.abs(_left(case, place, box, change).astype(np.int16) - ground.astype(np.int16))
    return int(np.count_nonzero(after.max(-1) > 64)) / max(1, int(before))


def _left(case: Case, place: int, box: Box | None, change: Callable[[Case], Case]) -> np.ndarray:
    """The changed picture number `place`, uint8 [H, W, 3], of black ones with a white box in that one."""
    pictures = [_marked(picture.size, box if i == place else None) for i, picture in enumerate(case.pictures)]
    return np.asarray(change(replace(case, pictures=tuple(pictures))).pictures[place])


def _marked(size: tuple[int, int], box: Box | None) -> Image.Image:
    picture = Image.new("RGB", size)
    if box is not None:
        left, top, right, bottom = box
        corners = left * size[0], top * size[1], right * size[0] - 1, bottom * size[1] - 1
        ImageDraw.Draw(picture).rectangle(corners, fill="white")
    return picture
