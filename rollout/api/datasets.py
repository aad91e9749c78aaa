"""Datasets: the snapshots that runs were trained on."""

import asyncio

from fastapi import APIRouter, Response

from rollout.api.security import ControlPlane, Reader, Trainer
from rollout.control import runs
from rollout.control.access import require_route
from rollout.control.views import DatasetView

router = APIRouter(prefix="/datasets", tags=["datasets"])


@router.get("")
async def get_datasets(
    control: ControlPlane, caller: Reader, route: str | None = None
) -> list[DatasetView]:
    return await runs.datasets(control, caller, route)


@router.get("/{digest}", response_class=Response)
async def get_dataset(control: ControlPlane, caller: Trainer, digest: str) -> Response:
    """The rows, one line of JSON each."""
    dataset = await runs.dataset(control, digest)
    require_route(caller, dataset.route)
    content = await asyncio.to_thread(control.artifacts.document, dataset.digest)
    return Response(content, media_type="application/jsonl")
