"""Counts for each arm, pairs, and the reports of evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal


@dataclass(frozen=True, slots=True)
class ArmCounts:
    """What the gateways counted for one assigned arm of one trial.

    `positive` and `negative` are requests that their callers rated good or bad.
    """

    requests: int = 0
    errors: int = 0
    fallbacks: int = 0
    slow_first_token: int = 0
    slow_total: int = 0
    seconds: float = 0.0
    positive: int = 0
    negative: int = 0


@dataclass(frozen=True, slots=True)
class UnitCounts:
    """What became of the units of one assigned arm: each counts once, by its first request.

    Requests of one unit resemble each other, so only units are independent of one another.
    `rated` are units that rated any answer, `bad` those whose first rating was bad.
    """

    units: int = 0
    errors: int = 0
    slow_first_token: int = 0
    slow_total: int = 0
    rated: int = 0
    bad: int = 0


@dataclass(frozen=True, slots=True)
class Stratum:
    """The units that were first seen in a trial while the candidate's share was `weight` percent."""

    weight: float
    stable: UnitCounts = field(default_factory=UnitCounts)
    candidate: UnitCounts = field(default_factory=UnitCounts)


@dataclass(frozen=True, slots=True)
class PairCounts:
    """What the shadow compared.

    `agree + disagree + failed` is the number of pairs. `wins`, `losses` and `ties` are the
    decided ones among them, by label, schema or failure; the rest still waits for a person.
    `only_stable_valid` and `only_candidate_valid` are the pairs of which one side alone satisfies
    the route's schema.
    """

    agree: int = 0
    disagree: int = 0
    failed: int = 0
    wins: int = 0
    losses: int = 0
    ties: int = 0
    only_stable_valid: int = 0
    only_candidate_valid: int = 0

    @property
    def total(self) -> int:
        return self.agree + self.disagree + self.failed


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known about one trial.

    `strata` hold the canary's units by the weight under which they came, `floor` the pairs of
    stable's answers with stable's own second answers (the A/A floor).
    """

    route: str
    trial: str
    stable: ArmCounts = field(default_factory=ArmCounts)
    candidate: ArmCounts = field(default_factory=ArmCounts)
    pairs: PairCounts = field(default_factory=PairCounts)
    strata: tuple[Stratum, ...] = ()
    floor: PairCounts = field(default_factory=PairCounts)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a gate says, with the numbers that a person needs to check it.

    `value` is the e-value that decided (or stands highest), `threshold` what it has to reach;
    `values` has those of all sides. `needed` forecasts how many more units a decision takes at the
    present rates, or None. `units` and `needed` count `counted`.

    `estimate` is what the gate measures: the candidate's rate less stable's, or its share of the
    wins. It lies between `low` and `high`, however often one looks, and `limit` is the worst that
    may pass. `details` are numbers beside it, by name. `hold` is whether only a person can go on.
    """

    gate: str
    outcome: Literal["pass", "fail", "inconclusive"]
    value: float
    threshold: float
    units: int
    reason: str
    needed: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    counted: str = "units"
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    details: Mapping[str, float] = field(default_factory=dict)
    hold: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """One version's result on one suite; the interval is at 95 %."""

    version: str
    correct: int
    total: int
    low: float
    high: float
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        return self.correct / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation of a version against its parent on the same rows. Immutable.

    `gained` and `lost` are the rows that only one of the two got right; `p_value` is McNemar's
    exact two-sided one. `id` is the sha256 of the report without it.
    """

    id: str
    route: str
    version: str
    parent: str
    suite: str
    scores: tuple[Score, ...]
    gained: int
    lost: int
    p_value: float
    outcome: Literal["pass", "fail", "inconclusive"]
    reason: str
    created_at: datetime
