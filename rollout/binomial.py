"""Counts that are looked at once: Wilson's interval for a share, McNemar's exact test for pairs."""

import math
from statistics import NormalDist


def wilson(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share; (0, 1) where nothing was counted.

    For one look at a fixed number of rows. Wilson (1927); Brown, Cai and DasGupta (2001).
    """
    if total == 0:
        return 0.0, 1.0
    low, high = wilson_of_share(correct / total, total, confidence)
    return 0.0 if correct == 0 else low, 1.0 if correct == total else high


def wilson_of_share(share: float, size: float, confidence: float = 0.95) -> tuple[float, float]:
    """The same for a share whose sample amounts to `size`, which may be no whole number."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    scale = 1.0 + z * z / size
    centre = (share + z * z / (2.0 * size)) / scale
    reach = z / scale * math.sqrt(share * (1.0 - share) / size + (z / (2.0 * size)) ** 2)
    return max(0.0, centre - reach), min(1.0, centre + reach)


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


def log_beta(a: float, b: float) -> float:
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
    front = a * math.log(x) + b * math.log1p(-x) - math.log(a) - log_beta(a, b)
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
