"""Waiting until a version answers wherever it is needed."""

import asyncio

from rollout.engines import Placement, placement
from rollout.errors import EngineUnavailableError
from rollout.stores import Stores
from rollout.versions import Version


async def wait_resident(
    stores: Stores, version: Version, timeout_seconds: float, *, poll_seconds: float = 0.2
) -> Placement:
    """Wait until every ready replica serves the version; returns at once where that is so.

    Something must need it: a rollout that names it, or `stores.catalog.want`. Raises
    EngineUnavailableError with what is missing when the time is over.
    """

    async def look() -> Placement:
        return placement(version, (await stores.catalog.load()).residency.values())

    # Before the time begins, so that what is missing is known whatever the time.
    found = await look()
    try:
        async with asyncio.timeout(timeout_seconds):
            while not found.everywhere:
                await asyncio.sleep(poll_seconds)
                found = await look()
    except TimeoutError:
        raise EngineUnavailableError(
            f"{version.name} is not resident after {timeout_seconds:g} s: {found.reason}"
        ) from None
    return found
