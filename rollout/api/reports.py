"""Evaluations: asked for, and their reports."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, status
from pydantic import BaseModel, ConfigDict, Field

from rollout.api.security import ControlPlane, Reader, Trainer
from rollout.control import evaluations
from rollout.evidence import Report, RowResult
from rollout.runs import TrainingRun

router = APIRouter(prefix="/reports", tags=["reports"])


class Body(BaseModel):
    """`against` is the stable version, `suite` the route's newest open one, unless they are said."""

    model_config = ConfigDict(extra="forbid")

    version: str
    against: str | None = None
    suite: str | None = None
    rows: int = Field(0, ge=0)
    fresh: bool = False
    promotion: bool = False
    reason: str = Field("", max_length=2000)
    ways: list[Literal["base", "prompt", "larger"]] | None = None


@router.post("", status_code=status.HTTP_202_ACCEPTED)
async def post_report(control: ControlPlane, caller: Trainer, body: Body) -> TrainingRun:
    """Ask a trainer to evaluate a version; the run's `report` names what came out."""
    return await evaluations.start(control, caller, evaluations.Ask(**body.model_dump()))


@router.get("")
async def get_reports(
    control: ControlPlane,
    caller: Reader,
    route: str | None = None,
    version: str | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> list[Report]:
    return await evaluations.reports(control, caller, route, limit, version)


@router.get("/{report}")
async def get_report(control: ControlPlane, caller: Reader, report: str) -> Report:
    """By its id, or the first digits of it."""
    return await evaluations.report(control, caller, report)


@router.get("/{report}/rows")
async def get_report_rows(control: ControlPlane, caller: Trainer, report: str) -> list[RowResult]:
    """What both versions answered to each row, those on which they differ first."""
    return await evaluations.report_rows(control, caller, report)
