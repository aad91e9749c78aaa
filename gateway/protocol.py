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
from functools import partial
from http import HTTPStatus
from typing import Any, Final, Protocol, cast
from urllib.parse import unquote

import httptools
import uvicorn
from uvicorn.server import ServerState

from gateway.errors import BadHttpError, HeadTooLargeError, InternalError, error_body
from gateway.wire import INFERENCE_PATHS
from rollout.errors import SluiceError

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
HeaderList = list[tuple[bytes, bytes]]
Application = Callable[[Scope, Any, Any], Awaitable[None]]
# The same for a request that is known already: called with `receive` and `send`.
Answer = Callable[[Any, Any], Awaitable[None]]
# Answers a request that has arrived whole without a task of its own; False where it can't.
Direct = Callable[["Exchange"], bool]

# A body is read from the socket no faster than the application takes it.
_BODY_HIGH_WATER: Final = 256 * 1024
_HEADER_BYTES: Final = 256 * 1024
# A body of this size follows its head at once, or else a task waits for it after a check.
_SOON_BYTES: Final = 64 * 1024
# How long a client may take to send the head of a request it has begun.
_HEAD_SECONDS: Final = 30.0
# How long a client that was refused may go on sending: most read the answer only after that.
_LINGER_SECONDS: Final = 30.0
_CHECK_SECONDS: Final = 2.0
# As they stand in a request line; whatever is written differently is no plain case.
_PLAIN: Final = frozenset(path.encode() for path in INFERENCE_PATHS)
_BODILESS: Final = frozenset({204, 304})
# What a chunk begins with, by its size, for those that most events of a stream have.
_SIZE_LINES: Final = tuple([b"%x\r\n" % size for size in range(2048)])
_LAST_CHUNKS: Final = b"\r\n0\r\n\r\n"
_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


def _put_line(parts: list[bytes], name: bytes, value: bytes) -> None:
    # Compiled, this is quicker than one `+=` of all four.
    parts.append(name)
    parts.append(b": ")
    parts.append(value)
    parts.append(b"\r\n")


class Sink(Protocol):
    """Who answers an exchange without a task, and is told here what a task would find out."""

    def pause(self) -> None:
        """The client takes no more for now."""

    def resume(self) -> None: ...

    def gone(self) -> None:
        """The client went away."""


