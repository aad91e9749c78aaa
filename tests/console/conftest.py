"""A real browser, without a screen, at the console of a real control API."""

from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tests.api.house import furnish
from tests.api.live import LiveApi, live_api


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
