"""HTTP/1.1 towards clients: what uvicorn's server speaks with each connection.

It does what uvicorn's own protocol does, for half of its cost: the head of an answer leaves together
with the first bytes of its body, a request whose body came along needs no event, and a connection
has one timer and not one for each request. Header names and values are not checked again, since
they come from a parser that did, or from this program.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import unquote

import httptools
import uvicorn
from uvicorn.server import ServerState

from gateway.errors import BadHttpError, HeadTooLargeError, InternalError, error_body
from rollout.errors import SluiceError

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]

# A body is read from the socket no faster than the application takes it.
_BODY_HIGH_WATER: Final = 256 * 1024
_HEADER_BYTES: Final = 256 * 1024
# How long a client may take to send the head of a request it has begun.
_HEAD_SECONDS: Final = 30.0
_CHECK_SECONDS: Final = 2.0
# How long a client may take none of an answer that waits for it.
_STALL_SECONDS: Final = 120.0
_BODILESS: Final = frozenset({204, 304})
_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class ClientProtocol(asyncio.Protocol):
    """One connection of a client: requests in, answered one after the other."""

    __slots__ = (
        "_active_at",
        "_app",
        "_config",
        "_current",
        "_expects",
        "_head_began_at",
        "_header_bytes",
        "_headers",
        "_keep_alive_timer",
        "_lingering",
        "_loop",
        "_next",
        "_parser",
        "_paused",
        "_reading",
        "_stalled",
        "_state",
        "_url",
        "_writable",
        "client",
        "server",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],  # noqa: ARG002 - uvicorn's signature
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not config.loaded:
            config.load()
        self._config = config
        self._state = server_state
        self._app = cast(Application, config.loaded_app)
        self._loop = _loop or asyncio.get_running_loop()
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        # What follows a request that closes the connection is not read, and no error.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._current: _Exchange | None = None  # the request that is being answered
        self._reading: _Exchange | None = None  # the request whose body is arriving
        self._next: deque[_Exchange] = deque()
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = 0
        self._expects = False
        self._paused = False
        self._lingering = False
        self._writable: asyncio.Future[None] | None = None
        self._stalled = (0, 0.0)  # how much waits to be written, and since when exactly that
        self._active_at = self._loop.time()
        self._head_began_at: float | None = None
        self._keep_alive_timer: asyncio.TimerHandle | None = None
        self.client: tuple[str, int] | None = None
        self.server: tuple[str, int | None] | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._state.connections.add(self)  # type: ignore[arg-type]
        peer, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        self.client = peer[:2] if isinstance(peer, tuple) else None
        self.server = own[:2] if isinstance(own, tuple) else None
        self._keep_alive_timer = self._loop.call_later(_CHECK_SECONDS, self._check_idle)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._state.connections.discard(self)
        if self._keep_alive_timer is not None:
            self._keep_alive_timer.cancel()
        for exchange in (self._current, self._reading, *self._next):
            if exchange is not None:
                exchange.disconnect()
        self._next.clear()
        self.resume_writing()
        self._parser = None

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(BadHttpError("this server speaks HTTP/1.1 and nothing else"))
        except httptools.HttpParserError as exc:
            # What a callback below raised is hidden in the context of the parser's own error.
            cause = exc.__context__
            self._refuse(
                cause
                if isinstance(cause, SluiceError)
                else BadHttpError(f"the request is no valid HTTP: {exc}")
            )

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = self._loop.create_future()
            self._stalled = (self.transport.get_write_buffer_size(), self._loop.time())

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    # httptools' side

    def on_message_begin(self) -> None:
        self._url, self._headers, self._header_bytes, self._expects = b"", [], 0, False
        self._head_began_at = self._loop.time()

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reading is not None:
            # A trailer, which came after what it might contradict.
            self._count_header(len(name) + len(value))
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self._expects = True
        self._headers.append((name, value))
        self._count_header(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._head_began_at = None
        exchange = self._reading = self._exchange()
        if self._current is None:
            self._start(exchange)
        else:
            # A pipelined request waits for its turn, and the rest of them in the socket.
            self._next.append(exchange)
            self.pause_reading()

    def on_body(self, body: bytes) -> None:
        if self._reading is not None:
            self._reading.body_arrived(body)

    def on_message_complete(self) -> None:
        exchange, self._reading = self._reading, None
        if exchange is not None:
            exchange.body_ended()

    # uvicorn's side

    def shutdown(self) -> None:
        """Close once the answer that is under way is out."""
        if self._current is None:
            self.transport.close()
        else:
            self._current.keep_alive = False

    # What exchanges call.

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        return self._state.default_headers

    async def drain(self) -> None:
        if self._writable is not None:
            await self._writable

    @property
    def write_paused(self) -> bool:
        return self._writable is not None

    def pause_reading(self) -> None:
        if not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._paused and not self._next:
            self._paused = False
            self.transport.resume_reading()

    def answered(self, exchange: "_Exchange") -> None:
        """The answer is out: take the next request, or wait for one."""
        self._state.total_requests += 1
        self._active_at = self._loop.time()
        self._current = None
        if not exchange.keep_alive:
            self._close(linger=exchange.unread)
        elif self._next:
            self._start(self._next.popleft())
        if not self.transport.is_closing():
            self.resume_reading()

    def _exchange(self) -> "_Exchange":
        parser = self._parser
        assert parser is not None  # noqa: S101 - it is the one that calls
        url = httptools.parse_url(self._url)
        path = url.path.decode("ascii")
        version = parser.get_http_version()
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": unquote(path) if "%" in path else path,
            "raw_path": url.path,
            "query_string": url.query or b"",
            "root_path": "",
            "headers": self._headers,
            "client": self.client,
            "server": self.server,
        }
        keep_alive = version != "1.0" and parser.should_keep_alive()
        return _Exchange(self, scope, self._loop, keep_alive=keep_alive, expects=self._expects)

    def _start(self, exchange: "_Exchange") -> None:
        self._current = exchange
        task = self._loop.create_task(exchange.run(self._app))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > _HEADER_BYTES:
            raise HeadTooLargeError(f"the head of the request is larger than {_HEADER_BYTES} bytes")

    def _refuse(self, error: SluiceError) -> None:
        """Answer what cannot be parsed, and close; an answer that is under way is finished first."""
        self._parser = None
        exchange = self._current
        if exchange is None:
            exchange = _Exchange(self, {"method": "", "http_version": "1.1"}, self._loop)
        elif self._reading is not exchange:
            # Those that wait behind it may be what cannot be parsed; none of them is answered.
            self._next.clear()
            exchange.keep_alive = False
            return
        exchange.refuse(error)
        self._close(linger=True)

    def _close(self, *, linger: bool) -> None:
        """Close; with `linger` only our side, so that a client that is still sending reads the
        answer before its connection is reset."""
        if linger and self.transport.can_write_eof() and not self.transport.is_closing():
            self._parser = None
            self._lingering = True
            self._paused = False
            self.transport.resume_reading()
            self.transport.write_eof()
        else:
            self.transport.close()

    def _check_idle(self) -> None:
        """Close a connection that is idle for too long, or whose request never gets complete."""
        now = self._loop.time()
        if self._lingering:
            self.transport.close()
            return
        if self._current is None:
            began = self._head_began_at
            idle = now - self._active_at > self._config.timeout_keep_alive
            if (idle and began is None) or (began is not None and now - began > _HEAD_SECONDS):
                self.transport.close()
                return
        elif self._writable is not None and self._is_stalled(now):
            self.transport.abort()
            return
        self._keep_alive_timer = self._loop.call_later(_CHECK_SECONDS, self._check_idle)

    def _is_stalled(self, now: float) -> bool:
        """Whether the client is there, but has taken nothing of its answer for too long."""
        size, since = self._stalled
        waiting = self.transport.get_write_buffer_size()
        if waiting != size:
            self._stalled = (waiting, now)
            return False
        return now - since > _STALL_SECONDS


class _Exchange:
    """One request and its answer, as ASGI sees them."""

    __slots__ = (
        "_asked",
        "_begun",
        "_bodiless",
        "_body",
        "_chunked",
        "_connection",
        "_disconnected",
        "_ended",
        "_expects",
        "_head",
        "_loop",
        "_more_body",
        "_remaining",
        "_scope",
        "_size",
        "_waiter",
        "keep_alive",
    )

    def __init__(
        self,
        connection: ClientProtocol,
        scope: Scope,
        loop: asyncio.AbstractEventLoop,
        *,
        keep_alive: bool = False,
        expects: bool = False,
    ) -> None:
        self._connection = connection
        self._scope = scope
        self._loop = loop
        self._expects = expects
        self._asked = False
        self._body: list[bytes] = []
        self._size = 0
        self._more_body = True
        self._waiter: asyncio.Future[None] | None = None
        self._head: bytes | None = None
        self._begun = False
        self._bodiless = False
        self._chunked = False
        self._remaining = -1
        self._ended = False
        self._disconnected = False
        self.keep_alive = keep_alive

    async def run(self, app: Application) -> None:
        """Run the application; an answer that it leaves unfinished ends with the connection."""
        try:
            await app(self._scope, self.receive, self.send)
        except Exception:  # noqa: BLE001 - the last net; it says what happened
            _log.exception("a request failed in a way that nobody foresaw")
            self.refuse(InternalError("the gateway failed; its log says why"))
        finally:
            if not self._ended and not self._disconnected:
                self._connection.transport.close()

    def refuse(self, error: SluiceError) -> None:
        """Answer with an error and be done, where no other answer has begun."""
        self.keep_alive = False
        if not self._begun and not self._disconnected:
            body = error_body(error)
            length = b"%d" % len(body)
            headers = [(b"content-type", b"application/json"), (b"content-length", length)]
            self._begin(error.status, headers)
            self._connection.transport.write((self._head or b"") + body)
        self.disconnect()

    @property
    def unread(self) -> bool:
        """Whether the client may still be sending a body."""
        return self._more_body

    async def receive(self) -> Message:
        connection = self._connection
        if not self._asked:
            self._asked = True
            if self._more_body and not self._body and not self._disconnected:
                # The first call never waits, so that whoever asks can set a limit for the others,
                # and refuse by the head alone before a client that expects it is told to send.
                return {"type": "http.request", "body": b"", "more_body": True}
        if self._expects and self._more_body:
            self._expects = False
            connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self._body or self._disconnected or self._ended):
            if not self._more_body and self._size >= 0:
                break
            connection.resume_reading()
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._disconnected or self._ended:
            return {"type": "http.disconnect"}
        body, self._body = self._body, []
        # From now on there is nothing to be received but the end.
        self._size = 0 if self._more_body else -1
        connection.resume_reading()
        data = body[0] if len(body) == 1 else b"".join(body)
        return {"type": "http.request", "body": data, "more_body": self._more_body}

    async def send(self, message: Message) -> None:
        connection = self._connection
        if connection.write_paused:
            await connection.drain()
        if self._disconnected:
            return
        if message["type"] == "http.response.start":
            self._begin(message["status"], message["headers"])
            return
        body: bytes = message["body"]
        more = message.get("more_body", False)
        if self._bodiless:
            data = b""
        elif self._chunked:
            data = self._chunk(body, more=more)
        else:
            self._remaining -= len(body)
            data = body
        if (head := self._head) is not None:
            self._head = None
            data = head + data
        if data:
            connection.transport.write(data)
        if not more:
            self._end()

    def body_arrived(self, data: bytes) -> None:
        self._body.append(data)
        self._size += len(data)
        if self._size > _BODY_HIGH_WATER:
            self._connection.pause_reading()
        self._wake()

    def body_ended(self) -> None:
        self._more_body = False
        self._wake()

    def disconnect(self) -> None:
        self._disconnected = True
        self._wake()

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        parts = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        self._begun = True
        if self._more_body:
            # Nobody will read the rest of the request, so the connection is good for no other.
            self.keep_alive = False
        self._bodiless = status in _BODILESS or self._scope["method"] == "HEAD"
        framed = False
        for name, value in self._connection.default_headers:
            parts += (name, b": ", value, b"\r\n")
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
            if name == b"content-length":
                framed = True
                self._remaining = int(value)
            elif name == b"connection" and value == b"close":
                self.keep_alive = False
        if not framed and not self._bodiless:
            self._chunked = self._scope["http_version"] == "1.1"
            if self._chunked:
                parts.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False
        if not self.keep_alive and (b"connection", b"close") not in headers:
            parts.append(b"connection: close\r\n")
        parts.append(b"\r\n")
        self._head = b"".join(parts)

    def _chunk(self, body: bytes, *, more: bool) -> bytes:
        if not body:
            return b"" if more else b"0\r\n\r\n"
        return b"%x\r\n%b\r\n%b" % (len(body), body, b"" if more else b"0\r\n\r\n")

    def _end(self) -> None:
        self._ended = True
        if self._remaining > 0 and not self._bodiless:
            # An answer cut short: only the end of the connection can say so.
            self.keep_alive = False
        self._wake()
        self._connection.answered(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
