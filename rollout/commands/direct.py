"""Rolling back by the store alone, for the hour when the controller is down."""

import asyncio
import time
from datetime import UTC, datetime

from rollout.client import Confirmation
from rollout.control.rollouts import rollback
from rollout.control.views import Changed
from rollout.errors import StaleRevisionError
from rollout.stores import Stores, open_stores

_ATTEMPTS = 5
_POLL_SECONDS = 0.02


def roll_back(
    store_url: str, route: str, *, by: str, reason: str, revision: int | None, force: bool
) -> Changed:
    """The step that the control API would have committed. Whoever reaches the store may do it."""

    async def run() -> Changed:
        async with open_stores(store_url) as stores:
            return await _commit(stores, route, by, reason, revision, force)

    return asyncio.run(run())


def wait_until_served(store_url: str, catalog_revision: int, seconds: float) -> Confirmation:
    """Wait until every live gateway serves that revision, at most so long."""

    async def run() -> Confirmation:
        until = time.monotonic() + seconds
        async with open_stores(store_url) as stores:
            while True:
                live = [each for each in await stores.presence.live() if not each.draining]
                missing = tuple(each for each in live if each.revision < catalog_revision)
                if not missing or time.monotonic() >= until:
                    return Confirmation(len(live) - len(missing), missing)
                await asyncio.sleep(_POLL_SECONDS)

    return asyncio.run(run())


async def _commit(
    stores: Stores, route: str, by: str, reason: str, revision: int | None, force: bool
) -> Changed:
    for attempt in range(_ATTEMPTS):
        before = await stores.rollouts.get(route)
        if revision is not None and revision != before.revision:
            raise StaleRevisionError(
                f"{route} is at revision {before.revision}, not {revision}", param="revision"
            )
        try:
            event = await rollback(
                stores, before, by=by, reason=reason, now=datetime.now(UTC), force=force
            )
            commit = await stores.rollouts.commit(before, event)
        except StaleRevisionError:
            if revision is not None or attempt + 1 == _ATTEMPTS:
                raise
            continue
        return Changed(rollout=commit.rollout, catalog_revision=commit.catalog_revision)
    raise AssertionError("the last attempt returns or raises")
