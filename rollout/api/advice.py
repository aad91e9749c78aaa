"""Whether a route should be trained."""

from fastapi import APIRouter

from rollout.advice import Advice
from rollout.api.security import ControlPlane, Reader
from rollout.control import advice

router = APIRouter(prefix="/routes/{route}", tags=["runs"])


@router.get("/advice")
async def get_advice(control: ControlPlane, _: Reader, route: str) -> Advice:
    """A verdict with its reasons, from what is captured, labelled and evaluated."""
    return await advice.advice(control, route)
