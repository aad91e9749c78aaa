"""Many simulated rollouts side by side, and what the gates make of them after every unit."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rollout.evidence import Evidence, PairCounts, Stratum, UnitCounts
from rollout.gates import RATES
from rollout.plans import GATES
from rollout.policy import Policy
from rollout.statistics import (
    BOLDNESS_WEIGHTS,
    RISK_WEIGHTS,
    Tally,
    margin_growth,
    risk_growth,
)

Floats = NDArray[np.floating]
Flags = NDArray[np.bool_]

POLICY = Policy()
# Units at each weight of a plan, in percent: what an operator's canary goes through.
PLAN = ((1.0, 4_000), (10.0, 4_000), (50.0, 4_000))
CHUNK = 250
# Rollouts that are simulated side by side; more need more memory and are no faster.
AT_ONCE = 250
# What the split check's prior weighs; see `rollout.statistics`.
SPLIT_PRIOR = 100.0


@dataclass(frozen=True, slots=True)
class World:
    """Chances of a bad unit for stable, and how much larger the candidate's are; by gate.

    `tide` is how far the chances of both arms swing with the hours, as a part of themselves.
    `rated` is the share of the units that are rated, `discordant` that of the pairs that one side
    wins, `won` the candidate's part of them.
    """

    errors: float = 0.02
    ttft: float = 0.05
    total: float = 0.05
    feedback: float = 0.3
    schema: float = 0.02
    worse: dict[str, float] = field(default_factory=dict)
    rated: float = 0.2
    discordant: float = 0.1
    won: float = 0.5
    tide: float = 0.5

    def chances(self, gate: str, hour: Floats) -> tuple[Floats, Floats]:
        """Stable's and the candidate's at these hours; the difference stays what it is."""
        base = getattr(self, gate) * (1.0 + self.tide * np.sin(hour))
        return base, base + self.worse.get(gate, 0.0)


@dataclass(slots=True)
class Bets:
    """The growth of each bet of a mixture, for many rollouts at once."""

    weights: Floats
    growth: Floats  # rollouts × bets

    @classmethod
    def start(cls, rollouts: int, weights: Sequence[float]) -> "Bets":
        return cls(np.asarray(weights), np.zeros((rollouts, len(weights))))

    def see(self, outcomes: Floats, factors: Floats) -> Floats:
        """Outcomes: rollouts × looks × kinds of units, one-hot; returns log E after each look."""
        seen = self.growth[:, None, :] + outcomes.cumsum(axis=1) @ factors
        most = seen.max(axis=2)
        self.growth = seen[:, -1, :]
        log_e: Floats = most + np.log(np.exp(seen - most[..., None]) @ self.weights)
        return log_e


def factors(growth: Callable[[Tally], list[float]], weight: float) -> Floats:
    """What a bad and a good unit of the candidate's and of stable's make of each bet."""
    units = (
        Tally(weight, 1, 1, 0, 0),
        Tally(weight, 1, 0, 0, 0),
        Tally(weight, 0, 0, 1, 1),
        Tally(weight, 0, 0, 1, 0),
    )
    return np.asarray([growth(unit) for unit in units])


def rate_factors(gate: str, weight: float) -> Floats:
    """Of the bets on "worse" of a gate on rates."""
    return factors(lambda unit: risk_growth(unit, RATES[gate].centre), weight)


def room_factors(gate: str, weight: float) -> Floats:
    """Of its bets on "not worse than the margin"."""
    rule = RATES[gate]
    return factors(lambda unit: margin_growth(unit, rule.centre, rule.margin(POLICY)), weight)


def one_hot(candidate: Flags, bad: Flags, counted: Flags | None = None) -> Floats:
    """Rollouts × looks × (candidate's bad, good, stable's bad, good)."""
    kinds = np.stack([candidate & bad, candidate & ~bad, ~candidate & bad, ~candidate & ~bad], -1)
    if counted is not None:
        kinds &= counted[..., None]
    return kinds.astype(np.float64)


def first(reached: Flags) -> NDArray[np.int64]:
    """The first look at which it was reached, from 0; the number of looks where it wasn't."""
    when: NDArray[np.int64] = np.where(
        reached.any(axis=1), reached.argmax(axis=1), reached.shape[1]
    )
    return when


