"""What the data plane raises by itself, and the shape in which OpenAI's clients read an error.

rollout.errors.SluiceError
├── InvalidInputError
│   ├── TooLargeError            send less
│   └── PromptPlaceError         ask at an endpoint of messages
├── RateLimitedError             wait: a limit of the key
├── NotFoundError
│   ├── ModelNotFoundError       ask for a route, or a version of it, that exists
│   └── EndpointNotFoundError    ask for a path that exists
└── UnavailableError
    ├── NotResidentError         wait until an engine serves that version
    ├── OverloadedError          wait and try again
    ├── NotReadyError            wait until the gateway knows its routes
    └── EngineUnavailableError
        └── UpstreamError        the engine broke; `reason` says how
"""

from typing import Any, ClassVar, Literal

import msgspec

from rollout.errors import (
    EngineUnavailableError,
    InvalidInputError,
    NotFoundError,
    SluiceError,
    UnavailableError,
)

# Labels of a metric, so they are few and fixed.
Reason = Literal[
    "connect", "reset", "first_byte", "between_bytes", "total", "protocol", "status", "error_event"
]


class TooLargeError(InvalidInputError):
    status = 413
    code = "request_too_large"


class PromptPlaceError(InvalidInputError):
    """The version carries a prompt, and the endpoint has no place for one."""


class InternalError(SluiceError):
    """A fault of ours; the log has the rest."""


class BadHttpError(InvalidInputError):
    code = "invalid_http"


class HeadTooLargeError(InvalidInputError):
    status = 431
    code = "request_head_too_large"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class EndpointNotFoundError(NotFoundError):
    code = "unknown_url"


class MethodNotAllowedError(InvalidInputError):
    status = 405
    code = "method_not_allowed"


class RateLimitedError(SluiceError):
    """The key has asked for more than it may; `retry_after` is in seconds. As OpenAI says it."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TokensLimitedError(RateLimitedError):
    type = "tokens"


class QuotaExhaustedError(RateLimitedError):
    type = "insufficient_quota"
    code = "insufficient_quota"


class NotResidentError(UnavailableError):
    code = "version_not_resident"


class OverloadedError(UnavailableError):
    code = "overloaded"


class NotReadyError(UnavailableError):
    code = "not_ready"


class UpstreamError(EngineUnavailableError):
    """The engine broke the exchange off, or kept silent for longer than a limit."""

    status: ClassVar[int] = 502
    code: ClassVar[str] = "engine_failed"

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def error_body(error: SluiceError) -> bytes:
    """OpenAI's error object, as JSON."""
    return msgspec.json.encode(_shape(error))


def error_event(error: SluiceError) -> bytes:
    """The event that ends a stream which broke midway; no `[DONE]` follows it."""
    return b"data: " + error_body(error) + b"\n\n"


def _shape(error: SluiceError) -> dict[str, dict[str, Any]]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }
