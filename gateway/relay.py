"""The life of one request: attempt, failover, stream, cancel, account."""

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping, Sequence
from datetime import UTC, datetime
from random import getrandbits
from time import perf_counter
from typing import Any, Final, cast

from gateway import wire
from gateway.auth import Authenticator
from gateway.balance import pick
from gateway.capture import Captures, Seen
from gateway.errors import (
    HeadTooLargeError,
    ModelNotFoundError,
    NotReadyError,
    NotResidentError,
    OverloadedError,
    TooLargeError,
    UpstreamError,
    error_body,
    error_event,
)
from gateway.evidence import Evidence, Tally
from gateway.health import Fleet, Outcome, Replica
from gateway.limits import Admission, RetryBudget
from gateway.metrics import Bound, Metrics
from gateway.routing import (
    Choice,
    Lane,
    Served,
    View,
    choose,
    unit_of,
    wants_capture,
)
from gateway.settings import GatewaySettings
from gateway.snapshot import Snapshot
from gateway.sse import StreamReader
from gateway.upstream import Response, UpstreamPool
from rollout.credentials import ApiKey
from rollout.errors import (
    EngineUnavailableError,
    InvalidInputError,
    PermissionDeniedError,
    SluiceError,
    UnavailableError,
)
from rollout.versions import parse_model

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Coroutine[Any, Any, Message]]
Send = Callable[[Message], Awaitable[None]]
HeaderList = list[tuple[bytes, bytes]]

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
_FALLBACK: Final = (b"x-sluice-fallback", b"1")
# The code under which a request is counted whose client went away; nginx's, for HTTP has none.
_CLIENT_GONE: Final = 499
_WATCH_AFTER_SECONDS: Final = 0.02


class _Call:
    """One request on its way through."""

    __slots__ = (
        "authorization", "capture", "captured", "captured_bytes", "choice", "counted",
        "engine_headers", "fell_back", "first_byte_at", "id", "lane", "no_capture", "path",
        "pieces", "query", "request", "sent_at", "session", "started", "tally", "trial", "unit",
    )  # fmt: skip

    request: wire.Request
    lane: Lane
    choice: Choice

    def __init__(self, path: str, query: bytes, started: float) -> None:
        self.path = path
        self.query = query
        self.started = started
        self.id = ""
        self.authorization: bytes | None = None
        self.session: str | None = None
        self.no_capture = False
        self.engine_headers: HeaderList = []
        self.unit = ""
        self.trial = ""
        self.tally: Tally | None = None
        self.capture = False
        self.captured: list[bytes] = []
        self.captured_bytes = 0
        self.fell_back = False
        self.counted = False
        self.sent_at = 0.0
        self.first_byte_at = 0.0
        self.pieces = 0


class _Attempt:
    """One request to one replica; `end` gives everything back, once."""

    __slots__ = ("_ended", "first", "reader", "replica", "response", "served", "whole")

    def __init__(self, served: Served, replica: Replica, response: Response) -> None:
        self.served = served
        self.replica = replica
        self.response = response
        self.reader: StreamReader | None = None
        self.first = b""
        self.whole = False
        self._ended = False
        replica.begin()

    def end(self, outcome: Outcome) -> None:
        if not self._ended:
            self._ended = True
            self.response.close()
            self.replica.end(outcome, perf_counter())


class _ClientWatch:
    """Cancels the task that made it when the client goes away, until it is stopped.

    The watching task is only started where the answer takes longer than a moment: it costs more
    than all the rest of a quick exchange.
    """

    __slots__ = ("_receive", "_task", "_timer", "_watcher", "gone")

    def __init__(self, receive: Receive) -> None:
        loop = asyncio.get_running_loop()
        self.gone = False
        self._receive = receive
        self._task = cast("asyncio.Task[None]", asyncio.current_task())
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


class _EngineRefusedError(UpstreamError):
    """The engine answered 5xx; that answer is passed on where nothing better is to be had."""

    def __init__(self, attempt: _Attempt) -> None:
        super().__init__("status", f"the engine answered {attempt.response.status}")
        self.attempt = attempt


class Relay:
    """Answers requests for inference. Everything it needs is given to it."""

    def __init__(
        self,
        *,
        settings: GatewaySettings,
        snapshot: Snapshot,
        fleet: Fleet,
        pool: UpstreamPool,
        authenticator: Authenticator,
        metrics: Metrics,
        evidence: Evidence,
        captures: Captures,
        admission: Admission,
        incarnation: str,
    ) -> None:
        self._settings = settings
        self._snapshot = snapshot
        self._fleet = fleet
        self._pool = pool
        self._auth = authenticator
        self._metrics = metrics
        self._evidence = evidence
        self._captures = captures
        self._admission = admission
        self._budget = RetryBudget(settings.retry_ratio)
        self._ids = (f"{incarnation[:16]}-{number:x}" for number in itertools.count(1))
        self._engine_keys = {
            replica.engine.name: (b"authorization", b"Bearer " + replica.engine.api_key.encode())
            for replica in fleet.replicas.values()
            if replica.engine.api_key
        }
        self._labelled: dict[tuple[str, str], tuple[Bound, HeaderList]] = {}
        # Set by the gateway when it goes: connections are closed, later nothing new is taken.
        self.draining = False
        self.refusing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = _Call(scope["path"], scope["query_string"], perf_counter())
        self._admission.inflight += 1
        try:
            await self._serve(call, scope, receive, send)
        except SluiceError as error:
            if not call.counted:
                self._metrics.refused(error.status)
            await send_error(send, error, call.id or next(self._ids), close=self.draining)
        finally:
            self._admission.inflight -= 1

    async def _serve(self, call: _Call, scope: Scope, receive: Receive, send: Send) -> None:
        if self._admission.full:
            raise OverloadedError("the gateway has as many requests as it can hold: try again")
        if self.refusing:
            raise OverloadedError("this gateway is shutting down: try again")
        headers = scope["headers"]
        self._read_headers(call, headers)
        view = self._snapshot.view
        if not self._snapshot.ready:
            raise NotReadyError("the gateway does not know its routes yet: the store is not there")
        key = self._auth.authenticate(call.authorization, view.keys)
        body = await self._read_body(receive, headers)
        if body is None:
            return
        call.request = wire.read_request(body)
        call.lane = find_lane(view, key, call.request.model)
        self._assign(call, key)
        await self._answer(call, receive, send)

    def _read_headers(self, call: _Call, headers: Iterable[tuple[bytes, bytes]]) -> None:
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
            call.id = next(self._ids)
        to_engine.append((b"x-request-id", call.id.encode()))

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
            if declared > maximum:
                raise _too_large(maximum)
            return await self._read_rest(receive, body)
        if len(body) > maximum:
            raise _too_large(maximum)
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

    def _assign(self, call: _Call, key: ApiKey) -> None:
        """Choose the version, and what is counted and kept of the exchange."""
        lane, trial = call.lane, call.lane.trial
        if trial is None:
            call.choice = choose(lane, "")
            return
        call.unit = unit_of(key.id, call.session or call.request.sticky or call.id)
        call.choice = choice = choose(lane, call.unit)
        call.tally = self._evidence.tally(
            lane.route.name, trial.id, "candidate" if choice.arm == "candidate" else "stable"
        )
        call.trial = trial.id
        call.capture = (
            not call.no_capture
            and call.path != wire.EMBEDDINGS
            and wants_capture(trial, call.id, lane.route.capture)
        )

    async def _answer(self, call: _Call, receive: Receive, send: Send) -> None:
        """Answer, and stop everything when the client goes away first."""
        watch = _ClientWatch(receive)
        try:
            await self._pass_on(call, send)
        except asyncio.CancelledError:
            if not watch.gone:
                raise
        finally:
            watch.stop()

    async def _pass_on(self, call: _Call, send: Send) -> None:
        self._budget.earn()
        try:
            attempt = await self._ask(call)
        except BaseException as error:
            self._account_failure(call, error)
            raise
        try:
            if attempt.reader is not None:
                await self._stream(call, attempt, attempt.reader, send)
            elif attempt.whole:
                await self._deliver_whole(call, attempt, send)
            else:
                await self._deliver_large(call, attempt, send)
        except asyncio.CancelledError:
            self._account(call, attempt, _CLIENT_GONE, _usage_so_far(attempt))
            raise
        finally:
            attempt.end("unknown")

    # Who answers.

    async def _ask(self, call: _Call) -> _Attempt:
        """The first answer that can be passed on. Nothing was sent to the client before it."""
        choice = call.choice
        try:
            return await self._ask_version(call, choice.served)
        except UnavailableError:
            if choice.fallback is None:
                raise
        call.fell_back = True
        self._metrics.fell_back(call.lane.route.name)
        return await self._ask_version(call, choice.fallback)

    async def _ask_version(self, call: _Call, served: Served) -> _Attempt:
        tried: list[Replica] = []
        while True:
            replica = self._replica(served, tried)
            try:
                return await self._attempt(call, served, replica)
            except UpstreamError as error:
                self._metrics.upstream_error(replica.engine.name, error.reason)
                tried.append(replica)
                if not self._may_retry(served, tried):
                    if isinstance(error, _EngineRefusedError) and self._is_last(call, served):
                        return error.attempt
                    raise

    def _replica(self, served: Served, tried: Sequence[Replica]) -> Replica:
        found = self._fleet.available(served.urls, tried, perf_counter())
        if found:
            return pick(found, getrandbits(32))
        name = served.version.name
        if not served.urls:
            raise NotResidentError(f"no engine serves {name} yet: try again in a moment")
        raise EngineUnavailableError(f"no replica that serves {name} answers: try again")

    def _may_retry(self, served: Served, tried: Sequence[Replica]) -> bool:
        return (
            len(tried) == 1
            and bool(self._fleet.available(served.urls, tried, perf_counter()))
            and self._budget.spend()
        )

    def _is_last(self, call: _Call, served: Served) -> bool:
        return call.choice.fallback is None or served is call.choice.fallback

    async def _attempt(self, call: _Call, served: Served, replica: Replica) -> _Attempt:
        """Ask one replica, up to the first byte that could go to the client.

        A 5xx answer is an UpstreamError; any other status is an answer.
        """
        attempt = _Attempt(served, replica, self._request(call, served, replica))
        try:
            response = attempt.response
            call.sent_at = perf_counter()
            await response.open()
            if response.status == 200 and _is_stream(response):
                await self._first_events(call, attempt)
            else:
                await self._whole_body(attempt)
            call.first_byte_at = perf_counter()
        except UpstreamError:
            attempt.end("failed")
            raise
        except BaseException:
            attempt.end("unknown")
            raise
        if response.status >= 500:
            attempt.end("failed")
            raise _EngineRefusedError(attempt)
        return attempt

    def _request(self, call: _Call, served: Served, replica: Replica) -> Response:
        request, path = call.request, call.path
        if served.version.rewrites_body:
            body = wire.render(request, served.version, path, ask_usage=True)
        else:
            ask = request.stream and not request.wants_usage and path in wire.USAGE_ON_REQUEST
            body = wire.splice(request, served.name, ask_usage=ask)
        headers = call.engine_headers
        if (key := self._engine_keys.get(replica.engine.name)) is not None:
            headers = [*headers, key]
        target = path.encode() if not call.query else path.encode() + b"?" + call.query
        return self._pool.request(replica.url, b"POST", target, headers, body)

    async def _first_events(self, call: _Call, attempt: _Attempt) -> None:
        reader = StreamReader(strip_usage=not call.request.wants_usage)
        attempt.reader = reader
        while not attempt.first:
            data = await attempt.response.read()
            if not data:
                break
            attempt.first = reader.feed(data)
            if reader.failed:
                raise UpstreamError("error_event", "the engine began its stream with an error")

    async def _whole_body(self, attempt: _Attempt) -> None:
        """Hold the answer until it is whole, or until it is too large to be held."""
        parts: list[bytes] = []
        size = 0
        while data := await attempt.response.read():
            parts.append(data)
            size += len(data)
            if size > self._settings.maximum_answer_bytes:
                break
        else:
            attempt.whole = True
        attempt.first = parts[0] if len(parts) == 1 else b"".join(parts)

    # How the answer goes out.

    async def _deliver_whole(self, call: _Call, attempt: _Attempt, send: Send) -> None:
        body, status = attempt.first, attempt.response.status
        attempt.end("answered")
        headers = self._headers(call, attempt)
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        self._account(call, attempt, status, wire.read_usage(body) if status == 200 else None)
        if call.capture:
            self._keep(call, attempt, status, body)

    async def _deliver_large(self, call: _Call, attempt: _Attempt, send: Send) -> None:
        """Pass a large answer on as it comes; where it breaks off, so does ours."""
        status = attempt.response.status
        headers = self._headers(call, attempt)
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
            self._broke(call, attempt, error)
            return
        attempt.end("answered")
        await send({"type": "http.response.body", "body": b""})
        self._account(call, attempt, status, None)

    async def _stream(
        self, call: _Call, attempt: _Attempt, reader: StreamReader, send: Send
    ) -> None:
        headers = self._headers(call, attempt)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        response, data = attempt.response, attempt.first
        try:
            while True:
                if data:
                    call.pieces += 1
                    if call.capture:
                        self._tee(call, data)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                read = await response.read()
                if not read:
                    break
                data = reader.feed(read)
        except UpstreamError as error:
            await send({"type": "http.response.body", "body": error_event(error)})
            self._broke(call, attempt, error)
            return
        rest = reader.close()
        attempt.end("failed" if reader.failed else "answered")
        await send({"type": "http.response.body", "body": rest})
        if reader.failed:
            self._metrics.upstream_error(attempt.replica.engine.name, "error_event")
        self._account(call, attempt, 502 if reader.failed else 200, reader.usage)
        if call.capture:
            self._tee(call, rest)
        if call.capture:
            self._keep(call, attempt, 200, b"".join(call.captured))

    def _headers(self, call: _Call, attempt: _Attempt) -> HeaderList:
        headers = [pair for pair in attempt.response.headers if pair[0] not in _NOT_TO_CLIENT]
        headers.append((b"x-request-id", call.id.encode()))
        headers += self._label(call, attempt.served)[1]
        if call.fell_back:
            headers.append(_FALLBACK)
        if self.draining:
            headers.append(_CLOSE)
        return headers

    # What is kept of it.

    def _broke(self, call: _Call, attempt: _Attempt, error: UpstreamError) -> None:
        self._metrics.upstream_error(attempt.replica.engine.name, error.reason)
        attempt.end("failed")
        self._account(call, attempt, error.status, _usage_so_far(attempt))

    def _account(self, call: _Call, attempt: _Attempt, code: int, usage: wire.Usage | None) -> None:
        """Count an exchange that got an answer. A stream that broke counts under 502, as it would
        have been answered had it broken earlier."""
        call.counted = True
        now = perf_counter()
        total = now - call.started
        first = call.first_byte_at - call.started
        route, choice = call.lane.route, call.choice
        bound = self._label(call, attempt.served)[0]
        self._metrics.answered(bound, route.name, attempt.served.version.name, choice.arm, code)
        bound.duration.observe(total)
        if attempt.reader is not None:
            bound.first_token.observe(first)
            if call.pieces > 1:
                bound.inter_token.observe((now - call.first_byte_at) / (call.pieces - 1))
        self._metrics.overhead.observe(call.sent_at - call.started)
        if usage is not None:
            bound.prompt_tokens.inc(usage.prompt)
            bound.completion_tokens.inc(usage.completion)
        if call.tally is not None:
            self._count(call, call.tally, total, first if attempt.reader else None, code >= 500)

    def _account_failure(self, call: _Call, error: BaseException) -> None:
        """Count an exchange that no engine answered."""
        if not isinstance(error, SluiceError | asyncio.CancelledError):
            return
        call.counted = True
        code = error.status if isinstance(error, SluiceError) else _CLIENT_GONE
        served, route = call.choice.served, call.lane.route
        bound = self._label(call, served)[0]
        self._metrics.answered(bound, route.name, served.version.name, call.choice.arm, code)
        if call.tally is not None:
            self._count(call, call.tally, perf_counter() - call.started, None, code >= 500)

    def _count(
        self, call: _Call, tally: Tally, total: float, first: float | None, failed: bool
    ) -> None:
        slo = call.lane.route.slo
        tally.requests += 1
        tally.seconds += total
        tally.errors += failed or call.fell_back
        tally.fallbacks += call.fell_back
        if slo.ttft_seconds is not None and first is not None and first > slo.ttft_seconds:
            tally.slow_first_token += 1
        if slo.total_seconds is not None and total > slo.total_seconds:
            tally.slow_total += 1
        tally.dirty = True

    def _tee(self, call: _Call, data: bytes) -> None:
        call.captured.append(data)
        call.captured_bytes += len(data)
        if call.captured_bytes > self._captures.largest:
            call.capture = False
            call.captured.clear()
            self._captures.too_large()

    def _keep(self, call: _Call, attempt: _Attempt, status: int, body: bytes) -> None:
        stream = attempt.reader is not None
        self._captures.offer(
            Seen(
                request_id=call.id,
                route=call.lane.route.name,
                trial=call.trial,
                arm=call.choice.arm,
                unit=call.unit,
                path=call.path,
                request=call.request.body,
                version=attempt.served.version.number,
                status=status,
                body=body,
                stream=stream,
                ttft_seconds=call.first_byte_at - call.sent_at if stream else None,
                total_seconds=perf_counter() - call.sent_at,
                at=datetime.now(UTC),
            )
        )

    def _label(self, call: _Call, served: Served) -> tuple[Bound, HeaderList]:
        """The metrics and headers of a version in an arm, made once."""
        key = (served.version.name, call.choice.arm)
        found = self._labelled.get(key)
        if found is None:
            name, route = served.version.name, call.lane.route.name
            found = self._labelled[key] = (
                self._metrics.bound(route, name, call.choice.arm),
                [
                    (b"x-sluice-route", route.encode()),
                    (b"x-sluice-version", name.encode()),
                    (b"x-sluice-arm", call.choice.arm.encode()),
                ],
            )
        return found


