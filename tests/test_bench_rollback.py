"""The rollback benchmark's sums: what is good, and what is not."""

from dataclasses import replace

import pytest

from benchmarks.load import LoadResult
from benchmarks.rollback import Figures, Rollback, report

LOAD = LoadResult(
    requests=20_000, microseconds=20_000_000, p50=900, p99=9_000, mean=1e3, bad_status=0, broken=0
)
QUICK = Rollback(commanded=0.9, confirmed=0.2, workers=4, astray=0)
FIGURES = Figures((QUICK, replace(QUICK, confirmed=1.4), QUICK), LOAD, workers=4)


def test_the_median_is_held_to_the_goal_and_the_slowest_is_shown() -> None:
    said = report(FIGURES)
    assert "3 rollbacks by command, 4 gateway workers" in said
    assert "1,000 requests a second" in said
    assert "confirmed      0.200   1.400" in said
    assert "0 of 20,000 requests failed" in said
    assert said.endswith(": met")


@pytest.mark.parametrize(
    "spoiled",
    [
        replace(FIGURES, load=replace(LOAD, bad_status=1)),
        replace(FIGURES, load=replace(LOAD, broken=1)),
        replace(FIGURES, rollbacks=(QUICK, replace(QUICK, astray=1))),
        replace(FIGURES, rollbacks=(replace(QUICK, workers=3),)),
        replace(FIGURES, rollbacks=(replace(QUICK, confirmed=1.1),)),
    ],
)
def test_a_failed_request_a_silent_worker_or_a_slow_median_is_not_good(spoiled: Figures) -> None:
    assert FIGURES.good
    assert not spoiled.good
    assert report(spoiled).endswith("NOT met")
