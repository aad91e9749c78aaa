"""A task that speaks to the store ends when it is told to, whatever redis-py is doing then."""

import asyncio
import contextlib

import pytest

from rollout.stores import Stores, open_stores

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


async def test_so_does_one_whose_store_talks_nonsense() -> None:
    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            writer.write(b"$-99\r\n!nonsense\r\n")
        writer.close()

    server = await asyncio.start_server(garbage, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, open_stores(f"redis://127.0.0.1:{port}/0") as stores:

        async def stubborn() -> None:
            while True:
                await asyncio.sleep(0)
                # As the loops of a gateway, which go on.
                with contextlib.suppress(Exception):
                    await stores.catalog.revision()

        for turns in range(200):
            task = asyncio.create_task(stubborn())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task}, timeout=60)
            assert task.cancelled()
