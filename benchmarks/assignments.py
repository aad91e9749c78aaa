"""A million assignments checked: nested, sticky, independent between trials, split as asked.

    python -m benchmarks.assignments            # some seconds
    python -m benchmarks.assignments --quick    # a tenth of it

Units are named as callers name themselves: numbers in a row, addresses, long common beginnings,
request ids. Prints the p-value of each chi-square test; a p-value below 1e-6 fails, which a right
split does about once in a hundred thousand runs.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

from scipy.stats import chi2_contingency, chisquare

from rollout.assignment import bucket, unit_of

_WEIGHTS: Final = (1.0, 5.0, 20.0, 50.0)
_PLACES: Final = 1000
_LEAST_P: Final = 1e-6
_KINDS: Final[Sequence[Callable[[int], str]]] = (
    str,
    lambda number: f"user-{number}@example.org",
    lambda number: "session-of-somebody-" * 8 + str(number),
    lambda number: f"{number:032x}",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="check a million assignments")
    parser.add_argument("--quick", action="store_true", help="a tenth of them")
    count = 100_000 if parser.parse_args(arguments).quick else 1_000_000
    failed = [text for text, good in check(count) if not good]
    sys.stdout.write(f"{'FAILED: ' + '; '.join(failed) if failed else 'all hold'}\n")
    return 1 if failed else 0


def check(count: int) -> list[tuple[str, bool]]:
    """Each property, told as it is found, with whether it holds."""
    units = [unit_of(f"key-{number % 7}", _KINDS[number % 4](number)) for number in range(count)]
    trials = ("triage@2.5", "triage@3.8", "billing@2.5")
    places = {trial: [bucket(trial, unit) for unit in units] for trial in trials}
    told: list[tuple[str, bool]] = []

    def tell(text: str, good: bool) -> None:
        sys.stdout.write(f"{text}\n")
        told.append((text, good))

    tell(f"{count:,} units, none shared: {len(set(units)) == count}", len(set(units)) == count)
    first = places[trials[0]]
    again = sum(bucket(trials[0], unit) == place for unit, place in zip(units, first, strict=True))
    tell(f"sticky: {again:,} of {count:,} get the same place again", again == count)
    shares = [{n for n, place in enumerate(first) if place * 100 < w} for w in (*_WEIGHTS, 100.0)]
    nested = all(smaller < larger for smaller, larger in pairwise(shares))
    tell(f"nested: each share lies in the next: {nested}", nested and len(shares[-1]) == count)
    for trial in trials:
        for weight in _WEIGHTS:
            hits = sum(place * 100 < weight for place in places[trial])
            expected = count * weight / 100
            p = float(chisquare([hits, count - hits], [expected, count - expected]).pvalue)
            tell(f"split of {trial} at {weight:g} %: {hits:,}, p = {p:.3f}", p > _LEAST_P)
        counts = Counter(int(place * _PLACES) for place in places[trial])
        p = float(chisquare([counts[place] for place in range(_PLACES)]).pvalue)
        tell(f"{_PLACES} places of {trial} alike: p = {p:.3f}", p > _LEAST_P)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        for weight in _WEIGHTS:
            p = _independence(places[trials[one]], places[trials[other]], weight)
            pair = f"{trials[one]} and {trials[other]}"
            tell(f"independent: {pair} at {weight:g} %: p = {p:.3f}", p > _LEAST_P)
    return told


def _independence(one: Sequence[float], other: Sequence[float], weight: float) -> float:
    table = Counter((a * 100 < weight, b * 100 < weight) for a, b in zip(one, other, strict=True))
    counts = [[table[a, b] for b in (False, True)] for a in (False, True)]
    return float(chi2_contingency(counts).pvalue)


if __name__ == "__main__":
    sys.exit(main())
