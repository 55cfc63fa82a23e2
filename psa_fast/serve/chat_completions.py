"""`/v1/chat/completions`: what of OpenAI's parameters is taken, and the reply, whole or as server-sent events."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from psa_fast.files import shorten
from psa_fast.safety.explanation import Explanation
from psa_fast.safety.intervention import Intervention
from psa_fast.safety.overlay import explanation_svg
from psa_fast.safety.request import Request
from psa_fast.safety.verdict import Answer
from psa_fast.serve.settings import ServerSettings
from psa_fast.serve.wire_content import conversation, only
from psa_fast.serve.wire_errors import ApiError, bad

#: parameters that must say what is done anyway: answers are greedy, one, of plain text
FIXED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "temperature": (0,),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "store": (False,),
    "stop": ([],),
    "tools": ([],),
    "functions": ([],),
    "logit_bias": ({},),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
}
#: parameters that cannot change an answer: who asks, and the seed of a choice that is never made
HARMLESS = ("user", "metadata", "seed", "safety_identifier", "prompt_cache_key")
READ = ("model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "psa")


@dataclass(frozen=True)
class ChatCall:
    """A chat request that can be asked.

    `explain` asks for an explanation with the verdict; an intervention is in the request. Who may have them is not
    looked at here.
    """

    request: Request
    new_tokens: int
    stream: bool
    stream_usage: bool
    explain: bool = False


def read_chat(body: dict[str, Any], settings: ServerSettings) -> ChatCall:
    """Read the body of a chat request. Raises ApiError for everything that would be passed over or cannot be done."""
    for key, value in body.items():
        if key in READ or key in HARMLESS or value is None:
            continue
        if key not in FIXED:
            raise bad(f"{shorten(key)} is not known here, and nothing is passed over", key[:80], "unknown_parameter")
        # True == 1, but no client means it so
        if not any(value == taken and isinstance(value, bool) == isinstance(taken, bool) for taken in FIXED[key]):
            known = " or ".join(json.dumps(taken) for taken in FIXED[key])
            raise bad(
                f"{key} is {shorten(value, 40)}; only {known} is known here: answers are greedy, one, of plain text",
                key,
                "unsupported_value",
            )
    check_model(body, settings)
    stream = _flag(body, "stream")
    options = body.get("stream_options")
    if options is not None and not (stream and isinstance(options, dict) and set(options) <= {"include_usage"}):
        raise bad("stream_options goes with stream and holds include_usage alone", "stream_options")
    explain, intervention = _operator_options(body.get("psa"))
    return ChatCall(
        replace(conversation(body.get("messages"), settings), intervention=intervention),
        _new_tokens(body, settings),
        stream,
        _flag(options or {}, "include_usage"),
        explain,
    )


def _operator_options(given: Any) -> tuple[bool, Intervention | None]:
    """What `psa` asks for: {"explain": true, "intervene": {...}}. Raises ApiError for anything else."""
    if given is None:
        return False, None
    if not isinstance(given, dict):
        raise bad(f"psa is {shorten(given, 40)}; expected an object", "psa")
    only(given, ("explain", "intervene"), "psa")
    explain = _flag(given, "explain", "psa.")
    if given.get("intervene") is None:
        return explain, None
    try:
        return explain, Intervention.from_json(given["intervene"])
    except ValueError as error:
        raise bad(f"psa.intervene: {error}", "psa.intervene") from None


def check_model(body: dict[str, Any], settings: ServerSettings, required: bool = True) -> None:
    """Raise ApiError, 404 as OpenAI does, for a model that is not the one served."""
    model = body.get("model")
    if model is None and not required:
        return
    if model != settings.model_name:
        message = f"the model {shorten(model, 60)} does not exist; {settings.model_name!r} is served"
        raise ApiError(404, message, param="model", code="model_not_found")


def _flag(body: dict[str, Any], key: str, within: str = "") -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise bad(f"{within}{key} is {shorten(value, 40)}; expected true or false", within + key)
    return bool(value)


def _new_tokens(body: dict[str, Any], settings: ServerSettings) -> int:
    given = {key: body[key] for key in ("max_tokens", "max_completion_tokens") if body.get(key) is not None}
    if len(given) == 2:
        raise bad("max_tokens and max_completion_tokens are the same; give one", "max_tokens")
    for key, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= settings.max_new_tokens:
            raise bad(f"{key} is {shorten(value, 40)}; expected 1 to {settings.max_new_tokens}", key)
        return value
    return settings.max_new_tokens


def finish_reason(answer: Answer) -> str:
    """Why the answer ends where it does: the policy's own words are "content_filter"."""
    if answer.verdict.applied and answer.verdict.action in ("refuse", "block"):
        return "content_filter"
    return "stop" if answer.complete else "length"


def usage(answer: Answer) -> dict[str, int]:
    """The tokens of a request and its answer; none where the language model was not asked."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.new_tokens,
        "total_tokens": answer.prompt_tokens + answer.new_tokens,
    }


def completion(answer: Answer, settings: ServerSettings, explanation: Explanation | None = None) -> dict[str, Any]:
    """The reply to a request that is not streamed."""
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(answer)}
    return _head("chat.completion", settings) | {
        "choices": [choice],
        "usage": usage(answer),
        "psa": _psa(answer, explanation),
    }


def _psa(answer: Answer, explanation: Explanation | None) -> dict[str, Any]:
    """The verdict, and where one was asked for its explanation, with the picture of it as SVG."""
    verdict = answer.verdict.to_json()
    if explanation is None:
        return verdict
    told = explanation.to_json(cells=False)
    del told["verdict"]
    return verdict | {"explanation": told | {"lines": explanation.lines(), "svg": explanation_svg(explanation)}}


def events(
    answer: Answer, settings: ServerSettings, with_usage: bool, explanation: Explanation | None = None
) -> Iterator[str]:
    """The server-sent events of an answer that is there already, word by word; the verdict comes in the first."""
    head = _head("chat.completion.chunk", settings) | ({"usage": None} if with_usage else {})

    def event(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event(head | {"choices": [choice]} | more)

    yield event({"role": "assistant", "content": ""}, psa=_psa(answer, explanation))
    for piece in re.findall(r"\s*\S+\s*?|\s+", answer.text):
        yield event({"content": piece})
    yield event({}, finish_reason(answer))
    if with_usage:
        yield _event(head | {"choices": [], "usage": usage(answer)})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _head(kind: str, settings: ServerSettings) -> dict[str, Any]:
    made = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
    return made | {"model": settings.model_name}
