"""Errors as OpenAI's clients read them: a status, and an object with message, type, param and code."""

from __future__ import annotations

from typing import Any, Literal

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
]


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: the HTTP status.
        message: a sentence for people.
        type: the kind of error, for programs.
        param: the key of the request that is at fault, None for none.
        code: what is at fault, for programs; None where the type says all.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: ErrorType = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code, self.retry_after = param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object of the reply."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The reply's further headers."""
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


class EngineDown(ApiError):
    """The engine that writes the answers is not there: no further try of the same batch makes sense."""

    def __init__(self, reason: str) -> None:
        super().__init__(502, f"the engine gives no answer ({reason})", "server_error", code="engine_down")


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that cannot be taken as it is."""
    return ApiError(400, message, param=param, code=code)
