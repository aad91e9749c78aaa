"""What a rollout does by itself, what it leaves to a person, and what it says it waits for."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.engines import Placement
from rollout.evidence import Evidence, PairCounts, Stratum, UnitCounts, Verdict
from rollout.planner import Known, Standing, next_event, standing
from rollout.plans import PlanSpec, StepSpec
from rollout.policy import Policy, plan_of
from rollout.state import (
    CanarySet,
    Event,
    Held,
    Promoted,
    Proposed,
    Queued,
    RolledBack,
    Rollout,
    Stage,
    Trial,
    apply,
)

Outcome = Literal["pass", "fail", "inconclusive"]

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
SOAKED = START + timedelta(seconds=600)
LATE = START + timedelta(days=30)
AUTOMATIC = Policy(automatic=True, steps=(1.0, 10.0, 50.0), soak_seconds=600)
HERE = Placement("triage@3", "main", ("http://a",), {}, {})
NOT_HERE = Placement("triage@3", "main", (), {"http://a": "it is being loaded"}, {})


def rollout(stage: Stage = "shadow", weight: float = 0.0, **trial: Any) -> Rollout:
    on = Trial("triage@3.6", 3, stage, weight, started_at=START, stage_since=START, **trial)
    return Rollout("triage", revision=6, stable=2, previous=1, trial=on)


def verdict(outcome: Outcome, gate: str = "pairs", **more: Any) -> Verdict:
    return Verdict(gate, outcome, 812.0, 20.0, 40, f"the numbers of {outcome}", **more)


def evidence(units: int = 1000, pairs: int = 1000) -> Evidence:
    """So many candidate's units at every weight that the tests use."""
    weights = (0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 100.0)
    strata = tuple(Stratum(weight, UnitCounts(units), UnitCounts(units)) for weight in weights)
    return Evidence("triage", "triage@3.6", pairs=PairCounts(agree=pairs), strata=strata)


def known(*verdicts: Verdict, found: Placement = HERE, **counted: int) -> Known:
    return Known(evidence(**counted), verdicts, found)


PASSED = known(verdict("pass"), verdict("pass", "errors"))
UNDECIDED = known(verdict("inconclusive"), verdict("inconclusive", "errors"))


def texts(at: Standing | None) -> list[str]:
    assert at is not None
    return [wait.text for wait in at.waits]


# A gate that fails.


@pytest.mark.parametrize("policy", [Policy(), AUTOMATIC])
@pytest.mark.parametrize(
    ("stage", "weight"), [("shadow", 0.0), ("canary", 10.0), ("held", 0.0), ("held", 50.0)]
)
def test_a_fail_rolls_back_from_every_stage_at_once(
    stage: Stage, weight: float, policy: Policy
) -> None:
    failed = known(verdict("fail"), verdict("pass", "errors"), found=NOT_HERE)
    event = next_event(rollout(stage, weight), failed, policy, START)
    assert event == RolledBack(at=START, by="sluice", reason="gate pairs: the numbers of fail")


def test_a_gate_that_the_plan_does_not_name_rolls_back_too() -> None:
    failed = known(verdict("pass"), verdict("pass", "errors"), verdict("fail", "feedback"))
    event = next_event(rollout("canary", 10.0), failed, AUTOMATIC, SOAKED)
    assert event == RolledBack(at=SOAKED, by="sluice", reason="gate feedback: the numbers of fail")


def test_a_broken_split_holds_the_trial_for_a_person_and_decides_nothing() -> None:
    broken = verdict("fail", "split", hold=True)
    doubtful = known(verdict("fail"), broken)
    event = next_event(rollout("canary", 10.0), doubtful, AUTOMATIC, SOAKED)
    assert isinstance(event, Held)
    assert "gate split" in event.reason
    assert next_event(rollout("held", 10.0), doubtful, AUTOMATIC, SOAKED) is None


# Going on.


