"""Images from the real world: each becomes an upright 8-bit RGB image, or an `ImageError` that says what is wrong.

There is one door, `to_rgb`, for a file, the bytes of one and a PIL image; what it returns depends on the picture only,
so that a model is asked about the same pixels wherever they come from.
"""

from __future__ import annotations

import io
import os
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from psa_fast.data.stand_ins import placeholder
from psa_fast.files import shorten

if TYPE_CHECKING:
    from PIL import Image

# Formats that Pillow decodes itself. EPS and PDF are left out: they start Ghostscript on the file's content.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO")
MAX_PIXELS = 89_478_485  # Pillow's own warning mark: 256 MiB as RGB
MAX_ASPECT = 200  # processors scale the short side to a few hundred pixels: a 1 x 10000 strip would become gigabytes
_LISTED = 100_000  # names of a folder that are looked through for one that is spelt nearly so


class ImageError(ValueError):
    """An image that cannot be used; the message names the file and the reason."""


def resolve(image_folder: str | Path, relative: str) -> Path:
    """Real path of `relative` inside `image_folder`.

    Raises ImageError for an absolute path and for one that leaves the folder, be it by `..` or by a symbolic link.
    """
    shown = f"image path {shorten(relative)}"
    if not relative or "\0" in relative:
        raise ImageError(f"{shown} is empty or holds a NUL character")
    if relative[:5].lower() == "data:":
        raise ImageError(f"{shown} is a data: URI; save the image as a file in the image folder")
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", relative):
        raise ImageError(
            f"{shown} is an address ({scheme[1][:20]}:); images are files in the image folder, none is fetched"
        )
    if Path(relative).is_absolute():
        raise ImageError(f"{shown} is absolute; paths are relative to the image folder")
    try:
        relative.encode()
        folder = Path(image_folder).resolve()
        path = (folder / relative).resolve()
    except UnicodeEncodeError as error:
        raise ImageError(f"{shown} holds {relative[error.start]!a}, which is no text") from None
    except (OSError, RuntimeError) as error:  # symlink loops; RuntimeError before Python 3.13
        raise ImageError(f"{shown} cannot be resolved: {_reason(error)}") from error
    if not path.is_relative_to(folder):
        by_link = ".." not in Path(os.path.normpath(relative)).parts
        how = ": a symbolic link leads out of it" if by_link else ""
        raise ImageError(f"{shown} leaves the image folder {shorten(str(image_folder))}{how}")
    return path


def load_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Return `to_rgb(source)`, where a string is a path.

    For callers that have made the path themselves (see `resolve`); what a stranger hands over goes to `to_rgb`.
    """
    return to_rgb(Path(source) if isinstance(source, str) else source)


def to_rgb(source: Path | bytes | Image.Image) -> Image.Image:
    """Return a picture as an upright 8-bit RGB image, the same pixels whichever way it comes.

    An EXIF orientation that is still attached is applied, transparency is composited on white, 16-bit grey is scaled
    to 8 bits. A file or its bytes give the first frame of an animation, a PIL image the frame that it shows.

    Args:
        source: a file's path, a file's bytes, or a PIL image, read or not. A PIL image is read, else left as it
            is, and closed if it cannot be read. A string is refused: text is never opened, let alone fetched.

    Raises:
        ImageError: for everything that cannot be used: absent, not an image, truncated, closed, empty, more than
            MAX_PIXELS pixels, longer than MAX_ASPECT : 1.
    """
    from PIL import Image, ImageOps

    if isinstance(source, str):
        raise ImageError(f"an image is {shorten(source)}, but text is never opened or fetched; give a pathlib.Path")
    if not isinstance(source, Path | bytes | Image.Image):
        raise ImageError(f"an image is a {type(source).__name__}; expected a PIL image, bytes or a pathlib.Path")
    name = _name(source)
    image = source if isinstance(source, Image.Image) else _open(source, name)
    unread = bool(getattr(image, "tile", None)) and getattr(image, "fp", None) is None
    try:
        _check_header(image, name)
        image.load()
        _check_header(image, name)  # an icon learns its size from the picture inside it
        upright = _as_rgb(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except Exception as error:  # decoders meet hostile bytes and raise nearly anything: struct, zlib, Index, Value, ...
        if hasattr(image, "tile"):
            # Pillow may take a file that failed for one that was read: black, and no error the next time
            image.close()
        fault = "is closed and was never read" if unread else f"is damaged: {_reason(error)}"
        raise ImageError(f"{name} {fault}") from error
    finally:
        if image is not source:
            image.close()
    upright.info = {}  # what is applied must not be applied again
    return upright


def check_image(path: str | Path, decode: bool = True) -> None:
    """Raise what `load_image` would raise; `decode=False` reads the header only, which shows no truncation."""
    if decode:
        load_image(path)
        return
    name = _name(Path(path))
    with _open(Path(path), name) as image:
        _check_header(image, name)


def image_format(data: bytes, name: str) -> str:
    """Return Pillow's name of the format of an image file's bytes, read from its header.

    Args:
        data: the whole file.
        name: the file in messages.

    Raises:
        ImageError: for what is no image of FORMATS, or too large.
    """
    with _open(data, name) as image:
        _check_header(image, name)
        return str(image.format)


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Return the (width, height) that the header of an image file's bytes announces, as for `image_format`."""
    with _open(data, name) as image:
        _check_header(image, name)
        return image.size


