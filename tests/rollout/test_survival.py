"""A controller dies at any step of a promotion, and another one finishes it.

Each await on the store and on the engine is a step. First a promotion is watched, so that all of
its steps are known; then it is done again for each of them, and the controller dies there: just
before the step has happened, or just after it and before anybody heard of it.
"""

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import httpx2
import pytest
import redis
from prometheus_client import CollectorRegistry

from gateway.routing import index
from rollout.engines import Engine
from rollout.loops import Controller
from rollout.metrics import ControllerMetrics
from rollout.serving import Replica, Waits
from rollout.state import RolledBack
from rollout.stores import Stores
from rollout.stores.link import RedisLink, connect
from tests.rollout.house import LOAD, LONG_AGO, Clock, House, running, until
from tests.stub_engine import Reply, at

pytestmark = pytest.mark.anyio

WAITS = Waits(drain=0.0, notice=0.0)
# A round is a look at everything; a promotion by one step takes three, and some more are spare.
ROUNDS = 8
READS = re.compile(r"GET|HGETALL|HMGET|ZRANGE|/health|/v1/models")
# What changes the catalog that gateways read, or what an engine holds.
CHANGES = {"commit", "announce_if_changed", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}


@dataclass
class Fate:
    """Counts the steps of one controller, and ends it at one of them.

    `before` is called ahead of each step, `watch` behind those that change something.
    """

    dies_at: int | None = None
    afterwards: bool = False
    before: Callable[[str], Awaitable[None]] | None = None
    watch: Callable[[str], Awaitable[None]] | None = None
    steps: list[str] = field(default_factory=list)
    met: asyncio.Event = field(default_factory=asyncio.Event)

    async def take(self, step: str, act: Callable[[], Awaitable[Any]]) -> Any:
        self.steps.append(step)
        if self.before is not None:
            await self.before(step)
        last = len(self.steps) - 1 == self.dies_at
        if not last or self.afterwards:
            done = await act()
            if self.watch is not None and step in CHANGES:
                await self.watch(step)
        if not last:
            return done
        self.met.set()
        return await asyncio.Future()


