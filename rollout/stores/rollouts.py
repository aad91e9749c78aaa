"""Routes, versions and rollouts: what is served, and each step by which that changes."""

from dataclasses import dataclass, replace
from datetime import datetime

from rollout.errors import NotFoundError, StaleRevisionError
from rollout.records import HistoryEntry
from rollout.routes import Route
from rollout.state import Event, Rollout, apply
from rollout.stores import keys
from rollout.stores.audit import audit_entry
from rollout.stores.codec import decode, encode
from rollout.stores.link import RedisLink
from rollout.versions import Version


@dataclass(frozen=True, slots=True)
class Commit:
    """A committed rollout, and the catalog revision at which gateways serve it."""

    rollout: Rollout
    catalog_revision: int


class RolloutStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def get(self, route: str) -> Rollout:
        """Raises NotFoundError where there is no such route."""
        text = await self._link.run("HGET", keys.ROLLOUTS, route)
        if text is None:
            raise _no_route(route)
        return decode(Rollout, text)

    async def commit(self, before: Rollout, event: Event) -> Commit:
        """Apply the event and store the outcome if the rollout is still `before`.

        State, history, audit and announcement are one atomic step. Raises StaleRevisionError
        where somebody else committed first, RefusedError where the event is not allowed.
        """
        after = apply(before, event)
        entry = HistoryEntry(after.revision, event, event.at, before, after)
        audit = audit_entry(
            f"rollout.{event.kind}",
            before.route,
            event.by,
            reason=event.reason,
            before=before,
            after=after,
        )
        revision = await self._link.script(
            "commit",
            [keys.ROLLOUTS, keys.history(before.route), keys.AUDIT, keys.REVISION],
            [
                before.route,
                before.revision,
                encode(after),
                encode(entry),
                encode(audit),
                keys.ANNOUNCEMENTS,
            ],
        )
        if revision == -2:
            raise _no_route(before.route)
        if revision == -1:
            raise StaleRevisionError(
                f"{before.route} has changed since revision {before.revision}: look at it again "
                "and decide anew",
                param="revision",
            )
        return Commit(after, revision)

    async def history(self, route: str, limit: int = 100) -> list[HistoryEntry]:
        """The newest first."""
        rows = await self._link.run("XREVRANGE", keys.history(route), "+", "-", "COUNT", limit)
        return [decode(HistoryEntry, fields["entry"]) for _, fields in rows]

    async def put_route(
        self,
        route: Route,
        *,
        by: str,
        at: datetime,
        reason: str = "",
        base: str,
        base_revision: str | None = None,
    ) -> bool:
        """Create the route with the bare base as its first, stable version, or update it.

        Returns whether it was created.
        """
        first = Version(
            route=route.name,
            number=1,
            engine=route.engine,
            base=base,
            base_revision=base_revision,
            created_at=at,
            created_by=by,
            note="the bare base",
        )
        created = await self._link.script(
            "put_route",
            [
                keys.ROUTES,
                keys.ROLLOUTS,
                keys.VERSIONS,
                keys.VERSION_NUMBERS,
                keys.AUDIT,
                keys.REVISION,
            ],
            [
                route.name,
                encode(route),
                encode(Rollout(route=route.name, revision=1, stable=1)),
                encode(first),
                encode(audit_entry("route.put", route.name, by, reason=reason, after=route)),
                keys.ANNOUNCEMENTS,
            ],
        )
        return bool(created == 1)

    async def route(self, name: str) -> Route:
        """Raises NotFoundError where there is no such route."""
        text = await self._link.run("HGET", keys.ROUTES, name)
        if text is None:
            raise _no_route(name)
        return decode(Route, text)

    async def register(self, draft: Version) -> Version:
        """Store a new version under the route's next number; the draft's own is ignored."""
        if not await self._link.run("HEXISTS", keys.ROUTES, draft.route):
            raise _no_route(draft.route)
        # A number taken by a process that died before it stored anything stays unused.
        number = await self._link.run("HINCRBY", keys.VERSION_NUMBERS, draft.route, 1)
        version = replace(draft, number=number)
        audit = audit_entry(
            "version.register", version.name, version.created_by, reason=draft.note, after=version
        )
        await self._link.script(
            "register",
            [keys.VERSIONS, keys.AUDIT, keys.REVISION],
            [version.name, encode(version), encode(audit), keys.ANNOUNCEMENTS],
        )
        return version

    async def version(self, name: str) -> Version:
        """Raises NotFoundError where there is no such version."""
        text = await self._link.run("HGET", keys.VERSIONS, name)
        if text is None:
            raise NotFoundError(
                f"there is no version {name!r}; `sluice version list` shows those that exist",
                param="version",
            )
        return decode(Version, text)

    async def versions(self, route: str) -> list[Version]:
        """In the order of their numbers."""
        table = await self._link.run("HGETALL", keys.VERSIONS)
        found = [
            decode(Version, text)
            for name, text in table.items()
            if name.rpartition("@")[0] == route
        ]
        return sorted(found, key=lambda version: version.number)


def _no_route(route: str) -> NotFoundError:
    return NotFoundError(
        f"there is no route {route!r}; `sluice route list` shows those that exist", param="route"
    )
