"""Replays: past captures of a route put through a version; asked for here, done by the shadow."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from rollout.control.context import Control
from rollout.credentials import ApiKey
from rollout.errors import InvalidInputError, NotFoundError
from rollout.replays import Replay, ReplayReport
from rollout.stores.audit import audit_entry
from rollout.versions import parse_model


@dataclass(frozen=True, slots=True)
class ReplayAsk:
    """Which version (a number or a name), and which captures: of so many seconds, at most so many."""

    version: str
    since_seconds: float
    limit: int


async def ask(control: Control, caller: ApiKey, route: str, wanted: ReplayAsk) -> Replay:
    """Queue it. Raises NotFoundError, InvalidInputError, ConflictError where too many are queued."""
    await control.stores.rollouts.get(route)
    name = f"{route}@{wanted.version}" if wanted.version.isdecimal() else wanted.version
    of_route, number = parse_model(name)
    if number is None or of_route != route:
        raise InvalidInputError(
            f"{wanted.version!r} is no version of {route}: write {route}@NUMBER", param="version"
        )
    await control.stores.rollouts.version(name)
    now = control.now()
    replay = Replay(
        id=f"replay-{secrets.token_hex(6)}",
        route=route,
        version=number,
        since=now - timedelta(seconds=wanted.since_seconds),
        limit=wanted.limit,
        by=caller.name,
        asked_at=now,
    )
    await control.stores.replays.ask(replay)
    entry = audit_entry("replay.ask", replay.id, caller.name, after=replay)
    await control.stores.audit.append(entry)
    return replay


async def replays(control: Control, route: str) -> Sequence[Replay]:
    await control.stores.rollouts.get(route)
    return await control.stores.replays.list(route)


async def report(control: Control, route: str, replay_id: str) -> ReplayReport:
    found = await control.stores.replays.report(replay_id)
    if found.replay.route != route:
        raise NotFoundError(f"there is no replay {replay_id!r} of {route}", param="replay")
    return found


async def cancel(control: Control, caller: ApiKey, route: str, replay_id: str) -> Replay:
    """End it; one that has ended stays as it is."""
    before = (await report(control, route, replay_id)).replay
    after = await control.stores.replays.change(
        replay_id, state="cancelled", ended_at=control.now(), reason=f"cancelled by {caller.name}"
    )
    if after != before:
        await control.stores.audit.append(
            audit_entry("replay.cancel", replay_id, caller.name, before=before, after=after)
        )
    return after
