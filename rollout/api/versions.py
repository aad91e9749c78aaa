"""Versions and the engines that serve them."""

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter, status
from pydantic import BaseModel, ConfigDict, Field

from rollout.api.security import ControlPlane, Maker, Reader
from rollout.control import versions
from rollout.control.access import require_route
from rollout.control.views import VersionView
from rollout.versions import Prompt

router = APIRouter(prefix="/versions", tags=["versions"])


class PromptBody(BaseModel):
    """Messages that the version brings along."""

    model_config = ConfigDict(extra="forbid")

    messages: list[dict[str, Any]] = Field(min_length=1)
    mode: Literal["prepend", "replace_system"] = "prepend"


class Body(BaseModel):
    """`adapter_path` is a directory on the controller's machine, `adapter_url` one elsewhere."""

    model_config = ConfigDict(extra="forbid")

    route: str
    prompt: PromptBody | None = None
    sampling: Mapping[str, Any] = Field(default_factory=dict)
    adapter_path: str | None = None
    adapter_url: str | None = Field(None, max_length=2000)
    sha256: str | None = None
    note: str = Field("", max_length=2000)


@router.get("")
async def get_versions(
    control: ControlPlane, caller: Reader, route: str | None = None
) -> list[VersionView]:
    return await versions.versions(control, caller, route)


@router.get("/{name}")
async def get_version(control: ControlPlane, caller: Reader, name: str) -> VersionView:
    require_route(caller, name.partition("@")[0])
    return await versions.version(control, name)


@router.post("", status_code=status.HTTP_201_CREATED)
async def post_version(control: ControlPlane, caller: Maker, body: Body) -> VersionView:
    """Register a version under the route's next number. It takes no traffic until proposed."""
    require_route(caller, body.route)
    prompt = None
    if body.prompt is not None:
        prompt = Prompt(messages=tuple(body.prompt.messages), mode=body.prompt.mode)
    draft = versions.Draft(
        route=body.route,
        prompt=prompt,
        sampling=body.sampling,
        adapter_path=body.adapter_path,
        adapter_url=body.adapter_url,
        sha256=body.sha256,
        note=body.note,
    )
    return await versions.register(control, caller, draft)
