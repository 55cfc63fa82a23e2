"""The safety policy: (type, level) probabilities of the concept head -> allow, hint, refuse or block."""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from psa_fast.files import read_yaml, shorten, unwritable_text
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.crosswalk import SHIPPED, read_taxonomy
from psa_fast.taxonomy.heads import Taxonomy, require_same

DEFAULT_POLICY = Path(__file__).with_name("policy.yaml")
POLICY_VERSION = 1
MAX_FAULTS = 10  # faults of a file that its message names
Action = Literal["allow", "hint", "refuse", "block"]
# the actions from the mildest to the strictest
ACTIONS: tuple[Action, ...] = ("allow", "hint", "refuse", "block")
# why an action was taken. Read by the head: clean, unsafe, accumulated (over several turns, none of them enough by
# itself), type_off, not_finite (it gave no number). Not read:
# no_image, no_head (a base without an add-on), not_checked (the request cannot be read, see `Verdict.error`)
Code = Literal["clean", "unsafe", "accumulated", "type_off", "not_finite", "no_image", "no_head", "not_checked"]
RISKY_TYPES = PSA.risks
RISKY_LEVELS = PSA.levels[1:]
_SHA256 = r"^[0-9a-f]{64}$"


@dataclass(frozen=True)
class Decision:
    """What the policy does with one request, and why: `code` for programs, `rule` as a sentence.

    `type` and `level` are ids of the taxonomy (None: the probabilities could not be read). `hint` is set for the action
    "hint" only, `response` for "refuse" and "block" only. `unsafe_score` is before any switch (None: not a number).
    `accumulated` is the risk over the user's turns, where the policy has a memory and there are several.
    """

    action: Action
    type: int | None
    level: int | None
    rule: str
    unsafe_score: float | None
    hint: str | None = None
    response: str | None = None
    accumulated: float | None = None
    code: Code = field(kw_only=True)

    @property
    def unsafe(self) -> bool:
        """Whether the request was read as unsafe and not switched off; true for an unreadable one."""
        return self.code in ("unsafe", "accumulated", "not_finite", "not_checked")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _sentence(text: str, needs_type: bool) -> str:
    """`text`, checked: `{type}` is its only field, written so and in no other way that `str.format` knows."""
    try:
        fields = [part[1:] for part in string.Formatter().parse(text) if part[1] is not None]
    except ValueError:  # a brace without its partner
        fields = [("{", "", None)]
    if any(found != ("type", "", None) for found in fields):
        raise ValueError(f"{shorten(text)} may hold the placeholder {{type}} and no other; {{{{ and }}}} are braces")
    if needs_type and not fields:
        raise ValueError(f"{shorten(text)} does not name the risk: write {{type}} where its name belongs")
    if not text.strip():
        raise ValueError("the text is empty")
    if wrong := unwritable_text(text):
        raise ValueError(f"{wrong}, which is no text")
    return text


def _key(key: int | str) -> str:
    """A key of the file as a message shows it."""
    text = str(key)
    return text if text.isprintable() and len(text) <= 30 else shorten(text, 30)


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


class Calibration(_Strict):
    """What `psa-fast calibrate` fitted to one add-on: a temperature for each head, and what the thresholds promise.

    With `confidence` at most a share `over_refusal` of harmless requests like the `rows` of the data is flagged.
    """

    type_temperature: float = Field(gt=0.0, allow_inf_nan=False)
    level_temperature: float = Field(gt=0.0, allow_inf_nan=False)
    over_refusal: float = Field(gt=0.0, lt=1.0)
    confidence: float = Field(gt=0.0, lt=1.0)
    rows: int = Field(ge=1)
    data_sha256: str = Field(pattern=_SHA256)
    addon_sha256: str = Field(pattern=_SHA256)
    #: add-ons whose concept head reads the same, as a stage 2 that leaves it alone has it from its stage 1
    same_head_sha256: list[Annotated[str, Field(pattern=_SHA256)]] = []

    @property
    def promise(self) -> str:
        """What the thresholds promise, as a sentence without its full stop."""
        return (
            f"with {self.confidence:.10g} confidence at most {self.over_refusal:g} of harmless requests like the "
            f"{self.rows} of the data are flagged"
        )


