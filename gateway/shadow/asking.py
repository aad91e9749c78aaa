"""Asking a version what a client asked: when there is room, again where an engine fails, in time."""

import asyncio
from typing import Final, cast

from gateway.shadow.fleet import Fleet
from gateway.shadow.metrics import ShadowMetrics
from gateway.shadow.pairing import Reason, is_engines, shadow_request
from rollout.errors import InvalidInputError
from rollout.exchanges import Answer, Exchange
from rollout.versions import Version

_RETRY_SECONDS: Final = 0.5


class Asker:
    """At most `concurrency` requests are with the engines at a time.

    Who waits for a replica holds no slot, so that it holds nobody up; at most `maximum_parked` do.
    """

    def __init__(
        self,
        fleet: Fleet,
        metrics: ShadowMetrics,
        *,
        concurrency: int,
        maximum_parked: int,
        priority: int | None,
    ) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._maximum_parked = maximum_parked
        self._priority = priority
        self._slots = asyncio.Semaphore(concurrency)
        self.parked: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """Whether every slot is taken."""
        return self._slots.locked()

    async def slot(self) -> "Slot":
        slot = Slot(self._slots)
        await slot.take()
        return slot

    async def ask(
        self, exchange: Exchange, version: Version, answered: Version, slot: "Slot", until: float
    ) -> Answer | Reason:
        """The version's answer, or why there is none by `until`, a time of the running loop.

        `answered` is the version that answered the client: where the other fails and it does not,
        in the same place, that is an answer too, and the other's own failure.
        """
        try:
            body = self._body(exchange, version)
        except InvalidInputError:
            return "unaskable"
        reason: Reason = "deadline"
        try:
            async with asyncio.timeout_at(until):
                while True:
                    url = self._fleet.replica(version)
                    if url is None:
                        reason = self._fleet.hindrance(version)
                        if len(self.parked) >= self._maximum_parked:
                            return reason
                        await self._park(slot)
                        continue
                    reason = "deadline"
                    answer = await self._fleet.ask(version, url, exchange.path, body)
                    if answer.ok or await self._is_its_own_failure(answer, exchange, answered, url):
                        self._metrics.seconds.observe(answer.total_seconds or 0.0)
                        return answer
                    reason = "engine_error"
                    self._metrics.failures.inc()
                    # The slot stays held: the stream is a better place to wait out a sick engine.
                    await asyncio.sleep(_RETRY_SECONDS)
        except TimeoutError:
            return reason

    async def ask_once(self, exchange: Exchange, version: Version) -> Answer | None:
        """The version's answer if there is room for it now, and an engine that gives one."""
        url = self._fleet.replica(version)
        if url is None:
            return None
        body = shadow_request(exchange, version, self._priority)
        answer = await self._fleet.ask(version, url, exchange.path, body)
        return answer if answer.ok else None

    async def _is_its_own_failure(
        self, answer: Answer, exchange: Exchange, answered: Version, url: str
    ) -> bool:
        """Whether the version that answered the client does so here and now, as it did then.

        An engine that is on its way down fails every request in much the same way as a version
        that can't be served.
        """
        if is_engines(answer):
            return False
        body = self._body(exchange, answered)
        control = await self._fleet.ask(answered, url, exchange.path, body)
        return control.ok

    def _body(self, exchange: Exchange, version: Version) -> bytes:
        tells = self._fleet.tells_probabilities(version)
        return shadow_request(exchange, version, self._priority, logprobs=tells)

    async def _park(self, slot: "Slot") -> None:
        """Wait for a replica without holding up those who have one."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        slot.release()
        self.parked.add(task)
        self._metrics.parked.set(len(self.parked))
        try:
            await self._fleet.change()
            await slot.take()
        finally:
            self.parked.discard(task)
            self._metrics.parked.set(len(self.parked))


class Slot:
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
