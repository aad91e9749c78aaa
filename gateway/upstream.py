"""The connection pool to the engines: keep-alive, limits, cancel, backpressure.

    async with pool.request(url, b"POST", b"/v1/chat/completions", headers, body) as response:
        response.status, response.headers
        async for data in response: ...

Leaving the block before the end of the answer closes the connection, which is how an engine is told
to stop. Limits are kept by one sweep over the busy connections, so a request arms no timer.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Protocol, Self, cast
from urllib.parse import urlsplit

import httptools

from gateway.errors import Reason, UpstreamError

Headers = Sequence[tuple[bytes, bytes]]

_SWEEP_SECONDS: Final = 0.1
_HIGH_WATER: Final = 256 * 1024
# A larger body is handed over by itself: joining it to its head would copy it.
_JOINED: Final = 64 * 1024


class Limits(Protocol):
    """In seconds, and connections for each address; `gateway.settings.UpstreamSection` is one."""

    @property
    def connect_seconds(self) -> float: ...
    @property
    def first_byte_seconds(self) -> float: ...
    @property
    def between_bytes_seconds(self) -> float: ...
    @property
    def total_seconds(self) -> float: ...
    @property
    def idle_seconds(self) -> float: ...
    @property
    def maximum_idle(self) -> int: ...


class UpstreamPool:
    """Connections to any number of engines, by url. Use it within one running event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._origins: dict[str, _Origin] = {}
        self._busy: set[_Connection] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def request(
        self, url: str, method: bytes, path: bytes, headers: Headers = (), body: bytes = b""
    ) -> "Response":
        """A request that is sent on entering the response; `url` is the engine's root.

        `host` and `content-length` are set here. Raises UpstreamError from then on.
        """
        origin = self._origins.get(url)
        if origin is None:
            origin = self._origins[url] = _Origin(url)
        return Response(self, origin, origin.head(method, path, headers, len(body)), body)

    def forget(self, url: str) -> None:
        """Keep no connection to an engine that is gone; what is under way there goes on."""
        origin = self._origins.pop(url, None)
        while origin is not None and origin.idle:
            origin.idle.popleft().abort()

    async def aclose(self) -> None:
        """Close every connection; what is under way fails with UpstreamError."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for connection in [*self._busy, *(c for o in self._origins.values() for c in o.idle)]:
            connection.fail("reset", "the gateway is shutting down")
        self._busy.clear()
        for origin in self._origins.values():
            origin.idle.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    @property
    def open_connections(self) -> int:
        return len(self._busy) + sum(len(origin.idle) for origin in self._origins.values())

    # What responses call.

    def take(self, origin: "_Origin") -> "_Connection | None":
        """An idle connection that the engine is not about to close, the warmest first."""
        loop = self._running()
        while origin.idle:
            connection = origin.idle.pop()
            if not connection.usable or loop.time() - connection.touched > self._idle_seconds:
                connection.abort()
                continue
            self._busy.add(connection)
            return connection
        return None

    async def connect(self, origin: "_Origin") -> "_Connection":
        loop = self._running()
        try:
            async with asyncio.timeout(self.limits.connect_seconds):
                connection = _Connection(loop)
                await loop.create_connection(
                    lambda: cast(asyncio.Protocol, connection),
                    origin.host,
                    origin.port,
                    ssl=origin.tls,
                )
        except TimeoutError as exc:
            raise UpstreamError(
                "connect",
                f"the engine took no connection within {self.limits.connect_seconds:g} s",
            ) from exc
        except OSError as exc:
            # Clients read this, and where an engine is, is no business of theirs.
            raise UpstreamError("connect", "the engine takes no connection") from exc
        self._busy.add(connection)
        return connection

    def give_back(self, origin: "_Origin", connection: "_Connection") -> None:
        """Keep the connection for the next request, or close it where it can carry none."""
        self._busy.discard(connection)
        known = self._origins.get(origin.url) is origin
        connection.listener = None
        if known and connection.reusable and len(origin.idle) < self.limits.maximum_idle:
            connection.rest()
            origin.idle.append(connection)
        else:
            connection.abort()

    @property
    def _idle_seconds(self) -> float:
        return self.limits.idle_seconds

    def _running(self) -> asyncio.AbstractEventLoop:
        # Kept, because Python 3.11 makes a system call of asking for it.
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        if self._timer is None:
            self._timer = self._loop.call_later(_SWEEP_SECONDS, self._sweep, self._loop)
        return self._loop

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now, limits = loop.time(), self.limits
        for connection in tuple(self._busy):
            connection.check(now, limits)
        for origin in self._origins.values():
            # The oldest is at the left, for the warmest is taken from the right.
            while origin.idle and now - origin.idle[0].touched > limits.idle_seconds:
                origin.idle.popleft().abort()
        alive = self._busy or any(origin.idle for origin in self._origins.values())
        self._timer = loop.call_later(_SWEEP_SECONDS, self._sweep, loop) if alive else None


class Response:
    """An answer of an engine, once entered. `read` gives b"" at its end, and again after that."""

    __slots__ = ("_body", "_connection", "_head", "_origin", "_pool", "headers", "status")

    def __init__(self, pool: UpstreamPool, origin: "_Origin", head: bytes, body: bytes) -> None:
        self._pool = pool
        self._origin = origin
        self._head = head
        self._body = body
        self._connection: _Connection | None = None
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> bool:
        """Send the request at once, where a connection is idle; `close` must follow."""
        connection = self._pool.take(self._origin)
        if connection is None:
            return False
        self._connection = connection
        connection.send(self._head, self._body)
        return True

    async def open(self) -> None:
        """Wait for the head of the answer, with the request sent first where it was not yet;
        `close` must follow."""
        if self._connection is not None or self.start():
            connection = cast(_Connection, self._connection)
            try:
                await connection.wait_for_head()
                self._take_head(connection)
                return
            except UpstreamError as exc:
                # The engine closed the connection while it was idle and we wrote to it: it has
                # not seen the request.
                if exc.reason != "reset" or connection.received:
                    raise
                self.close()
        connection = self._connection = await self._pool.connect(self._origin)
        connection.send(self._head, self._body)
        await connection.wait_for_head()
        self._take_head(connection)

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call `listener` whenever something has arrived, in place of anyone who waits.

        It then asks `broken`, `has_head`, `take` and `complete`; None gives the answer back to
        those who wait.
        """
        if self._connection is not None:
            self._connection.listener = listener

    @property
    def broken(self) -> UpstreamError | None:
        """Why there will be no more than what has arrived."""
        return None if self._connection is None else self._connection.error

    @property
    def buffered(self) -> int:
        """How much has arrived and was not read."""
        return 0 if self._connection is None else self._connection.buffered

    @property
    def has_head(self) -> bool:
        """Whether the head has arrived; `status` and `headers` are there from then on."""
        connection = self._connection
        if connection is None or not connection.has_head:
            return False
        self._take_head(connection)
        return True

    @property
    def full(self) -> bool:
        """Whether nothing more will arrive until what has is read."""
        return self._connection is not None and self._connection.paused

    def take(self) -> bytes:
        """What has arrived since the last time, maybe nothing."""
        return b"" if self._connection is None else self._connection.take()

    def pause(self) -> None:
        """Let nothing arrive until the next `resume`."""
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    def close(self) -> None:
        """Give the connection back; one with an unfinished answer is closed. Can be repeated."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool.give_back(self._origin, connection)

    def header(self, name: bytes) -> bytes | None:
        """The first header of that name, which must be in lower case."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    @property
    def started(self) -> bool:
        """Whether the request is on its way."""
        return self._connection is not None

    @property
    def complete(self) -> bool:
        """Whether all of the answer has arrived, read or not."""
        return self._connection is None or self._connection.complete

    async def read(self) -> bytes:
        """The bytes that have arrived since the last time; b"" at the end of the answer."""
        if self._connection is None:
            return b""
        return await self._connection.read()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if data := await self.read():
            return data
        raise StopAsyncIteration

    def _take_head(self, connection: "_Connection") -> None:
        self.status, self.headers = connection.status, connection.headers


