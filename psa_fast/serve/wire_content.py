"""Texts and pictures as clients send them, as one request of ours; pictures are data URLs, nothing is fetched."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from psa_fast.data.images import ImageError, image_size
from psa_fast.data.records import IMAGE_MARK, Turn
from psa_fast.files import shorten, unwritable_text
from psa_fast.safety.request import Request
from psa_fast.serve.settings import ServerSettings
from psa_fast.serve.wire_errors import bad

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


@dataclass
class Content:
    """Collects the pieces of one conversation; `images` in the order of their marks."""

    settings: ServerSettings
    images: list[bytes]

    def text(self, value: Any, param: str) -> str:
        """A text, checked. Raises ApiError for what is none and for one that could be taken for a picture's place."""
        if not isinstance(value, str):
            raise bad(f"{param} is a {type(value).__name__}; expected text", param)
        if wrong := unwritable_text(value, param):
            raise bad(f"{wrong}, which is no text", param)
        if IMAGE_MARK in value:
            raise bad(f"{param} holds {IMAGE_MARK}, which stands for a picture and cannot be text", param)
        return value

    def image(self, value: Any, param: str) -> str:
        """The mark of a picture that comes as a data URL. Raises ApiError for one that is too large or no picture."""
        self._keep(read_data_url(value, param), param)
        return IMAGE_MARK

    def raw_image(self, value: Any, param: str) -> str:
        """As `image`, for what may also be base64 without the URL around it."""
        whole = isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", value)
        self._keep(read_data_url(value, param) if whole else _decode(value, param), param)
        return IMAGE_MARK

    def parts(self, value: Any, param: str) -> str:
        """The text, with marks, of a message's content: a text, or a list of parts."""
        if isinstance(value, str):
            return self.text(value, param)
        if not isinstance(value, list) or not value:
            raise bad(f"{param} is {shorten(value, 40)}; expected text or a list of parts", param)
        return "\n".join(self._part(part, f"{param}[{number}]") for number, part in enumerate(value))

    def _part(self, part: Any, param: str) -> str:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            only(part, ("type", "text"), param)
            return self.text(part.get("text"), f"{param}.text")
        if kind == "image_url":
            only(part, ("type", "image_url"), param)
            inner, param = part.get("image_url"), f"{param}.image_url"
            if not isinstance(inner, dict):
                raise bad(f"{param} is {shorten(inner, 40)}; expected an object with a url", param)
            only(inner, ("url", "detail"), param)
            if (detail := inner.get("detail")) not in (None, "auto"):
                raise bad(f"{param}.detail is {shorten(detail, 40)}; only auto is known here", f"{param}.detail")
            return self.image(inner.get("url"), f"{param}.url")
        raise bad(f"{param} is of type {shorten(kind, 40)}; known are text and image_url", param)

    def _keep(self, data: bytes, param: str) -> None:
        if len(self.images) >= self.settings.max_images:
            raise bad(f"there are more than {self.settings.max_images} images", param, "too_many_images")
        try:
            width, height = image_size(data, "the image")
        except ImageError as error:
            raise bad(f"{param}: {error}", param, "invalid_image") from None
        if width * height > self.settings.max_pixels:
            found = f"{width} x {height} pixels, more than {self.settings.max_pixels}"
            raise bad(f"{param}: the image has {found}", param, "image_too_large")
        self.images.append(data)


def read_data_url(value: Any, param: str) -> bytes:
    """The bytes of a data URL. Raises ApiError for every other address: nothing is fetched."""
    if not isinstance(value, str):
        raise bad(f"{param} is a {type(value).__name__}; expected a data URL", param)
    match = _DATA_URL.match(value)
    if match is None:
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)", value)
        what = f"a {scheme[0][:20]}: address" if scheme else "no address"
        raise bad(
            f"{param} is {what}; send the picture itself as data:image/png;base64,... (no address is fetched)",
            param,
            "remote_image_refused",
        )
    return _decode(value[match.end() :], param)


def _decode(text: Any, param: str) -> bytes:
    try:
        if not isinstance(text, str) or not text:
            raise ValueError
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise bad(f"{param} is not base64 of a picture", param, "invalid_image") from None


def only(value: dict[str, Any], known: Collection[str], param: str) -> None:
    """Refuse a key that would be passed over; one without a value says nothing."""
    for key, given in value.items():
        if key not in known and given not in (None, [], {}):
            place = f"{param}.{key}" if param else key
            message = f"{shorten(place)} is not known here, and nothing is passed over"
            raise bad(message, place[:80], "unknown_parameter")


def conversation(messages: Any, settings: ServerSettings) -> Request:
    """The request of a chat's messages. Raises ApiError for a role, part or order that the model does not know."""
    if not isinstance(messages, list) or not messages:
        raise bad("messages is a list of at least one message", "messages")
    content, turns = Content(settings, []), []
    for number, message in enumerate(messages):
        param = f"messages[{number}]"
        if not isinstance(message, dict):
            raise bad(f"{param} is a {type(message).__name__}; expected an object", param)
        role = message.get("role")
        if role not in ("user", "assistant"):
            raise bad(
                f"{param}.role is {shorten(role, 40)}; the model was trained with user and assistant alone, "
                "and a text that it cannot place is not passed over",
                f"{param}.role",
                "unknown_role",
            )
        only(message, ("role", "content"), param)
        if role == "user":
            text = content.parts(message.get("content"), f"{param}.content")
        else:
            text = _said(content, message.get("content"), f"{param}.content")
        turns.append(Turn(role, text))
    return checked(tuple(turns), content.images, "messages")


def _said(content: Content, value: Any, param: str) -> str:
    """An assistant's content: text, or a list of texts."""
    if isinstance(value, list) and any(isinstance(part, dict) and part.get("type") != "text" for part in value):
        raise bad(f"{param} holds more than text, which an assistant's message may not", param)
    return content.parts(value, param)


def checked(turns: Sequence[Turn], images: Sequence[bytes], param: str) -> Request:
    """The request, if its turns can be asked. Raises ApiError."""
    request = Request(tuple(turns), tuple(images))
    try:
        _ = request.turns
    except ValueError as error:
        raise bad(f"{param}: {error}", param) from None
    return request
