"""The verbs, what they require, and what they leave in the history."""

from typing import Any

import httpx2
import pytest

from rollout.evidence import Report
from rollout.stores import Stores
from rollout.stores.presence import GatewayPresence
from tests.api.house import ADAPTED, AT, PROMPTED, add_key, make_resident, pass_gate

pytestmark = pytest.mark.anyio


async def post(api: httpx2.AsyncClient, verb: str, **body: Any) -> httpx2.Response:
    return await api.post(f"/routes/triage/rollout/{verb}", json={"reason": "a test", **body})


async def stage(api: httpx2.AsyncClient) -> tuple[str | None, float | None]:
    trial = (await api.get("/routes/triage/rollout")).json()["rollout"]["trial"]
    return (trial["stage"], trial["weight"]) if trial else (None, None)


async def test_a_version_goes_all_the_way_and_back(api: httpx2.AsyncClient, stores: Stores) -> None:
    await make_resident(stores)
    assert (await post(api, "propose", version=ADAPTED)).status_code == 200
    assert await stage(api) == ("shadow", 0)
    assert (await post(api, "canary", percent=10)).status_code == 200
    assert await stage(api) == ("canary", 10)
    assert (await post(api, "hold")).status_code == 200
    assert await stage(api) == ("held", 10)
    assert (await post(api, "resume")).status_code == 200
    await pass_gate(stores)
    promoted = (await post(api, "promote")).json()
    assert promoted["rollout"]["stable"] == 3
    assert promoted["rollout"]["trial"] is None
    assert promoted["catalog_revision"] == await stores.catalog.revision()
    back = (await post(api, "rollback")).json()
    assert back["rollout"]["stable"] == 1
    history = (await api.get("/routes/triage/history")).json()
    kinds = [entry["event"]["kind"] for entry in history]
    assert kinds == ["rolled_back", "promoted", "resumed", "held", "canary", "proposed"]
    assert {entry["event"]["by"] for entry in history} == {"bootstrap"}
    assert {entry["event"]["reason"] for entry in history} == {"a test"}


async def test_a_stale_revision_is_a_conflict(api: httpx2.AsyncClient) -> None:
    revision = (await api.get("/routes/triage/rollout")).json()["rollout"]["revision"]
    assert (await post(api, "propose", version=2, revision=revision)).status_code == 200
    stale = await post(api, "hold", revision=revision)
    assert stale.status_code == 409
    assert stale.json()["error"]["code"] == "stale_revision"
    assert await stage(api) == ("shadow", 0)


