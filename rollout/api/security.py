"""Who is asking, and whether their key lets them."""

from collections.abc import Awaitable, Callable
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from rollout.control.access import require_route, require_scope
from rollout.control.context import Control
from rollout.credentials import ApiKey, Scope
from rollout.errors import AuthenticationError

_bearer = HTTPBearer(auto_error=False, description="A key made with `sluice keys create`.")


def _control(request: Request) -> Control:
    return cast(Control, request.app.state.control)


ControlPlane = Annotated[Control, Depends(_control)]


async def _caller(
    control: ControlPlane,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> ApiKey:
    if credentials is None:
        raise AuthenticationError("no API key: send `Authorization: Bearer KEY`")
    key = await control.keyring.find(credentials.credentials)
    if key is None:
        raise AuthenticationError(
            "this API key is not known: it was mistyped or revoked; an admin makes keys with "
            "`sluice keys create`"
        )
    return key


def _with_any(*scopes: Scope) -> Callable[..., Awaitable[ApiKey]]:
    async def allowed(request: Request, caller: Annotated[ApiKey, Depends(_caller)]) -> ApiKey:
        require_scope(caller, *scopes)
        route = request.path_params.get("route") or request.query_params.get("route")
        if route is not None:
            require_route(caller, route)
        return caller

    return allowed


# What a door asks for. Whoever works with rollouts, labels or runs may look at all of them.
Reader = Annotated[ApiKey, Depends(_with_any("operate", "train", "label"))]
Labeler = Annotated[ApiKey, Depends(_with_any("label"))]
Operator = Annotated[ApiKey, Depends(_with_any("operate"))]
Trainer = Annotated[ApiKey, Depends(_with_any("train"))]
Maker = Annotated[ApiKey, Depends(_with_any("operate", "train"))]
Admin = Annotated[ApiKey, Depends(_with_any("admin"))]
