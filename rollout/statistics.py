"""E-values for decided pairs, and the intervals and tests that reports quote.

An e-value measures evidence against a hypothesis H0: it is not negative, and its expectation under
H0 is at most 1. A sequence of them that is a supermartingale under H0 is an e-process: by Ville's
inequality the chance that it *ever* reaches 1/alpha is at most alpha, so one may look after every
pair and stop whenever one likes.

Sources: Robbins (1970), Statistical methods related to the law of the iterated logarithm (the
mixture); Ville (1939); Waudby-Smith and Ramdas (2024), Estimating means of bounded random
variables by betting; Grünwald, de Heide and Koolen (2024), Safe testing. Used on the discordant
pairs only, as McNemar (1947) does.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

# The prior over the share of wins is this Beta(a, a), cut off at p0. With 2 the mean number of
# decided pairs until E >= 20 is at most 1.3 times that of a test that knows the true share, for
# shares from 0.6 to 0.8, and 1.6 times at 0.95 (computed exactly; see the tests).
_PRIOR = 2.0
# A larger e-value is given as this one, e^690: it still fits a float, and JSON has no infinity.
_MOST_LOG_EVIDENCE = 690.0
# Beyond this nobody waits, and a forecast says None.
_FARTHEST_FORECAST = 10_000_000


def evidence_above(wins: float, losses: float, p0: float) -> float:
    """E-value against H0: "the chance of a win is at most p0"; see `log_evidence_above`.

    Cut off at e^690, about 10^299. Less evidence than there is remains valid evidence.
    """
    return math.exp(min(_MOST_LOG_EVIDENCE, log_evidence_above(wins, losses, p0)))


def evidence_below(wins: float, losses: float, p0: float) -> float:
    """E-value against H0: "the chance of a win is at least p0"; the mirror of `evidence_above`."""
    return math.exp(min(_MOST_LOG_EVIDENCE, log_evidence_below(wins, losses, p0)))


def log_evidence_above(wins: float, losses: float, p0: float) -> float:
    """The natural logarithm of the e-value against H0: P(win) <= p0.

    E = ∫ (p/p0)^wins ((1-p)/(1-p0))^losses dπ(p), with π the Beta(2, 2) cut off to (p0, 1)

      =  B(a+wins, a+losses) · I(1-p0; a+losses, a+wins)
         ───────────────────────────────────────────────     with a = 2
         B(a, a) · I(1-p0; a, a) · p0^wins (1-p0)^losses

    where B is the beta function and I the regularised incomplete one.

    Valid at every look: for one pair with P(win) = q and any p > p0, the factor's expectation is
    q·p/p0 + (1-q)(1-p)/(1-p0), which grows with q and is 1 at q = p0. So for q <= p0 the integrand
    is a supermartingale from 1 for every p, and so is their mixture, E. That holds though q changes
    from pair to pair, as long as it stays <= p0 given the past.
    """
    if not 0.0 < p0 < 1.0:
        raise ValueError(f"p0 is {p0}: a share lies between 0 and 1")
    if wins < 0 or losses < 0:
        raise ValueError(f"{wins} wins and {losses} losses: counts are not negative")
    posterior = _log_beta(_PRIOR + wins, _PRIOR + losses) + _log_betainc(
        1.0 - p0, _PRIOR + losses, _PRIOR + wins
    )
    prior = _log_beta(_PRIOR, _PRIOR) + _log_betainc(1.0 - p0, _PRIOR, _PRIOR)
    return posterior - prior - wins * math.log(p0) - losses * math.log1p(-p0)


def log_evidence_below(wins: float, losses: float, p0: float) -> float:
    """The natural logarithm of the e-value against H0: P(win) >= p0.

    A share of wins of at least p0 is a share of losses of at most 1 - p0.
    """
    return log_evidence_above(losses, wins, 1.0 - p0)


def pairs_needed_above(wins: int, losses: int, p0: float, threshold: float) -> int | None:
    """How many more decided pairs bring `evidence_above` to `threshold` if the rate stays as it is.

    0 where it is there already; None where the present rate never gets there, or not within ten
    million pairs. A forecast, not a bound: the rate is estimated from the same few pairs.
    """
    goal = math.log(threshold)
    decided = wins + losses
    if log_evidence_above(wins, losses, p0) >= goal:
        return 0
    if decided == 0 or wins / decided <= p0:
        return None
    rate = wins / decided

    def reaches(more: int) -> bool:
        return log_evidence_above(wins + more * rate, losses + more * (1.0 - rate), p0) >= goal

    return _first(reaches)


def pairs_needed_below(wins: int, losses: int, p0: float, threshold: float) -> int | None:
    """The mirror of `pairs_needed_above`."""
    return pairs_needed_above(losses, wins, 1.0 - p0, threshold)


def mcnemar_exact(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p-value for `gained` and `lost` discordant rows; 1 for none.

    Twice the smaller tail of Binomial(gained + lost, 1/2), at most 1. Valid for one look at a
    fixed number of rows, as in an evaluation; a rollout looks often and uses e-values.
    """
    fewer, more = sorted((gained, lost))
    if fewer == more:
        return 1.0
    # P(X <= k) = I(1/2; n-k, k+1)
    return min(1.0, 2.0 * math.exp(_log_betainc(0.5, float(more), fewer + 1.0)))


def wilson(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share; (0, 1) where nothing was counted.

    For one look at a fixed number of rows. Wilson (1927); Brown, Cai and DasGupta (2001).
    """
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    share = correct / total
    scale = 1.0 + z * z / total
    centre = (share + z * z / (2.0 * total)) / scale
    reach = z / scale * math.sqrt(share * (1.0 - share) / total + (z / (2.0 * total)) ** 2)
    low = 0.0 if correct == 0 else max(0.0, centre - reach)
    high = 1.0 if correct == total else min(1.0, centre + reach)
    return low, high


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


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _log_betainc(x: float, a: float, b: float) -> float:
    """The logarithm of the regularised incomplete beta function I(x; a, b).

    By its continued fraction (NIST DLMF 8.17.22), which converges fast below the mean; above it
    by I(x; a, b) = 1 - I(1-x; b, a). In logarithms all the way, so a tail of 10^-100000 is exact.
    """
    if x <= 0.0:
        return -math.inf
    if x >= 1.0:
        return 0.0
    if x > (a + 1.0) / (a + b + 2.0):
        rest = _log_betainc(1.0 - x, b, a)
        return math.log1p(-math.exp(rest)) if rest < 0.0 else -math.inf
    front = a * math.log(x) + b * math.log1p(-x) - math.log(a) - _log_beta(a, b)
    return front + math.log(_fraction(x, a, b))


def _fraction(x: float, a: float, b: float) -> float:
    """1/(1 + d1/(1 + d2/(1 + …))) of the incomplete beta, by the modified Lentz method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0) or tiny)
    value = d
    # It takes about sqrt(max(a, b)) rounds; the limit is for 10^10 pairs.
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / (1.0 + even * d or tiny)
        c = 1.0 + even / c or tiny
        value *= d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1.0 / (1.0 + odd * d or tiny)
        c = 1.0 + odd / c or tiny
        step = d * c
        value *= step
        if abs(step - 1.0) < 1e-15:
            break
    return value