async def test_no_adapter_gets_traffic_before_a_replica_serves_it(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    await post(api, "propose", version=ADAPTED)
    refused = await post(api, "canary", percent=10)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert "triage@3 is not resident yet: no replica" in refused.json()["error"]["message"]
    assert (await post(api, "promote", force=True)).status_code == 503
    assert (await post(api, "canary", percent=0)).status_code == 200
    await make_resident(stores)
    assert (await post(api, "canary", percent=10)).status_code == 200


async def test_a_prompt_needs_no_adapter(api: httpx2.AsyncClient) -> None:
    await post(api, "propose", version=PROMPTED)
    assert (await post(api, "canary", percent=10)).status_code == 200


async def test_promoting_without_a_passing_gate_takes_force_and_is_remembered(
    api: httpx2.AsyncClient,
) -> None:
    await post(api, "propose", version=PROMPTED)
    refused = await post(api, "promote")
    assert refused.status_code == 409
    assert "no gate has judged" in refused.json()["error"]["message"]
    assert (await post(api, "promote", force=True)).status_code == 200
    (promoted, *_) = (await api.get("/routes/triage/history")).json()
    assert promoted["event"]["reason"] == "a test (forced: no gate has judged this trial yet)"
    (audited, *_) = (await api.get("/audit")).json()
    assert audited["action"] == "rollout.promoted"
    assert "forced" in audited["reason"]


async def test_a_second_rollback_takes_stable_back_only_where_it_is_meant(
    api: httpx2.AsyncClient,
) -> None:
    for version in (PROMPTED, ADAPTED):
        await post(api, "propose", version=version)
        if version == PROMPTED:
            assert (await post(api, "promote", force=True)).status_code == 200
    assert (await post(api, "rollback")).status_code == 200
    refused = await post(api, "rollback")
    assert refused.status_code == 409
    assert "would put triage@1 in the place" in refused.json()["error"]["message"]
    back = await post(api, "rollback", force=True)
    assert back.json()["rollout"]["stable"] == 1


async def test_proposing_what_lost_its_evaluation_takes_force(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    report = Report(
        id="f" * 64, route="triage", version="triage@4", parent="triage@1", suite="held-out",
        scores=(), gained=1, lost=9, p_value=0.02, outcome="fail", reason="9 lost, 1 gained",
        created_at=AT,
    )  # fmt: skip
    await stores.reports.put(report)
    await stores.rollouts.register(await stores.rollouts.version(PROMPTED))
    refused = await post(api, "propose", version="triage@4")
    assert refused.status_code == 409
    assert "9 lost, 1 gained" in refused.json()["error"]["message"]
    assert (await post(api, "propose", version="triage@4", force=True)).status_code == 200
    assert (await api.get(f"/reports/{report.id}")).json()["lost"] == 9
    assert len((await api.get("/reports?route=triage")).json()) == 1


async def test_advance_takes_the_next_step_and_promotes_behind_the_last(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    assert (await post(api, "advance")).status_code == 409
    await post(api, "propose", version=PROMPTED)
    weights = []
    for _ in range(3):
        await post(api, "advance")
        weights.append((await stage(api))[1])
    assert weights == [1, 10, 50]
    assert (await post(api, "advance")).status_code == 409
    await pass_gate(stores)
    assert (await post(api, "advance")).json()["rollout"]["stable"] == 2


@pytest.mark.parametrize(
    ("verb", "body", "status"),
    [
        ("propose", {}, 400),
        ("propose", {"version": "other@1"}, 400),
        ("propose", {"version": "triage@x"}, 400),
        ("propose", {"version": "triage@99"}, 404),
        ("propose", {"version": "triage@1"}, 409),
        ("canary", {}, 400),
        ("canary", {"percent": 10}, 409),
        ("canary", {"percent": 101}, 400),
        ("canary", {"percent": "many"}, 400),
        ("hold", {}, 409),
        ("rollback", {}, 409),
        ("explode", {}, 400),
        ("hold", {"unknown": 1}, 400),
    ],
)
async def test_nonsense_is_refused_in_openais_shape(
    api: httpx2.AsyncClient, verb: str, body: dict[str, Any], status: int
) -> None:
    response = await post(api, verb, **body)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_scopes_and_routes_are_kept(api: httpx2.AsyncClient, stores: Stores) -> None:
    labeler = await add_key(stores, "labeler", "label")
    caller = await add_key(stores, "caller", "infer")
    other = await add_key(stores, "other", "operate", routes=frozenset({"elsewhere"}))
    body = {"reason": "no", "version": 2}
    path = "/routes/triage/rollout"
    for headers in (labeler, caller, other):
        response = await api.post(f"{path}/propose", json=body, headers=headers)
        assert response.status_code == 403
    assert (await api.get(path, headers=labeler)).status_code == 200
    assert (await api.get(path, headers=caller)).status_code == 403
    assert (await api.get("/routes", headers=other)).json() == []


async def test_status_shows_evidence_and_verdicts(api: httpx2.AsyncClient, stores: Stores) -> None:
    await post(api, "propose", version=PROMPTED)
    await pass_gate(stores)
    status = (await api.get("/routes/triage/rollout")).json()
    assert status["stable"] == "triage@1"
    assert status["candidate"] == "triage@2"
    assert status["verdicts"][0]["reason"] == "not worse than the margin"
    assert status["evidence"]["pairs"]["agree"] == 0
    assert (await api.get("/routes/triage/evidence")).json() == status["evidence"]


async def test_gateways_say_what_they_serve(api: httpx2.AsyncClient, stores: Stores) -> None:
    await stores.presence.report(GatewayPresence("g1", "host", 7, revision=3, started_at=AT))
    (gateway,) = (await api.get("/gateways")).json()
    assert gateway["revision"] == 3
