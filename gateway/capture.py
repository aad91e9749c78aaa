"""Sampled exchanges on their way to the shadow: a bounded queue, and a task that empties it."""

import asyncio
import logging
from collections import Counter, deque
from datetime import datetime
from time import perf_counter
from typing import Final

from gateway.answers import answer_from_body, answer_from_stream
from gateway.metrics import Metrics
from gateway.settings import CaptureSection
from rollout.errors import StoreUnavailableError
from rollout.exchanges import Arm, Exchange
from rollout.redaction import RedactionTimeoutError, Redactor
from rollout.stores.captures import CaptureStore

_log = logging.getLogger(__name__)
# A short exchange is redacted faster than a thread is asked to.
_SHORT_BYTES: Final = 16 * 1024
# How long other things wait while exchanges are read; longer where the queue is about to overflow.
_AT_ONCE_SECONDS: Final = 0.0001
_AT_MOST_SECONDS: Final = 0.001


class Seen:
    """An exchange as it went by: bytes, not yet read."""

    __slots__ = (
        "arm", "at", "body", "path", "request", "request_id", "route", "status", "stream",
        "total_seconds", "trial", "ttft_seconds", "unit", "version",
    )  # fmt: skip

    def __init__(
        self,
        *,
        request_id: str,
        route: str,
        trial: str,
        arm: Arm,
        unit: str,
        path: str,
        request: bytes,
        version: int,
        status: int,
        body: bytes,
        stream: bool,
        ttft_seconds: float | None,
        total_seconds: float,
        at: datetime,
    ) -> None:
        self.request_id = request_id
        self.route = route
        self.trial = trial
        self.arm = arm
        self.unit = unit
        self.path = path
        self.request = request
        self.version = version
        self.status = status
        self.body = body
        self.stream = stream
        self.ttft_seconds = ttft_seconds
        self.total_seconds = total_seconds
        self.at = at

    @property
    def size(self) -> int:
        return len(self.request) + len(self.body)

    def exchange(self) -> Exchange:
        """Read it; this is the expensive part, and not on the path of any request."""
        if self.stream:
            answer = answer_from_stream(
                self.version,
                self.status,
                [self.body],
                ttft_seconds=self.ttft_seconds,
                total_seconds=self.total_seconds,
            )
        else:
            answer = answer_from_body(
                self.version, self.status, self.body, total_seconds=self.total_seconds
            )
        return Exchange(
            request_id=self.request_id,
            route=self.route,
            trial=self.trial,
            arm=self.arm,
            unit=self.unit,
            path=self.path,
            request=self.request.decode("utf-8", "replace"),
            answer=answer,
            captured_at=self.at,
        )


class Captures:
    """`offer` never waits and never fails: what does not fit is dropped and counted."""

    def __init__(self, settings: CaptureSection, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._redactor = Redactor(**dict(settings.redaction))
        self._waiting: deque[Seen] = deque()
        self._bytes = 0
        self._arrived = asyncio.Event()

    @property
    def largest(self) -> int:
        return self._settings.maximum_exchange_bytes

    def offer(self, seen: Seen) -> None:
        settings = self._settings
        if seen.size > settings.maximum_exchange_bytes:
            self._metrics.capture_dropped("size")
        elif (
            len(self._waiting) >= settings.maximum_waiting
            or self._bytes + seen.size > settings.maximum_waiting_bytes
        ):
            self._metrics.capture_dropped("full")
        else:
            self._waiting.append(seen)
            self._bytes += seen.size
            self._arrived.set()

    def too_large(self) -> None:
        """An answer outgrew the limit while it passed by."""
        self._metrics.capture_dropped("size")

    async def run(self, store: CaptureStore) -> None:
        """Write batches for ever. What the store does not take is dropped: it is only a sample."""
        while True:
            await self._arrived.wait()
            # A batch is worth a short wait: one write for many exchanges.
            await asyncio.sleep(self._settings.flush_seconds)
            while self._waiting:
                await self._append(store, self._take())
            self._arrived.clear()

    async def flush(self, store: CaptureStore) -> None:
        """Write what waits, once, at the end."""
        while self._waiting:
            await self._append(store, self._take())

    def _take(self) -> list[Seen]:
        batch = [
            self._waiting.popleft() for _ in range(min(self._settings.batch, len(self._waiting)))
        ]
        self._bytes -= sum(seen.size for seen in batch)
        return batch

    def _slice(self) -> float:
        """How long exchanges may be read until requests have their turn, in seconds."""
        full = len(self._waiting) / self._settings.maximum_waiting
        return max(_AT_ONCE_SECONDS, full * _AT_MOST_SECONDS)

    async def _redacted(self, seen: Seen) -> Exchange | None:
        """The exchange as it may be stored; None where that cannot be had in time."""
        try:
            exchange = seen.exchange()
            if seen.size > _SHORT_BYTES or self._redactor.costly:
                done = await asyncio.to_thread(self._redactor.exchange, exchange)
            else:
                done = self._redactor.exchange(exchange)
        except RedactionTimeoutError as exc:
            _log.warning("request %s was not captured: %s", seen.request_id, exc)
            self._metrics.capture_dropped("redaction")
            return None
        except Exception:  # noqa: BLE001 - one odd exchange must not end the loop
            _log.exception("request %s was not captured", seen.request_id)
            self._metrics.capture_dropped("error")
            return None
        if done.counts:
            self._metrics.redacted(done.counts)
        return done.exchange

    async def _append(self, store: CaptureStore, batch: list[Seen]) -> None:
        exchanges: list[Exchange] = []
        until = perf_counter() + self._slice()
        for seen in batch:
            exchange = await self._redacted(seen)
            if exchange is not None:
                exchanges.append(exchange)
            # Reading is done bit by bit, so that no stream waits for a whole batch.
            if perf_counter() > until:
                await asyncio.sleep(0)
                until = perf_counter() + self._slice()
        try:
            await store.append(exchanges)
        except StoreUnavailableError:
            self._metrics.capture_dropped("store", len(exchanges))
        except Exception:  # noqa: BLE001 - this loop must not end; it says what happened
            _log.exception("captured exchanges could not be written and were dropped")
            self._metrics.capture_dropped("error", len(exchanges))
        else:
            for route, count in Counter(exchange.route for exchange in exchanges).items():
                self._metrics.captured(route, count)
