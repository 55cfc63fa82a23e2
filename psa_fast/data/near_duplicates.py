"""Near-duplicates of images and of texts: signatures of fixed size, and the pairs whose signatures say that they are.

Images: dHash, whether each pixel of a 9 x 8 and an 8 x 9 grey thumbnail is lighter than the one before it, 128 bits,
compared by the number of bits that differ. Texts: sets of three words in a row, compared by their Jaccard similarity,
the share of threes that both have; MinHash finds the pairs that are looked at.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MARGIN = 3  # grey levels that a neighbour must be lighter: in an even sky, noise alone decides which one is
PLAIN = 8  # grey levels: a thumbnail with fewer between its darkest and lightest pixel has no signs worth comparing
SHINGLE = 3  # words
BANDS, ROWS = 12, 5  # one in a hundred of the pairs at a similarity of 0.8 is missed
_PRIMES = np.random.default_rng(0).integers(1, 2**63, size=(2, BANDS * ROWS, 1), dtype=np.uint64) | np.uint64(1)


def difference_hash(image: Image.Image) -> np.ndarray | None:
    """Return an image's dHash, shape [2], uint64; None for an image too plain to have one."""
    from PIL import Image

    grey = image.convert("L")
    wide, high = (
        np.asarray(grey.resize(size, Image.Resampling.BOX, reducing_gap=2.0)).astype(np.int16)
        for size in ((9, 8), (8, 9))
    )
    if int(wide.max()) - int(wide.min()) < PLAIN:
        return None
    signs = np.stack([(wide[:, 1:] > wide[:, :-1] + MARGIN).ravel(), (high[1:] > high[:-1] + MARGIN).ravel()])
    return np.packbits(signs, axis=1).view(np.uint64)[:, 0]


def shingles(text: str) -> np.ndarray:
    """Return the hashes of a normalised text's threes of words, sorted, uint32; of a shorter text that of the whole."""
    words = text.split(" ")
    threes = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
    return np.array(sorted(zlib.crc32(three.encode()) for three in threes), dtype=np.uint32)


def min_hash(hashes: np.ndarray) -> np.ndarray:
    """Return the MinHash signature of a set of shingles, shape [BANDS * ROWS], uint32."""
    factors, terms = _PRIMES
    return ((factors * hashes.astype(np.uint64) + terms) >> np.uint64(32)).min(axis=1).astype(np.uint32)


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Jaccard similarity of two sets, given as sorted arrays without repeats."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / (len(first) + len(second) - both)


def near_images(hashes: np.ndarray, parts: Sequence[int], distance: int) -> Iterator[tuple[int, int, int]]:
    """Yield pairs (i, j, bits that differ) of images in different parts with at most `distance` bits between them.

    Args:
        hashes: dHashes, shape [images, 2], uint64.
        parts: the part of each image.
        distance: bits. Two hashes so near agree in one of `distance + 1` bands of bits: none is missed.
    """
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    bands = [np.packbits(band, axis=1) for band in np.array_split(bits, distance + 1, axis=1)]
    for i, others in _candidates(bands, parts):
        apart = np.bitwise_count(hashes[others] ^ hashes[i]).sum(axis=1)
        for j, bits_apart in zip(others[apart <= distance], apart[apart <= distance], strict=True):
            yield i, int(j), int(bits_apart)


def near_texts(
    sets: Sequence[np.ndarray], parts: Sequence[int], similarity: float, known: Callable[[int, int], bool]
) -> Iterator[tuple[int, int, float]]:
    """Yield pairs (i, j, similarity) of texts in different parts whose similarity is at least `similarity`.

    Args:
        sets: what `shingles` gives of each text.
        parts: the part of each text.
        similarity: of 0.8 to 1; below that more than one pair in a hundred is missed.
        known: called with i and j; a pair for which it is true is not looked at.
    """
    if not sets:
        return
    signatures = np.stack([min_hash(each) for each in sets])
    bands = [np.ascontiguousarray(band).view(np.uint8) for band in np.split(signatures, BANDS, axis=1)]
    for i, others in _candidates(bands, parts):
        for j in others.tolist():
            if not known(i, j) and (found := jaccard(sets[i], sets[j])) >= similarity:
                yield i, j, found


def _candidates(bands: Sequence[np.ndarray], parts: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each row with the rows behind it, of other parts, that are equal to it in a band, band by band."""
    numbers = np.asarray(parts)
    for band in bands:
        keys = np.ascontiguousarray(band).view(np.dtype((np.void, band.shape[1] * band.dtype.itemsize))).ravel()
        order = np.argsort(keys, kind="stable")
        ends = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
        for group in np.split(order, ends):
            part = numbers[group]
            if (part == part[0]).all():  # most groups: of one row, or of texts that one part is full of
                continue
            for place, i in enumerate(group.tolist()):
                others = group[place + 1 :][part[place + 1 :] != part[place]]
                if len(others):
                    yield i, others
