"""What a rollout does by itself, and what it leaves to a person."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.evidence import Verdict
from rollout.planner import next_event
from rollout.policy import Policy
from rollout.state import CanarySet, Held, Promoted, RolledBack, Rollout, Stage, Trial, apply

Outcome = Literal["pass", "fail", "inconclusive"]

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
SOAKED = START + timedelta(seconds=600)
AUTOMATIC = Policy(automatic=True, steps=(1.0, 10.0, 50.0), soak_seconds=600)


def rollout(stage: Stage = "shadow", weight: float = 0.0) -> Rollout:
    trial = Trial("triage@3.6", 3, stage, weight, started_at=START, stage_since=START)
    return Rollout("triage", revision=6, stable=2, previous=1, trial=trial)


def verdict(outcome: Outcome) -> Verdict:
    return Verdict("pairs", outcome, 812.0, 20.0, 40, f"the numbers of {outcome}")


@pytest.mark.parametrize("policy", [Policy(), AUTOMATIC])
@pytest.mark.parametrize(
    ("stage", "weight"), [("shadow", 0.0), ("canary", 10.0), ("held", 0.0), ("held", 50.0)]
)
def test_a_fail_rolls_back_from_every_stage_at_once(
    stage: Stage, weight: float, policy: Policy
) -> None:
    event = next_event(rollout(stage, weight), verdict("fail"), policy, START)
    assert event == RolledBack(at=START, by="sluice", reason="gate pairs: the numbers of fail")


@pytest.mark.parametrize(
    ("weight", "step"), [(0.0, 1.0), (0.5, 1.0), (1.0, 10.0), (10.0, 50.0), (25.0, 50.0)]
)
def test_a_pass_takes_an_automatic_rollout_to_the_next_step(weight: float, step: float) -> None:
    stage: Stage = "canary" if weight else "shadow"
    event = next_event(rollout(stage, weight), verdict("pass"), AUTOMATIC, SOAKED)
    assert isinstance(event, CanarySet)
    assert (event.percent, event.by) == (step, "sluice")
    assert "the numbers of pass" in event.reason


@pytest.mark.parametrize("weight", [50.0, 75.0, 100.0])
def test_behind_the_last_step_it_is_promoted(weight: float) -> None:
    event = next_event(rollout("canary", weight), verdict("pass"), AUTOMATIC, SOAKED)
    assert isinstance(event, Promoted)


def test_a_step_of_all_traffic_is_a_promotion() -> None:
    policy = replace(AUTOMATIC, steps=(10.0, 100.0))
    event = next_event(rollout("canary", 10.0), verdict("pass"), policy, SOAKED)
    assert isinstance(event, Promoted)


def test_without_steps_the_shadow_is_enough() -> None:
    policy = replace(AUTOMATIC, steps=())
    assert isinstance(next_event(rollout(), verdict("pass"), policy, SOAKED), Promoted)


def test_a_pass_soaks_first() -> None:
    early = SOAKED - timedelta(seconds=1)
    assert next_event(rollout(), verdict("pass"), AUTOMATIC, early) is None


def test_a_pass_waits_for_a_person_unless_automatic() -> None:
    late = START + timedelta(days=30)
    assert next_event(rollout(), verdict("pass"), Policy(), late) is None


@pytest.mark.parametrize("policy", [Policy(), AUTOMATIC])
def test_an_undecided_trial_is_held_after_the_time_limit(policy: Policy) -> None:
    limit = START + timedelta(seconds=policy.time_limit_seconds)
    undecided = verdict("inconclusive")
    assert next_event(rollout(), undecided, policy, limit - timedelta(seconds=1)) is None
    event = next_event(rollout(), undecided, policy, limit)
    assert isinstance(event, Held)
    assert event.reason == "undecided after 7 d: the numbers of inconclusive"


def test_a_resumed_trial_gets_its_time_afresh() -> None:
    on = rollout().trial
    assert on is not None
    resumed_at = START + timedelta(days=8)
    resumed = replace(rollout(), trial=replace(on, stage_since=resumed_at))
    event = next_event(resumed, verdict("inconclusive"), Policy(), resumed_at + timedelta(days=1))
    assert event is None


@pytest.mark.parametrize("outcome", ["pass", "inconclusive"])
def test_a_held_trial_waits_for_a_person(outcome: Outcome) -> None:
    late = START + timedelta(days=30)
    assert next_event(rollout("held", 10.0), verdict(outcome), AUTOMATIC, late) is None


@pytest.mark.parametrize("outcome", ["pass", "fail", "inconclusive"])
def test_without_a_trial_nothing_happens(outcome: Outcome) -> None:
    idle = Rollout("triage", revision=6, stable=2)
    assert next_event(idle, verdict(outcome), AUTOMATIC, SOAKED) is None


@given(
    stage=st.sampled_from(["shadow", "canary", "held"]),
    weight=st.floats(0.5, 100),
    outcome=st.sampled_from(["pass", "fail", "inconclusive"]),
    automatic=st.booleans(),
    steps=st.lists(st.floats(0.1, 100), max_size=4),
    waited=st.timedeltas(timedelta(0), timedelta(days=20)),
)
def test_what_it_plans_can_always_be_applied(
    stage: Stage,
    weight: float,
    outcome: Outcome,
    automatic: bool,
    steps: list[float],
    waited: timedelta,
) -> None:
    before = rollout(stage, 0.0 if stage == "shadow" else weight)
    policy = Policy(automatic=automatic, steps=tuple(steps))
    event = next_event(before, verdict(outcome), policy, START + waited)
    if event is None:
        return
    after = apply(before, event)
    assert after.revision == before.revision + 1
    if after.trial is not None and before.trial is not None and outcome == "pass":
        assert after.trial.weight > before.trial.weight
