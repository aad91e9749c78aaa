"""The console of a real control API: by HTTP, and before a real browser without a screen."""

from collections.abc import AsyncIterator, Iterator

import httpx2
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from rollout.api.app import create_app
from rollout.stores import Stores, open_stores
from tests.api.house import ADMIN, furnish, settings
from tests.api.live import LiveApi, live_api


@pytest.fixture
async def stores(redis_url: str) -> AsyncIterator[Stores]:
    async with open_stores(redis_url) as opened:
        await furnish(opened)
        yield opened


@pytest.fixture
async def web(stores: Stores) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(create_app(stores, settings(), bootstrap_key=ADMIN))
    async with httpx2.AsyncClient(transport=transport, base_url="http://console") as client:
        yield client


@pytest.fixture
def api(redis_url: str) -> Iterator[LiveApi]:
    with live_api(redis_url) as live:
        live.with_stores(furnish)
        yield live


@pytest.fixture
def browser(_chromium: webdriver.Chrome, api: LiveApi) -> Iterator[webdriver.Chrome]:
    """At the login page, with nobody logged in and nothing in the browser's log."""
    _chromium.get(f"{api.url}/login")
    _chromium.delete_all_cookies()
    yield _chromium
    # A page that stays open would go on asking a server that is gone, into the next test's log.
    _chromium.get("about:blank")
    _chromium.get_log("browser")


def log_in(browser: webdriver.Chrome, url: str, key: str, path: str = "/") -> None:
    """Returns once the page behind the login is there."""
    browser.get(f"{url}{path}")
    browser.find_element(By.ID, "key").send_keys(key + "\n")
    waiting(browser).until(lambda b: "/login" not in b.current_url)


def waiting(browser: webdriver.Chrome) -> "WebDriverWait[webdriver.Chrome]":
    """For what is not there yet, or is replaced by the page while it is read."""
    return WebDriverWait(browser, 60, ignored_exceptions=(StaleElementReferenceException,))
