"""Verdicts: what each count leads to, and what a person reads."""

import math
import random
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.evidence import Evidence, PairCounts, Stratum, UnitCounts, Verdict
from rollout.gates import RATES, SPLIT, combine, in_short, judge, thresholds
from rollout.plans import GATES
from rollout.policy import Policy, Slo, policy_problems, servable_gates

POLICY = Policy(alpha=0.05, margin=0.1, minimum_pairs=20)


def judge_counts(policy: Policy = POLICY, /, **counts: int) -> Verdict:
    evidence = Evidence("triage", "triage@3.6", pairs=PairCounts(**counts))
    return combine(judge(evidence, policy, ["pairs"]))


@pytest.mark.parametrize(
    ("counts", "outcome"),
    [
        ({}, "inconclusive"),
        ({"agree": 120}, "inconclusive"),
        ({"agree": 500}, "pass"),  # nothing to decide, and nothing that could have become worse
        ({"agree": 90, "disagree": 30}, "inconclusive"),
        ({"disagree": 30, "ties": 30}, "inconclusive"),
        ({"disagree": 12, "wins": 3, "losses": 4, "ties": 5}, "inconclusive"),
        ({"disagree": 9, "wins": 9}, "inconclusive"),  # clear, but too few
        ({"disagree": 40, "wins": 5, "losses": 31, "ties": 4}, "fail"),
        ({"failed": 12, "losses": 12}, "fail"),  # a fail waits for no minimum
        ({"disagree": 20, "wins": 20}, "pass"),
        ({"disagree": 9, "agree": 11, "wins": 9, "ties": 11}, "pass"),
        ({"disagree": 124, "wins": 80, "losses": 40, "ties": 4}, "pass"),
        ({"disagree": 400, "wins": 200, "losses": 200}, "pass"),  # as good is not worse
    ],
)
def test_counts_lead_to_a_verdict(counts: dict[str, int], outcome: str) -> None:
    assert judge_counts(POLICY, **counts).outcome == outcome


def test_no_data_is_inconclusive_and_says_so() -> None:
    verdict = judge_counts()
    assert verdict.outcome == "inconclusive"
    assert "no pair was compared" in verdict.reason
    assert verdict.needed is None


def test_undecided_pairs_wait_for_labels() -> None:
    verdict = judge_counts(agree=90, disagree=30)
    assert "120 pairs were compared" in verdict.reason
    assert "labels" in verdict.reason


def test_a_candidate_that_answers_as_stable_does_passes_without_labels() -> None:
    assert judge_counts(agree=150).outcome == "inconclusive"
    assert "some 20 more pairs" in judge_counts(agree=150).reason
    verdict = judge_counts(agree=170)
    assert verdict.outcome == "pass"
    assert "170 of 170 pairs agree" in verdict.reason
    assert judge_counts(agree=165, disagree=5).outcome == "inconclusive"


def test_what_loses_fails_however_seldom_it_disagrees() -> None:
    verdict = judge_counts(agree=5_000, disagree=20, losses=20)
    assert verdict.outcome == "fail"


def test_disagreeing_as_often_as_the_margin_hardly_ever_passes_for_agreeing() -> None:
    rng = random.Random(7)
    policy = Policy()
    passed = 0
    for _ in range(150):
        disagree = 0
        for seen in range(1, 1_001):
            disagree += rng.random() < policy.disagreement_margin
            if (
                seen % 10 == 0
                and judge_counts(agree=seen - disagree, disagree=disagree).outcome == "pass"
            ):
                passed += 1
                break
    # A tenth of alpha is 0.5 %; more than three of 150 come by chance once in a hundred times.
    assert passed <= 3


def test_a_fail_names_the_counts_the_number_and_the_threshold() -> None:
    verdict = judge_counts(agree=110, disagree=40, wins=5, losses=31, ties=4)
    assert verdict.value == verdict.values["worse"] >= verdict.threshold == 20.0
    assert verdict.units == 40
    assert "won 5 and lost 31 of 40 decided pairs (4 tied, 150 compared)" in verdict.reason
    assert "of 20" in verdict.reason
    assert verdict.estimate == pytest.approx(5 / 36)
    assert verdict.high is not None
    assert verdict.high < 0.5


