"""Which version answers: sticky, nested, and the same everywhere."""

import math
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from gateway.routing import choose, index, on_candidate, wants_capture
from rollout.assignment import bucket, unit_of
from rollout.catalog import Catalog
from rollout.engines import Engine, Residency
from rollout.routes import Route
from rollout.state import Rollout, Stage, Trial
from rollout.versions import Version

AT = datetime(2026, 1, 1, tzinfo=UTC)
ENGINE = Engine("main", ("http://one", "http://two"), "base")
ADAPTER = "ab" * 32

units = st.text(min_size=1, max_size=40)
weights = st.floats(min_value=0, max_value=100)


def trial(weight: float, *, stage: Stage = "canary", id: str = "r@2.5") -> Trial:
    return Trial(id, 2, stage, weight, AT, AT)


def version(number: int, *, adapter: str | None = None, engine: str = "main") -> Version:
    return Version("r", number, engine, "base", AT, adapter=adapter)


def catalog(on_trial: Trial | None = None, **residency: frozenset[str]) -> Catalog:
    versions = (version(1), version(2, adapter=ADAPTER))
    return Catalog(
        revision=7,
        routes={"r": Route("r", "main")},
        rollouts={"r": Rollout("r", 3, stable=1, trial=on_trial)},
        versions={one.name: one for one in versions},
        residency={
            f"http://{host}": Residency("main", f"http://{host}", ready=True, served=served)
            for host, served in residency.items()
        },
    )


@given(units, weights)
def test_a_unit_always_gets_the_same_arm(unit: str, weight: float) -> None:
    assert on_candidate(trial(weight), unit) == on_candidate(trial(weight), unit)


@given(units, weights, weights)
def test_raising_the_weight_never_sends_anyone_back(unit: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert not on_candidate(trial(low), unit) or on_candidate(trial(high), unit)


@given(units)
def test_nobody_is_on_the_candidate_at_0_and_everybody_at_100(unit: str) -> None:
    assert not on_candidate(trial(0), unit)
    assert on_candidate(trial(100), unit)


@given(units, weights)
def test_holding_a_trial_moves_nobody(unit: str, weight: float) -> None:
    held = trial(weight, stage="held")
    assert on_candidate(held, unit) == on_candidate(trial(weight), unit)


def test_the_split_is_exact_within_sampling_error() -> None:
    many = [unit_of("key", str(number)) for number in range(100_000)]
    for weight in (1, 5, 20, 50):
        hits = sum(on_candidate(trial(weight), unit) for unit in many)
        share = weight * len(many) / 100
        assert chisquare([hits, len(many) - hits], [share, len(many) - share]).pvalue > 1e-4


def test_the_split_is_exact_whatever_callers_name_themselves() -> None:
    """Numbers in a row, addresses of one house, long common beginnings, requests without a name."""
    kinds = [
        lambda number: str(number),
        lambda number: f"user-{number}@example.org",
        lambda number: "x" * 200 + str(number),
        lambda number: f"{number:032x}",
    ]
    many = [unit_of(f"k{number % 7}", kinds[number % 4](number)) for number in range(100_000)]
    places = Counter(int(bucket("r@2.5", unit) * 100) for unit in many)
    assert chisquare([places[place] for place in range(100)]).pvalue > 1e-4


def test_five_percent_lie_inside_twenty() -> None:
    many = [unit_of("key", str(number)) for number in range(20_000)]
    arms = [
        {unit for unit in many if on_candidate(trial(weight), unit)}
        for weight in (0, 1, 5, 20, 100)
    ]
    for smaller, larger in pairwise(arms):
        assert smaller < larger
    assert len(arms[-1]) == len(many)


def test_every_trial_deals_anew() -> None:
    """Who got the candidate in one trial says nothing of the next, of any route and any weight."""
    many = [unit_of("key", str(number)) for number in range(100_000)]
    for weight, other in ((50.0, trial(50, id="r@3.8")), (5.0, trial(20, id="q@2.5"))):
        table = Counter(
            (on_candidate(trial(weight), unit), on_candidate(other, unit)) for unit in many
        )
        counts = [[table[one, two] for two in (False, True)] for one in (False, True)]
        assert chi2_contingency(counts).pvalue > 1e-4


@given(units, units, units)
def test_two_callers_never_share_a_unit(one: str, other: str, sticky: str) -> None:
    assert (unit_of(one, sticky) == unit_of(other, sticky)) == (one == other)


@given(st.text(max_size=200), units)
def test_a_bucket_lies_in_the_unit_interval_for_salts_of_any_length(salt: str, unit: str) -> None:
    assert 0 <= bucket(salt, unit) < 1


@given(units)
def test_capture_rates_are_chances(request_id: str) -> None:
    assert not wants_capture(request_id, 0.0)
    assert wants_capture(request_id, 1.0)


def test_ids_that_follow_one_another_are_captured_as_if_by_chance() -> None:
    rate, count = 0.1, 20_000
    kept = sum(wants_capture(f"3f2a9c-{number}", rate) for number in range(count))
    assert abs(kept - count * rate) < 4 * math.sqrt(count * rate * (1 - rate))
    in_thousands = [
        sum(wants_capture(f"3f2a9c-{first + n}", rate) for n in range(1000))
        for first in range(0, count, 1000)
    ]
    assert max(abs(each - 100) for each in in_thousands) < 4 * math.sqrt(1000 * rate * (1 - rate))


def test_a_route_without_a_trial_is_answered_by_stable() -> None:
    lane = index(catalog(), {"main": ENGINE}).lanes["r"]
    choice = choose(lane, "anyone")
    assert (choice.arm, choice.served.version.number, choice.fallback) == ("stable", 1, None)


def test_the_candidate_falls_back_on_stable() -> None:
    lane = index(catalog(trial(100), one=frozenset()), {"main": ENGINE}).lanes["r"]
    choice = choose(lane, "anyone")
    assert (choice.arm, choice.served.version.number) == ("candidate", 2)
    assert choice.fallback is not None
    assert choice.fallback.version.number == 1


def test_a_pinned_version_answers_as_itself() -> None:
    view = index(catalog(trial(100)), {"main": ENGINE})
    assert choose(view.lanes["r@1"], "anyone").arm == "pinned"
    assert choose(view.lanes["r@1"], "anyone").served.version.number == 1
    assert choose(view.lanes["r@2"], "anyone").fallback is None


def test_an_adapter_goes_only_where_it_was_proved_and_the_base_everywhere() -> None:
    served = version(2, adapter=ADAPTER).served_name
    view = index(catalog(one=frozenset({served}), two=frozenset()), {"main": ENGINE})
    assert view.lanes["r@2"].stable.urls == ("http://one",)
    assert view.lanes["r@1"].stable.urls == ("http://one", "http://two")


def test_an_engine_of_another_kind_needs_no_proof() -> None:
    view = index(catalog(), {"main": replace(ENGINE, kind="openai")})
    assert view.lanes["r@2"].stable.urls == ENGINE.urls


def test_a_version_of_an_unknown_engine_is_nowhere() -> None:
    assert index(catalog(), {}).lanes["r"].stable.urls == ()


def test_a_route_whose_stable_version_is_unknown_has_no_lane() -> None:
    assert "r" not in index(replace(catalog(), versions={}), {"main": ENGINE}).lanes
