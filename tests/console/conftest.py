"""A real browser, without a screen, at the console of a real control API."""

import os
import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from tests.api.house import furnish
from tests.api.live import LiveApi, live_api


@pytest.fixture
def api(redis_url: str) -> Iterator[LiveApi]:
    with live_api(redis_url) as live:
        live.with_stores(furnish)
        yield live


@pytest.fixture(scope="session")
def _chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        message = "there is no browser to test with: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    profile = tmp_path_factory.mktemp("chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-proxy-server",
        f"--user-data-dir={profile}",
        "--window-size=1200,900",
    ):
        options.add_argument(flag)
    log = profile / "driver.log"
    with webdriver.Chrome(options, Service(driver, log_output=str(log))) as chrome:
        chrome.set_page_load_timeout(30)
        yield chrome


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
    browser.get(f"{url}{path}")
    browser.find_element(By.ID, "key").send_keys(key + "\n")