def test_an_undecided_trial_forecasts_what_it_takes() -> None:
    verdict = judge_counts(disagree=30, wins=12, losses=7, ties=11)
    assert verdict.outcome == "inconclusive"
    assert verdict.needed is not None
    assert f"about {verdict.needed} more decided pairs" in verdict.reason
    # At that rate, and with as many ties, that many more pass.
    grown = 1 + verdict.needed / 30
    after = judge_counts(
        wins=math.ceil(12 * grown), losses=math.floor(7 * grown), ties=math.ceil(11 * grown)
    )
    assert after.outcome == "pass"


def test_too_few_pairs_are_forecast_up_to_the_minimum() -> None:
    verdict = judge_counts(disagree=9, wins=9)
    assert verdict.values["not_worse"] >= verdict.threshold
    assert verdict.needed == 11


def test_a_wider_margin_passes_sooner() -> None:
    counts = {"disagree": 60, "wins": 31, "losses": 29}
    assert judge_counts(POLICY, **counts).outcome == "inconclusive"
    assert judge_counts(replace(POLICY, margin=0.25), **counts).outcome == "pass"


small = st.integers(0, 300)


@given(small, small, small, small, st.floats(0.001, 0.2), st.floats(0.01, 0.4))
def test_every_verdict_shows_the_numbers_that_led_to_it(
    wins: int, losses: int, ties: int, agree: int, alpha: float, margin: float
) -> None:
    policy = replace(POLICY, alpha=alpha, margin=margin)
    verdict = judge_counts(
        policy, agree=agree, disagree=wins + losses + ties, wins=wins, losses=losses, ties=ties
    )
    assert set(verdict.values) == {"worse", "not_worse"}
    assert verdict.value in verdict.values.values()
    assert verdict.units == wins + losses + ties
    assert verdict.reason
    worse, not_worse = verdict.values["worse"], verdict.values["not_worse"]
    failed = worse >= 1 / alpha
    passed = not failed and not_worse >= 1 / alpha and verdict.units >= policy.minimum_pairs
    alike = verdict.reason.startswith("it answers as stable does")
    assert (verdict.outcome == "fail") == failed
    assert (verdict.outcome == "pass") == (passed or alike)
    assert not (failed and alike)
    assert all(math.isfinite(value) for value in verdict.values.values())


@given(small, small)
def test_one_more_loss_never_turns_a_fail_around(wins: int, losses: int) -> None:
    if judge_counts(wins=wins, losses=losses).outcome == "fail":
        assert judge_counts(wins=wins, losses=losses + 1).outcome == "fail"


def verdict_of(gate: str, outcome: Literal["pass", "fail", "inconclusive"]) -> Verdict:
    return Verdict(gate, outcome, 1.0, 20.0, 7, f"{gate} says {outcome}")


@pytest.mark.parametrize(
    ("outcomes", "combined"),
    [
        (("pass",), "pass"),
        (("fail",), "fail"),
        (("inconclusive",), "inconclusive"),
        (("pass", "pass"), "pass"),
        (("pass", "inconclusive"), "inconclusive"),
        (("inconclusive", "fail"), "fail"),
        (("pass", "fail", "pass"), "fail"),
    ],
)
def test_all_must_pass_and_any_may_fail(
    outcomes: tuple[Literal["pass", "fail", "inconclusive"], ...], combined: str
) -> None:
    verdicts = [verdict_of(f"g{index}", each) for index, each in enumerate(outcomes)]
    assert combine(verdicts).outcome == combined


def test_the_combined_verdict_gives_the_reasons_of_those_that_decided() -> None:
    one = combine([verdict_of("pairs", "pass"), verdict_of("errors", "fail")])
    assert (one.gate, one.reason) == ("errors", "errors says fail")
    both = combine([verdict_of("pairs", "pass"), verdict_of("errors", "pass")])
    assert (both.gate, both.reason) == (
        "pairs and errors",
        "pairs: pairs says pass; errors: errors says pass",
    )