class ClientProtocol:
    """One connection of a client: requests in, answered one after the other.

    It has all that asyncio.Protocol has, but is none, for what inherits from a class that is not
    compiled is not laid out by the compiler.
    """

    __slots__ = (
        "_active_at",
        "_app",
        "_check_seconds",
        "_config",
        "_current",
        "_direct",
        "_expects",
        "_head_began_at",
        "_header_bytes",
        "_headers",
        "_keep_alive_timer",
        "_lingers_since",
        "_loop",
        "_next",
        "_parser",
        "_paused",
        "_reading",
        "_stall_seconds",
        "_stalled",
        "_state",
        "_undecided",
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
        *,
        direct: Direct | None = None,
        stall_seconds: float = 120.0,
    ) -> None:
        """`stall_seconds`: how long a client may take none of an answer that waits for it."""
        if not config.loaded:
            config.load()
        self._config = config
        self._state = server_state
        self._app = cast(Application, config.loaded_app)
        self._loop = _loop or asyncio.get_running_loop()
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        # What follows a request that closes the connection is not read, and no error.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._direct = direct
        self._stall_seconds = stall_seconds
        self._check_seconds = min(_CHECK_SECONDS, stall_seconds / 4)
        # Answered directly if it is whole soon.
        self._undecided: Exchange | None = None
        self._current: Exchange | None = None  # the request that is being answered
        self._reading: Exchange | None = None  # the request whose body is arriving
        self._next: deque[Exchange] = deque()
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = 0
        self._expects = False
        self._paused = False
        self._lingers_since: float | None = None  # closed by us, while the client still sends
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
        self._keep_alive_timer = self._loop.call_later(self._check_seconds, self._check_idle)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._state.connections.discard(self)
        if self._keep_alive_timer is not None:
            self._keep_alive_timer.cancel()
        self._undecided = None
        for exchange in (self._current, self._reading, *self._next):
            if exchange is not None:
                exchange.disconnect()
        self._next.clear()
        self.resume_writing()
        self._parser = None

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            self._active_at = self._loop.time()
            return
        try:
            self._parser.feed_data(data)
            if self._undecided is not None and not self._undecided.comes_soon:
                self._run(self._undecided)
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

    def eof_received(self) -> None:
        """The client writes no more; the transport closes."""

    def pause_writing(self) -> None:
        if self._writable is None:
            self._writable = self._loop.create_future()
            self._stalled = (self.transport.get_write_buffer_size(), self._loop.time())
            if self._current is not None and self._current.sink is not None:
                self._current.sink.pause()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)
        if self._current is not None and self._current.sink is not None:
            self._current.sink.resume()

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
            self._current = exchange
            if self._direct is not None and exchange.plain and self._writable is None:
                self._undecided = exchange
            else:
                self._run(exchange)
        else:
            # A pipelined request waits for its turn, and the rest of them in the socket.
            self._next.append(exchange)
            self.pause_reading()

    def on_body(self, body: bytes) -> None:
        if self._reading is not None:
            self._reading.body_arrived(body)

    def on_message_complete(self) -> None:
        exchange, self._reading = self._reading, None
        if exchange is None:
            return
        exchange.body_ended()
        if exchange is self._undecided:
            self._undecided = None
            self._answer(exchange)

    # uvicorn's side

    def shutdown(self) -> None:
        """Close once the answer that is under way is out."""
        if self._current is None or self._lingers_since is not None:
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

    def answered(self, exchange: "Exchange") -> None:
        """The answer is out: take the next request, or wait for one."""
        self._state.total_requests += 1
        self._active_at = self._loop.time()
        self._current = None
        if not exchange.keep_alive:
            self._close(linger=exchange.unread)
        elif self._next:
            self._current = self._next.popleft()
            self._run(self._current)
        if not self.transport.is_closing():
            self.resume_reading()

    def _exchange(self) -> "Exchange":
        parser = self._parser
        assert parser is not None  # noqa: S101 - it is the one that calls
        version = parser.get_http_version()
        return Exchange(
            self,
            self._loop,
            method=parser.get_method(),
            url=self._url,
            target=None if self._url in _PLAIN else httptools.parse_url(self._url),
            version=version,
            headers=self._headers,
            keep_alive=version != "1.0" and parser.should_keep_alive(),
            expects=self._expects,
        )

    def _answer(self, exchange: "Exchange") -> None:
        """Answer a request that is whole, directly where that can be."""
        assert self._direct is not None  # noqa: S101 - it is why the exchange was undecided
        try:
            taken = self._direct(exchange)
        except Exception:  # noqa: BLE001 - the last net; it says what happened
            _log.exception("a request failed in a way that nobody foresaw")
            exchange.refuse(InternalError("the gateway failed; its log says why"))
            self.transport.close()
            return
        if not taken:
            self._run(exchange)

    def _run(self, exchange: "Exchange") -> None:
        """Answer in a task."""
        self._undecided = None
        self.run(exchange, partial(self._app, exchange.scope()))

    def run(self, exchange: "Exchange", answer: Answer) -> None:
        task = self._loop.create_task(exchange.run(answer))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > _HEADER_BYTES:
            raise HeadTooLargeError(f"the head of the request is larger than {_HEADER_BYTES} bytes")

    def _refuse(self, error: SluiceError) -> None:
        """Answer what cannot be parsed, and close; an answer that is under way is finished first."""
        self._parser = None
        self._undecided = None
        exchange = self._current
        if exchange is None:
            exchange = Exchange(self, self._loop)
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
            self._lingers_since = self._active_at = self._loop.time()
            self._paused = False
            self.transport.resume_reading()
            self.transport.write_eof()
        else:
            self.transport.close()

    def _check_idle(self) -> None:
        """Close a connection that is idle for too long, or whose request never gets complete."""
        now = self._loop.time()
        if self._lingers_since is not None:
            quiet = now - self._active_at >= self._check_seconds
            if quiet or now - self._lingers_since > _LINGER_SECONDS:
                self.transport.close()
                return
        elif self._undecided is not None:
            self._run(self._undecided)
        elif self._current is None:
            began = self._head_began_at
            idle = now - self._active_at > self._config.timeout_keep_alive
            if (idle and began is None) or (began is not None and now - began > _HEAD_SECONDS):
                self.transport.close()
                return
        elif self._writable is not None and self._is_stalled(now):
            self.transport.abort()
            return
        self._keep_alive_timer = self._loop.call_later(self._check_seconds, self._check_idle)

    def _is_stalled(self, now: float) -> bool:
        """Whether the client is there, but has taken nothing of its answer for too long."""
        size, since = self._stalled
        waiting = self.transport.get_write_buffer_size()
        if waiting != size:
            self._stalled = (waiting, now)
            return False
        return now - since > self._stall_seconds


