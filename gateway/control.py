"""Hands OpenAI's paths for files and fine-tuning on to the controller, in both directions as they
come. The controller knows the keys itself, so nothing is decided here."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final
from uuid import uuid4

import httpx2

from gateway.call import HeaderList, Receive, Scope, Send
from gateway.errors import EndpointNotFoundError
from gateway.settings import GatewaySettings
from rollout.errors import InvalidInputError, UnavailableError
from rollout.settings import ControllerSection

# No segment begins with a dot, so no path leads out of these.
_PATH: Final = re.compile(r"/v1/(?:files|fine_tuning)(?:/[\w~-][\w.~:%-]*)*/?", re.ASCII)
_BEGINNINGS: Final = ("/v1/files", "/v1/fine_tuning")
_HOP_BY_HOP: Final = frozenset(
    {
        b"connection", b"expect", b"host", b"keep-alive", b"proxy-authenticate",
        b"proxy-authorization", b"proxy-connection", b"te", b"trailer", b"transfer-encoding",
        b"upgrade",
    }
)  # fmt: skip
_NOT_TO_CLIENT: Final = _HOP_BY_HOP | {b"date", b"server"}
_MOST: Final = 64


def is_controllers(path: str) -> bool:
    """Whether the controller answers a path of the data plane."""
    return any(path == each or path.startswith(f"{each}/") for each in _BEGINNINGS)


def controller_url(own: GatewaySettings, controller: ControllerSection) -> str:
    """Where the controller is: as configured, or on this machine where it listens."""
    if own.controller_url:
        return own.controller_url.rstrip("/")
    host = controller.host
    if host in ("0.0.0.0", "::"):  # noqa: S104 - asked, not listened on
        host = "127.0.0.1"
    return (
        f"http://[{host}]:{controller.port}" if ":" in host else f"http://{host}:{controller.port}"
    )


class _ClientGoneError(Exception):
    """The client went away in the middle of its body."""


class ControllerDoor:
    """Use it as a context, within one event loop."""

    def __init__(self, url: str, own: GatewaySettings) -> None:
        self._url = url
        limits = own.upstream
        # It is the client who takes its time over a body, and the limits there are the client's.
        timeout = httpx2.Timeout(
            connect=limits.connect_seconds,
            read=limits.first_byte_seconds,
            write=limits.total_seconds,
            pool=limits.connect_seconds,
        )
        self._client = httpx2.AsyncClient(
            timeout=timeout, limits=httpx2.Limits(max_connections=_MOST), trust_env=False
        )
        self._body_seconds = own.body_seconds

    async def __aenter__(self) -> "ControllerDoor":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on. Raises UnavailableError where the controller does not answer."""
        path = scope["raw_path"].decode("ascii", "replace")
        if not _PATH.fullmatch(path) or not _PATH.fullmatch(scope["path"]):
            raise EndpointNotFoundError(f"there is no {scope['path']} here")
        body = _Body(receive, self._body_seconds)
        passing = asyncio.create_task(self._pass_on(path, scope, body, send))
        watching = asyncio.create_task(body.client_gone())
        try:
            await asyncio.wait((passing, watching), return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                with suppress(_ClientGoneError):
                    passing.result()
        finally:
            for task in (passing, watching):
                task.cancel()
            await asyncio.gather(passing, watching, return_exceptions=True)

    async def _pass_on(self, path: str, scope: Scope, body: "_Body", send: Send) -> None:
        query = scope["query_string"].decode("latin-1")
        headers = _to_controller(scope["headers"])
        has_body = any(n in (b"content-length", b"transfer-encoding") for n, _ in scope["headers"])
        request = self._client.build_request(
            scope["method"],
            self._url + path + (f"?{query}" if query else ""),
            headers=headers,
            content=body.parts() if has_body else None,
        )
        if not has_body:
            body.done()
        try:
            response = await self._client.send(request, stream=True)
        except httpx2.TransportError as exc:
            raise UnavailableError(
                f"the controller does not answer ({_why(exc)}): try again"
            ) from exc
        try:
            await _answer(response, send)
        finally:
            await response.aclose()


class _Body:
    """A request's body as it arrives, and then the news that the client is gone."""

    def __init__(self, receive: Receive, seconds: float) -> None:
        self._receive = receive
        self._seconds = seconds
        self._read = asyncio.Event()

    def done(self) -> None:
        self._read.set()

    async def parts(self) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(self._seconds):
                    message = await self._receive()
            except TimeoutError as exc:
                raise InvalidInputError(
                    f"no more of the body arrived for {self._seconds:g} s"
                ) from exc
            if message["type"] == "http.disconnect":
                # Nobody waits for an answer; whoever reads the body must not take it for whole.
                raise _ClientGoneError
            if message["body"]:
                yield message["body"]
            if not message["more_body"]:
                self.done()
                return

    async def client_gone(self) -> None:
        """Return when the client goes away after its body was read."""
        await self._read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            continue


async def _answer(response: httpx2.Response, send: Send) -> None:
    """Pass an answer on as it comes; where it breaks off, so does ours."""
    headers = [
        (name.lower(), value)
        for name, value in response.headers.raw
        if name.lower() not in _NOT_TO_CLIENT
    ]
    start = {"type": "http.response.start", "status": response.status_code, "headers": headers}
    await send(start)
    try:
        async for data in response.aiter_raw():
            await send({"type": "http.response.body", "body": data, "more_body": True})
    except httpx2.TransportError:
        return
    await send({"type": "http.response.body", "body": b""})


def _to_controller(sent: HeaderList) -> HeaderList:
    headers = [pair for pair in sent if pair[0] not in _HOP_BY_HOP]
    names = {name for name, _ in headers}
    if b"x-request-id" not in names:
        headers.append((b"x-request-id", uuid4().hex.encode()))
    # The client of this side would ask for more than the other one can read.
    for name, value in ((b"accept-encoding", b"identity"), (b"accept", b"*/*")):
        if name not in names:
            headers.append((name, value))
    return headers


def _why(error: httpx2.TransportError) -> str:
    return str(error) or type(error).__name__
