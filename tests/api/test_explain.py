"""An answer is led back to its weights, and to the commit that let it through."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx2
import pytest

from rollout.assignment import bucket
from rollout.control.explain import commit_behind, standing
from rollout.exchanges import Answer, Exchange, Feedback, Judgement, Receipt
from rollout.state import CanarySet, Event, Promoted, Proposed, RolledBack, Rollout, apply
from rollout.stores import HistoryEntry, Stores
from tests.api.house import AT, case, offer

pytestmark = pytest.mark.anyio
TRIAL = "triage@3.2"


def at(minutes: float) -> Any:
    return AT + timedelta(minutes=minutes)


def told(*events: Event) -> list[HistoryEntry]:
    rollout, entries = Rollout("triage", 1, stable=1), []
    for event in events:
        after = apply(rollout, event)
        entries.append(HistoryEntry(after.revision, event, event.at, rollout, after))
        rollout = after
    return entries


HISTORY = told(
    Proposed(3, at(1), "ann"),
    CanarySet(5, at(2), "ann"),
    CanarySet(50, at(3), "bob"),
    Promoted(at(4), "sluice"),
    RolledBack(at(5), "eve"),
)


@pytest.mark.parametrize(
    ("receipt", "minutes", "revision"),
    [
        (Receipt("triage", 1, "stable", None), 0.5, None),
        (Receipt("triage", 1, "stable", TRIAL), 2.5, None),
        (Receipt("triage", 3, "candidate", TRIAL), 2.5, 3),
        (Receipt("triage", 3, "candidate", TRIAL), 3.5, 4),
        (Receipt("triage", 3, "stable", None), 4.5, 5),
        (Receipt("triage", 1, "stable", None), 5.5, 6),
        (Receipt("triage", 3, "pinned", None), 4.5, None),
        (Receipt("triage", 3, "candidate", TRIAL), None, 4),
    ],
)
def test_the_commit_behind_an_answer(
    receipt: Receipt, minutes: float | None, revision: int | None
) -> None:
    found = commit_behind(HISTORY, receipt, None if minutes is None else at(minutes))
    assert (found and found.revision) == revision


def test_what_held_at_the_time_of_an_answer() -> None:
    candidate = Receipt("triage", 3, "candidate", TRIAL)
    early, late = standing(HISTORY, candidate, at(2.5)), standing(HISTORY, candidate, at(3.5))
    assert (early and early.revision, late and late.revision) == (3, 4)
    assert standing(HISTORY, replace(candidate, trial=None), at(3.5)) is None


@pytest.fixture
async def captured(stores: Stores) -> Exchange:
    """An answer of the candidate at 30 %, captured, rated, and made a case."""
    rollout = await stores.rollouts.get("triage")
    for event in (Proposed(3, AT, "ann", "try it"), CanarySet(30, AT, "bob", "looks sane")):
        rollout = (await stores.rollouts.commit(rollout, event)).rollout
    assert rollout.trial is not None
    exchange = Exchange(
        request_id="of-c1",
        route="triage",
        trial=rollout.trial.id,
        arm="candidate",
        unit="ab" * 16,
        path="/v1/chat/completions",
        request="{}",
        answer=Answer(3, 200, "yes"),
        captured_at=at(1),
    )
    await offer(stores, replace(case("c1"), judgement=Judgement("referee", "win")))
    await stores.captures.append([exchange])
    receipt = Receipt("triage", 3, "candidate", rollout.trial.id)
    await stores.feedback.put(Feedback("of-c1", "k1", "bad", AT, comment="no!", receipt=receipt))
    return exchange


async def test_a_captured_answer_is_led_back(api: httpx2.AsyncClient, captured: Exchange) -> None:
    answer = await api.get("/routes/triage/explain", params={"request_id": "of-c1"})
    assert answer.status_code == 200
    found = answer.json()
    answered = found["answered"]
    assert (answered["arm"], answered["trial"]) == ("candidate", captured.trial)
    assert answered["bucket"] == bucket(str(captured.trial), captured.unit) * 100
    assert (answered["weight"], answered["instead"]) == (30, False)
    assert found["version"]["version"]["adapter"] == "ab" * 32
    assert found["commit"]["event"]["reason"] == "looks sane"
    assert [entry["event"]["kind"] for entry in found["commits"]] == ["proposed", "canary"]
    assert [each["id"] for each in found["cases"]] == ["c1"]
    assert found["feedback"][0]["comment"] == "no!"


async def test_an_answer_that_stable_gave_instead_is_told_as_that(
    api: httpx2.AsyncClient, stores: Stores, captured: Exchange
) -> None:
    instead = replace(captured, request_id="r2", answer=Answer(1, 200, "no"))
    await stores.captures.append([instead])
    found = (await api.get("/routes/triage/explain", params={"request_id": "r2"})).json()
    assert found["version"]["name"] == "triage@1"
    assert found["answered"]["instead"]
    assert "the candidate failed" in " ".join(found["notes"])


async def test_what_was_rated_is_known_though_nobody_captured_it(
    api: httpx2.AsyncClient, stores: Stores, captured: Exchange
) -> None:
    receipt = Receipt("triage", 1, "stable", captured.trial, unit="u")
    await stores.feedback.put(Feedback("r*[3]", "k1", "good", AT, receipt=receipt))
    found = (await api.get("/routes/triage/explain", params={"request_id": "r*[3]"})).json()
    assert found["answered"]["source"] == "feedback"
    assert found["version"]["name"] == "triage@1"
    assert "came with the route" in " ".join(found["notes"])


async def test_what_nobody_knows_is_said_with_where_it_was_looked_for(
    api: httpx2.AsyncClient, captured: Exchange
) -> None:
    answer = await api.get("/routes/triage/explain", params={"request_id": "unknown"})
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    assert "for 168 hours" in message
    assert "0 live gateway workers" in message


async def test_a_version_is_led_back_by_its_name(
    api: httpx2.AsyncClient, captured: Exchange
) -> None:
    for name in ("3", "triage@3"):
        found = (await api.get("/routes/triage/explain", params={"version": name})).json()
        assert found["version"]["version"]["note"] == "tuned"
        assert found["commit"]["event"]["kind"] == "canary"
        assert found["answered"] is None


@pytest.mark.parametrize(
    ("params", "status"),
    [
        ({}, 400),
        ({"request_id": "a", "version": "1"}, 400),
        ({"version": "other@1"}, 400),
        ({"version": "9"}, 404),
    ],
)
async def test_one_thing_is_explained_at_a_time(
    api: httpx2.AsyncClient, params: dict[str, str], status: int
) -> None:
    answer = await api.get("/routes/triage/explain", params=params)
    assert answer.status_code == status


async def test_a_judges_record_is_read_from_the_cases(
    api: httpx2.AsyncClient, captured: Exchange
) -> None:
    # Who says which answer is right decides by what is shown, never by whose it is.
    said = "second" if case("c1").stable_first else "first"
    await api.post("/cases/claim", json={"route": "triage"})
    await api.post("/cases/c1/label", json={"choice": said})
    found = (await api.get("/routes/triage/judge")).json()
    assert found["judge"] is None
    assert found["record"] | {"kappa": 0} == {
        "judged": 1, "inconsistent": 0, "labelled": 1, "agreed": 1, "kappa": 0,
    }  # fmt: skip
