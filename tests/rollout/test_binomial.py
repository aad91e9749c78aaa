"""Wilson's interval and McNemar's test agree with exact sums and known values."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.binomial import mcnemar_exact, wilson


@given(st.integers(0, 80), st.integers(0, 80))
def test_mcnemar_is_the_exact_binomial_sum(gained: int, lost: int) -> None:
    rows = gained + lost
    tail = sum(math.comb(rows, k) for k in range(min(gained, lost) + 1))
    expected = min(Fraction(1), Fraction(2 * tail, 2**rows))
    assert mcnemar_exact(gained, lost) == pytest.approx(float(expected), rel=1e-9)
    assert mcnemar_exact(gained, lost) == mcnemar_exact(lost, gained)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 0, 0.0, 1.0),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (80, 100, 0.711170, 0.866633),
        (1, 2, 0.094531, 0.905469),
    ],
)
def test_wilson_gives_the_known_intervals(
    correct: int, total: int, low: float, high: float
) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-5)


@given(st.integers(1, 2_000), st.data())
def test_an_interval_holds_the_share_and_widens_with_confidence(
    total: int, data: st.DataObject
) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = wilson(correct, total)
    assert 0.0 <= low <= correct / total <= high <= 1.0
    wider_low, wider_high = wilson(correct, total, 0.99)
    assert wider_low <= low
    assert wider_high >= high
