"""The connection pool to the engines: keep-alive, limits, cancel, backpressure.

    async with pool.request(url, b"POST", b"/v1/chat/completions", headers, body) as response:
        response.status, response.headers
        async for data in response: ...

Leaving the block before the end of the answer closes the connection, which is how an engine is told
to stop. Limits are kept by one sweep over the busy connections, so a request arms no timer.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, cast

from gateway.connection import Connection, Headers, Limits, Origin
from gateway.errors import UpstreamError

_SWEEP_SECONDS: Final = 0.1


class UpstreamPool:
    """Connections to any number of engines, by url. Use it within one running event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._origins: dict[str, Origin] = {}
        self._busy: set[Connection] = set()
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
            origin = self._origins[url] = Origin(url)
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

    def take(self, origin: Origin) -> Connection | None:
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

    async def connect(self, origin: Origin) -> Connection:
        loop = self._running()
        try:
            async with asyncio.timeout(self.limits.connect_seconds):
                connection = Connection(loop)
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

    def give_back(self, origin: Origin, connection: Connection) -> None:
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

    def __init__(self, pool: UpstreamPool, origin: Origin, head: bytes, body: bytes) -> None:
        self._pool = pool
        self._origin = origin
        self._head = head
        self._body = body
        self._connection: Connection | None = None
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
            connection = cast(Connection, self._connection)
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

    def _take_head(self, connection: Connection) -> None:
        self.status, self.headers = connection.status, connection.headers
