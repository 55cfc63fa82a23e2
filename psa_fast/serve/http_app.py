"""The HTTP server's routes: each reads a body, asks the batcher, and writes a reply in somebody's schema."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from psa_fast.files import parse_json, shorten
from psa_fast.safety.guard import Guard
from psa_fast.safety.plain import PlainVLM
from psa_fast.safety.policy import Policy
from psa_fast.safety.reading import require_turns
from psa_fast.safety.request import Request
from psa_fast.safety.verdict import Verdict
from psa_fast.serve.api_keys import ApiKeys
from psa_fast.serve.audit_log import AuditLog, audit_row
from psa_fast.serve.batcher import Batcher, Result
from psa_fast.serve.chat_completions import ChatCall, completion, events, read_chat
from psa_fast.serve.litellm_guardrail import guardrail, read_guardrail
from psa_fast.serve.moderations import moderation, read_moderation
from psa_fast.serve.page import add_page
from psa_fast.serve.server_metrics import ServerMetrics
from psa_fast.serve.settings import ServerSettings
from psa_fast.serve.wire_errors import ApiError, bad

_log = logging.getLogger("psa_fast.serve")
CHAT, MODERATIONS = "/v1/chat/completions", "/v1/moderations"
GUARDRAIL = "/beta/litellm_basic_guardrail_api"
Read = Callable[[dict[str, Any], ServerSettings], Any]
Reply = Callable[[HttpRequest], Awaitable[Response]]


class Server:
    """A guard behind HTTP; `app` is the ASGI application.

    Args:
        guard: with a concept head; nobody else may ask it while the application runs.
        settings: names and limits.
        keys: who may ask; everybody where there are none.
        shadow: a policy that decides on every request besides and is only counted and logged.
        audit: where every verdict is written before it is answered.
        page: serve the local page too.
        operators: keys of those who may intervene on a request and have it explained; nobody may where there are none.
        explains: whether everybody who may ask may have an explanation too.

    Raises ValueError for a guard that cannot guard, and for an operator's key that is everybody's.
    """

    def __init__(
        self,
        guard: Guard,
        settings: ServerSettings | None = None,
        keys: ApiKeys | None = None,
        shadow: Policy | None = None,
        audit: AuditLog | None = None,
        page: bool = False,
        operators: ApiKeys | None = None,
        explains: bool = False,
    ) -> None:
        if guard.policy is None or isinstance(guard.model, PlainVLM):
            raise ValueError("this model has no concept head, so nothing it answers would be guarded")
        self.guard, self.policy = guard, guard.policy
        self.settings, self.keys = settings or ServerSettings(), keys or ApiKeys()
        self.operators, self.explains = operators or ApiKeys(), explains
        if self.operators.shares(self.keys):
            raise ValueError("a key of the operators is one of the other API keys too; give operators their own")
        if shadow is not None:
            require_turns(shadow, guard.model.config)
        self.shadow, self.audit = shadow, audit
        # whether the concept head asks with the request's words, or sees the picture alone
        self.reads_words = guard.model.config.query == "prompt"
        self.metrics = ServerMetrics(lambda: self.batcher.waiting if self.batcher else 0)
        self.batcher: Batcher | None = None
        self.app = FastAPI(title="psa-fast", docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        for path, reply in ((CHAT, self._chat), (MODERATIONS, self._moderate), (GUARDRAIL, self._guardrail)):
            self.app.post(path)(self._counted(path, reply))
        self.app.get("/v1/models")(self._counted("/v1/models", self._models))
        self.app.get("/metrics")(self._counted("/metrics", self._metrics))
        self.app.get("/healthz")(self._health)
        if page:
            add_page(self.app, self.settings.model_name, self.explains or bool(self.operators))
        for status in (404, 405):
            self.app.exception_handler(status)(_unknown)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.batcher = Batcher(
            self.guard, self.settings, self.shadow, on_shadow=self._on_shadow, on_batch=self.metrics.batch.observe
        )
        try:
            yield
        finally:
            # what was taken is answered before the process ends
            await run_in_threadpool(self.batcher.close, self.settings.timeout)
            if self.audit is not None:
                self.audit.close()

    def _on_shadow(self, request: Request, verdict: Verdict, shadow: Verdict) -> None:
        if self.audit is not None:
            self.audit.write(audit_row("", None, request, shadow, {}, shadow=True))
        self.metrics.count_shadow(verdict, shadow)
        if (verdict.action, verdict.type, verdict.level) != (shadow.action, shadow.type, shadow.level):
            _log.info(
                "shadow policy %.12s: %s instead of %s (%s)",
                shadow.policy_hash,
                shadow.action,
                verdict.action,
                shadow.rule if shadow.error is None else shadow.code,
            )

    def _counted(self, path: str, reply: Reply) -> Reply:
        """`reply`, with its key checked, its errors in OpenAI's schema, its status and latency counted."""

        async def answer(request: HttpRequest) -> Response:
            start = time.monotonic()
            try:
                given = request.headers.get("authorization"), request.headers.get("x-api-key")
                operator = self.operators.find(*given)
                request.state.operator = operator is not None
                request.state.key = operator or self.keys.check(*given)
                response = await reply(request)
            except ApiError as error:
                response = _error(error)
            except Exception as error:
                _log.error("%s failed: %s", path, type(error).__name__, exc_info=error)
                reason = f"the request could not be answered ({type(error).__name__}); the server's log says more"
                response = _error(ApiError(500, reason, "server_error", code="internal_error"))
            self.metrics.requests.labels(path, response.status_code).inc()
            self.metrics.latency.labels(path, "total").observe(time.monotonic() - start)
            return response

        return answer

    async def _chat(self, request: HttpRequest) -> Response:
        call = await self._read(request, CHAT, read_chat)
        self._check_allowed(call, request.state.operator)
        (result,) = await self._ask(request, CHAT, [call.request], call.new_tokens, call.explain)
        if result.verdict.error is not None:
            raise bad(result.verdict.error, "messages", result.verdict.code)
        assert result.answer is not None
        headers = self._headers(result.verdict)
        if not call.stream:
            return JSONResponse(completion(result.answer, self.settings, result.explanation), headers=headers)
        chunks = events(result.answer, self.settings, call.stream_usage, result.explanation)
        headers["cache-control"] = "no-cache"
        return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)

    def _check_allowed(self, call: ChatCall, operator: bool) -> None:
        """Raise ApiError, 403, for what only an operator may ask for."""
        for key, asked, everybody in (
            ("psa.intervene", call.request.intervention is not None, False),
            ("psa.explain", call.explain, self.explains),
        ):
            if asked and not (operator or everybody):
                reason = f"{key} is for operators, by a key of --operator_keys"
                raise ApiError(403, reason, "permission_error", key, "operators_only")

    async def _moderate(self, request: HttpRequest) -> Response:
        requests = await self._read(request, MODERATIONS, read_moderation)
        verdicts = [result.verdict for result in await self._ask(request, MODERATIONS, requests, None)]
        found = moderation(requests, verdicts, self.reads_words, self.settings, self.policy.taxonomy)
        return JSONResponse(found, headers=self._headers(None))

    async def _guardrail(self, request: HttpRequest) -> Response:
        body, asked = await self._read(request, GUARDRAIL, lambda body, limits: (body, read_guardrail(body, limits)))
        (result,) = await self._ask(request, GUARDRAIL, [asked], None)
        return JSONResponse(guardrail(body, result.verdict, self.policy), headers=self._headers(result.verdict))

    async def _models(self, request: HttpRequest) -> Response:
        model = {"id": self.settings.model_name, "object": "model", "created": 0, "owned_by": "psa-fast"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _metrics(self, request: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _health(self, request: HttpRequest) -> Response:
        """Whether requests are taken; needs no key, and tells nothing of them."""
        alive = self.batcher is not None and self.batcher.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, status_code=200 if alive else 503)

    def _headers(self, verdict: Verdict | None) -> dict[str, str]:
        found = {"x-psa-policy-hash": self.policy.hash}
        return found if verdict is None else found | {"x-psa-action": verdict.action}

    def _running(self) -> Batcher:
        if self.batcher is None:
            raise ApiError(503, "the server is starting", "server_error", code="starting", retry_after=1)
        return self.batcher

    async def _read(self, request: HttpRequest, path: str, read: Read) -> Any:
        """What `read` makes of the request's body. Raises ApiError."""
        start = time.monotonic()
        self._running().check_room()  # before megabytes are taken in that nobody will read
        data = await _body(request, self.settings.max_body_mb * 2**20)
        # pictures are megabytes: what takes long must not hold up the others
        found = await run_in_threadpool(lambda: read(_object(data), self.settings))
        self.metrics.latency.labels(path, "parse").observe(time.monotonic() - start)
        return found

    async def _ask(
        self,
        http: HttpRequest,
        path: str,
        requests: Sequence[Request],
        new_tokens: int | None,
        explain: bool = False,
    ) -> list[Result]:
        """The guard's results. Raises ApiError where it has none in time."""
        futures = self._running().submit(requests, new_tokens, explain)
        waiting = asyncio.gather(*map(asyncio.wrap_future, futures))
        try:
            # who is given up is not read any more, unless its batch is being read
            results = await asyncio.wait_for(waiting, self.settings.timeout)
        except asyncio.TimeoutError:
            message = f"not answered within {self.settings.timeout:g} seconds; the server has more to do than it can"
            raise ApiError(503, message, "server_error", code="timeout", retry_after=5) from None
        for request, result in zip(requests, results, strict=True):
            self.metrics.count_verdict(result.verdict)
            if self.audit is not None:  # an answer that cannot be logged is not given
                seconds = {"queue": result.queue_seconds, "model": result.model_seconds}
                self.audit.write(audit_row(path, http.state.key, request, result.verdict, seconds))
            self.metrics.latency.labels(path, "queue").observe(result.queue_seconds)
            self.metrics.latency.labels(path, "model").observe(result.model_seconds)
        return results


async def _body(request: HttpRequest, most: int) -> bytes:
    """The body, if it is JSON by its header and not too large. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a web page may send elsewhere without being asked is none
        raise ApiError(415, "send the body as application/json", code="unsupported_media_type")
    data, more = bytearray(), True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise bad("the client went away before its body was whole", code="client_disconnected")
        data += message.get("body", b"")
        if len(data) > most:
            raise ApiError(413, f"the body is larger than {most >> 20} MiB", code="body_too_large")
        more = message.get("more_body", False)
    return bytes(data)


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = parse_json(data.decode())
    except UnicodeDecodeError:
        raise bad("the body is not UTF-8 text") from None
    except ValueError as error:
        raise bad(f"the body cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise bad(f"the body is a {type(value).__name__}; expected one JSON object")
    return value


def _error(error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def _unknown(request: HttpRequest, error: Any) -> Response:
    """A path or method that is not known, in the schema of all other errors."""
    message = f"{request.method} {shorten(request.url.path)} is not served here ({error.detail})"
    return _error(ApiError(error.status_code, message, code="unknown_url"))