def test_the_slowest_gate_makes_the_forecast() -> None:
    waiting = [replace(verdict_of("a", "inconclusive"), needed=needed) for needed in (3, 9)]
    assert combine(waiting).needed == 9
    assert combine([*waiting, verdict_of("b", "inconclusive")]).needed is None


def test_nothing_to_combine_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one gate"):
        combine([])


def test_only_the_gates_that_a_step_names_have_to_pass() -> None:
    verdicts = [verdict_of("pairs", "pass"), verdict_of("feedback", "inconclusive")]
    assert combine(verdicts).outcome == "inconclusive"
    assert combine(verdicts, required=["pairs"]).outcome == "pass"
    assert combine(verdicts, required=["feedback"]).gate == "feedback"
    assert combine(verdicts, required=[]).outcome == "pass"
    assert combine(verdicts, required=["pairs", "ttft"]).outcome == "inconclusive"


def test_a_gate_that_no_step_names_fails_all_the_same() -> None:
    verdicts = [verdict_of("pairs", "pass"), verdict_of("errors", "fail")]
    assert combine(verdicts, required=["pairs"]).outcome == "fail"


def test_a_broken_split_holds_and_does_not_roll_back() -> None:
    verdicts = [verdict_of("pairs", "fail"), verdict_of(SPLIT, "fail")]
    combined = combine(verdicts, required=["pairs"])
    assert (combined.outcome, combined.gate, combined.hold) == ("inconclusive", SPLIT, True)


def canary(
    candidate: UnitCounts, stable: UnitCounts, weight: float = 10.0, **pairs: int
) -> Evidence:
    strata = (Stratum(weight, stable=stable, candidate=candidate),)
    return Evidence("triage", "triage@3.6", strata=strata, pairs=PairCounts(**pairs))


def said_by(gate: str, evidence: Evidence, policy: Policy = POLICY) -> Verdict:
    return next(v for v in judge(evidence, policy) if v.gate == gate)


BAD = {"errors": "errors", "ttft": "slow_first_token", "total": "slow_total", "feedback": "bad"}


def units(gate: str, count: int, bad: int) -> UnitCounts:
    return replace(UnitCounts(units=count, rated=count), **{BAD[gate]: bad})


@pytest.mark.parametrize("gate", list(RATES))
@pytest.mark.parametrize(
    ("candidate", "stable", "outcome"),
    [
        ((0, 0), (0, 0), "inconclusive"),
        ((10, 0), (90, 1), "inconclusive"),
        ((30, 12), (270, 8), "fail"),
        ((2_000, 40), (18_000, 360), "pass"),
        ((200, 0), (1_800, 0), "pass"),
    ],
)
def test_rates_lead_to_a_verdict(
    gate: str, candidate: tuple[int, int], stable: tuple[int, int], outcome: str
) -> None:
    evidence = canary(units(gate, *candidate), units(gate, *stable))
    verdict = said_by(gate, evidence)
    assert verdict.outcome == outcome
    others = [v for v in judge(evidence, POLICY) if v.gate in RATES and v.gate != gate]
    assert "fail" not in {v.outcome for v in others}


@pytest.mark.parametrize("gate", GATES)
def test_without_data_every_gate_is_inconclusive_and_says_so(gate: str) -> None:
    verdict = said_by(gate, Evidence("triage", "triage@3.6"))
    assert verdict.outcome == "inconclusive"
    assert verdict.units == 0
    assert "nothing to judge by yet" in verdict.reason


def test_the_shadow_alone_says_nothing_of_rates() -> None:
    # All units are stable's: there is nothing to compare with.
    evidence = canary(UnitCounts(), UnitCounts(units=5_000, errors=50), weight=0.0)
    assert said_by("errors", evidence).outcome == "inconclusive"
    assert said_by(SPLIT, evidence).outcome == "inconclusive"


