"""Every metric of the data plane. Labels come from configuration, never from a client."""

import asyncio
import contextlib
import math
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

from gateway.errors import Reason
from gateway.quota import Reason as LimitReason
from gateway.routing import View
from rollout.exchanges import Arm, Rating
from rollout.versions import Version

# As in the OpenTelemetry GenAI conventions.
_DURATION: Final[tuple[float, ...]] = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
_FIRST_TOKEN: Final[tuple[float, ...]] = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
_INTER_TOKEN: Final[tuple[float, ...]] = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
)  # fmt: skip
_OVERHEAD: Final[tuple[float, ...]] = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1,
)  # fmt: skip
_LAG_SECONDS: Final = 0.25
# At a high rate that is many requests, at a low one nobody minds a timer for each.
_TOLD_AFTER_SECONDS: Final = 0.005

MULTIPROCESS_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"


class Bins:
    """What a histogram is to be told, counted for a fraction of its cost and told soon after.

    It puts itself on the list `waiting` when there is something to tell.
    """

    __slots__ = ("_bounds", "_counts", "_histogram", "_sum", "_told", "_waiting")

    def __init__(
        self, histogram: Histogram, bounds: Sequence[float], waiting: "list[Bins | Sum]"
    ) -> None:
        self._histogram = histogram
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._waiting = waiting
        self._told = True

    def observe(self, value: float) -> None:
        # A value on a bound is in the bucket that ends there.
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value
        if self._told:
            self._told = False
            self._waiting.append(self)

    def flush(self) -> None:
        # Histogram has no call for many values at once: these are what its `observe` increments.
        for place, count in enumerate(self._counts):
            if count:
                self._counts[place] = 0
                self._histogram._buckets[place].inc(count)
        self._histogram._sum.inc(self._sum)
        self._sum = 0.0
        self._told = True


class Sum:
    """The same for a counter."""

    __slots__ = ("_count", "_counter", "_waiting")

    def __init__(self, counter: Counter, waiting: "list[Bins | Sum]") -> None:
        self._counter = counter
        self._count = 0
        self._waiting = waiting

    def add(self, count: int) -> None:
        if count > 0:
            if self._count == 0:
                self._waiting.append(self)
            self._count += count

    def flush(self) -> None:
        self._counter.inc(self._count)
        self._count = 0


@dataclass(slots=True)
class Bound:
    """The children for one version in one arm, looked up once."""

    duration: Bins
    first_token: Bins
    inter_token: Bins
    prompt_tokens: Sum
    completion_tokens: Sum
    codes: dict[int, Sum]


