"""Suites: rows with known answers and the scorers that mark them."""

from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response, status

from rollout.api.limits import read_body
from rollout.api.security import ControlPlane, Reader, Trainer
from rollout.control import evaluations
from rollout.suites import SuiteManifest, SuiteStanding

router = APIRouter(prefix="/suites", tags=["suites"])

PATH: Final = "/suites"
_MAXIMUM_BYTES: Final = 64 * 2**20


@router.post("", status_code=status.HTTP_201_CREATED)
async def post_suite(
    control: ControlPlane,
    caller: Trainer,
    request: Request,
    route: str,
    vault: bool = False,
    note: Annotated[str, Query(max_length=2000)] = "",
) -> SuiteManifest:
    """Register lines of JSON: one with the scorers, then a row each. It never changes."""
    content = await read_body(
        request, _MAXIMUM_BYTES, "a suite this large says no more than a part of it"
    )
    return await evaluations.add_suite(control, caller, route, content, vault=vault, note=note)


@router.get("")
async def get_suites(
    control: ControlPlane, caller: Reader, route: str | None = None
) -> list[SuiteManifest]:
    return await evaluations.suites(control, caller, route)


@router.get("/{digest}")
async def get_suite(control: ControlPlane, caller: Reader, digest: str) -> SuiteStanding:
    """The suite with each look at it."""
    return await evaluations.suite(control, caller, digest)


@router.get("/{digest}/rows", response_class=Response)
async def get_suite_rows(control: ControlPlane, caller: Trainer, digest: str) -> Response:
    """The scorers and the rows, a line of JSON each; refused for a suite in the vault."""
    content = await evaluations.suite_rows(control, caller, digest)
    return Response(content, media_type="application/jsonl")
