"""A person labels with the mouse and with the keyboard, in a real browser."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from rollout.cases import Choice, Label, LabelledCase
from rollout.state import Proposed
from rollout.stores import Stores
from tests.api.house import AT, case, offer
from tests.api.live import LiveApi
from tests.console.conftest import log_in, waiting

pytestmark = pytest.mark.browser


def offered(api: LiveApi, count: int) -> None:
    cases = [case(f"c{n}", priority=float(count - n)) for n in range(count)]
    api.with_stores(lambda stores: offer(stores, *cases))


def labels(api: LiveApi) -> dict[str, LabelledCase]:
    rows = api.with_stores(lambda stores: stores.cases.labelled("triage"))
    return {row.case.id: row for row in rows}


def until(browser: webdriver.Chrome, condition: Callable[[webdriver.Chrome], bool]) -> None:
    waiting(browser).until(condition)


def follow(browser: webdriver.Chrome, link: str) -> None:
    waiting(browser).until(lambda b: b.find_element(By.LINK_TEXT, link)).click()


def shows(browser: webdriver.Chrome, name: str) -> None:
    """Wait for the page of a case, with its script run."""
    until(browser, lambda b: f"/label/{name}" in b.current_url)
    until(browser, lambda b: b.execute_script("return document.readyState") == "complete")


def press(browser: webdriver.Chrome, keys: str) -> None:
    browser.switch_to.active_element.send_keys(keys)


def test_the_keyboard_alone_is_enough(browser: webdriver.Chrome, api: LiveApi) -> None:
    offered(api, 6)
    log_in(browser, api.url, api.key, "/label")
    for number, key in enumerate("1234"):
        shows(browser, f"c{number}")
        press(browser, key)
    shows(browser, "c4")
    assert browser.find_element(By.ID, "done").text == "4"
    press(browser, "s")
    shows(browser, "c5")
    press(browser, "c")
    # Digits typed into the field are text, not choices.
    press(browser, "41 of 42" + Keys.ESCAPE)
    press(browser, "2")
    until(browser, lambda b: "Only skipped cases are left" in b.page_source)
    follow(browser, "Show them again")
    shows(browser, "c4")
    press(browser, "c")
    press(browser, "neither of them" + Keys.CONTROL + Keys.ENTER)
    until(browser, lambda b: "Nothing is waiting" in b.page_source)
    found = labels(api)
    choices = {name: row.label.choice for name, row in found.items()}
    assert choices == {
        "c0": "first", "c1": "second", "c2": "both", "c3": "neither", "c4": "neither", "c5": "second"
    }  # fmt: skip
    assert found["c5"].label.correction == "41 of 42"
    assert found["c4"].label.correction == "neither of them"
    assert found["c0"].label.correction is None


def test_the_mouse_alone_is_enough(browser: webdriver.Chrome, api: LiveApi) -> None:
    offered(api, 3)
    log_in(browser, api.url, api.key, "/")
    follow(browser, "Label 3 cases")
    shows(browser, "c0")
    browser.find_element(By.CSS_SELECTOR, "button[value=second]").click()
    shows(browser, "c1")
    browser.find_element(By.ID, "skip").click()
    shows(browser, "c2")
    browser.find_element(By.CSS_SELECTOR, "button[value=both]").click()
    until(browser, lambda b: "Only skipped cases are left" in b.page_source)
    assert {name: row.label.choice for name, row in labels(api).items()} == {
        "c0": "second",
        "c2": "both",
    }


def test_a_reload_shows_the_same_case(browser: webdriver.Chrome, api: LiveApi) -> None:
    offered(api, 2)
    log_in(browser, api.url, api.key, "/label")
    shows(browser, "c0")
    browser.refresh()
    shows(browser, "c0")


def test_nothing_is_refused_by_the_pages_own_policy(
    browser: webdriver.Chrome, api: LiveApi
) -> None:
    offered(api, 1)
    log_in(browser, api.url, api.key, "/")
    for path in ("/", "/routes/triage", "/label", "/label/figures", "/runs", "/reports", "/docs"):
        browser.get(f"{api.url}{path}")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_what_a_model_says_is_shown_and_never_run(browser: webdriver.Chrome, api: LiveApi) -> None:
    evil = case("c0", "<script>document.title = 'owned'</script><b>bold</b>")
    api.with_stores(lambda stores: offer(stores, evil))
    log_in(browser, api.url, api.key, "/label")
    shows(browser, "c0")
    assert "<b>bold</b>" in browser.find_element(By.CLASS_NAME, "messages").text
    assert browser.title == "Label · Sluice"


def said(labeler: str, name: str, choice: Choice) -> Label:
    return Label(name, "triage", choice, labeler, AT)


def test_a_labeler_sees_how_many_were_asked_and_not_what_they_chose(
    browser: webdriver.Chrome, api: LiveApi
) -> None:
    async def prepare(stores: Stores) -> None:
        asked = [replace(case(f"c{n}", priority=-n), labels_needed=2) for n in range(2)]
        await offer(stores, *asked)
        assert await stores.cases.label(said("ann", "c0", "first"))

    api.with_stores(prepare)
    log_in(browser, api.url, api.key, "/label")
    shows(browser, "c0")
    assert browser.find_element(By.ID, "votes").text == "You are person 2 of 2"
    assert [len(browser.find_elements(By.CLASS_NAME, name)) for name in ("given", "yours")] == [
        1,
        1,
    ]
    press(browser, "2")
    shows(browser, "c1")
    assert browser.find_element(By.ID, "votes").text == "You are person 1 of 2"
    press(browser, "1")
    # Both wait for others now: one for a third word, one for a second.
    until(browser, lambda b: "Nothing is waiting for you" in b.page_source)
    browser.get(f"{api.url}/label/c0")
    shows(browser, "c0")
    assert "you are one of them" in browser.find_element(By.ID, "votes").text


def test_the_figures_tell_agreement_preference_and_disputes(
    browser: webdriver.Chrome, api: LiveApi
) -> None:
    async def prepare(stores: Stores) -> None:
        await offer(stores, *(replace(case(f"c{n}"), labels_needed=2) for n in range(2)))
        for name, choices in {"c0": ["both", "both"], "c1": ["first", "second", "both"]}.items():
            for labeler, choice in zip(("ann", "ben", "cyd"), choices, strict=False):
                assert await stores.cases.label(said(labeler, name, choice))  # type: ignore[arg-type]

    api.with_stores(prepare)
    log_in(browser, api.url, api.key, "/label/figures")
    until(browser, lambda b: bool(b.find_elements(By.CLASS_NAME, "interval")))
    text = browser.find_element(By.ID, "main").text
    assert "agreement α = 0.40" in text
    assert "triage@2.2 50 %" in text
    assert "Disputed: people could not agree" in text


def test_an_operator_holds_and_rolls_back(browser: webdriver.Chrome, api: LiveApi) -> None:
    async def propose(stores: Stores) -> None:
        rollout = await stores.rollouts.get("triage")
        await stores.rollouts.commit(rollout, Proposed(2, AT, "test"))

    api.with_stores(propose)
    log_in(browser, api.url, api.key, "/")
    until(browser, lambda b: bool(b.find_elements(By.NAME, "reason")))
    browser.find_element(By.NAME, "reason").send_keys("it looks odd")
    browser.find_element(By.XPATH, "//button[text()='Hold']").click()
    until(browser, lambda b: bool(b.find_elements(By.XPATH, "//button[text()='Resume']")))
    browser.find_element(By.CSS_SELECTOR, "button.danger").click()
    until(browser, lambda b: "takes all of the traffic" in b.page_source)
    history = api.with_stores(lambda stores: stores.rollouts.history("triage"))
    assert [(entry.event.kind, entry.event.reason) for entry in history[:2]] == [
        ("rolled_back", "from the console"),
        ("held", "it looks odd"),
    ]
