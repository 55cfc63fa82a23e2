"""Damaged and strange policy files, made from the shipped one, and the one judgement that all of them get."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from limits import TooLongError, limit, no_sentence

TYPES = ("politics", "illegal risk", "insults and bullying", "fairness", "privacy", "misleading")
ACTIONS = ("allow", "hint", "refuse", "block")
VALUES = [
    "", "null", "~", "on", "off", "yes", "no", "y", "true", "True", "TRUE", "false", "0", "1", "2", "-1", "1.0",
    "0.5", ".5", "1", "0.0", "1.0000001", "1e-1", "1e-400", ".inf", "-.inf", ".nan", "NaN", "0x1", "010", "0o1",
    "1_0", "1:30", "2026-01-01", "'1'", '"on"', "!!str 1", "!!int '1'", "!!float 1", "!!bool on",
    "!!python/object/apply:os.getcwd []", "!!python/name:os.system", "!!binary aGk=", "!!set {a, b}",
    "!!timestamp 2026-13-45", "!x y", "[]", "{}", "[1]", "{a: 1}", "hint", "Hint", "refuse", "deny", "allow",
    "block", "{type}", "'{type}'", "'{type!r}'", "'{type.__class__}'", "'{0}'", "'{}'", "'{'", "'{{type}}'",
    "'no field'", "'{type:>1000000}'", '"\\ud800 {type}"', '"\\0{type}"', "' '", "|\n  {type}", ">\n    {type}",
    "&a [*a]", "&b {c: *b}", "*nowhere", "9" * 5000, "[" * 100 + "]" * 100, "[" * 3000 + "]" * 3000,
    "'" + "a" * 100_000 + "{type}'", "@at", "`tick", "%percent", "\t1", "# nothing", "<<", "=", "? a",
]  # fmt: skip
LINE = re.compile(r"^(\s*)([\w ]+):(.*)$")


def mutate(text: str, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield what was done, and a policy file's content; the kinds come in turn."""
    draw = random.Random(seed)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        what, data = kind(text, draw)
        yield f"{number} {kind.__name__}: {what}", data if isinstance(data, bytes) else data.encode("utf-8", "replace")


def _keys(lines: list[str]) -> list[int]:
    return [i for i, line in enumerate(lines) if LINE.match(line) and not line.lstrip().startswith("#")]


def bytes_changed(text, draw):
    """Bytes flipped, inserted, taken away or doubled."""
    data = bytearray(text.encode())
    places = [draw.randrange(len(data)) for _ in range(draw.randint(1, 3))]
    for at in places:
        how = draw.randrange(4)
        if how == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            data[at:at] = bytes(draw.choice(b":-{}[]&*!|>'\"%@#\t\n \0\xff\x85") for _ in range(draw.choice([1, 1, 5])))
        elif how == 2:
            del data[at : at + draw.choice([1, 1, 2, 20])]
        else:
            data[at:at] = data[at : at + draw.choice([1, 20, 100])]
    return str(places), bytes(data)


def value_changed(text, draw):
    """Another value of a key."""
    lines = text.splitlines()
    at = draw.choice(_keys(lines))
    indent, key, _ = LINE.match(lines[at]).groups()
    value = draw.choice(VALUES)
    lines[at] = f"{indent}{key}: {value}"
    return f"{key} = {value[:30]}", "\n".join(lines) + "\n"


def key_repeated(text, draw):
    """A key that stands twice, beside the first or further down, spelt alike or not."""
    lines = text.splitlines()
    at = draw.choice(_keys(lines))
    indent, key, value = LINE.match(lines[at]).groups()
    spelt = draw.choice([key, f'"{key}"', f"'{key}'", f"? {key}\n{indent}", f"!!str {key}", f"&k {key}"])
    value = draw.choice([value, " off", " 0.9", " block"]) or " {}"
    lines.insert(draw.choice([at, at + 1, at + 1, len(lines)]), f"{indent}{spelt}:{value}")
    return f"{spelt}{value}", "\n".join(lines) + "\n"


def key_renamed(text, draw):
    """A key spelt in another way, gone, or one more."""
    lines = text.splitlines()
    at = draw.choice(_keys(lines))
    indent, key, value = LINE.match(lines[at]).groups()
    new = draw.choice(
        [key.upper(), key + "s", key[:-1], f'" {key}"', key.replace("e", "\u0435"), "1", "null", "[a, b]", "on", ""]
    )
    how = draw.choice(["rename", "drop", "add"])
    if how == "drop":
        del lines[at]
    else:
        lines[at : at + (how == "rename")] = [f"{indent}{new}:{value or ' 1'}"]
    return f"{how} {key} {new}", "\n".join(lines) + "\n"


