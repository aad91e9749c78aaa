"""Whether a key may have one more request at this worker: its limits, decided in memory.

A limit holds for all workers together. Each of them spends credit that the store's ledger has
granted it (`gateway.shares` asks for more about once a second), so that the whole is kept and no
request waits for the store.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from rollout.credentials import KeyLimits
from rollout.quotas import PATIENCE_SECONDS, Grant, Limit, LimitReport

Reason = Literal["requests", "tokens", "concurrency", "budget"]
HeaderList = list[tuple[bytes, bytes]]

_MINUTE: Final = 60.0
_BYTES_PER_TOKEN: Final = 4
# What an answer is taken to cost until one was seen.
_UNKNOWN_ANSWER: Final = 256.0
# How much a new answer moves the running mean.
_NEWEST: Final = 0.1
# A demand that has faded to less than this is none.
_FAINT: Final = 0.2


@dataclass(frozen=True, slots=True)
class Refusal:
    """`retry_after` is in seconds; a budget has none, for its month decides."""

    reason: Reason
    retry_after: float


class Bucket:
    """Credit in a limit a minute. Times are seconds of any clock that never goes back.

    Whoever hears from the ledger has what it grants. Whoever hears nothing is a token bucket of its
    own, as large and as fast as its last share.
    """

    __slots__ = (
        "_demand", "_granted", "_heard_at", "_refilled", "_refilled_at", "acknowledged",
        "elsewhere", "maximum", "share", "spent",
    )  # fmt: skip

    def __init__(self, maximum: int, workers: int, now: float) -> None:
        self.maximum = maximum
        # Nobody has reported yet, so the ledger counts an even part as handed to everyone.
        self.share = float(max(1, maximum // workers))
        self.elsewhere = maximum - self.share
        self.spent = 0.0
        self.acknowledged = 0.0
        self._granted = self.share
        self._refilled = 0.0
        self._demand = 0.0
        self._heard_at = self._refilled_at = now

    @property
    def credit(self) -> float:
        return self._granted - self.spent

    def wait(self, cost: float, now: float) -> float:
        """Seconds until this much can be spent; 0 where it can be now."""
        self._demand += cost
        self._refill(now)
        # A full bucket admits whatever it is, or what is larger than the share would wait for ever.
        needed = min(cost, max(self.share, 1.0))
        if self.credit >= needed:
            return 0.0
        missing = needed - self.credit - max(self.elsewhere, 0.0)
        return max(missing * _MINUTE / self.maximum, 1.0)

    def spend(self, cost: float) -> None:
        self.spent += cost

    @property
    def remaining(self) -> int:
        """Of the whole limit, as far as this worker knows."""
        if self.credit < 1:
            return 0
        return min(self.maximum, math.floor(self.credit + max(self.elsewhere, 0.0)))

    @property
    def full_in(self) -> float:
        """Seconds until the whole limit is there again, if nobody asks."""
        return (self.maximum - self.remaining) * _MINUTE / self.maximum

    def report(self, limit: Limit, now: float) -> LimitReport:
        self._refill(now)
        demand = self._demand
        self._demand = demand / 2 if demand / 2 >= _FAINT else 0.0
        return LimitReport(
            limit, self.maximum, self.spent, self.acknowledged, demand, self._refilled
        )

    def take(self, grant: Grant, reported: LimitReport, now: float) -> None:
        self._granted = reported.spent + grant.credit
        self.acknowledged = reported.spent
        self._refilled -= reported.refilled
        self.share = grant.share
        self.elsewhere = grant.elsewhere
        self._heard_at = now

    def empty(self) -> None:
        """Hold nothing until it is granted."""
        self._granted = self.spent

    @property
    def wanted(self) -> bool:
        return self._demand > 0

    def _refill(self, now: float) -> None:
        since = max(self._refilled_at, self._heard_at + PATIENCE_SECONDS)
        if now <= since:
            return
        self._refilled_at = now
        missing = self.share - self.credit
        if missing > 0:
            refill = min(missing, self.share * (now - since) / _MINUTE)
            self.spent -= refill
            self._refilled += refill


class Slots:
    """How many requests of a key this worker may have under way."""

    __slots__ = ("_demand", "granted", "maximum", "used")

    def __init__(self, maximum: int, workers: int) -> None:
        self.maximum = maximum
        self.granted = max(1, maximum // workers)
        self.used = 0
        self._demand = 0.0

    @property
    def free(self) -> bool:
        self._demand = max(self._demand, self.used + 1)
        return self.used < self.granted

    def report(self) -> LimitReport:
        demand = max(self._demand, self.used)
        self._demand = demand / 2 if demand / 2 >= _FAINT else 0.0
        return LimitReport("concurrency", self.maximum, self.used, 0.0, demand)

    def take(self, grant: Grant) -> None:
        self.granted = int(grant.credit)

    def empty(self) -> None:
        self.granted = self.used

    @property
    def wanted(self) -> bool:
        return self._demand > 0 or self.used > 0


class Budget:
    """Tokens in a calendar month: those that all workers have reported, and ours since.

    Without a `maximum` they are only counted.
    """

    __slots__ = ("_acknowledged", "_total", "maximum", "period", "reserved", "used")

    def __init__(self, maximum: int | None, period: str, total: int = 0) -> None:
        self.maximum = maximum
        self.period = period
        self.used = 0  # by this worker
        self.reserved = 0.0
        self._acknowledged = 0
        self._total = total

    @property
    def total(self) -> int:
        """Used in this month by everyone, as far as this worker knows."""
        return self._total + self.used - self._acknowledged

    @property
    def spent(self) -> bool:
        return self.maximum is not None and self.total + self.reserved >= self.maximum

    @property
    def reported(self) -> bool:
        return self.used == self._acknowledged

    def turn(self, period: str) -> None:
        """Begin a new month; what was not reported yet counts in it."""
        if period != self.period:
            self.period = period
            self.used -= self._acknowledged
            self._acknowledged = 0
            self._total = 0

    def take(self, total: int, reported: int, period: str) -> None:
        if period == self.period:
            self._total = total
            self._acknowledged = reported


class Ticket:
    """An admitted request; `settle` gives back what it did not use, once."""

    __slots__ = ("_quota", "_settled", "estimate", "prompt")

    def __init__(self, quota: "KeyQuota", prompt: int, estimate: int) -> None:
        self._quota = quota
        self._settled = False
        self.prompt = prompt
        self.estimate = estimate

    def settle(self, tokens: int | None, answer: int | None = None) -> None:
        """What it took: tokens in all, None where nobody knows; those of the answer, if known."""
        if not self._settled:
            self._settled = True
            self._quota.settle(self, self.estimate if tokens is None else tokens, answer)


class KeyQuota:
    """The limits of one key at this worker. `count` tells it from an earlier one of the same key,
    which had spent something else."""

    __slots__ = (
        "_mean_answer", "budget", "count", "id", "limits", "requests", "slots", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        key_id: str,
        limits: KeyLimits,
        budget: Budget,
        workers: int,
        now: float,
        count: int = 0,
    ) -> None:
        per_minute, tokens = limits.requests_per_minute, limits.tokens_per_minute
        self.id = key_id
        self.limits = limits
        self.requests = None if per_minute is None else Bucket(per_minute, workers, now)
        self.tokens = None if tokens is None else Bucket(tokens, workers, now)
        self.slots = None if limits.concurrency is None else Slots(limits.concurrency, workers)
        self.budget = budget
        self.count = count
        self._mean_answer = _UNKNOWN_ANSWER

    @property
    def counts_tokens(self) -> bool:
        """Whether an estimate is needed."""
        return self.tokens is not None or self.budget.maximum is not None

    def admit(self, body_bytes: int, cap: int | None, now: float) -> Ticket | Refusal:
        """Take what the request will need, or nothing.

        `cap` is the most that its answer may take, where the client said.
        """
        prompt = estimate = 0
        if self.counts_tokens:
            prompt = -(-body_bytes // _BYTES_PER_TOKEN)
            estimate = prompt + (round(self._mean_answer) if cap is None else cap)
            if self.tokens is not None:
                # More than all there is cannot be waited for; what it does take is settled.
                estimate = min(estimate, self.tokens.maximum)
        refusal = self._refusal(estimate, now)
        if refusal is not None:
            return refusal
        if self.requests is not None:
            self.requests.spend(1)
        if self.tokens is not None:
            self.tokens.spend(estimate)
        if self.slots is not None:
            self.slots.used += 1
        self.budget.reserved += estimate
        return Ticket(self, prompt, estimate)

    def settle(self, ticket: Ticket, tokens: int, answer: int | None) -> None:
        if self.tokens is not None:
            self.tokens.spend(tokens - ticket.estimate)
        if self.slots is not None:
            self.slots.used -= 1
        self.budget.reserved -= ticket.estimate
        self.budget.used += tokens
        if answer is not None:
            self._mean_answer += _NEWEST * (answer - self._mean_answer)

    @property
    def idle(self) -> bool:
        """Whether nothing would be lost by forgetting it."""
        return (
            self.budget.reported
            and self.budget.reserved <= 0
            and not any(each.wanted for each in (self.requests, self.tokens, self.slots) if each)
        )

    def empty(self) -> None:
        """Hold nothing until it is granted: others hold it all."""
        for limit in (self.requests, self.tokens, self.slots):
            if limit is not None:
                limit.empty()

    def reports(self, now: float) -> list[LimitReport]:
        found = []
        if self.requests is not None:
            found.append(self.requests.report("requests", now))
        if self.tokens is not None:
            found.append(self.tokens.report("tokens", now))
        if self.slots is not None:
            found.append(self.slots.report())
        return found

    def take(self, reports: Sequence[LimitReport], grants: Mapping[str, Grant], now: float) -> None:
        """Go on with what the ledger has granted for these reports."""
        for report in reports:
            grant = grants.get(report.limit)
            if grant is None:
                continue
            if report.limit == "concurrency" and self.slots is not None:
                self.slots.take(grant)
            elif report.limit == "requests" and self.requests is not None:
                self.requests.take(grant, report, now)
            elif report.limit == "tokens" and self.tokens is not None:
                self.tokens.take(grant, report, now)

    def headers(self) -> HeaderList:
        """OpenAI's headers on how much is left of each limit a minute."""
        headers: HeaderList = []
        for bucket, suffix in ((self.requests, b"requests"), (self.tokens, b"tokens")):
            if bucket is not None:
                headers += (
                    (b"x-ratelimit-limit-" + suffix, b"%d" % bucket.maximum),
                    (b"x-ratelimit-remaining-" + suffix, b"%d" % bucket.remaining),
                    (b"x-ratelimit-reset-" + suffix, duration(bucket.full_in).encode()),
                )
        return headers

    def _refusal(self, estimate: int, now: float) -> Refusal | None:
        if self.budget.spent:
            return Refusal("budget", 0.0)
        # Both are asked, for what is refused is demand too.
        requests = 0.0 if self.requests is None else self.requests.wait(1, now)
        tokens = 0.0 if self.tokens is None else self.tokens.wait(estimate, now)
        free = self.slots is None or self.slots.free
        if requests > 0:
            return Refusal("requests", requests)
        if tokens > 0:
            return Refusal("tokens", tokens)
        return None if free else Refusal("concurrency", 1.0)


def period_of(now: datetime) -> str:
    """The calendar month that a budget holds for, in UTC."""
    return f"{now.astimezone(UTC):%Y-%m}"


def seconds_left(now: datetime) -> float:
    """Until the next month begins, in UTC."""
    now = now.astimezone(UTC)
    year, month = (now.year + 1, 1) if now.month == 12 else (now.year, now.month + 1)
    return (datetime(year, month, 1, tzinfo=UTC) - now).total_seconds()


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 1.5s, 6m0s."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    rest = f"{milliseconds / 1000:g}s"
    return f"{minutes}m{rest}" if minutes else rest
