"""The statistics of one look at a fixed number of rows: intervals, paired tests, what can be seen.

A rollout looks often and uses `rollout/statistics.py`. Here the rows are known beforehand and
looked at once, which is when BCa, McNemar and Holm hold.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rollout.binomial import mcnemar_exact, wilson

RESAMPLES: Final = 2000
POWER: Final = 0.8
# So many drawn numbers are held at a time.
_BLOCK: Final = 4_000_000
_SIGN_FLIPS: Final = 9999
_FEW: Final = 16
_MOST_ROWS: Final = 10_000_000
# Of so many rows that differ the binomial is as good as normal.
_MANY: Final = 400
_NORMAL: Final = NormalDist()


def mean_interval(
    values: Sequence[float], confidence: float = 0.95, seed: str = ""
) -> tuple[float, float]:
    """An interval for the mean of marks in [0, 1], by BCa; Wilson's where all of them are the same.

    (0, 1) where there are none. Efron (1987); for the mean its acceleration has a closed form.
    The same values and the same seed give the same interval.
    """
    marks = np.asarray(values, dtype=float)
    if marks.size == 0:
        return 0.0, 1.0
    if np.ptp(marks) < 1e-12:
        # A bootstrap of equal values would claim to know their mean exactly.
        low, high = wilson(round(float(marks.sum())), marks.size, confidence)
        mean = float(marks.mean())
        return min(low, mean), max(high, mean)
    low, high = _bca(marks, confidence, seed)
    return max(0.0, low), min(1.0, high)


def difference_interval(
    differences: Sequence[float], confidence: float = 0.95, seed: str = ""
) -> tuple[float, float]:
    """The same for the mean of paired differences in [-1, 1].

    Where no row differs, as far as rows that differ may be there without one of them being seen.
    """
    values = np.asarray(differences, dtype=float)
    if values.size == 0:
        return -1.0, 1.0
    if np.ptp(values) < 1e-12:
        unseen = 1.0 - ((1.0 - confidence) / 2.0) ** (1.0 / values.size)
        mean = float(values.mean())
        return max(-1.0, mean - unseen), min(1.0, mean + unseen)
    low, high = _bca(values, confidence, seed)
    return max(-1.0, low), min(1.0, high)


def paired_p(differences: Sequence[float], seed: str = "") -> float:
    """Two-sided p of "both are as good" by flipping the signs of paired differences.

    Where all differences are of one size, as with right and wrong, that is McNemar's exact test.
    Else 9,999 flips are drawn; the p of such a sample is valid in itself (Phipson, Smyth 2010).
    """
    values = np.asarray(differences, dtype=float)
    moved = values[np.abs(values) > 1e-12]
    if moved.size == 0:
        return 1.0
    if np.ptp(np.abs(moved)) < 1e-12:
        gained = int((moved > 0).sum())
        return mcnemar_exact(gained, int(moved.size) - gained)
    dice = _dice(seed, "flips")
    seen, reached, left = abs(float(moved.sum())) - 1e-9, 0, _SIGN_FLIPS
    while left:
        count = min(left, max(1, _BLOCK // moved.size))
        signs = dice.integers(0, 2, (count, moved.size), dtype=np.int8) * 2 - 1
        reached += int((np.abs(signs @ moved) >= seen).sum())
        left -= count
    return (1 + reached) / (1 + _SIGN_FLIPS)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Each p adjusted for there being several, so that any of them below alpha holds (Holm 1979)."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[str, float] = {}
    highest = 0.0
    for place, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - place) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered), max(1, math.ceil(share * len(ordered)))) - 1]


def power(rows: int, gained: float, lost: float, alpha: float = 0.05) -> float:
    """The chance that McNemar's exact test says "better" on so many rows.

    `gained` and `lost` are the true shares of rows that only one of the two gets right. Exact,
    but for numbers of differing rows that come up less often than one in 10^12; normal where hundreds
    of rows differ.
    """
    differing = gained + lost
    if rows <= 0 or gained <= 0.0:
        return 0.0
    if rows * differing > _MANY:
        gain = gained - lost
        reach = gain * math.sqrt(rows) - _NORMAL.inv_cdf(1 - alpha / 2) * math.sqrt(differing)
        return _NORMAL.cdf(reach / math.sqrt(differing - gain * gain)) if gain < 1 else 1.0
    spread = 7.0 * math.sqrt(rows * differing * (1.0 - differing)) + 10.0
    first = max(0, math.floor(rows * differing - spread))
    last = min(rows, math.ceil(rows * differing + spread))
    total = 0.0
    for count in range(first, last + 1):
        chance = math.exp(_log_binomial(count, rows, differing))
        if chance > 1e-12:
            total += chance * _tail(_fewest_gained(count, alpha), count, gained / differing)
    return min(1.0, total)


def detectable_difference(
    rows: int, churn: float, alpha: float = 0.05, at_power: float = POWER
) -> float | None:
    """The smallest gain in accuracy that so many rows show with chance `at_power`.

    `churn` is the share of rows that only one of the two gets right; a gain cannot be larger than
    it, so where it takes more, all rows that differ are taken to be gained. None where not even a
    gain on every row could be seen.
    """
    if power(rows, 1.0, 0.0, alpha) < at_power:
        return None

    def seen(gain: float) -> bool:
        differing = max(churn, gain)
        return power(rows, (differing + gain) / 2, (differing - gain) / 2, alpha) >= at_power

    low, high = 0.0, 1.0
    while high - low > 5e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if seen(middle) else (middle, high)
    return high


def rows_to_be_better(
    gained: int, lost: int, rows: int, alpha: float = 0.05, at_power: float = POWER
) -> int | None:
    """How many rows in all would show a gain like this one; None where there is none.

    By the normal approximation (Connor 1987). A forecast from the rates that were seen.
    """
    gain, differing = (gained - lost) / max(rows, 1), (gained + lost) / max(rows, 1)
    if gain <= 0.0:
        return None
    reach = _NORMAL.inv_cdf(1 - alpha / 2) * math.sqrt(differing)
    reach += _NORMAL.inv_cdf(at_power) * math.sqrt(max(0.0, differing - gain * gain))
    # Six gained and none lost is the least that p < 0.05 takes.
    return max(
        rows + 1, math.ceil(_fewest_of_all(alpha) / differing), math.ceil((reach / gain) ** 2)
    )


def rows_to_be_not_worse(
    difference: float, variance: float, rows: int, margin: float, alpha: float = 0.05
) -> int | None:
    """How many rows would show "not worse than the margin", if it goes on as it did.

    None where the difference lies beyond the margin already.
    """
    room = difference + margin
    if room <= 0.0:
        return None
    reach = _NORMAL.inv_cdf(1 - alpha) + _NORMAL.inv_cdf(POWER)
    # Where no row differs, so many that a share of the margin would not go unseen.
    unseen = math.log(alpha) / math.log1p(-min(margin, 0.999))
    needed = max(math.ceil(reach * reach * variance / (room * room)), math.ceil(unseen), rows + 1)
    return needed if needed <= _MOST_ROWS else None


def chance_of_a_fluke(looks: int, alpha: float = 0.05) -> float:
    """The chance that at least one of so many versions, none better, was called better."""
    return 1.0 - (1.0 - alpha / 2.0) ** looks


def _bca(values: NDArray[Any], confidence: float, seed: str) -> tuple[float, float]:
    means = _resampled_means(values, seed)
    mean = float(values.mean())
    below = float((means < mean - 1e-12).mean() + (means <= mean + 1e-12).mean()) / 2.0
    below = min(max(below, 0.5 / len(means)), 1.0 - 0.5 / len(means))
    bias = _NORMAL.inv_cdf(below)
    centred = values - mean
    spread = float((centred**2).sum()) ** 1.5
    skew = float((centred**3).sum()) / (6.0 * spread)

    def at(share: float) -> float:
        moved = bias + _NORMAL.inv_cdf(share)
        return _NORMAL.cdf(bias + moved / (1.0 - skew * moved))

    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [at(tail), at(1.0 - tail)])
    return float(low), float(high)


def _resampled_means(values: NDArray[Any], seed: str) -> NDArray[Any]:
    """Where few values occur, as right and wrong, drawn by how often each does; else one by one."""
    different, counts = np.unique(values, return_counts=True)
    dice, size = _dice(seed, "bootstrap"), len(values)
    if len(different) <= _FEW:
        drawn: NDArray[Any] = dice.multinomial(size, counts / size, RESAMPLES) @ different
        return drawn / size
    block = max(1, _BLOCK // size)
    means = [
        values[dice.integers(0, size, (min(block, RESAMPLES - start), size))].mean(axis=1)
        for start in range(0, RESAMPLES, block)
    ]
    return np.concatenate(means)


def _dice(seed: str, use: str) -> np.random.Generator:
    """Chance as the hash of what it is for."""
    digest = hashlib.sha256(f"{use}:{seed}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


@lru_cache(maxsize=65_536)
def _fewest_gained(differing: int, alpha: float) -> int:
    """How many of the rows that differ must be gained for p below alpha; more than all: none."""
    low, high = differing // 2, differing + 1
    while high - low > 1:
        middle = (low + high) // 2
        enough = mcnemar_exact(middle, differing - middle) < alpha
        low, high = (low, middle) if enough else (middle, high)
    return high


def _fewest_of_all(alpha: float) -> int:
    return math.floor(1 - math.log2(alpha)) + 1


def _tail(least: int, count: int, share: float) -> float:
    """P(Binomial(count, share) >= least)."""
    if least > count:
        return 0.0
    if share >= 1.0:
        return 1.0
    # What lies further out than 40 standard deviations is nothing.
    furthest = min(
        count, math.ceil(count * share + 40 * math.sqrt(count * share * (1 - share)) + 1)
    )
    return math.fsum(
        math.exp(_log_binomial(hits, count, share))
        for hits in range(least, max(least, furthest) + 1)
    )


def _log_binomial(hits: int, total: int, share: float) -> float:
    if share <= 0.0:
        return 0.0 if hits == 0 else -math.inf
    if share >= 1.0:
        return 0.0 if hits == total else -math.inf
    ways = math.lgamma(total + 1) - math.lgamma(hits + 1) - math.lgamma(total - hits + 1)
    return ways + hits * math.log(share) + (total - hits) * math.log1p(-share)
