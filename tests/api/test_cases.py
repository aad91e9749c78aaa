"""Cases over HTTP: unattributed, leased, labelled once, exported and imported."""

import json

import httpx2
import pytest

from rollout.stores import Stores
from tests.api.house import add_key, case, offer

pytestmark = pytest.mark.anyio


async def test_a_labeler_never_learns_which_version_gave_which_answer(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    await offer(stores, case("c1"))
    (claimed,) = (await api.post("/cases/claim", json={"route": "triage"})).json()
    assert {claimed["first"]["text"], claimed["second"]["text"]} == {
        "stable says yes",
        "candidate says no",
    }
    assert set(claimed) == {"id", "route", "messages", "first", "second", "created_at", "state"}
    assert set(claimed["first"]) == {"text", "tool_calls", "error"}


async def test_a_case_is_labelled_once_by_whoever_holds_it(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    ann = await add_key(stores, "ann", "label")
    ben = await add_key(stores, "ben", "label")
    await offer(stores, case("c1"), case("c2", priority=0.5))
    (first,) = (await api.post("/cases/claim", json={}, headers=ann)).json()
    (second,) = (await api.post("/cases/claim", json={}, headers=ben)).json()
    assert (first["id"], second["id"]) == ("c1", "c2")
    body = {"choice": "first", "correction": "maybe", "comment": "hard"}
    assert (await api.post("/cases/c1/label", json=body, headers=ben)).status_code == 409
    done = await api.post("/cases/c1/label", json=body, headers=ann)
    assert done.json() == {"recorded": True}
    again = await api.post("/cases/c1/label", json={"choice": "second"}, headers=ann)
    assert again.json() == {"recorded": False}
    assert (await api.post("/cases/c2/release", headers=ben)).status_code == 204
    (stats,) = (await api.get("/cases/stats")).json()
    assert (stats["open"], stats["leased"], stats["labelled"]) == (1, 0, 1)
    (row,) = await stores.cases.labelled("triage")
    assert (row.label.labeler, row.label.choice, row.label.correction) == ("ann", "first", "maybe")
    assert (await api.post("/cases/none/label", json=body)).status_code == 404
    assert (await api.post("/cases/c2/label", json={"choice": "third"})).status_code == 400
    (listed,) = (await api.get("/cases?state=labelled")).json()
    assert listed["id"] == "c1"


async def test_what_was_exported_is_imported_once(api: httpx2.AsyncClient, stores: Stores) -> None:
    await offer(stores, case("c1"), case("c2"))
    await api.post("/cases/claim", json={"count": 2})
    for name in ("c1", "c2"):
        await api.post(f"/cases/{name}/label", json={"choice": "both"})
    exported = (await api.get("/cases/export?route=triage")).text
    assert len(exported.splitlines()) == 2
    again = await api.post("/cases/import", content=exported)
    assert again.json() == {"added": 0, "known": 2}
    renamed = exported.replace('"c1"', '"c8"').replace('"c2"', '"c9"')
    assert (await api.post("/cases/import", content=renamed)).json() == {"added": 2, "known": 0}


@pytest.mark.parametrize("broken", ["not json", "{}", '{"case": {"id": 1}}'])
async def test_one_broken_line_names_itself_and_nothing_is_imported(
    api: httpx2.AsyncClient, stores: Stores, broken: str
) -> None:
    await offer(stores, case("c1"))
    await api.post("/cases/claim", json={})
    await api.post("/cases/c1/label", json={"choice": "both"})
    line = (await api.get("/cases/export")).text.strip().replace('"c1"', '"c5"')
    response = await api.post("/cases/import", content=f"{line}\n{broken}\n")
    assert response.status_code == 400
    assert "line 2" in response.json()["error"]["message"]
    (stats,) = (await api.get("/cases/stats")).json()
    assert stats["labelled"] == 1


async def test_a_label_of_another_case_is_a_broken_line(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    await offer(stores, case("c1"))
    await api.post("/cases/claim", json={})
    await api.post("/cases/c1/label", json={"choice": "both"})
    row = json.loads((await api.get("/cases/export")).text)
    row["case"]["id"] = "c7"
    response = await api.post("/cases/import", content=json.dumps(row))
    assert response.status_code == 400


async def test_who_may_label_and_who_may_export(api: httpx2.AsyncClient, stores: Stores) -> None:
    ann = await add_key(stores, "ann", "label")
    tim = await add_key(stores, "tim", "train")
    elsewhere = await add_key(stores, "eve", "label", routes=frozenset({"elsewhere"}))
    await offer(stores, case("c1"))
    assert (await api.get("/cases/export", headers=ann)).status_code == 403
    assert (await api.post("/cases/claim", json={}, headers=tim)).status_code == 403
    for body in ({}, {"route": "triage"}):
        refused = await api.post("/cases/claim", json=body, headers=elsewhere)
        assert refused.status_code == 403
    label = await api.post("/cases/c1/label", json={"choice": "both"}, headers=elsewhere)
    assert label.status_code == 404
