"""An OpenAI-compatible endpoint as the model of a judge: vLLM, SGLang, a hosted API."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from psa_fast.data.images import ImageError, resolve, to_rgb
from psa_fast.evaluation.judges.contract import NoReply, Prompt, Reply
from psa_fast.files import shorten

LONGEST_BODY = 1 << 22  # bytes of a response
LONGEST_PAUSE = 60.0  # seconds before a further try
REFUSED = {401: "the key is not taken", 403: "the key is not taken", 404: "no such model or path"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to wherever the answer says."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Passing(Exception):
    """What a further try may mend, and after how many seconds the server wants it."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class Endpoint:
    """Asks `url`/chat/completions, or /completions for a prompt that is one text, greedily.

    Args:
        url: up to and including /v1.
        model: the name that the server knows it by.
        key: sent as bearer token; it is written nowhere.
        image_folder: where the pictures' names start.
        timeout: seconds for one try.
        tries: how often a prompt is asked before it counts as without a reply: the pause between them doubles, from
            `pause` seconds on.
        workers: prompts under way at once.

    Raises:
        ValueError: the URL is none of http or https, or holds a password; the key cannot be sent.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        image_folder: str | Path | None = None,
        timeout: float = 60.0,
        tries: int = 5,
        workers: int = 8,
        pause: float = 0.5,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--judge_url {shorten(url)}: expected http://HOST/v1 or https://HOST/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("--judge_url: leave out user, password, query and fragment; a key has its own option")
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("the key of the endpoint holds a character that no header can, a line's end for one")
        self.url, self.model, self._key = url.rstrip("/"), model, key
        self.image_folder, self.timeout, self.tries = image_folder, timeout, tries
        self.workers, self.pause = workers, pause
        self._opener = urllib.request.build_opener(_NoRedirect)

    def digest(self, prompt: Prompt) -> str:
        """Hashes of the pictures' files."""
        return " ".join(hashlib.sha256(self._file(name).read_bytes()).hexdigest() for name in prompt.pictures)

    def __call__(self, prompt: Prompt) -> Reply:
        """The reply. Raises NoReply after the last try, ValueError for what no further prompt will change."""
        path = "completions" if prompt.text is not None else "chat/completions"
        request = urllib.request.Request(
            f"{self.url}/{path}",
            data=json.dumps(self._body(prompt)).encode(),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
        )
        for attempt in range(self.tries):
            try:
                return _read(self._send(request), prompt)
            except _Passing as error:
                if attempt + 1 == self.tries:
                    raise NoReply(f"{error}, {self.tries} tries") from None
                time.sleep(min(LONGEST_PAUSE, max(error.after, self.pause * 2**attempt)))
        raise NoReply("it was not asked")

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "temperature": 0, "max_tokens": prompt.max_tokens}
        if prompt.text is not None:
            return {**body, "prompt": prompt.text}
        messages: list[dict[str, Any]] = [dict(message) for message in prompt.messages]
        if prompt.pictures:
            last = max(place for place, message in enumerate(messages) if message["role"] == "user")
            urls = [f"data:image/png;base64,{base64.b64encode(self._png(name)).decode()}" for name in prompt.pictures]
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            messages[last]["content"] = [*parts, {"type": "text", "text": messages[last]["content"]}]
        body["messages"] = messages
        if prompt.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": prompt.top_logprobs}
        return body

    def _file(self, name: str) -> Path:
        if self.image_folder is None:
            raise ValueError(f"this judge looks at the images, {name} for one: give --image_folder")
        try:
            return resolve(self.image_folder, name)
        except ImageError as error:
            raise ValueError(f"{name}: {error}") from error

    def _png(self, name: str) -> bytes:
        try:
            picture = to_rgb(self._file(name))
        except ImageError as error:
            raise ValueError(f"{name}: {error}") from error
        stream = io.BytesIO()
        picture.save(stream, format="PNG")
        return stream.getvalue()

    def _send(self, request: urllib.request.Request) -> bytes:
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                body = response.read(LONGEST_BODY + 1)
        except urllib.error.HTTPError as error:
            after, said = error.headers.get("Retry-After", ""), ""
            with error, suppress(OSError, http.client.HTTPException):  # what it says is a courtesy
                said = error.read(1000).decode("utf-8", "replace")
            if error.code in REFUSED:
                raise ValueError(f"{self.url} answers {error.code}: {REFUSED[error.code]}") from None
            if error.code == 429 or error.code >= 500:
                raise _Passing(f"status {error.code}", float(after) if after.isdecimal() else 0.0) from None
            raise NoReply(f"status {error.code}: {shorten(said)}") from None
        # OSError: no connection, a reset, a time-out; HTTPException: the response ends early or is none
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(f"no connection ({shorten(str(error))})") from None
        if len(body) > LONGEST_BODY:
            raise NoReply(f"the response has more than {LONGEST_BODY} bytes")
        return body


def _read(body: bytes, prompt: Prompt) -> Reply:
    """The first choice of a response. Raises _Passing for a response that is none."""
    try:
        choice = json.loads(body)["choices"][0]
        if prompt.text is not None:
            return Reply(_text(choice["text"]))
        text = _text(choice["message"]["content"])
        if not prompt.top_logprobs:
            return Reply(text)
        first = choice["logprobs"]["content"][0]["top_logprobs"]
        logprobs = [(_text(entry["token"]), float(entry["logprob"])) for entry in first]
        if not all(logprob < math.inf for _, logprob in logprobs):
            raise ValueError("a log-probability is not a number")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise _Passing(f"the response is not of the API ({type(error).__name__})") from None
    return Reply(text, tuple(entry for entry in logprobs if entry[1] != -math.inf))


def _text(value: Any) -> str:
    if value is None:  # a reply of nothing, of a model that only thought, say
        return ""
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # a lone surrogate is no text: UnicodeEncodeError, a ValueError
    return value
