"""The pages: overview, runs, reports, and the way in and out."""

from typing import Annotated, Literal, cast

from fastapi import APIRouter, Form, Request, status
from fastapi.responses import RedirectResponse, Response

from rollout.console import session
from rollout.console.page import Here, PageRoute, Sender, templates
from rollout.control import advice, evaluations, rollouts, runs, versions
from rollout.control.context import Control
from rollout.control.views import Verb
from rollout.errors import AuthenticationError, InvalidInputError, StoreUnavailableError
from rollout.runs import ENDED

router = APIRouter(route_class=PageRoute, include_in_schema=False)

# What can be said with a button; all else takes the command line or the API.
_VERBS: frozenset[str] = frozenset({"advance", "canary", "hold", "resume", "rollback", "withdraw"})
_RUN_EVENTS_SHOWN = 200
_SUITES_SHOWN = 20


@router.get("/login")
async def get_login(request: Request, next: str = "/") -> Response:
    return templates.TemplateResponse(request, "login.html", {"next": _inside(next)})


@router.post("/login")
async def post_login(
    request: Request,
    key: Annotated[str, Form(max_length=500)],
    next: Annotated[str, Form()] = "/",
) -> Response:
    control = cast(Control, request.app.state.control)
    try:
        found = await control.keyring.find(key.strip())
        if found is None:
            raise AuthenticationError("This key is not known: it was mistyped or revoked.")
    except (AuthenticationError, StoreUnavailableError) as exc:
        values = {"next": _inside(next), "problem": exc.message}
        return templates.TemplateResponse(request, "login.html", values, status_code=exc.status)
    response = RedirectResponse(_inside(next), status_code=status.HTTP_303_SEE_OTHER)
    response.set_cookie(
        session.COOKIE,
        session.issue(found, control.now()),
        max_age=int(session.LIFETIME.total_seconds()),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


@router.post("/logout")
async def post_logout(_: Sender) -> Response:
    response = RedirectResponse("/login", status_code=status.HTTP_303_SEE_OTHER)
    response.delete_cookie(session.COOKIE, httponly=True, samesite="strict")
    return response


@router.get("/")
async def get_overview(visitor: Here) -> Response:
    control = visitor.control
    catalog = await control.stores.catalog.load()
    rows = [
        (view, await rollouts.status(control, view.route.name, catalog))
        for view in await rollouts.routes(control, visitor.key)
    ]
    return visitor.show(
        "overview.html",
        rows=rows,
        engines=await versions.engines(control),
        gateways=await control.stores.presence.live(),
        revision=await control.stores.catalog.revision(),
    )


@router.post("/routes/{route}/{verb}")
async def post_verb(
    visitor: Sender,
    route: str,
    verb: Verb,
    revision: int | None = None,
    reason: Annotated[str, Form(max_length=2000)] = "",
    percent: Annotated[float | None, Form(ge=0, le=100)] = None,
    version: Annotated[str | None, Form(max_length=100)] = None,
    back: Annotated[Literal["", "route"], Form()] = "",
) -> Response:
    """`revision` is that of the page, where it matters that the visitor has seen the present one."""
    visitor.need("operate")
    visitor.need_route(route)
    if verb not in _VERBS:
        raise InvalidInputError(f"the console does not {verb}: use the command line")
    ask = rollouts.Ask(
        reason=reason.strip() or "from the console",
        version=version,
        percent=percent,
        revision=revision,
    )
    await rollouts.change(visitor.control, visitor.key, route, verb, ask)
    there = f"/routes/{route}" if back == "route" else f"/#{route}"
    return RedirectResponse(there, status_code=status.HTTP_303_SEE_OTHER)


@router.get("/routes/{route}")
async def get_history(visitor: Here, route: str) -> Response:
    visitor.need_route(route)
    return visitor.show(
        "route.html",
        view=await rollouts.route(visitor.control, route),
        status=await rollouts.status(visitor.control, route),
        versions=await versions.versions(visitor.control, visitor.key, route),
        history=await visitor.control.stores.rollouts.history(route, 50),
    )


@router.get("/routes/{route}/advice")
async def get_advice(visitor: Here, route: str) -> Response:
    visitor.need_route(route)
    return visitor.show("advice.html", advice=await advice.advice(visitor.control, route))


@router.get("/runs")
async def get_runs(visitor: Here) -> Response:
    found = await runs.runs(visitor.control, visitor.key, None, 50)
    latest = {}
    for run in found:
        if run.state not in ENDED:
            events = await runs.events(visitor.control, run.id)
            latest[run.id] = events[-1] if events else None
    return visitor.show("runs.html", runs=found, latest=latest)


@router.get("/runs/{run}")
async def get_run(visitor: Here, run: str) -> Response:
    found = await runs.run(visitor.control, visitor.key, run)
    events = await runs.events(visitor.control, run)
    return visitor.show(
        "run.html", run=found, ended=found.state in ENDED, events=events[-_RUN_EVENTS_SHOWN:]
    )


@router.post("/runs/{run}/{verb}")
async def post_run_verb(
    visitor: Sender, run: str, verb: Literal["pause", "resume", "cancel"]
) -> Response:
    visitor.need("train")
    change = {"pause": runs.pause, "resume": runs.resume, "cancel": runs.cancel}[verb]
    await change(visitor.control, visitor.key, run)
    return RedirectResponse(f"/runs/{run}", status_code=status.HTTP_303_SEE_OTHER)


@router.get("/reports")
async def get_reports(visitor: Here) -> Response:
    found = await evaluations.reports(visitor.control, visitor.key, None, 50)
    suites = await evaluations.standings(visitor.control, visitor.key, _SUITES_SHOWN)
    return visitor.show("reports.html", reports=found, suites=suites)


@router.get("/reports/{report}")
async def get_report(visitor: Here, report: str) -> Response:
    found = await evaluations.report(visitor.control, visitor.key, report)
    ends = [abs(end) for each in found.slices for end in (each.low, each.high)]
    ends += [abs(end) for each in found.beside for end in (each.low, each.high)]
    # One scale for all differences on the page, a little wider than the widest.
    reach = min(1.0, max([0.05, *ends]) * 1.1)
    return visitor.show("report.html", report=found, reach=reach)


def _inside(path: str) -> str:
    """Never lead anybody to another site after the login."""
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) else "/"
