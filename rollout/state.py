"""The rollout of a route and every event that can change it. All of the state machine is here."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Literal, assert_never

from rollout.errors import InvalidInputError, RefusedError
from rollout.plans import Plan

# Candidates that wait for their turn. A longer queue would propose what nobody remembers.
MAXIMUM_QUEUED: Final = 5

Stage = Literal["shadow", "canary", "held"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate on probation.

    `weight` is the candidate's share of the route's units in percent, 0 in the shadow. A held
    trial keeps its weight, and nothing advances it but a person. `id` salts the assignment.
    `plan` was pinned when it was proposed; None follows the route's policy as it is now.
    """

    id: str
    candidate: int
    stage: Stage
    weight: float
    started_at: datetime
    stage_since: datetime
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Candidacy:
    """A version that somebody wants on trial, with the plan that it will follow."""

    version: int
    at: datetime
    by: str
    reason: str = ""
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Waiting(Candidacy):
    """It goes on trial when its turn comes."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A route's stable version and at most one candidate.

    `revision` grows by one with each commit. `previous` is the last stable, kept for the way
    back. `queued` are the candidates that come after the present one, in their order.
    """

    route: str
    revision: int
    stable: int
    previous: int | None = None
    trial: Trial | None = None
    queued: tuple[Waiting, ...] = ()


@dataclass(frozen=True, slots=True)
class Proposed(Candidacy):
    """Also the turn of one that was queued."""

    kind: Literal["proposed"] = "proposed"


@dataclass(frozen=True, slots=True)
class Queued(Candidacy):
    kind: Literal["queued"] = "queued"


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """Takes a version out of the queue."""

    version: int
    at: datetime
    by: str
    reason: str = ""
    kind: Literal["withdrawn"] = "withdrawn"


@dataclass(frozen=True, slots=True)
class CanarySet:
    """Also the way from the shadow into the canary."""

    percent: float
    at: datetime
    by: str
    reason: str = ""
    kind: Literal["canary"] = "canary"


@dataclass(frozen=True, slots=True)
class Held:
    at: datetime
    by: str
    reason: str = ""
    kind: Literal["held"] = "held"


@dataclass(frozen=True, slots=True)
class Resumed:
    at: datetime
    by: str
    reason: str = ""
    kind: Literal["resumed"] = "resumed"


