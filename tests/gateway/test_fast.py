"""Requests that are answered without a task, when the plain case stops being plain."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.gateway.serving import (
    CHAT,
    MESSAGES,
    SECRET,
    RunningGateway,
    catalog,
    serving,
    settings,
    until,
)
from tests.stub_engine import Ending, Reply, StubEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base") as engine:
        yield engine


@pytest.fixture
async def gateway(engine: StubEngine, tmp_path: Path) -> AsyncIterator[RunningGateway]:
    """It has a connection to the engine already, as it has at most times."""
    async with serving(settings(tmp_path, engine.url), catalog(engine.url)) as running:
        assert (await running.ask()).status == 200
        yield running


def request(*, stream: bool = False) -> bytes:
    body = json.dumps({"model": "r", "messages": MESSAGES, "stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {SECRET}\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def asking(gateway: RunningGateway, data: bytes) -> AsyncIterator[Client]:
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    try:
        async with asyncio.timeout(10):
            yield reader, writer
    finally:
        writer.close()


async def counted(gateway: RunningGateway, code: int) -> None:
    """Wait until one request of this code was counted, and none is under way."""
    line = f'arm="stable",code="{code}",route="r",version="r@1"}} 1.0'
    async with asyncio.timeout(10):
        while line not in (await gateway.send("GET", "/metrics")).body.decode():
            await asyncio.sleep(0.01)
    await until(lambda: gateway.app.inflight == 0, "the request to be over")


def has_no_task(gateway: RunningGateway) -> bool:
    return not gateway.server.server_state.tasks


@pytest.mark.parametrize("stream", [False, True])
async def test_a_whole_request_is_answered_without_a_task(
    gateway: RunningGateway, engine: StubEngine, stream: bool
) -> None:
    held = asyncio.Event()
    engine.script(Reply(hold_headers=held))
    async with asking(gateway, request(stream=stream)) as (reader, _):
        await engine.wait_for_requests(2)
        assert gateway.app.inflight == 1
        assert has_no_task(gateway)
        held.set()
        end = b"0\r\n\r\n" if stream else b"}"
        assert (await reader.readuntil(end)).startswith(b"HTTP/1.1 200 OK\r\n")
    await until(lambda: gateway.app.inflight == 0, "the request to be over")


async def test_a_body_that_comes_after_its_head_needs_no_task_either(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    engine.script(Reply(hold_headers=asyncio.Event()))
    head, _, body = request().partition(b"\r\n\r\n")
    async with asking(gateway, head + b"\r\n\r\n") as (_, writer):
        await asyncio.sleep(0.05)
        writer.write(body)
        await engine.wait_for_requests(2)
        assert has_no_task(gateway)


async def test_a_body_that_does_not_come_is_waited_for_in_a_task(gateway: RunningGateway) -> None:
    head, _, _ = request().partition(b"\r\n\r\n")
    async with asking(gateway, head + b"\r\n\r\n{"):
        await until(lambda: gateway.app.inflight == 1, "the request to be taken")
        assert not has_no_task(gateway)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_byte_is_counted(
    gateway: RunningGateway, engine: StubEngine, stream: bool
) -> None:
    engine.script(Reply(hold_headers=asyncio.Event()))
    async with asking(gateway, request(stream=stream)) as (_, writer):
        await engine.wait_for_requests(2)
        assert has_no_task(gateway)
        writer.close()
        await engine.wait_for_cancelled(1)
    await counted(gateway, 499)


async def test_a_client_that_leaves_midway_is_counted(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    engine.script(Reply(hold_stream=asyncio.Event(), hold_after=2))
    async with asking(gateway, request(stream=True)) as (reader, writer):
        await reader.readuntil(b"data: ")
        assert has_no_task(gateway)
        writer.close()
        await engine.wait_for_cancelled(1)
    await counted(gateway, 499)


async def test_a_stream_that_breaks_midway_ends_with_an_error(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    engine.script(Reply(ending=Ending.RESET_MIDWAY, after=2))
    async with asking(gateway, request(stream=True)) as (reader, _):
        said = await reader.readuntil(b"0\r\n\r\n")
    assert b'"code":"engine_failed"' in said
    assert b"[DONE]" not in said
    await counted(gateway, 502)


async def test_what_the_engine_refuses_is_handed_over(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    engine.script(Reply(status=400, body={"error": {"message": "no"}}))
    async with asking(gateway, request()) as (reader, _):
        assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 400 ")
    await counted(gateway, 400)


async def test_a_connection_that_the_engine_closes_is_not_noticed(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    engine.script(Reply(ending=Ending.RESET_BEFORE_HEADERS))
    async with asking(gateway, request()) as (reader, _):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")


async def test_an_engine_waits_for_a_client_that_does_not_read(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    event = b"data: %b\n\n" % (b"x" * 65_000)
    pieces = [event] * 600
    engine.script(Reply(chunks=[*pieces, b"data: [DONE]\n\n"]))
    async with asking(gateway, request(stream=True)) as (reader, _):
        await reader.readuntil(b"\r\n\r\n")
        received = (await engine.wait_for_requests(2))[1]
        sent = -1
        while sent != received.events_sent:
            sent = received.events_sent
            await asyncio.sleep(0.1)
        assert not received.answered
        text = b""
        while not text.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
            text += await reader.read(2**20)
    assert text.count(b"data: x") == len(pieces)
    await until(lambda: gateway.app.inflight == 0, "the stream to be over")


async def test_requests_in_one_read_are_answered_in_order(gateway: RunningGateway) -> None:
    both = request(stream=True) + request() + b"GET /healthz HTTP/1.1\r\n\r\n"
    async with asking(gateway, both) as (reader, _):
        said = await reader.readuntil(b'{"status":"ok"}')
    assert [said.find(b"[DONE]") > 0, said.count(b"HTTP/1.1 200 OK")] == [True, 3]
    assert said.find(b"[DONE]") < said.find(b'"chat.completion"')


async def test_a_body_that_cannot_be_read_is_answered_once(gateway: RunningGateway) -> None:
    bad = request().replace(b'{"model"', b'["model"')
    async with asking(gateway, bad + request()) as (reader, _):
        first = await reader.readuntil(b"}}")
        second = await reader.readline()
    assert first.startswith(b"HTTP/1.1 400 ")
    assert second.startswith(b"HTTP/1.1 200 ")
    await until(lambda: gateway.app.inflight == 0, "both to be over")
