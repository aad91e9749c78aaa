"""API keys and the audit of every change."""

from typing import Annotated

from fastapi import APIRouter, Query, status
from pydantic import BaseModel, ConfigDict, Field

from rollout.api.security import Admin, ControlPlane
from rollout.control import keys
from rollout.control.views import KeyView, NewKey
from rollout.credentials import KeyLimits
from rollout.records import AuditEntry

router = APIRouter(tags=["keys"])


class Limits(BaseModel):
    """Over all gateways together; what is left out is not limited."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    monthly_tokens: int | None = None


class Body(BaseModel):
    """`scopes` are some of infer, label, operate, train, admin. No `routes` means all of them."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=100)
    scopes: list[str]
    routes: list[str] | None = None
    limits: Limits = Limits()


@router.post("/keys", status_code=status.HTTP_201_CREATED)
async def post_key(control: ControlPlane, caller: Admin, body: Body) -> NewKey:
    """Make a key. The secret is in this answer and nowhere else."""
    limits = KeyLimits(**body.limits.model_dump())
    return await keys.create(control, caller, body.name, body.scopes, body.routes, limits)


@router.get("/keys")
async def get_keys(control: ControlPlane, _: Admin) -> list[KeyView]:
    return await keys.keys(control)


@router.patch("/keys/{key}/limits")
async def patch_limits(control: ControlPlane, caller: Admin, key: str, body: Limits) -> KeyView:
    """Change the limits that are named, null lifts one; every gateway keeps them within a second."""
    return await keys.limit(control, caller, key, body.model_dump(exclude_unset=True))


@router.delete("/keys/{key}", status_code=status.HTTP_204_NO_CONTENT)
async def delete_key(control: ControlPlane, caller: Admin, key: str) -> None:
    """Revoke a key; every gateway refuses it within a second."""
    await keys.revoke(control, caller, key)


@router.get("/audit")
async def get_audit(
    control: ControlPlane, _: Admin, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> list[AuditEntry]:
    """Who changed what, newest first."""
    return await control.stores.audit.list(limit)
