"""The catalog that gateways route by, and the announcements that keep it fresh."""

import json
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from rollout.catalog import Catalog
from rollout.credentials import ApiKey
from rollout.engines import Residency
from rollout.routes import Route
from rollout.state import Rollout
from rollout.stores import keys
from rollout.stores.codec import decode, encode
from rollout.stores.link import RedisLink, translated
from rollout.versions import Version

T = TypeVar("T")
# How long one wait for an announcement lasts; between two, a cancelled task can stop.
_WAIT_SECONDS = 1.0


class CatalogStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._known: dict[str, dict[str, tuple[str, Any]]] = {}

    async def load(self) -> Catalog:
        """Everything, as of one revision."""
        revision, routes, rollouts, versions, credentials, residency = await self._link.run_all(
            [
                ("GET", keys.REVISION),
                ("HGETALL", keys.ROUTES),
                ("HGETALL", keys.ROLLOUTS),
                ("HGETALL", keys.VERSIONS),
                ("HGETALL", keys.CREDENTIALS),
                ("HGETALL", keys.RESIDENCY),
            ]
        )
        read = self._read
        return Catalog(
            revision=int(revision or 0),
            routes=read(keys.ROUTES, Route, routes),
            rollouts=read(keys.ROLLOUTS, Rollout, rollouts),
            versions=read(keys.VERSIONS, Version, versions),
            keys={key.digest: key for key in read(keys.CREDENTIALS, ApiKey, credentials).values()},
            residency=read(keys.RESIDENCY, Residency, residency),
        )

    async def revision(self) -> int:
        return int(await self._link.run("GET", keys.REVISION) or 0)

    async def announcements(self) -> AsyncIterator[int]:
        """The present revision, then the new one at each announcement.

        Ends with StoreUnavailableError when the connection is lost; what was announced meanwhile
        is found by subscribing again, for the present revision comes first.
        """
        async with self._link.subscribed(keys.ANNOUNCEMENTS) as pubsub:
            yield await self.revision()
            while True:
                with translated():
                    message = await pubsub.get_message(timeout=_WAIT_SECONDS)
                if message is not None and message["type"] == "message":
                    yield int(message["data"])

    async def put_residency(self, residencies: Sequence[Residency]) -> None:
        """Say what replicas were proved to serve. Announced only where something changed."""
        if not residencies:
            return
        pairs: list[Any] = []
        for residency in residencies:
            pairs += [residency.url, _in_order(residency)]
        await self._link.script(
            "announce_if_changed",
            [keys.RESIDENCY, keys.REVISION],
            [keys.ANNOUNCEMENTS, *pairs],
        )

    async def forget_residency(self, urls: Collection[str]) -> None:
        """These replicas are no more; nobody waits for them, or shows them."""
        if urls:
            await self._link.script(
                "forget_fields",
                [keys.RESIDENCY, keys.REVISION],
                [keys.ANNOUNCEMENTS, *sorted(urls)],
            )

    async def want(self, version_name: str, seconds: float) -> None:
        """Ask the controller to keep a version resident for that long, whatever the rollout."""
        until = int(datetime.now(UTC).timestamp() * 1000 + seconds * 1000)
        await self._link.run("ZADD", keys.WANTED, until, version_name)

    async def wanted(self) -> frozenset[str]:
        """Names of the versions that somebody wants resident now."""
        now = int(datetime.now(UTC).timestamp() * 1000)
        _, names = await self._link.run_all(
            [
                ("ZREMRANGEBYSCORE", keys.WANTED, "-inf", f"({now}"),
                ("ZRANGE", keys.WANTED, 0, -1),
            ]
        )
        return frozenset(names)

    def _read(self, part: str, kind: type[T], table: Mapping[str, str]) -> dict[str, T]:
        """The values of a hash. What reads as it did the last time is what it was then: a commit
        changes one rollout, and gateways that serve thousands of versions load all anew."""
        before = self._known.get(part, {})
        known: dict[str, tuple[str, Any]] = {}
        for name, text in table.items():
            found = before.get(name)
            known[name] = (text, decode(kind, text)) if found is None or found[0] != text else found
        self._known[part] = known
        return {name: value for name, (_, value) in known.items()}


def _in_order(residency: Residency) -> str:
    """Equal residencies as equal text: the order within a set is another in each process."""
    fields = json.loads(encode(residency))
    fields["served"].sort()
    return json.dumps(fields, sort_keys=True)
