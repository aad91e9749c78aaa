"""What one shadow process counts. The pairs are counted in the store, and exposed from there."""

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gateway.shadow.pairing import Reason
from rollout.exchanges import Step

# Most steps take microseconds; those that ask an engine, seconds.
_STEP_SECONDS = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30)
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
        self.step_seconds = Histogram(
            "sluice_shadow_step_seconds",
            "What each step of the comparing took.",
            ["step"],
            buckets=_STEP_SECONDS,
            registry=self.registry,
        )
        self.step_tokens = Counter(
            "sluice_shadow_step_tokens_total",
            "Tokens that engines counted for a step of the comparing.",
            ["step"],
            registry=self.registry,
        )
        self.step_failures = Counter(
            "sluice_shadow_step_failures_total",
            "Steps that ask an engine and came to nothing; the pair was counted without them.",
            ["step", "reason"],
            registry=self.registry,
        )
        self.judgements = Counter(
            "sluice_shadow_judgements_total",
            "Verdicts of judges on candidates; inconsistent ones went by the answers' places.",
            ["verdict"],
            registry=self.registry,
        )
        self.asked_again = Counter(
            "sluice_shadow_asked_again_total",
            "Pairs of stable's answer with its own second one, for the noise floor.",
            ["agreement"],
            registry=self.registry,
        )
        self.replayed = Counter(
            "sluice_shadow_replayed_total",
            "Past exchanges that this process put through a version.",
            registry=self.registry,
        )
        # A reason that has not happened yet is 0, not missing.
        for reason in get_args(Reason):
            self.dropped.labels(reason)

    def step(self, step: Step) -> None:
        self.step_seconds.labels(step.name).observe(step.seconds)
        if step.tokens:
            self.step_tokens.labels(step.name).inc(step.tokens)
