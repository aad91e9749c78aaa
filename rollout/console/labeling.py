"""The labeling pages: one case after the other, by mouse or by keyboard."""

from contextlib import suppress
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Form, status
from fastapi.responses import RedirectResponse, Response

from rollout.cases import Choice
from rollout.console.page import Here, PageRoute, Sender, Visitor
from rollout.control import cases
from rollout.errors import ConflictError

router = APIRouter(prefix="/label", route_class=PageRoute, include_in_schema=False)

# A case that was skipped stays away until this many others were skipped after it.
_SKIPPED_REMEMBERED = 20
_DISPUTED_SHOWN = 50


@router.get("")
async def get_next(visitor: Here, route: str = "", skipped: str = "") -> Response:
    """Claim the next case and go to its page, so that a reload shows the same one."""
    visitor.need("label")
    if route:
        visitor.need_route(route)
    return await _next(visitor, route, _ids(skipped))


@router.get("/figures")
async def get_figures(visitor: Here, route: str = "") -> Response:
    """How many, how far labelers agree, and whom they prefer."""
    if route:
        visitor.need_route(route)
    return visitor.show(
        "labels.html",
        route=route,
        stats=await cases.stats(visitor.control, visitor.key, route or None),
        disputed=await cases.cases(
            visitor.control, visitor.key, route or None, "disputed", _DISPUTED_SHOWN
        ),
    )


@router.get("/{case}")
async def get_case(visitor: Here, case: str, route: str = "", skipped: str = "") -> Response:
    visitor.need("label")
    return visitor.show(
        "label.html",
        case=await cases.case(visitor.control, visitor.key, case),
        route=route,
        skipped=skipped,
        stats=await cases.stats(visitor.control, visitor.key, route or None),
    )


@router.post("/{case}")
async def post_label(
    visitor: Sender,
    case: str,
    choice: Annotated[Choice, Form()],
    correction: Annotated[str, Form(max_length=100_000)] = "",
    route: Annotated[str, Form()] = "",
    skipped: Annotated[str, Form()] = "",
) -> Response:
    visitor.need("label")
    await cases.label(
        visitor.control, visitor.key, case, choice, correction=correction.strip() or None
    )
    return await _next(visitor, route, _ids(skipped))


@router.post("/{case}/skip")
async def post_skip(
    visitor: Sender,
    case: str,
    route: Annotated[str, Form()] = "",
    skipped: Annotated[str, Form()] = "",
) -> Response:
    visitor.need("label")
    # Where its lease has run out it is back in the queue already, as was wanted.
    with suppress(ConflictError):
        await cases.release(visitor.control, visitor.key, case)
    ids = [*(known for known in _ids(skipped) if known != case), case]
    return await _next(visitor, route, ids[-_SKIPPED_REMEMBERED:])


async def _next(visitor: Visitor, route: str, skipped: list[str]) -> Response:
    found = await cases.next_case(visitor.control, visitor.key, route or None, skipped)
    if found is None:
        return visitor.show(
            "label_done.html",
            route=route,
            skipped=skipped,
            stats=await cases.stats(visitor.control, visitor.key, route or None),
        )
    query = {"route": route, "skipped": ",".join(skipped)}
    query = {name: value for name, value in query.items() if value}
    where = f"/label/{found.id}" + (f"?{urlencode(query)}" if query else "")
    return RedirectResponse(where, status_code=status.HTTP_303_SEE_OTHER)


def _ids(text: str) -> list[str]:
    return [name for name in text.split(",") if name][-_SKIPPED_REMEMBERED:]
