"""The add-on's configuration: every width a PSA add-on needs, and the base it belongs to."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from math import isqrt
from pathlib import Path
from typing import Any

from psa_fast.files import read_json, shorten, write_text
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.heads import Taxonomy

VERSION = 5
QUERIES = ("prompt", "first")
# inclusive ranges; the upper ends are far beyond any model, and keep products of two within 64 bits
_RANGES = {
    "vision_hidden_size": (1, 1 << 20),
    "hidden_size": (1, 1 << 20),
    "image_tokens": (1, 1 << 20),
    "num_safety_tokens": (0, 1 << 20),
    "num_head_tokens": (0, 1 << 20),
    "num_text_tokens": (0, 1 << 20),
    "num_attention_heads": (1, 1 << 20),
    "projector_hidden_size": (1, 1 << 20),
    "projector_depth": (1, 10_000),
    "query_window": (0, 1 << 20),
}
_REQUIRED = ("vision_hidden_size", "hidden_size", "image_tokens")
# version -> the fields that came with it, and what a file of an earlier version means by not having them
_ADDED: dict[int, dict[str, Any]] = {
    2: {"layer_norm_eps": 1e-6},
    3: {"neutral_query": False, "query_window": 0, "reads_text": False},
    4: {"num_text_tokens": 0},
    5: {"taxonomy": None},  # image_tokens may be null
}
DEFAULT_WINDOW = 16


@dataclass
class PsaConfig:
    """What `psa_config.json` holds.

    Attributes:
        vision_hidden_size: Dv, width of the vision features h_o.
        hidden_size: E, width of the language model.
        image_tokens: S, tokens of one image; a square number (the safety projector works on the grid). None: they
            vary, and each image comes with its grids; files up to version 4 always have a number.
        num_safety_tokens: tokens before an image's tokens in the language model's input (s_llm).
        num_head_tokens: tokens only the concept attention sees (s_head).
        num_attention_heads: heads of the concept attention; divides hidden_size.
        projector_hidden_size: width inside the safety projector; None: min(vision_hidden_size, 1024) + 64, as
            features of several layers or patches side by side would make it explode.
        projector_depth: blocks in each of the projector's two stages.
        query: "prompt" = mean of the prompt's text embeddings plus a learned vector; "first" = embedding of the first
            token (BOS), as in the paper's code (the text then never reaches the concept head).
        risk_types, risk_levels: names of the classes, in the order of the heads' rows; None: the taxonomy's.
        compat: "paper" reproduces the paper's choices where the model has one (query="first"); None: ours.
        base_model_name_or_path, base_revision, base_fingerprint: the base model the add-on was trained on: an absolute
            folder, or a name on the hub, which has a revision (a commit).
        layer_norm_eps: of the safety projector's norms; 1e-5 as in the official network. A file of version 1 has no
            such field and means 1e-6.
        neutral_query: whether the learned query alone was trained on what the picture itself shows; None: as `query`
            allows.
        query_window: tokens of the windows of a prompt that were trained on the request's label, 0: none were. A
            window should hold a risky sentence and little more. None: 16, or 0 where the text does not ask.
        reads_text: whether requests without an image were trained; None: as `query` and the head tokens allow. Files up
            to version 2 have none of the three, and mean: not trained.
        num_text_tokens: learned features that stand in for the picture of a request without one; None: as many as head
            tokens, or 0 where such requests are not read. Files up to version 3 mean 0: read from head tokens alone.
        taxonomy: what a taxonomy's file holds; None, or not in the file: PSA's own.
        version: format of this file.
        checksums: SHA-256 of what the add-on's files held when they were saved, see addon.py; None: not on record.
    """

    vision_hidden_size: int
    hidden_size: int
    image_tokens: int | None
    num_safety_tokens: int = 64
    num_head_tokens: int = 64
    num_attention_heads: int = 8
    projector_hidden_size: int | None = None
    projector_depth: int = 3
    query: str = "prompt"
    risk_types: list[str] = field(default=None)  # type: ignore[arg-type]
    risk_levels: list[str] = field(default=None)  # type: ignore[arg-type]
    compat: str | None = None
    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    base_fingerprint: str | None = None
    layer_norm_eps: float = 1e-5
    neutral_query: bool | None = None
    query_window: int | None = None
    reads_text: bool | None = None
    num_text_tokens: int | None = None
    taxonomy: dict[str, Any] | None = None
    version: int = VERSION
    checksums: dict[str, str] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version != VERSION:
            raise ValueError(f"version is {shorten(self.version)}; this psa-fast reads versions 1 to {VERSION}")
        _one_of("compat", self.compat, (None, "paper"))
        if self.compat == "paper":
            self.query = "first"
        _one_of("query", self.query, QUERIES)
        _check_integer("vision_hidden_size", self.vision_hidden_size)
        if self.projector_hidden_size is None:
            self.projector_hidden_size = min(self.vision_hidden_size, 1024) + 64
        asks = self.query == "prompt"
        if self.neutral_query is None:
            self.neutral_query = asks
        if self.query_window is None:
            self.query_window = DEFAULT_WINDOW if asks else 0
        if self.reads_text is None:
            self.reads_text = asks and self.num_head_tokens != 0
        for name in _ADDED[3]:
            if name != "query_window" and type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {shorten(getattr(self, name))}; expected true or false")
            if getattr(self, name) and not asks:
                raise ValueError(f"{name} is {shorten(getattr(self, name))}, but query {self.query!r} reads no text")
        if self.reads_text and self.num_head_tokens == 0:
            raise ValueError("reads_text is True, but num_head_tokens is 0: nothing is left to read without an image")
        if self.num_text_tokens is None:
            self.num_text_tokens = self.num_head_tokens if self.reads_text else 0
        for name in _RANGES:
            if name != "image_tokens" or self.image_tokens is not None:
                _check_integer(name, getattr(self, name))
        if self.num_text_tokens and not self.reads_text:
            raise ValueError(f"num_text_tokens is {self.num_text_tokens}, but reads_text is False: nothing reads them")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.image_tokens is not None and isqrt(self.image_tokens) ** 2 != self.image_tokens:
            raise ValueError(f"image_tokens is {self.image_tokens}; the safety projector needs a square grid")
        eps = self.layer_norm_eps
        if type(eps) not in (int, float) or not (math.isfinite(eps) and 1e-12 <= eps <= 0.1):
            raise ValueError(f"layer_norm_eps is {shorten(eps)}; expected a number from 1e-12 to 0.1")
        for name, classes in (("risk_types", self.concepts.types), ("risk_levels", self.concepts.levels)):
            if getattr(self, name) is None:
                setattr(self, name, list(classes))
            _check_names(name, getattr(self, name))
            if getattr(self, name) != list(classes):
                known = ", ".join(classes)
                raise ValueError(f"{name} is {shorten(getattr(self, name))}; this psa-fast knows {known}")
        _check_text(
            "base_model_name_or_path", self.base_model_name_or_path, r"[^\x00-\x1f]{1,4096}", "a folder or name"
        )
        _check_text("base_revision", self.base_revision, r"[0-9a-f]{40}", "a commit of 40 hexadecimal digits")
        _check_text("base_fingerprint", self.base_fingerprint, r"[0-9a-f]{32}", "32 hexadecimal digits")
        if self.checksums is not None:
            if not isinstance(self.checksums, dict):
                raise ValueError(f"checksums is {shorten(self.checksums)}; expected an object")
            for name, value in self.checksums.items():
                _check_text(f"checksums.{shorten(name)}", value or "", r"[0-9a-f]{64}", "64 hexadecimal digits")

    @property
    def concepts(self) -> Taxonomy:
        """The taxonomy that the heads were trained on. Raises ValueError for a field that holds none."""
        try:
            return PSA if self.taxonomy is None else Taxonomy.from_json(self.taxonomy)
        except ValueError as error:
            raise ValueError(f"taxonomy: {error}") from None

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Classes of the type head and of the level head."""
        return len(self.risk_types), len(self.risk_levels)

    @property
    def fixed_image_tokens(self) -> int:
        """S, where all images have as many. Raises ValueError where it varies."""
        if self.image_tokens is None:
            raise ValueError("the base's images have different numbers of tokens, which this does not support yet")
        return self.image_tokens

    def revision_of(self, base: str | Path) -> str | None:
        """The commit to load `base` at: the recorded one of the add-on's own base, wherever the hub's main is by now.

        None for any other base, and for every folder.
        """
        return self.base_revision if str(base) == self.base_model_name_or_path else None

    def digest(self) -> str:
        """SHA-256 over every field that decides what the model computes; where its base lies does not."""
        left_out = ("base_model_name_or_path", "base_revision", "base_fingerprint", "checksums")
        kept = {name: value for name, value in asdict(self).items() if name not in left_out}
        for version in range(VERSION, 2, -1):  # as the version digested itself that could say the same
            if any(kept[name] != value for name, value in _ADDED[version].items()):
                break
            kept = {name: value for name, value in kept.items() if name not in _ADDED[version]}
            kept["version"] = version - 1
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def to_json_file(self, path: str | Path) -> None:
        """Write the configuration as JSON, whole or not at all."""
        values = asdict(self)
        for name in ("checksums", "taxonomy"):
            if values[name] is None:
                del values[name]
        write_text(path, json.dumps(values, indent=2) + "\n")

    @classmethod
    def from_json_file(cls, path: str | Path) -> PsaConfig:
        """Read a configuration; ValueError that names the file for anything that is not exactly one."""
        raw = read_json(path, "add-on")
        version = raw.get("version", 1)
        if type(version) is not int or not 1 <= version <= VERSION:
            version = VERSION  # __post_init__ refuses it
        later = {name: value for added in range(version + 1, VERSION + 1) for name, value in _ADDED[added].items()}
        known = {f.name for f in fields(cls)} - set(later) - ({"checksums"} if version == 1 else set())
        unknown = sorted(set(raw) - known)
        if unknown:
            raise ValueError(f"{path} has unknown keys: {shorten(', '.join(unknown))}")
        # later ones are written only where they say something
        needed = (*_REQUIRED, *(name for added in range(2, min(version, 4) + 1) for name in _ADDED[added]))
        if missing := [name for name in needed if name not in raw]:
            raise ValueError(f"{path} lacks: {', '.join(missing)}")
        if version < VERSION:
            if raw["image_tokens"] is None:
                raise ValueError(f"{path}: image_tokens is null; version {version} has a number")
            raw.update({**later, "version": VERSION})
        try:
            config = cls(**raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return config


def _check_integer(name: str, value: Any) -> None:
    low, high = _RANGES[name]
    # a bool is an int to isinstance
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {shorten(value)}; expected an integer from {low} to {high}")


def _one_of(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name} is {shorten(value)}; expected one of {', '.join(map(repr, choices))}")


def _check_names(name: str, value: Any) -> None:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{name} is {shorten(value)}; expected a list of names")
    if len(set(value)) < len(value):
        raise ValueError(f"{name} is {shorten(value)}; a name stands twice")


def _check_text(name: str, value: Any, pattern: str, expected: str) -> None:
    if value is not None and not (isinstance(value, str) and re.fullmatch(pattern, value)):
        raise ValueError(f"{name} is {shorten(value)}; expected {expected}")
