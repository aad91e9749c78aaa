"""E-values for arms and pairs, and the intervals that hold however often one looks.

An e-value measures evidence against a hypothesis H0: it is not negative, and its expectation under
H0 is at most 1. A sequence of them that is bounded by a supermartingale under H0 is an e-process:
by Ville's inequality the chance that it *ever* reaches 1/alpha is at most alpha, so one may look
after every unit and stop whenever one likes. All here are functions of cumulative counts alone, so
a verdict can be computed again from what is stored.

Two arms. A unit goes to the candidate with a known chance w, whatever it asks and whatever came
before. Let x be 1 if it turns out bad and else 0, b any constant, and

    y = (x - b)/w for a unit of the candidate,    -(x - b)/(1-w) for one of stable.

Given the past, E[y] is the candidate's chance of a bad unit less stable's, for this very unit and
whatever b is. So under H0 "the candidate's chance is at most stable's plus m" a bet l >= 0 on the
opposite has the factor 1 + l(y - m) with an expectation of at most 1, and the product over the
units is a supermartingale wherever no factor can be negative. That holds though both chances drift
with the hours, and over several strata, each with a w of its own, in whatever order their units
come. A mixture of bets, with weights that were fixed beforehand, is one again; it does well where
any of its bets does. With b = 0 and m = 0 it only flips coins: a bad unit is the candidate's with
chance w under H0, or w·r/(1 + w(r-1)) at r times stable's rate, and the units that went well drop
out. With b the rate of both arms together, it is the likelihood ratio of the safe 2x2 test. b is
therefore a guess of that rate: a wrong one costs units, never validity.

Pairs. A pair that only one side won is a coin too, with w in place of the share of wins under H0.

Sources: Robbins (1970), Statistical methods related to the law of the iterated logarithm (the
mixture); Ville (1939); Waudby-Smith and Ramdas (2024), Estimating means of bounded random
variables by betting; Turner, Ly and Grünwald (2024), Generic e-variables for exact sequential
k-sample tests; Lindon and Malek (2022), Anytime-valid inference for multinomial count data (the
split); Grünwald, de Heide and Koolen (2024), Safe testing; McNemar (1947) (discordant pairs only).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rollout.binomial import log_beta

# The bets on "worse" are on these relative risks (or odds, for pairs). Evenly in the logarithm,
# most weight about 2, where it costs least to be right: the mean number of units until E >= 20 is
# within 1.2 of one's who knows the rates, from 60:40 to 80:20 (computed exactly; see the tests and
# `make bench-evidence`). A tenth of the weight is spread evenly, so that no effect is out of reach.
RISKS = tuple(1.02 * (40.0 / 1.02) ** (index / 23) for index in range(24))
_BELLS = tuple(math.exp(-0.5 * ((math.log(risk) - math.log(2.0)) / 0.5) ** 2) for risk in RISKS)
RISK_WEIGHTS = tuple(0.9 * bell / sum(_BELLS) + 0.1 / 24 for bell in _BELLS)
# The bets on "not worse than the margin" are these parts of the boldest one. The bold ones win
# where hardly anything is bad in either arm, which is what a margin is mostly asked about.
_BOLDNESS = (0.03, 0.06, 0.12, 0.25, 0.4, 0.6, 0.8, 0.95)
BOLDNESS_WEIGHTS = (1 / 15, 1 / 15, 1 / 15, 1 / 15, 2 / 15, 2 / 15, 3 / 15, 4 / 15)
# The prior over the true split has the weight of so many units at the intended one.
_SPLIT_PRIOR = 100.0
# A larger e-value is given as this one, e^690: it still fits a float, and JSON has no infinity.
_MOST_LOG_EVIDENCE = 690.0
# Beyond this nobody waits, and a forecast says None.
_FARTHEST_FORECAST = 10_000_000


@dataclass(frozen=True, slots=True)
class Tally:
    """Units of one stratum, `weight` the chance of the candidate in (0, 1), and how many were bad.

    Floats, for a forecast counts units that have not come.
    """

    weight: float
    candidate: float
    candidate_bad: float
    stable: float
    stable_bad: float


def evidence_of(log_evidence: float) -> float:
    """The e-value, cut off at e^690, about 10^299. Less evidence than there is remains valid."""
    return math.exp(min(_MOST_LOG_EVIDENCE, log_evidence))


def log_evidence_worse(tallies: Sequence[Tally], centre: float, beyond: float = 0.0) -> float:
    """The logarithm of the e-value against H0: the candidate's rate is at most stable's + `beyond`.

    `centre` in [0, 1) is b above. The bets are on relative risks, one risk for all strata.
    """
    return _mixed([risk_growth(tally, centre, beyond) for tally in tallies], RISK_WEIGHTS)


def log_evidence_not_worse(tallies: Sequence[Tally], centre: float, margin: float) -> float:
    """The logarithm of the e-value against H0: the candidate's rate is at least stable's + `margin`.

    It rises with the margin. The bets are shares of the boldest one that no unit can ruin.
    """
    return _mixed([margin_growth(tally, centre, margin) for tally in tallies], BOLDNESS_WEIGHTS)


def risk_growth(tally: Tally, centre: float, beyond: float = 0.0) -> list[float]:
    """The logarithm of what these units make of each bet on "worse"."""
    return _growth(tally, _risk_bets(tally.weight, centre), centre, beyond)


def margin_growth(tally: Tally, centre: float, margin: float) -> list[float]:
    """The logarithm of what these units make of each bet on "not worse than the margin".

    The bets do not depend on the margin, so that all margins that are refuted make an interval.
    """
    return _growth(tally, _margin_bets(tally.weight, centre), centre, margin)


def difference(tallies: Sequence[Tally]) -> float | None:
    """The candidate's rate less stable's: the strata's, weighed by what they tell."""
    both = [t for t in tallies if t.candidate and t.stable]
    if not both:
        return None
    weights = [t.candidate * t.stable / (t.candidate + t.stable) for t in both]
    differences = [t.candidate_bad / t.candidate - t.stable_bad / t.stable for t in both]
    return sum(w * d for w, d in zip(weights, differences, strict=True)) / sum(weights)