def upright_size(path: Path) -> tuple[int, int]:
    """Return the (width, height) that `to_rgb` gives a file's picture, from its header.

    Raises:
        ImageError: what the header tells, as `to_rgb`.
    """
    name = _name(path)
    with _open(path, name) as image:
        _check_header(image, name)
        if image.format == "ICO":  # an icon learns its size from the picture inside it
            return to_rgb(path).size
        try:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        except Exception as error:  # see to_rgb
            raise ImageError(f"{name} is damaged: {_reason(error)}") from error
        return (image.size[1], image.size[0]) if turned else image.size


def _name(source: Path | bytes | Image.Image) -> str:
    """What messages call a picture; of a long path the end, where the file's name is."""
    path = source if isinstance(source, Path) else getattr(source, "filename", None)
    text = str(path) if isinstance(path, str | Path) and str(path) else ""
    if not text:
        return "the image"
    return repr(text) if len(text) <= 240 else f"'...{text[-120:]}'"


def _reason(error: BaseException) -> str:
    """The error's own words, without the path that an OSError repeats."""
    return str(getattr(error, "strerror", None) or error)[:120]


def _open(source: Path | bytes, name: str) -> Image.Image:
    """Open lazily."""
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(source, Path):
            if not source.exists():
                raise ImageError(f"{name} does not exist{_spelt_otherwise(source)}")
            if not source.is_file():  # a directory, or a pipe on which open would wait for ever
                raise ImageError(f"{name} is not a file")
        Image.init()
        formats = [known for known in FORMATS if known in Image.OPEN]
        return Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=formats)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        if stands := placeholder(_head(source)):
            raise ImageError(f"{name} is {stands}") from None
        raise ImageError(f"{name} is not an image (known formats: {', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is a decompression bomb or far too large: {_reason(error)}") from error
    except Exception as error:  # see to_rgb
        raise ImageError(f"{name} cannot be opened: {_reason(error)}") from error


def _head(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:64]
    with source.open("rb") as file:
        return file.read(64)


def _check_header(image: Image.Image, name: str) -> None:
    """Refuse what format and size tell before anything is decoded. Images made in memory have no format."""
    width, height = image.size
    if image.format is not None and image.format not in FORMATS:
        raise ImageError(f"{name} is a {image.format} file (known formats: {', '.join(FORMATS)})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} has {width} x {height} pixels, more than {MAX_PIXELS} (decompression bomb?)")
    if min(width, height) == 0:
        raise ImageError(f"{name} is empty ({width} x {height} pixels)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{name} has {width} x {height} pixels, longer than {MAX_ASPECT}:1")


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bit in I;16*, or in a 32-bit I
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name} has 32-bit pixels; convert it to 8 or 16 bits")
        grey = (values / 257).round().astype(np.uint8)
        key = image.info.get("transparency")
        if isinstance(key, int):
            grey[values == key] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{name} has floating-point pixels; convert it to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _spelt_otherwise(path: Path) -> str:
    """What a message adds about an absent file if one of nearly its name is there, else nothing."""
    if "\\" in path.name:
        return "; between folders a path has /, not \\"
    found = Path(path.anchor)
    parts = path.parts[1:] if path.anchor else path.parts
    first = len(parts)
    for index, part in enumerate(parts):
        name: str | None = part
        if not (found / part).exists():
            name, first = _names(str(found), _changed(found)).get(_folded(part)), min(first, index)
        if name is None:
            return ""
        found /= name
    near = Path(*found.parts[-(len(parts) - first) :]) if first < len(parts) else found
    nfc = [unicodedata.normalize("NFC", str(each)) for each in (path, found)]
    differs = "the Unicode form of its letters" if nfc[0] == nfc[1] else "upper and lower case"
    return f", but {shorten(str(near))} does: they differ in {differs}"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _changed(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=8)
def _names(folder: str, changed: int) -> dict[str, str]:
    """Folded name -> name of what is in a folder, read once as long as the folder stays as it is."""
    found: dict[str, str] = {}
    try:
        with os.scandir(folder) as entries:
            for _, entry in zip(range(_LISTED), entries, strict=False):
                found.setdefault(_folded(entry.name), entry.name)
    except OSError:  # not a folder, or not ours to read: then there is no hint
        return {}
    return found
