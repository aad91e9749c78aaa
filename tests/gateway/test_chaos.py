"""Connections that are cut, held, split and corrupted, between all that speak to each other."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from tests.chaos import ChaosProxy
from tests.gateway.raw import Wire, connected
from tests.gateway.serving import (
    CHAT,
    MESSAGES,
    SECRET,
    Reply,
    RunningGateway,
    catalog,
    serving,
    settings,
    until,
)
from tests.stub_engine import Received, StubEngine
from tests.stub_engine import Reply as EngineReply

pytestmark = pytest.mark.anyio
BODY = json.dumps({"model": "r", "messages": MESSAGES}).encode()
STREAM = json.dumps({"model": "r", "messages": MESSAGES, "stream": True}).encode()
PATIENCE = {
    "connect_seconds": 1.0,
    "first_byte_seconds": 0.8,
    "between_bytes_seconds": 0.6,
    "total_seconds": 5.0,
}
# However often the engine fails here, it is asked again.
CALM = {"check_seconds": 3600, "failures": 1_000_000}


def head(body: bytes) -> bytes:
    return (
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {SECRET}\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base") as engine:
        yield engine


@pytest.fixture
async def behind(engine: StubEngine) -> AsyncIterator[ChaosProxy]:
    """Between the gateway and the engine."""
    async with ChaosProxy(engine.url) as proxy:
        yield proxy


@pytest.fixture
async def gateway(
    engine: StubEngine, behind: ChaosProxy, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    config = settings(tmp_path, behind.url, upstream=PATIENCE, health=CALM)
    async with serving(config, catalog(behind.url)) as running:
        # The only check of the engine's health is over when its queue was read; what a test breaks
        # from now on does not meet it.
        await until(lambda: any(r.path == "/metrics" for r in engine.requests), "the check")
        yield running


@pytest.fixture
async def front(gateway: RunningGateway) -> AsyncIterator[ChaosProxy]:
    """Between the client and the gateway."""
    async with ChaosProxy(gateway.url) as proxy:
        yield proxy


async def metrics(gateway: RunningGateway) -> str:
    return (await gateway.send("GET", "/metrics", key=None)).body.decode()


def assert_ends_well(answer: Reply) -> None:
    """Whole, or an error in OpenAI's shape, or a stream that says that it broke."""
    if answer.status != 200:
        assert answer.status == 502, (answer.status, answer.body)
        assert answer.json()["error"]["code"] == "engine_failed"
    elif answer.headers["content-type"].startswith("text/event-stream"):
        done, failed = answer.body.count(b"[DONE]"), answer.body.count(b'"engine_failed"')
        assert (done, failed) in ((1, 0), (0, 1)), answer.body
        assert answer.body.endswith(b"\n\n")
        if failed:
            last = answer.body.strip().rpartition(b"\n\n")[2]
            assert json.loads(last.removeprefix(b"data: "))["error"]["type"]


# Between the gateway and the engine.


async def test_an_engine_cut_off_anywhere_is_an_error_and_never_half_an_answer(
    gateway: RunningGateway, behind: ChaosProxy
) -> None:
    headers = {"x-request-id": "same"}
    for _ in range(2):
        # Twice, for the gateway looks after the engine's health when it starts.
        before = behind.down.passed
        whole = (await gateway.send(body=BODY, headers=headers)).body
    size = behind.down.passed - before
    for cut in (0, 1, 10, 60, 200, size - 100, size - 1):
        behind.cut()
        behind.down.cut_after = cut
        answer = await gateway.send(body=BODY, headers=headers)
        assert_ends_well(answer)
        assert answer.status == 502
    behind.down.cut_after = None
    behind.cut()
    assert (await gateway.send(body=BODY)).json()["choices"] == json.loads(whole)["choices"]


async def test_an_engine_that_is_gone_is_not_named_to_clients(
    gateway: RunningGateway, behind: ChaosProxy, engine: StubEngine
) -> None:
    await behind.refuse()
    behind.cut()
    for _ in range(3):
        answer = await gateway.send(body=BODY)
        assert answer.status in (502, 503)
        assert b"127.0.0.1" not in answer.body
        assert str(behind.port).encode() not in answer.body


