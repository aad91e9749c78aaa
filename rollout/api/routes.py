"""Routes: the public names and their configuration."""

from typing import Annotated

from fastapi import APIRouter, Path, Response, status
from pydantic import BaseModel, ConfigDict, Field

from rollout.api.security import ControlPlane, Operator, Reader
from rollout.control import rollouts, routes
from rollout.control.views import RouteView
from rollout.evaluation import EvaluationRules
from rollout.policy import Policy, Slo
from rollout.retraining import Retrain
from rollout.routes import Comparator, JsonRules, Judge, Route, Semantic

router = APIRouter(prefix="/routes", tags=["routes"])


class Body(BaseModel):
    """What is left out takes its default. `schema` is the text of a JSON schema."""

    model_config = ConfigDict(extra="forbid")

    engine: str
    comparator: Comparator = "text"
    schema_text: str | None = Field(None, alias="schema")
    slo: Slo = Slo()
    capture: float = Field(0.1, ge=0, le=1)
    capture_idle: float = Field(0.0, ge=0, le=1)
    policy: Policy = Policy()
    json_rules: JsonRules = JsonRules()
    semantic: Semantic | None = None
    judge: Judge | None = None
    evaluation: EvaluationRules = EvaluationRules()
    retrain: Retrain | None = None
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
    wanted = Route(
        name=route,
        engine=body.engine,
        comparator=body.comparator,
        schema=body.schema_text,
        slo=body.slo,
        capture=body.capture,
        policy=body.policy,
        capture_idle=body.capture_idle,
        json_rules=body.json_rules,
        semantic=body.semantic,
        judge=body.judge,
        evaluation=body.evaluation,
        retrain=body.retrain,
    )
    created = await routes.put(control, caller, wanted, body.reason)
    response.status_code = status.HTTP_201_CREATED if created else status.HTTP_200_OK
    return await rollouts.route(control, route)
