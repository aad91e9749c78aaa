"""Reports of evaluations."""

from typing import Annotated

from fastapi import APIRouter, Query

from rollout.api.security import ControlPlane, Reader
from rollout.control.access import require_route
from rollout.evidence import Report

router = APIRouter(prefix="/reports", tags=["reports"])


@router.get("")
async def get_reports(
    control: ControlPlane,
    caller: Reader,
    route: str | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> list[Report]:
    rows = await control.stores.reports.list(route, limit)
    return [report for report in rows if caller.allows_route(report.route)]


@router.get("/{report}")
async def get_report(control: ControlPlane, caller: Reader, report: str) -> Report:
    found = await control.stores.reports.get(report)
    require_route(caller, found.route)
    return found
