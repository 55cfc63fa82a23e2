import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from psa_fast.data.images import MAX_PIXELS, ImageError, check_image, load_image, resolve

GREY_16 = np.full((6, 4), 32896, np.uint16)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees

# name -> (image, options of save, expected size, expected colour of the first pixel)
WORKING = {
    "cmyk.jpg": (Image.new("CMYK", (4, 6), (0, 255, 255, 0)), {"quality": 95}, (4, 6), (255, 0, 0)),
    "cmyk.tif": (Image.new("CMYK", (4, 6), (0, 255, 255, 0)), {}, (4, 6), (255, 0, 0)),
    "palette.png": (Image.new("RGB", (4, 6), "red").convert("P"), {}, (4, 6), (255, 0, 0)),
    "palette_alpha.gif": (Image.new("P", (4, 6), 0), {"transparency": 0}, (4, 6), (255, 255, 255)),
    "grey16.png": (Image.fromarray(GREY_16), {}, (4, 6), (128, 128, 128)),
    "grey16.tif": (Image.fromarray(GREY_16), {}, (4, 6), (128, 128, 128)),
    "bilevel.png": (Image.new("1", (4, 6), 1), {}, (4, 6), (255, 255, 255)),
    "grey_alpha.png": (Image.new("LA", (4, 6), (0, 0)), {}, (4, 6), (255, 255, 255)),
    "half_alpha.png": (Image.new("RGBA", (4, 6), (0, 0, 0, 128)), {}, (4, 6), (127, 127, 127)),
    "alpha.webp": (Image.new("RGBA", (4, 6), (0, 0, 0, 0)), {"lossless": True}, (4, 6), (255, 255, 255)),
    "colour_key.png": (Image.new("RGB", (4, 6), (9, 9, 9)), {"transparency": (9, 9, 9)}, (4, 6), (255, 255, 255)),
    "exif.jpg": (Image.new("RGB", (4, 6), "red"), {"exif": ROTATED, "quality": 95}, (6, 4), (255, 0, 0)),
    "one.png": (Image.new("RGB", (1, 1), "red"), {}, (1, 1), (255, 0, 0)),
    "long.png": (Image.new("RGB", (1, 150), "red"), {}, (1, 150), (255, 0, 0)),
    "animated.gif": (
        Image.new("RGB", (4, 6), "red"),
        {"save_all": True, "append_images": [Image.new("RGB", (4, 6), "blue")]},
        (4, 6),
        (255, 0, 0),
    ),
}


@pytest.mark.parametrize("name", WORKING)
def test_real_world_images_become_rgb(tmp_path, name):
    image, options, size, colour = WORKING[name]
    image.save(tmp_path / name, **options)
    loaded = load_image(tmp_path / name)
    assert (loaded.mode, loaded.size) == ("RGB", size)
    np.testing.assert_allclose(loaded.getpixel((0, 0)), colour, atol=3)


def bomb(width, height):
    """A PNG of a few bytes that claims width x height pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_bytes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.jpg")
    return (tmp_path / "noise.jpg").read_bytes()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unusable_images_are_named_errors(tmp_path):
    Image.new("F", (4, 6), 0.5).save(tmp_path / "float.tif")
    Image.fromarray(np.full((6, 4), 70000, np.int32)).save(tmp_path / "deep.tif")
    Image.new("RGB", (1, 201)).save(tmp_path / "strip.png")
    (tmp_path / "folder.png").mkdir()
    files = {
        "huge.png": (bomb(30000, 30000), "decompression bomb"),
        "large.png": (bomb(10000, MAX_PIXELS // 10000 + 1), "decompression bomb"),
        "text.png": (b"hello", "not an image"),
        "empty.png": (b"", "not an image"),
        "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "truncated.jpg": (jpeg_bytes(tmp_path)[:-1500], "damaged"),
        "no_pixels.png": (bomb(8, 8), "damaged"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    expected = {name: message for name, (_, message) in files.items()} | {
        "float.tif": "floating-point",
        "deep.tif": "32-bit",
        "strip.png": "longer than 200:1",
        "folder.png": "not a file",
        "absent.png": "does not exist",
    }
    for name, message in expected.items():
        with pytest.raises(ImageError, match=message) as error:
            load_image(tmp_path / name)
        assert name in str(error.value)


def test_the_header_check_finds_all_but_damage(tmp_path):
    (tmp_path / "truncated.jpg").write_bytes(jpeg_bytes(tmp_path)[:-1500])
    check_image(tmp_path / "truncated.jpg", decode=False)
    with pytest.raises(ImageError, match="does not exist"):
        check_image(tmp_path / "absent.jpg", decode=False)


def test_paths_cannot_leave_the_folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    assert resolve(folder, "sub/../a.png") == folder.resolve() / "a.png"
    for name in ("../secret.png", "sub/../../secret.png", "link.png", "up/secret.png", "/etc/passwd", "", "a\0b"):
        with pytest.raises(ImageError):
            resolve(folder, name)
    with pytest.raises(ImageError):
        load_image(resolve(folder, "loop"))
