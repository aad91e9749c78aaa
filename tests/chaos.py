"""A TCP proxy for tests that cuts, holds, splits, corrupts and swallows what passes through it.

    async with ChaosProxy(engine.url) as proxy:   # proxy.url takes the engine's place
        proxy.down.cut_after = 100                # each connection ends after 100 bytes of answer
        proxy.up.gate.clear()                     # nothing passes until it is set again
        proxy.cut()                               # reset what is open

`up` is the way from the client to the server, `down` the way back; what is set there holds for every
connection from then on. No delay is a time: it is an event that the test sets.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_RESET = struct.pack("ii", 1, 0)


def _open_gate() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


@dataclass(slots=True)
class Way:
    """What happens to the bytes of one direction.

    gate: nothing passes while it is not set, not even the news that one end has closed.
    cut_after: a connection is reset on both sides after so many bytes of it.
    change: what is passed on instead; it gets the bytes as they were read, in order.
    piece: at most so many bytes are written at once.
    passed: bytes that were read, of all connections.
    """

    gate: asyncio.Event = field(default_factory=_open_gate)
    cut_after: int | None = None
    change: Callable[[bytes], bytes] | None = None
    piece: int | None = None
    passed: int = 0


class ChaosProxy:
    """Listens on a port that the OS picks, and connects to `target` for each connection."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._scheme, self._path = parts.scheme, parts.path
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.up = Way()
        self.down = Way()
        self.port = 0

    @property
    def url(self) -> str:
        """The target's URL with the proxy in its place."""
        return f"{self._scheme}://127.0.0.1:{self.port}{self._path}"

    @property
    def connections_open(self) -> int:
        """Ends of connections, two for each that passes."""
        return len(self._writers)

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.refuse()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.cut()

    async def listen(self) -> None:
        """Take connections, on the same port each time."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Take no more connections; those that are open go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def cut(self) -> None:
        """Reset every connection on both sides."""
        for writer in tuple(self._writers):
            _reset(writer)

    def hold(self) -> None:
        """Pass nothing on in either direction, as a network does that has lost its route."""
        self.up.gate.clear()
        self.down.gate.clear()

    def release(self) -> None:
        self.up.gate.set()
        self.down.gate.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            _reset(writer)
            self._writers.discard(writer)
            self._tasks.discard(task)
            return
        self._writers.add(far_writer)
        ends = (writer, far_writer)
        try:
            await asyncio.gather(
                self._pass(reader, far_writer, self.up, ends),
                self._pass(far_reader, writer, self.down, ends),
            )
        finally:
            for each in ends:
                self._writers.discard(each)
                each.close()
            self._tasks.discard(task)

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        way: Way,
        ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        """Pass one direction on; its end too, as an end of that direction or of everything."""
        seen = 0
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                way.passed += len(data)
                await way.gate.wait()
                left = None if way.cut_after is None else way.cut_after - seen
                seen += len(data)
                await _write(writer, data if left is None else data[: max(left, 0)], way)
                if left is not None and left <= len(data):
                    break
            else:
                await way.gate.wait()
                if writer.can_write_eof() and not writer.is_closing():
                    writer.write_eof()
                return
        await way.gate.wait()
        for each in ends:
            _reset(each)


async def _write(writer: asyncio.StreamWriter, data: bytes, way: Way) -> None:
    if way.change is not None:
        data = way.change(data)
    size = way.piece or len(data) or 1
    for start in range(0, len(data), size):
        writer.write(data[start : start + size])
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None and not writer.is_closing():
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
