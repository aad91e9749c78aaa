"""Routes: the public names and their configuration."""

from typing import Annotated

from fastapi import APIRouter, Path, Response, status
from pydantic import Field

from rollout.api.security import ControlPlane, Operator, Reader
from rollout.control import rollouts, routes
from rollout.control.views import RouteView
from rollout.settings import RouteFields

router = APIRouter(prefix="/routes", tags=["routes"])


class Body(RouteFields):
    """What is left out takes its default. `schema` is the text of a JSON schema."""

    schema_text: str | None = Field(None, alias="schema")
    reason: str = Field("", max_length=2000)


@router.get("")
async def get_routes(control: ControlPlane, caller: Reader) -> list[RouteView]:
    return await rollouts.routes(control, caller)


@router.get("/{route}")
async def get_route(control: ControlPlane, _: Reader, route: str) -> RouteView:
    return await rollouts.route(control, route)


@router.put("/{route}")
async def put_route(
    control: ControlPlane,
    caller: Operator,
    route: Annotated[str, Path(max_length=64)],
    body: Body,
    response: Response,
) -> RouteView:
    """Create the route with the engine's bare base as its first version, or configure it anew."""
    wanted = body.made(route, body.schema_text)
    created = await routes.put(control, caller, wanted, body.reason)
    response.status_code = status.HTTP_201_CREATED if created else status.HTTP_200_OK
    return await rollouts.route(control, route)