@pytest.mark.parametrize(
    ("weight", "step"), [(0.0, 1.0), (0.5, 1.0), (1.0, 10.0), (10.0, 50.0), (25.0, 50.0)]
)
def test_a_pass_takes_an_automatic_rollout_to_the_next_step(weight: float, step: float) -> None:
    stage: Stage = "canary" if weight else "shadow"
    event = next_event(rollout(stage, weight), PASSED, AUTOMATIC, SOAKED)
    assert isinstance(event, CanarySet)
    assert (event.percent, event.by) == (step, "sluice")
    assert "the numbers of pass" in event.reason


@pytest.mark.parametrize("weight", [50.0, 75.0, 100.0])
def test_behind_the_last_step_it_is_promoted(weight: float) -> None:
    event = next_event(rollout("canary", weight), PASSED, AUTOMATIC, SOAKED)
    assert isinstance(event, Promoted)


def test_a_step_of_all_traffic_is_a_promotion() -> None:
    policy = replace(AUTOMATIC, steps=(10.0, 100.0))
    assert isinstance(next_event(rollout("canary", 10.0), PASSED, policy, SOAKED), Promoted)


def test_the_shadow_asks_for_pairs_alone_and_a_canary_for_errors_too() -> None:
    only_pairs = known(verdict("pass"), verdict("inconclusive", "errors"))
    assert isinstance(next_event(rollout(), only_pairs, AUTOMATIC, SOAKED), CanarySet)
    assert next_event(rollout("canary", 1.0), only_pairs, AUTOMATIC, SOAKED) is None


def test_nothing_is_promoted_before_every_gate_of_the_plan_has_passed() -> None:
    """Though the last step itself asks for one of them alone."""
    last = StepSpec(50.0, gates=("pairs",))
    policy = replace(AUTOMATIC, steps=(10.0, last))
    only_pairs = known(verdict("pass"), verdict("inconclusive", "errors"))
    at = rollout("canary", 50.0)
    assert next_event(at, only_pairs, policy, SOAKED) is None
    assert texts(standing(at, only_pairs, policy, SOAKED)) == [
        "waits for gate errors: the numbers of inconclusive"
    ]
    assert isinstance(next_event(at, PASSED, policy, SOAKED), Promoted)


def test_a_pass_soaks_first() -> None:
    early = SOAKED - timedelta(seconds=1)
    assert next_event(rollout(), PASSED, AUTOMATIC, early) is None
    assert texts(standing(rollout(), PASSED, AUTOMATIC, early)) == ["soaks until 12:10:00 UTC"]
    long = replace(AUTOMATIC, soak_seconds=2 * 86400.0)
    assert texts(standing(rollout(), PASSED, long, early)) == ["soaks until 2026-03-03 12:00 UTC"]


def test_without_traffic_nothing_advances() -> None:
    few = replace(PASSED, evidence=evidence(units=7))
    at = rollout("canary", 10.0)
    assert next_event(at, few, AUTOMATIC, SOAKED) is None
    assert texts(standing(at, few, AUTOMATIC, SOAKED)) == ["waits for 13 more units"]
    one = replace(PASSED, evidence=evidence(units=19))
    assert texts(standing(at, one, AUTOMATIC, SOAKED)) == ["waits for 1 more unit"]


def test_units_of_another_percentage_do_not_count() -> None:
    elsewhere = Evidence("triage", "t", strata=(Stratum(1.0, candidate=UnitCounts(500)),))
    at = standing(rollout("canary", 10.0), replace(PASSED, evidence=elsewhere), AUTOMATIC, SOAKED)
    assert at is not None
    assert at.units == 0


def test_the_shadow_may_ask_for_a_number_of_pairs() -> None:
    policy = replace(AUTOMATIC, steps=(StepSpec(0.0, minimum_units=100), 10.0))
    few = replace(PASSED, evidence=evidence(pairs=40))
    assert texts(standing(rollout(), few, policy, SOAKED)) == ["waits for 60 more compared pairs"]
    assert next_event(rollout(), few, policy, SOAKED) is None