@dataclass(frozen=True, slots=True)
class Promoted:
    at: datetime
    by: str
    reason: str = ""
    kind: Literal["promoted"] = "promoted"


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Ends the trial; without one it brings the last stable back."""

    at: datetime
    by: str
    reason: str = ""
    kind: Literal["rolled_back"] = "rolled_back"


# `kind` tells them apart once stored: without it a RolledBack was read back as a Held.
Event = Proposed | Queued | Withdrawn | CanarySet | Held | Resumed | Promoted | RolledBack


# Whoever rolls back may not have seen that the gate, or a colleague, just did.
_SECOND_THOUGHT = timedelta(minutes=5)


def surely_meant(
    rollout: Rollout, last: Event | None, now: datetime, *, succeeded: bool = False
) -> bool:
    """Whether a rollback now means what it would do.

    Right after the end of a trial it would take the *stable* version back, which is hardly what
    two who rolled back the same candidate at the same moment wanted. Nor did they mean the next
    of the queue, where that one `succeeded` the trial that `last` ended.
    """
    ended_just_now = isinstance(last, RolledBack) and now - last.at < _SECOND_THOUGHT
    harmless = rollout.previous is None if rollout.trial is None else not succeeded
    return harmless or not ended_just_now


def apply(rollout: Rollout, event: Event) -> Rollout:
    """The rollout after the event, one revision on.

    Raises RefusedError where the present state does not allow the event, and InvalidInputError
    where the event itself makes no sense.
    """
    changed = _changed(rollout, event)
    return replace(changed, revision=rollout.revision + 1)


def _changed(rollout: Rollout, event: Event) -> Rollout:
    match event:
        case Proposed():
            return _propose(rollout, event)
        case Queued():
            return _queue(rollout, event)
        case Withdrawn():
            return _withdraw(rollout, event)
        case CanarySet():
            return _canary(rollout, event)
        case Held():
            return _hold(rollout, event)
        case Resumed():
            return _resume(rollout, event)
        case Promoted():
            return _promote(rollout)
        case RolledBack():
            return _roll_back(rollout)
        case _:
            assert_never(event)


def _propose(rollout: Rollout, event: Proposed) -> Rollout:
    if rollout.trial is not None:
        raise RefusedError(
            f"{rollout.route}@{rollout.trial.candidate} is already on trial: promote it or roll it "
            "back before you propose another, or let this one wait for its turn (--queue)"
        )
    if event.version == rollout.stable:
        raise RefusedError(f"{rollout.route}@{event.version} is already stable")
    trial = Trial(
        # The revision makes the second trial of a version another trial, with its own evidence.
        id=f"{rollout.route}@{event.version}.{rollout.revision + 1}",
        candidate=event.version,
        stage="shadow",
        weight=0.0,
        started_at=event.at,
        stage_since=event.at,
        plan=event.plan,
    )
    return _without(replace(rollout, trial=trial), event.version)


def _queue(rollout: Rollout, event: Queued) -> Rollout:
    name = f"{rollout.route}@{event.version}"
    if event.version == rollout.stable:
        raise RefusedError(f"{name} is already stable")
    if rollout.trial is not None and event.version == rollout.trial.candidate:
        raise RefusedError(f"{name} is already on trial")
    if any(event.version == waiting.version for waiting in rollout.queued):
        raise RefusedError(f"{name} waits for its turn already")
    if len(rollout.queued) >= MAXIMUM_QUEUED:
        waiting = ", ".join(f"{rollout.route}@{each.version}" for each in rollout.queued)
        raise RefusedError(
            f"{MAXIMUM_QUEUED} versions wait already ({waiting}): withdraw one of them first"
        )
    last = Waiting(event.version, event.at, event.by, event.reason, event.plan)
    return replace(rollout, queued=(*rollout.queued, last))


def _withdraw(rollout: Rollout, event: Withdrawn) -> Rollout:
    after = _without(rollout, event.version)
    if after == rollout:
        raise RefusedError(f"{rollout.route}@{event.version} does not wait for its turn")
    return after


def _without(rollout: Rollout, version: int) -> Rollout:
    """What is on trial or stable waits no longer."""
    left = tuple(waiting for waiting in rollout.queued if waiting.version != version)
    return replace(rollout, queued=left)


def _canary(rollout: Rollout, event: CanarySet) -> Rollout:
    trial = _trial(rollout, "a percentage needs a candidate: propose a version first")
    if not 0 <= event.percent <= 100:
        raise InvalidInputError(
            f"{event.percent:g} is no percentage: give a number from 0 to 100", param="percent"
        )
    stage: Stage = "canary" if event.percent > 0 else "shadow"
    return replace(
        rollout,
        trial=replace(trial, stage=stage, weight=float(event.percent), stage_since=event.at),
    )


def _hold(rollout: Rollout, event: Held) -> Rollout:
    trial = _trial(rollout, "there is nothing to hold: no version is on trial")
    if trial.stage == "held":
        raise RefusedError("the trial is already held")
    return replace(rollout, trial=replace(trial, stage="held", stage_since=event.at))


def _resume(rollout: Rollout, event: Resumed) -> Rollout:
    trial = _trial(rollout, "there is nothing to resume: no version is on trial")
    if trial.stage != "held":
        raise RefusedError("the trial is not held")
    stage: Stage = "canary" if trial.weight > 0 else "shadow"
    return replace(rollout, trial=replace(trial, stage=stage, stage_since=event.at))


def _promote(rollout: Rollout) -> Rollout:
    trial = _trial(rollout, "there is nothing to promote: no version is on trial")
    after = replace(rollout, stable=trial.candidate, previous=rollout.stable, trial=None)
    return _without(after, after.stable)


def _roll_back(rollout: Rollout) -> Rollout:
    if rollout.trial is not None:
        return replace(rollout, trial=None)
    if rollout.previous is None:
        raise RefusedError(
            f"there is nothing to roll back: {rollout.route} has no trial and no earlier stable"
        )
    return _without(replace(rollout, stable=rollout.previous, previous=None), rollout.previous)


def _trial(rollout: Rollout, otherwise: str) -> Trial:
    if rollout.trial is None:
        raise RefusedError(otherwise)
    return rollout.trial
