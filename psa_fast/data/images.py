"""Images from the real world: every file becomes an 8-bit RGB image or an `ImageError` that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

# Formats that Pillow decodes itself. EPS and PDF are left out: they start Ghostscript on the file's content.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO")
MAX_PIXELS = 89_478_485  # Pillow's own warning mark: 256 MiB as RGB
MAX_ASPECT = 200  # processors scale the short side to a few hundred pixels: a 1 x 10000 strip would become gigabytes


class ImageError(ValueError):
    """An image that cannot be used; the message names the file and the reason."""


def resolve(image_folder: str | Path, relative: str) -> Path:
    """Real path of `relative` inside `image_folder`.

    Raises ImageError for an absolute path and for one that leaves the folder, be it by `..` or by a symbolic link.
    """
    if not relative or "\0" in relative:
        raise ImageError(f"image path {relative!r} is empty or holds a NUL character")
    if Path(relative).is_absolute():
        raise ImageError(f"image path {relative!r} is absolute; paths are relative to the image folder")
    try:
        folder = Path(image_folder).resolve()
        path = (folder / relative).resolve()
    except (OSError, RuntimeError) as error:  # symlink loops; RuntimeError before Python 3.13
        raise ImageError(f"image path {relative!r} cannot be resolved: {error}") from error
    if not path.is_relative_to(folder):
        raise ImageError(f"image path {relative!r} leaves the image folder {str(image_folder)!r}")
    return path


def load_image(path: str | Path) -> Image.Image:
    """Decode `path` to an upright 8-bit RGB image.

    EXIF rotation is applied, transparency is composited on white, 16-bit grey is scaled to 8 bits, of an animation the
    first frame is taken. Raises ImageError for everything that cannot be used (absent, not an image, truncated,
    more than MAX_PIXELS pixels, longer than MAX_ASPECT : 1).
    """
    from PIL import ImageOps

    name = repr(str(path))
    image = _open(path, name)
    try:
        with image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright, name)
    except ImageError:
        raise
    except Exception as error:  # decoders meet hostile bytes and raise nearly anything: struct, zlib, Index, Value, ...
        raise ImageError(f"{name} is damaged: {error}") from error


def check_image(path: str | Path, decode: bool = True) -> None:
    """Raise what `load_image` would raise; `decode=False` reads the header only, which shows no truncation."""
    if decode:
        load_image(path)
    else:
        _open(path, repr(str(path))).close()


def _open(path: str | Path, name: str) -> Image.Image:
    """Open lazily and check what the header tells."""
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    try:
        if not path.exists():
            raise ImageError(f"{name} does not exist")
        if not path.is_file():  # a directory, or a pipe on which open would wait for ever
            raise ImageError(f"{name} is not a file")
        Image.init()
        image = Image.open(path, formats=[known for known in FORMATS if known in Image.OPEN])
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image (known formats: {', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is a decompression bomb or far too large: {error}") from error
    except Exception as error:  # see load_image
        raise ImageError(f"{name} cannot be opened: {error}") from error
    width, height = image.size
    problem = None
    if width * height > MAX_PIXELS:
        problem = f"has {width} x {height} pixels, more than {MAX_PIXELS} (decompression bomb?)"
    elif min(width, height) == 0:
        problem = f"is empty ({width} x {height} pixels)"
    elif max(width, height) > MAX_ASPECT * min(width, height):
        problem = f"has {width} x {height} pixels, longer than {MAX_ASPECT}:1"
    if problem:
        image.close()
        raise ImageError(f"{name} {problem}")
    return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bit in I;16*, or in a 32-bit I
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name} has 32-bit pixels; convert it to 8 or 16 bits")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name} has floating-point pixels; convert it to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
