"""Where a rollout stands, and the verbs that move it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import get_args

from rollout.control.context import Control
from rollout.control.versions import require_resident
from rollout.control.views import Changed, RolloutView, RouteView, Verb
from rollout.credentials import ApiKey
from rollout.errors import (
    InvalidInputError,
    RefusedError,
    StaleRevisionError,
)
from rollout.evidence import Verdict
from rollout.state import (
    CanarySet,
    Event,
    Held,
    Promoted,
    Proposed,
    Resumed,
    RolledBack,
    Rollout,
    Trial,
    surely_meant,
)
from rollout.stores import Stores
from rollout.versions import Version, parse_model

VERBS: tuple[Verb, ...] = get_args(Verb)
# Somebody who names no revision means "whatever it is now"; more than this many commits in
# between is a fight that a person should see.
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Ask:
    """What a verb was asked with. `revision` None is whatever the rollout's revision is now.

    `force` puts aside the gates and reports, never the state machine; the history says so.
    """

    reason: str
    version: str | None = None
    percent: float | None = None
    revision: int | None = None
    force: bool = False


async def change(control: Control, caller: ApiKey, route: str, verb: Verb, ask: Ask) -> Changed:
    """Commit the verb. Raises RefusedError, StaleRevisionError, NotFoundError, UnavailableError."""
    for attempt in range(_ATTEMPTS):
        rollout = await control.stores.rollouts.get(route)
        if ask.revision is not None and ask.revision != rollout.revision:
            raise StaleRevisionError(
                f"{route} is at revision {rollout.revision}, not {ask.revision}: somebody changed "
                "it; look at its status and decide again",
                param="revision",
            )
        event = await _EVENTS[verb](control, rollout, ask, caller.name)
        try:
            commit = await control.stores.rollouts.commit(rollout, event)
        except StaleRevisionError:
            if ask.revision is not None or attempt + 1 == _ATTEMPTS:
                raise
            continue
        return Changed(rollout=commit.rollout, catalog_revision=commit.catalog_revision)
    raise AssertionError("the last attempt returns or raises")


async def status(control: Control, route: str) -> RolloutView:
    rollout = await control.stores.rollouts.get(route)
    trial = rollout.trial
    evidence = None
    verdicts: tuple[Verdict, ...] = ()
    if trial is not None:
        evidence = await control.stores.evidence.read(route, trial.id)
        verdicts = tuple(await control.stores.evidence.verdicts(route, trial.id))
    stats = await control.stores.cases.stats(route)
    return RolloutView(
        rollout=rollout,
        stable=f"{route}@{rollout.stable}",
        candidate=None if trial is None else f"{route}@{trial.candidate}",
        previous=None if rollout.previous is None else f"{route}@{rollout.previous}",
        evidence=evidence,
        verdicts=verdicts,
        open_cases=sum(row.open + row.leased for row in stats),
    )


async def routes(control: Control, caller: ApiKey) -> list[RouteView]:
    catalog = await control.stores.catalog.load()
    return [
        RouteView(route=route, rollout=catalog.rollouts[name])
        for name, route in sorted(catalog.routes.items())
        if name in catalog.rollouts and caller.allows_route(name)
    ]


async def route(control: Control, name: str) -> RouteView:
    return RouteView(
        route=await control.stores.rollouts.route(name),
        rollout=await control.stores.rollouts.get(name),
    )


async def _proposed(control: Control, rollout: Rollout, ask: Ask, by: str) -> Event:
    version = await _asked_version(control, rollout, ask)
    reason = ask.reason
    report = await control.stores.reports.of(version.name)
    if report is not None and report.outcome == "fail":
        _need_force(ask, f"{version.name} lost its evaluation ({report.reason})")
        reason = _forced(reason, "its evaluation failed")
    return Proposed(version=version.number, at=control.now(), by=by, reason=reason)


async def _canary_set(control: Control, rollout: Rollout, ask: Ask, by: str) -> Event:
    if ask.percent is None:
        raise InvalidInputError("say how many percent of the traffic", param="percent")
    return await _weight(control, rollout, ask.percent, ask, by)


async def _advanced(control: Control, rollout: Rollout, ask: Ask, by: str) -> Event:
    """The next of the route's steps; behind the last one it promotes."""
    trial = _trial(rollout, "advance")
    policy = (await control.stores.rollouts.route(rollout.route)).policy
    percent = next((step for step in policy.steps if step > trial.weight), None)
    if percent is None:
        return await _promoted(control, rollout, ask, by)
    return await _weight(control, rollout, percent, ask, by)


