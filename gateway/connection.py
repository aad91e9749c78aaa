"""One connection to an engine, and what belongs to its address."""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol, cast
from urllib.parse import urlsplit

import httptools

from gateway.errors import Reason, UpstreamError

Headers = Sequence[tuple[bytes, bytes]]

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


class Origin:
    """Where an engine is, and the idle connections to it."""

    __slots__ = ("_host_line", "_prefix", "host", "idle", "port", "tls", "url")

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = url
        self.host = parts.hostname or ""
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.tls else 80)
        self.idle: deque[Connection] = deque()
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


class Connection:
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
