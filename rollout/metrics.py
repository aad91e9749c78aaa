"""What the controller shows to Prometheus: the rollouts, the gates, the cases, the training runs.

Most of it is state of the store, shown as it was last seen: a route, a trial or a run that is gone
takes its series along. Labels come from configuration and from versions, never from a client.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import get_args

from prometheus_client import CollectorRegistry
from prometheus_client import Counter as CounterMetric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rollout.catalog import Catalog
from rollout.engines import Residency
from rollout.evidence import Evidence, Verdict
from rollout.gates import thresholds
from rollout.policy import servable_gates
from rollout.retraining import Outlook
from rollout.runs import RunEvent, RunState, TrainingRun
from rollout.state import Rollout


@dataclass(frozen=True, slots=True)
class CaseCounts:
    """A route's cases by their state, since when the oldest of the open ones waits, and how far
    its labelers agree (None: too few labels to tell)."""

    by_state: Mapping[str, int]
    dropped: int = 0
    oldest_at: datetime | None = None
    alpha: float | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What the store held at `at`. Verdicts, evidence and cases are by route, progress by run."""

    at: datetime
    catalog: Catalog = field(default_factory=Catalog)
    verdicts: Mapping[str, Sequence[Verdict]] = field(default_factory=dict)
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    cases: Mapping[str, CaseCounts] = field(default_factory=dict)
    runs: Sequence[TrainingRun] = ()
    progress: Mapping[str, RunEvent] = field(default_factory=dict)