@dataclass(slots=True)
class Looks:
    """Of many rollouts, the unit after which something was first so; 0 for never."""

    at: NDArray[np.int64]
    seen: int = 0

    @classmethod
    def start(cls, rollouts: int) -> "Looks":
        return cls(np.zeros(rollouts, dtype=np.int64))

    def note(self, reached: Flags) -> None:
        when = first(reached)
        new = (self.at == 0) & (when < reached.shape[1])
        self.at[new] = self.seen + when[new] + 1
        self.seen += reached.shape[1]

    @property
    def share(self) -> float:
        return float((self.at > 0).mean())


@dataclass(slots=True)
class Trial:
    """Many rollouts side by side, under all gates, along the plan."""

    world: World
    rollouts: int
    dice: np.random.Generator
    worse: dict[str, Bets]
    within: dict[str, Bets]
    counts: dict[str, list[Floats]]

    @classmethod
    def start(cls, world: World, rollouts: int, dice: np.random.Generator) -> "Trial":
        return cls(
            world,
            rollouts,
            dice,
            {gate: Bets.start(rollouts, RISK_WEIGHTS) for gate in GATES},
            {
                gate: Bets.start(rollouts, RISK_WEIGHTS if gate == "pairs" else BOLDNESS_WEIGHTS)
                for gate in GATES
            },
            {gate: [] for gate in (*RATES, "pairs", "schema", "units")},
        )

    def run(self) -> Iterator[tuple[dict[str, Floats], dict[str, Floats], Floats]]:
        """Log E for "worse" and for "not worse" by gate, and of the split, by chunk of units."""
        past = 0
        split_before = np.zeros(self.rollouts)
        for percent, units in PLAN:
            arms = np.zeros((self.rollouts, 2))
            evidence = SplitEvidence(percent / 100.0, units)
            for name in (*RATES, "units"):
                self.counts[name].append(np.zeros((self.rollouts, 4)))
            for begin in range(0, units, CHUNK):
                looks = min(CHUNK, units - begin)
                hour = (past + begin + np.arange(looks)) * (2 * math.pi / 3_000)
                candidate = self.dice.random((self.rollouts, looks)) < percent / 100.0
                worse, within = self._units(candidate, hour, percent / 100.0)
                self._pairs(looks, hour, worse, within)
                got = arms[:, :1] + candidate.cumsum(axis=1)
                total = begin + 1 + np.arange(looks)
                split = split_before[:, None] + evidence.after(got.astype(np.int64), total)
                arms[:, 0] = got[:, -1]
                if begin + looks == units:
                    split_before = split[:, -1]
                yield worse, within, split
            past += units

    def _units(
        self, candidate: Flags, hour: Floats, weight: float
    ) -> tuple[dict[str, Floats], dict[str, Floats]]:
        worse, within = {}, {}
        luck = self.dice.random((len(RATES) + 1, *candidate.shape))
        rated = luck[-1] < self.world.rated
        everyone = np.ones_like(rated)
        self.counts["units"][-1] += one_hot(candidate, everyone).sum(axis=1)
        for gate, own in zip(RATES, luck, strict=False):
            stable, ours = self.world.chances(gate, hour)
            bad = own < np.where(candidate, ours, stable)
            outcomes = one_hot(candidate, bad, rated if gate == "feedback" else everyone)
            self.counts[gate][-1] += outcomes.sum(axis=1)
            risk = rate_factors(gate, weight)
            room = room_factors(gate, weight)
            worse[gate] = self.worse[gate].see(outcomes, risk)
            within[gate] = self.within[gate].see(outcomes, room)
        return worse, within

    def _pairs(
        self, looks: int, hour: Floats, worse: dict[str, Floats], within: dict[str, Floats]
    ) -> None:
        """One pair for each unit; a coin says whose answer it is that fails alone."""
        luck = self.dice.random((3, self.rollouts, looks))
        decided = luck[0] < self.world.discordant
        won = luck[1] < self.world.won
        coins = np.stack([won & decided, ~won & decided], -1).astype(np.float64)
        if not self.counts["pairs"]:
            self.counts["pairs"].append(np.zeros((self.rollouts, 2)))
            self.counts["schema"].append(np.zeros((self.rollouts, 3)))
        self.counts["pairs"][0] += coins.sum(axis=1)
        worse["pairs"] = self.worse["pairs"].see(coins, coin_factors(0.5)[::-1])
        # Whoever wins is at odds with a share of 1/2 less the margin.
        within["pairs"] = self.within["pairs"].see(coins, coin_factors(0.5 - POLICY.margin))
        stable, ours = self.world.chances("schema", hour)
        lost, gained = luck[2] < ours, luck[2] > 1.0 - stable
        neither = ~(lost | gained)
        kinds = np.stack([lost, gained, neither], -1).astype(np.float64)
        self.counts["schema"][0] += kinds.sum(axis=1)
        risk = factors(lambda unit: risk_growth(unit, 0.0), 0.5)
        room = factors(lambda unit: margin_growth(unit, 0.0, 2 * POLICY.schema_margin), 0.5)
        worse["schema"] = self.worse["schema"].see(kinds, risk[[0, 2, 1]])
        within["schema"] = self.within["schema"].see(kinds, room[[0, 2, 1]])

    def evidence(self, index: int) -> Evidence:
        """What the store would hold for one rollout at the end."""
        strata = []
        for number, (percent, _) in enumerate(PLAN):
            row = {gate: self.counts[gate][number][index] for gate in (*RATES, "units")}
            strata.append(Stratum(percent, candidate=_arm(row, 0), stable=_arm(row, 2)))
        wins, losses = self.counts["pairs"][0][index]
        lost, gained, neither = self.counts["schema"][0][index]
        pairs = PairCounts(
            agree=int(neither),
            disagree=int(lost + gained),
            wins=int(wins),
            losses=int(losses),
            only_stable_valid=int(lost),
            only_candidate_valid=int(gained),
        )
        return Evidence("simulated", "simulated@2.1", pairs=pairs, strata=tuple(strata))


