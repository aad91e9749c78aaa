"""The statistics of one look, held against scipy and against what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rollout.binomial import mcnemar_exact
from rollout.intervals import (
    chance_of_a_fluke,
    detectable_difference,
    difference_interval,
    holm,
    mean_interval,
    paired_p,
    power,
    quantile,
    rows_to_be_better,
    rows_to_be_not_worse,
)

marks = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=60)


@pytest.mark.parametrize(
    "values",
    [
        [1.0] * 80 + [0.0] * 20,
        [1.0] * 290 + [0.0] * 10,
        [(number % 17) / 17 for number in range(200)],
        [0.0] * 60 + [0.5] * 25 + [1.0] * 5,
    ],
)
def test_the_interval_of_a_mean_is_scipys(values: list[float]) -> None:
    expected = stats.bootstrap(
        (np.array(values),), np.mean, method="BCa", n_resamples=20_000, rng=1
    ).confidence_interval

    low, high = mean_interval(values)

    # Both draw; the step between two means is 1/n.
    step = 1.5 / len(values)
    assert low == pytest.approx(expected.low, abs=max(step, 0.006))
    assert high == pytest.approx(expected.high, abs=max(step, 0.006))


@given(marks)
def test_the_interval_holds_the_mean_and_stays_within_the_scale(values: list[float]) -> None:
    low, high = mean_interval(values)

    assert 0.0 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= 1.0
    assert (low, high) == mean_interval(values)


def test_all_rows_right_is_no_certainty() -> None:
    low, high = mean_interval([1.0] * 20)

    assert low < 0.9
    assert high == 1.0


def test_no_row_that_differs_is_no_certainty_either() -> None:
    low, high = difference_interval([0.0] * 30)

    assert low == pytest.approx(-0.116, abs=1e-3)
    assert high == -low


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    dice = np.random.default_rng(3)
    hits = 0
    for number in range(300):
        values = dice.choice([-1.0, 0.0, 1.0], 200, p=[0.05, 0.8, 0.15])
        low, high = difference_interval(values.tolist(), seed=str(number))
        hits += low <= 0.1 <= high
    assert hits / 300 > 0.91


@given(st.integers(0, 40), st.integers(0, 40))
def test_on_right_and_wrong_the_paired_test_is_mcnemars(gained: int, lost: int) -> None:
    assert paired_p([1.0] * gained + [-1.0] * lost + [0.0] * 7) == mcnemar_exact(gained, lost)


def test_on_marks_the_paired_test_is_scipys_permutation_test() -> None:
    dice = np.random.default_rng(5)
    one, other = dice.random(40), dice.random(40) - 0.12

    expected = stats.permutation_test(
        (one, other),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=1,
    ).pvalue

    assert paired_p((one - other).tolist()) == pytest.approx(expected, abs=0.01)


def test_the_paired_test_is_by_the_mean_and_not_by_the_number_of_rows() -> None:
    many_small_gains = [0.02] * 30
    few_large_losses = [-1.0] * 12

    assert paired_p(many_small_gains) < 0.001
    assert paired_p(many_small_gains + few_large_losses) < 0.05
    assert sum(many_small_gains + few_large_losses) < 0


def test_holm_adjusts_the_smallest_most() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})

    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


@given(st.dictionaries(st.text(min_size=1), st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_and_keeps_their_order(p_values: dict[str, float]) -> None:
    adjusted = holm(p_values)

    assert adjusted.keys() == p_values.keys()
    assert all(p_values[name] <= adjusted[name] <= 1 for name in p_values)
    for one in p_values:
        for other in p_values:
            if p_values[one] < p_values[other]:
                assert adjusted[one] <= adjusted[other]


def test_quantiles_are_values_that_were_there() -> None:
    assert quantile([], 0.5) == 0.0
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([float(value) for value in range(1, 101)], 0.99) == 99.0


def test_the_power_is_what_trials_show() -> None:
    dice = np.random.default_rng(11)
    drawn = dice.multinomial(200, [0.12, 0.05, 0.83], 2000)
    better = sum(mcnemar_exact(int(g), int(x)) < 0.05 and g > x for g, x, _ in drawn)

    assert power(200, 0.12, 0.05) == pytest.approx(better / 2000, abs=0.035)


def test_without_a_difference_better_is_said_in_at_most_half_of_alpha() -> None:
    for rows in (20, 100, 500):
        assert power(rows, 0.1, 0.1) <= 0.025


@pytest.mark.parametrize(("rows", "churn"), [(100, 0.1), (300, 0.2), (1000, 0.2)])
def test_the_smallest_detectable_difference_is_detected_and_a_smaller_one_is_not(
    rows: int, churn: float
) -> None:
    gain = detectable_difference(rows, churn)
    assert gain is not None
    differing = max(churn, gain)
    assert power(rows, (differing + gain) / 2, (differing - gain) / 2) >= 0.8
    smaller = gain - 0.01
    differing = max(churn, smaller)
    assert power(rows, (differing + smaller) / 2, (differing - smaller) / 2) < 0.8


def test_five_rows_can_show_nothing() -> None:
    assert detectable_difference(5, 0.2) is None
    assert detectable_difference(6, 0.2) is not None


def test_rows_needed_reach_the_power() -> None:
    needed = rows_to_be_better(14, 8, 100)
    assert needed is not None
    assert power(needed, 0.14, 0.08) == pytest.approx(0.8, abs=0.06)
    assert rows_to_be_better(5, 5, 100) is None
    assert rows_to_be_better(4, 9, 100) is None


def test_rows_needed_for_not_worse() -> None:
    assert rows_to_be_not_worse(-0.1, 0.2, 50, 0.05) is None
    # With no row that differs, as many as a share of 5 % would be seen among.
    assert rows_to_be_not_worse(0.0, 0.0, 20, 0.05) == 59
    assert rows_to_be_not_worse(0.0, 0.1, 20, 0.05) == 248


def test_the_chance_of_a_fluke_grows_with_the_looks() -> None:
    assert chance_of_a_fluke(1) == pytest.approx(0.025)
    assert chance_of_a_fluke(28) == pytest.approx(0.508, abs=0.01)
