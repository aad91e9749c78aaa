"""The engines with their replicas, and the gateways that are alive."""

from fastapi import APIRouter

from rollout.api.security import ControlPlane, Reader
from rollout.control import versions
from rollout.control.views import EngineView
from rollout.records import GatewayPresence

router = APIRouter(tags=["engines"])


@router.get("/engines")
async def get_engines(control: ControlPlane, _: Reader) -> list[EngineView]:
    """What each replica was last proved to serve."""
    return await versions.engines(control)


@router.get("/gateways")
async def get_gateways(control: ControlPlane, _: Reader) -> list[GatewayPresence]:
    """Every live gateway worker with the catalog revision that it serves."""
    return await control.stores.presence.live()
