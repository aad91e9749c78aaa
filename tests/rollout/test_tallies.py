"""Agreement between labelers against its reference, and win rates against the truth they estimate."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import krippendorff
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rollout import tallies
from rollout.cases import Choice, Label
from rollout.tallies import Stratum, WinRate, krippendorff_alpha, win_rate
from tests.rollout.test_cases import NOW, case

PATTERNS = st.lists(st.tuples(*[st.integers(0, 4)] * 4), min_size=1, max_size=40)


def labels(*choices: Choice) -> list[Label]:
    return [
        Label("case-a", "triage", choice, f"labeler-{number}", NOW)
        for number, choice in enumerate(choices)
    ]


@given(PATTERNS)
def test_alpha_is_that_of_the_reference(patterns: list[tuple[int, ...]]) -> None:
    compared = [pattern for pattern in patterns if sum(pattern) > 1]
    assume(sum(any(column) for column in zip(*compared, strict=True)) > 1)
    reference = krippendorff.alpha(
        value_counts=patterns, level_of_measurement="nominal", value_domain=[0, 1, 2, 3]
    )
    assert krippendorff_alpha(Counter(patterns)) == pytest.approx(reference)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({}, None),
        ({(1, 0): 9}, None),  # one label each: nothing to compare
        ({(2, 0): 9}, None),  # everybody always said the same
        ({(2, 0): 5, (0, 2): 5}, 1.0),
        ({(1, 1): 10}, 1 - 19 * 20 / 200),
    ],
)
def test_alpha_of_plain_cases(patterns: dict[tuple[int, ...], int], expected: float | None) -> None:
    found = krippendorff_alpha(patterns)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_the_label_that_a_conflict_asked_for_does_not_count_as_agreement() -> None:
    asked = replace(case(), labels_needed=2)
    two = tallies.agreement(asked, labels("first", "second"))
    assert two is not None
    assert tallies.agreement(asked, labels("first", "second", "first")) == two
    assert tallies.agreement(asked, labels("first")) is None
    assert tallies.agreement(case(), labels("first")) is None


def test_agreement_is_by_the_answer_and_not_by_its_place() -> None:
    names = [f"case-{number}" for number in range(20)]
    shown = [replace(case(name), labels_needed=2) for name in names]
    choices: list[Choice] = ["first" if each.stable_first else "second" for each in shown]
    for_stable = {
        tallies.agreement(each, labels(choice, choice))
        for each, choice in zip(shown, choices, strict=True)
    }
    assert for_stable == {"agreement|2,0,0,0"}


def test_tallies_are_read_back() -> None:
    agreeing = replace(case(), agreement=1.0, inclusion=0.05, labels_needed=2)
    counts = Counter(
        [
            tallies.offered(case()),
            tallies.decided(case(), "win"),
            tallies.offered(agreeing),
            tallies.offered(agreeing),
            tallies.decided(agreeing, "tie"),
            tallies.agreement(agreeing, labels("both", "both")),
        ]
    )
    counted = {name: count for name, count in counts.items() if name}
    (rate,) = tallies.read_win_rates(counted).values()
    strata = [Stratum(1.0, offered=1, wins=1), Stratum(0.05, offered=2, ties=1)]
    assert rate == win_rate(strata)
    assert rate is not None
    assert rate.rate == pytest.approx((1 + 40 * 0.5) / 41)
    assert tallies.read_agreement(counted) == tallies.Agreement(None, 1)


def test_changes_name_only_what_differs() -> None:
    assert tallies.changes(["a", "b", None], ["b", "c"]) == {"a": -1, "c": 1}
    assert tallies.changes([None], ["b"]) == {"b": 1}
    assert tallies.changes(["b"], ["b"]) == {}


COUNTS = st.integers(0, 200)
STRATA = st.lists(
    st.builds(
        Stratum, st.floats(0.01, 1.0), st.integers(0, 2000), wins=COUNTS, losses=COUNTS, ties=COUNTS
    ),
    max_size=6,
)


@given(STRATA)
def test_shares_sum_to_one_and_the_interval_holds_the_rate(strata: list[Stratum]) -> None:
    found = win_rate(strata)
    if found is None:
        assert not any(stratum.decided for stratum in strata)
        return
    assert math.isclose(found.wins + found.losses + found.ties, 1.0)
    assert 0 <= found.low <= found.rate + 1e-9
    assert found.rate - 1e-9 <= found.high <= 1
    assert 0 < found.covered <= 1 + 1e-9
    assert found.decided == sum(stratum.decided for stratum in strata)


@given(STRATA)
def test_swapping_the_versions_mirrors_the_rate(strata: list[Stratum]) -> None:
    one = win_rate(strata)
    other = win_rate(
        [replace(stratum, wins=stratum.losses, losses=stratum.wins) for stratum in strata]
    )
    if one is None or other is None:
        assert one is other is None
        return
    assert other.rate == pytest.approx(1 - one.rate, abs=1e-9)
    assert (other.low, other.high) == pytest.approx((1 - one.high, 1 - one.low), abs=1e-9)


def test_everything_alike_is_not_yet_certain() -> None:
    found = win_rate([Stratum(1.0, offered=5, wins=5)])
    assert found is not None
    assert found.low < 0.6


def test_the_rate_is_that_of_all_pairs_though_people_see_the_interesting_ones() -> None:
    """Of 4,000 pairs 85 % agree. Agreements become cases 5 times in 100, and of the disagreements
    people get to the widest ones first: 90 % of those far apart, 30 % of the others, where the
    candidate does much worse."""
    dice = random.Random(7)
    # Share of the pairs, chance to become a case, share that people get to, (win, loss, tie).
    kinds: Sequence[tuple[float, float, float, tuple[float, float, float]]] = [
        (0.85, 0.05, 0.8, (0.02, 0.08, 0.9)),
        (0.10, 1.0, 0.9, (0.7, 0.2, 0.1)),
        (0.05, 1.0, 0.3, (0.1, 0.8, 0.1)),
    ]
    truth = sum(share * (win + tie / 2) for share, _, _, (win, _, tie) in kinds)
    found: list[WinRate] = []
    unweighted: list[float] = []
    for _ in range(400):
        strata = [_labelled(dice, 4000, *kind) for kind in kinds]
        rate = win_rate(strata)
        assert rate is not None
        found.append(rate)
        decided = sum(each.decided for each in strata)
        unweighted.append(sum(each.wins + each.ties / 2 for each in strata) / decided)
    mean = sum(rate.rate for rate in found) / len(found)
    spread = math.sqrt(sum((rate.rate - mean) ** 2 for rate in found) / len(found))
    assert abs(mean - truth) < 3 * spread / math.sqrt(len(found))
    assert abs(sum(unweighted) / len(unweighted) - truth) > 0.05
    assert sum(rate.low <= truth <= rate.high for rate in found) >= 0.93 * len(found)


def _labelled(
    dice: random.Random,
    pairs: int,
    share: float,
    inclusion: float,
    labelled: float,
    chances: tuple[float, float, float],
) -> Stratum:
    there = sum(dice.random() < share for _ in range(pairs))
    offered = sum(dice.random() < inclusion for _ in range(there))
    decided = sum(dice.random() < labelled for _ in range(offered))
    wins, losses, ties = (
        dice.choices(["wins", "losses", "ties"], chances, k=decided).count(name)
        for name in ("wins", "losses", "ties")
    )
    return Stratum(inclusion, offered, wins, losses, ties)
