"""E-values keep their promise, and the intervals are what they do not refute."""

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.statistics import (
    RISK_WEIGHTS,
    RISKS,
    Tally,
    difference_bounds,
    evidence_above,
    evidence_below,
    log_evidence_above,
    log_evidence_below,
    log_evidence_not_worse,
    log_evidence_split,
    log_evidence_worse,
    margin_growth,
    not_worse_needed,
    pairs_needed_above,
    pairs_needed_below,
    risk_growth,
    share_bounds,
    win_bounds,
    worse_needed,
)

counts = st.integers(0, 400)
shares = st.floats(0.05, 0.95)


def bets_above(wins: int, losses: int, p0: float) -> float:
    """The e-value by its definition: the mean over the risks of a likelihood ratio."""
    total = 0.0
    for risk, weight in zip(RISKS, RISK_WEIGHTS, strict=True):
        share = p0 * risk / (p0 * risk + 1.0 - p0)
        total += weight * (share / p0) ** wins * ((1.0 - share) / (1.0 - p0)) ** losses
    return total


@pytest.mark.parametrize("p0", [0.3, 0.4, 0.5])
@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (0, 1), (7, 3), (3, 7), (40, 20)])
def test_pairs_are_judged_by_a_mixture_of_likelihood_ratios(
    wins: int, losses: int, p0: float
) -> None:
    expected = bets_above(wins, losses, p0)
    assert evidence_above(wins, losses, p0) == pytest.approx(expected, rel=1e-9)


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
    for share, at_most in ((0.6, 1.26), (0.7, 1.17), (0.8, 1.24), (0.95, 1.6)):
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


weights = st.floats(0.01, 0.99)
centres = st.sampled_from([0.0, 0.02, 0.05, 0.25])
chances = st.floats(0.0, 1.0)


def mean_factors(
    growth: Callable[[Tally], list[float]], weight: float, rate: float, stable: float
) -> list[float]:
    """What the next unit makes of each bet on average, given both arms' chances of a bad unit."""
    next_units = (
        (weight * rate, Tally(weight, 1, 1, 0, 0)),
        (weight * (1.0 - rate), Tally(weight, 1, 0, 0, 0)),
        ((1.0 - weight) * stable, Tally(weight, 0, 0, 1, 1)),
        ((1.0 - weight) * (1.0 - stable), Tally(weight, 0, 0, 1, 0)),
    )
    outcomes = [[chance * math.exp(log) for log in growth(unit)] for chance, unit in next_units]
    return [sum(bet) for bet in zip(*outcomes, strict=True)]


@given(weights, centres, chances, chances, st.floats(-0.5, 0.5))
def test_no_bet_on_worse_grows_on_average_under_the_hypothesis(
    weight: float, centre: float, stable: float, part: float, beyond: float
) -> None:
    # Any pair of chances of the hypothesis, so it holds when they change from unit to unit.
    rate = min(1.0, max(0.0, part * (stable + beyond)))
    if rate <= stable + beyond:
        means = mean_factors(lambda unit: risk_growth(unit, centre, beyond), weight, rate, stable)
        assert all(mean <= 1.0 + 1e-9 for mean in means)


@given(weights, centres, chances, chances, st.floats(-0.5, 0.5))
def test_no_bet_on_not_worse_grows_on_average_under_the_hypothesis(
    weight: float, centre: float, stable: float, part: float, margin: float
) -> None:
    rate = stable + margin + part * (1.0 - stable - margin)
    # Where stable's own chance and the margin exceed 1, nothing is worse by the margin.
    if 0.0 <= rate <= 1.0 and stable + margin <= 1.0:
        means = mean_factors(lambda unit: margin_growth(unit, centre, margin), weight, rate, stable)
        assert all(mean <= 1.0 + 1e-9 for mean in means)


@given(weights, centres, st.integers(0, 300), st.integers(0, 300), st.floats(0.02, 0.3))
def test_no_unit_ruins_a_bet(
    weight: float, centre: float, units: int, others: int, margin: float
) -> None:
    for bad, stable_bad in ((units, 0), (0, others), (units, others), (0, 0)):
        tallies = [Tally(weight, units, bad, others, stable_bad)]
        assert math.isfinite(log_evidence_worse(tallies, centre))
        assert math.isfinite(log_evidence_not_worse(tallies, centre, margin))


def test_strata_add_up_to_one_candidate() -> None:
    alone = Tally(0.1, 500, 20, 4_500, 90)
    halves = [Tally(0.1, 200, 9, 2_000, 30), Tally(0.1, 300, 11, 2_500, 60)]
    assert log_evidence_worse(halves, 0.02) == pytest.approx(log_evidence_worse([alone], 0.02))
    other = [Tally(0.01, 30, 4, 2_970, 60), alone]
    assert log_evidence_worse(other, 0.02) > log_evidence_worse([alone], 0.02)


def test_two_strata_of_equal_arms_do_not_add_up_to_a_difference() -> None:
    # Rates that rise with the hours, and with them the weight: pooled, the candidate looks worse.
    tallies = [Tally(0.05, 100, 1, 1_900, 19), Tally(0.5, 1_000, 100, 1_000, 100)]
    assert log_evidence_worse(tallies, 0.02) < 0.0
    low, high = difference_bounds(tuple(tallies), 0.02, 20.0, 20.0)
    assert low < 0.0 < high