@pytest.mark.parametrize(
    "body", [b"", b"x", b"[]", b'{"usage":5}', b'{"usage":{"prompt_tokens":-5}}', b"\xff"]
)
async def test_an_engine_that_talks_nonsense_is_passed_on_and_counted(
    gateway: RunningGateway, engine: StubEngine, body: bytes
) -> None:
    engine.script(EngineReply(body=body))
    assert (await gateway.send(body=BODY)).body == body
    engine.script(EngineReply(chunks=[b"data: " + body + b"\n\n"]))
    assert (await gateway.send(body=STREAM)).body == b"data: " + body + b"\n\n"
    assert 'sluice_requests_total{arm="stable",code="200",' in await metrics(gateway)


async def test_a_stream_cut_off_anywhere_says_so(
    gateway: RunningGateway, behind: ChaosProxy
) -> None:
    statuses = set()
    for cut in range(0, 1_400, 97):
        behind.cut()
        behind.down.cut_after = cut
        answer = await gateway.send(body=STREAM)
        assert_ends_well(answer)
        assert b"[DONE]" not in answer.body
        statuses.add(answer.status)
    assert statuses == {200, 502}


async def test_an_engine_whose_requests_are_cut_off_has_failed(
    gateway: RunningGateway, behind: ChaosProxy
) -> None:
    for cut in (0, 1, 100):
        behind.cut()
        behind.up.cut_after = cut
        answer = await gateway.send(body=BODY)
        assert (answer.status, answer.json()["error"]["code"]) == (502, "engine_failed")


async def test_a_stream_in_single_bytes_is_the_same_stream(
    gateway: RunningGateway, behind: ChaosProxy
) -> None:
    headers = {"x-request-id": "same"}
    whole = await gateway.send(body=STREAM, headers=headers)
    behind.down.piece = 1
    pieces = await gateway.send(body=STREAM, headers=headers)
    assert pieces.body == whole.body
    assert whole.body.endswith(b"data: [DONE]\n\n")


@given(
    stream=st.booleans(),
    position=st.integers(0, 700),
    mask=st.sampled_from([0x01, 0x20, 0x80, 0xFF]),
)
@bounded(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_a_corrupt_answer_never_hangs_and_is_never_ours_to_fail_on(
    gateway: RunningGateway, behind: ChaosProxy, stream: bool, position: int, mask: int
) -> None:
    passed = 0

    def corrupt(data: bytes) -> bytes:
        nonlocal passed
        at, passed = position - passed, passed + len(data)
        if not 0 <= at < len(data):
            return data
        return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]

    behind.cut()
    behind.down.change = corrupt
    answer = await gateway.send(body=STREAM if stream else BODY)
    behind.down.change = None
    # The engine's own status may be what was corrupted; 500 with our own words may not.
    assert b"the gateway failed" not in answer.body
    assert gateway.app.inflight == 0


async def test_a_silent_engine_is_given_up_and_let_go(
    gateway: RunningGateway, behind: ChaosProxy, engine: StubEngine
) -> None:
    behind.down.gate.clear()
    for body in (BODY, STREAM):
        answer = await gateway.send(body=body)
        assert (answer.status, answer.json()["error"]["code"]) == (502, "engine_failed")
    assert "silent" in answer.json()["error"]["message"]
    text = await metrics(gateway)
    assert 'sluice_upstream_errors_total{engine="main",reason="first_byte"}' in text
    behind.down.gate.set()
    behind.cut()
    assert (await gateway.send(body=BODY)).status == 200


async def test_an_answer_that_comes_late_is_not_given_to_the_next_request(
    gateway: RunningGateway, behind: ChaosProxy
) -> None:
    behind.down.gate.clear()
    assert (await gateway.send(body=BODY, headers={"x-request-id": "first"})).status == 502
    behind.down.gate.set()
    for number in range(5):
        answer = await gateway.send(body=BODY, headers={"x-request-id": f"n-{number}"})
        assert answer.json()["id"] == f"chatcmpl-n-{number}"


