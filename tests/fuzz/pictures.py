"""Damaged and hostile picture files, made from small valid ones, and the one judgement that all of them get."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from limits import TooLongError, limit, no_sentence
from PIL import Image, features

MAX_PIXELS, MAX_ASPECT = 89_478_485, 200


def encoded() -> dict[str, bytes]:
    """Small valid pictures in the formats that people have, by a name that ends in the format's own."""
    base = Image.effect_mandelbrot((36, 24), (-2, -1.5, 1, 1.5), 20)
    rgb = Image.merge("RGB", (base, base.transpose(Image.Transpose.FLIP_LEFT_RIGHT), base.rotate(180)))
    rgba = rgb.convert("RGBA")
    rgba.putalpha(base)
    palette = rgb.quantize(16)
    frames = [rgb.rotate(90 * turn).quantize(16) for turn in range(1, 3)]
    grey16 = Image.frombytes("I;16", (36, 24), bytes(range(256)) * 6 + bytes(192))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9286] = 6, "camera", b"ASCII\0\0\0words"
    found: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, form: str, **options) -> None:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        found[name] = buffer.getvalue()

    add("rgb.png", rgb, "PNG", exif=exif)
    add("rgba.png", rgba, "PNG")
    add("palette.png", palette, "PNG", transparency=3)
    add("bits.png", base.convert("1"), "PNG")
    add("grey16.png", grey16, "PNG")
    add("moving.png", rgb, "PNG", save_all=True, append_images=[rgb.rotate(180)])
    add("turned.jpg", rgb, "JPEG", exif=exif, quality=80)
    add("progressive.jpg", rgb, "JPEG", progressive=True, icc_profile=b"no profile")
    add("grey.jpg", base, "JPEG")
    add("cmyk.jpg", rgb.convert("CMYK"), "JPEG")
    add("moving.gif", palette, "GIF", save_all=True, append_images=frames, loop=0, transparency=1)
    add("still.gif", palette, "GIF")
    add("rgb.tiff", rgb, "TIFF")
    add("deflate.tiff", rgba, "TIFF", compression="tiff_adobe_deflate")
    add("lzw.tiff", palette, "TIFF", compression="tiff_lzw")
    add("pages.tiff", rgb, "TIFF", save_all=True, append_images=[rgb])
    add("grey16.tiff", grey16, "TIFF")
    add("rgb.bmp", rgb, "BMP")
    add("palette.bmp", palette, "BMP")
    add("rgb.ppm", rgb, "PPM")
    add("grey.pgm", base, "PPM")
    add("icon.ico", rgba, "ICO", sizes=[(16, 16), (32, 32)])
    if features.check("webp"):
        add("lossy.webp", rgb, "WEBP", exif=exif)
        add("lossless.webp", rgba, "WEBP", lossless=True)
        add("moving.webp", rgb, "WEBP", save_all=True, append_images=[rgb.rotate(180)])
    return found