class Memory(_Strict):
    """Risk in words that adds up over the user's turns, each of which is below every threshold by itself.

    Every turn multiplies what the turns before it left by `decay` and adds its own unsafe score; from `threshold` on
    the request is unsafe, of `level`.
    """

    decay: float = Field(ge=0.0, le=1.0)
    threshold: float = Field(gt=0.0, allow_inf_nan=False)
    level: str


class Policy(_Strict):
    """A validated policy file (docs/policy.md); `Policy.load()` gives the shipped one, the paper's table."""

    version: int
    unsafe_threshold: float = Field(gt=0.0, le=1.0)
    types: dict[str, bool]
    levels: dict[str, LevelRule]
    responses: Responses
    on_error: Literal["block", "allow"] = "block"
    type_thresholds: dict[str, Annotated[float, Field(gt=0.0, le=1.0)]] | None = None
    calibration: Calibration | None = None
    memory: Memory | None = None
    taxonomy: Taxonomy = Field(default=PSA, exclude=True)

    @field_validator("taxonomy", mode="before")
    @classmethod
    def _known_taxonomy(cls, value: Any) -> Taxonomy:
        if isinstance(value, Taxonomy):
            return value
        if isinstance(value, str):
            if value not in SHIPPED:
                raise ValueError(f"{shorten(value)} is none of: {', '.join(SHIPPED)}; another one stands here itself")
            return read_taxonomy(value)
        return Taxonomy.from_json(value)

    @field_validator("version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version != POLICY_VERSION:
            raise ValueError(f"version {shorten(version)} is not known; this program reads version {POLICY_VERSION}")
        return version

    @model_validator(mode="after")
    def _complete(self) -> Policy:
        if self.memory is not None and self.calibration is not None:
            raise ValueError("memory: it flags more requests than a calibration promises; leave it or that out")
        if self.memory is not None and self.memory.level not in self.taxonomy.levels[1:]:
            known = ", ".join(self.taxonomy.levels[1:])
            raise ValueError(f"memory.level is {shorten(self.memory.level, 30)}; expected one of: {known}")
        tables: list[tuple[str, Mapping[str, Any], tuple[str, ...]]] = [
            ("types", self.types, self.taxonomy.risks),
            ("levels", self.levels, self.taxonomy.levels[1:]),
        ]
        if self.type_thresholds is not None:
            tables.append(("type_thresholds", self.type_thresholds, self.taxonomy.risks))
        for key, names, wanted in tables:
            unknown = [shorten(name, 30) for name in sorted(set(names) - set(wanted))]
            wrong = [*unknown[:MAX_FAULTS], *sorted(set(wanted) - set(names))]
            if wrong:
                raise ValueError(f"{key}: unknown or missing {', '.join(wrong)}; expected exactly {', '.join(wanted)}")
        return self

    @classmethod
    def load(cls, path: str | Path | None = None) -> Policy:
        """Read a policy file; None: the shipped default. Raises ValueError naming the file and every wrong key."""
        path = DEFAULT_POLICY if path is None else Path(path)
        try:
            return cls.model_validate(read_yaml(path, "policy"))
        except ValidationError as error:
            faults = [
                f"{'.'.join(_key(key) for key in item['loc']) or 'file'}: {item['msg'].removeprefix('Value error, ')}"
                for item in error.errors(include_input=False, include_context=False)
            ]
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise ValueError(f"policy {path}: {'; '.join(faults[:MAX_FAULTS])}{more}")

    @property
    def hash(self) -> str:
        """SHA-256 of the content: comments, key order and spacing do not change it."""
        values = self.model_dump()
        if self.taxonomy != PSA:
            values["taxonomy"] = self.taxonomy.to_json()
        for name in ("on_error", "type_thresholds", "calibration", "memory"):
            if values[name] == type(self).model_fields[name].default:  # what a file without the key means
                del values[name]
        if self.calibration is not None and not self.calibration.same_head_sha256:
            del values["calibration"]["same_head_sha256"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def temperatures(self) -> tuple[float, float]:
        """What the logits of the type and of the level head are divided by before they become probabilities."""
        fitted = self.calibration
        return (1.0, 1.0) if fitted is None else (fitted.type_temperature, fitted.level_temperature)

    def threshold(self, safe_type: int) -> float:
        """The unsafe score from which on a request is unsafe whose likeliest risk is the type, by its id."""
        given = self.type_thresholds
        return self.unsafe_threshold if given is None else given[self.taxonomy.types[safe_type]]

    def require_taxonomy(self, taxonomy: Taxonomy, whose: str) -> None:
        """Raise ValueError, with what to do, if the policy is of another taxonomy than `whose`, in words."""
        advice = "a policy names its taxonomy, types and levels; docs/taxonomies.md has one to start from"
        require_same(taxonomy, self.taxonomy, whose, "the policy", advice)

    @property
    def enabled(self) -> list[int]:
        """Ids of the risk types that are on."""
        return [i for i, name in enumerate(self.taxonomy.types) if self.types.get(name)]

    @property
    def _risky_ids(self) -> list[int]:
        return [i for i, name in enumerate(self.taxonomy.types) if name in self.taxonomy.risks]

    def likeliest_risk(self, type_probs: Sequence[float]) -> int:
        """The id of the likeliest risk type that is on (of all, if none is), whose threshold and name count."""
        return max(self.enabled or self._risky_ids, key=lambda i: type_probs[i])

    def require_model(self, model_hash: str | None) -> None:
        """Raise ValueError if the policy was calibrated, and not for the add-on of this hash: its promise is void.

        None stands for a model whose add-on is not known.
        """
        if self.calibration is None:
            return
        if model_hash in (self.calibration.addon_sha256, *self.calibration.same_head_sha256):
            return
        which = "a model without a model_hash" if model_hash is None else f"the add-on of sha256 {model_hash}"
        raise ValueError(
            f"the policy was calibrated on the add-on of sha256 {self.calibration.addon_sha256}; its temperatures and "
            f"thresholds mean nothing for {which}: calibrate a policy for that one, or give one without calibration"
        )

    def hint(self, safe_type: int | str, safe_level: int | str) -> str | None:
        """The hint for a (type, level), or None where the policy gives none (clean, switched off, another action)."""
        names, levels = self.taxonomy.types, self.taxonomy.levels
        kind, level = self.taxonomy.type_id(safe_type), self.taxonomy.level_id(safe_level)
        if kind == self.taxonomy.harmless or level == 0 or not self.types[names[kind]]:
            return None
        text = self.levels[levels[level]].hint
        return None if text is None else text.format(type=names[kind])

    def decide(self, type_probs: Sequence[float], level_probs: Sequence[float]) -> Decision:
        """Decide one request by the fail-closed joint rule.

        Args:
            type_probs: a probability of each type, in the taxonomy's order (PSA: 7).
            level_probs: one of each level (PSA: 4).

        The heads need not agree: max(1 - p(clean), 1 - p(none)) >= threshold makes the request unsafe, which is that of
        the likeliest risky type. Its type is then that type and its level the likeliest but none (the
        higher one if equal).
        Switched off types take their part of the risk with them: what the enabled types keep must itself reach the
        threshold. Probabilities that are not finite are blocked.

        Raises ValueError for a wrong number of probabilities, a negative one, or a sum other than 1.
        """
        types, levels = [float(p) for p in type_probs], [float(p) for p in level_probs]
        names, grades, harmless = self.taxonomy.types, self.taxonomy.levels, self.taxonomy.harmless
        if not all(map(math.isfinite, types + levels)):
            rule = "not_finite: the concept head gave no number"
            return Decision("block", None, None, rule, None, response=self.responses.unchecked, code="not_finite")
        for head, probs, count in (("type", types, len(names)), ("level", levels, len(grades))):
            if len(probs) != count or min(probs) < 0.0 or abs(sum(probs) - 1.0) > 1e-3:
                raise ValueError(f"{head}_probs must be {count} probabilities that sum to 1, not {shorten(probs)}")

        risky_ids = self._risky_ids
        enabled = self.enabled
        # sums of the risky entries, not 1 - p: a small risk keeps its digits, which a ranking by score needs
        by_type, by_level = sum(types[i] for i in risky_ids), sum(levels[1:])
        score = max(by_type, by_level)
        level = max(range(1, len(levels)), key=lambda i: (levels[i], i))
        kind = self.likeliest_risk(types)
        threshold = self.threshold(kind)
        if score < threshold:
            return Decision("allow", harmless, 0, "clean", score, code="clean")

        if not enabled or self.kept_risk(types, levels) < threshold:
            off = max((i for i in risky_ids if i not in enabled), key=lambda i: types[i])
            return Decision("allow", off, level, f"type_off: {names[off]} is switched off", score, code="type_off")

        unsafe_heads = [name for name, p in (("type", by_type), ("level", by_level)) if p >= threshold]
        rule = f"{grades[level]}: unsafe by {' and '.join(unsafe_heads)}"
        return self._unsafe(kind, level, rule, score, "unsafe")

    def decide_over_turns(
        self, turns: Sequence[tuple[Sequence[float], Sequence[float]]]
    ) -> tuple[int, Decision] | None:
        """Decide on what the user's turns add up to (see `Memory`), given their type and level probabilities in order.

        Returns the turn that adds the most, from 0, and a decision, whose `accumulated` is the risk; None without a
        memory, for fewer than two turns, and where one is not a number.
        """
        finite = all(math.isfinite(p) for types, levels in turns for p in (*types, *levels))
        if self.memory is None or len(turns) < 2 or not finite:
            return None
        kept = [self.kept_risk(*turn) for turn in turns]
        parts = [score * self.memory.decay ** (len(kept) - 1 - place) for place, score in enumerate(kept)]
        total = sum(parts)
        most = max(range(len(parts)), key=lambda place: parts[place])
        if not self.enabled or total < self.memory.threshold:
            return most, Decision(
                "allow", self.taxonomy.harmless, 0, "clean", kept[most], accumulated=total, code="clean"
            )
        kind, level = self.likeliest_risk(turns[most][0]), self.taxonomy.level_id(self.memory.level)
        rule = f"{self.memory.level}: unsafe by what {len(turns)} turns add up to"
        return most, replace(self._unsafe(kind, level, rule, kept[most], "accumulated"), accumulated=total)

    def kept_risk(self, types: Sequence[float], levels: Sequence[float]) -> float:
        """The unsafe score of what the types keep that are on: by type, or as their share of the level head's risk."""
        by_type = sum(types[i] for i in self._risky_ids)
        kept = sum(types[i] for i in self.enabled)
        share = kept / by_type if by_type > 0.0 else float(bool(self.enabled))
        return max(kept, sum(levels[1:]) * share)

    def _unsafe(self, kind: int, level: int, rule: str, score: float, code: Code) -> Decision:
        """The decision of a level's action."""
        action = self.levels[self.taxonomy.levels[level]].action
        hint = self.hint(kind, level) if action == "hint" else None
        response: str | None = None
        if action in ("refuse", "block"):
            response = getattr(self.responses, action).format(type=self.taxonomy.types[kind])
        return Decision(action, kind, level, rule, score, hint, response, code=code)


def require_policy(policy: Policy | None) -> None:
    """Raise ValueError for what is neither a Policy nor None: the name of a policy's file, say."""
    if policy is not None and not isinstance(policy, Policy):
        raise ValueError(f"policy is {shorten(policy)}; expected a Policy, which Policy.load reads from a file")