async def test_a_replica_behind_a_dead_network_troubles_nobody_on_the_other(
    engine: StubEngine, behind: ChaosProxy, tmp_path: Path
) -> None:
    async with StubEngine(base="base") as other:
        config = settings(
            tmp_path, behind.url, other.url, upstream=PATIENCE, health={"check_seconds": 3600}
        )
        async with serving(config, catalog(behind.url, other.url)) as gateway:
            for _ in range(4):
                assert (await gateway.send(body=BODY)).status == 200
            behind.hold()
            for body in (BODY, STREAM) * 4:
                answer = await gateway.send(body=body)
                assert answer.status == 200
                assert_ends_well(answer)
            # Even a new connection is taken by the network's own side, and leads nowhere.
            behind.cut()
            answers = await asyncio.gather(*(gateway.send(body=BODY) for _ in range(10)))
            assert {answer.status for answer in answers} == {200}


async def test_open_streams_of_others_go_on_while_one_engine_is_cut(
    engine: StubEngine, behind: ChaosProxy, tmp_path: Path
) -> None:
    async with StubEngine(base="base") as other:
        gate = asyncio.Event()
        for each in (engine, other):
            each.script(EngineReply(hold_stream=gate, hold_after=2), times=None)
        config = settings(tmp_path, behind.url, other.url, upstream=PATIENCE | {
            "between_bytes_seconds": 5.0, "first_byte_seconds": 5.0
        })  # fmt: skip
        async with (
            serving(config, catalog(behind.url, other.url)) as gateway,
            AsyncExitStack() as stack,
        ):
            wires = [await stack.enter_async_context(connected(gateway)) for _ in range(8)]
            for wire in wires:
                wire.send(head(STREAM) + STREAM)
            # Once a client has an event, nobody else can answer in the engine's place.
            begun = [await read_until(wire, b"data:") for wire in wires]
            broken = engine.running
            behind.cut()
            await engine.wait_for_cancelled(broken)
            gate.set()
            endings = [await read_until(wire, b"0\r\n\r\n") for wire in wires]
        streams = [start + end for start, end in zip(begun, endings, strict=True)]
        assert [each.count(b"[DONE]") + each.count(b'"engine_failed"') for each in streams] == [
            1
        ] * 8
        assert sum(b"[DONE]" in each for each in streams) == 8 - broken
        assert 0 < broken < 8


async def read_until(wire: Wire, mark: bytes) -> bytes:
    """What arrives, until the mark is in it."""
    read = b""
    while mark not in read:
        piece = await wire.some()
        assert piece, read
        read += piece
    return read


# Between the client and the gateway.


@pytest.mark.parametrize("by_reset", [True, False], ids=["reset", "closed"])
async def test_a_client_that_leaves_in_any_phase_takes_its_request_along(
    engine: StubEngine, tmp_path: Path, by_reset: bool
) -> None:
    never = asyncio.Event()
    phases = [
        (STREAM, EngineReply(hold_headers=never), 0),
        (BODY, EngineReply(hold_headers=never), 0),
        (STREAM, EngineReply(hold_stream=never, hold_after=1), 1),
        (STREAM, EngineReply(hold_stream=never, hold_after=4), 4),
    ]
    async with serving(settings(tmp_path, engine.url), catalog(engine.url)) as gateway:
        # Before there is a request to speak of.
        request = head(BODY) + BODY
        for size in (1, 40, len(request) - len(BODY), len(request) - 1):
            async with connected(gateway) as wire:
                wire.send(request[:size])
                await wire.flushed()
                await _leave(wire, by_reset)
        for count, (body, reply, events) in enumerate(phases, 1):
            engine.script(reply)
            async with connected(gateway) as wire:
                wire.send(head(body) + body)
                received = (await engine.wait_for_requests(count))[-1]
                await _sent(engine, received, events)
                if events:
                    await wire.head()
                    await _read_events(wire, events)
                await _leave(wire, by_reset)
                await engine.wait_for_cancelled(count)
        await until(lambda: gateway.app.inflight == 0, "the requests to end")
        text = await metrics(gateway)
        assert 'code="499",route="r",version="r@1"} 4.0' in text
        # The usage so far: what has reached the client, as its engine said nothing of it yet.
        tokens = next(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith('sluice_tokens_total{kind="completion"')
        )
        assert 2 <= tokens <= 5
        assert len(engine.inference_requests) == len(phases)
        assert (await gateway.ask()).status == 200


