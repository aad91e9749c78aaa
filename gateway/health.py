"""Which replicas can be asked: failures seen on requests, and a check each second."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter
from typing import Final, Literal

from gateway.errors import UpstreamError
from gateway.queues import read_queue
from gateway.settings import HealthSection
from gateway.upstream import UpstreamPool
from rollout.engines import Engine

# A check that got no answer in time may mean that the engine is busy; that many in a row do not.
_SILENT_CHECKS: Final = 3

# unknown: the client went away before the engine could show anything.
Outcome = Literal["answered", "failed", "unknown"]


class Breaker:
    """Shut after failures in a row, then lets one request through to see. Time comes as `now`."""

    __slots__ = ("_failures", "_open_seconds", "_opened_until", "_probing", "settings")

    def __init__(self, settings: HealthSection) -> None:
        self.settings = settings
        self._failures = 0
        self._open_seconds = settings.open_seconds
        self._opened_until: float | None = None
        self._probing = False

    @property
    def closed(self) -> bool:
        return self._opened_until is None

    def admits(self, now: float) -> bool:
        if self._opened_until is None:
            return True
        return now >= self._opened_until and not self._probing

    def begin(self) -> None:
        """A request was sent; where the breaker is open, it is the probe."""
        if self._opened_until is not None:
            self._probing = True

    def settle(self, outcome: Outcome, now: float) -> None:
        self._probing = False
        match outcome:
            case "answered":
                self._failures = 0
                self._opened_until = None
                self._open_seconds = self.settings.open_seconds
            case "failed":
                self._failures += 1
                self._open_after_failure(now)
            case "unknown":
                pass

    def _open_after_failure(self, now: float) -> None:
        if self._opened_until is not None:
            # Requests that were under way when it opened must not push it out further each.
            if now < self._opened_until:
                return
            self._open_seconds = min(self._open_seconds * 2, self.settings.maximum_open_seconds)
        elif self._failures < self.settings.failures:
            return
        self._opened_until = now + self._open_seconds


class Replica:
    """One address of an engine, with what is under way on it.

    `full` while its own queue is longer than it may be. `back_since` is when it last came back, or
    None where it was there from the start.
    """

    __slots__ = (
        "authorization", "back_since", "breaker", "engine", "full", "healthy", "inflight", "silent",
        "url",
    )  # fmt: skip

    def __init__(self, url: str, engine: Engine, settings: HealthSection) -> None:
        self.url = url
        self.serve_as(engine)
        self.breaker = Breaker(settings)
        self.inflight = 0
        self.healthy = True
        self.full = False
        self.silent = 0
        self.back_since: float | None = None

    def serve_as(self, engine: Engine) -> None:
        self.engine = engine
        self.authorization = (
            (b"authorization", b"Bearer " + engine.api_key.encode()) if engine.api_key else None
        )

    def available(self, now: float) -> bool:
        return self.healthy and self.breaker.admits(now)

    def begin(self) -> None:
        self.inflight += 1
        self.breaker.begin()

    def end(self, outcome: Outcome, now: float) -> None:
        self.inflight -= 1
        was_closed = self.breaker.closed
        self.breaker.settle(outcome, now)
        if self.breaker.closed and not was_closed:
            self.back_since = now

    def checked(self, now: float, *, healthy: bool) -> None:
        if healthy and not self.healthy:
            self.back_since = now
        self.healthy = healthy


class Fleet:
    """Every replica of every engine that there is now, by url."""

    def __init__(self, settings: HealthSection, maximum_waiting: int) -> None:
        self.settings = settings
        self.maximum_waiting = maximum_waiting
        self.replicas: Mapping[str, Replica] = {}
        self._changed = asyncio.Event()

    def configure(self, settings: HealthSection, maximum_waiting: int) -> None:
        """Judge replicas by other limits from now on."""
        self.settings = settings
        self.maximum_waiting = maximum_waiting
        for replica in self.replicas.values():
            replica.breaker.settings = settings

    def adopt(self, engines: Iterable[Engine]) -> None:
        """These are the engines now. What is under way on a replica that goes is not touched."""
        before, after = self.replicas, dict[str, Replica]()
        for engine in engines:
            kept = [before[url] for url in engine.urls if url in before]
            spared = any(replica.healthy and replica.breaker.closed for replica in kept)
            for url in engine.urls:
                replica = before.get(url) or self._joined(url, engine, spared=spared)
                replica.serve_as(engine)
                after[url] = replica
        self.replicas = after
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _joined(self, url: str, engine: Engine, *, spared: bool) -> Replica:
        """A new replica; where others can be asked, it waits until a check has found it well."""
        replica = Replica(url, engine, self.settings)
        replica.healthy = not spared
        return replica

    async def change(self) -> None:
        """Return when there are other replicas."""
        await self._changed.wait()

    def available(self, urls: Sequence[str], tried: Sequence[Replica], now: float) -> list[Replica]:
        """Those of `urls` that can be asked now and were not tried before; of the full ones only
        where no other is left."""
        found = [
            replica
            for url in urls
            if (replica := self.replicas.get(url)) is not None
            and replica.available(now)
            and replica not in tried
        ]
        return [replica for replica in found if not replica.full] or found

    def has_room(self, urls: Sequence[str], now: float) -> bool:
        """Whether one of `urls` that can be asked now is not full."""
        for url in urls:
            replica = self.replicas.get(url)
            if replica is not None and not replica.full and replica.available(now):
                return True
        return False


async def watch(fleet: Fleet, pool: UpstreamPool) -> None:
    """Check every replica that there is each `check_seconds`, for ever."""
    watched: dict[Replica, asyncio.Task[None]] = {}
    async with asyncio.TaskGroup() as tasks:
        while True:
            now = set(fleet.replicas.values())
            for replica in watched.keys() - now:
                watched.pop(replica).cancel()
                if replica.url not in fleet.replicas:
                    pool.forget(replica.url)
            for replica in now - watched.keys():
                watched[replica] = tasks.create_task(_watch_one(replica, fleet, pool))
            await fleet.change()


async def _watch_one(replica: Replica, fleet: Fleet, pool: UpstreamPool) -> None:
    while True:
        settings = fleet.settings
        await check(replica, pool, settings)
        if replica.engine.kind == "vllm":
            waiting = await read_queue(pool, replica.url, settings.check_timeout_seconds)
            replica.full = waiting > fleet.maximum_waiting
        await asyncio.sleep(settings.check_seconds)


async def check(replica: Replica, pool: UpstreamPool, settings: HealthSection) -> None:
    """Ask once. Health says that a replica may be tried again, not that it answers well: vLLM in
    shutdown is healthy and fails every request, so only a request closes the breaker."""
    try:
        async with (
            asyncio.timeout(settings.check_timeout_seconds),
            pool.request(replica.url, b"GET", b"/health") as response,
        ):
            while await response.read():
                pass
            replica.checked(perf_counter(), healthy=response.status < 500)
            replica.silent = 0
    except TimeoutError:
        replica.silent += 1
        if replica.silent >= _SILENT_CHECKS:
            replica.checked(perf_counter(), healthy=False)
    except UpstreamError:
        replica.checked(perf_counter(), healthy=False)