def test_more_traffic_waits_until_the_candidate_is_resident() -> None:
    away = replace(PASSED, found=NOT_HERE)
    assert next_event(rollout(), away, AUTOMATIC, SOAKED) is None
    assert texts(standing(rollout(), away, AUTOMATIC, SOAKED)) == [
        "waits until triage@3 is resident: replica http://a: it is being loaded"
    ]


def test_a_pass_waits_for_a_person_unless_automatic() -> None:
    assert next_event(rollout(), PASSED, Policy(), LATE) is None
    assert texts(standing(rollout(), PASSED, Policy(), LATE)) == [
        "waits for approval: sluice rollout advance triage"
    ]


def test_one_step_may_wait_for_a_person() -> None:
    policy = replace(AUTOMATIC, steps=(1.0, StepSpec(10.0, approval=True), 50.0))
    assert isinstance(next_event(rollout(), PASSED, policy, LATE), CanarySet)
    assert next_event(rollout("canary", 1.0), PASSED, policy, LATE) is None
    # A person who sets a percentage beyond it has approved it.
    event = next_event(rollout("canary", 25.0), PASSED, policy, LATE)
    assert isinstance(event, CanarySet)
    assert event.percent == 50.0


def test_a_pinned_plan_is_followed_whatever_becomes_of_the_route() -> None:
    pinned = plan_of(AUTOMATIC, PlanSpec((30.0,), gates=("pairs",)))
    at = rollout(plan=pinned)
    event = next_event(at, known(verdict("pass")), Policy(), SOAKED)
    assert isinstance(event, CanarySet)
    assert event.percent == 30.0


# Waiting too long.


@pytest.mark.parametrize("policy", [Policy(), AUTOMATIC])
def test_an_undecided_trial_is_held_after_the_time_limit_with_its_forecast(policy: Policy) -> None:
    limit = START + timedelta(seconds=policy.time_limit_seconds)
    undecided = known(verdict("inconclusive", needed=80, counted="decided pairs"))
    assert next_event(rollout(), undecided, policy, limit - timedelta(seconds=1)) is None
    event = next_event(rollout(), undecided, policy, limit)
    assert isinstance(event, Held)
    assert event.reason == (
        "undecided after 7 d: waits for gate pairs: about 80 more decided pairs; "
        "the numbers of inconclusive"
    )


def test_a_trial_without_traffic_is_held_after_the_time_limit() -> None:
    few = replace(PASSED, evidence=evidence(units=7))
    event = next_event(rollout("canary", 10.0), few, AUTOMATIC, LATE)
    assert isinstance(event, Held)
    assert event.reason == "undecided after 7 d: waits for 13 more units"


def test_a_step_has_a_time_limit_of_its_own() -> None:
    quick = StepSpec(10.0, time_limit_seconds=1200.0)
    policy = replace(AUTOMATIC, steps=(1.0, quick))
    after = START + timedelta(seconds=1200)
    assert isinstance(next_event(rollout("canary", 10.0), UNDECIDED, policy, after), Held)
    assert next_event(rollout("canary", 1.0), UNDECIDED, policy, after) is None


def test_what_waits_for_a_person_or_an_engine_alone_is_not_held() -> None:
    away = replace(PASSED, found=NOT_HERE)
    assert next_event(rollout(), away, Policy(), LATE) is None


def test_a_resumed_trial_gets_its_time_afresh() -> None:
    on = rollout().trial
    assert on is not None
    resumed_at = START + timedelta(days=8)
    resumed = replace(rollout(), trial=replace(on, stage_since=resumed_at))
    event = next_event(resumed, UNDECIDED, Policy(), resumed_at + timedelta(days=1))
    assert event is None


@pytest.mark.parametrize("said", [PASSED, UNDECIDED])
def test_a_held_trial_waits_for_a_person(said: Known) -> None:
    at = rollout("held", 10.0)
    assert next_event(at, said, AUTOMATIC, LATE) is None
    assert texts(standing(at, said, AUTOMATIC, LATE))[0] == (
        "is held until a person decides: sluice rollout resume triage, "
        "sluice rollout rollback triage"
    )


