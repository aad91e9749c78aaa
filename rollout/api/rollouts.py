"""Rollouts: where they stand, the verbs that move them, and their history."""

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from rollout.api.security import ControlPlane, Operator, Reader
from rollout.control import rollouts
from rollout.control.views import Changed, RolloutView, Verb
from rollout.evidence import Evidence
from rollout.plans import PlanSpec
from rollout.records import HistoryEntry

router = APIRouter(prefix="/routes/{route}", tags=["rollouts"])


class Body(BaseModel):
    """`version` is for propose and withdraw, `percent` for canary, `plan` and `queue` for propose.

    A stale `revision` is refused with 409. `force` lets a version through whose gate has not
    passed; the history says that it was forced.
    """

    model_config = ConfigDict(extra="forbid")

    reason: str = Field(max_length=2000)
    version: str | int | None = None
    percent: float | None = Field(None, ge=0, le=100)
    revision: int | None = None
    force: bool = False
    plan: PlanSpec | None = None
    queue: bool = False


@router.get("/rollout")
async def get_rollout(control: ControlPlane, _: Reader, route: str) -> RolloutView:
    """The rollout with its trial, the evidence so far and what the gates say."""
    return await rollouts.status(control, route)


@router.post("/rollout/{verb}")
async def post_verb(
    control: ControlPlane, caller: Operator, route: str, verb: Verb, body: Body
) -> Changed:
    """Move the rollout. The gateways have followed once all report `catalog_revision`."""
    ask = rollouts.Ask(
        reason=body.reason,
        version=None if body.version is None else str(body.version),
        percent=body.percent,
        revision=body.revision,
        force=body.force,
        plan=body.plan,
        queue=body.queue,
    )
    return await rollouts.change(control, caller, route, verb, ask)


@router.get("/history")
async def get_history(
    control: ControlPlane,
    _: Reader,
    route: str,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[HistoryEntry]:
    """Every commit, newest first."""
    await control.stores.rollouts.get(route)
    return await control.stores.rollouts.history(route, limit)


@router.get("/evidence")
async def get_evidence(
    control: ControlPlane, _: Reader, route: str, trial: str | None = None
) -> Evidence | None:
    """The counts of a trial, the present one unless `trial` names another."""
    rollout = await control.stores.rollouts.get(route)
    if trial is None:
        trial = None if rollout.trial is None else rollout.trial.id
    return None if trial is None else await control.stores.evidence.read(route, trial)