async def _sent(engine: StubEngine, received: Received, events: int) -> None:
    await engine.wait_until(lambda: received.events_sent == events, f"{events} events")


async def _leave(wire: Wire, by_reset: bool) -> None:
    wire.reset() if by_reset else wire.close()


async def _read_events(wire: Wire, count: int) -> None:
    data = b""
    while data.count(b"data: ") < count:
        data += await wire.some()


async def test_a_client_over_a_torn_network_gets_one_answer_byte_by_byte(
    gateway: RunningGateway, front: ChaosProxy, engine: StubEngine
) -> None:
    front.up.piece = front.down.piece = 1
    async with connected(gateway, front.port) as wire:
        wire.send(head(BODY) + BODY)
        status, _, body = await wire.answer()
        assert (status, json.loads(body)["object"]) == (200, "chat.completion")
        wire.send(head(STREAM) + STREAM)
        await wire.head()
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += await wire.some()
        assert b"data: [DONE]\n\n" in data
    assert engine.inference_requests[0].body == BODY.replace(b'"r"', b'"base"')


async def test_a_client_that_is_lost_without_a_word_troubles_no_other(
    gateway: RunningGateway, front: ChaosProxy, engine: StubEngine
) -> None:
    """Half-open: the network took the client away, and the gateway cannot know."""
    async with connected(gateway, front.port) as lost:
        front.hold()
        lost.send(head(BODY) + BODY)
        for body in (BODY, STREAM):
            answer = await gateway.send(body=body)
            assert answer.status == 200
        front.up.gate.set()
        await engine.wait_for_answered(3)
        await until(lambda: gateway.app.inflight == 0, "the answer to be written")
        front.cut()
    assert (await gateway.ask()).status == 200


async def test_a_corrupt_request_is_refused_or_served_and_nothing_else(
    gateway: RunningGateway, front: ChaosProxy
) -> None:
    request = head(BODY) + BODY
    for position in range(0, len(request), 9):
        bad = request[:position] + bytes([request[position] ^ 0x41]) + request[position + 1 :]
        async with connected(gateway, front.port) as wire:
            wire.send(bad)
            # A length that was made larger waits for more.
            wire.send(b" " * 2_000)
            first = await wire.head()
            assert first.split()[1] in (b"200", b"400", b"401", b"404", b"405", b"431", b"505")
    assert (await gateway.ask()).status == 200


# Between the gateway and the store.


async def test_a_store_that_falls_silent_is_waited_for_by_no_request(
    engine: StubEngine, tmp_path: Path, redis_url: str
) -> None:
    known = catalog(engine.url)
    async with ChaosProxy(redis_url) as store:
        config = settings(tmp_path, engine.url, store=store.url)
        async with serving(config, known) as gateway:
            # An empty store has nothing to say; what was known from the file is not lost by it.
            with contextlib.suppress(AssertionError):
                await until(lambda: gateway.app.serves("r"), "the file", limit=1)
            served = gateway.app.serves("r")
            store.hold()
            for body in (BODY, STREAM) * 5:
                async with asyncio.timeout(5):
                    answer = await gateway.send(body=body)
                assert answer.status == (200 if served else answer.status)
            assert store.down.passed > 0
            store.cut()
            store.release()


async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers whatever it is told with something that no store says."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(65_536):
            writer.write(b"$-99\r\n!nonsense\r\n*3\r\n:x\r\n")
            await writer.drain()
    writer.close()


async def wrong(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Speaks the protocol, and says 42 to everything."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(b":42\r\n" * max(1, data.count(b"*")))
            await writer.drain()
    writer.close()


@pytest.mark.parametrize("liar", [garbage, wrong])
async def test_a_store_that_lies_does_not_keep_a_gateway_from_starting(
    engine: StubEngine, tmp_path: Path, liar: object
) -> None:
    server = await asyncio.start_server(liar, "127.0.0.1", 0)  # type: ignore[arg-type]
    async with server:
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        config = settings(tmp_path, engine.url, store=url, poll_seconds=0.05)
        async with serving(config, catalog(engine.url)) as gateway:
            for body in (BODY, STREAM) * 3:
                async with asyncio.timeout(5):
                    assert (await gateway.send(body=body)).status == 200
            assert (await gateway.send("GET", "/readyz", key=None)).status == 200
