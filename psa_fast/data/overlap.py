"""What two sets of records share, so that an evaluation does not measure what was trained on.

`shared_records` is the cheap check of two lists: names and words, no file is opened. `Overlaps` compares files, and
splits within a file, by the content of their images and by near-duplicates; `psa-fast data overlap` prints it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from psa_fast.data.fields import IMAGE_MARK
from psa_fast.data.images import load_image, resolve
from psa_fast.data.progress import progress
from psa_fast.data.records import DataError, Problem, Record, parse_row
from psa_fast.data.rows import read_rows

if TYPE_CHECKING:
    import numpy as np

KINDS = ("images", "near_images", "words", "near_words", "twins")
MAX_DISTANCE = 8  # bits of 128 in which two images' dHashes may differ
MIN_JACCARD = 0.8  # share of three-word sequences that two texts must have in common
EXAMPLES = 20  # of each kind and pair of parts that are listed


class SharedRecords(NamedTuple):
    """How many records of the second list are in the first one too, and where one of them stands."""

    requests: int  # the same images, by path, and the same words
    images: int  # one of their images, by path
    twins: int  # a row of the same twin
    example: str = ""

    def __bool__(self) -> bool:
        return any(self[:3])


def shared_records(first: Iterable[Record], second: Iterable[Record], same_folder: bool = True) -> SharedRecords:
    """Return what of `second` is in `first` already, by paths, words and twins; no file is opened.

    Args:
        first: the records trained on.
        second: the records evaluated on.
        same_folder: whether both have one image folder. If not, equal paths are different images: only requests
            without an image and twins are compared.
    """
    requests: set[tuple[tuple[str, ...], str]] = set()
    images: set[str] = set()
    twins: set[str] = set()
    for record in first:
        requests.add((record.images, _words(record)))
        images.update(record.images)
        twins.update(() if record.twin is None else [record.twin])
    counts: Counter[str] = Counter()
    example = ""
    for record in second:
        by_path = same_folder or not record.images
        found = {
            "requests": by_path and (record.images, _words(record)) in requests,
            "images": same_folder and not images.isdisjoint(record.images),
            "twins": record.twin is not None and record.twin in twins,
        }
        counts.update(found)
        example = example or (record.where if any(found.values()) else "")
    return SharedRecords(counts["requests"], counts["images"], counts["twins"], example)


@dataclass
class Overlaps:
    """Overlaps between parts: a part is a file, or one split of a file.

    Kept of each record are hashes: memory grows with the distinct images and texts, not with their size.
    """

    max_distance: int = MAX_DISTANCE
    min_jaccard: float = MIN_JACCARD
    parts: dict[tuple[str, str | None], int] = field(default_factory=dict)
    records: Counter[int] = field(default_factory=Counter)
    #: (part, path of an image) -> the first row that shows it, likewise words and twins
    images: dict[tuple[int, str], str] = field(default_factory=dict)
    words: dict[tuple[int, str], str] = field(default_factory=dict)
    twins: dict[tuple[int, str], str] = field(default_factory=dict)
    not_compared: int = 0  # images of files that came without a folder
    plain: int = 0  # images that are too plain for near-duplicates

    def add_file(self, path: str, image_folder: str | None) -> None:
        """Add a file's records; None compares no images of it.

        Raises:
            DataError: some rows are bad.
            ValueError: the file does not exist.
        """
        problems: list[Problem] = []
        with progress(f"reading {path}") as advance:
            for row in read_rows(path):
                advance(1)
                if row.error:
                    problems.append(Problem(path, row.line, row.error))
                    continue
                found, record = parse_row(row.value, path, row.line)
                problems += found
                if record is not None and not found:
                    self.add(path, record, image_folder)
        if problems:
            raise DataError(path, problems)

    def add(self, file: str, record: Record, image_folder: str | None) -> None:
        """Add one record of a file. Raises ImageError for a path that leaves the image folder."""
        part = self.parts.setdefault((file, record.split), len(self.parts))
        self.records[part] += 1
        if image_folder is None:
            self.not_compared += len(record.images)
        else:
            for name in record.images:
                self.images.setdefault((part, str(resolve(image_folder, name))), record.where)
        if words := _words(record):
            self.words.setdefault((part, words), record.where)
        if record.twin is not None:
            self.twins.setdefault((part, record.twin), record.where)

    def report(self) -> dict[str, Any]:
        """Compare, and return numbers and examples of each pair of parts as JSON values.

        A pair's `images`, `words` and `twins` count what both parts have; `near_images` and `near_words` count what the
        later one has of which the earlier one has a near-duplicate, and not the same.

        Raises:
            ValueError: there are fewer than two parts to compare.
            ImageError: an image cannot be read.
        """
        if len(self.parts) < 2:
            raise ValueError("there is nothing to compare: give two files, or one whose records have several splits")
        names = [f"{file} ({split})" if split is not None else file for file, split in self.parts]
        counts: defaultdict[tuple[int, int], Counter[str]] = defaultdict(Counter)
        examples: defaultdict[tuple[int, int], dict[str, list[dict[str, Any]]]] = defaultdict(dict)
        for kind, a, b, one, two, detail in self._pairs():
            counts[a, b][kind] += 1
            listed = examples[a, b].setdefault(kind, [])
            if len(listed) < EXAMPLES:
                listed.append({"first": one, "second": two} | detail)
        pairs = [
            {"first": names[a], "second": names[b]} | {kind: counts[a, b][kind] for kind in KINDS} | {"examples": found}
            for (a, b), found in sorted(examples.items())
        ]
        return {
            "parts": [{"name": name, "records": self.records[number]} for number, name in enumerate(names)],
            "max_distance": self.max_distance,
            "min_jaccard": self.min_jaccard,
            "images_not_compared": self.not_compared,
            "images_too_plain": self.plain,
            "overlaps": pairs,
        }

    def _pairs(self) -> Iterator[tuple[str, int, int, str, str, dict[str, Any]]]:
        """Yield kind, earlier part, later part, a row of each, and how near they are."""
        import numpy as np

        from psa_fast.data.near_duplicates import near_images

        digests, hashes = self._look_at_images()
        yield from _shared("images", digests)
        hashed = {place: value for place, value in hashes.items() if value is not None}
        shown = list(hashed)
        self.plain = len(hashes) - len(shown)
        if shown:
            values = np.stack(list(hashed.values()))
            parts = [part for part, _ in shown]
            seen: set[tuple[int, int]] = set()
            for i, j, distance in near_images(values, parts, self.max_distance):
                i, j = (i, j) if parts[i] < parts[j] else (j, i)
                if (parts[i], shown[j][1]) not in digests and (parts[i], j) not in seen:
                    seen.add((parts[i], j))
                    yield "near_images", parts[i], parts[j], digests[shown[i]], digests[shown[j]], {"bits": distance}
        yield from _shared("words", self.words)
        yield from self._near_words()
        yield from _shared("twins", self.twins)

    def _near_words(self) -> Iterator[tuple[str, int, int, str, str, dict[str, Any]]]:
        from psa_fast.data.near_duplicates import near_texts, shingles

        places = sorted(self.words, key=lambda place: place[0])  # the earlier part first
        parts = [part for part, _ in places]
        shared = {words for words, number in Counter(words for _, words in places).items() if number > 1}
        seen: set[tuple[int, int]] = set()

        def known(i: int, j: int) -> bool:
            i, j = min(i, j), max(i, j)
            return (parts[i], j) in seen or (places[j][1] in shared and (parts[i], places[j][1]) in self.words)

        sets = [shingles(words) for _, words in places]
        for i, j, similarity in near_texts(sets, parts, self.min_jaccard, known):
            i, j = min(i, j), max(i, j)
            seen.add((parts[i], j))
            where = self.words[places[i]], self.words[places[j]]
            yield "near_words", parts[i], parts[j], *where, {"jaccard": round(similarity, 3)}

    def _look_at_images(self) -> tuple[dict[tuple[int, str], str], dict[tuple[int, str], np.ndarray | None]]:
        """Rows and dHashes of the distinct images of each part, by the hash of their content."""
        paths = sorted({path for _, path in self.images})
        looked: dict[str, tuple[str, np.ndarray | None]] = {}
        with ThreadPoolExecutor(max_workers=8) as pool, progress("comparing images", len(paths)) as advance:
            for path, found in zip(paths, pool.map(_look, paths), strict=True):
                looked[path] = found
                advance(1)
        digests: dict[tuple[int, str], str] = {}
        hashes: dict[tuple[int, str], np.ndarray | None] = {}
        for (part, path), where in self.images.items():
            digest, value = looked[path]
            digests.setdefault((part, digest), where)
            hashes[part, digest] = value
        return digests, hashes


def _look(path: str) -> tuple[str, np.ndarray | None]:
    from psa_fast.data.near_duplicates import difference_hash

    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return digest, difference_hash(load_image(path))


def _shared(kind: str, found: dict[tuple[int, str], str]) -> Iterator[tuple[str, int, int, str, str, dict[str, Any]]]:
    """Yield what several parts have, for each pair of them."""
    parts_of: defaultdict[str, list[int]] = defaultdict(list)
    for part, key in found:
        parts_of[key].append(part)
    for key, parts in parts_of.items():
        ordered = sorted(parts)
        for place, a in enumerate(ordered):
            for b in ordered[place + 1 :]:
                yield kind, a, b, found[a, key], found[b, key], {}


def normalised(text: str) -> str:
    """Return the words of a text with nothing between them but blanks: no case, no punctuation, one Unicode form."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _words(record: Record) -> str:
    """The user's words, as near-duplicates are compared; an image's mark is none of them."""
    asked = " ".join(turn.text for turn in record.turns if turn.role == "user")
    return normalised(asked.replace(IMAGE_MARK, " "))
