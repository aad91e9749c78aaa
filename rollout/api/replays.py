"""Replays: past captures of a route put through a version."""

from collections.abc import Sequence

from fastapi import APIRouter, status
from pydantic import BaseModel, ConfigDict, Field

from rollout.api.security import ControlPlane, Operator, Reader
from rollout.control import replays
from rollout.replays import Replay, ReplayReport

router = APIRouter(prefix="/routes/{route}/replays", tags=["replays"])


class Body(BaseModel):
    """The newest `limit` exchanges that were captured in the last `since_seconds`."""

    model_config = ConfigDict(extra="forbid")

    version: str | int
    since_seconds: float = Field(86_400, gt=0, le=10 * 365 * 86_400)
    limit: int = Field(1000, ge=1, le=100_000)


@router.post("", status_code=status.HTTP_202_ACCEPTED)
async def post_replay(control: ControlPlane, caller: Operator, route: str, body: Body) -> Replay:
    """Queue a replay; a shadow process takes it."""
    wanted = replays.ReplayAsk(str(body.version), body.since_seconds, body.limit)
    return await replays.ask(control, caller, route, wanted)


@router.get("")
async def get_replays(control: ControlPlane, _: Reader, route: str) -> Sequence[Replay]:
    """The newest first."""
    return await replays.replays(control, route)


@router.get("/{replay}")
async def get_replay(control: ControlPlane, _: Reader, route: str, replay: str) -> ReplayReport:
    """What it has found so far."""
    return await replays.report(control, route, replay)


@router.post("/{replay}/cancel")
async def post_cancel(control: ControlPlane, caller: Operator, route: str, replay: str) -> Replay:
    """End it. What it has found stays."""
    return await replays.cancel(control, caller, route, replay)
