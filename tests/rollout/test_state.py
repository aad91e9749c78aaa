"""Every (state, event) pair, and what holds for all of them."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import ConflictError, InvalidInputError, RefusedError
from rollout.policy import Policy, plan_of
from rollout.state import (
    MAXIMUM_QUEUED,
    CanarySet,
    Event,
    Held,
    Promoted,
    Proposed,
    Queued,
    Resumed,
    RolledBack,
    Rollout,
    Stage,
    Trial,
    Waiting,
    Withdrawn,
    apply,
    surely_meant,
)

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
NOW = START + timedelta(hours=1)


def trial(stage: Stage, weight: float) -> Trial:
    return Trial(
        id="triage@3.6",
        candidate=3,
        stage=stage,
        weight=weight,
        started_at=START,
        stage_since=START,
    )


FIRST = Rollout(route="triage", revision=0, stable=1)
IDLE = Rollout(route="triage", revision=5, stable=2, previous=1)


def waiting(*versions: int) -> tuple[Waiting, ...]:
    return tuple(Waiting(version, START, "ann") for version in versions)


STATES: dict[str, Rollout] = {
    "first": FIRST,
    "idle": IDLE,
    "shadow": replace(IDLE, revision=6, trial=trial("shadow", 0.0)),
    "canary": replace(IDLE, revision=6, trial=trial("canary", 10.0)),
    "held in the shadow": replace(IDLE, revision=6, trial=trial("held", 0.0)),
    "held canary": replace(IDLE, revision=6, trial=trial("held", 10.0)),
    "idle queue": replace(IDLE, revision=6, queued=waiting(1, 4)),
    "full queue": replace(
        IDLE, revision=6, trial=trial("canary", 10.0), queued=waiting(1, 6, 7, 8, 9)
    ),
}

EVENTS: dict[str, Event] = {
    "propose another": Proposed(version=4, at=NOW, by="ann"),
    "propose the stable": Proposed(version=2, at=NOW, by="ann"),
    "propose the previous": Proposed(version=1, at=NOW, by="ann"),
    "queue another": Queued(version=4, at=NOW, by="ann"),
    "queue the stable": Queued(version=2, at=NOW, by="ann"),
    "queue the previous": Queued(version=1, at=NOW, by="ann"),
    "queue the candidate": Queued(version=3, at=NOW, by="ann"),
    "withdraw another": Withdrawn(version=4, at=NOW, by="ann"),
    "withdraw the previous": Withdrawn(version=1, at=NOW, by="ann"),
    "canary 25": CanarySet(percent=25, at=NOW, by="ann"),
    "canary 100": CanarySet(percent=100, at=NOW, by="ann"),
    "canary 0": CanarySet(percent=0, at=NOW, by="ann"),
    "canary 101": CanarySet(percent=101, at=NOW, by="ann"),
    "canary -1": CanarySet(percent=-1, at=NOW, by="ann"),
    "canary nan": CanarySet(percent=float("nan"), at=NOW, by="ann"),
    "hold": Held(at=NOW, by="ann"),
    "resume": Resumed(at=NOW, by="ann"),
    "promote": Promoted(at=NOW, by="ann"),
    "roll back": RolledBack(at=NOW, by="ann"),
}

# What is left of a rollout: stable, previous, the trial's candidate, stage and weight, the queue.
Left = tuple[int, int | None, tuple[int, Stage, float] | None, tuple[int, ...]]
Expected = Left | type[Exception]

REFUSED, INVALID = RefusedError, InvalidInputError
PROPOSALS = ("propose another", "propose the stable", "propose the previous")
NO_PERCENTAGES = ("canary 101", "canary -1", "canary nan")
BARE = ("first", "idle", "idle queue")
SHORT = ("shadow", "canary", "held in the shadow", "held canary")
ON_TRIAL = (*SHORT, "full queue")
NO_QUEUE = ("first", "idle", *SHORT)
FULL = (1, 6, 7, 8, 9)
NEED_A_TRIAL = ("canary 25", "canary 100", "canary 0", *NO_PERCENTAGES, "hold", "resume", "promote")
STANDS: dict[str, tuple[int, Stage, float]] = {
    "shadow": (3, "shadow", 0.0),
    "canary": (3, "canary", 10.0),
    "held in the shadow": (3, "held", 0.0),
    "held canary": (3, "held", 10.0),
}

TABLE: dict[tuple[str, str], Expected] = {
    # No trial is on.
    **dict.fromkeys(product(BARE, NEED_A_TRIAL), REFUSED),
    ("first", "propose another"): (1, None, (4, "shadow", 0.0), ()),
    ("first", "propose the stable"): (1, None, (2, "shadow", 0.0), ()),  # stable is 1 there
    ("first", "propose the previous"): REFUSED,  # 1 is stable there
    ("first", "queue another"): (1, None, None, (4,)),
    ("first", "queue the stable"): (1, None, None, (2,)),
    ("first", "queue the previous"): REFUSED,
    ("first", "queue the candidate"): (1, None, None, (3,)),
    ("first", "roll back"): REFUSED,
    ("idle", "propose another"): (2, 1, (4, "shadow", 0.0), ()),
    ("idle", "propose the stable"): REFUSED,
    ("idle", "propose the previous"): (2, 1, (1, "shadow", 0.0), ()),
    ("idle", "queue another"): (2, 1, None, (4,)),
    ("idle", "queue the stable"): REFUSED,
    ("idle", "queue the previous"): (2, 1, None, (1,)),
    ("idle", "queue the candidate"): (2, 1, None, (3,)),
    ("idle", "roll back"): (1, None, None, ()),
    # What is on trial, or stable, waits no longer.
    ("idle queue", "propose another"): (2, 1, (4, "shadow", 0.0), (1,)),
    ("idle queue", "propose the stable"): REFUSED,
    ("idle queue", "propose the previous"): (2, 1, (1, "shadow", 0.0), (4,)),
    ("idle queue", "queue another"): REFUSED,  # it waits already
    ("idle queue", "queue the stable"): REFUSED,
    ("idle queue", "queue the previous"): REFUSED,
    ("idle queue", "queue the candidate"): (2, 1, None, (1, 4, 3)),
    ("idle queue", "withdraw another"): (2, 1, None, (1,)),
    ("idle queue", "withdraw the previous"): (2, 1, None, (4,)),
    ("idle queue", "roll back"): (1, None, None, (4,)),
    # One is: a second candidate is refused or waits, and a trial can always be ended.
    **dict.fromkeys(product(NO_QUEUE, ("withdraw another", "withdraw the previous")), REFUSED),
    **dict.fromkeys(product(ON_TRIAL, PROPOSALS), REFUSED),
    **dict.fromkeys(product(ON_TRIAL, ("queue the stable", "queue the candidate")), REFUSED),
    **{(state, "queue another"): (2, 1, STANDS[state], (4,)) for state in SHORT},
    **{(state, "queue the previous"): (2, 1, STANDS[state], (1,)) for state in SHORT},
    **dict.fromkeys(product(ON_TRIAL, NO_PERCENTAGES), INVALID),
    **dict.fromkeys(product(SHORT, ("canary 25",)), (2, 1, (3, "canary", 25.0), ())),
    **dict.fromkeys(product(SHORT, ("canary 100",)), (2, 1, (3, "canary", 100.0), ())),
    **dict.fromkeys(product(SHORT, ("canary 0",)), (2, 1, (3, "shadow", 0.0), ())),
    **dict.fromkeys(product(SHORT, ("promote",)), (3, 2, None, ())),
    **dict.fromkeys(product(SHORT, ("roll back",)), (2, 1, None, ())),
    ("shadow", "hold"): (2, 1, (3, "held", 0.0), ()),
    ("shadow", "resume"): REFUSED,
    ("canary", "hold"): (2, 1, (3, "held", 10.0), ()),
    ("canary", "resume"): REFUSED,
    ("held in the shadow", "hold"): REFUSED,
    ("held in the shadow", "resume"): (2, 1, (3, "shadow", 0.0), ()),
    ("held canary", "hold"): REFUSED,
    ("held canary", "resume"): (2, 1, (3, "canary", 10.0), ()),
    # The queue stays what it is while its trial moves, and has an end.
    ("full queue", "queue another"): REFUSED,
    ("full queue", "queue the previous"): REFUSED,
    ("full queue", "withdraw another"): REFUSED,
    ("full queue", "withdraw the previous"): (2, 1, (3, "canary", 10.0), (6, 7, 8, 9)),
    ("full queue", "canary 25"): (2, 1, (3, "canary", 25.0), FULL),
    ("full queue", "canary 100"): (2, 1, (3, "canary", 100.0), FULL),
    ("full queue", "canary 0"): (2, 1, (3, "shadow", 0.0), FULL),
    ("full queue", "hold"): (2, 1, (3, "held", 10.0), FULL),
    ("full queue", "resume"): REFUSED,
    ("full queue", "promote"): (3, 2, None, FULL),
    ("full queue", "roll back"): (2, 1, None, FULL),
}


def left_of(rollout: Rollout) -> Left:
    on = rollout.trial
    return (
        rollout.stable,
        rollout.previous,
        None if on is None else (on.candidate, on.stage, on.weight),
        tuple(each.version for each in rollout.queued),
    )


def test_the_table_holds_every_pair() -> None:
    assert set(TABLE) == set(product(STATES, EVENTS))
    assert {type(event) for event in EVENTS.values()} == set(get_args(Event))


@pytest.mark.parametrize(("state", "event"), list(product(STATES, EVENTS)))
def test_each_state_answers_each_event_as_the_table_says(state: str, event: str) -> None:
    expected = TABLE[state, event]
    before = STATES[state]
    if isinstance(expected, type):
        with pytest.raises(expected) as refusal:
            apply(before, EVENTS[event])
        assert str(refusal.value)
        return
    after = apply(before, EVENTS[event])
    assert left_of(after) == expected
    assert after.revision == before.revision + 1
    assert after.route == before.route


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (Proposed(version=4, at=NOW, by="ann"), "triage@3 is already on trial.*--queue"),
        (Queued(version=3, at=NOW, by="ann"), "triage@3 is already on trial"),
        (Queued(version=2, at=NOW, by="ann"), "triage@2 is already stable"),
        (Withdrawn(version=4, at=NOW, by="ann"), "triage@4 does not wait"),
        (Resumed(at=NOW, by="ann"), "not held"),
        (CanarySet(percent=150, at=NOW, by="ann"), "150 is no percentage"),
    ],
)
def test_a_refusal_says_what_stands_in_the_way(event: Event, says: str) -> None:
    with pytest.raises((ConflictError, InvalidInputError), match=says):
        apply(STATES["shadow"], event)


def test_a_stage_knows_since_when_it_lasts() -> None:
    proposed = apply(IDLE, Proposed(version=4, at=START, by="ann"))
    widened = apply(proposed, CanarySet(percent=5, at=NOW, by="ann"))
    assert widened.trial is not None
    assert (widened.trial.started_at, widened.trial.stage_since) == (START, NOW)


def test_a_second_trial_of_a_version_is_another_trial() -> None:
    first = apply(IDLE, Proposed(version=4, at=NOW, by="ann"))
    ended = apply(first, RolledBack(at=NOW, by="ann"))
    second = apply(ended, Proposed(version=4, at=NOW, by="ann"))
    assert first.trial is not None
    assert second.trial is not None
    assert first.trial.id != second.trial.id


def test_the_plan_of_a_proposal_is_pinned_and_kept_while_it_waits() -> None:
    plan = plan_of(Policy(steps=(7.0,)))
    queued = apply(IDLE, Queued(version=4, at=NOW, by="ann", reason="why", plan=plan))
    assert queued.queued == (Waiting(4, NOW, "ann", "why", plan),)
    on = apply(IDLE, Proposed(version=4, at=NOW, by="ann", plan=plan))
    for event in (
        CanarySet(percent=5, at=NOW, by="ann"),
        Held(at=NOW, by="ann"),
        Resumed(at=NOW, by="ann"),
    ):
        on = apply(on, event)
        assert on.trial is not None
        assert on.trial.plan == plan


def events() -> st.SearchStrategy[Event]:
    at = st.datetimes(timezones=st.just(UTC))
    by = st.just("ann")
    plain: list[Callable[..., Event]] = [Held, Resumed, Promoted, RolledBack]
    return st.one_of(
        st.builds(Proposed, version=st.integers(1, 5), at=at, by=by),
        st.builds(Queued, version=st.integers(1, 9), at=at, by=by),
        st.builds(Withdrawn, version=st.integers(1, 9), at=at, by=by),
        st.builds(CanarySet, percent=st.floats(-10, 110) | st.just(0.0), at=at, by=by),
        *(st.builds(kind, at=at, by=by) for kind in plain),
    )


@given(st.lists(events(), max_size=30))
def test_whatever_happens_a_rollout_stays_sound(happened: list[Event]) -> None:
    rollout, ids = FIRST, set[str]()
    for event in happened:
        before = rollout
        try:
            rollout = apply(rollout, event)
        except (RefusedError, InvalidInputError):
            continue
        assert rollout.revision == before.revision + 1
        assert rollout.previous != rollout.stable
        queue = [each.version for each in rollout.queued]
        assert len(queue) == len(set(queue)) <= MAXIMUM_QUEUED
        assert rollout.stable not in queue
        on = rollout.trial
        if on is None:
            continue
        assert 0 <= on.weight <= 100
        assert on.candidate != rollout.stable
        assert on.candidate not in queue
        assert (on.stage == "shadow") <= (on.weight == 0)
        assert (on.stage == "canary") <= (on.weight > 0)
        if isinstance(event, Proposed):
            assert on.id not in ids
            ids.add(on.id)
        else:
            assert before.trial is not None
            assert on.id == before.trial.id


@given(st.lists(events(), max_size=20))
def test_a_trial_can_be_rolled_back_from_anywhere(happened: list[Event]) -> None:
    rollout = FIRST
    for event in happened:
        try:
            rollout = apply(rollout, event)
        except (RefusedError, InvalidInputError):
            continue
    if rollout.trial is None:
        return
    after = apply(rollout, RolledBack(at=NOW, by="ann"))
    assert after == replace(rollout, trial=None, revision=rollout.revision + 1)


def test_a_rollback_right_after_another_is_not_surely_meant() -> None:
    ended = RolledBack(at=NOW, by="sluice")
    bare = Rollout("r", revision=4, stable=2, previous=1)
    soon, late = NOW + timedelta(minutes=1), NOW + timedelta(hours=1)
    assert not surely_meant(bare, ended, soon)
    assert surely_meant(bare, ended, late)
    assert surely_meant(bare, Promoted(at=NOW, by="ann"), soon)
    assert surely_meant(bare, None, soon)
    on_trial = apply(bare, Proposed(version=3, at=NOW, by="ann"))
    assert surely_meant(on_trial, ended, soon)
    assert not surely_meant(on_trial, ended, soon, succeeded=True)
    assert surely_meant(on_trial, ended, late, succeeded=True)
