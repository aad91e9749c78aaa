"""Bounds what a request may send, so that nobody fills the controller's memory."""

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout.errors import InvalidInputError

# Prompts with many examples are the largest that is sent; imports are read in pieces instead.
_MAXIMUM_BYTES = 4 * 1024 * 1024
_MAXIMUM_IMPORT_BYTES = 256 * 1024 * 1024


class BodyLimit:
    """Refuses bodies over the limit, except at the paths in `unlimited`, which bound their own."""

    def __init__(self, app: ASGIApp, unlimited: frozenset[str]) -> None:
        self._app = app
        self._unlimited = unlimited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._unlimited:
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > _MAXIMUM_BYTES:
            await _too_large(scope, receive, send)
            return
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > _MAXIMUM_BYTES:
                raise InvalidInputError(_said())
            return message

        await self._app(scope, bounded, send)


async def read_body(
    request: Request,
    most: int = _MAXIMUM_IMPORT_BYTES,
    otherwise: str = "import the file in parts",
) -> bytes:
    """The body of an `unlimited` path; one over its own bound is refused with what to do."""
    chunks = bytearray()
    async for chunk in request.stream():
        chunks += chunk
        if len(chunks) > most:
            raise InvalidInputError(f"more than {most // 2**20} MiB: {otherwise}")
    return bytes(chunks)


async def _too_large(scope: Scope, receive: Receive, send: Send) -> None:
    error = {
        "message": _said(),
        "type": InvalidInputError.type,
        "param": None,
        "code": "body_too_large",
    }
    response = JSONResponse({"error": error}, status_code=413, headers={"connection": "close"})
    await response(scope, receive, send)


def _said() -> str:
    return f"the body is larger than {_MAXIMUM_BYTES // 2**20} MiB"
