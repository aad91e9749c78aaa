"""Replays: past captures put through a version, behind everything that is live."""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, Final

from gateway.shadow.asking import Asker, Slot
from gateway.shadow.comparing import Referee
from gateway.shadow.fleet import Fleet
from gateway.shadow.metrics import ShadowMetrics
from gateway.shadow.pairing import Reason, case_for, messages_of, unpairable
from gateway.shadow.settings import ShadowSettings
from rollout.agreement import compare_twice
from rollout.cases import Case
from rollout.errors import StoreUnavailableError
from rollout.exchanges import Answer, Comparison, Exchange
from rollout.redaction import Redactor
from rollout.replays import Difference, Replay
from rollout.routes import Route
from rollout.stores import Stores
from rollout.stores.captures import Taken
from rollout.versions import Version

log = logging.getLogger(__name__)

_LEASE_SECONDS: Final = 15.0
_LOOK_SECONDS: Final = 1.0
# How often it is looked whether live exchanges have left a slot.
_YIELD_SECONDS: Final = 0.1
# The controller keeps the version for so long after the last sign of the replay.
_WANTED_SECONDS: Final = 120.0
_LONGEST_TEXT: Final = 500


class ReplayError(Exception):
    """A replay can't go on; the message is for whoever asked for it."""


class Replayer:
    """Works on one replay at a time, which no other shadow does meanwhile.

    What it has settled is noted in the step that counts it, so who goes on after it begins where it
    stopped. `live_is_busy` says whether captures of now take all that the shadow can do.
    """

    def __init__(
        self,
        stores: Stores,
        fleet: Fleet,
        metrics: ShadowMetrics,
        settings: ShadowSettings,
        redactor: Redactor,
        consumer: str,
        live_is_busy: Callable[[], bool],
    ) -> None:
        self._stores = stores
        self._fleet = fleet
        self._metrics = metrics
        self._settings = settings
        self._redactor = redactor
        self._consumer = consumer
        self._live_is_busy = live_is_busy
        self._referee = Referee(fleet, metrics)
        self._asker = Asker(
            fleet,
            metrics,
            concurrency=settings.replay_concurrency,
            maximum_parked=settings.replay_concurrency,
            # Behind the shadow's own, which come behind the clients'.
            priority=None if settings.priority is None else settings.priority + 1,
        )

    async def run(self) -> None:
        """Take what was asked for, one after the other, for ever."""
        while True:
            try:
                replay = await self._stores.replays.take(self._consumer, _LEASE_SECONDS)
                if replay is not None:
                    await self._work(replay)
            except StoreUnavailableError as exc:
                log.warning("%s; replays are looked for later", exc)
            except Exception:
                log.exception("a replay is left for later")
            await asyncio.sleep(self._settings.poll_seconds)

    async def _work(self, replay: Replay) -> None:
        """Do it while the lease holds and nobody cancels it."""
        log.info("replay %s of %s@%s begins", replay.id, replay.route, replay.version)
        started = replay.started_at or _now()
        await self._change(replay, state="running", started_at=started)
        working = asyncio.create_task(self._put_through(replay))
        try:
            while not (await asyncio.wait({working}, timeout=_LOOK_SECONDS))[0]:
                if not await self._stores.replays.renew(replay.id, self._consumer, _LEASE_SECONDS):
                    log.info("replay %s was cancelled or taken over", replay.id)
                    return
                await self._want(replay)
            await self._end(replay, working)
        finally:
            working.cancel()
            await asyncio.wait({working})
            await self._stores.replays.release(replay.id, self._consumer)

    async def _end(self, replay: Replay, working: "asyncio.Task[int]") -> None:
        try:
            found = working.result()
        except StoreUnavailableError:
            raise
        except (ReplayError, Exception) as exc:
            reason = str(exc) if isinstance(exc, ReplayError) else "an error of ours: see the log"
            if not isinstance(exc, ReplayError):
                log.exception("replay %s failed", replay.id)
            await self._change(replay, state="failed", reason=reason, ended_at=_now())
        else:
            await self._change(replay, state="done", found=found, ended_at=_now())
            log.info("replay %s is done: %s exchanges", replay.id, found)

    async def _put_through(self, replay: Replay) -> int:
        """Every exchange that is not settled yet; how many took part, settled before or now."""
        await self._fleet.refresh()
        version, route = self._known(replay)
        await self._want(replay)
        found = 0
        pages = self._stores.captures.between(replay.route, replay.since, replay.asked_at)
        try:
            async with asyncio.TaskGroup() as group:
                async for page in pages:
                    chosen = page[: replay.limit - found]
                    found += len(chosen)
                    for taken in await self._stores.replays.unsettled(replay.id, chosen):
                        await self._room(version)
                        slot = await self._asker.slot()
                        group.create_task(self._one(replay, taken, version, route, slot))
                    if found >= replay.limit:
                        break
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        return found

    async def _one(
        self, replay: Replay, taken: Taken, version: Version, route: Route, slot: Slot
    ) -> None:
        exchange = taken.exchange
        try:
            found = await self._compared(replay, exchange, version, route, slot)
            if not isinstance(found, Comparison):
                await self._stores.replays.settle(replay, taken, found)
                return
            case = case_for(found, exchange, route.policy)
            difference = None if found.agrees else _difference(found, exchange, case)
            await self._stores.replays.settle(
                replay, taken, (found, difference), case, route.policy.maximum_cases
            )
            self._metrics.replayed.inc()
        except StoreUnavailableError:
            raise
        except Exception:
            log.exception("request %s is left out of the replay", exchange.request_id)
            await self._stores.replays.settle(replay, taken, "error")
        finally:
            slot.release()

    async def _compared(
        self, replay: Replay, exchange: Exchange, version: Version, route: Route, slot: Slot
    ) -> Comparison | Reason:
        if reason := unpairable(exchange):
            return reason
        answered = self._fleet.catalog.versions.get(f"{route.name}@{exchange.answer.version}")
        if answered is None:
            return "stale"
        until = asyncio.get_running_loop().time() + self._settings.deadline_seconds
        answer = await self._asker.ask(exchange, version, answered, slot, until)
        if not isinstance(answer, Answer):
            return answer
        redacted = await asyncio.to_thread(self._redactor.answer, answer)
        comparison = compare_twice(
            exchange, redacted, trial=replay.id, route=route, clock=perf_counter
        )
        return await self._referee.complete(comparison, exchange, route, until)

    async def _room(self, version: Version) -> None:
        """Wait until live traffic and live captures leave room, at most `replay_wait_seconds`."""
        try:
            async with asyncio.timeout(self._settings.replay_wait_seconds):
                while True:
                    if self._live_is_busy():
                        await asyncio.sleep(_YIELD_SECONDS)
                    elif self._fleet.replica(version) is None:
                        await self._fleet.change()
                    else:
                        return
        except TimeoutError:
            why = (
                "no replica has the version: see the controller's log"
                if self._fleet.hindrance(version) == "not_resident"
                else "live traffic left no room"
            )
            raise ReplayError(
                f"for {self._settings.replay_wait_seconds:g} s {why}; ask for it again later"
            ) from None

    def _known(self, replay: Replay) -> tuple[Version, Route]:
        catalog = self._fleet.catalog
        version = catalog.versions.get(f"{replay.route}@{replay.version}")
        route = catalog.routes.get(replay.route)
        if version is None or route is None:
            raise ReplayError(f"{replay.route}@{replay.version} is gone")
        return version, route

    async def _want(self, replay: Replay) -> None:
        name = f"{replay.route}@{replay.version}"
        await self._stores.catalog.want(name, _WANTED_SECONDS)

    async def _change(self, replay: Replay, **changes: Any) -> None:
        await self._stores.replays.change(replay.id, **changes)


def _difference(found: Comparison, exchange: Exchange, case: Case | None) -> Difference:
    said = messages_of(exchange.request)
    asked = said[-1].get("content") if said else ""
    return Difference(
        request_id=exchange.request_id,
        agreement=found.agreement,
        kind=found.kind,
        asked=str(asked)[:_LONGEST_TEXT],
        then_version=found.stable.version,
        then=_shown(found.stable),
        now=_shown(found.candidate),
        case=None if case is None else case.id,
    )


def _shown(answer: Answer) -> str:
    if not answer.ok:
        return f"(failed: {answer.error or answer.status})"[:_LONGEST_TEXT]
    parts = [answer.text] if answer.text else []
    parts += [str(call.get("function", call)) for call in answer.tool_calls]
    return " ".join(parts)[:_LONGEST_TEXT]


def _now() -> datetime:
    return datetime.now(UTC)
