"""Other rules that roll a canary back, on the same streams of units or pairs as our gates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from benchmarks.trials import Bets, Flags, Floats, coin_factors, one_hot, rate_factors
from rollout.statistics import RISK_WEIGHTS

# So many looks make a chunk, and a window of Flagger's: some 100 units of the candidate.
WINDOW = 200
# Before so many units (or pairs) the rules that trust a normal law say nothing.
BURN_IN = 100


@dataclass(frozen=True, slots=True)
class Effect:
    """Two rates, or a share of wins among discordant pairs; what a stream is drawn from."""

    name: str
    stable: float
    candidate: float
    paired: bool = False
    discordant: float = 0.1

    @property
    def difference(self) -> float:
        """By unit, or by pair (losses less wins)."""
        if self.paired:
            return self.discordant * (self.candidate - self.stable)
        return self.candidate - self.stable

    def oracle(self, alpha: float) -> float:
        """Units an arm, or pairs, that Wald's test takes if it knows the truth: ln(1/α)/KL."""
        if self.paired:
            each = self.discordant * _divergence(self.candidate, 0.5)
        else:
            middle = (self.stable + self.candidate) / 2
            each = _divergence(self.stable, middle) + _divergence(self.candidate, middle)
        return math.log(1.0 / alpha) / each

    @property
    def looks_by_unit(self) -> float:
        """A look sees one unit, and an arm gets every second one."""
        return 1.0 if self.paired else 2.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next looks of many streams.

    `outcomes` are one-hot as the gates read them, `units` the looks so far. `difference` is the
    candidate's mean less stable's after each look, `variance` the estimated one of that. `window`
    is the candidate's share of bad units in this chunk, or losses less wins by pair.
    """

    outcomes: Floats
    units: Floats
    difference: Floats
    variance: Floats
    window: Floats


class Rule(Protocol):
    name: str

    def see(self, chunk: Chunk) -> Flags:
        """For each stream and look whether the candidate is to be rolled back."""

    def keep(self, alive: Flags) -> None:
        """Go on with these streams alone."""


class Ours:
    """A gate of ours, at the part of alpha that it has."""

    def __init__(self, name: str, effect: Effect, streams: int, alpha: float) -> None:
        self.name = name
        self._bets = Bets.start(streams, RISK_WEIGHTS)
        self._goal = math.log(1.0 / alpha)
        # Pairs come as (lost, won, neither): to win is to be even with a loss of the other side.
        coins = np.vstack([coin_factors(0.5), np.zeros((1, len(RISK_WEIGHTS)))])
        self._factors = coins if effect.paired else rate_factors("errors", 0.5)

    def see(self, chunk: Chunk) -> Flags:
        return self._bets.see(chunk.outcomes, self._factors) >= self._goal

    def keep(self, alive: Flags) -> None:
        self._bets.growth = self._bets.growth[alive]


class Normal:
    """A rule on the difference and its estimated variance alone."""

    def __init__(self, name: str, reached: Callable[[Floats, Floats, Floats], Flags]) -> None:
        self.name = name
        self._reached = reached

    def see(self, chunk: Chunk) -> Flags:
        usable = (chunk.units >= BURN_IN) & (chunk.variance > 0.0)
        variance = np.where(usable, chunk.variance, 1.0)
        return usable & self._reached(chunk.units, chunk.difference, variance)

    def keep(self, alive: Flags) -> None:
        pass


class Flagger:
    """A fixed threshold over a window, and a number of failed checks."""

    def __init__(self, threshold: float, streams: int, checks: int = 5) -> None:
        self.name = "Flagger"
        self._threshold = threshold
        self._failed: NDArray[np.int64] = np.zeros(streams, dtype=np.int64)
        self._checks = checks

    def see(self, chunk: Chunk) -> Flags:
        self._failed = self._failed + (chunk.window > self._threshold)
        flags = np.zeros(chunk.difference.shape, dtype=np.bool_)
        flags[:, -1] = self._failed >= self._checks
        return flags

    def keep(self, alive: Flags) -> None:
        self._failed = self._failed[alive]


def rules(effect: Effect, tuned_to: Effect, streams: int, alpha: float, gates: int) -> list[Rule]:
    """Ours alone and among `gates`, and the others, each tuned to the true effect as ours is not.

    All look for a worse candidate only, so all are one-sided at alpha; the two that were published
    two-sided are shown in both ways.
    """
    looks = tuned_to.oracle(alpha) * tuned_to.looks_by_unit
    rho2 = (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / looks
    tau2 = tuned_to.difference**2
    threshold = tuned_to.difference / 2 + (0.0 if tuned_to.paired else tuned_to.stable)
    z = 1.6448536269514722
    return [
        Ours("Sluice", effect, streams, alpha),
        Ours(f"Sluice, 1 of {gates} gates", effect, streams, alpha / gates),
        Normal("AsympCS", lambda n, d, v: d > _asymp(n, v, rho2, alpha)),
        Normal("AsympCS, one-sided", lambda n, d, v: d > _asymp_one_sided(n, v, rho2, alpha)),
        Normal("mSPRT", lambda _, d, v: (d > 0) & (_msprt(d, v, tau2) >= math.log(1 / alpha))),
        Normal(
            "mSPRT, one-sided",
            lambda _, d, v: (
                _msprt(d, v, tau2) + np.log(2 * ndtr(d * np.sqrt(tau2 / (v * (v + tau2)))) + 1e-300)
                >= math.log(1 / alpha)
            ),
        ),
        Normal("z-test, peeking", lambda _, d, v: d > z * np.sqrt(v)),
        Flagger(threshold, streams),
    ]


def _asymp(n: Floats, variance: Floats, rho2: float, alpha: float) -> Floats:
    """Half the width of Waudby-Smith et al.'s asymptotic confidence sequence."""
    width: Floats = np.sqrt(
        variance * 2 * (n * rho2 + 1) / (n * rho2) * np.log(np.sqrt(n * rho2 + 1) / alpha)
    )
    return width


