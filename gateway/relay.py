"""The life of one request: read, route, answer, stream, cancel."""

import asyncio
import math
import re
from collections.abc import Awaitable, Iterable
from time import perf_counter
from typing import Final, cast

from gateway import wire
from gateway.accounts import CLIENT_GONE, Accounts, usage_so_far
from gateway.attempts import Attempt, Attempts
from gateway.auth import Authenticator
from gateway.call import Call, HeaderList, Receive, Scope, Send
from gateway.errors import (
    EndpointNotFoundError,
    HeadTooLargeError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
    QuotaExhaustedError,
    RateLimitedError,
    TooLargeError,
    UpstreamError,
    error_body,
    error_event,
)
from gateway.limits import Admission
from gateway.routing import Lane, View, choose
from gateway.settings import GatewaySettings
from gateway.shares import Shares
from gateway.snapshot import Snapshot
from gateway.sse import StreamReader
from rollout.assignment import unit_of
from rollout.credentials import NO_LIMITS, ApiKey
from rollout.errors import InvalidInputError, PermissionDeniedError, SluiceError
from rollout.versions import parse_model

# Between two neighbours only (RFC 9110, 7.6.1), and what each hop says for itself.
_HOP_BY_HOP: Final = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
        b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
# The engine answers uncompressed, for its usage is read; who the client is, is no business of it.
_NOT_TO_ENGINE: Final = _HOP_BY_HOP | {
    b"accept-encoding", b"authorization", b"content-length", b"cookie", b"expect", b"host",
    b"x-request-id", b"x-sluice-no-capture", b"x-sluice-session",
}  # fmt: skip
_NOT_TO_CLIENT: Final = _HOP_BY_HOP | {b"content-length", b"date", b"server", b"x-request-id"}
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_JSON: Final = (b"content-type", b"application/json")
_CLOSE: Final = (b"connection", b"close")
_RETRY_AFTER: Final = (b"retry-after", b"1")
# OpenAI's clients go by it before anything else: those in JavaScript would sleep out the month.
_NO_RETRY: Final = (b"x-should-retry", b"false")
_FALLBACK: Final = (b"x-sluice-fallback", b"1")
_WATCH_AFTER_SECONDS: Final = 0.02


class _ClientWatch:
    """Cancels the task that made it when the client goes away, until it is stopped.

    The watching task is only started where the answer takes longer than a moment: it costs more
    than all the rest of a quick exchange.
    """

    __slots__ = ("_receive", "_task", "_timer", "_watcher", "gone")

    def __init__(self, loop: asyncio.AbstractEventLoop, receive: Receive) -> None:
        self.gone = False
        self._receive = receive
        self._task = cast("asyncio.Task[None]", asyncio.current_task(loop))
        self._watcher: asyncio.Task[None] | None = None
        self._timer = loop.call_later(_WATCH_AFTER_SECONDS, self._start)

    def stop(self) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    def _start(self) -> None:
        self._watcher = self._task.get_loop().create_task(self._watch())

    async def _watch(self) -> None:
        await self._receive()
        self.gone = True
        self._task.cancel()