def layout(text, draw):
    """Another form of the whole: encodings, line ends, indents, documents, merges."""
    value = yaml.safe_load(text)
    merged = text.replace("types:\n", "base: &base\n  privacy: off\ntypes:\n  <<: *base\n")
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    forms = {
        "BOM": b"\xef\xbb\xbf" + text.encode(),
        "CRLF": text.replace("\n", "\r\n").encode(),
        "CR": text.replace("\n", "\r").encode(),
        "tabs": text.replace("  ", "\t").encode(),
        "wider": text.replace("  ", "      ").encode(),
        "utf-16": text.encode("utf-16"),
        "latin-1": text.replace("type", "t\u00ffpe").encode("latin-1"),
        "empty": b"",
        "comments only": b"# nothing\n",
        "flow": yaml.safe_dump(value, default_flow_style=True, width=10**6).encode(),
        "sorted": yaml.safe_dump(value).encode(),
        "json": json.dumps(value).encode(),
        "document marks": f"---\n{text}...\n".encode(),
        "two documents": f"{text}---\n{text}".encode(),
        "version mark": f"%YAML 1.2\n---\n{text}".encode(),
        "a list": b"- 1\n- 2\n",
        "text": b"policy",
        "deep": b"[" * 50_000,
        "laughs": (laughs + text).encode(),
        "merge": merged.encode(),
        "merge of itself": b"&a\n<<: *a\n" + text.encode(),
        "cut": text.encode()[: draw.randrange(len(text))],
        "NUL": text.encode() + b"\0",
        "next line": text.replace("\n", "\u0085", 3).encode(),
        "unchanged": text.encode(),
    }
    name = draw.choice(sorted(forms))
    return name, forms[name]


KINDS = [bytes_changed, value_changed, key_repeated, value_changed, key_renamed, layout]


def repeated(data: bytes) -> str | None:
    """A key that stands twice in one mapping of the YAML text, None if none does; a merge is no key."""
    seen: set[int] = set()

    def look(node: yaml.Node) -> str | None:
        if id(node) in seen:
            return None
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            return next(filter(None, map(look, node.value)), None)
        if not isinstance(node, yaml.MappingNode):
            return None
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                value = yaml.SafeLoader("").construct_object(key)
                if value in keys:
                    return str(value)
                keys.add(value)
        return next((found for key, value in node.value for found in (look(key), look(value)) if found), None)

    return look(yaml.compose(data.decode("utf-8-sig"), Loader=yaml.SafeLoader))


def _same(got: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict) and isinstance(got, dict):
        return got.keys() == wanted.keys() and all(_same(got[key], wanted[key]) for key in wanted)
    return isinstance(got, bool) == isinstance(wanted, bool) and got == wanted


def judge(path: Path) -> tuple[str, str]:
    """How `Policy.load` takes a file, and a word on it.

    "ok": a policy that says what the file says, and works; "named": a ValueError of one sentence with the file; the
    others are faults: "foreign exception", "hang", "no sentence", "silent" (another policy than the file's).
    """
    from psa_fast.safety.policy import Policy

    try:
        with limit():
            policy = Policy.load(path)
    except TooLongError:
        return "hang", ""
    except ValueError as error:
        wrong = no_sentence(str(error), path, most=2000)  # up to ten faults
        return ("no sentence", wrong) if wrong or type(error) is not ValueError else ("named", str(error))
    except BaseException as error:
        return "foreign exception", f"{type(error).__name__}: {error!s:.200}"
    try:
        wrong = _wrong(policy, path.read_bytes())
    except Exception as error:
        wrong = f"loaded, though it cannot be read or used: {type(error).__name__}: {error!s:.150}"
    return ("silent", wrong) if wrong else ("ok", "")


def _wrong(policy: Any, data: bytes) -> str | None:
    """What is wrong with a policy that was loaded from `data`; whatever this raises is a fault too."""
    if key := repeated(data):
        return f"the key {key!a} stands twice"
    stated = yaml.safe_load(data.decode("utf-8-sig"))
    got = policy.model_dump()
    for name in ("type_thresholds", "calibration", "memory"):  # may be left out
        if got[name] is None and name not in stated:
            del got[name]
    for level in got["levels"].values():
        if level.get("hint") is None:
            level.pop("hint", None)
    for level in stated["levels"].values():
        if level.get("hint") is None:
            level.pop("hint", None)
    if not _same(got, stated):
        return f"{got!a:.200} from {stated!a:.200}"
    if got["version"] != 1 or not 0 < got["unsafe_threshold"] <= 1:
        return "version or threshold out of range"
    if set(got["types"]) != set(TYPES) or set(got["levels"]) != {"low", "medium", "high"}:
        return "types or levels missing"
    for kind in range(len(TYPES)):
        for level in range(1, 4):
            types, levels = ([float(i == at) for i in range(n)] for at, n in ((kind, 7), (level, 4)))
            decision = policy.decide(types, levels)
            shown = decision.hint or decision.response
            if decision.action not in ACTIONS or (decision.action != "allow") != bool(shown):
                return f"decides {decision}"
            if shown is not None and (TYPES[kind] not in shown or not shown.encode()):
                return f"the text does not name {TYPES[kind]}: {shown!a:.100}"
    return None