def _arm(row: dict[str, Floats], first_kind: int) -> UnitCounts:
    def of(gate: str) -> int:
        return int(row[gate][first_kind])

    return UnitCounts(
        units=of("units"),
        errors=of("errors"),
        slow_first_token=of("ttft"),
        slow_total=of("total"),
        rated=int(row["feedback"][first_kind] + row["feedback"][first_kind + 1]),
        bad=of("feedback"),
    )


def coin_factors(p0: float) -> Floats:
    """What a win and a loss make of each bet on "wins more than p0"."""
    return factors(lambda unit: risk_growth(unit, 0.0), p0)[[0, 2]]


class SplitEvidence:
    """Log E of the split check, by the candidate's units and those of both arms."""

    def __init__(self, weight: float, units: int) -> None:
        counts = range(units + 1)
        self._weight = weight
        prior = SPLIT_PRIOR * weight, SPLIT_PRIOR * (1.0 - weight), SPLIT_PRIOR
        self._ours, self._theirs, self._both = (
            np.asarray([math.lgamma(each + n) - math.lgamma(each) for n in counts])
            for each in prior
        )

    def after(self, candidate: NDArray[np.int64], units: NDArray[np.int64]) -> Floats:
        stable = units - candidate
        log_e: Floats = (
            self._ours[candidate]
            + self._theirs[stable]
            - self._both[units]
            - candidate * math.log(self._weight)
            - stable * math.log1p(-self._weight)
        )
        return log_e