class _Origin:
    """Where an engine is, and the idle connections to it."""

    __slots__ = ("_host_line", "_prefix", "host", "idle", "port", "tls", "url")

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = url
        self.host = parts.hostname or ""
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.tls else 80)
        self.idle: deque[_Connection] = deque()
        self._prefix = parts.path.rstrip("/").encode()
        self._host_line = b" HTTP/1.1\r\nhost: " + parts.netloc.encode() + b"\r\n"

    def head(self, method: bytes, path: bytes, headers: Headers, length: int) -> bytes:
        parts = [method, b" ", self._prefix, path, self._host_line]
        for name, value in headers:
            # Compiled, this is quicker than one `+=` of all four.
            parts.append(name)
            parts.append(b": ")
            parts.append(value)
            parts.append(b"\r\n")
        if length or method != b"GET":
            parts.append(b"content-length: %d\r\n" % length)
        parts.append(b"\r\n")
        return b"".join(parts)


class _Connection:
    """One connection, which carries one exchange at a time.

    It has all that asyncio.Protocol has, but is none, for what inherits from a class that is not
    compiled is not laid out by the compiler.
    """

    __slots__ = (
        "_chunks",
        "_informational",
        "_keep_alive",
        "_loop",
        "_parser",
        "_resting",
        "_started",
        "_transport",
        "_waiter",
        "answered",
        "buffered",
        "complete",
        "error",
        "has_head",
        "headers",
        "listener",
        "paused",
        "received",
        "status",
        "touched",
    )

    _transport: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self.listener: Callable[[], None] | None = None  # in place of the waiter
        self.error: UpstreamError | None = None
        self.paused = False
        self._resting = True
        self._informational = False
        self._keep_alive = False
        self._started = 0.0
        self.touched = 0.0
        self._clear()

    def _clear(self) -> None:
        self._chunks: list[bytes] = []
        self.buffered = 0
        self.has_head = False
        self.received = False  # any byte of the answer
        self.answered = False  # a byte of its body, or its end
        self.complete = False
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []

    @property
    def usable(self) -> bool:
        return self.error is None and not self._transport.is_closing()

    @property
    def reusable(self) -> bool:
        """Whether the exchange is over on both sides and neither wants to close."""
        return (
            self.complete
            and self._keep_alive
            and self.usable
            and self._transport.get_write_buffer_size() == 0
        )

    def send(self, head: bytes, body: bytes) -> None:
        self._clear()
        self._resting = False
        self._started = self.touched = self._loop.time()
        if len(body) < _JOINED:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    async def wait_for_head(self) -> None:
        while not self.has_head:
            if self.error is not None:
                raise self.error
            await self._wait()

    async def read(self) -> bytes:
        while not self._chunks:
            if self.complete:
                return b""
            if self.error is not None:
                raise self.error
            await self._wait()
        self.resume()
        return self.take()

    def take(self) -> bytes:
        """What has arrived, maybe nothing; whether more may is for the caller to say."""
        chunks, self._chunks, self.buffered = self._chunks, [], 0
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def pause(self) -> None:
        if not self.paused:
            self.paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            # The time for which we did not read is not the engine's.
            self.touched = self._loop.time()
            self._transport.resume_reading()

    def rest(self) -> None:
        self._resting = True
        self.touched = self._loop.time()

    def abort(self) -> None:
        self._transport.abort()

    def fail(self, reason: Reason, message: str) -> None:
        """End the exchange with an error, once what has arrived is read."""
        if self.error is None:
            self.error = UpstreamError(reason, message)
        self._wake()
        self._transport.abort()

    def check(self, now: float, limits: Limits) -> None:
        """Fail where a limit has passed."""
        if self.complete or self.error is not None:
            return
        if now - self._started > limits.total_seconds:
            self.fail("total", f"the engine's answer took longer than {limits.total_seconds:g} s")
        elif not self.answered:
            if now - self._started > limits.first_byte_seconds:
                self.fail(
                    "first_byte", f"the engine was silent for {limits.first_byte_seconds:g} s"
                )
        elif not self.paused and now - self.touched > limits.between_bytes_seconds:
            self.fail(
                "between_bytes",
                f"the engine stopped in the middle of its answer for "
                f"{limits.between_bytes_seconds:g} s",
            )

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self.listener is not None:
            self.listener()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._resting:
            # Nobody asked: whatever it is, it must not become the next answer.
            self._transport.abort()
            return
        self.touched = self._loop.time()
        self.received = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self.fail("protocol", f"the engine's answer is no valid HTTP: {exc}")
            return
        if self.buffered > _HIGH_WATER:
            self.pause()
        self._wake()

    def eof_received(self) -> None:
        """The engine writes no more; the transport closes."""

    def pause_writing(self) -> None:
        """What waits to be written is one body, which is in memory anyway."""

    def resume_writing(self) -> None: ...

    def connection_lost(self, error: Exception | None) -> None:
        if self.has_head and not self._framed and error is None:
            self.complete = True
        elif self.error is None:
            self.error = UpstreamError("reset", "the engine closed the connection")
        self._keep_alive = False
        self._wake()

    # httptools' side

    def on_message_begin(self) -> None:
        if self.complete:
            # A second answer to one request; the parser ends here, and the connection with it.
            raise httptools.HttpParserError("more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.has_head:
            return  # a trailer
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._informational = True
            self.headers = []
            return
        self.status = status
        self._keep_alive = self._parser.should_keep_alive()
        self.has_head = True

    def on_body(self, body: bytes) -> None:
        self.answered = True
        self._chunks.append(body)
        self.buffered += len(body)

    def on_message_complete(self) -> None:
        if self._informational:
            self._informational = False
            return
        self.answered = True
        self.complete = True

    @property
    def _framed(self) -> bool:
        """Whether the answer said where it ends, rather than ending with the connection."""
        return any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers)
