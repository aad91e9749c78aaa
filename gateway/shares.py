"""This worker's part of every key's limits: settled with the store's ledger about once a second."""

import asyncio
import logging
from datetime import UTC, datetime
from typing import Final, Protocol

from gateway import wire
from gateway.errors import QuotaExhaustedError, RateLimitedError, TokensLimitedError
from gateway.quota import (
    Budget,
    HeaderList,
    KeyQuota,
    Reason,
    Refusal,
    Ticket,
    duration,
    period_of,
    seconds_left,
)
from gateway.routing import View
from rollout.credentials import ApiKey, KeyLimits
from rollout.errors import StoreUnavailableError
from rollout.quotas import KeyReport, LimitReport
from rollout.stores.quotas import QuotaStore

_log = logging.getLogger(__name__)
_SETTLE_SECONDS: Final = 1.0
_START_SECONDS: Final = 1.0
# Sooner than that where a key is new or was refused: its credit may lie with another worker.
_HURRY_SECONDS: Final = 0.1


class Counters(Protocol):
    """What is counted here."""

    def rate_limited(self, reason: Reason) -> None: ...

    def settlement_failed(self) -> None: ...


class Shares:
    """Admits requests of limited keys by what is in memory, and keeps that fresh.

    While the store is gone each worker goes on with its last shares, which together are no more
    than the limit. A worker that starts then takes an even part beside them, and one that alone is
    cut off from the store keeps its share while the others divide it: each such worker may admit
    one share too much, until the store is back and the excess is settled. Of a monthly budget, what
    others use meanwhile is not seen.
    """

    def __init__(self, incarnation: str, workers: int, counters: Counters) -> None:
        self._incarnation = incarnation
        # As many as were configured here start together, before they know of each other.
        self._least = self._workers = workers
        self._counters = counters
        self._limits: dict[str, KeyLimits] = {}
        self._quotas: dict[str, KeyQuota] = {}
        # Kept when a quota is let go, for what this worker reports of a month is absolute.
        self._budgets: dict[str, Budget] = {}
        self._begun = 0
        self._month: dict[str, int] | None = None
        self._period = period_of(datetime.now(UTC))
        self._hurry = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def adopt(self, view: View) -> None:
        """Go by the keys of this catalog; forget those that were revoked."""
        self._limits = {
            key.id: key.limits for key in view.keys.values() if not key.limits.unlimited
        }
        for key_id, quota in list(self._quotas.items()):
            if self._limits.get(key_id) != quota.limits:
                del self._quotas[key_id]
        for key_id in self._budgets.keys() - self._limits.keys():
            del self._budgets[key_id]

    def admit(self, key: ApiKey, body: bytes) -> Ticket:
        """A ticket for a request of this limited key, which must be settled.

        Raises RateLimitedError where it has to wait.
        """
        quota = self._quotas.get(key.id)
        if quota is None:
            quota = self._begin(key.id, key.limits)
            self._hurry.set()
        cap = wire.read_cap(body) if quota.counts_tokens else None
        outcome = quota.admit(len(body), cap, self._loop.time())
        if isinstance(outcome, Refusal):
            self._counters.rate_limited(outcome.reason)
            self._hurry.set()
            raise _error(outcome, key.limits)
        return outcome

    def headers(self, key: ApiKey) -> HeaderList:
        """What a client is told of the limits, whatever it is answered."""
        quota = self._quotas.get(key.id)
        return quota.headers() if quota is not None else []

    async def start(self, store: QuotaStore) -> None:
        """Learn, before anything is admitted, what others hold; without the store go on."""
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self.settle(store)
        except (StoreUnavailableError, TimeoutError):
            self._counters.settlement_failed()
        except Exception:  # noqa: BLE001 - nobody is kept from serving by it; it says what happened
            self._counters.settlement_failed()
            _log.exception("limits of keys could not be settled; it is tried again")

    async def run(self, store: QuotaStore) -> None:
        """Settle about once a second, for ever."""
        while True:
            self._hurry.clear()
            try:
                await self.settle(store)
            except StoreUnavailableError:
                self._counters.settlement_failed()
            except Exception:  # noqa: BLE001 - this loop must not end; it says what happened
                self._counters.settlement_failed()
                _log.exception("limits of keys could not be settled; it is tried again")
            await asyncio.sleep(_HURRY_SECONDS)
            try:
                async with asyncio.timeout(_SETTLE_SECONDS - _HURRY_SECONDS):
                    await self._hurry.wait()
            except TimeoutError:
                continue

    async def settle(self, store: QuotaStore) -> None:
        """Report what was used and take what is granted. Raises StoreUnavailableError; nothing is
        lost by that."""
        if await self._settle(store):
            # The others let go of a part of what was learnt of, so that this one can begin.
            await self._settle(store)

    async def _settle(self, store: QuotaStore) -> bool:
        """Whether keys were learnt of that others use."""
        period = period_of(datetime.now(UTC))
        self._turn(period)
        if self._month is None:
            self._month = await store.month_tokens(period)
        now = self._loop.time()
        told = [(quota, _report(quota, now)) for quota in self._quotas.values()]
        settlement = await store.settle(self._incarnation, period, [report for _, report in told])
        self._workers = max(settlement.workers, self._least)
        now = self._loop.time()
        for quota, report in told:
            grant = settlement.grants[report.id]
            quota.take(report.limits, grant.limits, now)
            quota.budget.take(grant.tokens, report.tokens, period)
            idle = report.id not in settlement.active and quota.idle
            if idle and self._quotas.get(report.id) is quota:
                del self._quotas[report.id]
        # In use at other workers, which hold all of it.
        learnt = [
            self._begin(key_id, self._limits[key_id])
            for key_id in settlement.active
            if key_id in self._limits and key_id not in self._quotas
        ]
        for quota in learnt:
            quota.empty()
        return bool(learnt)

    def _turn(self, period: str) -> None:
        if period != self._period:
            self._period = period
            self._month = {}
            for budget in self._budgets.values():
                budget.turn(period)

    def _begin(self, key_id: str, limits: KeyLimits) -> KeyQuota:
        budget = self._budgets.get(key_id)
        if budget is None:
            used = (self._month or {}).get(key_id, 0)
            budget = self._budgets[key_id] = Budget(limits.monthly_tokens, self._period, used)
        budget.maximum = limits.monthly_tokens
        self._begun += 1
        now = self._loop.time()
        quota = KeyQuota(key_id, limits, budget, self._workers, now, self._begun)
        self._quotas[key_id] = quota
        return quota


def _error(refusal: Refusal, limits: KeyLimits) -> RateLimitedError:
    after = refusal.retry_after
    match refusal.reason:
        case "requests":
            return RateLimitedError(
                f"this API key may make {limits.requests_per_minute} requests a minute: try again "
                f"in {duration(after)}",
                after,
            )
        case "tokens":
            return TokensLimitedError(
                f"this API key may use {limits.tokens_per_minute} tokens a minute: try again in "
                f"{duration(after)}",
                after,
            )
        case "concurrency":
            return RateLimitedError(
                f"this API key may have {limits.concurrency} requests under way at once: wait until "
                "one of them has ended",
                after,
            )
        case "budget":
            return QuotaExhaustedError(
                f"this API key has used its {limits.monthly_tokens} tokens of this month: ask for "
                "more, or wait until the next month begins (UTC)",
                seconds_left(datetime.now(UTC)),
            )


def _report(quota: KeyQuota, now: float) -> KeyReport:
    limits: tuple[LimitReport, ...] = tuple(quota.reports(now))
    return KeyReport(quota.id, quota.budget.used, limits, quota.count)
