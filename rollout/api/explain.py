"""Where an answer came from."""

from typing import Annotated

from fastapi import APIRouter, Query

from rollout.api.security import ControlPlane, Reader
from rollout.control import explain, judging
from rollout.control.views import Explanation, JudgeView
from rollout.errors import InvalidInputError

router = APIRouter(prefix="/routes/{route}", tags=["rollouts"])


@router.get("/explain")
async def get_explain(
    control: ControlPlane,
    _: Reader,
    route: str,
    request_id: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
    version: str | None = None,
) -> Explanation:
    """From the `x-request-id` of an answer, or a version, back to weights, data and commit."""
    if (request_id is None) == (version is None):
        raise InvalidInputError("say either request_id or version", param="request_id")
    if version is not None:
        return await explain.explain_version(control, route, version)
    return await explain.explain_request(control, route, str(request_id))


@router.get("/judge")
async def get_judge(control: ControlPlane, _: Reader, route: str) -> JudgeView:
    """How the route's judge did beside the people who label, and beside itself."""
    return await judging.judge(control, route)
