"""Where a rollout stands, and the verbs that move it."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from rollout.catalog import Catalog
from rollout.control.context import Control
from rollout.control.retraining import outlook_of
from rollout.control.views import Changed, RolloutView, RouteView, Verb
from rollout.credentials import ApiKey
from rollout.engines import Placement, placement
from rollout.errors import (
    EngineUnavailableError,
    InvalidInputError,
    RefusedError,
    StaleRevisionError,
)
from rollout.evidence import Evidence, Verdict
from rollout.planner import Known, plan_followed, standing
from rollout.plans import Plan, PlanSpec
from rollout.policy import given_plan_problems, plan_of, policy_problems, servable_gates
from rollout.records import HistoryEntry
from rollout.routes import Route
from rollout.state import (
    CanarySet,
    Event,
    Held,
    Promoted,
    Proposed,
    Queued,
    Resumed,
    RolledBack,
    Rollout,
    Trial,
    Withdrawn,
    surely_meant,
)
from rollout.stores import Stores
from rollout.versions import Version, parse_model

# Somebody who names no revision means "whatever it is now"; more than this many commits in
# between is a fight that a person should see.
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Ask:
    """What a verb was asked with. `revision` None is whatever the rollout's revision is now.

    `plan` None is the plan of the route's policy. With `queue` a proposal waits for its turn.

    `force` puts aside the gates and reports, never the state machine; the history says so.
    """

    reason: str
    version: str | None = None
    percent: float | None = None
    revision: int | None = None
    force: bool = False
    plan: PlanSpec | None = None
    queue: bool = False


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


async def status(control: Control, route: str, catalog: Catalog | None = None) -> RolloutView:
    """Whoever looks at many routes brings the catalog along, which is read once then."""
    rollout = await control.stores.rollouts.get(route)
    trial = rollout.trial
    evidence = None
    verdicts: tuple[Verdict, ...] = ()
    if trial is not None:
        evidence = await control.stores.evidence.read(route, trial.id)
        verdicts = tuple(await control.stores.evidence.verdicts(route, trial.id))
    stats = await control.stores.cases.stats(route)
    if catalog is None or route not in catalog.routes:
        catalog = await control.stores.catalog.load()
    known = _known(rollout, evidence, verdicts, catalog)
    return RolloutView(
        rollout=rollout,
        stable=f"{route}@{rollout.stable}",
        candidate=None if trial is None else f"{route}@{trial.candidate}",
        previous=None if rollout.previous is None else f"{route}@{rollout.previous}",
        evidence=evidence,
        verdicts=verdicts,
        open_cases=sum(row.open + row.leased for row in stats),
        placements=_placements(rollout, catalog),
        standing=standing(rollout, known, catalog.routes[route].policy, control.now()),
        queued=tuple(f"{route}@{waiting.version}" for waiting in rollout.queued),
        retraining=await outlook_of(control, catalog.routes[route], rollout),
        last=next(iter(await control.stores.rollouts.history(route, 1)), None),
    )


def _known(
    rollout: Rollout, evidence: Evidence | None, verdicts: Sequence[Verdict], catalog: Catalog
) -> Known | None:
    if rollout.trial is None or evidence is None:
        return None
    version = catalog.versions.get(f"{rollout.route}@{rollout.trial.candidate}")
    if version is None:
        return None
    return Known(evidence, verdicts, placement(version, catalog.residency.values()))


def _placements(rollout: Rollout, catalog: Catalog) -> Mapping[str, Placement]:
    """Of the versions with an adapter that the controller keeps for this route."""
    numbers = [rollout.stable, rollout.previous]
    if rollout.trial is not None:
        numbers.insert(1, rollout.trial.candidate)
    names = [f"{rollout.route}@{number}" for number in numbers if number is not None]
    versions = [catalog.versions[name] for name in names if name in catalog.versions]
    return {
        version.name: placement(version, catalog.residency.values())
        for version in versions
        if version.adapter is not None
    }


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
    """Puts the version on trial, or behind those that wait for their turn."""
    version = await _asked_version(control, rollout, ask)
    plan = _plan(await control.stores.rollouts.route(rollout.route), ask.plan)
    reason = ask.reason
    report = await control.stores.reports.of(version.name)
    if report is not None and report.outcome == "fail":
        _need_force(ask, f"{version.name} lost its evaluation ({report.reason})")
        reason = _forced(reason, "its evaluation failed")
    waits = ask.queue and (rollout.trial is not None or bool(rollout.queued))
    kind = Queued if waits else Proposed
    return kind(version=version.number, at=control.now(), by=by, reason=reason, plan=plan)


def _plan(route: Route, given: PlanSpec | None) -> Plan:
    """The plan that the trial will follow, whatever becomes of the route. Checked here again: the
    route may have lost what a gate needs, and a plan may have come with the proposal."""
    servable = servable_gates(route.slo, route.schema)
    if given is not None:
        for field, problem in given_plan_problems(given, route.policy, servable):
            raise InvalidInputError(problem, param=f"plan.{field}")
    else:
        for field, problem in policy_problems(route.policy, servable):
            raise InvalidInputError(
                f"the policy of {route.name} makes no plan: {field}: {problem}; mend it with "
                f"`sluice route set {route.name}`",
                param=f"policy.{field}",
            )
    return plan_of(route.policy, given)


async def _withdrawn(control: Control, rollout: Rollout, ask: Ask, by: str) -> Event:
    version = await _asked_version(control, rollout, ask)
    return Withdrawn(version=version.number, at=control.now(), by=by, reason=ask.reason)


async def _canary_set(control: Control, rollout: Rollout, ask: Ask, by: str) -> Event:
    if ask.percent is None:
        raise InvalidInputError("say how many percent of the traffic", param="percent")
    return await _weight(control, rollout, ask.percent, ask, by)


async def _advanced(control: Control, rollout: Rollout, ask: Ask, by: str) -> Event:
    """Enters the plan's next step, as whoever approves it; behind the last one it promotes."""
    trial = _trial(rollout, "advance")
    policy = (await control.stores.rollouts.route(rollout.route)).policy
    percent = plan_followed(trial, policy).behind(trial.weight).percent
    if percent >= 100:
        return await _promoted(control, rollout, ask, by)
    return await _weight(control, rollout, percent, ask, by)


