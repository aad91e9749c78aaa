"""What the controller keeps on two replicas through a rollout's life, and what gateways send there."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import pytest
from prometheus_client import CollectorRegistry

from gateway.routing import View, index
from rollout.engines import placement
from rollout.loops import Controller
from rollout.metrics import ControllerMetrics
from rollout.serving import Replica, Waits
from rollout.settings import Settings
from rollout.state import CanarySet, Event, Promoted, Proposed, RolledBack, Rollout
from rollout.stores import Stores, open_stores
from rollout.versions import Version
from tests.stub_engine import Reply, StubEngine, at

pytestmark = pytest.mark.anyio
AT = datetime(2026, 1, 1, tzinfo=UTC)
LOAD = at("/v1/load_lora_adapter")
WAITS = Waits(drain=30.0, notice=5.0, retry=2.0)
SLOTS = 3


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class House:
    """A route on two replicas, and a controller that looks after them when the test says so."""

    stores: Stores
    controller: Controller
    stubs: tuple[StubEngine, StubEngine]
    replicas: tuple[Replica, ...]
    registry: CollectorRegistry
    clock: Clock
    path: Path

    async def look(self, times: int = 1) -> None:
        """One pass of the controller over everything; never more adapters than slots after it."""
        for _ in range(times):
            await self.controller.hold_lease()
            await self.controller.tick()
            for replica in self.replicas:
                await self.controller.keep(replica)
            assert all(len(stub.adapters) <= SLOTS for stub in self.stubs)

    async def drain(self) -> None:
        """Let go what nothing points to: first gateways stop sending, then it is unloaded."""
        for seconds in (0.0, WAITS.drain, WAITS.notice, 0.0):
            self.clock.now += seconds
            await self.look()

    async def register(self, weights: str) -> Version:
        draft = Version(
            route="triage",
            number=0,
            engine="main",
            base="base",
            created_at=AT,
            adapter=weights * 64,
            adapter_path=str(self.path),
        )
        return await self.stores.rollouts.register(draft)

    async def commit(self, event: Event) -> Rollout:
        before = await self.stores.rollouts.get("triage")
        return (await self.stores.rollouts.commit(before, event)).rollout

    async def propose(self, weights: str) -> Version:
        version = await self.register(weights)
        await self.commit(Proposed(version=version.number, at=AT, by="ann"))
        return version

    async def promote(self, weights: str) -> Version:
        version = await self.propose(weights)
        await self.look()
        await self.commit(Promoted(at=AT, by="ann"))
        return version

    async def view(self) -> View:
        """The catalog as every gateway reads it."""
        engine = self.replicas[0].engine
        return index(await self.stores.catalog.load(), {"main": engine})

    async def sent_to(self, version: Version) -> set[str]:
        """The replicas on which gateways ask for it."""
        return set((await self.view()).lanes[version.name].stable.urls)

    async def why_not(self, version: Version) -> str:
        catalog = await self.stores.catalog.load()
        return placement(version, catalog.residency.values()).reason

    def loaded(self) -> tuple[set[str], set[str]]:
        """By the first letter of their digests."""
        one, other = ({name[-1] for name in stub.adapters} for stub in self.stubs)
        return one, other

    @property
    def urls(self) -> set[str]:
        return {stub.url for stub in self.stubs}


@pytest.fixture
async def house(redis_url: str, tmp_path: Path) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        stores = await stack.enter_async_context(open_stores(redis_url))
        client = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False))
        one = await stack.enter_async_context(StubEngine(base="base"))
        other = await stack.enter_async_context(StubEngine(base="base"))
        engine = {"name": "main", "urls": [one.url, other.url], "base": "base"}
        settings = Settings.model_validate(
            {
                "engines": [engine | {"max_adapters": SLOTS}],
                "routes": [{"name": "triage", "engine": "main"}],
            }
        )
        clock, registry = Clock(), CollectorRegistry()
        controller = Controller(
            stores, client, settings, ControllerMetrics(registry), monotonic=clock
        )
        (configured,) = settings.engine_list()
        replicas = tuple(Replica(client, configured, url, WAITS, clock) for url in configured.urls)
        made = House(stores, controller, (one, other), replicas, registry, clock, tmp_path)
        await made.look()
        yield made


async def test_stable_candidate_and_last_stable_are_on_every_replica(house: House) -> None:
    first = await house.promote("a")
    second = await house.promote("b")
    third = await house.propose("c")
    await house.look()
    assert house.loaded() == ({"a", "b", "c"}, {"a", "b", "c"})
    for version in (first, second, third):
        assert await house.sent_to(version) == house.urls


async def test_what_nothing_points_to_loses_its_traffic_before_its_slot(house: House) -> None:
    await house.promote("a")
    candidate = await house.propose("b")
    await house.look()
    await house.commit(RolledBack(at=AT, by="ann"))
    await house.look()
    house.clock.now += WAITS.drain
    await house.look()
    assert await house.sent_to(candidate) == set()
    assert house.loaded() == ({"a", "b"}, {"a", "b"})
    house.clock.now += WAITS.notice
    await house.look()
    assert house.loaded() == ({"a"}, {"a"})


async def test_a_replica_that_cannot_serve_a_version_gets_none_of_its_traffic(
    house: House,
) -> None:
    able, unable = house.stubs
    error = {"error": {"message": "LoRA rank 64 is greater than max_lora_rank 16"}}
    unable.script(Reply(status=500, body=error), times=None, where=LOAD)
    candidate = await house.propose("a")
    await house.look()
    await house.commit(CanarySet(percent=50.0, at=AT, by="ann"))
    await house.look()
    lane = (await house.view()).lanes["triage"]
    assert lane.candidate is not None
    assert set(lane.candidate.urls) == {able.url}
    assert set(lane.stable.urls) == house.urls
    why = await house.why_not(candidate)
    assert why.startswith(f"replica {unable.url}: ")
    assert "LoRA rank 64 is greater than max_lora_rank 16" in why
    await house.controller.observe()

    def metric(name: str, stub: StubEngine) -> float | None:
        labels = {"engine": "main", "replica": stub.url}
        return house.registry.get_sample_value(f"sluice_adapters_{name}", labels)

    assert [metric("missing", stub) for stub in house.stubs] == [0, 1]
    assert [metric("resident", stub) for stub in house.stubs] == [1, 0]


async def test_a_restarted_replica_gets_a_versions_traffic_once_it_has_answered_for_it(
    house: House,
) -> None:
    stable = await house.promote("a")
    await house.look()
    steady, restarted = house.stubs
    await restarted.stop()
    await house.look()
    assert await house.sent_to(stable) == {steady.url}
    restarted.forget()
    await restarted.start()
    restarted.script(Reply(status=500, body={"error": {"message": "still loading"}}))
    await house.look()
    assert await house.sent_to(stable) == {steady.url}
    assert "still loading" in await house.why_not(stable)
    house.clock.now += WAITS.retry
    await house.look()
    assert await house.sent_to(stable) == house.urls
    assert await house.why_not(stable) == ""


async def test_what_finds_no_slot_is_told_so_and_gets_the_next_that_is_free(house: House) -> None:
    previous = await house.promote("a")
    stable = await house.promote("b")
    candidate = await house.propose("c")
    wanted = await house.register("d")
    await house.look()
    assert house.loaded() == ({"a", "b", "c"}, {"a", "b", "c"})
    await house.stores.catalog.want(wanted.name, 3600)
    await house.look()
    assert "waits until an adapter" in await house.why_not(wanted)
    await house.drain()
    assert house.loaded() == ({"b", "c", "d"}, {"b", "c", "d"})
    assert "no room: its 3 adapter slots" in await house.why_not(previous)
    for version in (stable, candidate, wanted):
        assert await house.sent_to(version) == house.urls
    await house.commit(RolledBack(at=AT, by="ann"))
    await house.drain()
    assert house.loaded() == ({"a", "b", "d"}, {"a", "b", "d"})
    assert await house.sent_to(previous) == house.urls


async def test_another_controller_takes_nothing_away_from_what_is_served(house: House) -> None:
    stable = await house.promote("a")
    await house.look()
    asked = [len(stub.inference_requests) for stub in house.stubs]
    for replica in house.replicas:
        replica.remember((await house.stores.catalog.load()).residency[replica.url])
    await house.look()
    assert await house.sent_to(stable) == house.urls
    assert [len(stub.inference_requests) for stub in house.stubs] == asked
