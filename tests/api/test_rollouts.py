"""The verbs, what they require, and what they leave in the history."""

from dataclasses import replace
from typing import Any

import httpx2
import pytest

from rollout.evidence import Report, Verdict
from rollout.policy import Policy
from rollout.records import GatewayPresence
from rollout.stores import Stores
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


async def test_a_trial_keeps_the_plan_that_it_was_proposed_with(api: httpx2.AsyncClient) -> None:
    plan = {"steps": [20, {"percent": 40, "approval": False}], "gates": ["pairs"]}
    assert (await post(api, "propose", version=PROMPTED, plan=plan)).status_code == 200
    body = {"engine": "main", "policy": {"steps": [5, 25], "automatic": True}}
    assert (await api.put("/routes/triage", json=body)).status_code == 200
    standing = (await api.get("/routes/triage/rollout")).json()["standing"]
    steps = standing["plan"]["steps"]
    assert [step["percent"] for step in steps] == [0, 20, 40, 100]
    assert [step["approval"] for step in steps] == [False, True, False, True]
    assert (standing["step"], standing["next_percent"]) == (0, 20)
    assert [wait["kind"] for wait in standing["waits"]] == ["gate", "soak", "residency", "approval"]
    await post(api, "advance")
    assert await stage(api) == ("canary", 20)
    # Between two steps it counts as at the lower one, and goes on with the one above.
    await post(api, "canary", percent=30)
    standing = (await api.get("/routes/triage/rollout")).json()["standing"]
    assert (standing["step"], standing["next_percent"]) == (1, 40)


async def test_the_route_s_plan_is_pinned_too(api: httpx2.AsyncClient) -> None:
    await post(api, "propose", version=PROMPTED)
    body = {"engine": "main", "policy": {"steps": [5]}}
    assert (await api.put("/routes/triage", json=body)).status_code == 200
    await post(api, "advance")
    assert await stage(api) == ("canary", 1)


@pytest.mark.parametrize(
    ("plan", "param", "says"),
    [
        ({"steps": []}, "plan.steps", "1 to 50"),
        ({"steps": [5, {"percent": 9, "gates": ["total"]}]}, "plan.steps.1.gates", "could never"),
        ({"steps": [5, {"percent": 9, "gate": ["total"]}]}, "plan.steps.1.gate", "Unexpected"),
        ({"steps": [5, {"percent": "all"}]}, "plan.steps.1.percent", "valid number"),
        ({"steps": [5], "soak": 3}, "plan.soak", "Unexpected"),
    ],
)
async def test_a_plan_that_makes_no_sense_is_refused_with_its_place(
    api: httpx2.AsyncClient, plan: dict[str, Any], param: str, says: str
) -> None:
    refused = await post(api, "propose", version=PROMPTED, plan=plan)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert await stage(api) == (None, None)


async def test_a_plan_is_checked_again_when_a_version_is_proposed(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    """The store may hold a policy that an older release took."""
    route = await stores.rollouts.route("triage")
    policy = Policy(gates=("pairs", "ttft"))
    await stores.rollouts.put_route(replace(route, policy=policy), by="ann", at=AT, base="tiny")
    refused = await post(api, "propose", version=PROMPTED)
    assert refused.status_code == 400
    assert "`ttft` could never pass" in refused.json()["error"]["message"]
    assert "sluice route set triage" in refused.json()["error"]["message"]


async def test_a_second_candidate_is_refused_or_waits_with_its_plan(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    assert (await post(api, "propose", version=PROMPTED, queue=True)).status_code == 200
    assert await stage(api) == ("shadow", 0)  # there was nothing to wait for
    refused = await post(api, "propose", version=ADAPTED)
    assert refused.status_code == 409
    assert "--queue" in refused.json()["error"]["message"]
    queued = await post(api, "propose", version=ADAPTED, queue=True, plan={"steps": [30]})
    assert queued.status_code == 200
    status = (await api.get("/routes/triage/rollout")).json()
    assert status["queued"] == [ADAPTED]
    waiting = status["rollout"]["queued"][0]
    assert [step["percent"] for step in waiting["plan"]["steps"]] == [0, 30, 100]
    again = await post(api, "propose", version=ADAPTED, queue=True)
    assert again.status_code == 409
    assert (await post(api, "withdraw", version=ADAPTED)).status_code == 200
    assert (await api.get("/routes/triage/rollout")).json()["queued"] == []
    assert (await post(api, "withdraw", version=ADAPTED)).status_code == 409
    actions = [entry["action"] for entry in (await api.get("/audit")).json()]
    assert actions[:2] == ["rollout.withdrawn", "rollout.queued"]


async def test_promotion_takes_every_gate_of_the_plan(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    await make_resident(stores, PROMPTED)
    await post(api, "propose", version=PROMPTED)
    rollout = await stores.rollouts.get("triage")
    assert rollout.trial is not None
    pairs = Verdict("pairs", "pass", 31.0, 20.0, 40, "not worse")
    await stores.evidence.put_verdicts("triage", rollout.trial.id, [pairs])
    refused = await post(api, "promote")
    assert refused.status_code == 409
    assert "errors has not judged yet" in refused.json()["error"]["message"]
    bad = Verdict("feedback", "fail", 90.0, 60.0, 40, "people dislike it")
    await stores.evidence.put_verdicts("triage", rollout.trial.id, [pairs, bad])
    refused = await post(api, "promote")
    assert "feedback fail: people dislike it" in refused.json()["error"]["message"]
    assert (await post(api, "promote", force=True)).status_code == 200


@pytest.mark.parametrize(
    ("verb", "body", "status"),
    [
        ("propose", {}, 400),
        ("withdraw", {}, 400),
        ("withdraw", {"version": 2}, 409),
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