@lru_cache(maxsize=4096)
def difference_bounds(
    tallies: tuple[Tally, ...], centre: float, fail: float, passing: float
) -> tuple[float, float]:
    """Between which the candidate's rate less stable's lies: all that neither e-process refutes.

    Above the low one at confidence 1 - 1/`fail`, below the high one at 1 - 1/`passing`, at
    every look. The low one is above 0 where `log_evidence_worse` has reached `fail`, the high one
    below the margin where `log_evidence_not_worse` has reached `passing`.
    """

    def above(mirrored: float) -> float:
        return log_evidence_worse(tallies, centre, -mirrored) - math.log(fail)

    def below(bound: float) -> float:
        return log_evidence_not_worse(tallies, centre, bound) - math.log(passing)

    seen = difference(tallies)
    near = (None, None) if seen is None else (-seen, seen)
    return -_crossing(above, -1.0, 1.0, near[0]), _crossing(below, -1.0, 1.0, near[1])


def log_evidence_split(candidate: int, stable: int, weight: float) -> float:
    """The logarithm of the e-value against H0: each unit is the candidate's with chance `weight`.

    Lindon and Malek's, for two arms: the marginal likelihood under a Beta prior about the
    intended split, over the likelihood at the intended split.
    """
    prior = _SPLIT_PRIOR * weight, _SPLIT_PRIOR * (1.0 - weight)
    return (
        log_beta(prior[0] + candidate, prior[1] + stable)
        - log_beta(*prior)
        - candidate * math.log(weight)
        - stable * math.log1p(-weight)
    )


@lru_cache(maxsize=4096)
def share_bounds(hits: int, total: int, alpha: float) -> tuple[float, float]:
    """A confidence sequence for a share: it holds at every look with confidence 1 - `alpha`.

    All shares that a mixture over Beta(1/2, 1/2) does not refute (Robbins 1970).
    """
    if total == 0:
        return 0.0, 1.0
    misses = total - hits
    marginal = log_beta(0.5 + hits, 0.5 + misses) - log_beta(0.5, 0.5)
    share = hits / total

    def refuted(p: float) -> float:
        likelihood = _times(hits, _log(p)) + _times(misses, _log(1.0 - p))
        return marginal - likelihood + math.log(alpha)

    low = 0.0 if hits == 0 else -_crossing(lambda p: refuted(-p), -share, 0.0)
    high = 1.0 if misses == 0 else _crossing(refuted, share, 1.0)
    return low, high


def _units_needed(
    now: Sequence[float], each: Sequence[float], weights: Sequence[float], goal: float
) -> int | None:
    """How many more units bring a mixture from `now` to `goal`, if every unit adds `each`.

    All in logarithms, by bet. 0 where it is there already; None where it never gets there, or
    not within ten million units.
    """

    def reaches(more: int) -> bool:
        grown = [_times(more, rate) for rate in each]
        return _mixed([now, grown], weights) >= goal

    if reaches(0):
        return 0
    if max(each) <= 0.0:
        return None
    return _first(reaches)


