"""Where a trial stands in its plan, what it waits for, and what happens next without a person."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from rollout.engines import Placement
from rollout.evidence import Evidence, Verdict
from rollout.plans import Plan
from rollout.policy import Policy, plan_of
from rollout.state import CanarySet, Event, Held, Promoted, Proposed, RolledBack, Rollout, Trial

BY = "sluice"

WaitKind = Literal["units", "gate", "soak", "approval", "residency", "person"]


@dataclass(frozen=True, slots=True)
class Wait:
    """One thing that a trial waits for. `needed` units are missing, where that is known."""

    kind: WaitKind
    text: str
    needed: int | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a trial has come in its plan.

    step: the index of the step that it stands at. A share that a person set between two steps
        stands at the one below it.
    units: what the candidate got at this share; in the shadow, compared pairs.
    next_percent: where it goes when nothing is waited for; 100 is the promotion.
    limit_at: when it is held for a person if it is undecided still.
    """

    plan: Plan
    step: int
    entered_at: datetime
    units: int
    next_percent: float
    limit_at: datetime
    waits: tuple[Wait, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """All that is known of a trial: what was counted, what the gates say of it, and which
    replicas serve its candidate."""

    evidence: Evidence
    verdicts: Sequence[Verdict]
    found: Placement


def plan_followed(trial: Trial, policy: Policy) -> Plan:
    """The plan pinned with the proposal. Trials without one follow the route's as it is now."""
    return trial.plan or plan_of(policy)


def standing(
    rollout: Rollout, known: Known | None, policy: Policy, now: datetime
) -> Standing | None:
    """Where the trial stands at `now`; None without one."""
    trial = rollout.trial
    if trial is None or known is None:
        return None
    plan = plan_followed(trial, policy)
    step = plan.steps[plan.place(trial.weight)]
    units = units_seen(trial, known.evidence)
    following = plan.behind(trial.weight)
    waits: list[Wait] = []
    if trial.stage == "held":
        waits.append(_person(rollout.route))
    if units < step.minimum_units:
        waits.append(_units(trial, step.minimum_units - units))
    # What becomes stable has passed all that the plan asks for, and not its last step alone.
    gates = plan.gates if following.percent >= 100 else step.gates
    waits.extend(_gates(gates, known.verdicts))
    soaked_at = trial.stage_since + timedelta(seconds=step.soak_seconds)
    if now < soaked_at and trial.stage != "held":
        waits.append(Wait("soak", f"soaks until {_clock(soaked_at, now)}"))
    if not known.found.everywhere:
        text = f"waits until {known.found.name} is resident: {known.found.reason}"
        waits.append(Wait("residency", text))
    if following.approval and trial.stage != "held":
        text = f"waits for approval: sluice rollout advance {rollout.route}"
        waits.append(Wait("approval", text))
    return Standing(
        plan=plan,
        step=plan.place(trial.weight),
        entered_at=trial.stage_since,
        units=units,
        next_percent=following.percent,
        limit_at=trial.stage_since + timedelta(seconds=step.time_limit_seconds),
        waits=tuple(waits),
    )


def next_event(
    rollout: Rollout, known: Known | None, policy: Policy, now: datetime
) -> Event | None:
    """The event that evidence and plan call for at `now`; None to leave all as it is.

    A fail rolls back, at every stage and also where a person holds the trial. A failed split
    check holds it: the counts can't be trusted then, so nothing may be decided by them. Where
    nothing is waited for, the trial enters its next step. One that is undecided is held for a
    person once the time limit is over; a change by a person starts that time afresh.
    """
    trial = rollout.trial
    now_at = standing(rollout, known, policy, now)
    if trial is None or known is None or now_at is None:
        return _next_in_queue(rollout, now)
    verdicts = known.verdicts
    if distrusted := [verdict for verdict in verdicts if verdict.hold]:
        reason = f"{_because(distrusted)}; roll {known.found.name} back and propose it anew then"
        return None if trial.stage == "held" else Held(at=now, by=BY, reason=reason)
    if failing := [verdict for verdict in verdicts if verdict.outcome == "fail"]:
        return RolledBack(at=now, by=BY, reason=_because(failing))
    if trial.stage == "held":
        return None
    undecided = [wait for wait in now_at.waits if wait.kind in ("units", "gate")]
    if undecided and now >= now_at.limit_at:
        return Held(at=now, by=BY, reason=_undecided(now_at, undecided, verdicts))
    if now_at.waits:
        return None
    return _advance(now_at, verdicts, now)


def units_seen(trial: Trial, evidence: Evidence) -> int:
    """The candidate's units that came at the present share; in the shadow, compared pairs."""
    if trial.weight == 0:
        return evidence.pairs.total
    strata = (s for s in evidence.strata if s.weight == trial.weight)
    return sum(stratum.candidate.units for stratum in strata)


def gates_open(gates: Sequence[str], verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """Those of the gates that have not passed."""
    passed = {verdict.gate for verdict in verdicts if verdict.outcome == "pass"}
    return tuple(gate for gate in gates if gate not in passed)


def _next_in_queue(rollout: Rollout, now: datetime) -> Event | None:
    if rollout.trial is not None or not rollout.queued:
        return None
    first = rollout.queued[0]
    said = f" ({first.reason})" if first.reason else ""
    reason = f"its turn has come: {first.by} queued it{said}"
    return Proposed(first.version, at=now, by=BY, reason=reason, plan=first.plan)


def _advance(now_at: Standing, verdicts: Sequence[Verdict], now: datetime) -> Event:
    step = now_at.plan.steps[now_at.step]
    promotes = now_at.next_percent >= 100
    gates = now_at.plan.gates if promotes else step.gates
    passed = [verdict for verdict in verdicts if verdict.gate in gates]
    reason = _because(passed) if passed else f"the step at {step.percent:g} % asks for no gate"
    if promotes:
        return Promoted(at=now, by=BY, reason=reason)
    return CanarySet(percent=now_at.next_percent, at=now, by=BY, reason=reason)


def _person(route: str) -> Wait:
    commands = ", ".join(f"sluice rollout {verb} {route}" for verb in ("resume", "rollback"))
    return Wait("person", f"is held until a person decides: {commands}")


def _units(trial: Trial, missing: int) -> Wait:
    what = "compared pair" if trial.weight == 0 else "unit"
    plural = "" if missing == 1 else "s"
    return Wait("units", f"waits for {missing} more {what}{plural}", missing)


def _gates(gates: Sequence[str], verdicts: Sequence[Verdict]) -> Iterator[Wait]:
    said = {verdict.gate: verdict for verdict in verdicts}
    for gate in gates_open(gates, verdicts):
        verdict = said.get(gate)
        if verdict is None:
            yield Wait("gate", f"waits for gate {gate}, which has not judged yet")
        elif verdict.outcome == "fail":
            yield Wait("gate", f"gate {gate} failed: {verdict.reason}")
        elif verdict.needed:
            text = f"waits for gate {gate}: about {verdict.needed} more {verdict.counted}"
            yield Wait("gate", text, verdict.needed)
        else:
            yield Wait("gate", f"waits for gate {gate}: {verdict.reason}")


def _undecided(now_at: Standing, waits: Sequence[Wait], verdicts: Sequence[Verdict]) -> str:
    """What was waited for, and the numbers of the gates among it with their forecasts."""
    step = now_at.plan.steps[now_at.step]
    texts = [wait.text for wait in waits]
    gates = step.gates if now_at.next_percent < 100 else now_at.plan.gates
    texts += [v.reason for v in verdicts if v.gate in gates and v.outcome == "inconclusive"]
    said = "; ".join(dict.fromkeys(texts))
    return f"undecided after {_duration(step.time_limit_seconds)}: {said}"


def _because(verdicts: Sequence[Verdict]) -> str:
    said = (f"gate {verdict.gate}: {verdict.reason}" for verdict in verdicts)
    return "; ".join(said)


def _clock(at: datetime, now: datetime) -> str:
    if at - now < timedelta(minutes=2):
        return f"{at:%H:%M:%S} UTC"
    return f"{at:%H:%M} UTC" if at.date() == now.date() else f"{at:%Y-%m-%d %H:%M} UTC"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:g} {unit}"
    return f"{seconds:g} s"
