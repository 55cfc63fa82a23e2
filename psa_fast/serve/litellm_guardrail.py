"""LiteLLM's generic guardrail: the policy in front of any model, `/beta/litellm_basic_guardrail_api`."""

from __future__ import annotations

from typing import Any

from psa_fast.data.records import Turn
from psa_fast.files import shorten
from psa_fast.safety.policy import Policy
from psa_fast.safety.request import Request
from psa_fast.safety.verdict import Verdict
from psa_fast.serve.settings import ServerSettings
from psa_fast.serve.wire_content import Content, checked
from psa_fast.serve.wire_errors import bad


def read_guardrail(body: dict[str, Any], settings: ServerSettings) -> Request:
    """The request of a guardrail call: all its texts and images as one user's turn, images first.

    What says nothing of the request (who asks, LiteLLM's version, its own headers) is not read. Raises ApiError for
    what the concept head cannot read: answers, tools.
    """
    kind = body.get("input_type")
    if kind != "request":
        raise bad(
            f"input_type is {shorten(kind, 40)}; requests are read, answers are not: use mode: pre_call", "input_type"
        )
    for key in ("tools", "tool_calls"):
        if body.get(key):
            raise bad(f"{key} cannot be read by the concept head, so such a request is not let through", key)
    lists = {}
    for key in ("texts", "images"):
        lists[key] = body.get(key) or []
        if not isinstance(lists[key], list):
            raise bad(f"{key} is {shorten(lists[key], 40)}; expected a list", key)
    told = _pictures_in(body.get("structured_messages"))
    if told > len(lists["images"]):  # the proxy handed on the words and dropped a picture, a file or a sound
        raise bad(
            f"structured_messages holds {told} parts that are no text, but {len(lists['images'])} images came; "
            "what cannot be read is not let through",
            "structured_messages",
        )
    content = Content(settings, [])
    pieces = [content.raw_image(image, f"images[{number}]") for number, image in enumerate(lists["images"])]
    pieces += [content.text(text, f"texts[{number}]") for number, text in enumerate(lists["texts"])]
    return checked([Turn("user", "\n".join(pieces))], content.images, "texts")


def _pictures_in(messages: Any) -> int:
    """How many parts of the chat's messages are not text. Raises ApiError for what are no messages."""
    if not isinstance(messages, list | None) or not all(isinstance(message, dict) for message in messages or []):
        raise bad(f"structured_messages is {shorten(messages, 40)}; expected a list of messages", "structured_messages")
    contents = [message.get("content") for message in messages or []]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(not isinstance(part, dict) or part.get("type") != "text" for part in parts)


def guardrail(body: dict[str, Any], verdict: Verdict, policy: Policy) -> dict[str, Any]:
    """The reply: BLOCKED, NONE, or GUARDRAIL_INTERVENED with the policy's hint put before the last text."""
    if verdict.error is not None:  # a fault of the request, which the client should see as one
        raise bad(verdict.error, "texts", verdict.code)
    texts = body.get("texts") or []
    psa = {"psa": verdict.to_json()}
    if verdict.action in ("refuse", "block") or (verdict.hint is not None and not texts):
        return {"action": "BLOCKED", "blocked_reason": blocked_reason(verdict, policy)} | psa
    if verdict.hint is not None:
        hinted = [*texts[:-1], f"{verdict.hint}\n{texts[-1]}"]
        return {"action": "GUARDRAIL_INTERVENED", "texts": hinted, "images": body.get("images") or []} | psa
    return {"action": "NONE"} | psa


def blocked_reason(verdict: Verdict, policy: Policy) -> str:
    """The words of the policy for a request that is not let through."""
    if verdict.type is None:
        return policy.responses.unchecked
    words = policy.responses.block if verdict.action == "block" else policy.responses.refuse
    return words.format(type=verdict.type)
