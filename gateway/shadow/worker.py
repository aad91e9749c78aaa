"""The life of a captured exchange: taken, asked of the other version, compared, settled."""

import asyncio
import logging
from dataclasses import dataclass
from time import perf_counter
from typing import Final, cast

from gateway.shadow.fleet import Fleet
from gateway.shadow.metrics import ShadowMetrics
from gateway.shadow.pairing import Reason, case_for, is_engines, other_version, shadow_request
from gateway.shadow.settings import ShadowSettings
from rollout.agreement import compare_exchange
from rollout.errors import InvalidInputError, StoreUnavailableError
from rollout.exchanges import Answer, Exchange
from rollout.redaction import Redactor
from rollout.routes import Route
from rollout.state import Trial
from rollout.stores.captures import CaptureStore, Taken
from rollout.versions import Version

log = logging.getLogger(__name__)

_TAKE_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 0.5
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
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._parked: set[asyncio.Task[None]] = set()
        self._look_for_left_at = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then finish what is being asked, within `stop_seconds`."""
        async with asyncio.TaskGroup() as group:
            following = group.create_task(self._fleet.follow())
            taking = group.create_task(self._take_for_ever(group))
            await stop.wait()
            taking.cancel()
            for task in self._parked:
                task.cancel()
            if self._tasks:
                _, late = await asyncio.wait(self._tasks, timeout=self._settings.stop_seconds)
                for task in late:
                    task.cancel()
            following.cancel()

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

    async def _take(self) -> list[tuple[Taken, "_Slot"]]:
        """New exchanges, or those of a dead shadow, each with a slot; at most as many as are free."""
        if self._fleet.full:
            self._metrics.pauses.inc()
        while self._fleet.full:
            await self._fleet.change()
        slots = [await self._slot()]
        while not self._slots.locked():
            slots.append(await self._slot())
        taken: list[Taken] = []
        try:
            taken = await self._left_by_others(len(slots)) or await self._captures.take(
                self._consumer, len(slots), _TAKE_SECONDS
            )
        finally:
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

    async def _slot(self) -> "_Slot":
        slot = _Slot(self._slots)
        await slot.take()
        return slot

    # Handling

    async def _handle(self, taken: Taken, slot: "_Slot") -> None:
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

    async def _settle(self, taken: Taken, slot: "_Slot") -> None:
        exchange = taken.exchange
        pairing = self._pairing(exchange)
        if pairing == "stale":
            # Or the trial is newer than what we know.
            await self._fleet.refresh()
            pairing = self._pairing(exchange)
        if isinstance(pairing, str):
            return await self._drop(taken, pairing)
        answer = await self._ask(exchange, pairing, slot)
        if isinstance(answer, str):
            return await self._drop(taken, answer)
        # As the captured one was: two answers that differ in an address alone are no disagreement.
        redacted = await asyncio.to_thread(self._redactor.answer, answer)
        comparison = compare_exchange(
            exchange,
            redacted,
            trial=pairing.trial.id,
            candidate=pairing.trial.candidate,
            route=pairing.route,
            clock=perf_counter,
        )
        policy = pairing.route.policy
        case = case_for(comparison, exchange, policy)
        settled = await self._captures.settle(taken, comparison, case, policy.maximum_cases)
        if settled.state == "counted":
            self._metrics.compared.labels(comparison.kind).inc()
            self._metrics.offered.inc(settled.offered)
        return None

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

    async def _ask(self, exchange: Exchange, pairing: "_Pairing", slot: "_Slot") -> Answer | Reason:
        """Ask the other version, again where an engine fails, until the deadline."""
        try:
            body = shadow_request(exchange, pairing.version, self._settings.priority)
        except InvalidInputError:
            return "unaskable"
        reason: Reason = "deadline"
        try:
            async with asyncio.timeout(self._settings.deadline_seconds):
                while True:
                    url = self._fleet.replica(pairing.version)
                    if url is None:
                        reason = self._fleet.hindrance(pairing.version)
                        if len(self._parked) >= self._settings.maximum_parked:
                            return reason
                        await self._park(slot)
                        continue
                    reason = "deadline"
                    answer = await self._fleet.ask(pairing.version, url, exchange.path, body)
                    if answer.ok or await self._is_its_own_failure(answer, exchange, pairing, url):
                        self._metrics.seconds.observe(answer.total_seconds or 0.0)
                        return answer
                    reason = "engine_error"
                    self._metrics.failures.inc()
                    # The slot stays held: the stream is a better place to wait out a sick engine.
                    await asyncio.sleep(_RETRY_SECONDS)
        except TimeoutError:
            return reason

    async def _is_its_own_failure(
        self, answer: Answer, exchange: Exchange, pairing: "_Pairing", url: str
    ) -> bool:
        """Whether the version that answered the client does so here and now, as it did then.

        An engine that is on its way down fails every request in much the same way as a version
        that can't be served.
        """
        if is_engines(answer):
            return False
        body = shadow_request(exchange, pairing.answered, self._settings.priority)
        control = await self._fleet.ask(pairing.answered, url, exchange.path, body)
        return control.ok

    async def _park(self, slot: "_Slot") -> None:
        """Wait for a replica without holding up those who have one."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        slot.release()
        self._parked.add(task)
        self._metrics.parked.set(len(self._parked))
        try:
            await self._fleet.change()
            await slot.take()
        finally:
            self._parked.discard(task)
            self._metrics.parked.set(len(self._parked))


@dataclass(frozen=True, slots=True)
class _Pairing:
    """What an exchange is paired by: its trial, the version to ask, and the one that answered."""

    route: Route
    trial: Trial
    version: Version
    answered: Version


class _Slot:
    """A share of the concurrency. Giving back what is not held does nothing."""

    __slots__ = ("_held", "_slots")

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots = slots
        self._held = False

    async def take(self) -> None:
        await self._slots.acquire()
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._slots.release()
