"""Liveness, readiness and metrics, for machines."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from rollout.api.security import ControlPlane

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process runs. Says nothing of the store, for a restart would not bring that back."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(control: ControlPlane) -> JSONResponse:
    """The store answers. Otherwise 503, in the shape of every error."""
    await control.stores.ping()
    return JSONResponse({"status": "ready"})


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    registry: CollectorRegistry | None = request.app.state.registry
    body = b"" if registry is None else generate_latest(registry)
    return Response(body, media_type=CONTENT_TYPE_LATEST)
