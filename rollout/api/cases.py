"""Cases: claimed, labelled, released, erased; exported and imported as lines of JSON."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, status
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from rollout.api.limits import read_body
from rollout.api.security import Admin, ControlPlane, Labeler, Reader, Trainer
from rollout.cases import CaseState, Choice, Label
from rollout.control import cases, erasure
from rollout.control.views import CaseView, ErasureView, Imported, Recorded
from rollout.errors import InvalidInputError
from rollout.records import CaseStats

router = APIRouter(prefix="/cases", tags=["cases"])


class ClaimBody(BaseModel):
    """Without a `route` the cases come from all of them."""

    model_config = ConfigDict(extra="forbid")

    route: str | None = None
    count: int = Field(1, ge=1, le=500)
    lease_seconds: int = Field(600, ge=1, le=86_400)


class LabelBody(BaseModel):
    """`correction` is the answer that would have been right."""

    model_config = ConfigDict(extra="forbid")

    choice: Choice
    correction: str | None = Field(None, max_length=100_000)
    comment: str = Field("", max_length=10_000)


@router.get("")
async def get_cases(
    control: ControlPlane,
    caller: Reader,
    route: str | None = None,
    state: CaseState | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[CaseView]:
    return await cases.cases(control, caller, route, state, limit)


@router.delete("")
async def delete_cases(
    control: ControlPlane,
    caller: Admin,
    unit: str | None = None,
    user: str | None = None,
    request_id: str | None = None,
    older_than_days: Annotated[float | None, Query(gt=0)] = None,
    route: str | None = None,
    reason: Annotated[str, Query(max_length=1000)] = "",
) -> ErasureView:
    """Erase cases, labels, captures and feedback of a client, of a request, or by age."""
    if older_than_days is None:
        if route is not None:
            raise InvalidInputError("a client is on any route: leave `route` out", param="route")
        return await erasure.erase(
            control, caller, unit=unit, user=user, request_id=request_id, reason=reason
        )
    if unit or user or request_id:
        raise InvalidInputError("erase by age, or by whose it is, not both: ask twice")
    return await erasure.erase_older(control, caller, older_than_days, route, reason)


@router.get("/stats")
async def get_stats(
    control: ControlPlane, caller: Reader, route: str | None = None
) -> Sequence[CaseStats]:
    return await cases.stats(control, caller, route)


@router.get("/export", response_class=StreamingResponse)
async def get_export(
    control: ControlPlane, caller: Trainer, route: str | None = None
) -> StreamingResponse:
    """Every labelled case, one line of JSON each."""
    if route is None:
        catalog = await control.stores.catalog.load()
        routes = [name for name in sorted(catalog.routes) if caller.allows_route(name)]
    else:
        await control.stores.rollouts.get(route)
        routes = [route]
    return StreamingResponse(
        cases.export(control, routes),
        media_type="application/jsonl",
        headers={"content-disposition": 'attachment; filename="cases.jsonl"'},
    )


@router.post("/import")
async def post_import(control: ControlPlane, caller: Trainer, request: Request) -> Imported:
    """Add exported lines; known ones are skipped. A broken line refuses all of them."""
    return await cases.bring_in(control, caller, await read_body(request))


@router.post("/claim")
async def post_claim(control: ControlPlane, caller: Labeler, body: ClaimBody) -> list[CaseView]:
    """Take the most telling open cases; an empty list means that none is waiting."""
    return await cases.claim(control, caller, body.route, body.count, body.lease_seconds)


@router.post("/{case}/label")
async def post_label(
    control: ControlPlane, caller: Labeler, case: str, body: LabelBody
) -> Recorded:
    return await cases.label(
        control, caller, case, body.choice, correction=body.correction, comment=body.comment
    )


@router.get("/{case}/labels")
async def get_labels(control: ControlPlane, caller: Trainer, case: str) -> Sequence[Label]:
    """Who said what of a case and when, the oldest first."""
    return await cases.labels(control, caller, case)


@router.post("/{case}/release", status_code=status.HTTP_204_NO_CONTENT)
async def post_release(control: ControlPlane, caller: Labeler, case: str) -> None:
    """Give a claimed case back unlabelled."""
    await cases.release(control, caller, case)
