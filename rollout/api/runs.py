"""Training runs: asked for, followed, paused, cancelled."""

from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, status
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from rollout.api.security import ControlPlane, Reader, Trainer
from rollout.control import runs
from rollout.control.access import require_route
from rollout.control.context import Control
from rollout.runs import TrainingRun
from rollout.stores.codec import encode

router = APIRouter(prefix="/runs", tags=["runs"])

# Shorter than the idle timeouts of common proxies.
_KEEP_ALIVE_SECONDS = 10.0


class Body(BaseModel):
    """`config` holds what should differ from the trainer's defaults; `dataset` is the digest of one
    of the route's, else one is built from the labels. Without `propose` a run that won is left to a
    person."""

    model_config = ConfigDict(extra="forbid")

    route: str
    config: Mapping[str, Any] = Field(default_factory=dict)
    dataset: str | None = None
    propose: bool = True


@router.post("", status_code=status.HTTP_201_CREATED)
async def post_run(control: ControlPlane, caller: Trainer, body: Body) -> TrainingRun:
    """Queue a run; a trainer takes it when it is free."""
    require_route(caller, body.route)
    return await runs.start(
        control, caller, body.route, body.config, body.dataset, propose=body.propose
    )


@router.get("")
async def get_runs(
    control: ControlPlane,
    caller: Reader,
    route: str | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> list[TrainingRun]:
    return await runs.runs(control, caller, route, limit)


@router.get("/{run}")
async def get_run(control: ControlPlane, caller: Reader, run: str) -> TrainingRun:
    return await runs.run(control, caller, run)


@router.post("/{run}/cancel")
async def post_cancel(control: ControlPlane, caller: Trainer, run: str) -> TrainingRun:
    """Ask the trainer to stop at its next step."""
    return await runs.cancel(control, caller, run)


@router.post("/{run}/pause")
async def post_pause(control: ControlPlane, caller: Trainer, run: str) -> TrainingRun:
    """Ask the trainer to save the run at its next step and to give it back."""
    return await runs.pause(control, caller, run)


@router.post("/{run}/resume")
async def post_resume(control: ControlPlane, caller: Trainer, run: str) -> TrainingRun:
    """Let a paused run wait for a trainer, which goes on where it was."""
    return await runs.resume(control, caller, run)


@router.get("/{run}/events", response_class=StreamingResponse)
async def get_events(
    control: ControlPlane,
    caller: Reader,
    run: str,
    last_event_id: Annotated[str, Header(pattern=r"^\d+(-\d+)?$")] = "0",
) -> StreamingResponse:
    """Progress as server-sent events from the beginning, or from behind `Last-Event-ID`.

    Each `progress` event is a RunEvent; the stream closes after one `end` event with the run.
    """
    await runs.run(control, caller, run)
    return StreamingResponse(
        _stream(control, run, last_event_id),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


async def _stream(control: Control, run: str, after: str) -> AsyncIterator[bytes]:
    async for item in runs.follow(control, run, after, _KEEP_ALIVE_SECONDS):
        match item:
            case None:
                yield b": waiting\n\n"
            case TrainingRun():
                yield b"event: end\ndata: " + encode(item) + b"\n\n"
            case entry, event:
                yield b"id: %s\nevent: progress\ndata: %s\n\n" % (entry.encode(), encode(event))
