"""The load that wrk cannot make: streams held open, with the time to their first byte; and an exact
number of requests.

    python -m benchmarks.client URL --open 64 --seconds 6 --chunks 64 --delay-ms 20 < BODY
    python -m benchmarks.client URL --open 32 --requests 10000 < BODY

Prints one line of JSON as `post.lua` does, latencies in microseconds: of a stream to the first byte
of its body, of any other answer to its end. A stream is lost where it breaks off, isn't answered
200, or lacks a token or its `[DONE]`; it is unfinished where it was still open when patience ended.
"""

import argparse
import asyncio
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from time import perf_counter
from typing import cast
from urllib.parse import urlsplit

import httptools
import uvloop

# What is still open so long after the time is over has to be given up.
PATIENCE_SECONDS = 10.0
# At most, for an exact number of requests.
REQUESTS_SECONDS = 500.0
# What the stub engine says in each chunk but the first and the last.
TOKEN = b'" flows"'


@dataclass(slots=True)
class Answer:
    """An answer as it comes in; `first` and `last` are seconds after the request was written."""

    status: int = 0
    first: float = 0.0
    last: float = 0.0
    pieces: list[bytes] = field(default_factory=list)

    def whole(self, tokens: int) -> bool:
        """Whether a stream has all its tokens and its end; any other answer (0 tokens) its 200."""
        if self.status != 200 or not tokens:
            return self.status == 200
        body = b"".join(self.pieces)
        return body.count(TOKEN) == tokens and body.rstrip().endswith(b"data: [DONE]")


class Connection(asyncio.Protocol):
    """One connection, on which one request at a time is asked."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._answer = Answer()
        self._asked_at = 0.0
        self._parser = httptools.HttpResponseParser(self)

    @property
    def open(self) -> bool:
        return self._transport is not None

    def ask(self, request: bytes) -> "asyncio.Future[Answer]":
        """The answer, or ConnectionError where it breaks off."""
        waiting = self._waiting = asyncio.get_running_loop().create_future()
        self._answer = Answer()
        self._parser = httptools.HttpResponseParser(self)
        if self._transport is None:
            waiting.set_exception(ConnectionResetError("the connection is closed"))
        else:
            self._asked_at = perf_counter()
            self._transport.write(request)
        return waiting

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but their type.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error or ConnectionResetError("it broke off"))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def on_body(self, body: bytes) -> None:
        if not self._answer.pieces:
            self._answer.first = perf_counter() - self._asked_at
        self._answer.pieces.append(body)

    def on_message_complete(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._answer.last = perf_counter() - self._asked_at
            self._answer.status = self._parser.get_status_code()
            self._waiting.set_result(self._answer)


@dataclass(slots=True)
class Load:
    """`connections` clients, each asking `request` again as soon as it has its answer.

    With a `rate`, all of them together ask so many times a second, if they are answered in time.
    """

    host: str
    port: int
    request: bytes
    connections: int
    tokens: int  # of each stream; 0 for answers that are not streamed
    rate: float = 0.0
    latencies: list[float] = field(default_factory=list)
    bad_status: int = 0
    broken: int = 0

    async def run(self, go_on: Callable[[], bool], spread: float, limit: float) -> dict[str, float]:
        """Ask while `go_on`, starting the clients evenly over `spread` seconds.

        Who still waits for an answer after `limit` seconds is unfinished.
        """
        started = perf_counter()
        clients = [
            asyncio.create_task(self._client(go_on, spread * number / self.connections))
            for number in range(self.connections)
        ]
        _, unfinished = await asyncio.wait(clients, timeout=limit)
        for client in unfinished:
            client.cancel()
        for outcome in await asyncio.gather(*clients, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        return self._result(perf_counter() - started, len(unfinished))

    async def _client(self, go_on: Callable[[], bool], delay: float) -> None:
        await asyncio.sleep(delay)
        pause = self.connections / self.rate if self.rate else 0.0
        due = perf_counter()
        connection: Connection | None = None
        try:
            while go_on():
                try:
                    if connection is None or not connection.open:
                        connection = await self._connect()
                    answer = await connection.ask(self.request)
                except OSError:
                    self.broken += 1
                    await asyncio.sleep(0.1)
                    continue
                self._count(answer)
                if pause:
                    due = max(due + pause, perf_counter() - pause)
                    await asyncio.sleep(max(0.0, due - perf_counter()))
        finally:
            if connection is not None:
                connection.close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self.host, self.port)
        return connection

    def _count(self, answer: Answer) -> None:
        if answer.status != 200:
            self.bad_status += 1
        elif not answer.whole(self.tokens):
            self.broken += 1
        else:
            self.latencies.append(answer.first if self.tokens else answer.last)

    def _result(self, elapsed: float, unfinished: int) -> dict[str, float]:
        ordered = sorted(self.latencies) or [0.0]
        return {
            "requests": len(self.latencies),
            "microseconds": int(elapsed * 1e6),
            "p50": _quantile(ordered, 0.50),
            "p99": _quantile(ordered, 0.99),
            "mean": fmean(ordered) * 1e6,
            "bad_status": self.bad_status,
            "broken": self.broken,
            "unfinished": unfinished,
        }


def _quantile(ordered: list[float], share: float) -> int:
    return int(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e6)


def _countdown(number: int) -> Callable[[], bool]:
    """True `number` times; each request takes one."""
    left = iter(range(number))
    return lambda: next(left, None) is not None


def _clock(seconds: float) -> Callable[[], bool]:
    end = perf_counter() + seconds
    return lambda: perf_counter() < end


def make_request(url: str, headers: list[str], body: bytes) -> bytes:
    parts = urlsplit(url)
    head = [f"POST {parts.path} HTTP/1.1", f"host: {parts.netloc}", *headers]
    head += ["content-type: application/json", f"content-length: {len(body)}", "", ""]
    return "\r\n".join(head).encode() + body


async def _run(arguments: argparse.Namespace, body: bytes) -> dict[str, float]:
    parts = urlsplit(arguments.url)
    streams = arguments.chunks > 0
    load = Load(
        host=str(parts.hostname),
        port=int(parts.port or 80),
        request=make_request(arguments.url, arguments.header, body),
        connections=arguments.open,
        tokens=arguments.chunks - 2 if streams else 0,
    )
    if arguments.requests:
        return await load.run(_countdown(arguments.requests), 0.0, REQUESTS_SECONDS)
    # Spread over one stream's length, so that at each moment some begin and some end.
    spread = arguments.chunks * arguments.delay_ms / 1000
    limit = arguments.seconds + PATIENCE_SECONDS
    return await load.run(_clock(arguments.seconds), spread, limit)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--open", type=int, default=64, help="requests at a time")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--requests", type=int, default=0, help="that many, instead of a time")
    parser.add_argument("--chunks", type=int, default=0, help="of each stream; 0: no streams")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="between chunks, of the stub")
    parser.add_argument("--header", action="append", default=[], help="name: value")
    arguments = parser.parse_args()
    # A collection would look like a late first byte.
    gc.disable()
    print("RESULT " + json.dumps(uvloop.run(_run(arguments, sys.stdin.buffer.read()))))


if __name__ == "__main__":
    main()
