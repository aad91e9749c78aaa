"""Cases over HTTP: unattributed, leased, labelled once, exported and imported."""

import json
from dataclasses import replace
from datetime import timedelta

import httpx2
import pytest

from rollout.artifacts import ArtifactStore
from rollout.assignment import unit_of
from rollout.runs import TrainingRun
from rollout.stores import Stores
from tests.api.house import AT, add_key, case, offer

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
    assert set(claimed) == {
        "id", "route", "messages", "first", "second", "created_at", "state", "labels", "needed", "mine"
    }  # fmt: skip
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


async def test_people_see_how_many_labels_a_case_has_and_not_what_others_said(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    people = [await add_key(stores, name, "label") for name in ("ann", "ben", "cyd")]
    await offer(stores, replace(case("c1"), labels_needed=2))
    for number, (who, choice) in enumerate(zip(people, ("first", "second", "both"), strict=True)):
        (claimed,) = (await api.post("/cases/claim", json={}, headers=who)).json()
        assert (claimed["labels"], claimed["needed"]) == (number, max(2, number + 1))
        assert claimed["mine"] is False
        assert "choice" not in json.dumps(claimed)
        body = {"choice": choice}
        assert (await api.post("/cases/c1/label", json=body, headers=who)).json()["recorded"]
        assert not (await api.post("/cases/c1/label", json=body, headers=who)).json()["recorded"]
        assert (await api.post("/cases/claim", json={}, headers=who)).json() == []
    (listed,) = (await api.get("/cases?state=disputed", headers=people[0])).json()
    assert (listed["labels"], listed["needed"], listed["mine"]) == (3, 3, True)
    assert (await api.get("/cases/c1/labels", headers=people[0])).status_code == 403
    said = (await api.get("/cases/c1/labels")).json()
    assert [(each["labeler"], each["choice"]) for each in said] == [
        ("ann", "first"), ("ben", "second"), ("cyd", "both")
    ]  # fmt: skip
    assert (await api.get("/cases/none/labels")).status_code == 404
    (stats,) = (await api.get("/cases/stats")).json()
    assert stats["disputed"] == 1
    assert stats["agreement"] == {"alpha": 0.0, "cases": 1}
    assert stats["win_rates"]["triage@2.2"]["ties"] == 1


async def test_cases_with_several_labels_make_the_round_trip(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    await offer(stores, replace(case("c1"), labels_needed=2, unit="u"))
    people = {name: await add_key(stores, name, "label") for name in ("ann", "ben", "cyd")}
    for name, who in people.items():
        body = {"choice": "second" if name == "ann" else "first", "comment": f"by {name}"}
        await api.post("/cases/c1/label", json=body, headers=who)
    exported = (await api.get("/cases/export")).content
    (before,) = await stores.cases.labelled("triage")
    assert [label.labeler for label in before.labels] == ["ann", "ben", "cyd"]
    (stats,) = await stores.cases.stats("triage")
    await stores.cases.erase("c1")
    assert (await api.post("/cases/import", content=exported)).json() == {"added": 1, "known": 0}
    assert await stores.cases.labelled("triage") == [before]
    assert await stores.cases.stats("triage") == [stats]


async def test_a_line_whose_labels_do_not_decide_it_is_refused(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    await offer(stores, replace(case("c1"), labels_needed=2))
    for who in [await add_key(stores, name, "label") for name in ("ann", "ben")]:
        await api.post("/cases/c1/label", json={"choice": "both"}, headers=who)
    row = json.loads((await api.get("/cases/export")).text)
    twice = row | {"others": [row["others"][0] | {"labeler": "ben"}]}
    split = row | {"others": [row["others"][0] | {"choice": "first"}]}
    older = row | {"label": row["others"][0], "others": [row["label"]]}
    for broken, why in (
        (row | {"others": []}, "1 labels do not decide"),
        (twice, "labelled the case twice"),
        (split, "2 labels do not decide"),
        (older, "not the one that decides"),
    ):
        response = await api.post("/cases/import", content=f"\n{json.dumps(broken)}")
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert message.startswith("line 2: ")
        assert why in message


async def test_a_client_is_erased_with_a_word_on_what_stays(
    api: httpx2.AsyncClient, artifacts: ArtifactStore, stores: Stores
) -> None:
    await offer(stores, replace(case("c1"), unit=unit_of("key-a", "ann/1")), case("c2"))
    await api.post("/cases/c1/label", json={"choice": "both"})
    digest = artifacts.put_document(b'{"case":"c1","gold":"x"}\n{"case":"c3","gold":"y"}\n')
    other = artifacts.put_document(b'{"case":"c3","gold":"y"}\n')
    run = TrainingRun("run-1", "triage", "triage@1", AT, "tim", dataset=digest, adapter="ab" * 32)
    for each in (run, replace(run, id="run-2", dataset=other)):
        await stores.runs.enqueue(each)
    ann = await add_key(stores, "ann", "label", "train", "operate")
    assert (await api.delete("/cases?unit=u", headers=ann)).status_code == 403
    erased = await api.delete("/cases", params={"user": "key-a/ann/1", "reason": "asked to"})
    assert erased.json() == {
        "cases": 1,
        "labels": 1,
        "captures": 0,
        "feedback": 0,
        "differences": 0,
        "remnants": [
            {
                "dataset": digest,
                "cases": 1,
                "runs": ["run-1"],
                "adapters": ["ab" * 32],
                "versions": [],
            }
        ],
    }
    assert [found.id for found, _ in await stores.cases.list()] == ["c2"]
    (entry, *_) = await stores.audit.list()
    assert (entry.action, entry.reason) == ("cases.erase", "asked to")
    assert "ann/1" not in f"{entry.subject} {entry.after}"
    assert entry.after is not None
    assert json.loads(entry.after) == erased.json()
    assert (await api.delete("/cases?request_id=of-c2")).json()["cases"] == 1
    assert (await api.delete("/cases?request_id=of-c2")).json()["cases"] == 0


@pytest.mark.parametrize(
    "query",
    ["", "?unit=u&user=k/s", "?user=k", "?user=/s", "?unit=u&older_than_days=3", "?unit=u&route=triage",
     "?older_than_days=0"],
)  # fmt: skip
async def test_what_to_erase_is_said_in_one_way(api: httpx2.AsyncClient, query: str) -> None:
    assert (await api.delete(f"/cases{query}")).status_code == 400


async def test_what_is_old_is_erased(api: httpx2.AsyncClient, stores: Stores) -> None:
    await offer(stores, case("c1"), replace(case("c2"), created_at=AT + timedelta(days=20_000)))
    gone = (await api.delete("/cases?older_than_days=30&route=triage")).json()
    assert gone["cases"] == 1
    assert (await api.delete("/cases?older_than_days=30&route=none")).status_code == 404
    assert [found.id for found, _ in await stores.cases.list()] == ["c2"]
