"""Data files that people and programs spoil, made from valid rows; `record_judge.py` judges how they are read.

`mutate(rows, seed, count)` yields what was done and a file's bytes.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 6, 7, 3, 4, 2**31, 2**63, 10**400, 0.5, 3.0, 1e300, "", " ", "3", "\uff13",
    "Privacy ", "clean\u200b", "\u0441lean", "HIGH", "hum\u0430n", "\ufeffuser", "system", "a" * 100_000, "\0",
    "\x1b[31m", "<image>", "<image><image>", "<split>", "a.png<split>b.jpg", "../a.png", "/etc/passwd",
    "file:///etc/passwd", "http://x/a.png", "data:image/png;base64,AA", "A.PNG", "a.png ", ".", "..", "/dev/zero",
    [], {}, [[]], [None], ["a.png", "b.jpg"], {"from": "human"}, [{"from": "human", "value": "?"}], "risk",
    "\U0001f600", "e\u0301.png", "\u00e9.png",
]  # fmt: skip
RAW = [
    "NaN", "Infinity", "-Infinity", "1e999", "-0", "9" * 5000, "9" * 1500, "01", "0x1", "1_000", "+1", ".5", "1.",
    "'a'", "undefined", "None", "True", "{}", "[]", "[" * 90 + "]" * 90, "[" * 5000 + "]" * 5000,
    "[" * 200_000 + "]" * 200_000, '{"a":' * 3000 + "1" + "}" * 3000, '"\\ud83d"', '"\\ude00"', '"\\ud83d\\ude00"',
    '"\\u0000"', '"\\x41"', '"a\tb"', '"a\\u2028b"', '"\\', "", "1 2", "1, 2", '"a" "b"', "/* 1 */ 1", "1 // one",
]  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Valid rows over all fields; their pictures are those of `make_images`."""
    return [
        {"id": "1", "image": "a.png", "safe_type": "privacy", "safe_level": 2, "source": "s", "split": "train",
         "conversations": [{"from": "human", "value": "<image>\nWho is it?"}, {"from": "gpt", "value": "No."}]},
        {"id": 2, "image": ["a.png", "b.jpg"], "safe_type": 6, "safe_level": "none", "group": "benign_twin",
         "conversations": [{"from": "user", "value": "<image> or <image>? 🙂"}, {"from": "assistant", "value": "é"}]},
        {"image": "a.png<split>b.jpg", "safe_type": 1, "safe_level": "high", "source_label": {"a": [1, None, 0.5]},
         "conversations": [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "x"},
                           {"from": "human", "value": "and?"}, {"from": "gpt", "value": "y \\ \" \n z"}]},
        {"conversations": [{"from": "human", "value": "no image"}, {"from": "gpt", "value": "nor label"}], "more": [1]},
    ]  # fmt: skip


def make_images(folder: Path) -> Path:
    """The folder of the rows' pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.jpg", "\u00e9.png"):
        Image.new("RGB", (12, 8), (200, 30, 30)).save(folder / name)
    return folder


def mutate(valid: list[dict[str, Any]], seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield what was done, and a data file's content; the kinds come in turn, where and how is drawn from `seed`."""
    draw = random.Random(seed)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        chosen = [copy.deepcopy(row) for row in draw.sample(valid, draw.randint(1, len(valid)))]
        what, data = kind(chosen, draw)
        yield f"{number} {kind.__name__}: {what}", data


