"""Verdicts: what each count leads to, and what a person reads."""

import math
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.evidence import Evidence, PairCounts, Verdict
from rollout.gates import GATES, combine, judge
from rollout.policy import Policy

POLICY = Policy(alpha=0.05, margin=0.1, minimum_pairs=20)


def judge_counts(policy: Policy = POLICY, /, **counts: int) -> Verdict:
    evidence = Evidence("triage", "triage@3.6", pairs=PairCounts(**counts))
    return combine(judge(evidence, None, policy))


@pytest.mark.parametrize(
    ("counts", "outcome"),
    [
        ({}, "inconclusive"),
        ({"agree": 500}, "inconclusive"),
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


def test_a_fail_names_the_counts_the_number_and_the_threshold() -> None:
    verdict = judge_counts(agree=110, disagree=40, wins=5, losses=31, ties=4)
    assert verdict.value == verdict.values["worse"] >= verdict.threshold == 20.0
    assert verdict.units == 40
    assert "won 5 and lost 31 of 40 decided pairs (4 tied, 150 compared)" in verdict.reason
    assert "7,6" in verdict.reason
    assert "20 is enough" in verdict.reason


def test_an_undecided_trial_forecasts_what_it_takes() -> None:
    verdict = judge_counts(disagree=30, wins=14, losses=6, ties=10)
    assert verdict.outcome == "inconclusive"
    assert verdict.needed is not None
    assert f"about {verdict.needed} more decided pairs" in verdict.reason
    # At that rate, and with as many ties, that many more pass.
    grown = 1 + verdict.needed / 30
    after = judge_counts(
        wins=math.ceil(14 * grown), losses=math.floor(6 * grown), ties=math.ceil(10 * grown)
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
    failed = worse >= len(GATES) / alpha
    passed = not failed and not_worse >= 1 / alpha and verdict.units >= policy.minimum_pairs
    assert (verdict.outcome == "fail") == failed
    assert (verdict.outcome == "pass") == passed
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
    assert (both.gate, both.reason) == ("pairs and errors", "pairs says pass; errors says pass")


def test_the_slowest_gate_makes_the_forecast() -> None:
    waiting = [replace(verdict_of("a", "inconclusive"), needed=needed) for needed in (3, 9)]
    assert combine(waiting).needed == 9
    assert combine([*waiting, verdict_of("b", "inconclusive")]).needed is None


def test_nothing_to_combine_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one gate"):
        combine([])
