import numpy as np
import pytest
import torch
from PIL import Image

from psa_fast.data import transforms as t
from psa_fast.data.augment import augment
from psa_fast.data.dataset import PsaDataset
from psa_fast.data.records import Record, Turn


def rng(seed=0):
    return np.random.default_rng(seed)


def noise(width=40, height=30):
    return Image.fromarray(rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_nothing_asked_changes_nothing():
    image = noise()
    assert t.move(image) is image
    for change, value in ((t.shift, 0.0), (t.crop, 1.0), (t.turn, 0.0), (t.scale, 1.0), (t.pixelate, 1.0)):
        assert np.array_equal(np.asarray(change(image, value, rng())), np.asarray(image)), change.__name__
    for change, value in ((t.gaussian_noise, 0.0), (t.impulse_noise, 0.0), (t.brightness, 0.0), (t.contrast, 1.0)):
        assert np.array_equal(np.asarray(change(image, value, rng())), np.asarray(image)), change.__name__


def test_a_shift_moves_whole_pixels_and_repeats_the_edge():
    """The oracle is numpy's own padding."""
    pixels = np.asarray(noise())
    moved = np.asarray(t.move(Image.fromarray(pixels), right=4 / 40, down=-3 / 30))
    expected = np.pad(pixels, ((0, 3), (4, 0), (0, 0)), mode="edge")[3:, :40]
    assert np.array_equal(moved, expected)


def test_turns_and_scales_put_a_point_where_geometry_says():
    pixels = np.zeros((101, 101, 3), dtype=np.uint8)
    pixels[48:53, 78:83] = 255  # 30 to the right of the centre

    def centre(image):
        bright = np.asarray(image, dtype=float)[..., 0]
        rows, columns = np.mgrid[0:101, 0:101]
        return (bright * columns).sum() / bright.sum() - 50, (bright * rows).sum() / bright.sum() - 50

    image = Image.fromarray(pixels)
    assert centre(t.move(image, degrees=90)) == pytest.approx((0, -30), abs=0.6)  # anticlockwise: upwards
    assert centre(t.move(image, scale=0.5)) == pytest.approx((15, 0), abs=0.6)
    assert centre(t.move(image, scale=1.5)) == pytest.approx((45, 0), abs=0.6)
    assert centre(t.move(image, right=-0.1, degrees=90)) == pytest.approx((-10.1, -30), abs=0.6)


@pytest.mark.parametrize("name", t.SEVERITIES)
def test_a_higher_severity_changes_more_and_keeps_size_and_type(name):
    """On a smooth picture: an edge, a ramp and a disc, as pictures have."""
    ys, xs = np.mgrid[0:96, 0:96]
    pixels = np.stack([xs * 2, ys * 2, ((xs - 60) ** 2 + (ys - 30) ** 2 < 300) * 200], -1).astype(np.uint8)
    change, values = t.SEVERITIES[name]
    moved = []
    for value in values:
        runs = [change(Image.fromarray(pixels), value, rng(seed)) for seed in range(8)]
        assert all(run.size == (96, 96) and run.mode == "RGB" for run in runs)
        moved.append(np.mean([np.abs(np.asarray(run, dtype=float) - pixels).mean() for run in runs]))
    assert moved[0] > 0
    if name != "saturation":  # whose severity 5 is the other way
        assert moved == sorted(moved)


def test_an_inset_and_a_collage_show_the_whole_picture_smaller():
    image = Image.new("RGB", (60, 40), (250, 0, 0))
    found = np.asarray(t.inset(image, 0.5, rng()))
    assert int((found == (250, 0, 0)).all(-1).sum()) == 30 * 20
    four = [Image.new("RGB", (60, 40), (v, v, v)) for v in (10, 20, 30, 40)]
    assert np.asarray(t.collage(four))[::20, ::30, 0].tolist() == [[10, 20], [30, 40]]
    assert int((np.asarray(t.sticker(image, 0.25, rng())) != (250, 0, 0)).any(-1).sum()) == 30 * 20


def _dataset(folder, **options):
    noise().save(folder / "a.png")
    record = Record(("a.png",), None, None, (Turn("user", "<image>\nwhat ?"), Turn("assistant", "this")), line=1)
    return PsaDataset([record] * 3, folder, None, **options)


def test_rows_are_augmented_by_seed_epoch_and_index_alone(tmp_path, monkeypatch):
    seen = []

    def encode(record, processor, images, **kwargs):
        seen.append(np.asarray(images[0]).copy())

    monkeypatch.setattr("psa_fast.data.dataset.encode", encode)
    rows = _dataset(tmp_path, augmentation="strong", seed=-3)
    for _ in range(2):
        for index, epoch in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)):
            rows[index, epoch]
    assert all(np.array_equal(a, b) for a, b in zip(seen[:6], seen[6:], strict=True))
    assert len({a.tobytes() for a in seen[:6]}) > 3
    seen.clear()
    _dataset(tmp_path)[0, 0]
    assert np.array_equal(seen[0], np.asarray(noise()))
    with pytest.raises(ValueError, match="expected one of none, light, strong"):
        _dataset(tmp_path, augmentation="heavy")
    with pytest.raises(ValueError, match="unchanged images"):
        _dataset(tmp_path, augmentation="light", features_of=lambda names: torch.zeros(1))


def test_a_light_change_is_smaller_than_a_strong_one_and_some_pictures_stay():
    image = noise(96, 96).resize((96, 96), Image.Resampling.BICUBIC, (0, 0, 12, 12))
    pixels = np.asarray(image, dtype=float)
    changes = {
        strength: [
            np.abs(np.asarray(augment(image, strength, rng(i)), dtype=float) - pixels).mean() for i in range(200)
        ]
        for strength in ("none", "light", "strong")
    }
    assert max(changes["none"]) == 0
    assert np.mean(changes["light"]) < 0.7 * np.mean(changes["strong"])
    for strength, low, high in (("light", 0.2, 0.5), ("strong", 0.1, 0.3)):
        assert low < np.mean(np.array(changes[strength]) == 0) < high
