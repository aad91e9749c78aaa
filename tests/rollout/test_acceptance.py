"""The gate before a proposal, demand by demand."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.acceptance import accept, because, overall
from rollout.binomial import mcnemar_exact
from rollout.evaluation import EvaluationRules, evaluation_problems
from rollout.evidence import Report, Score, Slice, Verdict
from rollout.intervals import difference_interval

AT = datetime(2026, 1, 1, tzinfo=UTC)
RULES = EvaluationRules()


def report(gained: int, lost: int, rows: int = 300, *slices: Slice, **ours: Any) -> Report:
    parent = Score("triage@1", rows // 2, rows, 0.4, 0.6, p50_seconds=1.0, cost_per_success=100.0)
    mine = replace(parent, version="triage@2", correct=rows // 2 + gained - lost, **ours)
    low, high = difference_interval([1.0] * gained + [-1.0] * lost + [0.0] * (rows - gained - lost))
    return Report(
        id="",
        route="triage",
        version="triage@2",
        parent="triage@1",
        suite="s",
        scores=(mine, parent),
        gained=gained,
        lost=lost,
        p_value=mcnemar_exact(gained, lost),
        outcome="inconclusive",
        reason="",
        created_at=AT,
        low=low,
        high=high,
        slices=slices,
    )


def piece(tag: str, difference: float, low: float, high: float, p: float, rows: int = 50) -> Slice:
    return Slice(tag, rows, 0.8 + difference, 0.8, 3, 3, low, high, p, p, 0.1)


@pytest.mark.parametrize(
    ("gained", "lost", "outcome", "needed"),
    [
        (30, 5, "pass", False),
        (5, 30, "fail", False),
        (12, 6, "inconclusive", True),
        (6, 6, "inconclusive", False),
        (6, 12, "inconclusive", False),
        (0, 0, "inconclusive", False),
        (6, 0, "pass", False),
        (5, 0, "inconclusive", True),
    ],
)
def test_better_than_its_parent_by_the_paired_test(
    gained: int, lost: int, outcome: str, needed: bool
) -> None:
    (verdict,) = accept(report(gained, lost), RULES)

    assert (verdict.gate, verdict.outcome) == ("better", outcome)
    assert (verdict.needed is not None) == needed
    assert f"{gained} gained, {lost} lost" in verdict.reason
    if outcome == "inconclusive":
        assert "rows" in verdict.reason


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (piece("short", 0.02, -0.03, 0.07, 0.5), "pass"),
        (piece("short", -0.01, -0.04, 0.02, 0.5), "pass"),
        (piece("short", -0.02, -0.08, 0.04, 0.5), "inconclusive"),
        (piece("short", -0.2, -0.3, -0.1, 0.001), "fail"),
        (piece("short", -0.2, -0.3, -0.1, 0.2), "inconclusive"),
        (piece("short", -0.03, -0.045, -0.02, 0.001), "pass"),
    ],
)
def test_a_guarded_slice_must_not_be_worse_than_the_margin(found: Slice, outcome: str) -> None:
    _, verdict = accept(report(30, 5, 300, found), EvaluationRules(guarded=("short",)))

    assert (verdict.gate, verdict.outcome) == ("slice short", outcome)
    assert verdict.limit == -0.05


def test_an_open_slice_says_how_many_rows_it_takes() -> None:
    found = piece("short", -0.01, -0.09, 0.07, 0.5)
    _, verdict = accept(report(30, 5, 300, found), EvaluationRules(guarded=("short",)))

    assert verdict.needed is not None
    assert verdict.needed > 0
    assert f"{verdict.needed + found.rows:,} rows" in verdict.reason


def test_a_guarded_slice_without_rows_is_open_and_all_are_guarded_by_a_star() -> None:
    rules = EvaluationRules(guarded=("none",))
    _, verdict = accept(report(30, 5), rules)
    assert verdict.outcome == "inconclusive"
    assert "no row" in verdict.reason

    slices = [piece(tag, 0, -0.01, 0.01, 1) for tag in ("a", "b")]
    found = accept(report(30, 5, 300, *slices), EvaluationRules(guarded=("*",)))
    assert [verdict.gate for verdict in found] == ["better", "slice a", "slice b"]


@pytest.mark.parametrize(
    ("rules", "ours", "gate", "outcome"),
    [
        (EvaluationRules(latency_ratio=1.5), {"p50_seconds": 1.4}, "latency", "pass"),
        (EvaluationRules(latency_ratio=1.5), {"p50_seconds": 1.6}, "latency", "fail"),
        (EvaluationRules(latency_ratio=1.5), {"p50_seconds": 0.0}, "latency", "inconclusive"),
        (EvaluationRules(p99_seconds=2), {"p99_seconds": 1.9}, "p99", "pass"),
        (EvaluationRules(p99_seconds=2), {"p99_seconds": 2.1}, "p99", "fail"),
        (EvaluationRules(p99_seconds=2), {}, "p99", "inconclusive"),
        (EvaluationRules(cost_ratio=1.1), {"cost_per_success": 109.0}, "cost", "pass"),
        (EvaluationRules(cost_ratio=1.1), {"cost_per_success": 111.0}, "cost", "fail"),
        (EvaluationRules(cost_ratio=1.1), {"cost_per_success": None}, "cost", "inconclusive"),
        (EvaluationRules(cost_ratio=1.1), {"cost_unit": "USD"}, "cost", "inconclusive"),
    ],
)
def test_latency_and_cost_stay_within_limits(
    rules: EvaluationRules, ours: dict[str, Any], gate: str, outcome: str
) -> None:
    _, verdict = accept(report(30, 5, **ours), rules)

    assert (verdict.gate, verdict.outcome) == (gate, outcome)


def test_all_must_pass_and_one_that_fails_decides() -> None:
    verdicts = {
        outcome: Verdict(outcome, outcome, 0, 0, 0, f"because of {outcome}")
        for outcome in ("pass", "fail", "inconclusive")
    }
    assert overall([verdicts["pass"]]) == "pass"
    assert overall([verdicts["pass"], verdicts["inconclusive"]]) == "inconclusive"
    assert overall(list(verdicts.values())) == "fail"
    assert because(list(verdicts.values())) == "because of fail"
    assert overall([]) == "inconclusive"


@given(st.integers(0, 60), st.integers(0, 60), st.sampled_from([0.01, 0.05, 0.2]))
def test_what_passes_is_ahead_and_would_fail_the_other_way_round(
    one: int, other: int, alpha: float
) -> None:
    rules = EvaluationRules(alpha=alpha)
    (verdict,) = accept(report(one, other), rules)
    (mirrored,) = accept(report(other, one), rules)

    turned = {"pass": "fail", "fail": "pass", "inconclusive": "inconclusive"}
    assert mirrored.outcome == turned[verdict.outcome]
    if verdict.outcome == "pass":
        assert one > other
    assert verdict.needed is None or verdict.needed > 0


@given(st.integers(0, 60), st.integers(0, 60))
def test_more_demands_never_help(gained: int, lost: int) -> None:
    order = ["fail", "inconclusive", "pass"]
    slices = [piece("a", -0.02, -0.08, 0.04, 0.5)]
    found = report(gained, lost, 300, *slices)

    fewer = overall(accept(found, RULES))
    more = overall(accept(found, EvaluationRules(guarded=("*",), cost_ratio=1.0)))
    assert order.index(more) <= order.index(fewer)


@pytest.mark.parametrize(
    ("rules", "field"),
    [
        (EvaluationRules(alpha=0), "alpha"),
        (EvaluationRules(margin=0.5), "margin"),
        (EvaluationRules(latency_ratio=0), "latency_ratio"),
        (EvaluationRules(p99_seconds=-1), "p99_seconds"),
        (EvaluationRules(maximum_looks=0), "maximum_looks"),
        (EvaluationRules(prompt_rows=0), "prompt_rows"),
    ],
)
def test_rules_that_make_no_sense_are_named(rules: EvaluationRules, field: str) -> None:
    assert [name for name, _ in evaluation_problems(rules)] == [field]
    assert list(evaluation_problems(RULES)) == []
