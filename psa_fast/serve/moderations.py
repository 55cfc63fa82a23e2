"""`/v1/moderations` in the schema of OpenAI's omni models, with our risk types as further categories."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from psa_fast.data.records import IMAGE_MARK, Turn
from psa_fast.files import shorten
from psa_fast.safety.request import Request
from psa_fast.safety.verdict import Verdict
from psa_fast.serve.chat_completions import check_model
from psa_fast.serve.settings import ServerSettings
from psa_fast.serve.wire_content import Content, checked, only
from psa_fast.serve.wire_errors import ApiError, bad
from psa_fast.taxonomy import PSA
from psa_fast.taxonomy.heads import Taxonomy

#: OpenAI's categories, and the risk type that one of them is filled from
STANDARD: dict[str, str | None] = {
    "harassment": "insults and bullying",
    "harassment/threatening": None,
    "hate": "fairness",
    "hate/threatening": None,
    "illicit": "illegal risk",
    "illicit/violent": None,
    "self-harm": None,
    "self-harm/intent": None,
    "self-harm/instructions": None,
    "sexual": None,
    "sexual/minors": None,
    "violence": None,
    "violence/graphic": None,
}


def categories(taxonomy: Taxonomy) -> dict[str, str | None]:
    """OpenAI's categories, which are filled for PSA's own types alone, and NAME/TYPE for each risk of the taxonomy."""
    standard = STANDARD if taxonomy == PSA else dict.fromkeys(STANDARD)
    return standard | {f"{taxonomy.name}/{kind.replace(' ', '-')}": kind for kind in taxonomy.risks}


def read_moderation(body: dict[str, Any], settings: ServerSettings) -> list[Request]:
    """The requests of a moderation: one for each text of a list, one for a list of parts. Raises ApiError."""
    only(body, ("model", "input"), "")
    check_model(body, settings, required=False)
    given = body.get("input")
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list) or not given:
        raise bad(f"input is {shorten(given, 40)}; expected a text, a list of texts or a list of parts", "input")
    if not all(isinstance(item, str) for item in given):
        content = Content(settings, [])
        return [checked([Turn("user", content.parts(given, "input"))], content.images, "input")]
    if len(given) > settings.max_inputs:
        raise bad(f"input holds {len(given)} texts, more than {settings.max_inputs}", "input")
    texts = [Content(settings, []).text(text, f"input[{number}]") for number, text in enumerate(given)]
    return [checked([Turn("user", text)], (), f"input[{number}]") for number, text in enumerate(texts)]


def moderation(
    requests: Sequence[Request],
    verdicts: Sequence[Verdict],
    reads_words: bool,
    settings: ServerSettings,
    taxonomy: Taxonomy = PSA,
) -> dict[str, Any]:
    """The reply. `reads_words` tells whether the concept head asks with the request's words.

    Raises ApiError where a request was not read: a score of 0 would call it safe.
    """
    pairs = zip(requests, verdicts, strict=True)
    named = categories(taxonomy)
    results = [_result(request, verdict, reads_words, named) for request, verdict in pairs]
    return {"id": f"modr-{uuid.uuid4().hex}", "model": settings.model_name, "results": results}


def _result(request: Request, verdict: Verdict, reads_words: bool, named: dict[str, str | None]) -> dict[str, Any]:
    require_read(verdict)
    probs = verdict.type_probs or {}
    looked_at = input_types(request, reads_words)
    return {
        "flagged": verdict.unsafe,
        "categories": {name: verdict.unsafe and kind == verdict.type for name, kind in named.items() if kind}
        | {name: False for name, kind in named.items() if not kind},
        "category_scores": {name: probs[kind] if kind else 0.0 for name, kind in named.items()},
        # OpenAI's schema knows text alone for those of its categories that we fill
        "category_applied_input_types": {
            name: [] if kind is None else [one for one in looked_at if name not in STANDARD or one == "text"]
            for name, kind in named.items()
        },
        "psa": verdict.to_json(),
    }


def require_read(verdict: Verdict) -> None:
    """Raise ApiError for a verdict without a number: 500 where the head gave none, 400 where nothing was read."""
    if verdict.code == "not_finite":
        raise ApiError(500, "the concept head gave no number for this input", "server_error", code="not_finite")
    if not verdict.checked:
        raise bad(f"the input was not read: {verdict.error or verdict.rule}", "input", verdict.code)


def input_types(request: Request, reads_words: bool) -> list[str]:
    """What of a request was looked at: "text", "image"."""
    words = reads_words and any(turn.text.replace(IMAGE_MARK, "").strip() for turn in request.turns)
    return [name for name, there in (("text", words), ("image", request.images)) if there]
