"""Runs that are paused and go on, routes that are trained by themselves, and advice, over HTTP."""

import httpx2
import pytest

from rollout.cases import Label, LabelledCase
from rollout.stores import Stores
from tests.api.house import AT, case

pytestmark = pytest.mark.anyio


async def test_a_run_is_paused_and_resumed_and_the_audit_says_by_whom(
    api: httpx2.AsyncClient,
) -> None:
    body = {"route": "triage", "propose": False}
    run = (await api.post("/runs", json=body)).json()
    assert (run["propose"], run["labels"]) == (False, 0)
    at = f"/runs/{run['id']}"
    assert (await api.post(f"{at}/resume")).status_code == 409
    assert (await api.post(f"{at}/pause")).json()["state"] == "paused"
    assert (await api.post(f"{at}/resume")).json()["state"] == "queued"
    await api.post(f"{at}/cancel")
    assert (await api.post(f"{at}/pause")).status_code == 409
    audit = [(row["action"], row["subject"]) for row in (await api.get("/audit")).json()]
    assert audit[:4] == [
        (f"run.{verb}", run["id"]) for verb in ("cancel", "resume", "pause", "start")
    ]


async def test_the_rules_of_retraining_are_checked_and_what_they_wait_for_is_shown(
    api: httpx2.AsyncClient,
) -> None:
    body = {"engine": "main", "retrain": {"agreement_below": 7}}
    refused = await api.put("/routes/triage", json=body)
    assert refused.json()["error"]["param"] == "retrain.agreement_below"
    body["retrain"] = {"new_labels": 20}
    assert (await api.put("/routes/triage", json=body)).status_code == 200
    shown = (await api.get("/routes/triage/rollout")).json()["retraining"]
    assert (shown["state"], shown["reason"]) == (
        "waiting",
        "0 cases are decided, and a run needs 20",
    )
    assert (await api.put("/routes/triage", json={"engine": "main"})).status_code == 200
    assert (await api.get("/routes/triage/rollout")).json()["retraining"] is None


async def test_advice_names_its_numbers(api: httpx2.AsyncClient, stores: Stores) -> None:
    assert (await api.get("/routes/none/advice")).status_code == 404
    asked = case("c1")
    await stores.cases.put_labelled(
        [LabelledCase(asked, Label("c1", "triage", "neither", "ann", AT, "billing"))]
    )
    advice = (await api.get("/routes/triage/advice")).json()
    assert advice["verdict"] == "not yet"
    (data,) = [each for each in advice["findings"] if each["question"] == "Is there enough data?"]
    assert (data["mark"], data["numbers"]["rows"]) == ("bad", 1)
