"""The life of a captured exchange: taken, asked of the other version, compared, settled."""

import asyncio
import logging
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Final

from gateway.shadow.asking import Asker, Slot
from gateway.shadow.comparing import Referee
from gateway.shadow.fleet import Fleet
from gateway.shadow.metrics import ShadowMetrics
from gateway.shadow.pairing import Reason, case_for, other_version
from gateway.shadow.settings import ShadowSettings
from rollout.agreement import compare_exchange, compare_twice
from rollout.assignment import bucket
from rollout.errors import StoreUnavailableError
from rollout.exchanges import Answer, Comparison, Exchange
from rollout.redaction import Redactor
from rollout.routes import Route
from rollout.state import Trial
from rollout.stores.captures import CaptureStore, Taken
from rollout.versions import Version

log = logging.getLogger(__name__)

_TAKE_SECONDS: Final = 1.0
_TRIM_SECONDS: Final = 60.0
# Between two looks for what dead shadows have left, as a share of the time until it counts as left.
_TAKE_OVER_SHARE: Final = 0.1


class ShadowWorker:
    """Takes no more exchanges than it can ask for at once, and settles each of them.

    What it holds when it is stopped or killed stays unsettled, and another takes it over. A pair is
    counted by the step that settles it, so none is lost and none is counted twice.
    """

    def __init__(
        self,
        captures: CaptureStore,
        fleet: Fleet,
        metrics: ShadowMetrics,
        settings: ShadowSettings,
        redactor: Redactor,
        consumer: str,
    ) -> None:
        self._captures = captures
        self._fleet = fleet
        self._metrics = metrics
        self._settings = settings
        self._redactor = redactor
        self._consumer = consumer
        self._asker = Asker(
            fleet,
            metrics,
            concurrency=settings.concurrency,
            maximum_parked=settings.maximum_parked,
            priority=settings.priority,
        )
        self._referee = Referee(fleet, metrics)
        self._tasks: set[asyncio.Task[None]] = set()
        self._look_for_left_at = 0.0
        self._waits = False

    @property
    def busy(self) -> bool:
        """Whether it asks for as many exchanges as it may at once. While it waits for another one,
        the slots that it keeps ready for that are free."""
        return self._asker.busy and not self._waits

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then finish what is being asked, within `stop_seconds`."""
        async with asyncio.TaskGroup() as group:
            following = group.create_task(self._fleet.follow())
            taking = group.create_task(self._take_for_ever(group))
            trimming = group.create_task(self._trim_for_ever())
            await stop.wait()
            taking.cancel()
            for task in self._asker.parked:
                task.cancel()
            if self._tasks:
                _, late = await asyncio.wait(self._tasks, timeout=self._settings.stop_seconds)
                for task in late:
                    task.cancel()
            following.cancel()
            trimming.cancel()

    async def _trim_for_ever(self) -> None:
        """Gateways trim what they append to; where nothing comes, this does."""
        while True:
            try:
                await self._captures.trim()
            except StoreUnavailableError as exc:
                log.warning("%s; old captures are let go of later", exc)
            except Exception:
                log.exception("old captures could not be let go of")
            await asyncio.sleep(_TRIM_SECONDS)

    # Taking

    async def _take_for_ever(self, group: asyncio.TaskGroup) -> None:
        while True:
            try:
                for taken, slot in await self._take():
                    task = group.create_task(self._handle(taken, slot))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            except StoreUnavailableError as exc:
                log.warning("%s; trying again", exc)
                await asyncio.sleep(_TAKE_SECONDS)
            except Exception:
                log.exception("no exchange could be taken; trying again")
                await asyncio.sleep(_TAKE_SECONDS)

    async def _take(self) -> list[tuple[Taken, Slot]]:
        """New exchanges, or those of a dead shadow, each with a slot; at most as many as are free."""
        if self._fleet.full:
            self._metrics.pauses.inc()
        while self._fleet.full:
            await self._fleet.change()
        slots = [await self._asker.slot()]
        while not self._asker.busy:
            slots.append(await self._asker.slot())
        taken: list[Taken] = []
        self._waits = True
        try:
            taken = await self._left_by_others(len(slots)) or await self._captures.take(
                self._consumer, len(slots), _TAKE_SECONDS
            )
        finally:
            self._waits = False
            for slot in slots[len(taken) :]:
                slot.release()
        return list(zip(taken, slots, strict=False))

    async def _left_by_others(self, count: int) -> list[Taken]:
        now = asyncio.get_running_loop().time()
        if now < self._look_for_left_at:
            return []
        idle = self._settings.take_over_seconds
        self._look_for_left_at = now + idle * _TAKE_OVER_SHARE
        taken = await self._captures.take_over(self._consumer, idle, count)
        if taken:
            # There may be more where these came from.
            self._look_for_left_at = now
        self._metrics.taken_over.inc(len(taken))
        return taken

    # Handling

    async def _handle(self, taken: Taken, slot: Slot) -> None:
        try:
            try:
                await self._settle(taken, slot)
            except StoreUnavailableError:
                raise
            except Exception:
                # Or the same exchange would stop one shadow after the other.
                log.exception("request %s is left out", taken.exchange.request_id)
                await self._drop(taken, "error")
        except StoreUnavailableError as exc:
            log.warning("%s; the exchange is settled later", exc)
        finally:
            slot.release()

    async def _settle(self, taken: Taken, slot: Slot) -> None:
        exchange = taken.exchange
        pairing = self._pairing(exchange)
        if pairing == "stale":
            # Or the trial is newer than what we know.
            await self._fleet.refresh()
            pairing = self._pairing(exchange)
        if isinstance(pairing, str):
            return await self._drop(taken, pairing)
        until = asyncio.get_running_loop().time() + self._settings.deadline_seconds
        answer = await self._asker.ask(exchange, pairing.version, pairing.answered, slot, until)
        if isinstance(answer, str):
            return await self._drop(taken, answer)
        comparison = await self._compare(exchange, answer, pairing, until)
        floor = await self._floor(exchange, pairing, until)
        policy = pairing.route.policy
        case = case_for(comparison, exchange, policy, floor)
        settled = await self._captures.settle(taken, comparison, case, policy.maximum_cases, floor)
        if settled.state == "counted":
            self._metrics.compared.labels(comparison.kind).inc()
            self._metrics.offered.inc(settled.offered)
            if floor is not None:
                said = "agree" if floor.agrees else "disagree"
                self._metrics.asked_again.labels(said).inc()
        return None

    async def _compare(
        self, exchange: Exchange, answer: Answer, pairing: "_Pairing", until: float
    ) -> Comparison:
        # As the captured one was: two answers that differ in an address alone are no disagreement.
        redacted = await asyncio.to_thread(self._redactor.answer, answer)
        trial, route = pairing.trial, pairing.route
        comparison = compare_exchange(
            exchange,
            redacted,
            trial=trial.id,
            candidate=trial.candidate,
            route=route,
            clock=perf_counter,
        )
        return await self._referee.complete(comparison, exchange, route, until)

    async def _floor(
        self, exchange: Exchange, pairing: "_Pairing", until: float
    ) -> Comparison | None:
        """Of a sample, stable's answer to the client beside its answer now.

        It is a second opinion on noise, so it is left out where it does not come by itself.
        """
        trial, answered = pairing.trial, pairing.answered
        place = bucket(f"self:{trial.id}", exchange.request_id)
        if answered.number == trial.candidate or place >= pairing.route.policy.self_sample:
            return None
        try:
            async with asyncio.timeout_at(until):
                again = await self._asker.ask_once(exchange, answered)
        except TimeoutError:
            return None
        if again is None:
            return None
        redacted = await asyncio.to_thread(self._redactor.answer, again)
        comparison = compare_twice(exchange, redacted, trial=trial.id, route=pairing.route)
        if pairing.route.semantic is None:
            return comparison
        # What makes two versions agree has to make one agree with itself.
        unjudged = replace(pairing.route, judge=None)
        return await self._referee.complete(comparison, exchange, unjudged, until)

    async def _drop(self, taken: Taken, reason: Reason) -> None:
        settled = await self._captures.settle(taken, None, None, 0)
        if settled.state == "dropped":
            self._metrics.dropped.labels(reason).inc()

    def _pairing(self, exchange: Exchange) -> "_Pairing | Reason":
        catalog = self._fleet.catalog
        rollout = catalog.rollouts.get(exchange.route)
        other = other_version(exchange, rollout)
        if not isinstance(other, int):
            return other
        route = catalog.routes.get(exchange.route)
        version = catalog.versions.get(f"{exchange.route}@{other}")
        answered = catalog.versions.get(f"{exchange.route}@{exchange.answer.version}")
        trial = rollout.trial if rollout else None
        if route is None or version is None or answered is None or trial is None:
            return "stale"
        return _Pairing(route, trial, version, answered)


@dataclass(frozen=True, slots=True)
class _Pairing:
    """What an exchange is paired by: its trial, the version to ask, and the one that answered."""

    route: Route
    trial: Trial
    version: Version
    answered: Version