class ControllerMetrics:
    """Made once by the composition root, on a registry of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seen: Seen | None = None
        self._store_up = False
        self._leading = False
        self.loop_errors = CounterMetric(
            "sluice_controller_errors",
            "Steps of a controller's loop that failed, by loop.",
            ["loop"],
            registry=registry,
        )
        self.decisions = CounterMetric(
            "sluice_controller_decisions",
            "What the controller committed by itself.",
            ["route", "event"],
            registry=registry,
        )
        self.retrainings = CounterMetric(
            "sluice_retraining_runs",
            "Runs that the controller started by the route's own rules.",
            ["route", "trigger"],
            registry=registry,
        )
        self._retraining: Mapping[str, Outlook] = {}
        registry.register(_StateCollector(self))

    def show(self, seen: Seen) -> None:
        self._seen = seen

    def show_retraining(self, outlooks: Mapping[str, Outlook]) -> None:
        """Of the routes that are trained by themselves, while this controller leads."""
        self._retraining = outlooks

    def show_store(self, *, up: bool) -> None:
        self._store_up = up

    def show_leading(self, *, leading: bool) -> None:
        self._leading = leading

    def families(self) -> Iterator[Metric]:
        yield _gauge("sluice_store_up", "Whether the store answered last.", {(): self._store_up})
        yield _gauge(
            "sluice_controller_leading",
            "Whether this controller holds the lease: it judges, commits and loads adapters.",
            {(): self._leading},
        )
        yield from _retraining(self._retraining)
        if self._seen is not None:
            yield from _families(self._seen)


class _StateCollector(Collector):
    def __init__(self, metrics: ControllerMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.families()


Samples = Mapping[tuple[str, ...], float]


def _families(seen: Seen) -> Iterator[Metric]:
    rollouts = seen.catalog.rollouts
    yield _gauge(
        "sluice_config_revision",
        "The newest revision committed for the route.",
        {(name,): rollout.revision for name, rollout in rollouts.items()},
        "route",
    )
    yield _gauge(
        "sluice_route_weight",
        "Share of the route's units that are assigned to the version, in percent.",
        {pair: share for rollout in rollouts.values() for pair, share in _weights(rollout)},
        "route",
        "version",
    )
    yield _gauge(
        "sluice_rollout_info",
        "Always 1: where the route's rollout stands.",
        {_standing(rollout): 1.0 for rollout in rollouts.values()},
        "route",
        "stage",
        "stable",
        "candidate",
    )
    yield _gauge(
        "sluice_replica_up",
        "Whether the engine's replica answers the controller.",
        {(r.engine, r.url): r.ready for r in seen.catalog.residency.values()},
        "engine",
        "replica",
    )
    yield _gauge(
        "sluice_adapters_resident",
        "Adapters that the replica was proved to serve.",
        {(r.engine, r.url): len(r.served) - 1 for r in _ready(seen)},
        "engine",
        "replica",
    )
    yield _gauge(
        "sluice_adapters_missing",
        "Adapters that should be on the replica and are not; `GET /engines` says why.",
        {(r.engine, r.url): len(r.missing) for r in _ready(seen)},
        "engine",
        "replica",
    )
    yield from _gates(seen)
    yield from _cases(seen)
    yield from _training(seen)


def _ready(seen: Seen) -> list[Residency]:
    return [residency for residency in seen.catalog.residency.values() if residency.ready]


def _weights(rollout: Rollout) -> Iterator[tuple[tuple[str, str], float]]:
    candidate = 0.0 if rollout.trial is None else rollout.trial.weight
    yield (rollout.route, f"{rollout.route}@{rollout.stable}"), 100.0 - candidate
    if rollout.trial is not None:
        yield (rollout.route, f"{rollout.route}@{rollout.trial.candidate}"), candidate


def _standing(rollout: Rollout) -> tuple[str, str, str, str]:
    stable = f"{rollout.route}@{rollout.stable}"
    if rollout.trial is None:
        return rollout.route, "stable", stable, ""
    return rollout.route, rollout.trial.stage, stable, f"{rollout.route}@{rollout.trial.candidate}"


def _gates(seen: Seen) -> Iterator[Metric]:
    evalues: dict[tuple[str, ...], float] = {
        (route, verdict.gate, side): value
        for route, verdicts in seen.verdicts.items()
        for verdict in verdicts
        for side, value in verdict.values.items()
    }
    labels = ("route", "gate", "side")
    yield _gauge("sluice_gate_evalue", "E-value of the gate's side.", evalues, *labels)
    limits = {
        name: thresholds(route.policy, servable_gates(route.slo, route.schema))
        for name, route in seen.catalog.routes.items()
    }
    yield _gauge(
        "sluice_gate_threshold",
        "What that e-value has to reach for a decision.",
        {
            (route, gate, side): limits[route][gate].of(side)
            for route, gate, side in evalues
            if gate in limits.get(route, {})
        },
        *labels,
    )
    yield _gauge(
        "sluice_trial_units",
        "Units counted in the route's present trial, each once, by assigned arm.",
        {
            (route, arm): float(sum(getattr(stratum, arm).units for stratum in evidence.strata))
            for route, evidence in seen.evidence.items()
            for arm in ("stable", "candidate")
        },
        "route",
        "arm",
    )
    pairs: dict[tuple[str, ...], float] = {
        (route, agreement): float(count)
        for route, evidence in seen.evidence.items()
        for agreement, count in (
            ("agree", evidence.pairs.agree),
            ("disagree", evidence.pairs.disagree),
            ("failed", evidence.pairs.failed),
        )
    }
    yield _counter(
        "sluice_shadow_pairs_total",
        "Pairs compared in the route's present trial.",
        pairs,
        "route",
        "agreement",
    )


def _cases(seen: Seen) -> Iterator[Metric]:
    yield _gauge(
        "sluice_cases",
        "Cases by state.",
        {
            (route, state): float(count)
            for route, counts in seen.cases.items()
            for state, count in counts.by_state.items()
        },
        "route",
        "state",
    )
    yield _gauge(
        "sluice_case_oldest_seconds",
        "Age of the oldest case that waits for a label; 0 where none does.",
        {
            (route,): 0.0
            if counts.oldest_at is None
            else max(0.0, (seen.at - counts.oldest_at).total_seconds())
            for route, counts in seen.cases.items()
        },
        "route",
    )
    yield _gauge(
        "sluice_labelers_alpha",
        "Krippendorff's alpha of the route's labelers: 1 is agreement, 0 is chance.",
        {
            (route,): counts.alpha
            for route, counts in seen.cases.items()
            if counts.alpha is not None
        },
        "route",
    )
    yield _counter(
        "sluice_cases_dropped_total",
        "Cases that were not kept because the route had its maximum.",
        {(route,): float(counts.dropped) for route, counts in seen.cases.items()},
        "route",
    )


def _training(seen: Seen) -> Iterator[Metric]:
    states = Counter(run.state for run in seen.runs)
    yield _gauge(
        "sluice_training_runs",
        "Training runs by state.",
        {(state,): float(states[state]) for state in get_args(RunState)},
        "state",
    )
    under_way = {run: event for run, event in seen.progress.items() if event.total}
    yield _gauge(
        "sluice_training_step",
        "Steps done in the present stage of a run that is under way.",
        {(run,): float(event.done) for run, event in under_way.items()},
        "run",
    )
    yield _gauge(
        "sluice_training_loss",
        "Loss at the last step of a run that is under way.",
        _values(under_way, "loss"),
        "run",
    )
    yield _counter(
        "sluice_training_tokens_total",
        "Tokens that a run under way has trained on.",
        _values(under_way, "tokens"),
        "run",
    )


def _retraining(outlooks: Mapping[str, Outlook]) -> Iterator[Metric]:
    yield _gauge(
        "sluice_retraining_new_labels",
        "Cases decided since the route's last run.",
        {(route,): float(each.new_labels) for route, each in outlooks.items()},
        "route",
    )
    yield _gauge(
        "sluice_retraining_failures",
        "Runs of the route in a row that came to nothing.",
        {(route,): float(each.failures) for route, each in outlooks.items()},
        "route",
    )
    yield _gauge(
        "sluice_retraining_agreement",
        "Share of the pairs in which people found the stable answer right, with its bounds at 95 %.",
        {
            (route, bound): value
            for route, each in outlooks.items()
            if each.accord is not None
            for bound, value in (
                ("low", each.accord.low),
                ("rate", each.accord.rate),
                ("high", each.accord.high),
            )
        },
        "route",
        "bound",
    )


def _values(progress: Mapping[str, RunEvent], name: str) -> Samples:
    return {(run,): event.values[name] for run, event in progress.items() if name in event.values}


def _gauge(name: str, help_text: str, samples: Samples, *labels: str) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=labels)
    for values, number in samples.items():
        family.add_metric(values, float(number))
    return family


def _counter(name: str, help_text: str, samples: Samples, *labels: str) -> Metric:
    family = CounterMetricFamily(name, help_text, labels=labels)
    for values, number in samples.items():
        family.add_metric(values, float(number))
    return family