async def _weight(
    control: Control, rollout: Rollout, percent: float, ask: Ask, by: str
) -> CanarySet:
    if percent > 0 and rollout.trial is not None:
        await _candidate_resident(control, rollout, rollout.trial)
    return CanarySet(percent=percent, at=control.now(), by=by, reason=ask.reason)


async def _held(control: Control, _: Rollout, ask: Ask, by: str) -> Event:
    return Held(at=control.now(), by=by, reason=ask.reason)


async def _resumed(control: Control, _: Rollout, ask: Ask, by: str) -> Event:
    return Resumed(at=control.now(), by=by, reason=ask.reason)


async def _promoted(control: Control, rollout: Rollout, ask: Ask, by: str) -> Promoted:
    trial = _trial(rollout, "promote")
    await _candidate_resident(control, rollout, trial)
    verdicts = await control.stores.evidence.verdicts(rollout.route, trial.id)
    reason = ask.reason
    if not verdicts or any(verdict.outcome != "pass" for verdict in verdicts):
        said = _what_gates_say(verdicts)
        _need_force(ask, f"the gate has not passed {rollout.route}@{trial.candidate}: {said}")
        reason = _forced(reason, said)
    return Promoted(at=control.now(), by=by, reason=reason)


async def _rolled_back(control: Control, rollout: Rollout, ask: Ask, by: str) -> Event:
    return await rollback(
        control.stores, rollout, by=by, reason=ask.reason, now=control.now(), force=ask.force
    )


async def rollback(
    stores: Stores, rollout: Rollout, *, by: str, reason: str, now: datetime, force: bool
) -> RolledBack:
    """The event, unless it would take the stable version back by accident: RefusedError then."""
    last = next(iter(await stores.rollouts.history(rollout.route, limit=1)), None)
    if last is not None and not force and not surely_meant(rollout, last.event, now):
        raise RefusedError(
            f"{last.event.by} rolled {rollout.route} back a moment ago ({last.event.reason}); a "
            f"second rollback would put {rollout.route}@{rollout.previous} in the place of the "
            f"stable {rollout.route}@{rollout.stable}. Repeat it with force if that is meant",
            param="force",
        )
    return RolledBack(at=now, by=by, reason=reason)


_EVENTS: Mapping[Verb, Callable[[Control, Rollout, Ask, str], Awaitable[Event]]] = {
    "propose": _proposed,
    "canary": _canary_set,
    "advance": _advanced,
    "hold": _held,
    "resume": _resumed,
    "promote": _promoted,
    "rollback": _rolled_back,
}


async def _asked_version(control: Control, rollout: Rollout, ask: Ask) -> Version:
    if ask.version is None:
        raise InvalidInputError("say which version, as in support-triage@7", param="version")
    name = f"{rollout.route}@{ask.version}" if ask.version.isdecimal() else ask.version
    of_route, number = parse_model(name)
    if number is None or of_route != rollout.route:
        raise InvalidInputError(
            f"{ask.version!r} is no version of {rollout.route}: write {rollout.route}@NUMBER",
            param="version",
        )
    return await control.stores.rollouts.version(name)


async def _candidate_resident(control: Control, rollout: Rollout, trial: Trial) -> None:
    version = await control.stores.rollouts.version(f"{rollout.route}@{trial.candidate}")
    catalog = await control.stores.catalog.load()
    require_resident(version, catalog.residency.values())


def _trial(rollout: Rollout, verb: Verb) -> Trial:
    if rollout.trial is None:
        raise RefusedError(
            f"there is nothing to {verb}: {rollout.route} has no version on trial; propose one first"
        )
    return rollout.trial


def _need_force(ask: Ask, why: str) -> None:
    if not ask.force:
        raise RefusedError(
            f"{why}. Wait for the evidence, or repeat it with force and a reason", param="force"
        )


def _forced(reason: str, why: str) -> str:
    return f"{reason} (forced: {why})" if reason else f"forced: {why}"


def _what_gates_say(verdicts: list[Verdict]) -> str:
    if not verdicts:
        return "no gate has judged this trial yet"
    return "; ".join(f"{v.gate} {v.outcome}: {v.reason}" for v in verdicts if v.outcome != "pass")
