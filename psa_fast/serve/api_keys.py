"""API keys: read from a file or the environment, compared in constant time, named in logs by a digest."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from psa_fast.files import read_text, shown
from psa_fast.serve.wire_errors import ApiError

ENVIRONMENT = "PSA_FAST_API_KEYS"
SHORTEST = 16


class ApiKeys:
    """The keys that a server takes; without any, everybody may ask.

    Raises ValueError for a key that is too short or holds other than printable ASCII; the key itself is not shown.
    """

    def __init__(self, keys: Sequence[str] = (), source: str = "API keys") -> None:
        for number, key in enumerate(keys, 1):
            if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(f"{source}: key {number} needs {SHORTEST} or more ASCII characters, no blanks")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    @classmethod
    def load(cls, file: str | Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys:
        """The keys of a file, one a line (blank lines and those that begin with # aside), and of PSA_FAST_API_KEYS,
        with commas between them. Raises ValueError, naming the file, for one without a key and for what is none.
        """
        keys: list[str] = []
        if file is not None:
            lines = [line.strip() for line in read_text(file, "API keys").splitlines()]
            keys = [line for line in lines if line and not line.startswith("#")]
            if not keys:
                raise ValueError(f"API keys {shown(file)}: it holds none, so nobody could be told apart")
            cls(keys, f"API keys {shown(file)}")
        named = environment.get(ENVIRONMENT)
        if named is not None:
            more = [key.strip() for key in named.split(",")]
            cls(more, ENVIRONMENT)
            keys += more
        return cls(keys)

    def check(self, authorization: str | None, x_api_key: str | None = None) -> str | None:
        """A short name of a request's key (its digest's beginning), None where no key is needed.

        Args:
            authorization: the header Authorization, which counts where it is given.
            x_api_key: the header X-API-Key, in which LiteLLM sends it.

        Raises ApiError, 401, for one that is absent or not known.
        """
        if not self._digests:
            return None
        found = self.find(authorization, x_api_key)
        if found is None:
            raise ApiError(
                401, "no known API key; send Authorization: Bearer KEY", "authentication_error", code="invalid_api_key"
            )
        return found

    def find(self, authorization: str | None, x_api_key: str | None = None) -> str | None:
        """The short name of a request's key if it is one of these, None otherwise; arguments as for `check`."""
        scheme, _, key = (authorization or f"Bearer {x_api_key or ''}").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # every key is compared, so that time tells nothing of which one it nearly was
        known = [hmac.compare_digest(digest, own) for own in self._digests]
        return digest.hex()[:12] if scheme.lower() == "bearer" and any(known) else None

    def shares(self, other: ApiKeys) -> bool:
        """Whether a key is one of both."""
        return bool(set(self._digests) & set(other._digests))