def lines(chosen: list[dict[str, Any]]) -> bytes:
    """The rows as a .jsonl file."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in chosen)


def _places(value: Any, place: tuple = ()) -> list[tuple]:
    """The path of every value within a row."""
    found = [place] if place else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += _places(part, (*place, key))
    return found


def _holder(row: Any, place: tuple) -> Any:
    for key in place[:-1]:
        row = row[key]
    return row


def bytes_changed(chosen, draw):
    """Bytes flipped, inserted, taken away, doubled or overwritten, a few at a time."""
    data = bytearray(lines(chosen))
    done = []
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(data))
        how = draw.choice(["flip", "insert", "delete", "double", "overwrite"])
        size = draw.choice([1, 1, 1, 2, 8, 40])
        if how == "flip":
            data[at] ^= 1 << draw.randrange(8)
        elif how == "insert":
            data[at:at] = bytes(draw.choice(b'"{}[],:\\\0\xff\x80\xc3\n\r\t 0a') for _ in range(size))
        elif how == "delete":
            del data[at : at + size]
        elif how == "double":
            data[at:at] = data[at : at + size]
        else:
            data[at : at + size] = draw.randbytes(size)
        done.append(f"{how} {size} at {at}")
        data = data or bytearray(b"\n")
    return ", ".join(done), bytes(data)


def value_swapped(chosen, draw):
    """One value of a row replaced by another of any type."""
    row = draw.choice(chosen)
    place = draw.choice(_places(row))
    value = draw.choice(STRANGE)
    _holder(row, place)[place[-1]] = value
    try:
        return f"{place} = {str(value)[:40]!a}", lines(chosen)
    except ValueError:  # an integer that Python does not print: its digits as text
        _holder(row, place)[place[-1]] = "@"
        return f"{place} = 10**400", lines(chosen).replace(b'"@"', b"1" + b"0" * 400)


def raw_value(chosen, draw):
    """One value replaced by text that is no JSON, or JSON that few expect."""
    row = draw.choice(chosen)
    place = draw.choice(_places(row))
    _holder(row, place)[place[-1]] = "@RAW@"
    raw = draw.choice(RAW)
    return f"{place} = {raw[:30]}", lines(chosen).replace(b'"@RAW@"', raw.encode())


def key_repeated(chosen, draw):
    """A key that stands twice in one object, the second with the same value, another or an escaped name."""
    row = draw.choice(chosen)
    objects = [(), *(p for p in _places(row) if isinstance(_holder(row, (*p, 0)), dict))]
    place = draw.choice(objects)
    target = _holder(row, (*place, 0)) if place else row
    key = draw.choice(sorted(target)) if target else "a"
    written = draw.choice([json.dumps(key), '"' + "".join(f"\\u{ord(c):04x}" for c in key) + '"'])
    value = draw.choice(["null", "1", '"x"', json.dumps(target.get(key))])
    target["@KEY@"] = 0
    data = lines(chosen).replace(b'"@KEY@": 0', f"{written}: {value}".encode())
    return f"{place} {key} = {value[:30]}", data


def key_renamed(chosen, draw):
    """A key spelt in another way, or as other projects spell it."""
    row = draw.choice(chosen)
    key = draw.choice(sorted(row))
    names = [
        key.upper(), key.title(), f" {key}", f"{key} ", key.replace("_", "-"), key.replace("_", ""), key + "s",
        key[:-1], key[::-1], f"{key}\u200b", unicodedata.normalize("NFKD", key), "\uff49mage", "label", "labels",
        "images", "messages", "conversation", "level", "risk_type", "unsafe", "\ufeff" + key, "", key + "\ud800",
        "a" * 5000,
    ]  # fmt: skip
    new = draw.choice(names)
    row[new] = row.pop(key)
    return f"{key} -> {new[:30]!a}", json.dumps(row).encode() + b"\n" + lines([r for r in chosen if r is not row])


def key_dropped_or_added(chosen, draw):
    """A key gone, or one more, at any depth."""
    row = draw.choice(chosen)
    place = draw.choice([p for p in _places(row) if isinstance(p[-1], str)])
    if draw.random() < 0.5:
        del _holder(row, place)[place[-1]]
        return f"without {place}", lines(chosen)
    _holder(row, place)[draw.choice(["x", "role", "safe", "from ", "Value"])] = draw.choice(["user", 1, None])
    return f"more beside {place}", lines(chosen)


def unicode_form(chosen, draw):
    """The same to the eye: other forms of letters, marks that are not seen, other line ends within a text."""
    row = draw.choice(chosen)
    texts = [p for p in _places(row) if isinstance(_holder(row, p)[p[-1]], str)]
    place = draw.choice(texts)
    text = _holder(row, place)[place[-1]]
    how, new = draw.choice(
        [
            ("NFD", unicodedata.normalize("NFD", text)),
            ("full width", "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)),
            ("zero width", "\u200b".join(text)),
            ("no-break", text.replace(" ", "\u00a0") + "\u00a0"),
            ("line separator", text + "\u2028" + text),
            ("carriage return", text + "\r" + text),
            ("right to left", "\u202e" + text),
            ("cyrillic", text.replace("a", "\u0430").replace("e", "\u0435")),
            ("upper", text.upper()),
            ("surrogate", text + "\udc80"),
        ]
    )
    _holder(row, place)[place[-1]] = new
    plain = [json.dumps(r, ensure_ascii="\udc80" in new).encode() for r in chosen]
    return f"{place} {how}", b"\n".join(plain)


def truncated(chosen, draw):
    """The end is missing, or the beginning."""
    data = lines(chosen)
    at = draw.randrange(len(data))
    return (f"to {at}", data[:at]) if draw.random() < 0.7 else (f"from {at}", data[at:])


def file_form(chosen, draw):
    """Another encoding, line end, or layout of the whole file."""
    data, text = lines(chosen), lines(chosen).decode()
    forms: dict[str, Callable[[], bytes]] = {
        "BOM": lambda: b"\xef\xbb\xbf" + data,
        "two BOMs": lambda: b"\xef\xbb\xbf" * 2 + data,
        "BOM in each line": lambda: b"".join(b"\xef\xbb\xbf" + line for line in data.splitlines(True)),
        "CRLF": lambda: data.replace(b"\n", b"\r\n"),
        "CR": lambda: data.replace(b"\n", b"\r"),
        "no last line end": lambda: data.rstrip(b"\n"),
        "blank lines": lambda: b"\n \n\t\n" + data.replace(b"\n", b"\n\n  \n"),
        "utf-16": lambda: text.encode("utf-16"),
        "utf-16 without BOM": lambda: text.encode("utf-16-le"),
        "utf-32": lambda: text.encode("utf-32"),
        "latin-1": lambda: text.encode("latin-1", "replace"),
        "cp1252": lambda: text.encode("cp1252", "replace"),
        "utf-7": lambda: text.encode("utf-7"),
        "gzip": lambda: gzip.compress(data, mtime=0),
        "empty": lambda: b"",
        "blank": lambda: b" \n\t\r\n",
        "only a BOM": lambda: b"\xef\xbb\xbf",
        "NULs": lambda: b"\0" * 512 + data,
        "list": lambda: json.dumps(chosen).encode(),
        "list over lines": lambda: json.dumps(chosen, indent=1).encode(),
        "list, trailing comma": lambda: json.dumps(chosen).encode()[:-1] + b",]",
        "list, no end": lambda: json.dumps(chosen).encode()[:-1],
        "list, more after it": lambda: json.dumps(chosen).encode() + b"\n" + data,
        "list with BOM": lambda: b"\xef\xbb\xbf" + json.dumps(chosen).encode(),
        "list in a list": lambda: json.dumps([chosen]).encode(),
        "empty list": lambda: b"[]",
        "object over lines": lambda: json.dumps(chosen[0], indent=1).encode(),
        "object of lists": lambda: json.dumps({"data": chosen}).encode(),
        "all on one line": lambda: data.replace(b"\n", b" "),
        "commas at line ends": lambda: data.replace(b"\n", b",\n"),
        "python repr": lambda: "\n".join(map(repr, chosen)).encode(),
        "csv": lambda: b"image,safe_type\na.png,1\n",
        "json string": lambda: json.dumps(text).encode(),
        "number": lambda: b"7",
        "same row twice": lambda: data + data,
    }
    name = draw.choice(sorted(forms))
    return name, forms[name]()


def list_changed(chosen, draw):
    """A byte-wise damage in the list form, where rows have no lines of their own."""
    data = bytearray(json.dumps(chosen, indent=draw.choice([None, 1])).encode())
    at = draw.randrange(len(data))
    how = draw.choice(["flip", "insert", "delete", "cut"])
    if how == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif how == "insert":
        data[at:at] = draw.choice([b",", b"]", b"}", b'"', b"[", b"null,", b"\n"])
    elif how == "delete":
        del data[at : at + draw.choice([1, 2, 30])]
    else:
        data = data[:at]
    return f"{how} at {at}", bytes(data)


KINDS = [
    bytes_changed, value_swapped, raw_value, key_repeated, key_renamed, value_swapped, key_dropped_or_added,
    unicode_form, truncated, file_form, list_changed,
]  # fmt: skip
