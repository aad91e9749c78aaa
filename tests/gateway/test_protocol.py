"""HTTP/1.1 as clients speak it, well and badly, on raw sockets."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gateway.raw import connected
from tests.gateway.serving import (
    MESSAGES,
    SECRET,
    RunningGateway,
    catalog,
    serving,
    settings,
)
from tests.stub_engine import Reply, StubEngine

pytestmark = pytest.mark.anyio
BODY = json.dumps({"model": "r", "messages": MESSAGES}).encode()
LINE = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
KEY = f"authorization: Bearer {SECRET}\r\n".encode()
HEAD = LINE + KEY
REQUEST = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base") as engine:
        yield engine


@pytest.fixture
async def gateway(engine: StubEngine, tmp_path: Path) -> AsyncIterator[RunningGateway]:
    config = settings(tmp_path, engine.url, maximum_body_bytes=1_000_000)
    async with serving(config, catalog(engine.url)) as running:
        yield running


async def test_requests_in_a_row_use_one_connection(gateway: RunningGateway) -> None:
    async with connected(gateway) as wire:
        for _ in range(3):
            wire.send(REQUEST)
            status, headers, body = await wire.answer()
            assert (status, json.loads(body)["object"]) == (200, "chat.completion")
            assert "connection" not in headers


async def test_pipelined_requests_are_answered_in_order(gateway: RunningGateway) -> None:
    async with connected(gateway) as wire:
        wire.send(b"".join(REQUEST.replace(b"host: x", b"x-request-id: %d" % n) for n in range(20)))
        ids = [(await wire.answer())[1]["x-request-id"] for _ in range(20)]
    assert ids == [str(number) for number in range(20)]


async def test_a_request_may_come_byte_by_byte(gateway: RunningGateway) -> None:
    async with connected(gateway) as wire:
        for position in range(len(REQUEST)):
            wire.send(REQUEST[position : position + 1])
            await asyncio.sleep(0)
        assert (await wire.answer())[0] == 200


async def test_a_body_may_come_in_chunks(gateway: RunningGateway, engine: StubEngine) -> None:
    async with connected(gateway) as wire:
        wire.send(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for part in (BODY[:10], BODY[10:]):
            wire.send(b"%x\r\n%b\r\n" % (len(part), part))
        wire.send(b"0\r\n\r\n")
        assert (await wire.answer())[0] == 200
    assert engine.inference_requests[0].header("transfer-encoding") is None


async def test_a_client_that_expects_to_be_told_is_told(gateway: RunningGateway) -> None:
    async with connected(gateway) as wire:
        wire.send(HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(BODY))
        assert (await wire.answer())[0] == 100
        wire.send(BODY)
        assert (await wire.answer())[0] == 200


async def test_a_client_without_a_key_is_not_told_to_send(gateway: RunningGateway) -> None:
    async with connected(gateway) as wire:
        wire.send(LINE + b"expect: 100-continue\r\ncontent-length: 5000\r\n\r\n")
        status, headers, _ = await wire.answer()
        assert (status, headers["connection"]) == (401, "close")
        assert await wire.rest() == b""


async def test_a_client_that_wants_to_close_is_closed(gateway: RunningGateway) -> None:
    async with connected(gateway) as wire:
        wire.send(REQUEST.replace(b"host: x", b"connection: close") + b"and more")
        status, headers, _ = await wire.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert await wire.rest() == b""


async def test_an_older_client_is_closed_after_its_stream(gateway: RunningGateway) -> None:
    body = BODY.replace(b"{", b'{"stream": true, ', 1)
    async with connected(gateway) as wire:
        head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0")
        wire.send(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        status, headers, _ = await wire.answer()
        assert status == 200
        assert "transfer-encoding" not in headers
        assert (await wire.rest()).endswith(b"data: [DONE]\n\n")


async def test_a_head_has_no_body(gateway: RunningGateway) -> None:
    async with connected(gateway) as wire:
        wire.send(b"HEAD /healthz HTTP/1.1\r\nhost: x\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n")
        assert (await wire.head()).startswith(b"HTTP/1.1 405")
        assert (await wire.answer())[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/chat/completions HTTP/9.9\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nnothing\r\n",
        HEAD + b"bad header\r\n\r\n",
        HEAD + b"x: a\x00b\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_a_400_and_the_end(gateway: RunningGateway, data: bytes) -> None:
    async with connected(gateway) as wire:
        wire.send(data)
        status, headers, body = await wire.answer()
        assert (status, headers["connection"]) == (400, "close")
        assert json.loads(body)["error"]["code"] == "invalid_http"
        assert await wire.rest() == b""
    assert (await gateway.ask()).status == 200


async def test_ten_thousand_headers_are_refused(gateway: RunningGateway) -> None:
    for count in (1_000, 100_000):
        async with connected(gateway) as wire:
            wire.send(HEAD + b"".join(b"x-%d: 12345678901234567890\r\n" % n for n in range(count)))
            wire.send(b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
            assert (await wire.answer())[0] == 431


async def test_a_client_that_sends_too_much_reads_why(gateway: RunningGateway) -> None:
    async with connected(gateway) as wire:
        wire.send(HEAD + b"content-length: 50000000\r\n\r\n" + b"x" * 5_000_000)
        status, _, body = await wire.answer()
        assert status == 413
        assert json.loads(body)["error"]["code"] == "request_too_large"


async def test_a_client_that_sends_too_much_may_finish_first(
    engine: StubEngine, tmp_path: Path
) -> None:
    """Most clients read no answer before they have sent all: a reset would be all they see."""
    config = settings(tmp_path, engine.url, maximum_body_bytes=1_000, stall_seconds=2.0)
    async with serving(config, catalog(engine.url)) as gateway, connected(gateway) as wire:
        wire.send(HEAD + b"content-length: 1000000\r\n\r\n")
        # Longer than the gateway takes between two looks at its connections.
        for _ in range(100):
            wire.send(b"x" * 10_000)
            await wire.flushed()
            await asyncio.sleep(0.012)
        assert (await wire.answer())[0] == 413
        assert await wire.rest() == b""


async def test_a_client_that_leaves_while_it_sends_is_forgotten(gateway: RunningGateway) -> None:
    async with connected(gateway) as wire:
        wire.send(HEAD + b"content-length: 500\r\n\r\n" + b"x" * 100)
        await asyncio.sleep(0)
    assert (await gateway.ask()).status == 200


async def test_garbage_after_a_request_does_not_spoil_its_answer(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    gate = asyncio.Event()
    engine.script(Reply(hold_headers=gate))
    async with connected(gateway) as wire:
        wire.send(REQUEST + b"\x00\x01\x02")
        await engine.wait_for_requests(1)
        gate.set()
        status, headers, _ = await wire.answer()
        assert (status, headers["connection"]) == (200, "close")


async def test_a_slow_body_has_a_limit(engine: StubEngine, tmp_path: Path) -> None:
    config = settings(tmp_path, engine.url, body_seconds=0.2)
    async with serving(config, catalog(engine.url)) as gateway, connected(gateway) as wire:
        wire.send(HEAD + b"content-length: 500\r\n\r\n{")
        assert (await wire.answer())[0] == 400


async def test_an_upgrade_is_not_taken(gateway: RunningGateway) -> None:
    async with connected(gateway) as wire:
        wire.send(b"GET /healthz HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
        assert (await wire.answer())[0] in (200, 400)


async def test_a_percent_in_the_path_is_read(gateway: RunningGateway) -> None:
    async with connected(gateway) as wire:
        wire.send(b"GET /v1/models/r%401 HTTP/1.1\r\n" + KEY + b"\r\n")
        status, _, body = await wire.answer()
        assert (status, json.loads(body)["id"]) == (200, "r@1")
