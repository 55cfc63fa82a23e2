"""Answers written by a vLLM server that has the exported model: messages as chat, the picture as image embedding.

The contract, as vLLM's documentation has it ("Multimodal Inputs", embedding inputs, read in November 2026; not tried):
`POST /v1/chat/completions` of `vllm serve MERGED --enable-mm-embeds`, with a part `{"type": "image_embeds",
"image_embeds": BASE64}` in one message, BASE64 being what torch.save writes of a tensor [1, rows, E], and as many
placeholders made of the picture as it has rows. `stop_token_ids` and `add_special_tokens` are vLLM's own parameters.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, cast

import torch

from psa_fast.data.template import ChatTemplate, stop_token_ids
from psa_fast.files import parse_json, shorten
from psa_fast.safety.guard import Guard
from psa_fast.safety.writing import Generated, Job
from psa_fast.serve.wire_errors import ApiError, EngineDown

LONGEST_REPLY = 1 << 22  # bytes


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take key and picture to wherever the reply says."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class VllmEngine:
    """A `psa_fast.safety.writing.Writer`.

    Args:
        guard: whose model makes the pictures' rows.
        url: up to and including /v1.
        model: the name that the engine knows the exported model by.
        key: sent as bearer token; None: none.
        timeout: seconds for an answer.

    Raises:
        ValueError: the URL is none of http or https, the key cannot be sent, or the base's pictures differ in their
            tokens.
    """

    def __init__(self, guard: Guard, url: str, model: str, key: str | None = None, timeout: float = 120.0) -> None:
        check_engine(url, key)
        self.psa = cast(Any, guard.model)
        if self.psa.config.image_tokens is None:
            raise ValueError("--engine: a base whose pictures differ in their tokens is not supported (LLaVA is)")
        self.url, self.model, self._key, self.timeout = url.rstrip("/"), model, key, timeout
        self.template, self.stop_ids = ChatTemplate(guard.processor), stop_token_ids(guard.processor)
        # the engine is reached directly, whatever proxy the environment names
        self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))

    def write(self, jobs: Sequence[Job], features: Any, max_new_tokens: int) -> list[Generated]:
        """One answer for each job, all asked at once.

        Raises:
            EngineDown: the engine cannot be reached, fails, or is late.
            ApiError: 502, it refuses a request, or its reply is none to the prompt that was meant.
        """
        bodies = [self.body(job, features, max_new_tokens) for job in jobs]
        with ThreadPoolExecutor(len(jobs)) as pool:
            replies = list(pool.map(self._send, bodies))
        return [read_reply(reply, len(job.prompt.input_ids)) for reply, job in zip(replies, jobs, strict=True)]

    def body(self, job: Job, features: Any, max_new_tokens: int) -> dict[str, Any]:
        """The JSON of one request. Raises ApiError, 400, for more pictures than one."""
        if len(job.images) > 1:
            raise ApiError(400, "the engine behind this server takes one picture a request", code="too_many_images")
        messages = self.template.messages(job.turns, job.hint)
        for message in messages:
            for place, part in enumerate(message["content"]):
                if part["type"] == "image":
                    rows = self.psa.image_rows(features.take(job.images))
                    message["content"][place] = {"type": "image_embeds", "image_embeds": encoded(rows)}
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "stop_token_ids": self.stop_ids,
            "add_special_tokens": self.template.adds_prefix(job.turns, job.hint),
        }

    def _send(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                found: bytes = response.read(LONGEST_REPLY + 1)
        except urllib.error.HTTPError as error:
            said = ""
            with error, suppress(OSError, http.client.HTTPException):  # what it says is a courtesy
                said = error.read(300).decode("utf-8", "replace")
            if error.code >= 500 or error.code in (401, 403, 404, 429):
                raise EngineDown(f"status {error.code}") from None
            raise _unusable(f"status {error.code}: {shorten(said)}") from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineDown(f"no connection: {shorten(str(error))}") from None
        if len(found) > LONGEST_REPLY:
            raise _unusable(f"its reply has more than {LONGEST_REPLY} bytes")
        return found


def check_engine(url: str, key: str | None) -> None:
    """Raise ValueError for an address or key that cannot be used."""
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # looked at on use alone
    except ValueError as error:
        raise ValueError(f"--engine {shorten(url)}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--engine {shorten(url)}: expected http://HOST:PORT/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("--engine: leave out user, password, query and fragment; a key is in PSA_FAST_ENGINE_KEY")
    if key and not (key.isascii() and key.isprintable()):
        raise ValueError("PSA_FAST_ENGINE_KEY holds a character that no header can, a line's end for one")


def encoded(rows: torch.Tensor) -> str:
    """Rows [1, S0 + S, E] as vLLM reads them: base64 of what torch.save writes."""
    stream = io.BytesIO()
    torch.save(rows.detach().cpu().clone(), stream)  # a view would be saved with all that it is a view of
    return base64.b64encode(stream.getvalue()).decode()


def read_reply(data: bytes, prompt_tokens: int) -> Generated:
    """The answer in a reply.

    Raises:
        ApiError: 502, it is none, or to a prompt of another length: another model, template or picture.
    """
    try:
        reply: Any = parse_json(data.decode())
        choice, used = reply["choices"][0], reply["usage"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        read, new = used["prompt_tokens"], used["completion_tokens"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise _unusable("its reply is no chat completion") from None
    if not isinstance(text, str) or reason not in ("stop", "length") or type(read) is not int or type(new) is not int:
        raise _unusable("its reply is no finished text")
    if read != prompt_tokens:
        raise _unusable(
            f"it read {shorten(read)} tokens where the prompt has {prompt_tokens}: is it the exported model?"
        )
    return Generated(text.strip(), read, new, reason == "stop")


def _unusable(reason: str) -> ApiError:
    return ApiError(502, f"the engine's answer cannot be used ({reason})", "server_error", code="engine_failed")