def find_lane(view: View, key: ApiKey, model: str) -> Lane:
    """What a client asked for. Raises ModelNotFoundError or PermissionDeniedError."""
    lane = view.lanes.get(model)
    if lane is None:
        route, number = parse_model(model)
        if number is not None and route in view.lanes:
            raise ModelNotFoundError(f"{route} has no version {number}", param="model")
        raise ModelNotFoundError(
            f"there is no route {route!r}: GET /v1/models lists those that there are",
            param="model",
        )
    if not key.allows_route(lane.route.name):
        raise PermissionDeniedError(
            f"this API key may not use the route {lane.route.name!r}", param="model"
        )
    return lane


async def send_error(
    send: Send, error: SluiceError, request_id: str, *, close: bool = False
) -> None:
    """Answer with an error in OpenAI's shape."""
    body = error_body(error)
    headers = [
        _JSON,
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
    ]
    if error.status == 503:
        headers.append(_RETRY_AFTER)
    if close or error.status == 413:
        # The rest of a body that is too large is not worth reading.
        headers.append(_CLOSE)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _without(headers: HeaderList, connection: bytes) -> HeaderList:
    """The headers but for those that the client named as meant for this hop only."""
    named = {token.strip().lower() for token in connection.split(b",")}
    return [pair for pair in headers if pair[0] not in named]


def _is_stream(response: Response) -> bool:
    content_type = response.header(b"content-type")
    return content_type is not None and content_type.startswith(b"text/event-stream")


def _usage_so_far(attempt: _Attempt) -> wire.Usage | None:
    return attempt.reader.usage if attempt.reader is not None else None


def _too_large(maximum: int) -> TooLargeError:
    return TooLargeError(f"the body is larger than {maximum} bytes")
