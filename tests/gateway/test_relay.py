"""The life of a request when things go wrong, and what is counted of it."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import UpstreamSection
from gateway.upstream import UpstreamPool
from rollout.policy import Slo
from rollout.versions import Prompt, Version
from tests.gateway.serving import (
    AT,
    CHAT,
    MESSAGES,
    ROUTE,
    SECRET,
    RunningGateway,
    catalog,
    serving,
    settings,
    until,
)
from tests.stub_engine import Ending, Received, Reply, StubEngine, is_inference

pytestmark = pytest.mark.anyio
ADAPTER = "cd" * 32
CANDIDATE = Version("r", 2, "main", "base", AT, adapter=ADAPTER).served_name
BODY = json.dumps({"model": "r", "messages": MESSAGES}).encode()
STREAM = json.dumps({"model": "r", "messages": MESSAGES, "stream": True}).encode()


def on_candidate(received: Received) -> bool:
    return is_inference(received) and received.json()["model"] == CANDIDATE


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base", any_model=True) as engine:
        yield engine


@pytest.fixture
async def gateway(engine: StubEngine, tmp_path: Path) -> AsyncIterator[RunningGateway]:
    async with serving(settings(tmp_path, engine.url), catalog(engine.url)) as running:
        yield running


@pytest.fixture
async def canary(engine: StubEngine, tmp_path: Path) -> AsyncIterator[RunningGateway]:
    """Everybody is on the candidate."""
    known = catalog(engine.url, candidate=ADAPTER)
    async with serving(settings(tmp_path, engine.url), known) as running:
        yield running


async def metrics(gateway: RunningGateway) -> str:
    return (await gateway.send("GET", "/metrics", key=None)).body.decode()


FAILURES = [
    Reply(status=500),
    Reply(status=503),
    Reply(ending=Ending.CLOSE_BEFORE_HEADERS),
    Reply(ending=Ending.RESET_BEFORE_HEADERS),
    Reply(ending=Ending.CLOSE_MIDWAY),
    Reply(ending=Ending.TRUNCATED),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda reply: f"{reply.status} {reply.ending}")
async def test_stable_answers_for_a_candidate_that_fails(
    canary: RunningGateway, engine: StubEngine, failure: Reply
) -> None:
    engine.script(failure, times=None, where=on_candidate)
    answer = await canary.send(body=BODY)
    assert answer.status == 200
    assert answer.headers["x-sluice-fallback"] == "1"
    assert answer.headers["x-sluice-arm"] == "candidate"
    assert answer.headers["x-sluice-version"] == "r@1"
    text = await metrics(canary)
    assert 'sluice_fallbacks_total{route="r"} 1.0' in text
    assert 'sluice_requests_total{arm="candidate",code="200",route="r",version="r@1"} 1.0' in text


STREAM_FAILURES = [*FAILURES[:4], Reply(ending=Ending.CLOSE_MIDWAY, after=0)]
STREAM_FAILURES += [Reply(ending=Ending.ERROR_EVENT, after=0)]


@pytest.mark.parametrize("failure", STREAM_FAILURES, ids=lambda reply: f"{reply.ending}")
async def test_stable_streams_for_a_candidate_that_fails_before_its_first_byte(
    canary: RunningGateway, engine: StubEngine, failure: Reply
) -> None:
    engine.script(failure, times=None, where=on_candidate)
    answer = await canary.send(body=STREAM)
    assert answer.headers["x-sluice-fallback"] == "1"
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_a_client_error_is_no_failure(canary: RunningGateway, engine: StubEngine) -> None:
    engine.script(Reply(status=400, body=b'{"error":{"message":"too long"}}'), times=None)
    for _ in range(10):
        answer = await canary.send(body=BODY)
        assert (answer.status, answer.body) == (400, b'{"error":{"message":"too long"}}')
        assert "x-sluice-fallback" not in answer.headers


async def test_an_engine_that_always_fails_is_passed_on_as_it_is(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    engine.script(Reply(status=500, body=b'{"error":{"message":"boom"}}'), times=None)
    answer = await gateway.send(body=BODY)
    assert (answer.status, answer.body) == (500, b'{"error":{"message":"boom"}}')


async def test_a_version_that_no_engine_answers_for_is_an_openai_error(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    engine.script(Reply(ending=Ending.CLOSE_BEFORE_HEADERS), times=None)
    answer = await gateway.send(body=BODY)
    assert answer.status == 502
    assert answer.json()["error"]["code"] == "engine_failed"
    text = await metrics(gateway)
    assert 'sluice_requests_total{arm="stable",code="502",route="r",version="r@1"} 1.0' in text
    assert 'sluice_upstream_errors_total{engine="main",reason="reset"} 1.0' in text


@pytest.mark.parametrize("failure", FAILURES, ids=lambda reply: f"{reply.status} {reply.ending}")
async def test_another_replica_answers_for_one_that_fails(tmp_path: Path, failure: Reply) -> None:
    async with StubEngine(base="base") as one, StubEngine(base="base") as other:
        one.script(failure, times=None)
        known = catalog(one.url, other.url)
        async with serving(settings(tmp_path, one.url, other.url), known) as gateway:
            for _ in range(8):
                answer = await gateway.send(body=BODY)
                assert answer.status == 200
                assert "x-sluice-fallback" not in answer.headers
        # It is asked until it has failed three times, and then left alone; the first of them may
        # have been sent twice, on the connection that the health check left.
        assert 1 <= len(one.inference_requests) <= 4


async def test_a_replica_that_forgot_an_adapter_is_passed_over(tmp_path: Path) -> None:
    """Until the controller has noticed that an engine was restarted."""
    async with StubEngine(base="base") as one, StubEngine(base="base") as other:
        other.adapters[CANDIDATE] = "/nowhere"
        known = catalog(one.url, other.url, candidate=ADAPTER)
        async with serving(settings(tmp_path, one.url, other.url), known) as gateway:
            for _ in range(6):
                answer = await gateway.ask("r@2")
                assert answer.status == 200
            other.forget()
            answer = await gateway.ask("r@2")
            assert (answer.status, answer.json()["error"]["code"]) == (503, "version_not_resident")
            # A candidate that nobody serves any more is answered for by stable.
            assert (await gateway.ask()).headers["x-sluice-fallback"] == "1"


async def test_a_candidate_with_a_prompt_has_no_say_where_prompts_have_no_place(
    engine: StubEngine, tmp_path: Path
) -> None:
    known = catalog(engine.url, candidate=ADAPTER)
    prompted = replace(known.versions["r@2"], prompt=Prompt(({"role": "system", "content": "x"},)))
    known = replace(known, versions={**known.versions, "r@2": prompted})
    async with serving(settings(tmp_path, engine.url), known) as gateway:
        answer = await gateway.send(path="/v1/completions", body={"model": "r", "prompt": "Hi"})
        assert (answer.status, answer.headers["x-sluice-fallback"]) == (200, "1")
        pinned = {"model": "r@2", "prompt": "Hi"}
        assert (await gateway.send(path="/v1/completions", body=pinned)).status == 400


async def test_a_dead_replica_is_not_noticed(tmp_path: Path) -> None:
    async with StubEngine(base="base") as one, StubEngine(base="base") as other:
        known = catalog(one.url, other.url)
        async with serving(settings(tmp_path, one.url, other.url), known) as gateway:
            await one.stop()
            for _ in range(8):
                assert (await gateway.send(body=BODY)).status == 200
        await one.start()


async def test_retries_end_with_their_budget(tmp_path: Path) -> None:
    async with StubEngine(base="base") as one, StubEngine(base="base") as other:
        for engine in (one, other):
            engine.script(Reply(status=500), times=None)
        config = settings(
            tmp_path,
            one.url,
            other.url,
            retry_ratio=0.0,
            health={"check_seconds": 3600, "failures": 1000},
        )
        async with serving(config, catalog(one.url, other.url)) as gateway:
            for _ in range(50):
                assert (await gateway.send(body=BODY)).status == 500
        # Ten retries are in reserve; a share of nothing earns no more.
        assert len(one.inference_requests) + len(other.inference_requests) == 60


@pytest.mark.parametrize("ending", [Ending.CLOSE_MIDWAY, Ending.RESET_MIDWAY, Ending.TRUNCATED])
async def test_a_stream_that_breaks_ends_with_an_error_and_no_done(
    gateway: RunningGateway, engine: StubEngine, ending: Ending
) -> None:
    gate = asyncio.Event()
    engine.script(Reply(ending=ending, hold_stream=gate, hold_after=2))
    async with opened(gateway, STREAM) as read:
        body = await read()
        gate.set()
        while data := await read():
            body += data
    events = body.strip().split(b"\n\n")
    assert json.loads(events[-1].removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    assert b"[DONE]" not in body
    text = await metrics(gateway)
    assert 'sluice_requests_total{arm="stable",code="502",route="r",version="r@1"} 1.0' in text


async def test_an_error_event_of_the_engine_is_the_end_of_the_stream(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    gate = asyncio.Event()
    engine.script(Reply(ending=Ending.ERROR_EVENT, after=2, hold_stream=gate, hold_after=2))
    async with opened(gateway, STREAM) as read:
        body = await read()
        gate.set()
        while data := await read():
            body += data
    assert b"EngineCore died" in body
    assert b"[DONE]" not in body
    text = await metrics(gateway)
    assert 'sluice_upstream_errors_total{engine="main",reason="error_event"} 1.0' in text


async def test_a_silent_stream_is_ended(engine: StubEngine, tmp_path: Path) -> None:
    config = settings(tmp_path, engine.url, upstream={"between_bytes_seconds": 0.3})
    async with serving(config, catalog(engine.url)) as gateway:
        engine.script(Reply(ending=Ending.SILENCE, after=2))
        answer = await gateway.send(body=STREAM)
        assert b'"error"' in answer.body
        await engine.wait_for_cancelled(1)


async def test_a_large_answer_passes_through(gateway: RunningGateway, engine: StubEngine) -> None:
    large = b'{"x":"' + b"y" * 5_000_000 + b'"}'
    engine.script(Reply(body=large))
    answer = await gateway.send(body=BODY)
    assert answer.body == large
    assert answer.headers["content-length"] == str(len(large))


async def test_the_clients_usage_is_asked_for_once(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    answer = await gateway.send(body=STREAM)
    assert b"usage" not in answer.body
    assert engine.inference_requests[0].json()["stream_options"] == {"include_usage": True}
    assert 'sluice_tokens_total{kind="completion",route="r"} 4.0' in await metrics(gateway)


# The client goes away.


PHASES = [
    pytest.param(BODY, Reply(hold_headers=asyncio.Event()), id="whole"),
    pytest.param(STREAM, Reply(hold_headers=asyncio.Event()), id="before the head"),
    pytest.param(STREAM, Reply(ending=Ending.SILENCE, after=0), id="before the first token"),
    pytest.param(STREAM, Reply(ending=Ending.SILENCE, after=3), id="midway"),
]


@pytest.mark.parametrize(("body", "reply"), PHASES)
async def test_the_engine_is_told_when_the_client_leaves(
    gateway: RunningGateway, engine: StubEngine, body: bytes, reply: Reply
) -> None:
    engine.script(reply)
    task = asyncio.create_task(gateway.send(body=body))
    await engine.wait_for_requests(1)
    received = engine.inference_requests[0]
    await engine.wait_until(lambda: received.events_sent >= reply.after % 2, "the phase")
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await engine.wait_for_cancelled(1)
    await until(lambda: gateway.app.inflight == 0, "the request to end")
    text = await metrics(gateway)
    assert 'code="499",route="r",version="r@1"} 1.0' in text


async def test_a_client_that_leaves_says_nothing_of_the_engine(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    engine.script(Reply(hold_headers=asyncio.Event()), times=5)
    for count in range(1, 6):
        task = asyncio.create_task(gateway.send(body=BODY))
        await engine.wait_for_requests(count)
        task.cancel()
        await engine.wait_for_cancelled(count)
    assert (await gateway.send(body=BODY)).status == 200


async def test_a_slow_client_slows_only_its_own_engine_request(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    events = [b"data: " + b"x" * 65_536 + b"\n\n"] * 1_000
    engine.script(Reply(chunks=events))
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    writer.write(
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {SECRET}\r\n"
        f"content-length: {len(STREAM)}\r\n\r\n".encode()
        + STREAM
    )
    await engine.wait_for_requests(1)
    received, sent = engine.inference_requests[0], -1
    while sent != received.events_sent or sent == 0:
        sent = received.events_sent
        await asyncio.sleep(0.2)
    assert sent < 900
    assert (await gateway.send(body=BODY)).status == 200
    while not received.answered:
        assert await reader.read(1_000_000)
    writer.close()


# What is counted.


async def test_slow_answers_are_counted_by_the_slo(engine: StubEngine, tmp_path: Path) -> None:
    route = replace(ROUTE, slo=Slo(ttft_seconds=0.0, total_seconds=0.0))
    known = catalog(engine.url, candidate=ADAPTER, route=route)
    async with serving(settings(tmp_path, engine.url), known) as gateway:
        await gateway.send(body=STREAM)
        tally = gateway.app.evidence.tally("r", "r@2.2", "candidate")
        counts = tally.counts()
    assert (counts.requests, counts.slow_first_token, counts.slow_total) == (1, 1, 1)


async def test_a_fallback_counts_against_the_candidate(
    canary: RunningGateway, engine: StubEngine
) -> None:
    engine.script(Reply(status=500), where=on_candidate)
    await canary.send(body=BODY)
    await canary.send(body=BODY)
    evidence = canary.app.evidence
    candidate = evidence.tally("r", "r@2.2", "candidate").counts()
    assert (candidate.requests, candidate.errors, candidate.fallbacks) == (2, 1, 1)
    assert evidence.tally("r", "r@2.2", "stable").counts().requests == 0


@contextlib.asynccontextmanager
async def opened(
    gateway: RunningGateway, body: bytes
) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
    """An answer that is read piece by piece."""
    headers = [(b"authorization", f"Bearer {SECRET}".encode())]
    async with (
        UpstreamPool(UpstreamSection()) as pool,
        pool.request(gateway.url, b"POST", CHAT.encode(), headers, body) as response,
    ):
        yield response.read


async def test_prompts_that_begin_alike_go_to_one_replica(
    engine: StubEngine, tmp_path: Path
) -> None:
    async with StubEngine(base="base", any_model=True) as other:
        urls = (engine.url, other.url)
        config = settings(tmp_path, *urls, balance={"affinity": True, "affinity_characters": 60})
        async with serving(config, catalog(*urls)) as running:
            for number in range(32):
                text = f"Topic {number % 8}. " + "You know all of it. " * 5 + f"Question {number}?"
                await running.send(body={"model": "r", "messages": [{"content": text}]})
        topics = [
            [received.json()["messages"][0]["content"][:8] for received in one.inference_requests]
            for one in (engine, other)
        ]
        assert sum(map(len, topics)) == 32
        assert not set(topics[0]) & set(topics[1])


async def test_replicas_are_found_by_name_and_kept_where_the_resolver_fails(
    engine: StubEngine, tmp_path: Path
) -> None:
    zone: dict[str, list[str]] = {}

    async def look_up(host: str, port: int) -> list[str]:
        if host not in zone:
            raise OSError(f"no such name: {host}:{port}")
        return zone[host]

    name = f"dns+http://engine:{engine.port}"
    config = settings(tmp_path, name, health={"resolve_seconds": 0.05})
    async with serving(config, catalog(engine.url), lookup=look_up) as running:
        assert (await running.ask()).status == 503
        zone["engine"] = ["127.0.0.1"]
        async with asyncio.timeout(10):
            while (await running.ask()).status != 200:
                await asyncio.sleep(0.01)
        failures = await _discovery_errors(running)
        assert failures > 0
        del zone["engine"]
        async with asyncio.timeout(10):
            while await _discovery_errors(running) == failures:
                await asyncio.sleep(0.01)
        assert (await running.ask()).status == 200


async def _discovery_errors(gateway: RunningGateway) -> float:
    found = re.search(
        r'sluice_discovery_errors_total\{engine="main"\} (\S+)', await metrics(gateway)
    )
    return float(found[1]) if found else 0.0


HEDGED: dict[str, Any] = {"hedge": {"after_seconds": 0.05}, "balance": {"affinity": True}}


@pytest.mark.parametrize("headers", [True, False], ids=["no headers", "no token"])
async def test_another_replica_answers_a_stream_that_the_first_keeps_waiting(
    engine: StubEngine, tmp_path: Path, headers: bool
) -> None:
    async with StubEngine(base="base", any_model=True) as other:
        both = (engine, other)
        config = settings(tmp_path, *(one.url for one in both), **HEDGED)
        async with serving(config, catalog(*(one.url for one in both))) as running:
            # Affinity sends the same prompt to the same replica, so we know whom to slow down.
            assert (await running.send(body=STREAM)).status == 200
            slow = next(one for one in both if one.inference_requests)
            quick = other if slow is engine else engine
            gate = asyncio.Event()
            slow.script(
                Reply(hold_headers=gate) if headers else Reply(hold_stream=gate, hold_after=0)
            )
            answer = await running.send(body=STREAM)
            assert (answer.status, answer.body[-14:]) == (200, b"data: [DONE]\n\n")
            assert len(quick.inference_requests) == 1
            await slow.wait_for_cancelled(1)
            assert 'sluice_hedges_total{engine="main",won="second"} 1.0' in await metrics(running)
            # Who lost is not broken: it is asked again.
            assert (await running.send(body=STREAM)).status == 200
            assert len(slow.inference_requests) == 3


async def test_a_client_that_leaves_cancels_both_questions(
    engine: StubEngine, tmp_path: Path
) -> None:
    async with StubEngine(base="base", any_model=True) as other:
        both = (engine, other)
        for one in both:
            one.script(Reply(hold_headers=asyncio.Event()))
        config = settings(tmp_path, *(one.url for one in both), **HEDGED)
        async with serving(config, catalog(*(one.url for one in both))) as running:
            asking = asyncio.create_task(running.send(body=STREAM))
            for one in both:
                await one.wait_for_requests(1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            for one in both:
                await one.wait_for_cancelled(1)


async def test_hedges_spend_the_budget_and_leave_whole_answers_alone(
    engine: StubEngine, tmp_path: Path
) -> None:
    async with StubEngine(base="base", any_model=True) as other:
        both, gate = (engine, other), asyncio.Event()
        for one in both:
            one.script(Reply(hold_headers=gate), times=None)
        config = settings(tmp_path, *(one.url for one in both), retry_ratio=0, **HEDGED)
        async with serving(config, catalog(*(one.url for one in both))) as running:
            asking = [asyncio.create_task(running.send(body=BODY)) for _ in range(5)]
            asking += [asyncio.create_task(running.send(body=STREAM)) for _ in range(20)]

            def asked() -> int:
                return sum(len(one.inference_requests) for one in both)

            # The reserve of ten retries, and not one more.
            await until(lambda: asked() == 35, "the hedges")
            gate.set()
            answers = await asyncio.gather(*asking)
            assert {answer.status for answer in answers} == {200}
            assert asked() == 35
