"""The calibration of the gate, on few evaluations."""

from benchmarks.calibration import Case, alike, better, measure


def test_the_same_version_is_rarely_called_better_than_itself() -> None:
    found = measure(Case("right or wrong", 100, 0.2), 120, 1)

    assert found.better <= 6
    assert found.worse <= 8
    assert found.covered >= 105
    assert found == measure(Case("right or wrong", 100, 0.2), 120, 1)


def test_a_gain_that_shows_is_found_four_times_out_of_five() -> None:
    case = next(each for each in better() if each.rows == 100)

    assert 0.7 < measure(case, 120, 1).share < 0.9


def test_marks_are_calibrated_too() -> None:
    (case,) = (each for each in alike() if each.graded)

    assert measure(case, 40, 1).better <= 3
