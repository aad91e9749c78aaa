"""When a route is trained by itself, and that the leading controller starts it once and tells why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from rollout import tallies
from rollout.cases import Label, LabelledCase
from rollout.exchanges import Outcome
from rollout.metrics import ControllerMetrics
from rollout.retraining import (
    Accord,
    Known,
    Retrain,
    accord,
    failures_in_a_row,
    outlook,
    retrain_problems,
)
from rollout.runs import RunState, TrainingRun
from rollout.state import RolledBack
from rollout.tallies import changes
from tests.labeler import choice_for
from tests.rollout.house import Clock, House
from tests.rollout.test_cases import case

NOW = datetime(2026, 1, 10, tzinfo=UTC)
HOUR = timedelta(hours=1)
RULE = Retrain(new_labels=50, cooldown_hours=24)


def a_run(name: str, state: RunState, *, ago: timedelta = 48 * HOUR, why: str = "") -> TrainingRun:
    learnt = state in ("proposed", "ready", "refused")
    return TrainingRun(
        id=name,
        route="triage",
        parent="triage@1",
        created_at=NOW - ago,
        created_by="ann",
        state=state,
        adapter="a" * 64 if learnt else None,
        reason="the disk is full" if state == "failed" else "",
        updated_at=NOW - ago,
        why=why,
    )


def labelled(number: int, *, right: bool, inclusion: float = 1.0, stable: int = 4) -> LabelledCase:
    """A disagreement where it became a case for sure, else a pair that agreed."""
    asked = replace(
        case(id=f"case-{number}"), inclusion=inclusion, agreement=0.0 if inclusion == 1.0 else 1.0
    )
    asked = replace(asked, stable=replace(asked.stable, version=stable))
    if inclusion < 1.0:
        asked = replace(asked, candidate=replace(asked.candidate, text="good"))
    choice = choice_for(asked, "good" if right else "bad")
    if not right and inclusion < 1.0:
        choice = "neither"
    return LabelledCase(asked, Label(asked.id, "triage", choice, "ann", NOW))


def counted(
    rows: Sequence[LabelledCase], *, open_cases: Sequence[LabelledCase] = ()
) -> Counter[str]:
    found = Counter[str]()
    for row in rows:
        outcome: Outcome = "tie" if row.label.choice in ("both", "neither") else "loss"
        found.update(changes([], [tallies.offered(row.case), tallies.decided(row.case, outcome)]))
    for row in open_cases:
        found.update(changes([], [tallies.offered(row.case)]))
    return found


@pytest.mark.parametrize(
    ("known", "state", "words"),
    [
        (Known(labels=49, new_labels=49), "waiting", "49 of 50 new labels"),
        (Known(labels=50, new_labels=50), "due", "50 cases were decided since the last run"),
        (Known(labels=9, new_labels=9), "waiting", "9 cases are decided, and a run needs 20"),
        (
            Known([a_run("r1", "proposed")], labels=90, new_labels=0),
            "waiting",
            "no case was decided since the last run",
        ),
        (
            Known([a_run("r1", "training", why="it was time")], labels=90, new_labels=60),
            "under way",
            "r1 is training, started because it was time",
        ),
        (
            Known([a_run("r1", "paused")], labels=90, new_labels=60),
            "under way",
            "r1 is paused, asked for by ann",
        ),
        (
            Known(labels=90, new_labels=60, trial="triage@2"),
            "blocked",
            "it waits for the end of the trial of triage@2",
        ),
        (
            Known([a_run("r1", "cancelled", ago=23 * HOUR)], labels=90, new_labels=60),
            "blocked",
            "not before 2026-01-10 01:00 UTC: r1 has just ended (cancelled)",
        ),
        (Known([a_run("r1", "cancelled", ago=25 * HOUR)], labels=90, new_labels=60), "due", "60"),
        (
            Known([a_run("r1", "failed", ago=25 * HOUR)], labels=90, new_labels=60),
            "blocked",
            "the last run came to nothing, r1 because the disk is full",
        ),
        (Known([a_run("r1", "failed", ago=49 * HOUR)], labels=90, new_labels=60), "due", "60"),
    ],
)
def test_what_a_route_waits_for_is_said(known: Known, state: str, words: str) -> None:
    found = outlook(RULE, known, NOW)
    assert found.state == state
    assert words in found.reason


@pytest.mark.parametrize("rule", [None, replace(RULE, enabled=False)])
def test_without_rules_only_people_start_runs(rule: Retrain | None) -> None:
    assert outlook(rule, Known(labels=900, new_labels=900), NOW).state == "off"


def test_the_calendar_starts_a_run_only_where_there_is_something_new() -> None:
    weekly = Retrain(every_days=7)
    week_old = a_run("r1", "proposed", ago=timedelta(days=8))
    assert outlook(weekly, Known([week_old], labels=99, new_labels=0), NOW).state == "waiting"
    due = outlook(weekly, Known([week_old], labels=99, new_labels=1), NOW)
    assert (due.state, due.trigger) == ("due", "schedule")
    younger = a_run("r1", "proposed", ago=timedelta(days=6))
    waiting = outlook(weekly, Known([younger], labels=99, new_labels=1), NOW)
    assert "on 2026-01-11 00:00 UTC" in waiting.reason


def test_drift_needs_the_whole_interval_below() -> None:
    rule = Retrain(agreement_below=0.9)
    known = Known(labels=99, new_labels=9, accord=Accord(0.85, 0.78, 0.91, 99, 1.0))
    assert outlook(rule, known, NOW).state == "waiting"
    surely = replace(known, accord=Accord(0.8, 0.72, 0.87, 99, 1.0))
    found = outlook(rule, surely, NOW)
    assert (found.state, found.trigger) == ("due", "agreement")
    assert "0.80 (0.72 to 0.87, 99 cases) of the pairs, surely below 0.9" in found.reason
    unknown = outlook(rule, replace(known, accord=None), NOW)
    assert "too few labels" in unknown.reason


@given(failures=st.integers(0, 12), hours=st.integers(0, 24 * 64))
def test_each_failure_doubles_the_pause(failures: int, hours: int) -> None:
    runs = [a_run(f"r{n}", "failed", ago=hours * HOUR) for n in range(failures)]
    runs.append(a_run("first", "refused", ago=hours * HOUR))
    assert failures_in_a_row(runs) == failures
    found = outlook(RULE, Known(runs, labels=90, new_labels=60), NOW)
    assert (found.state == "due") == (hours >= 24 * 2 ** min(failures, 5))
    assert found.failures == failures


def test_agreement_is_of_all_pairs_though_people_mostly_see_disagreements() -> None:
    wrong = [labelled(n, right=False) for n in range(20)]
    right = [labelled(100 + n, right=True) for n in range(20)]
    agreed = [labelled(200 + n, right=True, inclusion=0.05) for n in range(20)]
    rows = [*wrong, *right, *agreed]
    found = accord(rows, 4, counted(rows))
    assert found is not None
    # 40 disagreements, half of them right, beside 400 pairs that agree.
    assert found.rate == pytest.approx(420 / 440)
    assert found.covered == pytest.approx(1.0)


def test_pairs_that_are_like_no_label_may_all_be_right() -> None:
    rows = [labelled(n, right=False) for n in range(40)]
    unseen = [labelled(200 + n, right=True, inclusion=0.05) for n in range(20)]
    found = accord(rows, 4, counted(rows, open_cases=unseen))
    assert found is not None
    assert found.covered == pytest.approx(40 / 440)
    assert found.high > 0.9, "nobody has looked at the pairs that agree"


def test_labels_of_an_older_stable_version_say_nothing_of_this_one() -> None:
    rows = [labelled(n, right=False, stable=3) for n in range(40)]
    assert accord(rows, 4, counted(rows)) is None


@given(st.lists(st.booleans(), min_size=30, max_size=80))
def test_the_rate_lies_within_its_bounds(rights: list[bool]) -> None:
    rows = [labelled(n, right=right) for n, right in enumerate(rights)]
    found = accord(rows, 4, counted(rows))
    assert found is not None
    assert 0 <= found.low <= found.rate + 1e-9
    assert found.rate - 1e-9 <= found.high <= 1
    assert found.rate == pytest.approx(sum(rights) / len(rights))


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (Retrain(), "new_labels"),
        (Retrain(new_labels=-1), "new_labels"),
        (Retrain(agreement_below=1.0), "agreement_below"),
        (Retrain(every_days=7, window=5), "window"),
        (Retrain(every_days=7, cooldown_hours=-1), "cooldown_hours"),
    ],
)
def test_rules_that_make_no_sense_are_named(rule: Retrain, field: str) -> None:
    assert field in [name for name, _ in retrain_problems(rule)]


async def asks(house: House, rule: Retrain) -> None:
    route = await house.stores.rollouts.route("triage")
    await house.stores.rollouts.put_route(
        replace(route, retrain=rule), by="ann", at=NOW, base="base"
    )


@pytest.mark.anyio
async def test_the_leader_starts_one_run_and_says_why(house: House) -> None:
    clock = Clock()
    registry = CollectorRegistry()
    leader = house.controller(clock, metrics=ControllerMetrics(registry))
    await leader.hold_lease()
    await leader.tick()
    await asks(house, Retrain(new_labels=30, propose=False, config={"epochs": 3}))
    await leader.tick()
    await house.stores.cases.put_labelled([labelled(n, right=True) for n in range(29)])
    await leader.retrain()
    assert await house.stores.runs.list("triage") == []

    await house.stores.cases.put_labelled([labelled(99, right=True)])
    follower = house.controller(clock)
    await follower.tick()
    await follower.retrain()
    await leader.retrain()
    await leader.retrain()
    (run,) = await house.stores.runs.list("triage")
    assert (run.created_by, run.parent, run.trigger) == ("sluice", "triage@1", "labels")
    assert "30 cases were decided since the last run" in run.why
    assert (run.config, run.propose, run.labels) == ({"epochs": 3}, False, 30)
    entry = (await house.stores.audit.list())[0]
    assert (entry.action, entry.subject, entry.reason) == ("run.start", run.id, run.why)
    ((_, event),) = await house.stores.runs.events(run.id)
    assert run.why in event.message
    started = registry.get_sample_value(
        "sluice_retraining_runs_total", {"route": "triage", "trigger": "labels"}
    )
    assert started == 1

    # A person stops it. It does not come back with the labels that it was started for.
    await house.stores.runs.request_cancel(run.id)
    await leader.retrain()
    assert len(await house.stores.runs.list("triage")) == 1


@pytest.mark.anyio
async def test_a_trial_is_waited_for_and_switching_off_holds(house: House) -> None:
    clock = Clock()
    leader = await house.leader(clock)
    await asks(house, Retrain(new_labels=30))
    await house.stores.cases.put_labelled([labelled(n, right=True) for n in range(30)])
    on_trial = await house.propose()
    await leader.tick()
    await leader.retrain()
    assert await house.stores.runs.list("triage") == []

    await house.stores.rollouts.commit(on_trial, RolledBack(at=clock.at, by="ann"))
    await asks(house, Retrain(new_labels=30, enabled=False))
    await leader.tick()
    await leader.retrain()
    assert await house.stores.runs.list("triage") == []
    await asks(house, Retrain(new_labels=30))
    await leader.tick()
    await leader.retrain()
    assert len(await house.stores.runs.list("triage")) == 1