@lru_cache(maxsize=4096)
def worse_needed(
    tallies: tuple[Tally, ...], expected: Tally, centre: float, threshold: float
) -> int | None:
    """How many more units until "worse" is proved, if `expected` is what one unit is on average."""
    return _units_needed(
        _sum(risk_growth(tally, centre) for tally in tallies),
        risk_growth(expected, centre),
        RISK_WEIGHTS,
        math.log(threshold),
    )


@lru_cache(maxsize=4096)
def not_worse_needed(
    tallies: tuple[Tally, ...], expected: Tally, centre: float, margin: float, threshold: float
) -> int | None:
    """How many more units until "not worse than the margin" is proved; see `worse_needed`."""
    return _units_needed(
        _sum(margin_growth(tally, centre, margin) for tally in tallies),
        margin_growth(expected, centre, margin),
        BOLDNESS_WEIGHTS,
        math.log(threshold),
    )


def evidence_above(wins: float, losses: float, p0: float) -> float:
    """E-value against H0: "the chance of a win is at most p0"; see `log_evidence_above`."""
    return evidence_of(log_evidence_above(wins, losses, p0))


def evidence_below(wins: float, losses: float, p0: float) -> float:
    """E-value against H0: "the chance of a win is at least p0"; the mirror of `evidence_above`."""
    return evidence_of(log_evidence_below(wins, losses, p0))


def log_evidence_above(wins: float, losses: float, p0: float) -> float:
    """The natural logarithm of the e-value against H0: P(win) <= p0.

    The chance of a win may change from pair to pair, as long as it stays <= p0 given the past.
    """
    if not 0.0 < p0 < 1.0:
        raise ValueError(f"p0 is {p0}: a share lies between 0 and 1")
    if wins < 0 or losses < 0:
        raise ValueError(f"{wins} wins and {losses} losses: counts are not negative")
    return log_evidence_worse([_coins(wins, losses, p0)], 0.0)


def log_evidence_below(wins: float, losses: float, p0: float) -> float:
    """The natural logarithm of the e-value against H0: P(win) >= p0.

    A share of wins of at least p0 is a share of losses of at most 1 - p0.
    """
    return log_evidence_above(losses, wins, 1.0 - p0)


@lru_cache(maxsize=4096)
def win_bounds(wins: int, losses: int, fail: float, passing: float) -> tuple[float, float]:
    """Between which the chance of a win lies, at every look.

    Below the high one at confidence 1 - 1/`fail`, above the low one at 1 - 1/`passing`: all that
    `evidence_below` and `evidence_above` do not refute at these thresholds.
    """
    tiny = 1e-6

    def below(p0: float) -> float:
        return log_evidence_below(wins, losses, p0) - math.log(fail)

    def above(mirrored: float) -> float:
        return log_evidence_above(wins, losses, 1.0 - mirrored) - math.log(passing)

    low = 0.0 if wins == 0 else 1.0 - _crossing(above, tiny, 1.0 - tiny)
    high = 1.0 if losses == 0 else _crossing(below, tiny, 1.0 - tiny)
    return low, high


def pairs_needed_above(wins: int, losses: int, p0: float, threshold: float) -> int | None:
    """How many more decided pairs bring `evidence_above` to `threshold` if the rate stays as it is.

    0 where it is there already; None where the present rate never gets there, or not within ten
    million pairs. A forecast, not a bound: the rate is estimated from the same few pairs.
    """
    decided = wins + losses
    coins = _coins(wins, losses, p0)
    if decided == 0:
        return None
    return worse_needed((coins,), _coins(wins / decided, losses / decided, p0), 0.0, threshold)


def pairs_needed_below(wins: int, losses: int, p0: float, threshold: float) -> int | None:
    """The mirror of `pairs_needed_above`."""
    return pairs_needed_above(losses, wins, 1.0 - p0, threshold)


def _coins(wins: float, losses: float, p0: float) -> Tally:
    """Decided pairs as units that were all bad, a win being the candidate's."""
    return Tally(p0, wins, wins, losses, losses)


@lru_cache(maxsize=1024)
def _risk_bets(weight: float, centre: float) -> tuple[float, ...]:
    """For each risk the bet that grows fastest if it is true and `centre` is the rate of both arms.

    Capped where a good unit of the candidate would ruin it.
    """
    others = 1.0 - weight
    boldest = 0.95 * weight / centre if centre > 0.0 else math.inf
    return tuple(
        min(boldest, weight * others * (risk - 1) / ((1 - centre) * (1 + weight * (risk - 1))))
        for risk in RISKS
    )


