"""A rollout's page in a real browser: its plan, what it waits for, and what a person may do."""

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from rollout.evidence import Verdict
from rollout.plans import PlanSpec, StepSpec
from rollout.policy import Policy, plan_of
from rollout.state import CanarySet, Proposed, Queued
from rollout.stores import Stores
from tests.api.house import AT, PROMPTED, make_resident
from tests.api.live import LiveApi
from tests.console.conftest import log_in, waiting

pytestmark = pytest.mark.browser

PLAN = PlanSpec((5.0, StepSpec(25.0, minimum_units=200, approval=True), 50.0), automatic=True)


async def on_trial(stores: Stores) -> None:
    """triage@2 takes 5 % by a plan that asks a person next, and triage@3 waits for its turn."""
    await make_resident(stores, PROMPTED)
    rollout = await stores.rollouts.get("triage")
    plan = plan_of(Policy(), PLAN)
    for event in (
        Proposed(2, AT, "ann", plan=plan),
        CanarySet(5.0, AT, "sluice", "gate pairs: it won"),
        Queued(3, AT, "bob", plan=plan),
    ):
        rollout = (await stores.rollouts.commit(rollout, event)).rollout
    assert rollout.trial is not None
    verdicts = [
        Verdict("pairs", "pass", 31.0, 20.0, 44, "not worse than stable", counted="decided pairs",
                estimate=0.61, low=0.47, high=0.74, limit=0.4),
        Verdict("errors", "inconclusive", 4.2, 20.0, 61, "too early to tell", 80,
                estimate=0.01, low=-0.03, high=0.06, limit=0.05),
    ]  # fmt: skip
    await stores.evidence.put_verdicts("triage", rollout.trial.id, verdicts)


def text(browser: webdriver.Chrome, selector: str) -> str:
    return waiting(browser).until(lambda b: b.find_element(By.CSS_SELECTOR, selector).text)


def button(browser: webdriver.Chrome, name: str) -> WebElement:
    """Forms are not replaced by themselves: a new button is that of a new page."""
    path = f"//button[normalize-space()='{name}']"
    return waiting(browser).until(lambda b: b.find_element(By.XPATH, path))


def press(browser: webdriver.Chrome, name: str) -> None:
    button(browser, name).click()


def test_a_person_reads_where_it_stands_and_moves_it(
    browser: webdriver.Chrome, api: LiveApi
) -> None:
    api.with_stores(on_trial)
    log_in(browser, api.url, api.key, "/routes/triage")
    assert text(browser, ".plan [aria-current=step]").startswith("5 %")
    assert text(browser, ".plan li:nth-child(3)").split("\n") == [
        "25 %", "a person lets it in", "pairs, errors", "200 units", "10 min, at most 7 d"
    ]  # fmt: skip
    waits = text(browser, ".waits")
    assert "waits for gate errors: about 80 more units" in waits
    assert "waits for approval: sluice rollout advance triage" in waits
    verdict = text(browser, ".verdict.inconclusive")
    assert "+1 points (-3 to +6); passes below +5" in verdict
    assert "61 units, about 80 more needed" in verdict
    browser.find_element(By.ID, "reason").send_keys("enough for me")
    press(browser, "Enter 25 %")
    assert button(browser, "Enter 50 %").is_displayed()
    assert text(browser, ".plan [aria-current=step]").startswith("25 %")
    percent = browser.find_element(By.ID, "percent")
    percent.clear()
    percent.send_keys("12.5")
    press(browser, "% of the traffic")
    assert button(browser, "Enter 25 %").is_displayed()
    assert "12.5 %" in text(browser, ".flow")
    press(browser, "Withdraw triage@3")
    waiting(browser).until(lambda b: "waits for its turn" not in b.page_source)
    history = api.with_stores(lambda stores: stores.rollouts.history("triage"))
    said = [(entry.event.kind, entry.event.by, entry.event.reason) for entry in history[:3]]
    assert said == [
        ("withdrawn", "bootstrap", "from the console"),
        ("canary", "bootstrap", "from the console"),
        ("canary", "bootstrap", "enough for me"),
    ]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_button_of_an_older_page_moves_nothing(browser: webdriver.Chrome, api: LiveApi) -> None:
    api.with_stores(on_trial)
    log_in(browser, api.url, api.key, "/routes/triage")
    assert text(browser, ".plan")

    async def move(stores: Stores) -> None:
        await stores.rollouts.commit(
            await stores.rollouts.get("triage"), CanarySet(50.0, AT, "bob")
        )

    api.with_stores(move)
    press(browser, "Enter 25 %")
    waiting(browser).until(lambda b: "somebody changed it" in b.page_source)
    rollout = api.with_stores(lambda stores: stores.rollouts.get("triage"))
    assert rollout.trial is not None
    assert rollout.trial.weight == 50.0
    # The refusal stands in the browser's log, which other tests look at.
    browser.get_log("browser")
