"""Erasing cases and what goes with them: on request, and when they are older than a route keeps."""

import asyncio
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from rollout.assignment import unit_of
from rollout.control.access import require_route
from rollout.control.context import Control
from rollout.control.views import ErasureView, Remnant
from rollout.credentials import ApiKey
from rollout.errors import InvalidInputError, NotFoundError, PermissionDeniedError
from rollout.routes import Route
from rollout.runs import TrainingRun
from rollout.stores import Erased, Stores
from rollout.stores.audit import audit_entry

# Cases of one route that are erased before the next one has its turn.
_AT_ONCE = 500
_RUNS_LOOKED_AT = 1000
_CASE = re.compile(rb'"case": ?"([^"]+)"')


async def erase(
    control: Control,
    caller: ApiKey,
    *,
    unit: str | None,
    user: str | None,
    request_id: str | None,
    reason: str = "",
) -> ErasureView:
    """Erase all that belongs to one client, or to one request.

    `user` is `KEY_ID/STICKY`: the key's id, and what the client sent as its session or user.
    """
    if sum(bool(each) for each in (unit, user, request_id)) != 1:
        raise InvalidInputError("say whose: one of unit, user (KEY_ID/STICKY) and request_id")
    if caller.routes is not None:
        raise PermissionDeniedError("a client is on any route: this takes a key for all of them")
    if user:
        unit = _unit_of(user)
    erased = await control.stores.erasure.erase(unit=unit, request_id=request_id)
    subject = f"request {request_id}" if request_id else f"unit {unit}"
    return await _told(control, caller, subject, reason, erased)


async def erase_older(
    control: Control, caller: ApiKey, days: float, route: str | None, reason: str = ""
) -> ErasureView:
    """Erase what is older than so many days, of one route or of all that the key is for."""
    known = (await control.stores.catalog.load()).routes
    if route is not None:
        require_route(caller, route)
        await control.stores.rollouts.get(route)
    names = [route] if route is not None else [name for name in known if caller.allows_route(name)]
    before = dict.fromkeys(names, control.now() - timedelta(days=days))
    erased = sum((await _expire(control.stores, before)).values(), Erased())
    subject = f"older than {days:g} days" + (f" of {route}" if route else "")
    return await _told(control, caller, subject, reason, erased)


async def sweep(stores: Stores, routes: Iterable[Route], now: datetime) -> Mapping[str, Erased]:
    """Erase what each route's policy keeps no longer, and write it into the audit."""
    before = {
        route.name: now - timedelta(days=route.policy.retention_days)
        for route in routes
        if route.policy.retention_days > 0
    }
    found = await _expire(stores, before)
    for route, erased in found.items():
        entry = audit_entry(
            "cases.expire", route, "sluice", reason="retention_days", after=_counts(erased)
        )
        await stores.audit.append(entry)
    return found


async def _expire(stores: Stores, before: Mapping[str, datetime]) -> Mapping[str, Erased]:
    found: dict[str, Erased] = {}
    while before:
        part = await stores.erasure.expire(before, _AT_ONCE)
        for route, erased in part.items():
            found[route] = found.get(route, Erased()) + erased
        before = {route: before[route] for route, each in part.items() if each.cases >= _AT_ONCE}
    return found


async def _told(
    control: Control, caller: ApiKey, subject: str, reason: str, erased: Erased
) -> ErasureView:
    remnants = await _remnants(control, erased.case_ids) if erased.case_ids else ()
    view = replace(_counts(erased), remnants=tuple(remnants))
    await control.stores.audit.append(
        audit_entry("cases.erase", subject, caller.name, reason=reason, after=view)
    )
    return view


async def _remnants(control: Control, case_ids: Collection[str]) -> Sequence[Remnant]:
    """The datasets that hold erased cases, with what was trained on them."""
    trained: dict[str, list[TrainingRun]] = {}
    for run in await control.stores.runs.list(None, _RUNS_LOOKED_AT):
        if run.dataset is not None:
            trained.setdefault(run.dataset, []).append(run)
    for manifest in await control.stores.datasets.list():
        trained.setdefault(manifest.digest, [])
        # What labels that contradict each other said is listed beside the rows.
        if manifest.ledger is not None and manifest.contradictions:
            trained.setdefault(manifest.ledger, [])
    names = {case_id.encode() for case_id in case_ids}
    found: list[Remnant] = []
    for digest, runs in trained.items():
        held = await asyncio.to_thread(_held, control.artifacts.document, digest, names)
        if held:
            found.append(
                Remnant(
                    dataset=digest,
                    cases=held,
                    runs=tuple(run.id for run in runs),
                    adapters=tuple(sorted({run.adapter for run in runs if run.adapter})),
                    versions=tuple(sorted({run.version for run in runs if run.version})),
                )
            )
    return found


def _held(document: Callable[[str], bytes], digest: str, names: Collection[bytes]) -> int:
    try:
        content = document(digest)
    except NotFoundError:
        return 0
    return len({name for name in _CASE.findall(content) if name in names})


def _unit_of(user: str) -> str:
    key_id, slash, sticky = user.partition("/")
    if not (key_id and slash and sticky):
        raise InvalidInputError(
            f"{user!r}: write KEY_ID/STICKY, the id of the API key (`sluice keys list`) and what the "
            "client sent as x-sluice-session, prompt_cache_key, safety_identifier or user",
            param="user",
        )
    return unit_of(key_id, sticky)


def _counts(erased: Erased) -> ErasureView:
    return ErasureView(
        erased.cases, erased.labels, erased.captures, erased.feedback, erased.differences
    )