@lru_cache(maxsize=1024)
def _margin_bets(weight: float, centre: float) -> tuple[float, ...]:
    """Shares of the boldest bet on "better" that no unit can ruin at a margin of 0 or more."""
    boldest = weight / (1.0 - centre)
    if centre > 0.0:
        boldest = min(boldest, (1.0 - weight) / centre)
    return tuple(-part * boldest for part in _BOLDNESS)


def _growth(tally: Tally, bets: Sequence[float], centre: float, beyond: float) -> list[float]:
    """The sum over the units of log(1 + l(y - beyond)), for each bet l."""
    others = 1.0 - tally.weight
    gains = (
        ((1.0 - centre) / tally.weight - beyond, tally.candidate_bad),
        (-centre / tally.weight - beyond, tally.candidate - tally.candidate_bad),
        (-(1.0 - centre) / others - beyond, tally.stable_bad),
        (centre / others - beyond, tally.stable - tally.stable_bad),
    )
    least, most = min(gains)[0], max(gains)[0]
    seen = [(gain, count) for gain, count in gains if count]
    growth = []
    for bet in bets:
        # A factor below 0, put at 0, would let the expectation exceed 1: such a bet is not made.
        if 1.0 + bet * least < 0.0 or 1.0 + bet * most < 0.0:
            growth.append(-math.inf)
            continue
        total = 0.0
        for gain, count in seen:
            factor = 1.0 + bet * gain
            total += count * math.log(factor) if factor > 0.0 else -math.inf
        growth.append(total)
    return growth


def _mixed(growth: Iterable[Sequence[float]], weights: Sequence[float]) -> float:
    """The logarithm of the weighted mean of the products of what each stratum made of each bet."""
    totals = _sum(growth)
    if not totals:
        return 0.0
    most = max(totals)
    if most == -math.inf:
        return -math.inf
    mixed = sum(
        weight * math.exp(total - most) for weight, total in zip(weights, totals, strict=True)
    )
    return most + math.log(mixed / sum(weights))


def _sum(growth: Iterable[Sequence[float]]) -> list[float]:
    return [sum(bet) for bet in zip(*growth, strict=True)]


def _crossing(
    excess: Callable[[float], float], low: float, high: float, near: float | None = None
) -> float:
    """Where a rising function reaches 0 in (low, high], from above, to 1e-4; `high` if nowhere.

    From a guess that it lies a little above `near` it walks with doubled steps, then goes on by
    false position after Illinois, with bisection where a value is infinite.
    """
    step = 0.01
    low_end, high_end = low, high
    if near is not None and low < near < high:
        at_low = excess(near)
        if at_low < 0.0:
            low_end, high_end = near, min(high, near + step)
            while (at_high := excess(high_end)) < 0.0 and high_end < high:
                step *= 2.0
                low_end, at_low, high_end = high_end, at_high, min(high, high_end + step)
        else:
            high_end, at_high, at_low = near, at_low, excess(low)
    else:
        at_low, at_high = excess(low), excess(high)
    if at_low >= 0.0:
        return low_end
    if at_high < 0.0:
        return high_end
    return _between(excess, (low_end, at_low), (high_end, at_high))


def _between(
    excess: Callable[[float], float], below: tuple[float, float], above: tuple[float, float]
) -> float:
    (low, at_low), (high, at_high) = below, above
    side = 0
    while high - low > 1e-4:
        finite = math.isfinite(at_low) and math.isfinite(at_high)
        middle = (low * at_high - high * at_low) / (at_high - at_low) if finite else math.nan
        # Near an end it would creep; a step of half the tolerance brings it over.
        middle = (low + high) / 2 if not finite else min(max(middle, low + 5e-5), high - 5e-5)
        value = excess(middle)
        if value >= 0.0:
            high, at_high = middle, value
            at_low = at_low / 2 if side == 1 else at_low
            side = 1
        else:
            low, at_low = middle, value
            at_high = at_high / 2 if side == -1 else at_high
            side = -1
    return high


def _times(count: float, logarithm: float) -> float:
    """0 times minus infinity is 0 here: what did not happen ruins nothing."""
    return count * logarithm if count else 0.0


def _log(value: float) -> float:
    return math.log(value) if value > 0.0 else -math.inf


def _first(holds: Callable[[int], bool]) -> int | None:
    """The least number from 1 for which a monotone `holds` is true."""
    above = 1
    while not holds(above):
        above *= 2
        if above > _FARTHEST_FORECAST:
            return None
    below = above // 2
    while above - below > 1:
        middle = (below + above) // 2
        if holds(middle):
            above = middle
        else:
            below = middle
    return above
