"""The connection pool, against a server that misbehaves as told."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from gateway.errors import UpstreamError
from gateway.settings import UpstreamSection
from gateway.upstream import UpstreamPool
from tests.gateway.serving import until
from tests.stub_engine import Ending, Reply, StubEngine

pytestmark = pytest.mark.anyio
CHAT = b"/v1/chat/completions"
BODY = b'{"model":"base","messages":[]}'
STREAM = b'{"model":"base","messages":[],"stream":true}'


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base") as engine:
        yield engine


@pytest.fixture
async def pool() -> AsyncIterator[UpstreamPool]:
    async with UpstreamPool(UpstreamSection()) as pool:
        yield pool


async def ask(pool: UpstreamPool, url: str, body: bytes = BODY) -> bytes:
    async with pool.request(url, b"POST", CHAT, (), body) as response:
        return b"".join([data async for data in response])


async def test_connections_are_kept_and_used_again(pool: UpstreamPool, engine: StubEngine) -> None:
    for _ in range(5):
        assert b"The stub says yes." in await ask(pool, engine.url)
    assert engine.connections_made == 1
    assert pool.open_connections == 1


async def test_an_engine_that_is_gone_keeps_no_connection_and_finishes_what_it_has(
    pool: UpstreamPool, engine: StubEngine
) -> None:
    gate = asyncio.Event()
    engine.script(Reply(hold_stream=gate))
    async with pool.request(engine.url, b"POST", CHAT, (), STREAM) as response:
        body = await response.read()
        await ask(pool, engine.url)
        assert pool.open_connections == 2
        pool.forget(engine.url)
        assert pool.open_connections == 1
        gate.set()
        while data := await response.read():
            body += data
    assert body.endswith(b"data: [DONE]\n\n")
    assert pool.open_connections == 0


async def test_each_request_at_once_has_its_own_connection(
    pool: UpstreamPool, engine: StubEngine
) -> None:
    gate = asyncio.Event()
    engine.script(Reply(hold_headers=gate), times=4)
    tasks = [asyncio.create_task(ask(pool, engine.url)) for _ in range(4)]
    await engine.wait_for_requests(4)
    gate.set()
    await asyncio.gather(*tasks)
    assert engine.connections_made == 4


async def test_a_connection_that_the_engine_closed_while_idle_is_not_noticed(
    pool: UpstreamPool, engine: StubEngine
) -> None:
    await ask(pool, engine.url)
    engine.close_idle_connections()
    assert b"yes" in await ask(pool, engine.url)


@pytest.mark.parametrize("ending", [Ending.CLOSE_BEFORE_HEADERS, Ending.RESET_BEFORE_HEADERS])
async def test_a_reset_on_a_used_connection_is_tried_once_more(
    pool: UpstreamPool, engine: StubEngine, ending: Ending
) -> None:
    await ask(pool, engine.url)
    engine.script(Reply(ending=ending))
    assert b"yes" in await ask(pool, engine.url)
    assert len(engine.inference_requests) == 3


@pytest.mark.parametrize("ending", [Ending.CLOSE_BEFORE_HEADERS, Ending.RESET_BEFORE_HEADERS])
async def test_a_reset_on_a_new_connection_is_an_error(
    pool: UpstreamPool, engine: StubEngine, ending: Ending
) -> None:
    engine.script(Reply(ending=ending), times=None)
    with pytest.raises(UpstreamError) as caught:
        await ask(pool, engine.url)
    assert caught.value.reason == "reset"
    assert len(engine.inference_requests) == 1


async def test_nobody_there_is_a_connect_error(pool: UpstreamPool, engine: StubEngine) -> None:
    await engine.stop()
    with pytest.raises(UpstreamError) as caught:
        await ask(pool, engine.url)
    assert caught.value.reason == "connect"
    await engine.start()


@pytest.mark.parametrize("ending", [Ending.CLOSE_MIDWAY, Ending.RESET_MIDWAY, Ending.TRUNCATED])
@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_an_answer_that_breaks_off_gives_its_bytes_and_then_the_error(
    pool: UpstreamPool, engine: StubEngine, ending: Ending, body: bytes
) -> None:
    engine.script(Reply(ending=ending))
    received: list[bytes] = []

    async def read_all() -> None:
        async with pool.request(engine.url, b"POST", CHAT, (), body) as response:
            async for data in response:
                received.append(data)  # noqa: PERF401 - what came before the error must be kept

    with pytest.raises(UpstreamError) as caught:
        await read_all()
    assert caught.value.reason == "reset"
    # A reset may overtake the bytes that were sent before it.
    assert received or ending is Ending.RESET_MIDWAY
    assert pool.open_connections == 0


async def test_leaving_early_closes_the_connection(pool: UpstreamPool, engine: StubEngine) -> None:
    engine.script(Reply(hold_stream=asyncio.Event()))
    async with pool.request(engine.url, b"POST", CHAT, (), STREAM) as response:
        assert await response.read()
    await engine.wait_for_cancelled(1)


async def test_cancelling_closes_the_connection_before_the_head(
    pool: UpstreamPool, engine: StubEngine
) -> None:
    engine.script(Reply(hold_headers=asyncio.Event()))
    task = asyncio.create_task(ask(pool, engine.url))
    await engine.wait_for_requests(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.wait_for_cancelled(1)


@pytest.mark.parametrize(
    ("limit", "reply", "body"),
    [
        ("first_byte", Reply(hold_headers=asyncio.Event()), BODY),
        ("between_bytes", Reply(ending=Ending.SILENCE), STREAM),
        ("total", Reply(ending=Ending.SILENCE), STREAM),
    ],
)
async def test_silence_has_a_limit(
    engine: StubEngine, limit: str, reply: Reply, body: bytes
) -> None:
    limits = UpstreamSection.model_validate({f"{limit}_seconds": 0.2})
    engine.script(reply)
    async with UpstreamPool(limits) as pool:
        with pytest.raises(UpstreamError) as caught:
            await ask(pool, engine.url, body)
    assert caught.value.reason == limit


async def test_idle_connections_are_retired(engine: StubEngine) -> None:
    async with UpstreamPool(UpstreamSection(idle_seconds=0.2)) as pool:
        await ask(pool, engine.url)
        await until(lambda: pool.open_connections == 0, "the idle connection to be retired")
        await engine.wait_until(lambda: engine.connections_open == 0, "it to be closed")
        await ask(pool, engine.url)
        assert engine.connections_made == 2


async def test_no_more_idle_connections_are_kept_than_allowed(engine: StubEngine) -> None:
    async with UpstreamPool(UpstreamSection(maximum_idle=1)) as pool:
        await asyncio.gather(*(ask(pool, engine.url) for _ in range(4)))
        assert pool.open_connections == 1


async def test_a_connection_that_the_engine_will_close_is_not_kept(
    pool: UpstreamPool, engine: StubEngine
) -> None:
    engine.script(Reply(keep_alive=False))
    await ask(pool, engine.url)
    assert pool.open_connections == 0


async def test_a_reader_that_is_slow_slows_the_engine(
    pool: UpstreamPool, engine: StubEngine
) -> None:
    chunks = [b"x" * 65_536] * 1_000
    engine.script(Reply(chunks=chunks))
    async with pool.request(engine.url, b"POST", CHAT, (), STREAM) as response:
        size = len(await response.read())
        received = engine.inference_requests[0]
        sent = -1
        # Nobody reads, so what is sent comes to a stop, long before all of it.
        while sent != received.events_sent:
            sent = received.events_sent
            await asyncio.sleep(0.1)
        assert sent < 500
        async for data in response:
            size += len(data)
    assert size == 65_536_000


Raw = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def raw_server(answer: bytes, *, close: bool = True) -> AsyncIterator[str]:
    """Says `answer` to whatever arrives."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if not close:
            # Until the other side closes.
            await reader.read()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}"


