"""The control API on a real store, reached as a client reaches it."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from rollout.api.app import create_app
from rollout.artifacts import ArtifactStore
from rollout.stores import Stores, open_stores
from tests.api.house import ADMIN, furnish, settings


@pytest.fixture
async def stores(redis_url: str) -> AsyncIterator[Stores]:
    async with open_stores(redis_url) as opened:
        await furnish(opened)
        yield opened


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore((tmp_path / "artifacts").as_uri())


@pytest.fixture
async def api(stores: Stores, tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """Speaks as an admin; a test that speaks as somebody else sends its own header."""
    here = settings().model_copy(update={"data_dir": tmp_path})
    transport = httpx2.ASGITransport(create_app(stores, here, bootstrap_key=ADMIN))
    async with httpx2.AsyncClient(
        transport=transport,
        base_url="http://control/api/v1",
        headers={"authorization": f"Bearer {ADMIN}"},
    ) as client:
        yield client
