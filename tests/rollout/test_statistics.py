"""E-values keep their promise; the tests and intervals agree with exact sums."""

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.statistics import (
    evidence_above,
    evidence_below,
    log_evidence_above,
    log_evidence_below,
    mcnemar_exact,
    pairs_needed_above,
    pairs_needed_below,
    wilson,
)

counts = st.integers(0, 400)
shares = st.floats(0.05, 0.95)


def integral_above(wins: int, losses: int, p0: float, slices: int = 20_000) -> float:
    """The e-value by its definition, with Simpson's rule in place of beta functions."""

    def prior(p: float) -> float:
        return p * (1.0 - p)

    def ratio(p: float) -> float:
        return float((p / p0) ** wins * ((1.0 - p) / (1.0 - p0)) ** losses)

    step = (1.0 - p0) / slices
    weights = [1.0, *([4.0, 2.0] * (slices // 2))[:-1], 1.0]
    points = [p0 + step * index for index in range(slices + 1)]
    above = sum(w * prior(p) * ratio(p) for w, p in zip(weights, points, strict=True))
    return above / sum(w * prior(p) for w, p in zip(weights, points, strict=True))


@pytest.mark.parametrize("p0", [0.3, 0.4, 0.5])
@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (0, 1), (7, 3), (3, 7), (40, 20)])
def test_the_closed_form_is_the_integral_it_stands_for(wins: int, losses: int, p0: float) -> None:
    expected = integral_above(wins, losses, p0)
    assert evidence_above(wins, losses, p0) == pytest.approx(expected, rel=1e-6)


@given(counts, counts, shares, st.floats(0.0, 1.0))
def test_the_next_pair_never_raises_evidence_on_average_under_the_hypothesis(
    wins: int, losses: int, p0: float, part: float
) -> None:
    share = p0 * part  # any P(win) <= p0, also one that depends on the past
    now = log_evidence_above(wins, losses, p0)
    won = math.exp(log_evidence_above(wins + 1, losses, p0) - now)
    lost = math.exp(log_evidence_above(wins, losses + 1, p0) - now)
    assert share * won + (1.0 - share) * lost <= 1.0 + 1e-7


@given(shares)
def test_nothing_seen_is_no_evidence(p0: float) -> None:
    assert evidence_above(0, 0, p0) == pytest.approx(1.0)
    assert evidence_below(0, 0, p0) == pytest.approx(1.0)


@given(counts, counts, shares)
def test_a_win_speaks_for_above_and_against_below(wins: int, losses: int, p0: float) -> None:
    assert log_evidence_above(wins + 1, losses, p0) > log_evidence_above(wins, losses, p0)
    assert log_evidence_below(wins + 1, losses, p0) < log_evidence_below(wins, losses, p0)


@given(counts, counts, st.floats(0.05, 0.9), st.floats(0.01, 0.05))
def test_a_bolder_claim_takes_more(wins: int, losses: int, p0: float, more: float) -> None:
    # "At most 0.4" is a smaller hypothesis than "at most 0.5", so it is refuted no later.
    if wins <= p0 * (wins + losses):
        return
    bolder = log_evidence_above(wins + 20, losses, p0 + more)
    assert bolder <= log_evidence_above(wins + 20, losses, p0) + 1e-9


@pytest.mark.parametrize(
    ("wins", "losses"),
    [(10**6, 10**6), (10**6, 0), (0, 10**6), (501_000, 499_000), (400_000, 600_000)],
)
@pytest.mark.parametrize("p0", [0.4, 0.5])
def test_a_million_pairs_do_not_overflow(wins: int, losses: int, p0: float) -> None:
    above, below = log_evidence_above(wins, losses, p0), log_evidence_below(wins, losses, p0)
    assert math.isfinite(above)
    assert math.isfinite(below)
    # Evidence cannot stand far from 1 on both sides.
    assert min(above, below) < 0.0
    assert math.isfinite(evidence_above(wins, losses, p0))


@pytest.mark.parametrize("p0", [0.4, 0.5])
def test_with_a_look_after_every_pair_false_alarms_stay_within_alpha(p0: float) -> None:
    """Exactly, by the law of all paths of 600 pairs, and not only on average over some."""
    threshold, horizon = math.log(20.0), 600
    alive, crossed = {0: 1.0}, 0.0
    for seen in range(1, horizon + 1):
        after: dict[int, float] = {}
        for wins, chance in alive.items():
            after[wins + 1] = after.get(wins + 1, 0.0) + chance * p0
            after[wins] = after.get(wins, 0.0) + chance * (1.0 - p0)
        alive = {}
        for wins, chance in after.items():
            if log_evidence_above(wins, seen - wins, p0) >= threshold:
                crossed += chance
            else:
                alive[wins] = chance
    assert 0.02 < crossed <= 0.05


def test_a_share_that_changes_but_stays_below_deceives_no_more_often() -> None:
    dice = random.Random(7)
    alarms = 0
    for _ in range(1_000):
        wins = losses = 0
        for _ in range(200):
            share = 0.5 if wins >= losses else dice.uniform(0.3, 0.5)
            won = dice.random() < share
            wins, losses = wins + won, losses + (not won)
            if log_evidence_above(wins, losses, 0.5) >= math.log(20.0):
                alarms += 1
                break
    assert alarms <= 50


def test_evidence_comes_nearly_as_fast_as_for_one_who_knows_the_share() -> None:
    """The mean number of pairs until E >= 20, exactly, over that of Wald's test at the truth."""
    for share, at_most in ((0.6, 1.3), (0.7, 1.3), (0.8, 1.3), (0.95, 1.6)):
        divergence = share * math.log(2 * share) + (1 - share) * math.log(2 * (1 - share))
        oracle = math.log(20.0) / divergence
        assert mean_pairs_until(math.log(20.0), share) <= at_most * oracle


def mean_pairs_until(log_threshold: float, share: float, horizon: int = 1_200) -> float:
    alive, mean = {0: 1.0}, 0.0
    for seen in range(1, horizon + 1):
        after: dict[int, float] = {}
        for wins, chance in alive.items():
            after[wins + 1] = after.get(wins + 1, 0.0) + chance * share
            after[wins] = after.get(wins, 0.0) + chance * (1.0 - share)
        alive = {}
        for wins, chance in after.items():
            if chance < 1e-12:
                continue
            if log_evidence_above(wins, seen - wins, 0.5) >= log_threshold:
                mean += seen * chance
            else:
                alive[wins] = chance
        if not alive:
            break
    return mean + horizon * sum(alive.values())


@given(st.integers(0, 60), st.integers(0, 60), st.sampled_from([0.3, 0.4, 0.5]))
def test_a_forecast_is_the_first_number_that_gets_there(wins: int, losses: int, p0: float) -> None:
    needed = pairs_needed_above(wins, losses, p0, 20.0)
    if needed is None:
        assert evidence_above(wins, losses, p0) < 20.0
        return
    if needed == 0:
        assert evidence_above(wins, losses, p0) >= 20.0
        return
    rate = wins / (wins + losses)
    reached = [
        evidence_above(wins + more * rate, losses + more * (1 - rate), p0) >= 20.0
        for more in (needed - 1, needed)
    ]
    assert reached == [False, True]


def test_a_rate_on_the_wrong_side_never_gets_there() -> None:
    assert pairs_needed_above(3, 7, 0.5, 20.0) is None
    assert pairs_needed_above(0, 0, 0.5, 20.0) is None
    assert pairs_needed_below(7, 3, 0.5, 20.0) is None
    assert pairs_needed_below(3, 7, 0.5, 20.0) == pairs_needed_above(7, 3, 0.5, 20.0)


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


def test_counts_and_shares_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="counts are not negative"):
        evidence_above(-1, 0, 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        evidence_above(1, 0, 1.0)
