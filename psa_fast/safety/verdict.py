"""What the guard hands back: the answer, and the verdict it was given under."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from psa_fast.safety.intervention import Intervention, intervened
from psa_fast.safety.policy import Action, Code, Decision, Policy
from psa_fast.safety.reading import Query, Reading, weigh
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.heads import Taxonomy


@dataclass(frozen=True)
class Verdict:
    """What the concept head read and what the policy did with it; names as in the taxonomy.

    `code` is the reason for programs, `rule` the same as a sentence. `checked` is False where nothing was read: no
    image before an add-on that reads no text, no concept head, or a request that cannot be read at all, which is
    blocked and whose fault is `error`. `applied` is False for unguarded generation: action and hint are what the policy
    would have done. `query` tells which reading decided, and `picture` which picture it was shown alone (from 0; None:
    all of them together); `words_alone` that it was shown none, though the request may have some. For a turn or a
    window `query_number` says which, from 0, and `query_span` its tokens in the prompt, [first, behind last].
    Probabilities and score are that reading's, `highest_score` is the highest of all readings, which a threshold is
    compared with; they are None if not read or not finite. `readings` holds all of them, so that another policy can
    decide on the same (`psa_fast.safety.redecide`). `intervention` is what was done to them by hand before the policy
    decided; `readings` are as they were before it. `accumulated` is the risk that the user's turns add up to, under a
    policy with a memory.
    """

    checked: bool
    applied: bool
    unsafe: bool
    action: Action
    rule: str
    type: str | None = None
    level: str | None = None
    unsafe_score: float | None = None
    highest_score: float | None = None
    type_probs: dict[str, float] | None = None
    level_probs: dict[str, float] | None = None
    hint: str | None = None
    policy_hash: str | None = None
    model_hash: str | None = None
    query: Query | None = None
    query_number: int | None = None
    query_span: tuple[int, int] | None = None
    picture: int | None = None
    words_alone: bool = False
    error: str | None = None
    intervention: Intervention | None = None
    accumulated: float | None = None
    code: Code = field(kw_only=True)
    readings: tuple[Reading, ...] = field(default=(), kw_only=True, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain JSON values, without `readings`."""
        values = asdict(replace(self, readings=()))
        del values["readings"]
        return values


@dataclass(frozen=True)
class Answer:
    """The answer and the verdict it was given under.

    `prompt_tokens` and `new_tokens` count what the language model read and wrote, hint and end included; both are 0
    where it was not asked. `complete` is False for an answer that the limit of new tokens cut.
    """

    text: str
    verdict: Verdict
    prompt_tokens: int = 0
    new_tokens: int = 0
    complete: bool = True


def read_verdict(
    reading: Reading,
    decision: Decision,
    highest_score: float | None = None,
    readings: Sequence[Reading] = (),
    taxonomy: Taxonomy = PSA,
    intervention: Intervention | None = None,
) -> Verdict:
    """The verdict of a request that the concept head has read: by which reading, and what to keep of all of them."""
    finite = decision.unsafe_score is not None
    return Verdict(
        checked=True,
        applied=True,
        unsafe=decision.unsafe,
        action=decision.action,
        rule=decision.rule,
        type=None if decision.type is None else taxonomy.types[decision.type],
        level=None if decision.level is None else taxonomy.levels[decision.level],
        unsafe_score=decision.unsafe_score,
        highest_score=highest_score,
        type_probs=dict(zip(taxonomy.types, reading.type_probs, strict=True)) if finite else None,
        level_probs=dict(zip(taxonomy.levels, reading.level_probs, strict=True)) if finite else None,
        hint=decision.hint,
        query=reading.query,
        query_number=reading.number,
        query_span=reading.span,
        picture=reading.picture,
        words_alone=reading.words_alone,
        intervention=intervention,
        accumulated=decision.accumulated,
        code=decision.code,
        readings=tuple(readings),
    )


def decided(
    policy: Policy, readings: Sequence[Reading], intervention: Intervention | None = None
) -> tuple[Verdict, Decision]:
    """What a policy says to the readings of a request, after an intervention where there is one."""
    weighed = weigh(policy, intervened(intervention, readings))
    return read_verdict(*weighed, readings, policy.taxonomy, intervention), weighed.decision


def as_applied(verdict: Verdict, decision: Decision) -> Verdict:
    """The verdict of a guarded answer: nothing was applied to a request that was let through unread."""
    return replace(verdict, applied=verdict.checked or decision.response is not None)


_UNREAD: dict[Literal["no_image", "no_head"], str] = {
    "no_image": "the concept head was not trained to read requests without an image",
    "no_head": "the model has no concept head",
}


def unread_verdict(code: Literal["no_image", "no_head"], action: Literal["allow", "block"] = "allow") -> Verdict:
    """The verdict of a request that the concept head does not read; `action` is what the policy says to that."""
    return Verdict(False, False, False, action, f"unchecked: {_UNREAD[code]}", code=code)


def refusing_verdict(number: int, error: str) -> Verdict:
    """The verdict of a request that cannot be read; `number` is its place in the caller's list, from 0."""
    rule = f"not_checked: request {number}: {error}"
    return Verdict(False, True, True, "block", rule, error=error, code="not_checked")
