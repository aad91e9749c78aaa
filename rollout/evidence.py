"""Counts for each arm, pairs, and the reports of evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal


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
    """One version's result on one suite; the interval is at 95 %.

    `correct` rows reached the main scorer's threshold; `score` is the mean of its marks (None in
    reports of older releases, whose marks were right and wrong), `metrics` those of all scorers.
    `way` is what the version stands for: "version", "parent", "base", "prompt" (the base under the
    best prompt that was found) or "larger". `errors` are rows without an answer or a mark: they
    count as wrong. Costs are in `cost_unit` for each right answer. `answers` names the document
    with every row's answer, and `asked_at` says when they were given.
    """

    version: str
    correct: int
    total: int
    low: float
    high: float
    seconds: float = 0.0
    way: str = ""
    score: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    p50_seconds: float = 0.0
    p99_seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_per_success: float | None = None
    cost_unit: str = "tokens"
    errors: int = 0
    answers: str | None = None
    asked_at: datetime | None = None

    @property
    def accuracy(self) -> float:
        return self.correct / self.total if self.total else 0.0

    @property
    def mean(self) -> float:
        """The main metric."""
        return self.accuracy if self.score is None else self.score


@dataclass(frozen=True, slots=True)
class Slice:
    """The rows of a suite that have a tag: the version's score there beside its parent's.

    `low` and `high` bound the difference, each at confidence 1 - alpha. `adjusted_p` is the paired
    test's, after Holm over all slices; `variance` that of one row's difference.
    """

    tag: str
    rows: int
    score: float
    parent_score: float
    gained: int
    lost: int
    low: float
    high: float
    p_value: float
    adjusted_p: float
    variance: float = 0.0


@dataclass(frozen=True, slots=True)
class Beside:
    """The version beside another way to answer the same rows, paired."""

    way: str
    version: str
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p_value: float


@dataclass(frozen=True, slots=True)
class RowError:
    row: str
    version: str
    error: str


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row of a report: what the version and its parent answered, and what that is worth."""

    row: str
    change: Literal["gained", "lost", "same"]
    answer: str
    mark: float
    parent_answer: str
    parent_mark: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation of a version against its parent on the same rows. Immutable.

    `scores` begin with the version's and its parent's. `gained` and `lost` are the rows on which
    one of the two did better; `p_value` is that of the paired test, McNemar's exact two-sided one
    where rows are right or wrong; `low` and `high` bound the difference of the scores at 95 %.
    `id` is the sha256 of the report without it.

    `metric` names the main scorer. `detectable` is the smallest gain that so many rows show four
    times out of five, worked out before the first row was asked, from `churn`: the share of rows
    that was expected to differ. `looks` counts the versions that the suite has judged, this one
    included. `verdicts` are the gate's, `notes` what a reader should know before believing it.
    `prompt` is the best prompt that was found, `errors` the first rows without an answer or a mark.
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
    created_by: str = ""
    run: str = ""
    suite_digest: str = ""
    vault: bool = False
    metric: str = "right"
    low: float | None = None
    high: float | None = None
    detectable: float | None = None
    churn: float | None = None
    looks: int = 0
    slices: tuple[Slice, ...] = ()
    beside: tuple[Beside, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    prompt: tuple[Mapping[str, Any], ...] = ()
    errors: tuple[RowError, ...] = ()
    decoding: str = ""