@pytest.mark.parametrize(("weight", "at_most"), [(0.01, 150), (0.05, 110), (0.5, 110)])
def test_a_candidate_that_never_fails_passes_a_margin_soon(weight: float, at_most: int) -> None:
    units = 0
    while log_evidence_not_worse(
        [Tally(weight, units, 0, units * (1 / weight - 1), 0)], 0.02, 0.05
    ) < math.log(20.0):
        units += 1
    assert 60 <= units <= at_most


tallies_drawn = st.builds(
    lambda weight, units, bad, others, stable_bad: Tally(
        weight, units, round(units * bad), others, round(others * stable_bad)
    ),
    st.sampled_from([0.01, 0.1, 0.5]),
    st.integers(0, 500),
    st.floats(0.0, 1.0),
    st.integers(0, 2_000),
    st.floats(0.0, 1.0),
)


@given(st.lists(tallies_drawn, min_size=1, max_size=3), centres, st.floats(0.02, 0.4))
def test_bounds_say_the_same_as_the_evidence(
    tallies: list[Tally], centre: float, margin: float
) -> None:
    low, high = difference_bounds(tuple(tallies), centre, 40.0, 20.0)
    assert -1.0 <= low <= 1.0
    assert -1.0 <= high <= 1.0
    worse = log_evidence_worse(tallies, centre) >= math.log(40.0)
    within = log_evidence_not_worse(tallies, centre, margin) >= math.log(20.0)
    # The bounds are found to a ten-thousandth, on the careful side.
    assert worse or low <= 1e-9
    assert not worse or low >= -2e-4
    assert within or high >= margin - 1e-9
    assert not within or high <= margin + 2e-4


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0.1, 0.9))
def test_bounds_of_the_wins_say_the_same_as_the_evidence(wins: int, losses: int, p0: float) -> None:
    low, high = win_bounds(wins, losses, 40.0, 20.0)
    assert 0.0 <= low <= high <= 1.0
    if evidence_above(wins, losses, p0) < 20.0:
        assert low <= p0 + 1e-9
    else:
        assert low >= p0 - 2e-4
    if evidence_below(wins, losses, p0) < 40.0:
        assert high >= p0 - 1e-9
    else:
        assert high <= p0 + 2e-4


@given(st.integers(0, 200), st.integers(0, 200), st.floats(0.01, 0.2))
def test_a_share_lies_within_its_bounds_and_they_narrow_with_alpha(
    hits: int, misses: int, alpha: float
) -> None:
    total = hits + misses
    low, high = share_bounds(hits, total, alpha)
    assert 0.0 <= low <= high <= 1.0
    if total:
        assert low <= hits / total <= high
    wider = share_bounds(hits, total, alpha / 2)
    assert wider[0] <= low + 1e-9
    assert wider[1] >= high - 1e-9


def test_with_a_look_after_every_unit_a_share_stays_within_its_bounds() -> None:
    """Exactly, by the law of all paths of 300 units."""
    share, alpha = 0.2, 0.05
    alive, missed = {0: 1.0}, 0.0
    for seen in range(1, 301):
        after: dict[int, float] = {}
        for hits, chance in alive.items():
            after[hits + 1] = after.get(hits + 1, 0.0) + chance * share
            after[hits] = after.get(hits, 0.0) + chance * (1.0 - share)
        alive = {}
        for hits, chance in after.items():
            low, high = share_bounds(hits, seen, alpha) if chance > 1e-9 else (0.0, 1.0)
            if low <= share <= high:
                alive[hits] = chance
            else:
                missed += chance
    assert 0.005 < missed <= alpha


@given(st.integers(0, 500), st.integers(0, 500), weights)
def test_the_next_unit_is_no_evidence_against_the_intended_split_on_average(
    candidate: int, stable: int, weight: float
) -> None:
    now = log_evidence_split(candidate, stable, weight)
    more = math.exp(log_evidence_split(candidate + 1, stable, weight) - now)
    less = math.exp(log_evidence_split(candidate, stable + 1, weight) - now)
    assert weight * more + (1.0 - weight) * less == pytest.approx(1.0, abs=1e-6)


def test_a_broken_split_is_seen_and_a_right_one_is_not() -> None:
    assert log_evidence_split(0, 0, 0.1) == 0.0
    assert log_evidence_split(1_000, 9_000, 0.1) < 0.0
    assert log_evidence_split(800, 9_200, 0.1) > math.log(1_000)
    assert log_evidence_split(0, 2_000, 0.01) > math.log(1_000)


def test_a_forecast_of_rates_is_what_it_takes() -> None:
    tally, each = Tally(0.1, 40, 4, 360, 7), Tally(0.1, 0.1, 0.01, 0.9, 0.0175)

    def after(more: int) -> Tally:
        return Tally(0.1, 40 + 0.1 * more, 4 + 0.01 * more, 360 + 0.9 * more, 7 + 0.0175 * more)

    worse = worse_needed((tally,), each, 0.02, 20.0)
    assert worse is not None
    reached = [log_evidence_worse([after(n)], 0.02) >= math.log(20.0) for n in (worse - 1, worse)]
    assert reached == [False, True]
    within = not_worse_needed((tally,), each, 0.02, 0.2, 20.0)
    assert within is not None
    assert log_evidence_not_worse([after(within)], 0.02, 0.2) >= math.log(20.0)
    assert not_worse_needed((tally,), each, 0.02, 0.05, 20.0) is None
    assert worse_needed((Tally(0.1, 0, 0, 0, 0),), Tally(0.1, 0.1, 0, 0.9, 0), 0.02, 20.0) is None


def test_counts_and_shares_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="counts are not negative"):
        evidence_above(-1, 0, 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        evidence_above(1, 0, 1.0)
