"""A furnished house for tests of the controller."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from rollout.stores import open_stores
from tests.rollout.house import House
from tests.stub_engine import StubEngine


@pytest.fixture
async def house(redis_url: str, tmp_path: Path) -> AsyncIterator[House]:
    async with (
        open_stores(redis_url) as stores,
        StubEngine(base="base") as engine,
        httpx2.AsyncClient(trust_env=False) as client,
    ):
        yield House(stores, engine, client, tmp_path)
