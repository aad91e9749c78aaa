"""A route with an adapter on trial, an engine on loopback, and a shadow in the test's own process."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from gateway.shadow.fleet import Fleet, pool_limits
from gateway.shadow.metrics import ShadowMetrics
from gateway.shadow.settings import ShadowSettings
from gateway.shadow.worker import ShadowWorker
from gateway.upstream import UpstreamPool
from rollout.engines import Engine, Residency
from rollout.evidence import PairCounts
from rollout.exchanges import Answer, Exchange
from rollout.policy import Policy
from rollout.redaction import Redactor
from rollout.routes import Route
from rollout.state import Proposed, Trial
from rollout.stores import Stores, open_stores
from rollout.versions import Version
from tests.stub_engine import Received, StubEngine, is_inference

NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)
CHAT: Final = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Bed:
    """A route whose stable version is the bare base, with an adapter on trial."""

    url: str
    stores: Stores
    engine: StubEngine
    candidate: Version
    trial: Trial

    def exchange(self, request_id: str, **changes: Any) -> Exchange:
        """What a gateway captures: stable said "good"; each request has a prompt of its own."""
        messages = [{"role": "user", "content": f"Good or bad? {request_id}"}]
        captured = Exchange(
            request_id=request_id,
            route="triage",
            trial=self.trial.id,
            arm="stable",
            unit="u",
            path=CHAT,
            request=json.dumps({"model": "triage", "messages": messages, "stream": True}),
            answer=Answer(1, 200, "good"),
            captured_at=NOW,
        )
        return replace(captured, **changes)

    async def capture(self, *exchanges: Exchange) -> None:
        await self.stores.captures.append(exchanges)

    async def pairs(self) -> PairCounts:
        return (await self.stores.evidence.read("triage", self.trial.id)).pairs

    async def set_resident(self, *versions: Version) -> None:
        served = frozenset({"base", *(version.served_name for version in versions)})
        await self.stores.catalog.put_residency([Residency("main", self.engine.url, True, served)])

    async def settled(self) -> None:
        """Wait until there is nothing left to do."""
        await until_empty(self.stores)

    async def update_route(
        self, *, self_sample: float = 0.0, agreement_sample: float = 0.05, **changes: Any
    ) -> None:
        policy = Policy(self_sample=self_sample, agreement_sample=agreement_sample)
        route = Route("triage", "main", policy=policy, **changes)
        await self.stores.rollouts.put_route(route, by="test", at=NOW, base="base")


async def until(holds: Callable[[], Awaitable[bool]], what: str, limit: float = 30.0) -> None:
    try:
        async with asyncio.timeout(limit):
            while not await holds():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"waited {limit} s for {what}") from None


async def until_empty(stores: Stores) -> None:
    async def empty() -> bool:
        return await stores.captures.waiting() == 0

    await until(empty, "every exchange to be settled")


async def propose(stores: Stores, draft: Version) -> tuple[Version, Trial]:
    version = await stores.rollouts.register(draft)
    before = await stores.rollouts.get("triage")
    commit = await stores.rollouts.commit(before, Proposed(version.number, NOW, "test"))
    assert commit.rollout.trial is not None
    return version, commit.rollout.trial


@asynccontextmanager
async def made_bed(url: str) -> AsyncIterator[Bed]:
    draft = Version(
        "triage", 0, "main", "base", NOW, adapter="ab" * 32, adapter_path="/adapters/ab"
    )
    async with (
        open_stores(url) as stores,
        StubEngine(adapters={draft.served_name: "/adapters/ab"}, text=answer) as engine,
    ):
        # Each asks the engine once, so that what it was asked can be counted.
        route = Route("triage", "main", policy=Policy(self_sample=0.0))
        await stores.rollouts.put_route(route, by="test", at=NOW, base="base")
        candidate, trial = await propose(stores, draft)
        made = Bed(url, stores, engine, candidate, trial)
        await made.set_resident(candidate)
        yield made


def answer(request: dict[str, Any]) -> str:
    """The base says "good", the adapter "bad"; both know when they should agree."""
    if "agree" in request["messages"][-1]["content"]:
        return "good"
    return "good" if request["model"] == "base" else "bad"


def asks(version: Version) -> Callable[[Received], bool]:
    return lambda received: (
        is_inference(received) and received.json()["model"] == version.served_name
    )


@asynccontextmanager
async def shadow(bed: Bed, consumer: str = "one", **table: Any) -> AsyncIterator[ShadowMetrics]:
    engine = Engine("main", (bed.engine.url,), "base")
    async with running(bed.stores, engine, consumer, **table) as metrics:
        yield metrics


@asynccontextmanager
async def running(
    stores: Stores, engine: Engine, consumer: str = "one", **table: Any
) -> AsyncIterator[ShadowMetrics]:
    """A shadow in this process, stopped as by SIGTERM; then its metrics stand still."""
    settings = ShadowSettings.model_validate({"poll_seconds": 0.05} | table)
    metrics = ShadowMetrics()
    stop = asyncio.Event()
    async with UpstreamPool(pool_limits(settings)) as pool:
        fleet = Fleet(stores.catalog, [engine], pool, settings)
        worker = ShadowWorker(stores.captures, fleet, metrics, settings, Redactor(), consumer)
        task = asyncio.create_task(worker.run(stop))
        try:
            yield metrics
        finally:
            stop.set()
            await task


def count(metrics: ShadowMetrics, name: str, **labels: str) -> float:
    value = metrics.registry.get_sample_value(f"sluice_shadow_{name}", labels)
    assert value is not None, f"no such series: {name} {labels}"
    return value