class Relay:
    """Answers requests for inference. Everything it needs is given to it."""

    def __init__(
        self,
        *,
        settings: GatewaySettings,
        snapshot: Snapshot,
        authenticator: Authenticator,
        admission: Admission,
        attempts: Attempts,
        accounts: Accounts,
        shares: Shares,
        incarnation: str,
    ) -> None:
        self._settings = settings
        self._snapshot = snapshot
        self._auth = authenticator
        self._admission = admission
        self._attempts = attempts
        self._accounts = accounts
        self._shares = shares
        self._id_prefix = f"{incarnation[:16]}-"
        self._last_id = 0
        # Kept, because Python 3.11 makes a system call of asking for it.
        self._loop = asyncio.get_running_loop()
        # Set by the gateway when it goes: connections are closed, later nothing new is taken.
        self.draining = False
        self.refusing = False

    def configure(self, settings: GatewaySettings) -> None:
        """Go by these limits from the next request on."""
        self._settings = settings
        self._admission.maximum = settings.maximum_inflight
        self._attempts.configure(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self.enter(scope["path"], scope["query_string"])
        await self._settled(call, self._serve(call, scope, receive, send), send)

    async def go_on(self, call: Call, begun: Attempt | None, receive: Receive, send: Send) -> None:
        """Answer a call that was opened, and maybe begun, but needs to wait."""
        await self._settled(call, self._answer(call, begun, receive, send), send)

    async def refuse(self, call: Call, error: SluiceError, send: Send) -> None:
        """Answer a call that was entered with an error."""
        try:
            await self._send_refusal(call, error, send)
        finally:
            self.leave(call)

    def enter(self, path: str, query: bytes) -> Call:
        """A new call; `leave` must follow."""
        self._admission.inflight += 1
        return Call(path, query, perf_counter())

    def leave(self, call: Call) -> None:
        self._admission.inflight -= 1
        if call.ticket is not None:
            call.ticket.settle(0)

    async def _settled(self, call: Call, answering: Awaitable[None], send: Send) -> None:
        try:
            await answering
        except SluiceError as error:
            await self._send_refusal(call, error, send)
        finally:
            self.leave(call)

    async def _send_refusal(self, call: Call, error: SluiceError, send: Send) -> None:
        self._accounts.refused(call, error.status)
        limits = () if call.limited is None else self._shares.headers(call.limited)
        request_id = call.id or self._next_id()
        await send_error(send, error, request_id, close=self.draining, extra=limits)

    async def _serve(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["headers"]
        key = self.greet(call, headers)
        body = await self._read_body(receive, headers)
        if body is None:
            return
        self.open(call, key, body)
        await self._answer(call, self._attempts.begin(call), receive, send)

    def greet(self, call: Call, headers: Iterable[tuple[bytes, bytes]]) -> ApiKey:
        """Who is asking, by the head alone. Raises SluiceError where nobody is answered."""
        if self._admission.full:
            raise OverloadedError("the gateway has as many requests as it can hold: try again")
        if self.refusing:
            raise OverloadedError("this gateway is shutting down: try again")
        self._read_headers(call, headers)
        if not self._snapshot.ready:
            raise NotReadyError("the gateway does not know its routes yet: the store is not there")
        key = self._auth.authenticate(call.authorization, self._snapshot.view.keys)
        if key.limits is not NO_LIMITS:
            call.limited = key
        return key

    def open(self, call: Call, key: ApiKey, body: bytes) -> None:
        """Find who is to answer, and count the call from here on. Raises SluiceError where nobody
        may."""
        if len(body) > self._settings.maximum_body_bytes:
            raise _too_large(self._settings.maximum_body_bytes)
        view = self._snapshot.view
        call.key = key.id
        if call.path in wire.INFERENCE_PATHS:
            call.request = wire.read_request(body)
            call.lane = find_lane(view, key, call.request.model)
        else:
            call.request, call.lane = _pinned(view, key, call, body)
        call.unit = self._unit(call, key)
        call.choice = choose(call.lane, call.unit)
        # Before anything is counted: what is refused here is nobody's fault.
        self._attempts.check_room(call.choice)
        if call.limited is not None:
            call.ticket = self._shares.admit(call.limited, body)
        self._accounts.open(call)

    def _read_headers(self, call: Call, headers: Iterable[tuple[bytes, bytes]]) -> None:
        to_engine = call.engine_headers
        named = b""
        for pair in headers:
            name, value = pair
            if name not in _NOT_TO_ENGINE:
                to_engine.append(pair)
            elif name == b"authorization":
                call.authorization = value
            elif name == b"x-request-id":
                if _REQUEST_ID.fullmatch(value):
                    call.id = value.decode()
            elif name == b"x-sluice-session":
                call.session = value.decode("latin-1")
            elif name == b"x-sluice-no-capture":
                call.no_capture = value == b"1"
            elif name == b"connection" and value.lower() not in (b"close", b"keep-alive"):
                named = value
        if len(to_engine) > self._settings.maximum_headers:
            raise HeadTooLargeError("the request has too many headers")
        if named:
            call.engine_headers = to_engine = _without(to_engine, named)
        if not call.id:
            call.id = self._next_id()
        to_engine.append((b"x-request-id", call.id.encode()))

    def _next_id(self) -> str:
        self._last_id += 1
        return self._id_prefix + str(self._last_id)

    async def _read_body(
        self, receive: Receive, headers: Iterable[tuple[bytes, bytes]]
    ) -> bytes | None:
        """The whole body, or None where the client went away before its end."""
        maximum = self._settings.maximum_body_bytes
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body: bytes = message["body"]
        if message["more_body"]:
            declared = next((int(v) for n, v in headers if n == b"content-length"), 0)
            if max(declared, len(body)) > maximum:
                raise _too_large(maximum)
            return await self._read_rest(receive, body)
        return body

    async def _read_rest(self, receive: Receive, first: bytes) -> bytes | None:
        maximum = self._settings.maximum_body_bytes
        parts, size = [first], len(first)
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message["body"])
                    size += len(message["body"])
                    if size > maximum:
                        raise _too_large(maximum)
                    if not message["more_body"]:
                        return b"".join(parts)
        except TimeoutError as exc:
            raise InvalidInputError(
                f"the body did not arrive within {self._settings.body_seconds:g} s"
            ) from exc

    async def _answer(
        self, call: Call, begun: Attempt | None, receive: Receive, send: Send
    ) -> None:
        """Answer, and stop everything when the client goes away first."""
        watch = _ClientWatch(self._loop, receive)
        try:
            await self._pass_on(call, begun, send)
        except asyncio.CancelledError:
            if not watch.gone:
                raise
        finally:
            watch.stop()

    async def _pass_on(self, call: Call, begun: Attempt | None, send: Send) -> None:
        try:
            attempt = await self._attempts.ask(call, begun)
        except BaseException as error:
            self._accounts.unanswered(call, error)
            raise
        try:
            if call.path not in wire.INFERENCE_PATHS and _is_unknown(attempt):
                raise EndpointNotFoundError(f"the engine has no {call.path}")
            if attempt.reader is not None:
                await self._stream(call, attempt, attempt.reader, send)
            elif attempt.whole:
                await self._deliver_whole(call, attempt, send)
            else:
                await self._deliver_large(call, attempt, send)
        except asyncio.CancelledError:
            self._accounts.answered(call, attempt, CLIENT_GONE, usage_so_far(attempt))
            raise
        finally:
            attempt.end("unknown")

    async def _deliver_whole(self, call: Call, attempt: Attempt, send: Send) -> None:
        body, status = attempt.first, attempt.response.status
        attempt.end("answered")
        headers = self.headers(call, attempt)
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        self._accounts.answered(
            call, attempt, status, wire.read_usage(body) if status == 200 else None
        )
        if call.capture:
            self._accounts.keep(call, attempt, status, body)

    async def _deliver_large(self, call: Call, attempt: Attempt, send: Send) -> None:
        """Pass a large answer on as it comes; where it breaks off, so does ours."""
        status = attempt.response.status
        headers = self.headers(call, attempt)
        length = attempt.response.header(b"content-length")
        if length is not None:
            headers.append((b"content-length", length))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        data = attempt.first
        try:
            while data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                data = await attempt.response.read()
        except UpstreamError as error:
            self._accounts.broke(call, attempt, error)
            return
        attempt.end("answered")
        await send({"type": "http.response.body", "body": b""})
        self._accounts.answered(call, attempt, status, None)

    async def _stream(self, call: Call, attempt: Attempt, reader: StreamReader, send: Send) -> None:
        headers = self.headers(call, attempt)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        response, data = attempt.response, attempt.first
        try:
            while True:
                if data:
                    call.pieces += 1
                    if call.capture:
                        self._accounts.tee(call, data)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                read = await response.read()
                if not read:
                    break
                data = reader.feed(read)
        except UpstreamError as error:
            await send({"type": "http.response.body", "body": error_event(error)})
            self._accounts.broke(call, attempt, error)
            return
        rest = reader.close()
        attempt.end("failed" if reader.failed else "answered")
        await send({"type": "http.response.body", "body": rest})
        self._accounts.answered(call, attempt, 502 if reader.failed else 200, reader.usage)
        if call.capture:
            self._accounts.tee(call, rest)
        if call.capture:
            self._accounts.keep(call, attempt, 200, b"".join(call.captured))

    def headers(self, call: Call, attempt: Attempt) -> HeaderList:
        """What is told to the client ahead of the answer."""
        headers = [pair for pair in attempt.response.headers if pair[0] not in _NOT_TO_CLIENT]
        headers.append((b"x-request-id", call.id.encode()))
        headers += self._accounts.headers(call, attempt.served)
        if call.limited is not None:
            headers += self._shares.headers(call.limited)
        if call.fell_back:
            headers.append(_FALLBACK)
        if self.draining:
            headers.append(_CLOSE)
        return headers

    def _unit(self, call: Call, key: ApiKey) -> str:
        """Who is assigned to an arm; where there is no trial, nobody needs to know."""
        if call.lane.trial is None:
            return ""
        return unit_of(key.id, call.session or call.request.sticky or call.id)


def _pinned(view: View, key: ApiKey, call: Call, body: bytes) -> tuple[wire.Request, Lane]:
    """What is asked at a path that only the engine knows. Raises EndpointNotFoundError where no
    pinned version is: which path an engine has depends on what it serves."""
    kind = next((v for n, v in call.engine_headers if n == b"content-type"), b"")
    try:
        if kind.lower().startswith(b"multipart/"):
            request = wire.read_form(kind, body)
        else:
            request = wire.read_request(body)
    except InvalidInputError as exc:
        raise _no_path(call.path, exc.message) from exc
    lane = find_lane(view, key, request.model)
    if not lane.pinned:
        raise _no_path(call.path, f"{lane.route.name} is a route")
    return request, lane


def _no_path(path: str, why: str) -> EndpointNotFoundError:
    return EndpointNotFoundError(
        f"{path} is none of the gateway's own paths: it is passed on to the engine where `model` "
        f"is a pinned version, as NAME@1 ({why})"
    )


def find_lane(view: View, key: ApiKey, model: str) -> Lane:
    """What a client asked for. Raises ModelNotFoundError or PermissionDeniedError."""
    lane = view.lanes.get(model)
    if lane is None:
        route, number = parse_model(model)
        if number is not None and route in view.lanes:
            raise ModelNotFoundError(f"{route} has no version {number}", param="model")
        raise ModelNotFoundError(
            # A name of megabytes is not sent back whole.
            f"there is no route {route[:100]!r}: GET /v1/models lists those that there are",
            param="model",
        )
    if key.routes is not None and not key.allows_route(lane.route.name):
        raise PermissionDeniedError(
            f"this API key may not use the route {lane.route.name!r}", param="model"
        )
    return lane


def request_name(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The client's own name for its request, where it has one that can be used."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode()
    return None


async def send_error(
    send: Send,
    error: SluiceError,
    request_id: str,
    *,
    close: bool = False,
    extra: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Answer with an error in OpenAI's shape."""
    body = error_body(error)
    headers = [
        _JSON,
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
        *extra,
    ]
    if isinstance(error, RateLimitedError):
        headers.append((b"retry-after", b"%d" % math.ceil(error.retry_after)))
        if isinstance(error, QuotaExhaustedError):
            headers.append(_NO_RETRY)
    elif error.status == 503:
        headers.append(_RETRY_AFTER)
    if close or error.status == 413:
        # The rest of a body that is too large is not worth reading.
        headers.append(_CLOSE)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _is_unknown(attempt: Attempt) -> bool:
    """Whether the engine's 404 is about the path: its framework's, and not in OpenAI's shape."""
    return attempt.response.status == 404 and b'"error"' not in attempt.first


def _without(headers: HeaderList, connection: bytes) -> HeaderList:
    """The headers but for those that the client named as meant for this hop only."""
    named = {token.strip().lower() for token in connection.split(b",")}
    return [pair for pair in headers if pair[0] not in named]


def _too_large(maximum: int) -> TooLargeError:
    return TooLargeError(f"the body is larger than {maximum} bytes")
