"""What a key lets its holder do."""

from rollout.credentials import ApiKey, Scope
from rollout.errors import PermissionDeniedError


def require_scope(caller: ApiKey, *scopes: Scope) -> None:
    """Raise PermissionDeniedError unless the key has one of the scopes."""
    if not any(caller.allows(scope) for scope in scopes):
        raise PermissionDeniedError(
            f"key {caller.name!r} lacks the scope {' or '.join(scopes)}: ask an admin for one"
        )


def require_route(caller: ApiKey, route: str) -> None:
    """Raise PermissionDeniedError where the key is for other routes only."""
    if not caller.allows_route(route):
        raise PermissionDeniedError(
            f"key {caller.name!r} is not for route {route!r}", param="route"
        )
