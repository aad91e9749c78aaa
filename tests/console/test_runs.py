"""Runs and advice on the console: what somebody who trains may do, and nobody else."""

from dataclasses import replace

import httpx2
import pytest

from rollout.retraining import Retrain
from rollout.runs import TrainingRun
from rollout.stores import Stores
from tests.api.house import AT, add_key
from tests.console.test_pages import log_in

pytestmark = pytest.mark.anyio


async def test_a_run_is_paused_resumed_and_cancelled_with_buttons(
    web: httpx2.AsyncClient, stores: Stores
) -> None:
    run = TrainingRun(
        "run-1", "triage", "triage@1", AT, "sluice", why="60 cases were decided since the last run"
    )
    await stores.runs.enqueue(run)
    token = await log_in(web)
    page = (await web.get("/runs/run-1")).text
    assert "It was started by itself because 60 cases were decided" in page
    assert "/runs/run-1/pause" in page
    for verb, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        answer = await web.post(f"/runs/run-1/{verb}", data={"token": token})
        assert answer.status_code == 303
        assert (await stores.runs.get("run-1")).state == state
    assert "/runs/run-1/cancel" not in (await web.get("/runs/run-1")).text


async def test_a_labeler_may_look_and_not_stop(web: httpx2.AsyncClient, stores: Stores) -> None:
    await stores.runs.enqueue(TrainingRun("run-1", "triage", "triage@1", AT, "ann"))
    await add_key(stores, "lea", "label")
    token = await log_in(web, "sk-sluice-lea")
    assert "/runs/run-1/cancel" not in (await web.get("/runs/run-1")).text
    refused = await web.post("/runs/run-1/cancel", data={"token": token})
    assert refused.status_code == 403
    assert (await stores.runs.get("run-1")).state == "queued"


async def test_the_page_of_a_route_says_when_and_whether_it_is_trained(
    web: httpx2.AsyncClient, stores: Stores
) -> None:
    route = await stores.rollouts.route("triage")
    asking = replace(route, retrain=Retrain(new_labels=20))
    await stores.rollouts.put_route(asking, by="ann", at=AT, base="base")
    await log_in(web)
    page = (await web.get("/routes/triage")).text
    assert "0 cases are decided, and a run needs 20" in page
    advice = (await web.get("/routes/triage/advice")).text
    assert "Not yet: label more" in advice
    assert "Do the people who label agree?" in advice