def mutate(seed: int, count: int) -> Iterator[tuple[str, str, bytes]]:
    """Yield what was done, a file's name and its content; formats and kinds of damage come in turn."""
    draw, valid = random.Random(seed), encoded()
    names = sorted(valid)
    for number in range(count):
        name = names[number % len(names)]
        kind = KINDS[(number // len(names)) % len(KINDS)]
        what, data = kind(bytearray(valid[name]), draw, valid)
        yield f"{number} {name} {kind.__name__}: {what}", name, bytes(data)


def _place(data: bytearray, draw: random.Random) -> int:
    """Anywhere, half of the time among the first bytes, where sizes and offsets are."""
    return draw.randrange(min(len(data), 64) if draw.random() < 0.5 else len(data))


def untouched(data, draw, valid):
    return "", data


def bits(data, draw, valid):
    """A few bits flipped."""
    places = [_place(data, draw) for _ in range(draw.choice([1, 1, 2, 8, 40]))]
    for at in places:
        data[at] ^= 1 << draw.randrange(8)
    return str(places[:4]), data


def number(data, draw, valid):
    """A number of two or four bytes set to an extreme."""
    at, form = _place(data, draw), draw.choice(["<H", ">H", "<I", ">I"])
    size = struct.calcsize(form)
    most = (1 << (8 * size)) - 1
    value = draw.choice([0, 1, most, most >> 1, (most >> 1) + 1, most - 3, 255, 256, 9459, 9460, 20_000, 65_535])
    data[at : at + size] = struct.pack(form, value & most)
    return f"{form} {value} at {at}", data


def cut(data, draw, valid):
    """The end is missing."""
    size = draw.choice([0, 1, 4, 8, 12, len(data) // 2, len(data) - 1, len(data) - 4, draw.randrange(len(data))])
    return f"to {size} of {len(data)}", data[:size]


def gone_or_more(data, draw, valid):
    """Bytes missing, doubled or foreign in the middle."""
    at, size = _place(data, draw), draw.choice([1, 2, 7, 64])
    how = draw.choice(["delete", "double", "random", "zeros", "end"])
    if how == "delete":
        del data[at : at + size]
    elif how == "double":
        data[at:at] = data[at : at + size]
    elif how == "random":
        data[at : at + size] = draw.randbytes(size)
    elif how == "zeros":
        data[at : at + size] = bytes(size)
    else:
        data += draw.choice([b"\0" * 1000, b"<script>", bytes(data)])
    return f"{how} {size} at {at}", data


def other_head(data, draw, valid):
    """The head of one format before the body of another."""
    other = draw.choice(sorted(valid))
    size = draw.choice([2, 4, 8, 16, 60])
    return f"first {size} of {other}", bytearray(valid[other][:size]) + data[size:]


def head_of_png(data, draw, valid):
    """For PNG: a header with a right checksum and wrong content; for others as `number`."""
    if not data.startswith(b"\x89PNG"):
        return number(data, draw, valid)
    width, height = draw.choice([(0, 5), (5, 0), (1, 10_000), (10_000, 1), (9459, 9459), (9460, 9460), (2**31 - 1, 1),
                                 (2**31, 2), (37, 24), (36, 25), (200, 1), (201, 1)])  # fmt: skip
    rest = draw.choice([bytes(data[24:29]), draw.randbytes(5), bytes([8, 2, 0, 0, 1]), bytes([16, 6, 0, 0, 0])])
    header = b"IHDR" + struct.pack(">II", width, height) + rest
    data[12:33] = header + struct.pack(">I", zlib.crc32(header))
    return f"{width} x {height} {rest.hex()}", data


KINDS = [untouched, bits, number, cut, gone_or_more, other_head, head_of_png, bits, number]


def judge(path: Path) -> tuple[str, str]:
    """How `load_image` takes a file, and a word on it.

    "ok": an RGB picture within the limits; "named": an ImageError of one sentence with the file; the others are faults:
    "foreign exception", "hang", "no sentence", "silent" (a picture out of the limits, or another from the bytes).
    """
    from psa_fast.data import images

    def load(function, source):
        try:
            with limit():
                picture = function(source)
        except TooLongError:
            return "hang", "", None
        except images.ImageError as error:
            return "named", str(error), None
        except BaseException as error:
            return "foreign exception", f"{type(error).__name__}: {error!s:.200}", None
        return "ok", "", picture

    verdict, message, picture = load(images.load_image, path)
    if verdict == "named" and (wrong := no_sentence(message, path)):
        return "no sentence", wrong
    if picture is not None and (wrong := _wrong(picture)):
        return "silent", wrong
    if verdict in ("ok", "named") and hasattr(images, "to_rgb"):
        second, message_of_bytes, other = load(images.to_rgb, path.read_bytes())
        if second != verdict:
            return (
                "silent" if second in ("ok", "named") else second
            ), f"as bytes {second} {message_of_bytes}: {message}"
        if picture is not None and (other.size != picture.size or other.tobytes() != picture.tobytes()):
            return "silent", "another picture from the bytes"
        if verdict == "named" and ("\n" in message_of_bytes or len(message_of_bytes) > 400):
            return "no sentence", message_of_bytes[:200]
    return verdict, message or f"{picture.size}"


def _wrong(picture) -> str | None:
    if not isinstance(picture, Image.Image) or picture.mode != "RGB":
        return f"{type(picture).__name__} {getattr(picture, 'mode', '')}"
    width, height = picture.size
    if min(width, height) == 0 or width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width} x {height}"
    return None if len(picture.tobytes()) == 3 * width * height else "another number of bytes than pixels"
