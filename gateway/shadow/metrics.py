"""What one shadow process counts. The pairs are counted in the store, and exposed from there."""

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gateway.shadow.pairing import Reason

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120)


class ShadowMetrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.dropped = Counter(
            "sluice_shadow_dropped_total",
            "Captured exchanges that made no pair.",
            ["reason"],
            registry=self.registry,
        )
        self.compared = Counter(
            "sluice_shadow_compared_total",
            "Pairs that this process compared.",
            ["kind"],
            registry=self.registry,
        )
        self.offered = Counter(
            "sluice_shadow_cases_offered_total",
            "Cases that this process put into the labeling queue.",
            registry=self.registry,
        )
        self.taken_over = Counter(
            "sluice_shadow_taken_over_total",
            "Exchanges taken from a shadow that had stopped settling them.",
            registry=self.registry,
        )
        self.failures = Counter(
            "sluice_shadow_asks_failed_total",
            "Requests that an engine, not a version, failed.",
            registry=self.registry,
        )
        self.pauses = Counter(
            "sluice_shadow_pauses_total",
            "Times that nothing was taken because live traffic filled the engines.",
            registry=self.registry,
        )
        self.parked = Gauge(
            "sluice_shadow_parked",
            "Exchanges that wait for a replica.",
            registry=self.registry,
        )
        self.seconds = Histogram(
            "sluice_shadow_ask_seconds",
            "Time from asking the other version to its answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        # A reason that has not happened yet is 0, not missing.
        for reason in get_args(Reason):
            self.dropped.labels(reason)
