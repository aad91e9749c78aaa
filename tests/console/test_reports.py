"""The page of a report, of this release and of an older one."""

import json
from dataclasses import asdict
from datetime import UTC, datetime

import httpx2
import pytest

from rollout.evaluation import EvaluationRules
from rollout.evidence import Report, Score
from rollout.stores import Stores
from rollout.stores.codec import decode, encode
from rollout.suites import Look, Scorer, SuiteRow, make_suite
from tests.api.house import ADMIN
from tests.console.test_pages import log_in
from trainer.evaluate import Graded
from trainer.reporting import Answers, Circumstances, beforehand, make_report

pytestmark = pytest.mark.anyio

AT = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture
async def browser(web: httpx2.AsyncClient) -> httpx2.AsyncClient:
    """Logged in."""
    await log_in(web)
    return web


def whole_report() -> Report:
    """With all that a report may have."""
    row = SuiteRow("<b>", ({"role": "user", "content": "q"},), "a", tags=("<i>short</i>",))
    suite = make_suite("triage", [row], [Scorer("exact"), Scorer("similarity")])

    def answers(way: str, version: str, *, right: bool) -> Answers:
        graded = Graded("<b>", "a", right, 0.2, "<script>" if not right else None, prompt_tokens=9)
        return Answers(way, version, (graded,), 1.0, AT)

    rules = EvaluationRules(guarded=("*",), latency_ratio=2, cost_ratio=2, maximum_looks=1)
    return make_report(
        suite,
        [
            answers("version", "triage@3", right=True),
            answers("parent", "triage@1", right=False),
            answers("prompt", "triage@1", right=True),
        ],
        Circumstances(
            "triage",
            rules,
            beforehand(suite, rules, None),
            AT,
            looks=5,
            prompt=({"role": "system", "content": "<u>Answer</u>"},),
        ),
    )


async def test_the_page_of_a_report_has_all_of_it_and_nothing_that_runs(
    stores: Stores, browser: httpx2.AsyncClient
) -> None:
    report = whole_report()
    await stores.reports.put(report)
    page = (await browser.get(f"/reports/{report.id}")).text

    for words in ("slice &lt;i&gt;short", "&lt;script&gt;", "&lt;u&gt;Answer", "has judged 5"):
        assert words in page
    for verdict in report.verdicts:
        assert verdict.gate.partition("<")[0] in page
    assert "<script>" not in page
    assert "<svg" in page
    listed = (await browser.get("/reports")).text
    assert f"/reports/{report.id}" in listed


async def test_a_report_of_an_older_release_has_a_page_too(
    stores: Stores, browser: httpx2.AsyncClient
) -> None:
    scores = (Score("triage@3", 9, 10, 0.6, 1.0), Score("triage@1", 5, 10, 0.2, 0.8))
    old = Report(
        "f" * 64, "triage", "triage@3", "triage@1", "s", scores, 4, 0, 0.1, "pass", "r", AT
    )
    known = set(asdict(old)) & {
        "id", "route", "version", "parent", "suite", "scores", "gained", "lost", "p_value", "outcome",
        "reason", "created_at",
    }  # fmt: skip
    plain = {name: value for name, value in asdict(old).items() if name in known}
    fields = ("version", "correct", "total", "low", "high", "seconds")
    plain["scores"] = [{name: score[name] for name in fields} for score in plain["scores"]]
    read = decode(Report, encode(plain))
    assert read == old
    await stores.reports.put(read)

    page = await browser.get(f"/reports/{old.id}")
    assert page.status_code == 200
    assert "90.0" in page.text
    assert (await browser.get("/reports")).status_code == 200


async def test_suites_stand_below_the_reports_with_how_often_they_judged(
    stores: Stores, browser: httpx2.AsyncClient
) -> None:
    row = {"id": 1, "messages": [{"role": "user", "content": "q"}], "gold": "a"}
    content = '{"scorers": [{"kind": "field_f1"}]}\n' + json.dumps(row)
    headers = {"authorization": f"Bearer {ADMIN}"}
    path = "/api/v1/suites?route=triage&vault=true"
    digest = (await browser.post(path, content=content, headers=headers)).json()["digest"]
    for number in range(13):
        await stores.suites.look(Look(digest, f"triage@{number}", "r", AT))

    page = (await browser.get("/reports")).text
    for words in (digest[:12], "vault", "field f1", "13 of 12", "worn"):
        assert words in page


async def test_a_report_that_is_not_there_says_so(browser: httpx2.AsyncClient) -> None:
    page = await browser.get("/reports/nothing")
    assert page.status_code == 404
    assert "sluice report list" in page.text
