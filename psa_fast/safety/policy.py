"""The safety policy: (type, level) probabilities of the concept head -> allow, hint, refuse or block."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from psa_fast.taxonomy import CLEAN, RISK_LEVELS, RISK_TYPES, level_id, type_id

DEFAULT_POLICY = Path(__file__).with_name("policy.yaml")
POLICY_VERSION = 1
Action = Literal["allow", "hint", "refuse", "block"]
RISKY_TYPES = tuple(name for i, name in enumerate(RISK_TYPES) if i != CLEAN)
RISKY_LEVELS = RISK_LEVELS[1:]


@dataclass(frozen=True)
class Decision:
    """What the policy does with one request, and why.

    `type` and `level` are ids of the taxonomy (None: the probabilities could not be read). `hint` is set for the action
    "hint" only, `response` for "refuse" and "block" only. `unsafe_score` is before any switch (None: not a number).
    """

    action: Action
    type: int | None
    level: int | None
    rule: str
    unsafe_score: float | None
    hint: str | None = None
    response: str | None = None

    @property
    def unsafe(self) -> bool:
        """Whether the request was read as unsafe and not switched off; true for an unreadable one."""
        return self.type != CLEAN and not self.rule.startswith("type_off")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _sentence(text: str, needs_type: bool) -> str:
    try:
        filled = text.format(type="X")
    except (KeyError, IndexError, ValueError):
        raise ValueError(f"{text!r} may hold the placeholder {{type}} and no other") from None
    if needs_type and filled == text:
        raise ValueError(f"{text!r} does not name the risk: write {{type}} where its name belongs")
    if not text.strip():
        raise ValueError("the text is empty")
    return text


class LevelRule(_Strict):
    """The action of one risk level; `hint` belongs to the action "hint" and to no other."""

    action: Action
    hint: str | None = None

    @model_validator(mode="after")
    def _check(self) -> LevelRule:
        if (self.action == "hint") != (self.hint is not None):
            raise ValueError(
                f"action {self.action} {'needs' if self.action == 'hint' else 'has no use for'} a hint text"
            )
        if self.hint is not None:
            _sentence(self.hint, needs_type=True)
        return self


class Responses(_Strict):
    """The answers given without the language model."""

    refuse: str
    block: str
    unchecked: str

    @field_validator("refuse", "block")
    @classmethod
    def _names_the_type(cls, text: str) -> str:
        return _sentence(text, needs_type=True)

    @field_validator("unchecked")
    @classmethod
    def _plain(cls, text: str) -> str:
        return _sentence(text, needs_type=False)


class Policy(_Strict):
    """A validated policy file (docs/policy.md); `Policy.load()` gives the shipped one, the paper's table."""

    version: int
    unsafe_threshold: float = Field(gt=0.0, le=1.0)
    types: dict[str, bool]
    levels: dict[str, LevelRule]
    responses: Responses

    @field_validator("version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version != POLICY_VERSION:
            raise ValueError(f"policy version {version} is not known; this program reads version {POLICY_VERSION}")
        return version

    @model_validator(mode="after")
    def _complete(self) -> Policy:
        for key, names, wanted in (("types", self.types, RISKY_TYPES), ("levels", self.levels, RISKY_LEVELS)):
            wrong = sorted(set(names) ^ set(wanted))
            if wrong:
                raise ValueError(f"{key}: unknown or missing {', '.join(wrong)}; expected exactly {', '.join(wanted)}")
        return self

    @classmethod
    def load(cls, path: str | Path | None = None) -> Policy:
        """Read a policy file; None: the shipped default. Raises ValueError naming the file and every wrong key."""
        path = DEFAULT_POLICY if path is None else Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"policy {path}: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"policy {path} is not valid YAML: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"policy {path} is not a mapping of keys")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg'].removeprefix('Value error, ')}"
                for item in error.errors()
            )
            raise ValueError(f"policy {path}: {problems}") from error

    @property
    def hash(self) -> str:
        """SHA-256 of the content: comments, key order and spacing do not change it."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def hint(self, safe_type: int | str, safe_level: int | str) -> str | None:
        """The hint for a (type, level), or None where the policy gives none (clean, switched off, another action)."""
        kind, level = type_id(safe_type), level_id(safe_level)
        if kind == CLEAN or level == 0 or not self.types[RISK_TYPES[kind]]:
            return None
        text = self.levels[RISK_LEVELS[level]].hint
        return None if text is None else text.format(type=RISK_TYPES[kind])

    def decide(self, type_probs: Sequence[float], level_probs: Sequence[float]) -> Decision:
        """Decide one request by the fail-closed joint rule.

        Args:
            type_probs: 7 probabilities in the order of RISK_TYPES.
            level_probs: 4 probabilities in the order of RISK_LEVELS.

        The heads need not agree: max(1 - p(clean), 1 - p(none)) >= unsafe_threshold makes the request unsafe. Its type
        is then the likeliest risky type and its level the likeliest of low, medium, high (the higher one if equal).
        Switched off types take their part of the risk with them: what the enabled types keep must itself reach the
        threshold. Probabilities that are not finite are blocked.

        Raises ValueError for a wrong number of probabilities, a negative one, or a sum other than 1.
        """
        types, levels = [float(p) for p in type_probs], [float(p) for p in level_probs]
        if not all(map(math.isfinite, types + levels)):
            rule = "not_finite: the concept head gave no number"
            return Decision("block", None, None, rule, None, response=self.responses.unchecked)
        for name, probs, count in (("type", types, len(RISK_TYPES)), ("level", levels, len(RISK_LEVELS))):
            if len(probs) != count or min(probs) < 0.0 or abs(sum(probs) - 1.0) > 1e-3:
                raise ValueError(f"{name}_probs must be {count} probabilities that sum to 1, not {probs}")

        risky_ids = [type_id(name) for name in RISKY_TYPES]
        enabled = [i for i in risky_ids if self.types[RISK_TYPES[i]]]
        # sums of the risky entries, not 1 - p: a small risk keeps its digits, which a ranking by score needs
        by_type, by_level = sum(types[i] for i in risky_ids), sum(levels[1:])
        score = max(by_type, by_level)
        level = max(range(1, len(levels)), key=lambda i: (levels[i], i))
        if score < self.unsafe_threshold:
            return Decision("allow", CLEAN, 0, "clean", score)

        enabled_by_type = sum(types[i] for i in enabled)
        share = enabled_by_type / by_type if by_type > 0.0 else float(bool(enabled))
        if not enabled or max(enabled_by_type, by_level * share) < self.unsafe_threshold:
            off = max((i for i in risky_ids if i not in enabled), key=lambda i: types[i])
            return Decision("allow", off, level, f"type_off: {RISK_TYPES[off]} is switched off", score)

        kind = max(enabled, key=lambda i: types[i])
        unsafe_heads = [name for name, p in (("type", by_type), ("level", by_level)) if p >= self.unsafe_threshold]
        rule = f"{RISK_LEVELS[level]}: unsafe by {' and '.join(unsafe_heads)}"
        action = self.levels[RISK_LEVELS[level]].action
        hint = self.hint(kind, level) if action == "hint" else None
        response: str | None = None
        if action in ("refuse", "block"):
            response = getattr(self.responses, action).format(type=RISK_TYPES[kind])
        return Decision(action, kind, level, rule, score, hint, response)
