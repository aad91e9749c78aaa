"""Every error leaves in OpenAI's shape, whoever raised it."""

import logging
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rollout.errors import AuthenticationError, SluiceError, UnavailableError
from rollout.plans import clearest, plain_path

log = logging.getLogger(__name__)

# Long enough for a store or a replica that restarts.
_RETRY_AFTER_SECONDS = 2


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(SluiceError, _sluice_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)


def error_response(error: SluiceError) -> JSONResponse:
    headers = {}
    if isinstance(error, UnavailableError):
        headers["retry-after"] = str(_RETRY_AFTER_SECONDS)
    if error.status == AuthenticationError.status:
        headers["www-authenticate"] = "Bearer"
    return _response(
        error.status, error.message, error.type, error.code, param=error.param, headers=headers
    )


async def _sluice_error(_: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, SluiceError)  # noqa: S101  # registered for nothing else
    return error_response(exc)


async def _invalid(_: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, RequestValidationError)  # noqa: S101  # registered for nothing else
    first = clearest(exc.errors())
    param = ".".join(str(part) for part in plain_path(first["loc"]) if part != "body") or None
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return _response(400, message, "invalid_request_error", "invalid_input", param=param)


async def _http_error(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, HTTPException)  # noqa: S101  # registered for nothing else
    path = request.url.path
    if exc.status_code == HTTPStatus.NOT_FOUND and path.startswith("/v1/"):
        return _response(
            404, f"{path} comes with a later release: docs/api.md lists what there is",
            "invalid_request_error", "not_found",
        )  # fmt: skip
    if exc.status_code == HTTPStatus.NOT_FOUND:
        return _response(
            404, f"there is nothing at {path}: /docs lists what there is",
            "invalid_request_error", "not_found",
        )  # fmt: skip
    if exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return _response(
            405, f"{request.method} is not possible at {path}",
            "invalid_request_error", "method_not_allowed", headers=dict(exc.headers or {}),
        )  # fmt: skip
    return _response(
        exc.status_code, str(exc.detail), "invalid_request_error", "http_error",
        headers=dict(exc.headers or {}),
    )  # fmt: skip


async def _bug(request: Request, exc: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=exc)
    return _response(
        500, "an error of ours: the controller's log has the details", "server_error",
        "internal_error",
    )  # fmt: skip


def _response(
    status: int,
    message: str,
    kind: str,
    code: str,
    *,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    body = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": body}, status_code=status, headers=headers)