class Exchange:
    """One request and its answer: as ASGI sees them, or answered directly by a `Sink`."""

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
        "_size",
        "_target",
        "_waiter",
        "headers",
        "keep_alive",
        "method",
        "sink",
        "url",
        "version",
    )

    def __init__(
        self,
        connection: ClientProtocol,
        loop: asyncio.AbstractEventLoop,
        *,
        method: bytes = b"",
        url: bytes = b"",
        target: Any = None,
        version: str = "1.1",
        headers: HeaderList | None = None,
        keep_alive: bool = False,
        expects: bool = False,
    ) -> None:
        self._connection = connection
        self._loop = loop
        self.method = method
        self.url = url
        self._target = target  # the parsed url, where it was looked at
        self.version = version
        self.headers = headers or []
        self.sink: Sink | None = None
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

    def scope(self) -> Scope:
        """The request as ASGI says it."""
        url = self._target or httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": self.version,
            "method": self.method.decode("ascii"),
            "scheme": "http",
            "path": unquote(path) if "%" in path else path,
            "raw_path": url.path,
            "query_string": url.query or b"",
            "root_path": "",
            "headers": self.headers,
            "client": self._connection.client,
            "server": self._connection.server,
        }

    # For whoever answers directly.

    @property
    def plain(self) -> bool:
        """Whether it may be answered directly, if it is whole."""
        return self.method == b"POST" and self.url in _PLAIN and not self._expects

    @property
    def comes_soon(self) -> bool:
        """Whether the rest of the body is worth a short wait: many clients send it by itself."""
        for name, value in self.headers:
            if name == b"content-length":
                return int(value) <= _SOON_BYTES
        return False

    def take_body(self) -> bytes:
        """All of the body, once."""
        self._asked = True
        body, self._body, self._size = self._body, [], -1
        return body[0] if len(body) == 1 else b"".join(body)

    @property
    def write_paused(self) -> bool:
        return self._connection.write_paused

    def hand_over(self, answer: Answer) -> None:
        """Let a task answer instead; it receives no body, for that was taken."""
        self.sink = None
        self._connection.run(self, answer)

    def begin(self, status: int, headers: HeaderList) -> None:
        """The head of the answer; it leaves with the first piece."""
        self._begin(status, headers)

    def write(self, body: bytes, *, more: bool = False) -> None:
        """A piece of the answer, or all of it."""
        if not more:
            self.sink = None
        self._write(body, more=more)

    def cut(self) -> None:
        """End the connection, for the answer cannot be ended."""
        self.sink = None
        self._connection.transport.abort()

    # For ASGI.

    async def run(self, answer: Answer) -> None:
        """Run the application; an answer that it leaves unfinished ends with the connection."""
        try:
            await answer(self.receive, self.send)
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
        self._write(message["body"], more=message.get("more_body", False))

    def _write(self, body: bytes, *, more: bool) -> None:
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
            self._connection.transport.write(data)
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
        sink, self.sink = self.sink, None
        if sink is not None:
            sink.gone()
        self._wake()

    def _begin(self, status: int, headers: HeaderList) -> None:
        parts = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        self._begun = True
        if self._more_body:
            # Nobody will read the rest of the request, so the connection is good for no other.
            self.keep_alive = False
        self._bodiless = status in _BODILESS or self.method == b"HEAD"
        framed = False
        for name, value in self._connection.default_headers:
            _put_line(parts, name, value)
        for name, value in headers:
            _put_line(parts, name, value)
            if name == b"content-length":
                framed = True
                self._remaining = int(value)
            elif name == b"connection" and value == b"close":
                self.keep_alive = False
        if not framed and not self._bodiless:
            self._chunked = self.version == "1.1"
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
        size = len(body)
        line = _SIZE_LINES[size] if size < len(_SIZE_LINES) else b"%x\r\n" % size
        return b"".join((line, body, b"\r\n" if more else _LAST_CHUNKS))

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
