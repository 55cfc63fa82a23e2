"""A picture is the same pixels whether it comes as a path, as bytes or as a PIL image in any state."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_images import WORKING, bomb

from psa_fast.data import images
from psa_fast.data.images import ImageError, load_image, resolve, to_rgb

STORED = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
SHOWN = {  # the EXIF standard: where the stored image's row 0 and column 0 are seen
    1: STORED,  # top, left
    2: STORED[:, ::-1],  # top, right
    3: STORED[::-1, ::-1],  # bottom, right
    4: STORED[::-1],  # bottom, left
    5: STORED.transpose(1, 0, 2),  # left, top
    6: STORED.transpose(1, 0, 2)[:, ::-1],  # right, top
    7: STORED[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: STORED.transpose(1, 0, 2)[::-1],  # left, bottom
}


def doors(path):
    """The picture of a file in every way that it can be handed over."""
    read = Image.open(path)
    read.load()
    with Image.open(path) as left:  # its file is closed, its pixels are there
        left.load()
    return {
        "path": path,
        "bytes": path.read_bytes(),
        "unread": Image.open(path),
        "unread, of bytes": Image.open(io.BytesIO(path.read_bytes())),
        "read": read,
        "copied": Image.open(path).copy(),
        "read, file closed": left,
    }


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_orientation_is_applied_once_at_every_door(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if name == "a.webp" else {}
    Image.fromarray(STORED).save(tmp_path / name, exif=exif, **options)
    for door, source in doors(tmp_path / name).items():
        upright = to_rgb(source)
        assert np.array_equal(pixels(upright), SHOWN[orientation]), door
        assert np.array_equal(pixels(to_rgb(upright)), SHOWN[orientation]), f"{door}, twice"
    assert np.array_equal(pixels(load_image(str(tmp_path / name))), SHOWN[orientation])


@pytest.mark.parametrize("orientation", SHOWN)
def test_orientation_of_a_photograph(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(STORED).resize((80, 50)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "upright.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    stored = np.asarray(Image.open(tmp_path / "a.jpg"))
    axes = {1: stored, 3: stored[::-1, ::-1], 6: stored.transpose(1, 0, 2)[:, ::-1]}
    got = {door: pixels(to_rgb(source)) for door, source in doors(tmp_path / "a.jpg").items()}
    got["converted"] = pixels(to_rgb(Image.open(tmp_path / "a.jpg").convert("RGB")))
    for door, found in got.items():
        assert np.array_equal(found, got["path"]), door
        if orientation in axes:
            assert np.array_equal(found, axes[orientation]), door


@pytest.mark.parametrize("name", WORKING)
def test_every_kind_of_file_is_the_same_at_every_door(tmp_path, name):
    image, options, size, colour = WORKING[name]
    image.save(tmp_path / name, **options)
    got = {door: pixels(to_rgb(source)) for door, source in doors(tmp_path / name).items()}
    for door, found in got.items():
        assert np.array_equal(found, got["path"]), door
    assert got["unread"].shape == (size[1], size[0], 3)
    np.testing.assert_allclose(got["unread"][0, 0], colour, atol=3)


def test_values_of_each_mode():
    """By hand: white behind what is transparent, 65535 is white in 16 bits, colours by their definition."""
    half = np.array([[[200, 100, 0, 128]]], np.uint8)
    over = [round(c * 128 / 255 + 255 * 127 / 255) for c in (200, 100, 0)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    clear = palette.copy()
    clear.info["transparency"] = 1
    keyed = Image.fromarray(np.array([[257, 514]], np.uint16))
    keyed.info["transparency"] = 514
    expected = [
        (Image.fromarray(np.array([[0, 257, 65535]], np.uint16)), [[0] * 3, [1] * 3, [255] * 3]),
        (Image.fromarray(np.array([[514, 65535]], np.int32)), [[2] * 3, [255] * 3]),
        (keyed, [[1] * 3, [255] * 3]),
        (Image.fromarray(half), [over]),
        (Image.fromarray(np.array([[[100, 0]]], np.uint8)), [[255] * 3]),
        (palette, [[10, 20, 30], [40, 50, 60]]),
        (clear, [[10, 20, 30], [255] * 3]),
        (Image.fromarray(np.array([[7, 9]], np.uint8)), [[7] * 3, [9] * 3]),
        (Image.fromarray(np.array([[True, False]])), [[255] * 3, [0] * 3]),
        (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), [[0, 255, 255]]),
        (Image.fromarray(STORED[:1]), STORED[0]),
    ]
    for image, row in expected:
        np.testing.assert_allclose(pixels(to_rgb(image))[0].astype(int), row, atol=1, err_msg=image.mode)


def test_of_an_animation_the_first_frame_or_the_one_that_is_shown(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    for name in ("a.gif", "a.tif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        for door, source in doors(tmp_path / name).items():
            assert pixels(to_rgb(source))[0, 0].tolist() == [255, 0, 0], (name, door)
        shown = Image.open(tmp_path / name)
        for index, colour in ((2, [0, 255, 0]), (1, [0, 0, 255]), (0, [255, 0, 0])):
            shown.seek(index)
            assert pixels(to_rgb(shown))[0, 0].tolist() == colour, (name, index)


def test_an_icon_is_its_largest_picture(tmp_path):
    Image.fromarray(np.kron(STORED[:4, :4], np.ones((16, 16, 1), np.uint8))).save(
        tmp_path / "a.ico", sizes=[(16, 16), (64, 64)]
    )
    for door, source in doors(tmp_path / "a.ico").items():
        found = pixels(to_rgb(source))
        assert found.shape == (64, 64, 3), door
        assert np.array_equal(found[::16, ::16], STORED[:4, :4]), door


def test_a_subclass_is_an_image_and_the_source_stays_as_it_is():
    class Framed(Image.Image):
        pass

    image = Framed()._new(Image.fromarray(STORED).im)
    assert np.array_equal(pixels(to_rgb(image)), SHOWN[1])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(STORED)
    turned.info["exif"] = exif.tobytes()
    assert np.array_equal(pixels(to_rgb(turned)), SHOWN[6])
    assert np.array_equal(np.asarray(turned), STORED)
    to_rgb(turned).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(turned), STORED)


def test_text_is_never_opened(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def refuse(*args, **kwargs):
        raise AssertionError("opened")

    monkeypatch.setattr(Image, "open", refuse)
    for text in (str(tmp_path / "a.png"), "http://127.0.0.1/a.png", "file:///etc/passwd", "", "x" * 10**6):
        with pytest.raises(ImageError, match="text is never opened") as error:
            to_rgb(text)
        assert len(str(error.value)) < 250


@pytest.mark.parametrize("source", [None, 5, ["a.png"], np.zeros((4, 4, 3), np.uint8), io.BytesIO(b""), object])
def test_what_is_no_image_is_a_sentence(source):
    for door in (to_rgb, load_image):
        with pytest.raises(ImageError, match=r"an image is a .*; expected a PIL image, bytes or a pathlib.Path"):
            door(source)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_limits_hold_at_every_door(tmp_path, monkeypatch):
    (tmp_path / "strip.png").write_bytes(bomb(1, 201))
    for source in (tmp_path / "strip.png", bomb(1, 201), Image.open(tmp_path / "strip.png"), Image.new("L", (201, 1))):
        with pytest.raises(ImageError, match="longer than 200:1"):
            to_rgb(source)
    for data in (bomb(30000, 30000), bomb(10000, 10000)):
        with pytest.raises(ImageError, match="decompression bomb"):
            to_rgb(data)
    with pytest.raises(ImageError, match="decompression bomb"):
        to_rgb(Image.open(io.BytesIO(bomb(10000, 10000))))
    for size in ((0, 0), (0, 5), (5, 0)):
        with pytest.raises(ImageError, match="is empty"):
            to_rgb(Image.new("RGB", size))
    monkeypatch.setattr(images, "MAX_PIXELS", 24)
    assert to_rgb(Image.new("RGB", (4, 6))).size == (4, 6)
    with pytest.raises(ImageError, match="5 x 5 pixels, more than 24"):
        to_rgb(Image.new("RGB", (5, 5)))


def test_a_format_that_paths_refuse_is_refused_unread(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "page.eps")
    opened = Image.open(tmp_path / "page.eps")  # reading it would start Ghostscript
    with pytest.raises(ImageError, match="is a EPS file"):
        to_rgb(opened)
    assert opened.tile, "it was read"


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.bmp", "a.tif", "a.ppm", "a.jp2"])
def test_a_picture_that_cannot_be_read_never_becomes_one(tmp_path, name):
    noise = np.random.default_rng(1).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    closed = Image.open(tmp_path / name)
    closed.close()
    with pytest.raises(ImageError, match=rf"{name}' is closed and was never read"):
        to_rgb(closed)
    cut = tmp_path / f"cut-{name}"
    cut.write_bytes(whole[: len(whole) // 2])
    for source in (cut, cut.read_bytes(), Image.open(cut), Image.open(io.BytesIO(cut.read_bytes()))):
        for _ in range(2):  # Pillow may have a second look at what it failed to read
            with pytest.raises(ImageError, match=r"is damaged|never read"):
                to_rgb(source)
    with pytest.raises(ImageError, match=f"cut-{name}"):
        to_rgb(Image.open(cut))


PATHS = {
    "data:image/png;base64," + "x" * 10**6: "is a data: URI",
    "DATA:,x": "is a data: URI",
    "https://example.org/a.png": r"is an address \(https:\)",
    "s3://bucket/a.png": r"is an address \(s3:\)",
    "link.png": "a symbolic link leads out of it",
    "up/secret.png": "a symbolic link leads out of it",
    "../secret.png": r"leaves the image folder '[^']*'$",
    "sub\\b.jpg": r"between folders a path has /, not \\",
    "SUB/b.JPG": r"but 'sub/b.jpg' does: they differ in upper and lower case",
    "sub/B.jpg": r"but 'b.jpg' does: they differ in upper and lower case",
    "cafe\u0301.png": "they differ in the Unicode form",
    "\ud800.png": "holds '.ud800', which is no text",
    "x" * 300: "File name too long",
    "a/" * 5000: "File name too long|does not exist",
    "none.png": "none.png' does not exist$",
}


@pytest.mark.parametrize("name", PATHS, ids=lambda name: ascii(name[:12]))
def test_a_path_that_leads_nowhere_says_why(tmp_path, name):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for file in (folder / "sub" / "b.jpg", folder / "caf\u00e9.png", tmp_path / "secret.png"):
        file.write_bytes(b"")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    with pytest.raises(ImageError) as error:
        load_image(resolve(folder, name))
    message = str(error.value)
    assert re.search(PATHS[name], message)
    assert len(message) - len(str(folder)) < 300
    message.encode()  # it can be printed


def test_a_path_object_is_opened_as_such(tmp_path):
    Image.fromarray(STORED).save(tmp_path / "a.png")
    assert np.array_equal(pixels(to_rgb(Path(tmp_path / "a.png"))), STORED)
    with pytest.raises(ImageError, match="is not a file"):
        to_rgb(Path("/dev/zero"))
