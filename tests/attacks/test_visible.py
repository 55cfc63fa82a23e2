"""A risk whose sign a change cuts off or covers has lost its label; one that is only moved has not."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageDraw

from psa_fast.attacks.conditions import Case, Others, conditions
from psa_fast.attacks.visible import keeps_regions
from psa_fast.data.records import Record, Turn

MIDDLE, CORNER = (0.4, 0.4, 0.6, 0.6), (0.05, 0.05, 0.25, 0.25)
OTHERS = Others((Image.new("RGB", (96, 96), (90, 90, 90)),), ("word",))
TURNS = (Turn("user", "<image>\nwhat ?"), Turn("assistant", "this"))


def case(*regions):
    record = Record(("a.png",) * len(regions), 0, 2, TURNS, group="risk", path="f", line=1, regions=regions)
    return Case(record, tuple(Image.new("RGB", (96, 96), (90, 120, 90)) for _ in regions))


def change_of(name):
    (condition,) = (one for one in conditions(("natural",)) if one.name == name)
    return lambda one: condition.change(one, OTHERS, np.random.default_rng(3))


@pytest.mark.parametrize(
    ("name", "middle", "corner"),
    [
        ("shift-1", True, True), ("enlarge-3", True, False), ("crop-1", True, True), ("turn-1", True, True),
        ("shrink-3", True, True), ("mirrored", True, True), ("upside down", True, True), ("inset .5", True, True),
        ("inset .5 in another picture", True, True), ("collage 2x2", True, True), ("jpeg-3", True, True),
        ("contrast-3", True, True), ("gaussian_noise-3", True, True), ("turn-3", True, False),
    ],
)  # fmt: skip
def test_what_leaves_the_picture_is_seen_and_what_moves_is_not(name, middle, corner):
    assert keeps_regions(case(MIDDLE), change_of(name)) == middle
    assert keeps_regions(case(CORNER), change_of(name)) == corner


def test_a_region_of_any_picture_counts_and_none_is_none():
    enlarged = change_of("enlarge-3")
    assert keeps_regions(case(None, None), enlarged)
    assert not keeps_regions(case(None, CORNER), enlarged)
    assert keeps_regions(dataclasses.replace(case(CORNER), record=dataclasses.replace(case(None).record)), enlarged)


@pytest.mark.parametrize(("top", "kept"), [(0.0, False), (0.7, True)])
def test_what_is_covered_is_seen(top, kept):
    def cover(one):
        pictures = [picture.copy() for picture in one.pictures]
        ImageDraw.Draw(pictures[0]).rectangle((38, top * 96, 60, top * 96 + 48), fill=(200, 200, 200))
        return dataclasses.replace(one, pictures=tuple(pictures))

    assert keeps_regions(case(MIDDLE), cover) == kept