# Where it stands.


def test_where_a_trial_stands() -> None:
    policy = replace(AUTOMATIC, steps=(1.0, StepSpec(10.0, time_limit_seconds=3600.0), 50.0))
    at = standing(rollout("canary", 25.0), UNDECIDED, policy, START)
    assert at is not None
    assert at.plan.steps[at.step].percent == 10.0
    assert (at.units, at.next_percent) == (1000, 50.0)
    assert (at.entered_at, at.limit_at) == (START, START + timedelta(hours=1))
    assert [wait.kind for wait in at.waits] == ["gate", "gate", "soak"]


def test_a_gate_that_has_not_judged_is_waited_for() -> None:
    assert texts(standing(rollout(), known(), AUTOMATIC, SOAKED)) == [
        "waits for gate pairs, which has not judged yet"
    ]


# The queue.


def test_the_first_that_waits_is_proposed_once_no_trial_is_on() -> None:
    plan = plan_of(Policy(steps=(7.0,)))
    on = apply(rollout(), Queued(4, START, "bob", "a hunch", plan))
    on = apply(on, Queued(5, START, "bob"))
    assert next_event(on, UNDECIDED, AUTOMATIC, SOAKED) is None
    held = apply(on, Held(START, "ann"))
    assert next_event(held, UNDECIDED, AUTOMATIC, SOAKED) is None
    ended = apply(held, RolledBack(START, "ann"))
    event = next_event(ended, None, AUTOMATIC, SOAKED)
    said = "its turn has come: bob queued it (a hunch)"
    assert event == Proposed(4, SOAKED, "sluice", said, plan)
    after = apply(ended, event)
    assert after.trial is not None
    assert (after.trial.candidate, after.trial.plan) == (4, plan)
    assert [each.version for each in after.queued] == [5]


def test_without_a_trial_nothing_happens() -> None:
    assert next_event(Rollout("triage", revision=6, stable=2), None, AUTOMATIC, SOAKED) is None


# Always.


def steps() -> st.SearchStrategy[tuple[float, ...]]:
    percent = st.floats(0.1, 100)
    return st.lists(percent, min_size=1, max_size=4, unique=True).map(lambda s: tuple(sorted(s)))


@given(
    stage=st.sampled_from(["shadow", "canary", "held"]),
    weight=st.floats(0.5, 100),
    pairs=st.sampled_from(["pass", "fail", "inconclusive"]),
    errors=st.sampled_from(["pass", "fail", "inconclusive"]),
    found=st.sampled_from([HERE, NOT_HERE]),
    policy=st.builds(
        Policy, automatic=st.booleans(), steps=steps(), minimum_units=st.sampled_from([0, 5])
    ),
    waited=st.timedeltas(timedelta(0), timedelta(days=20)),
)
def test_what_it_plans_can_always_be_applied_and_never_skips_a_gate(
    stage: Stage,
    weight: float,
    pairs: Outcome,
    errors: Outcome,
    found: Placement,
    policy: Policy,
    waited: timedelta,
) -> None:
    before = rollout(stage, 0.0 if stage == "shadow" else weight)
    said = known(verdict(pairs), verdict(errors, "errors"), found=found)
    event: Event | None = next_event(before, said, policy, START + waited)
    at = standing(before, said, policy, START + waited)
    assert at is not None
    if event is None:
        assert at.waits
        return
    after = apply(before, event)
    assert before.trial is not None
    if isinstance(event, CanarySet | Promoted):
        assert not at.waits
        assert found.everywhere
        assert pairs == "pass"
        assert errors != "fail"
    if isinstance(event, Promoted):
        assert (pairs, errors) == ("pass", "pass")
    if isinstance(event, CanarySet):
        assert after.trial is not None
        assert after.trial.weight > before.trial.weight
