"""What happens to a rollout next, if anything, without a person."""

from datetime import datetime, timedelta

from rollout.evidence import Verdict
from rollout.policy import Policy
from rollout.state import CanarySet, Event, Held, Promoted, RolledBack, Rollout, Trial

BY = "sluice"


def next_event(rollout: Rollout, verdict: Verdict, policy: Policy, now: datetime) -> Event | None:
    """The event that evidence and policy call for at `now`; None to leave all as it is.

    A fail rolls back, at every stage and also where a person holds the trial. A pass advances an
    automatic rollout that has soaked at its step. An inconclusive trial is held for a person once
    the time limit is over; a change by a person starts that time afresh.
    """
    trial = rollout.trial
    if trial is None:
        return None
    if verdict.outcome == "fail":
        return RolledBack(at=now, by=BY, reason=_because(verdict))
    if trial.stage == "held":
        return None
    waited = now - trial.stage_since
    if verdict.outcome == "inconclusive":
        if waited < timedelta(seconds=policy.time_limit_seconds):
            return None
        return Held(
            at=now,
            by=BY,
            reason=f"undecided after {_duration(policy.time_limit_seconds)}: {verdict.reason}",
        )
    if not policy.automatic or waited < timedelta(seconds=policy.soak_seconds):
        return None
    return _advance(trial, verdict, policy, now)


def _advance(trial: Trial, verdict: Verdict, policy: Policy, now: datetime) -> Event:
    """The first step above the present weight; behind the last one, promotion."""
    step = min((step for step in policy.steps if step > trial.weight), default=None)
    if step is None or step >= 100:
        return Promoted(at=now, by=BY, reason=_because(verdict))
    return CanarySet(percent=step, at=now, by=BY, reason=_because(verdict))


def _because(verdict: Verdict) -> str:
    return f"gate {verdict.gate}: {verdict.reason}"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:g} {unit}"
    return f"{seconds:g} s"
