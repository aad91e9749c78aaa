"""Cases: what waits for a person, what they say, and both as lines of JSON."""

from collections.abc import AsyncIterator, Sequence

from pydantic import ValidationError

from rollout.cases import Case, CaseState, Choice, Label, LabelledCase, decide
from rollout.control.access import require_route
from rollout.control.context import Control
from rollout.control.views import CaseView, Imported, Recorded, case_view
from rollout.credentials import ApiKey
from rollout.errors import InvalidInputError, NotFoundError, PermissionDeniedError
from rollout.records import CaseStats
from rollout.stores.audit import audit_entry
from rollout.stores.codec import decode, encode

# Time enough to read a long conversation; a closed tab gives its case back after it.
_PAGE_LEASE_SECONDS = 600


async def cases(
    control: Control, caller: ApiKey, route: str | None, state: CaseState | None, limit: int
) -> list[CaseView]:
    rows = await control.stores.cases.list(route, state, limit)
    shown = [(case, now) for case, now in rows if caller.allows_route(case.route)]
    return await _views(control, caller, shown)


async def claim(
    control: Control, caller: ApiKey, route: str | None, count: int, lease_seconds: int
) -> list[CaseView]:
    """The most telling open cases, kept for the caller until the lease runs out."""
    if route is not None:
        require_route(caller, route)
        await control.stores.rollouts.get(route)
    elif caller.routes is not None:
        raise PermissionDeniedError(
            f"this key is for {', '.join(sorted(caller.routes))}: say which route", param="route"
        )
    claimed = await control.stores.cases.claim(
        caller.name, route=route, count=count, lease_seconds=lease_seconds
    )
    return await _views(control, caller, [(case, "leased") for case in claimed])


async def next_case(
    control: Control, caller: ApiKey, route: str | None, skipped: Sequence[str]
) -> CaseView | None:
    """Claim the next case that the caller has not skipped; None where there is none."""
    claimed = await claim(control, caller, route, len(skipped) + 1, _PAGE_LEASE_SECONDS)
    chosen = next((case for case in claimed if case.id not in skipped), None)
    for case in claimed:
        if case is not chosen:
            await release(control, caller, case.id)
    return chosen


async def case(control: Control, caller: ApiKey, case_id: str) -> CaseView:
    found = await control.stores.cases.get(case_id)
    if not caller.allows_route(found.route):
        raise NotFoundError(f"there is no case {case_id!r}")
    (view,) = await _views(control, caller, [(found, "leased")])
    return view


async def label(
    control: Control,
    caller: ApiKey,
    case_id: str,
    choice: Choice,
    *,
    correction: str | None = None,
    comment: str = "",
) -> Recorded:
    case = await control.stores.cases.get(case_id)
    if not caller.allows_route(case.route):
        raise NotFoundError(f"there is no case {case_id!r}")
    recorded = await control.stores.cases.label(
        Label(
            case=case.id,
            route=case.route,
            choice=choice,
            labeler=caller.name,
            labelled_at=control.now(),
            correction=correction or None,
            comment=comment,
        )
    )
    return Recorded(recorded=recorded)


async def labels(control: Control, caller: ApiKey, case_id: str) -> Sequence[Label]:
    """All that was said of a case, which is not for those who are to label it."""
    case = await control.stores.cases.get(case_id)
    if not caller.allows_route(case.route):
        raise NotFoundError(f"there is no case {case_id!r}")
    return (await control.stores.cases.labels([case_id]))[case_id]


async def release(control: Control, caller: ApiKey, case_id: str) -> None:
    await control.stores.cases.release(case_id, caller.name)


async def stats(control: Control, caller: ApiKey, route: str | None) -> list[CaseStats]:
    rows = await control.stores.cases.stats(route)
    return [row for row in rows if caller.allows_route(row.route)]


async def export(control: Control, routes: Sequence[str]) -> AsyncIterator[bytes]:
    """Every labelled case of these routes, one line each."""
    for route in routes:
        for row in await control.stores.cases.labelled(route):
            yield encode(row) + b"\n"


async def bring_in(control: Control, caller: ApiKey, lines: bytes) -> Imported:
    """Add exported lines. One broken line names itself, and nothing at all is added."""
    rows = [
        _row(number, line)
        for number, line in enumerate(lines.split(b"\n"), start=1)
        if line.strip()
    ]
    for row in rows:
        require_route(caller, row.case.route)
    for route in {row.case.route for row in rows}:
        await control.stores.rollouts.get(route)
    added = await control.stores.cases.put_labelled(rows)
    imported = Imported(added=added, known=len(rows) - added)
    of_routes = ", ".join(sorted({row.case.route for row in rows}))
    entry = audit_entry("cases.import", of_routes, caller.name, after=imported)
    await control.stores.audit.append(entry)
    return imported


async def _views(
    control: Control, caller: ApiKey, rows: Sequence[tuple[Case, CaseState]]
) -> list[CaseView]:
    labels = await control.stores.cases.labels([case.id for case, _ in rows])
    return [case_view(case, state, labels[case.id], caller.name) for case, state in rows]


def _row(number: int, line: bytes) -> LabelledCase:
    try:
        row = decode(LabelledCase, line)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInputError(
            f"line {number}: {where + ': ' if where else ''}{first['msg']}; nothing was imported",
            param=f"line {number}",
        ) from exc
    if problem := _problem(row):
        raise InvalidInputError(
            f"line {number}: {problem}; nothing was imported", param=f"line {number}"
        )
    return row


def _problem(row: LabelledCase) -> str | None:
    """What a person would have to mend in a line that can be read."""
    labels = row.labels
    if any(label.case != row.case.id or label.route != row.case.route for label in labels):
        return "a label is of another case"
    if len({label.labeler for label in labels}) < len(labels):
        return "somebody labelled the case twice"
    deciding = decide(row.case, labels).label
    if deciding is None:
        return (
            f"its {len(labels)} labels do not decide it: labels_needed is {row.case.labels_needed}"
        )
    if deciding != row.label:
        return f"`label` is not the one that decides, which is that of {deciding.labeler!r}"
    return None
