"""Open stores with one route, the trainer's settings, and a tiny model's parts."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout.routes import Route
from rollout.settings import Settings
from rollout.stores import Stores, open_stores
from tests.trainer.samples import AT, ROUTE, settings_for


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """Nothing here comes from a model hub; transformers would ask one all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
        patch.setitem(os.environ, "TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.fixture
async def stores(redis_url: str) -> AsyncIterator[Stores]:
    async with open_stores(redis_url) as opened:
        await opened.rollouts.put_route(
            Route(name=ROUTE, engine="main"), by="test", at=AT, base="tiny"
        )
        yield opened


@pytest.fixture
def settings(redis_url: str, tiny_model_dir: Path, tmp_path: Path) -> Settings:
    """A trainer whose engine's address leads nowhere."""
    return settings_for(redis_url, tiny_model_dir, tmp_path)


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)
