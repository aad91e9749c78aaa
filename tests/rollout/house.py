"""A store, an engine, and controllers on them whose clocks the test turns."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
from prometheus_client import CollectorRegistry

from rollout.discovery import Discovery
from rollout.engines import Residency
from rollout.exchanges import Answer, Comparison, Exchange
from rollout.loops import Controller
from rollout.metrics import ControllerMetrics
from rollout.serving import Waits
from rollout.settings import Settings
from rollout.state import Proposed, Rollout
from rollout.stores import Stores
from rollout.versions import Version
from tests.stub_engine import StubEngine, at

# Before any clock of a test: a trial begun then has soaked.
LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
# The store's clock goes on while a test's stands still: no test takes so long.
LEASE_SECONDS = 300.0
POLICY = {
    "automatic": True,
    "steps": [10.0],
    "soak_seconds": 60.0,
    "minimum_pairs": 8,
    "minimum_units": 0,
    "gates": ["pairs"],
}
LOAD = at("/v1/load_lora_adapter")


class Clock:
    """Both clocks of a controller. The test turns them."""

    def __init__(self) -> None:
        self.at = LONG_AGO + timedelta(days=1)

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return self.at.timestamp()

    def turn(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


@dataclass
class House:
    """A store, an engine, and the means to make controllers on them."""

    stores: Stores
    engine: StubEngine
    client: httpx2.AsyncClient
    path: Path

    def settings(self, **policy: Any) -> Settings:
        return Settings.model_validate(
            {
                "controller": {"tick_seconds": 0.02, "lease_seconds": 3.0},
                "engines": [{"name": "main", "urls": [self.engine.url], "base": "base"}],
                "routes": [{"name": "triage", "engine": "main", "policy": POLICY | policy}],
            }
        )

    def controller(
        self,
        clock: Clock | None = None,
        *,
        metrics: ControllerMetrics | None = None,
        discovery: Discovery | None = None,
        **policy: Any,
    ) -> Controller:
        clock = clock or Clock()
        settings = self.settings(**policy)
        section = settings.controller.model_copy(update={"lease_seconds": LEASE_SECONDS})
        return Controller(
            self.stores,
            self.client,
            settings.model_copy(update={"controller": section}),
            metrics or ControllerMetrics(CollectorRegistry()),
            bootstrap="sk-boot",
            waits=Waits(drain=0.0, notice=0.0),
            discovery=discovery,
            now=clock.now,
            monotonic=clock.monotonic,
        )

    async def leader(self, clock: Clock | None = None, **policy: Any) -> Controller:
        controller = self.controller(clock, **policy)
        await controller.hold_lease()
        await controller.tick()
        return controller

    async def propose(self, *, weights: str = "a", began: datetime = LONG_AGO) -> Rollout:
        version = await self.stores.rollouts.register(
            Version(
                route="triage",
                number=0,
                engine="main",
                base="base",
                created_at=LONG_AGO,
                adapter=weights * 64,
                adapter_path=str(self.path),
            )
        )
        before = await self.stores.rollouts.get("triage")
        event = Proposed(version=version.number, at=began, by="ann")
        return (await self.stores.rollouts.commit(before, event)).rollout

    async def resident(self, *weights: str) -> None:
        served = frozenset({"base", *(f"base-{w * 20}" for w in weights)})
        await self.stores.catalog.put_residency(
            [Residency("main", self.engine.url, ready=True, served=served)]
        )

    async def count(self, rollout: Rollout, *, wins: int = 0, losses: int = 0) -> None:
        """Pairs that were settled by themselves, through the shadow's own path."""
        assert rollout.trial is not None
        outcomes = ["win"] * wins + ["loss"] * losses
        answers = Answer(version=1, status=200, text="a"), Answer(version=2, status=200, text="b")
        for number, outcome in enumerate(outcomes):
            request = f"{rollout.trial.id}-{number}"
            exchange = Exchange(
                request_id=request,
                route="triage",
                trial=rollout.trial.id,
                arm="stable",
                unit="u",
                path="/v1/chat/completions",
                request="{}",
                answer=answers[0],
                captured_at=LONG_AGO,
            )
            comparison = Comparison(
                request_id=request,
                route="triage",
                trial=rollout.trial.id,
                stable=answers[0],
                candidate=answers[1],
                agreement=0.0,
                kind="failure",
                outcome="win" if outcome == "win" else "loss",
            )
            await self.stores.captures.append([exchange])
            for taken in await self.stores.captures.take("test", 10, 1.0):
                await self.stores.captures.settle(taken, comparison, None, 100)

    async def rollout(self) -> Rollout:
        return await self.stores.rollouts.get("triage")


@asynccontextmanager
async def running(*controllers: Controller) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(controller.run()) for controller in controllers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(holds: Callable[[], Awaitable[bool]], what: str, limit: float = 60.0) -> None:
    try:
        async with asyncio.timeout(limit):
            while not await holds():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"waited {limit} s for {what}") from None