class Metrics:
    """Where several workers share a directory (`PROMETHEUS_MULTIPROC_DIR`), `render` sums them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        arm = ("route", "version", "arm")
        self._requests = self._counter("requests_total", "Requests answered.", (*arm, "code"))
        self._duration = self._histogram(
            "request_duration_seconds", "From the request to the end of its answer.", _DURATION, arm
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From the request to its first byte.", _FIRST_TOKEN, arm
        )
        self._inter_token = self._histogram(
            "inter_token_seconds", "Mean time between the pieces of a stream.", _INTER_TOKEN, arm
        )
        self._tokens = self._counter("tokens_total", "Tokens by usage.", ("route", "kind"))
        self._upstream_errors = self._counter(
            "upstream_errors_total", "Failures of an engine.", ("engine", "reason")
        )
        self._fallbacks = self._counter(
            "fallbacks_total", "Answers of stable in place of the candidate.", ("route",)
        )
        self._rate_limited = self._counter(
            "rate_limited_total", "Requests refused by a limit of their key.", ("reason",)
        )
        self._admission_refused = self._counter(
            "admission_refused_total", "Requests refused because every queue is full.", ("engine",)
        )
        self._settlements_failed = self._counter(
            "limits_unsettled_total", "Times that limits of keys could not be settled."
        )
        self._captures = self._counter("captures_total", "Exchanges captured.", ("route",))
        self._captures_dropped = self._counter(
            "captures_dropped_total",
            "Exchanges that were to be captured and were not.",
            ("reason",),
        )
        self._redactions = self._counter(
            "redactions_total", "What was taken out before it was stored.", ("kind",)
        )
        self._feedback = self._counter("feedback_total", "Answers rated.", ("route", "rating"))
        self._units_dropped = self._counter(
            "evidence_units_dropped_total",
            "Units left out of the evidence, because too many waited for the store.",
        )
        self._feedback_dropped = self._counter(
            "feedback_dropped_total", "What of feedback was not stored.", ("reason",)
        )
        self._discovery_errors = self._counter(
            "discovery_errors_total", "Names of engines that could not be resolved.", ("engine",)
        )
        self._hedges = self._counter(
            "hedges_total", "Requests that a second replica was asked as well.", ("engine", "won")
        )
        self._reloads = self._counter(
            "config_reloads_total", "Times that the configuration was read anew.", ("result",)
        )
        # What prometheus_client is to be told.
        self._waiting: list[Bins | Sum] = []
        self._flush_due = False
        overhead = self._histogram(
            "overhead_seconds", "Time in the gateway before the engine was asked.", _OVERHEAD
        )
        self.overhead = self._bins(overhead, _OVERHEAD)
        self.inflight = self._gauge("inflight", "Requests under way.", "livesum")
        self.store_up = self._gauge("store_up", "1 while the store answers.", "livemin")
        self.lag = self._gauge(
            "event_loop_lag_seconds", "How late the event loop ran a timer.", "livemax"
        )
        self._revision = self._gauge(
            "gateway_revision", "The rollout revision that is served.", "livemin", ("route",)
        )
        self._replica_up = self._gauge(
            "replica_up", "1 while a replica can be asked.", "livemin", ("engine", "replica")
        )
        self._bound: dict[tuple[str, Arm], Bound] = {}
        self._refused: dict[int, Counter] = {}

    def bound(self, route: str, version: str, arm: Arm) -> Bound:
        key = (version, arm)
        found = self._bound.get(key)
        if found is None:
            found = self._bound[key] = Bound(
                duration=self._bins(self._duration.labels(route, version, arm), _DURATION),
                first_token=self._bins(self._first_token.labels(route, version, arm), _FIRST_TOKEN),
                inter_token=self._bins(self._inter_token.labels(route, version, arm), _INTER_TOKEN),
                prompt_tokens=self._sum(self._tokens.labels(route, "prompt")),
                completion_tokens=self._sum(self._tokens.labels(route, "completion")),
                codes={},
            )
        return found

    def answered(self, bound: Bound, route: str, version: Version, arm: Arm, code: int) -> None:
        requests = bound.codes.get(code)
        if requests is None:
            requests = self._sum(self._requests.labels(route, version.name, arm, str(code)))
            bound.codes[code] = requests
        requests.add(1)
        if not self._flush_due:
            self._flush_soon()

    def refused(self, code: int) -> None:
        """A request that reached no route: no key, no such model, no valid body."""
        counter = self._refused.get(code)
        if counter is None:
            counter = self._refused[code] = self._requests.labels("", "", "", str(code))
        counter.inc()

    def upstream_error(self, engine: str, reason: Reason) -> None:
        self._upstream_errors.labels(engine, reason).inc()

    def fell_back(self, route: str) -> None:
        self._fallbacks.labels(route).inc()

    def rate_limited(self, reason: LimitReason) -> None:
        self._rate_limited.labels(reason).inc()

    def admission_refused(self, engine: str) -> None:
        self._admission_refused.labels(engine).inc()

    def settlement_failed(self) -> None:
        self._settlements_failed.inc()

    def captured(self, route: str, count: int) -> None:
        self._captures.labels(route).inc(count)

    def capture_dropped(self, reason: str, count: int = 1) -> None:
        self._captures_dropped.labels(reason).inc(count)

    def redacted(self, counts: Mapping[str, int]) -> None:
        for kind, count in counts.items():
            self._redactions.labels(kind).inc(count)

    def rated(self, route: str, rating: Rating) -> None:
        self._feedback.labels(route, rating).inc()

    def units_dropped(self, count: int) -> None:
        if count:
            self._units_dropped.inc(count)

    def feedback_dropped(self, reason: str) -> None:
        self._feedback_dropped.labels(reason).inc()

    def discovery_failed(self, engine: str) -> None:
        self._discovery_errors.labels(engine).inc()

    def hedged(self, engine: str, *, won: bool) -> None:
        """`won` is whether the second replica answered first."""
        self._hedges.labels(engine, "second" if won else "first").inc()

    def reloaded(self, result: Literal["applied", "refused"]) -> None:
        self._reloads.labels(result).inc()

    def replica_gone(self, engine: str, replica: str) -> None:
        """A replica that nobody wants any more is neither up nor down."""
        if MULTIPROCESS_VARIABLE in os.environ:
            # What workers share can't be taken out, and no alert fires on what is no number.
            self._replica_up.labels(engine, replica).set(math.nan)
        else:
            self._replica_up.remove(engine, replica)

    def replica_up(self, engine: str, replica: str, *, up: bool) -> None:
        self._replica_up.labels(engine, replica).set(1 if up else 0)

    def serves(self, view: View) -> None:
        for name, lane in view.lanes.items():
            if not lane.pinned:
                self._revision.labels(name).set(lane.revision)

    async def watch_lag(self) -> None:
        """Measure for ever how late the loop is: what blocks it delays every stream."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_SECONDS
            await asyncio.sleep(_LAG_SECONDS)
            self.lag.set(max(loop.time() - due, 0.0))

    def _flush_soon(self) -> None:
        # Where no loop runs, whoever asks for the metrics flushes.
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop().call_later(_TOLD_AFTER_SECONDS, self.flush)
            self._flush_due = True

    def flush(self) -> None:
        """Tell prometheus_client what was counted for it."""
        self._flush_due = False
        for each in self._waiting:
            each.flush()
        self._waiting.clear()

    async def render(self) -> bytes:
        """The exposition; with several workers it is the sum, dead ones included."""
        self.flush()
        if MULTIPROCESS_VARIABLE not in os.environ:
            return generate_latest(self.registry)
        # By then the other workers have told what they counted before.
        await asyncio.sleep(2 * _TOLD_AFTER_SECONDS)
        # It reads a file for each worker and kind, so it is kept off the loop.
        return await asyncio.to_thread(_render_all_workers)

    def _bins(self, histogram: Histogram, bounds: Sequence[float]) -> Bins:
        return Bins(histogram, bounds, self._waiting)

    def _sum(self, counter: Counter) -> Sum:
        return Sum(counter, self._waiting)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"sluice_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        return Histogram(f"sluice_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, text: str, mode: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(
            f"sluice_{name}",
            text,
            labels,
            registry=self.registry,
            multiprocess_mode=mode,  # type: ignore[arg-type]
        )


def _render_all_workers() -> bytes:
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
