"""The add-on's configuration: every width a PSA add-on needs, and the base it belongs to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from math import isqrt
from pathlib import Path
from typing import Any

from psa_fast.taxonomy import RISK_LEVELS, RISK_TYPES

VERSION = 1
QUERIES = ("prompt", "first")


@dataclass
class PsaConfig:
    """What `psa_config.json` holds.

    Attributes:
        vision_hidden_size: Dv, width of the vision features h_o.
        hidden_size: E, width of the language model.
        image_tokens: S, tokens of one image; a square number (the safety projector works on the grid).
        num_safety_tokens: tokens before an image's tokens in the language model's input (s_llm).
        num_head_tokens: tokens only the concept attention sees (s_head).
        num_attention_heads: heads of the concept attention; divides hidden_size.
        projector_hidden_size: width inside the safety projector; None: vision_hidden_size + 64.
        projector_depth: blocks in each of the projector's two stages.
        query: "prompt" = mean of the prompt's text embeddings plus a learned vector; "first" = embedding of the first
            token (BOS), as in the paper's code (the text then never reaches the concept head).
        risk_types, risk_levels: names of the classes, in the order of the heads' rows.
        compat: "paper" reproduces the paper's choices where the model has one (query="first"); None: ours.
        base_model_name_or_path, base_revision, base_fingerprint: the base model the add-on was trained on.
        version: format of this file.
    """

    vision_hidden_size: int
    hidden_size: int
    image_tokens: int
    num_safety_tokens: int = 64
    num_head_tokens: int = 64
    num_attention_heads: int = 8
    projector_hidden_size: int | None = None
    projector_depth: int = 3
    query: str = "prompt"
    risk_types: list[str] = field(default_factory=lambda: list(RISK_TYPES))
    risk_levels: list[str] = field(default_factory=lambda: list(RISK_LEVELS))
    compat: str | None = None
    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    base_fingerprint: str | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"psa_config version is {self.version}; this psa-fast reads version {VERSION}")
        if self.compat not in (None, "paper"):
            raise ValueError(f"compat is {self.compat!r}; expected None or 'paper'")
        if self.compat == "paper":
            self.query = "first"
        if self.query not in QUERIES:
            raise ValueError(f"query is {self.query!r}; expected one of {', '.join(QUERIES)}")
        if self.projector_hidden_size is None:
            self.projector_hidden_size = self.vision_hidden_size + 64
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}"
            )
        if isqrt(self.image_tokens) ** 2 != self.image_tokens:
            raise ValueError(f"image_tokens is {self.image_tokens}; the safety projector needs a square grid")
        for name in ("num_safety_tokens", "num_head_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is negative")
        if self.projector_depth < 1:
            raise ValueError("projector_depth must be at least 1")

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Classes of the type head and of the level head."""
        return len(self.risk_types), len(self.risk_levels)

    def revision_of(self, base: str | Path) -> str | None:
        """The commit to load `base` at: the recorded one of the add-on's own base, wherever the hub's main is by now.

        None for any other base.
        """
        return self.base_revision if str(base) == self.base_model_name_or_path else None

    def to_json_file(self, path: str | Path) -> None:
        """Write the configuration as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json_file(cls, path: str | Path) -> PsaConfig:
        """Read a configuration; ValueError for anything that is not exactly one."""
        try:
            raw: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{path} must hold one JSON object")
        unknown = sorted(set(raw) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{path} has unknown keys: {', '.join(unknown)}")
        missing = [name for name in ("vision_hidden_size", "hidden_size", "image_tokens") if name not in raw]
        if missing:
            raise ValueError(f"{path} lacks: {', '.join(missing)}")
        try:
            return cls(**raw)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