def test_a_verdict_on_rates_can_be_checked_by_a_person() -> None:
    verdict = said_by("errors", canary(units("errors", 120, 4), units("errors", 1_080, 11)))
    assert verdict.outcome == "inconclusive"
    assert verdict.units == 1_200
    assert verdict.details == {
        "candidate": pytest.approx(4 / 120),
        "stable": pytest.approx(11 / 1_080),
    }
    assert verdict.estimate == pytest.approx(4 / 120 - 11 / 1_080)
    assert verdict.low is not None
    assert verdict.estimate is not None
    assert verdict.high is not None
    assert verdict.low < 0.0 < verdict.estimate < verdict.high
    assert verdict.limit == 0.05
    assert "4 of the candidate's 120 units failed (3.33 %)" in verdict.reason
    assert f"about {verdict.needed:,} more units" in verdict.reason


def test_as_many_units_as_forecast_decide() -> None:
    verdict = said_by("errors", canary(units("errors", 60, 3), units("errors", 540, 6)))
    assert verdict.needed is not None
    more = 1 + verdict.needed / 600
    after = canary(
        units("errors", math.ceil(60 * more), math.ceil(3 * more)),
        units("errors", math.floor(540 * more), math.floor(6 * more)),
    )
    assert said_by("errors", after).outcome != "inconclusive"


def test_strata_are_compared_within_themselves() -> None:
    # All rates rose tenfold when the weight did. Pooled, the candidate would look much worse.
    early = Stratum(1.0, stable=units("errors", 9_900, 99), candidate=units("errors", 100, 1))
    late = Stratum(50.0, stable=units("errors", 1_000, 100), candidate=units("errors", 1_000, 100))
    verdict = said_by("errors", Evidence("triage", "t", strata=(early, late)))
    assert verdict.outcome != "fail"
    assert verdict.estimate == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("counts", "outcome"),
    [
        ({}, "inconclusive"),
        ({"agree": 5}, "inconclusive"),
        ({"agree": 200}, "pass"),
        ({"agree": 100, "disagree": 30, "only_stable_valid": 20}, "fail"),
        ({"agree": 900, "disagree": 40, "only_stable_valid": 9, "only_candidate_valid": 8}, "pass"),
    ],
)
def test_the_schema_is_judged_on_pairs(counts: dict[str, int], outcome: str) -> None:
    assert said_by("schema", Evidence("t", "t@1.2", pairs=PairCounts(**counts))).outcome == outcome


def test_a_split_that_is_broken_sets_every_other_gate_aside() -> None:
    evidence = canary(
        units("errors", 500, 200), units("errors", 9_500, 0), agree=40, failed=40, losses=40
    )
    *others, split = judge(evidence, POLICY)
    assert (split.gate, split.outcome, split.hold) == (SPLIT, "fail", True)
    assert "500 of 10,000 units, and the weights promise it 1,000" in split.reason
    assert {verdict.outcome for verdict in others} == {"inconclusive"}
    assert all("set aside" in verdict.reason for verdict in others)
    assert combine((*others, split)).hold


def test_ratings_that_come_more_often_from_one_arm_pass_nothing() -> None:
    alike = canary(UnitCounts(2_000, rated=500, bad=50), UnitCounts(18_000, rated=4_500, bad=450))
    assert said_by("feedback", alike).outcome == "pass"
    silent = canary(UnitCounts(2_000, rated=250, bad=25), UnitCounts(18_000, rated=4_500, bad=450))
    assert said_by("feedback", silent).outcome == "inconclusive"
    assert "not rated equally often" in said_by("feedback", silent).reason


def test_the_floor_is_subtracted_from_the_disagreement() -> None:
    pairs = PairCounts(agree=700, disagree=300, wins=60, losses=50)
    bare = Evidence("triage", "triage@3.6", pairs=pairs)
    assert said_by("pairs", bare).details == {"disagreement": 0.3}
    verdict = said_by("pairs", replace(bare, floor=PairCounts(agree=4_800, disagree=1_200)))
    details = verdict.details
    assert details["floor"] == 0.2
    assert details["excess"] == pytest.approx(0.1)
    assert 0.0 < details["excess_low"] < 0.1 < details["excess_high"] < 0.2
    assert "stable with itself in 20 %: 10 points more" in verdict.reason


