"""The controller's loops: where it leads, it judges, commits, keeps adapters resident and sweeps.

Losing the lease in the middle of a step does no harm: a commit is a compare-and-set, and loading an
adapter twice is loading it once.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import NoReturn

import httpx2

from rollout.catalog import Catalog
from rollout.control import retraining
from rollout.control.erasure import sweep
from rollout.credentials import ApiKey, digest_secret
from rollout.discovery import Discovery
from rollout.engines import placement
from rollout.errors import ConflictError, StoreUnavailableError
from rollout.evidence import Evidence, Verdict
from rollout.gates import judge
from rollout.metrics import CaseCounts, ControllerMetrics, Seen
from rollout.planner import Known, next_event
from rollout.policy import servable_gates
from rollout.routes import Route
from rollout.runs import ENDED, RunEvent
from rollout.serving import Replica, Waits, required_versions
from rollout.settings import ControllerSection, Settings
from rollout.state import Event, Rollout, Trial
from rollout.stores import Stores
from rollout.versions import Version

log = logging.getLogger("rollout.controller")

_LEASE = "controller"
_LONGEST_BACKOFF_SECONDS = 10.0
_OBSERVE_SECONDS = 5.0
_FOLD_SECONDS = 60.0
_SWEEP_SECONDS = 3600.0
_RETRAIN_SECONDS = 10.0
# Trials judged in a tick, those first that have waited longest: where there are more, they take
# turns, so that a tick stays short.
_JUDGED_IN_A_TICK = 250
# Routes judged at the same time: enough to hide the store's latency, few enough to be kind to it.
_JUDGED_AT_ONCE = 16


class Controller:
    """The loops. `run` never returns; cancel it to stop, and it gives its lease back."""

    def __init__(
        self,
        stores: Stores,
        client: httpx2.AsyncClient,
        settings: Settings,
        metrics: ControllerMetrics,
        *,
        bootstrap: str | None = None,
        waits: Waits | None = None,
        discovery: Discovery | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stores = stores
        self._settings = settings
        self._section: ControllerSection = settings.controller
        self._engines = {engine.name: engine for engine in settings.engine_list()}
        self._metrics = metrics
        self._bootstrap = bootstrap
        self._now = now
        self._monotonic = monotonic
        self._holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._leads_until = float("-inf")
        self._sweeps_at = float("-inf")
        self._prepared = False
        self._catalog = Catalog(revision=-1)
        self._wanted: frozenset[str] = frozenset()
        self._kept: set[str] = set()
        self._put: dict[str, tuple[Verdict, ...]] = {}
        # The tick at which each route was looked at last.
        self._ticks = 0
        self._looked: dict[str, int] = {}
        self._judged: dict[str, tuple[Evidence, Route, tuple[Verdict, ...]]] = {}
        self._progress: dict[str, tuple[str, RunEvent]] = {}
        self._discovery = discovery or Discovery(settings.engine_list())
        self._client = client
        self._waits = waits
        # Each replica by itself: one that takes a minute to load holds up nobody else.
        self._keeping: dict[str, asyncio.Task[NoReturn]] = {}

    @property
    def leading(self) -> bool:
        """Whether the lease is held now, as far as one can know without asking."""
        return self._monotonic() < self._leads_until

    async def run(self) -> None:
        tick = self._section.tick_seconds
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(
                    self._forever("lease", self.hold_lease, self._section.lease_seconds / 3)
                )
                tasks.create_task(self._forever("judge", self.tick, tick))
                tasks.create_task(self._forever("observe", self.observe, _OBSERVE_SECONDS))
                tasks.create_task(self._forever("retention", self.sweep, _OBSERVE_SECONDS))
                tasks.create_task(self._forever("evidence", self.fold, _FOLD_SECONDS))
                tasks.create_task(self._forever("retraining", self.retrain, _RETRAIN_SECONDS))
                self._look_after(tasks)
                tasks.create_task(self._discovery.follow(lambda: self._look_after(tasks)))
        finally:
            await self._give_lease_back()

    async def hold_lease(self) -> None:
        """Take the lease, or keep it. One that could not be renewed in time runs out by itself."""
        asked = self._monotonic()
        seconds = self._section.lease_seconds
        led = self.leading
        held = await self._stores.leases.renew(_LEASE, self._holder, seconds)
        if not held:
            held = await self._stores.leases.acquire(_LEASE, self._holder, seconds) is not None
        self._leads_until = asked + seconds if held else float("-inf")
        self._metrics.show_leading(leading=held)
        self._metrics.show_store(up=True)
        if held != led:
            log.info("this controller %s", "leads now" if held else "does not lead any more")

    async def tick(self) -> None:
        """Read, and where this controller leads, judge the trials and commit what follows."""
        self._metrics.show_leading(leading=self.leading)
        if not self._prepared:
            await self.prepare()
            self._prepared = True
        await self._read_catalog()
        self._metrics.show_store(up=True)
        if not self.leading:
            self._put.clear()
            return
        await self._forget_removed_replicas()
        on_trial = self._whose_turn()
        seen = await self._look(on_trial)
        said: dict[tuple[str, str], Sequence[Verdict]] = {}

        async def step(rollout: Rollout) -> None:
            await self._step(rollout, seen.get(rollout.route), said)

        try:
            await _all(step, on_trial)
        finally:
            await self._stores.evidence.put_verdicts_many(said)
            self._put.update({trial: tuple(verdicts) for (_, trial), verdicts in said.items()})

    async def prepare(self) -> None:
        """Store the bootstrap key and create the routes of the configuration that are missing."""
        if self._bootstrap is not None:
            await self._store_bootstrap_key(self._bootstrap)
        existing = (await self._stores.catalog.load()).routes
        for route in self._settings.route_list():
            if route.name in existing:
                continue
            created = await self._stores.rollouts.put_route(
                route,
                by="sluice",
                at=self._now(),
                reason="created from the configuration",
                base=self._engines[route.engine].base,
                base_revision=self._engines[route.engine].base_revision,
            )
            if created:
                log.info("created route %s on engine %s", route.name, route.engine)

    def _whose_turn(self) -> list[Rollout]:
        """What is judged in this tick: who has waited longest comes first."""
        rollouts = self._catalog.rollouts.values()
        on_trial = {each.route: each for each in rollouts if each.trial or each.queued}
        trials = {each.trial.id for each in on_trial.values() if each.trial}
        self._put = {trial: put for trial, put in self._put.items() if trial in trials}
        self._judged = {trial: it for trial, it in self._judged.items() if trial in trials}
        looked = {route: self._looked.get(route, 0) for route in on_trial}
        turn = sorted(looked, key=lambda route: looked[route])[:_JUDGED_IN_A_TICK]
        self._ticks += 1
        self._looked = looked | dict.fromkeys(turn, self._ticks)
        return [on_trial[route] for route in turn]

    async def _look(self, on_trial: Sequence[Rollout]) -> Mapping[str, Evidence]:
        """What is known of all trials, by route: as few questions as can be, for they are many."""
        judged = [
            (rollout.route, rollout.trial.id)
            for rollout in on_trial
            if rollout.trial and self._candidate(rollout)
        ]
        return {each.route: each for each in await self._stores.evidence.read_many(judged)}

    async def _step(
        self,
        rollout: Rollout,
        found: Evidence | None,
        said: dict[tuple[str, str], Sequence[Verdict]],
    ) -> None:
        """Judge one trial and commit what the evidence calls for, if anything. Verdicts that are
        new are put into `said`."""
        route, trial = self._catalog.routes.get(rollout.route), rollout.trial
        if route is None:
            return
        known = None
        if trial is not None:
            version = self._candidate(rollout)
            if version is None or found is None:
                return
            verdicts = self._judge(route, trial, found)
            if self._put.get(trial.id) != verdicts:
                said[route.name, trial.id] = verdicts
            places = placement(version, self._catalog.residency.values())
            known = Known(found, verdicts, places)
        event = next_event(rollout, known, route.policy, self._now())
        if event is not None:
            await self._commit(rollout, event)

    def _judge(self, route: Route, trial: Trial, found: Evidence) -> tuple[Verdict, ...]:
        """What the gates say, which is what they said before where nothing has changed."""
        before = self._judged.get(trial.id)
        if before is not None and before[:2] == (found, route):
            return before[2]
        asked = servable_gates(route.slo, route.schema)
        verdicts = judge(found, route.policy, asked)
        self._judged[trial.id] = found, route, verdicts
        return verdicts

    async def observe(self) -> None:
        """Gather what `/metrics` shows."""
        catalog = await self._stores.catalog.load()
        trials = [(each.route, each.trial.id) for each in catalog.rollouts.values() if each.trial]
        verdicts = await self._stores.evidence.verdicts_many(trials)
        evidence = await self._stores.evidence.read_many(trials)
        runs = await self._stores.runs.list()
        under_way = [run.id for run in runs if run.state not in ENDED and run.state != "queued"]
        self._metrics.show(
            Seen(
                at=self._now(),
                catalog=catalog,
                verdicts={route: each for (route, _), each in zip(trials, verdicts, strict=True)},
                evidence={each.route: each for each in evidence},
                cases=await self._cases(),
                runs=runs,
                progress=await self._read_progress(under_way),
            )
        )

    async def sweep(self) -> None:
        """Once an hour erase what the routes' policies keep no longer; only the leader does."""
        known = self._catalog.revision >= 0
        if not (self.leading and known) or self._monotonic() < self._sweeps_at:
            return
        found = await sweep(self._stores, self._catalog.routes.values(), self._now())
        self._sweeps_at = self._monotonic() + _SWEEP_SECONDS
        for route, erased in found.items():
            log.info("%s: erased %d cases and what went with them", route, erased.cases)

    async def fold(self) -> None:
        """Fold what gateway workers counted that are gone; only the leader does."""
        if self.leading and (folded := await self._stores.evidence.fold()):
            log.info("folded the evidence of %d gateway workers that are gone", folded)

    async def retrain(self) -> None:
        """Start the runs that are due by the routes' own rules; only the leader does."""
        if not (self.leading and self._catalog.revision >= 0 and self._section.retraining):
            self._metrics.show_retraining({})
            return
        found = await retraining.outlooks(self._stores, self._catalog, self._now())
        self._metrics.show_retraining(found)
        for name, outlook in found.items():
            route, rollout = self._catalog.routes[name], self._catalog.rollouts[name]
            run = await retraining.start(self._stores, route, rollout, outlook, self._now())
            if run is not None:
                self._metrics.retrainings.labels(name, run.trigger).inc()
                log.info("%s: started %s because %s", name, run.id, run.why)

    async def keep(self, replica: Replica) -> None:
        """Bring one replica to hold what its engine's routes need; only the leader does."""
        if not self.leading or self._catalog.revision < 0:
            self._kept.discard(replica.url)
            return
        if replica.url not in self._kept:
            replica.remember(self._catalog.residency.get(replica.url))
            self._kept.add(replica.url)
        unfinished = True
        while unfinished and self.leading:
            required = required_versions(self._catalog, self._wanted)
            done = await replica.reconcile(required.get(replica.engine.name, ()))
            await self._stores.catalog.put_residency([done.residency])
            unfinished = done.unfinished

    def _look_after(self, tasks: asyncio.TaskGroup) -> None:
        """Keep every replica there is now, and none that is gone."""
        found = {url: engine for engine in self._discovery.engines for url in engine.urls}
        for url in self._keeping.keys() - found.keys():
            log.info("replica %s is gone", url)
            self._keeping.pop(url).cancel()
            self._kept.discard(url)
        for url in found.keys() - self._keeping.keys():
            engine = found[url]
            replica = Replica(self._client, engine, url, self._waits, self._monotonic)
            step = _keeping(self, replica)
            self._keeping[url] = tasks.create_task(
                self._forever("residency", step, self._section.tick_seconds)
            )

    async def _read_catalog(self) -> None:
        if await self._stores.catalog.revision() != self._catalog.revision:
            self._catalog = await self._stores.catalog.load()
        self._wanted = await self._stores.catalog.wanted()

    async def _forget_removed_replicas(self) -> None:
        """A replica that left the configuration, or DNS, must not be waited for."""
        known = {url for engine in self._discovery.engines for url in engine.urls}
        gone = [
            residency.url
            for residency in self._catalog.residency.values()
            if residency.url not in known and residency.engine not in self._discovery.unresolved
        ]
        await self._stores.catalog.forget_residency(gone)

    async def _store_bootstrap_key(self, secret: str) -> None:
        digest = digest_secret(secret)
        for key in await self._stores.credentials.list():
            if key.id == "bootstrap" and key.digest == digest:
                return
        key = ApiKey(
            id="bootstrap",
            name="bootstrap",
            digest=digest,
            scopes=frozenset({"admin"}),
            created_at=self._now(),
        )
        await self._stores.credentials.add(key, by="sluice")

    def _candidate(self, rollout: Rollout) -> Version | None:
        if rollout.trial is None:
            return None
        return self._catalog.versions.get(f"{rollout.route}@{rollout.trial.candidate}")

    async def _commit(self, rollout: Rollout, event: Event) -> None:
        try:
            await self._stores.rollouts.commit(rollout, event)
        except ConflictError as exc:
            # A person was faster. The next tick reads what they did and decides again.
            log.info("%s: the %s is obsolete: %s", rollout.route, event.kind, exc.message)
            return
        self._metrics.decisions.labels(rollout.route, event.kind).inc()
        log.info("%s: %s: %s", rollout.route, event.kind, event.reason)

    async def _cases(self) -> Mapping[str, CaseCounts]:
        return {
            row.route: CaseCounts(
                {
                    "open": row.open,
                    "leased": row.leased,
                    "labelled": row.labelled,
                    "disputed": row.disputed,
                },
                row.dropped,
                row.oldest_at,
                row.agreement.alpha,
            )
            for row in await self._stores.cases.stats()
        }

    async def _read_progress(self, runs: Sequence[str]) -> Mapping[str, RunEvent]:
        """The last line of each run, with all values that earlier lines of its stage gave."""
        self._progress = {run: seen for run, seen in self._progress.items() if run in runs}
        for run in runs:
            after = self._progress[run][0] if run in self._progress else "0"
            for entry, event in await self._stores.runs.events(run, after):
                before = self._progress.get(run)
                known = before[1].values if before and before[1].stage == event.stage else {}
                self._progress[run] = entry, replace(event, values={**known, **event.values})
        return {run: event for run, (_, event) in self._progress.items()}

    async def _forever(
        self, loop: str, step: Callable[[], Awaitable[None]], seconds: float
    ) -> NoReturn:
        """Take the step again and again; one that fails is logged, counted and tried later."""
        failures = 0
        while True:
            try:
                await step()
            except StoreUnavailableError as exc:
                if failures == 0:
                    log.warning("%s loop: %s; trying again", loop, exc.message)
                failures += 1
                self._metrics.show_store(up=False)
            except Exception:
                log.exception("a step of the %s loop failed", loop)
                failures += 1
                self._metrics.loop_errors.labels(loop).inc()
            else:
                # Not every step asks the store, so only those that always do say that it answers.
                failures = 0
            backoff = seconds * 2.0 ** min(failures, 10)
            await asyncio.sleep(min(backoff, max(seconds, _LONGEST_BACKOFF_SECONDS)))

    async def _give_lease_back(self) -> None:
        self._leads_until = float("-inf")
        with contextlib.suppress(StoreUnavailableError, TimeoutError):
            async with asyncio.timeout(2.0):
                await self._stores.leases.release(_LEASE, self._holder)


def _keeping(controller: Controller, replica: Replica) -> Callable[[], Awaitable[None]]:
    async def keep() -> None:
        await controller.keep(replica)

    return keep


async def _all(step: Callable[[Rollout], Awaitable[None]], rollouts: Sequence[Rollout]) -> None:
    """Take the step for each of them, a few at a time; one that fails keeps no other from its turn.

    Raises what failed once all have had theirs.
    """
    turns = asyncio.Semaphore(_JUDGED_AT_ONCE)

    async def turn(rollout: Rollout) -> None:
        async with turns:
            await step(rollout)

    outcomes = await asyncio.gather(*map(turn, rollouts), return_exceptions=True)
    failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    if failed and all(isinstance(exc, StoreUnavailableError) for exc in failed):
        raise failed[0]
    if failed:
        raise ExceptionGroup("several rollouts could not be judged", failed)
