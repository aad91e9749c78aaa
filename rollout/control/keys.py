"""API keys: made, listed, limited anew, revoked."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from rollout.control.context import Control
from rollout.control.keyring import BOOTSTRAP_ID
from rollout.control.views import KeyView, NewKey
from rollout.credentials import SCOPES, ApiKey, KeyLimits, Scope, digest_secret, limit_problems
from rollout.errors import InvalidInputError, RefusedError


async def create(
    control: Control,
    caller: ApiKey,
    name: str,
    scopes: Sequence[str],
    routes: Sequence[str] | None,
    limits: KeyLimits,
) -> NewKey:
    if not scopes or (unknown := set(scopes) - SCOPES):
        raise InvalidInputError(
            f"{', '.join(sorted(unknown)) if scopes else 'no scope'}: a key has one or more of "
            f"{', '.join(sorted(SCOPES))}",
            param="scopes",
        )
    _check(limits)
    for route in routes or ():
        await control.stores.rollouts.get(route)
    secret = f"sk-sluice-{secrets.token_urlsafe(32)}"
    key = ApiKey(
        id=f"key-{secrets.token_hex(6)}",
        name=name,
        digest=digest_secret(secret),
        scopes=frozenset(cast(Sequence[Scope], scopes)),
        created_at=control.now(),
        routes=None if routes is None else frozenset(routes),
        limits=limits,
    )
    await control.stores.credentials.add(key, by=caller.name)
    control.keyring.forget()
    return NewKey(secret=secret, key=_view(key))


async def keys(control: Control) -> list[KeyView]:
    found = await control.stores.credentials.list()
    return [_view(key) for key in sorted(found, key=lambda key: key.created_at)]


async def limit(
    control: Control, caller: ApiKey, key_id: str, limits: Mapping[str, int | None]
) -> KeyView:
    """Change the limits that are named; None lifts one. Raises NotFoundError."""
    if key_id == BOOTSTRAP_ID:
        raise RefusedError("the bootstrap key has no limits: make another key for who needs them")

    def changed(key: ApiKey) -> ApiKey:
        after = replace(key, limits=replace(key.limits, **limits))
        _check(after.limits)
        return after

    key = await control.stores.credentials.change(key_id, changed, by=caller.name)
    control.keyring.forget()
    return _view(key)


async def revoke(control: Control, caller: ApiKey, key_id: str) -> None:
    if key_id == BOOTSTRAP_ID:
        raise RefusedError(
            "the bootstrap key is given to the controller when it starts: start it with another "
            "SLUICE_BOOTSTRAP_KEY, or without one"
        )
    await control.stores.credentials.revoke(key_id, by=caller.name)
    control.keyring.forget()


def _check(limits: KeyLimits) -> None:
    for name, problem in limit_problems(limits):
        raise InvalidInputError(problem, param=f"limits.{name}")


def _view(key: ApiKey) -> KeyView:
    return KeyView(
        id=key.id,
        name=key.name,
        scopes=tuple(sorted(key.scopes)),
        routes=None if key.routes is None else tuple(sorted(key.routes)),
        created_at=key.created_at,
        limits=key.limits,
    )