def test_alpha_is_divided_as_the_policy_says() -> None:
    policy = replace(POLICY, alpha_shares={"errors": 3.0})
    limits = thresholds(policy, ["pairs", "errors"])
    assert limits["errors"].fail == pytest.approx(20 * 4 / 3)
    assert limits["pairs"].fail == pytest.approx(80.0)
    assert limits["pairs"].passing == limits["errors"].passing == pytest.approx(20.0)
    assert limits[SPLIT].fail == 1_000.0


@given(
    st.dictionaries(st.sampled_from(GATES), st.floats(0.01, 100.0)),
    st.sets(st.sampled_from(GATES), min_size=1),
)
def test_the_parts_of_alpha_sum_to_alpha(shares: dict[str, float], asked: set[str]) -> None:
    limits = thresholds(replace(POLICY, alpha_shares=shares), sorted(asked))
    assert sum(1 / limits[gate].fail for gate in asked) == pytest.approx(POLICY.alpha)


def test_a_gate_that_the_route_does_not_ask_for_is_left_out() -> None:
    asked = servable_gates(Slo(total_seconds=5.0), None)
    verdicts = judge(Evidence("triage", "t"), POLICY, asked)
    assert [v.gate for v in verdicts] == ["pairs", "errors", "total", "feedback", SPLIT]


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (Policy(error_margin=0.0), "error_margin"),
        (Policy(slo_margin=1.0), "slo_margin"),
        (Policy(split_alpha=0.0), "split_alpha"),
        (Policy(alpha_shares={"eros": 1.0}), "alpha_shares"),
        (Policy(alpha_shares={"errors": 0.0}), "alpha_shares"),
    ],
)
def test_numbers_that_make_no_sense_are_named(policy: Policy, field: str) -> None:
    assert [name for name, _ in policy_problems(policy)] == [field]


def test_a_line_has_the_number_its_bounds_the_limit_the_units_and_the_forecast() -> None:
    verdict = Verdict(
        "errors", "inconclusive", 1.9, 20.0, 1_200, "…", 300,
        estimate=0.021, low=-0.003, high=0.061, limit=0.05,
    )  # fmt: skip
    assert in_short(verdict) == (
        "+2.1 points (-0.3 to +6.1); passes below +5, fails above 0; 1,200 units, about 300 more "
        "needed"
    )
    pairs = replace(verdict, gate="pairs", estimate=0.52, low=0.41, high=0.63, limit=0.4)
    assert in_short(replace(pairs, counted="decided pairs", needed=None)) == (
        "wins 52 % (41 % to 63 %); passes above 40 %, fails below 50 %; 1,200 decided pairs"
    )
    stored_before = Verdict("pairs", "pass", 31.0, 20.0, 40, "not worse")
    assert in_short(stored_before) == "e-value 31 of 20; 40 units"


def test_where_nothing_was_seen_the_line_says_why() -> None:
    for verdict in judge(Evidence("triage", "triage@3.6"), POLICY):
        assert in_short(verdict) == verdict.reason


@given(
    st.integers(0, 3_000), st.integers(0, 3_000), st.floats(0.0, 1.0), st.floats(0.0, 1.0),
    st.sampled_from([0.5, 1.0, 10.0, 50.0]),
)  # fmt: skip
def test_every_verdict_on_rates_agrees_with_its_bounds(
    count: int, others: int, bad: float, stable_bad: float, weight: float
) -> None:
    evidence = canary(
        units("errors", count, round(count * bad)),
        units("errors", others, round(others * stable_bad)),
        weight,
    )
    verdict = said_by("errors", evidence)
    assert verdict.reason
    assert verdict.low is not None
    assert verdict.high is not None
    assert verdict.limit is not None
    assert all(math.isfinite(value) for value in verdict.values.values())
    if verdict.outcome == "fail":
        assert verdict.low >= -2e-4
    if verdict.outcome == "pass":
        assert verdict.high <= verdict.limit + 2e-4
    if verdict.outcome == "inconclusive" and said_by(SPLIT, evidence).outcome != "fail":
        assert verdict.low <= 1e-9
        assert verdict.high >= verdict.limit - 1e-9