async def _weight(
    control: Control, rollout: Rollout, percent: float, ask: Ask, by: str
) -> CanarySet:
    reason = ask.reason
    # Less of it is always possible, whatever the engines are doing.
    if rollout.trial is not None and percent > rollout.trial.weight:
        reason = await _candidate_resident(control, rollout, rollout.trial, ask, reason)
    return CanarySet(percent=percent, at=control.now(), by=by, reason=reason)


async def _held(control: Control, _: Rollout, ask: Ask, by: str) -> Event:
    return Held(at=control.now(), by=by, reason=ask.reason)


async def _resumed(control: Control, _: Rollout, ask: Ask, by: str) -> Event:
    return Resumed(at=control.now(), by=by, reason=ask.reason)


async def _promoted(control: Control, rollout: Rollout, ask: Ask, by: str) -> Promoted:
    trial = _trial(rollout, "promote")
    reason = await _candidate_resident(control, rollout, trial, ask, ask.reason)
    verdicts = await control.stores.evidence.verdicts(rollout.route, trial.id)
    policy = (await control.stores.rollouts.route(rollout.route)).policy
    said = _in_the_way(plan_followed(trial, policy).gates, verdicts)
    if said:
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
    """The event, unless it would hit what nobody aims at: RefusedError then."""
    history = await stores.rollouts.history(rollout.route, limit=2)
    succeeded = bool(history) and _from_queue(history[0])
    last = next(iter(history[1:] if succeeded else history), None)
    meant = last is None or surely_meant(rollout, last.event, now, succeeded=succeeded)
    if last is not None and not force and not meant:
        would = (
            f"put {rollout.route}@{rollout.previous} in the place of the stable "
            f"{rollout.route}@{rollout.stable}"
            if rollout.trial is None
            else f"end the trial of {rollout.route}@{rollout.trial.candidate}, which came from the "
            "queue since"
        )
        raise RefusedError(
            f"{last.event.by} rolled {rollout.route} back a moment ago ({last.event.reason}); a "
            f"second rollback would {would}. Repeat it with force if that is meant",
            param="force",
        )
    if not force and rollout.trial is None and rollout.previous is not None:
        await _way_back(stores, rollout)
    return RolledBack(at=now, by=by, reason=reason)


def _from_queue(entry: HistoryEntry) -> bool:
    """Whether it put a version on trial whose turn had come."""
    event = entry.event
    return isinstance(event, Proposed) and any(
        event.version == waiting.version for waiting in entry.before.queued
    )


async def _way_back(stores: Stores, rollout: Rollout) -> None:
    """Raise RefusedError where the last stable version would answer nobody, and stable answers."""
    catalog = await stores.catalog.load()
    stable, previous = (
        placement(catalog.versions[name], catalog.residency.values())
        for name in (f"{rollout.route}@{rollout.stable}", f"{rollout.route}@{rollout.previous}")
    )
    if stable.on and not previous.on:
        raise RefusedError(
            f"no replica serves {previous.name} now ({previous.reason}), so {rollout.route} would fail "
            "until one does. Make room for it, or repeat the rollback with force if failing is better",
            param="force",
        )


_EVENTS: Mapping[Verb, Callable[[Control, Rollout, Ask, str], Awaitable[Event]]] = {
    "propose": _proposed,
    "canary": _canary_set,
    "advance": _advanced,
    "hold": _held,
    "resume": _resumed,
    "promote": _promoted,
    "rollback": _rolled_back,
    "withdraw": _withdrawn,
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


async def _candidate_resident(
    control: Control, rollout: Rollout, trial: Trial, ask: Ask, reason: str
) -> str:
    """The reason for the history, once the candidate can have more traffic.

    With force, the replicas that serve it are enough, if there is one.
    """
    version = await control.stores.rollouts.version(f"{rollout.route}@{trial.candidate}")
    residencies = (await control.stores.catalog.load()).residency.values()
    found = placement(version, residencies)
    if ask.force and found.on and found.missing:
        return _forced(reason, f"not resident on {', '.join(found.missing)}")
    if version.adapter is not None and not found.everywhere:
        hint = ". With force it goes on without those replicas" if found.on else ""
        raise EngineUnavailableError(f"{version.name} is not resident yet: {found.reason}{hint}")
    return reason


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


def _in_the_way(gates: Sequence[str], verdicts: Sequence[Verdict]) -> str:
    """What the gates have against a promotion; empty where those of the plan have passed."""
    if not verdicts:
        return "no gate has judged this trial yet"
    said = {verdict.gate: verdict for verdict in verdicts}
    silent = [gate for gate in gates if gate not in said]
    against = [
        f"{v.gate} {v.outcome}: {v.reason}"
        for v in verdicts
        if v.outcome == "fail" or (v.gate in gates and v.outcome != "pass")
    ]
    return "; ".join([*against, *(f"{gate} has not judged yet" for gate in silent)])
