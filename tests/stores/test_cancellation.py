"""A task that speaks to the store ends when it is told to, whatever redis-py is doing then."""

import asyncio

import pytest

from rollout.stores import Stores

pytestmark = pytest.mark.anyio


async def test_a_cancelled_task_ends_wherever_it_is(stores: Stores) -> None:
    async def busy() -> None:
        while True:
            await stores.catalog.load()
            await stores.catalog.revision()

    for turns in range(100):
        task = asyncio.create_task(busy())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=60)
        assert task.cancelled()