class MortalLink(RedisLink):
    """A connection to the store whose every command is a step."""

    def __init__(self, link: RedisLink, fate: Fate) -> None:
        super().__init__(link._client)
        self._fate = fate

    async def run(self, *command: Any) -> Any:
        return await self._fate.take(str(command[0]), lambda: super(MortalLink, self).run(*command))

    async def run_all(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        name = "+".join(str(command[0]) for command in commands)
        return list(await self._fate.take(name, lambda: super(MortalLink, self).run_all(commands)))

    async def script(self, name: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        return await self._fate.take(
            name, lambda: super(MortalLink, self).script(name, keys, arguments)
        )


class MortalTransport(httpx2.AsyncHTTPTransport):
    """A way to the engines whose every request is a step."""

    def __init__(self, fate: Fate) -> None:
        super().__init__(trust_env=False)
        self._fate = fate

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response: httpx2.Response = await self._fate.take(
            request.url.path, lambda: super(MortalTransport, self).handle_async_request(request)
        )
        return response


@asynccontextmanager
async def mortal(house: House, url: str, clock: Clock, fate: Fate) -> AsyncIterator[Controller]:
    """A controller that takes its steps by this fate."""
    async with (
        connect(url) as link,
        httpx2.AsyncClient(transport=MortalTransport(fate)) as client,
    ):
        # A dead one's lease must run out within the test.
        settings = house.settings()
        section = settings.controller.model_copy(update={"lease_seconds": 0.02})
        yield Controller(
            Stores(MortalLink(link, fate)),
            client,
            settings.model_copy(update={"controller": section}),
            ControllerMetrics(CollectorRegistry()),
            waits=WAITS,
            now=clock.now,
            monotonic=clock.monotonic,
        )


async def work(controller: Controller, house: House, clock: Clock) -> None:
    """What the loops of a controller do, one after the other, so that each run is the same.

    Ends one round behind the promotion.
    """
    url = house.engine.url
    engine = Engine("main", (url,), "base")
    replica = Replica(controller._client, engine, url, WAITS, clock.monotonic)
    rounds = iter(range(ROUNDS))
    promoted = False
    while not promoted and next(rounds, None) is not None:
        promoted = (await house.rollout()).stable == 2
        await controller.hold_lease()
        # The lease of one that died runs out by itself.
        while not controller.leading:
            await asyncio.sleep(0.005)
            await controller.hold_lease()
        await controller.tick()
        await controller.keep(replica)
        clock.turn(60)


async def begin(house: House, url: str) -> None:
    """An empty store but for a candidate that has won in the shadow, and an engine without it."""
    with redis.Redis.from_url(url) as client:
        client.flushall()
    house.engine.forget()
    await house.controller().prepare()
    await house.count(await house.propose(), wins=8)


async def observe(house: House, step: str) -> None:
    """No gateway may send anybody to what the engine does not hold, whatever it has heard."""
    catalog = await house.stores.catalog.load()
    engines = {"main": Engine("main", (house.engine.url,), "base")}
    lane = index(catalog, engines).lanes.get("triage")
    if lane is None:
        return
    served = [lane.stable]
    if lane.candidate is not None:
        if lane.trial is not None and lane.trial.weight > 0:
            assert lane.candidate.urls, f"after {step} the canary has no replica"
        served.append(lane.candidate)
    for each in served:
        if each.urls and each.version.adapter is not None:
            assert each.version.served_name in house.engine.adapters, f"after {step}"
    if lane.stable.version.adapter is not None:
        assert lane.stable.urls, f"after {step} the stable version has no replica"


async def check(house: House) -> None:
    """Promoted, and the history tells of each event once, each revision following the last."""
    rollout = await house.rollout()
    assert (rollout.stable, rollout.previous, rollout.trial) == (2, 1, None)
    history = (await house.stores.rollouts.history("triage"))[::-1]
    assert [entry.event.kind for entry in history] == ["proposed", "canary", "promoted"]
    assert [entry.revision for entry in history] == [2, 3, 4]
    for before, after in pairwise(history):
        assert after.before == before.after
    audited = [each.action for each in await house.stores.audit.list()]
    assert sorted(a for a in audited if a.startswith("rollout.")) == [
        "rollout.canary",
        "rollout.promoted",
        "rollout.proposed",
    ]


async def live(house: House, url: str, clock: Clock, fate: Fate) -> bool:
    """Let a controller work until it is done, or dies; whether it came to its end."""
    fate.watch = lambda step: observe(house, step)
    async with mortal(house, url, clock, fate) as controller:
        working = asyncio.create_task(work(controller, house, clock))
        dying = asyncio.create_task(fate.met.wait())
        await asyncio.wait((working, dying), return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
        survived = working.done()
        if not survived:
            working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
        return survived


async def test_the_steps_of_a_promotion_are_these(house: House, redis_url: str) -> None:
    """So that the test below is known to cut where it matters."""
    await begin(house, redis_url)
    fate = Fate()
    assert await live(house, redis_url, Clock(), fate)
    await check(house)
    steps = fate.steps
    load, probe = steps.index("/v1/load_lora_adapter"), steps.index("/v1/completions")
    admitted = steps.index("announce_if_changed", probe)
    canary = steps.index("commit")
    promoted = steps.index("commit", canary + 1)
    assert steps.index("lease") < load < probe < admitted < canary < promoted
    assert steps.count("commit") == 2
    assert "SET" in steps[:canary]  # the verdicts


@pytest.mark.parametrize("afterwards", [False, True], ids=["before", "after"])
async def test_a_controller_may_die_at_every_step(
    house: House, redis_url: str, afterwards: bool
) -> None:
    await begin(house, redis_url)
    whole = Fate()
    assert await live(house, redis_url, Clock(), whole)
    # What only reads leaves nothing behind: to die after it is to die before the next step.
    places = [n for n, step in enumerate(whole.steps) if not (afterwards and READS.match(step))]
    assert len(places) > (8 if afterwards else 20)
    died = 0
    for place in places:
        await begin(house, redis_url)
        clock = Clock()
        where = f"{'after' if afterwards else 'before'} step {place}, {whole.steps[place]}"
        try:
            # The last steps may not come: how often a lease is asked for is up to the store's clock.
            if not await live(house, redis_url, clock, Fate(place, afterwards)):
                died += 1
                assert await live(house, redis_url, clock, Fate())
            await check(house)
        except AssertionError as exc:
            raise AssertionError(f"died {where}: {exc}") from exc
    assert died >= len(places) - 3


@pytest.mark.parametrize("deposed_at", [0, 1], ids=["canary", "promotion"])
async def test_a_leader_that_is_deposed_before_its_commit_does_no_harm(
    house: House, redis_url: str, deposed_at: int
) -> None:
    """Another one takes the lead, decides by the same evidence, and commits first."""
    await begin(house, redis_url)
    await house.resident("a")
    house.engine.adapters["base-" + "a" * 20] = "anywhere"
    clock = Clock()
    commits = 0

    async def depose(step: str) -> None:
        nonlocal commits
        if step != "commit":
            return
        commits += 1
        if commits != deposed_at + 1:
            return
        await house.stores.leases.release("controller", first._holder)
        # A second later, so that it is another commit and not the same one again.
        clock.turn(1)
        await second.hold_lease()
        assert second.leading
        await second.tick()

    async with (
        mortal(house, redis_url, clock, Fate(before=depose)) as first,
        mortal(house, redis_url, clock, Fate()) as second,
    ):
        for _ in range(deposed_at + 1):
            await first.hold_lease()
            await first.tick()
            clock.turn(60)
        while not second.leading:
            await second.hold_lease()
        await second.tick()
        await second.tick()
    await check(house)


async def test_a_leader_that_is_deposed_overrules_no_person(house: House, redis_url: str) -> None:
    await begin(house, redis_url)
    await house.resident("a")

    async def roll_back(step: str) -> None:
        if step == "commit":
            event = RolledBack(at=LONG_AGO, by="ann", reason="I saw enough")
            await house.stores.rollouts.commit(await house.rollout(), event)

    async with mortal(house, redis_url, Clock(), Fate(before=roll_back)) as controller:
        await controller.hold_lease()
        await controller.tick()
    kinds = [entry.event.kind for entry in await house.stores.rollouts.history("triage")]
    assert kinds == ["rolled_back", "proposed"]


# A process that is killed by the system, at a handful of places.


@pytest.mark.parametrize("place", ["load", "probe", "canary"])
async def test_a_killed_process_is_followed_by_another(
    house: House, redis_url: str, place: str
) -> None:
    await begin(house, redis_url)
    config = house.path / "sluice.toml"
    config.write_text(
        f"""
        [store]
        url = "{redis_url}"
        [controller]
        port = 0
        tick_seconds = 0.02
        lease_seconds = 0.5
        [[engines]]
        name = "main"
        urls = ["{house.engine.url}"]
        base = "base"
        """
    )
    route = await house.stores.rollouts.route("triage")
    quick = replace(route, policy=replace(route.policy, soak_seconds=0.0))
    await house.stores.rollouts.put_route(quick, by="ann", at=LONG_AGO, base="base")
    held = asyncio.Event()
    where = {"load": LOAD, "probe": at("/v1/completions")}.get(place)
    if where is not None:
        house.engine.script(Reply(hold_headers=held), where=where)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rollout.controller", "--config", str(config),
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        if where is not None:
            await house.engine.wait_for_requests(1, where=where, limit=60)
        else:
            await until(lambda: _on_canary(house), "the canary")
        assert process.returncode is None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        _, said = await process.communicate()
        held.set()
    assert b"Traceback" not in said, said.decode()
    controller = Controller(
        house.stores,
        house.client,
        house.settings(),
        ControllerMetrics(CollectorRegistry()),
        waits=WAITS,
    )
    async with running(controller):
        await until(lambda: _promoted(house), "the promotion")
    await check(house)
    await observe(house, "the end")


async def _on_canary(house: House) -> bool:
    rollout = await house.rollout()
    return rollout.stable == 2 or (rollout.trial is not None and rollout.trial.weight > 0)


async def _promoted(house: House) -> bool:
    return (await house.rollout()).stable == 2