async def test_what_is_no_http_is_a_protocol_error(pool: UpstreamPool) -> None:
    async with raw_server(b"SSH-2.0-OpenSSH_9\r\n") as url:
        with pytest.raises(UpstreamError) as caught:
            await ask(pool, url)
    assert caught.value.reason == "protocol"


async def test_an_answer_without_a_length_ends_with_the_connection(pool: UpstreamPool) -> None:
    async with raw_server(b"HTTP/1.1 200 OK\r\n\r\nall of it") as url:
        assert await ask(pool, url) == b"all of it"


async def test_an_interim_answer_is_passed_over(pool: UpstreamPool) -> None:
    answer = (
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    )
    async with (
        raw_server(answer) as url,
        pool.request(url, b"POST", CHAT, (), BODY) as response,
    ):
        assert (response.status, response.header(b"link")) == (200, None)
        assert await response.read() == b"ok"
        assert await response.read() == b""


async def test_bytes_that_nobody_asked_for_end_the_connection(pool: UpstreamPool) -> None:
    twice = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok" * 2
    async with raw_server(twice, close=False) as url:
        assert await ask(pool, url) == b"ok"
        # The second answer must never be taken for that to the next request.
        assert await ask(pool, url) == b"ok"


async def test_a_path_in_the_url_is_kept(pool: UpstreamPool, engine: StubEngine) -> None:
    async with pool.request(f"{engine.url}/prefix/", b"GET", b"/health") as response:
        assert response.status == 404
    assert engine.requests[0].path == "/prefix/health"
