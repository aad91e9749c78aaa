"""A client's end of a connection to a gateway, for what no HTTP client would send."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.gateway.serving import RunningGateway


class Wire:
    """Sends any bytes, and reads answers that say their length, or whatever comes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def flushed(self) -> None:
        """Wait until the kernel has taken what was sent."""
        async with asyncio.timeout(10):
            await self._writer.drain()

    async def head(self) -> bytes:
        async with asyncio.timeout(10):
            return await self._reader.readuntil(b"\r\n\r\n")

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        head = (await self.head()).decode()
        async with asyncio.timeout(10):
            first, *lines = head.strip().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            status = int(first.split()[1])
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
            return status, headers, body

    async def some(self) -> bytes:
        """What has arrived, or b"" at the end."""
        async with asyncio.timeout(10):
            return await self._reader.read(65_536)

    async def rest(self) -> bytes:
        async with asyncio.timeout(10):
            return await self._reader.read()

    def close(self) -> None:
        """Go away as a client does that is done."""
        self._writer.close()

    def reset(self) -> None:
        """Go away at once, without a word."""
        self._writer.transport.abort()


@asynccontextmanager
async def connected(gateway: RunningGateway, port: int | None = None) -> AsyncIterator[Wire]:
    """A connection to the gateway, or to what stands before it on `port`."""
    host, _, own = gateway.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, port or int(own))
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