def _asymp_one_sided(n: Floats, variance: Floats, rho2: float, alpha: float) -> Floats:
    width: Floats = np.sqrt(
        variance * 2 * (n * rho2 + 1) / (n * rho2) * np.log1p(np.sqrt(n * rho2 + 1) / (2 * alpha))
    )
    return width


def _msprt(difference: Floats, variance: Floats, tau2: float) -> Floats:
    """The logarithm of Johari et al.'s mixture likelihood ratio, with a normal prior."""
    log_ratio: Floats = 0.5 * np.log(variance / (variance + tau2)) + tau2 * difference**2 / (
        2 * variance * (variance + tau2)
    )
    return log_ratio


class Streams:
    """Units that go to either arm by a coin, or pairs; the same for every rule."""

    def __init__(self, effect: Effect, streams: int, dice: np.random.Generator) -> None:
        self._effect = effect
        self._dice = dice
        self._counts: Floats = np.zeros((streams, 3 if effect.paired else 4))
        self._units = 0

    def next(self) -> Chunk:
        effect, streams = self._effect, len(self._counts)
        luck = self._dice.random((2, streams, WINDOW))
        outcomes: Floats
        if effect.paired:
            decided = luck[0] < effect.discordant
            lost = luck[1] < effect.candidate
            outcomes = np.stack([lost & decided, ~lost & decided, ~decided], -1).astype(np.float64)
        else:
            candidate = luck[0] < 0.5
            bad = luck[1] < np.where(candidate, effect.candidate, effect.stable)
            outcomes = one_hot(candidate, bad)
        counts = self._counts[:, None, :] + outcomes.cumsum(axis=1)
        here = counts[:, -1] - self._counts
        units = self._units + 1.0 + np.arange(WINDOW)
        self._units += WINDOW
        self._counts = counts[:, -1]
        if effect.paired:
            difference = (counts[..., 0] - counts[..., 1]) / units
            variance = ((counts[..., 0] + counts[..., 1]) / units - difference**2) / units
            return Chunk(outcomes, units, difference, variance, (here[:, 0] - here[:, 1]) / WINDOW)
        ours, theirs = counts[..., 0] + counts[..., 1], counts[..., 2] + counts[..., 3]
        ours, theirs = np.maximum(ours, 1.0), np.maximum(theirs, 1.0)
        rate, stable = counts[..., 0] / ours, counts[..., 2] / theirs
        return Chunk(
            outcomes,
            units,
            rate - stable,
            rate * (1.0 - rate) / ours + stable * (1.0 - stable) / theirs,
            here[:, 0] / np.maximum(here[:, 0] + here[:, 1], 1.0),
        )

    def keep(self, alive: Flags) -> None:
        self._counts = self._counts[alive]


def first_alarms(
    rules: Sequence[Rule], streams: Streams, rollouts: int, most_looks: int
) -> dict[str, Floats]:
    """The look of each rule's first alarm; infinity for none.

    A stream ends when all rules have raised one, or after `most_looks`.
    """
    at = {rule.name: np.full(rollouts, np.inf) for rule in rules}
    alive = np.arange(rollouts)
    for past in range(0, most_looks, WINDOW):
        chunk = streams.next()
        for rule in rules:
            flags = rule.see(chunk)
            new = flags.any(axis=1) & np.isinf(at[rule.name][alive])
            at[rule.name][alive[new]] = past + 1 + flags[new].argmax(axis=1)
        waiting = np.zeros(len(alive), dtype=np.bool_)
        for first in at.values():
            waiting |= np.isinf(first[alive])
        if not waiting.any():
            break
        if waiting.mean() < 0.9:
            streams.keep(waiting)
            for rule in rules:
                rule.keep(waiting)
            alive = alive[waiting]
    return at


def _divergence(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
