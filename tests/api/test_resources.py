"""Routes, versions, keys, runs and health over HTTP."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter
from safetensors.numpy import save_file

from rollout.api.app import create_app
from rollout.errors import NotFoundError
from rollout.runs import RunEvent
from rollout.stores import Stores, open_stores
from tests.api.house import ADAPTED, ADMIN, AT, REPLICA, add_key, make_resident, settings

pytestmark = pytest.mark.anyio


async def test_a_route_is_created_with_the_bare_base_and_updated(api: httpx2.AsyncClient) -> None:
    created = await api.put("/routes/new", json={"engine": "main", "capture": 0.5})
    assert created.status_code == 201
    assert created.json()["rollout"]["stable"] == 1
    updated = await api.put(
        "/routes/new", json={"engine": "main", "policy": {"steps": [5, 25]}, "comparator": "json"}
    )
    assert updated.status_code == 200
    assert updated.json()["route"]["policy"]["steps"] == [5, 25]
    names = [row["route"]["name"] for row in (await api.get("/routes")).json()]
    assert names == ["new", "triage"]


@pytest.mark.parametrize(
    ("name", "body", "param"),
    [
        ("UPPER", {"engine": "main"}, "name"),
        ("a", {"engine": "nowhere"}, "engine"),
        ("a", {"engine": "main", "schema": "{"}, "schema"),
        ("a", {"engine": "main", "policy": {"alpha": 2}}, "policy.alpha"),
        ("a", {"engine": "main", "policy": {"steps": [50, 10]}}, "policy.steps.1"),
        (
            "a",
            {"engine": "main", "policy": {"steps": [{"percent": 5, "gates": ["ttft"]}]}},
            "policy.steps.0.gates",
        ),
        (
            "a",
            {"engine": "main", "policy": {"steps": [{"percent": 5, "soak": 1}]}},
            "policy.steps.0.soak",
        ),
        ("a", {"engine": "main", "policy": {"steps": ["some"]}}, "policy.steps.0"),
        ("a", {"engine": "main", "capture": 2}, "capture"),
        ("a", {"engine": "main", "typo": 2}, "typo"),
    ],
)
async def test_a_broken_route_names_its_field(
    api: httpx2.AsyncClient, name: str, body: dict[str, Any], param: str
) -> None:
    response = await api.put(f"/routes/{name}", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_versions_say_where_they_answer(api: httpx2.AsyncClient, stores: Stores) -> None:
    assert (await api.get(f"/versions/{ADAPTED}")).json()["resident_on"] == []
    await make_resident(stores)
    version = (await api.get(f"/versions/{ADAPTED}")).json()
    assert version["resident_on"] == [REPLICA]
    assert version["served_name"].startswith("tiny-abab")
    assert len((await api.get("/versions?route=triage")).json()) == 3
    (engine,) = (await api.get("/engines")).json()
    assert engine["replicas"][0]["ready"] is True
    assert (await api.get("/versions/triage@77")).status_code == 404


def write_adapter(folder: Path, rank: int = 8) -> Path:
    folder.mkdir()
    config = {"r": rank, "lora_alpha": 16, "peft_type": "LORA", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{module}.lora_A.weight": np.ones((rank, 4), np.float32),
        f"{module}.lora_B.weight": np.ones((4, rank), np.float32),
    }
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


async def test_registering_an_adapter_checks_it(api: httpx2.AsyncClient, tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good")
    body = {"route": "triage", "adapter_path": str(good), "note": "by hand"}
    registered = await api.post("/versions", json=body)
    assert registered.status_code == 201
    assert registered.json()["name"] == "triage@4"
    assert len(registered.json()["version"]["adapter"]) == 64
    too_big = write_adapter(tmp_path / "big", rank=64)
    response = await api.post("/versions", json={"route": "triage", "adapter_path": str(too_big)})
    assert response.status_code == 422
    assert "r = 64" in response.json()["error"]["message"]
    dora = write_adapter(tmp_path / "dora")
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    response = await api.post("/versions", json={"route": "triage", "adapter_path": str(dora)})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "use_dora"
    missing = tmp_path / "missing"
    response = await api.post("/versions", json={"route": "triage", "adapter_path": str(missing)})
    assert response.status_code == 400
    assert "adapter_config.json" in response.json()["error"]["message"]
    assert len((await api.get("/versions?route=triage")).json()) == 4


async def test_registering_a_prompt(api: httpx2.AsyncClient) -> None:
    prompt = {"messages": [{"role": "system", "content": "Say one word."}]}
    registered = await api.post("/versions", json={"route": "triage", "prompt": prompt})
    assert registered.json()["version"]["prompt"]["mode"] == "prepend"
    assert (await api.post("/versions", json={"route": "none"})).status_code == 404


async def test_a_key_is_shown_once_works_and_is_revoked(api: httpx2.AsyncClient) -> None:
    made = (await api.post("/keys", json={"name": "ann", "scopes": ["label"]})).json()
    headers = {"authorization": f"Bearer {made['secret']}"}
    assert made["secret"].startswith("sk-sluice-")
    assert (await api.get("/routes", headers=headers)).status_code == 200
    assert (await api.get("/keys", headers=headers)).status_code == 403
    (listed,) = (await api.get("/keys")).json()
    assert "secret" not in listed
    assert "digest" not in listed
    assert (await api.delete(f"/keys/{listed['id']}")).status_code == 204
    assert (await api.get("/routes", headers=headers)).status_code == 401
    assert (await api.delete(f"/keys/{listed['id']}")).status_code == 404
    assert (await api.post("/keys", json={"name": "x", "scopes": ["root"]})).status_code == 400
    assert (await api.post("/keys", json={"name": "x", "scopes": []})).status_code == 400


async def test_a_key_keeps_the_limits_that_it_was_made_with(api: httpx2.AsyncClient) -> None:
    limits = {"requests_per_minute": 60, "monthly_tokens": 1_000_000}
    body = {"name": "shop", "scopes": ["infer"], "limits": limits}
    assert (await api.post("/keys", json=body)).status_code == 201
    (listed,) = (await api.get("/keys")).json()
    assert listed["limits"] == {**limits, "tokens_per_minute": None, "concurrency": None}


async def test_the_limits_of_a_key_are_changed_one_by_one(api: httpx2.AsyncClient) -> None:
    limits = {"requests_per_minute": 60, "monthly_tokens": 1_000_000}
    body = {"name": "shop", "scopes": ["infer"], "limits": limits}
    made = (await api.post("/keys", json=body)).json()
    path = f"/keys/{made['key']['id']}/limits"
    changed = await api.patch(path, json={"requests_per_minute": None, "concurrency": 4})
    expected = {"monthly_tokens": 1_000_000, "concurrency": 4}
    none = {"requests_per_minute": None, "tokens_per_minute": None}
    assert changed.json()["limits"] == {**expected, **none}
    assert (await api.get("/keys")).json() == [changed.json()]
    refused = await api.patch(path, json={"concurrency": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "limits.concurrency")
    assert (await api.patch("/keys/key-none/limits", json={})).status_code == 404
    (entry, *_) = (await api.get("/audit")).json()
    assert (entry["action"], entry["subject"]) == ("key.change", made["key"]["id"])


async def test_the_audit_tells_what_was_before_and_what_came_of_it(api: httpx2.AsyncClient) -> None:
    async def newest() -> dict[str, Any]:
        entry: dict[str, Any] = (await api.get("/audit")).json()[0]
        return entry

    for share in (0.2, 0.4):
        body = {"engine": "main", "capture": share, "reason": f"{share} is enough"}
        assert (await api.put("/routes/triage", json=body)).status_code == 200
    entry = await newest()
    assert (entry["action"], entry["reason"]) == ("route.put", "0.4 is enough")
    captured = [json.loads(entry[side])["capture"] for side in ("before", "after")]
    assert captured == [0.2, 0.4]
    made = (await api.post("/keys", json={"name": "shop", "scopes": ["infer"]})).json()
    await api.delete(f"/keys/{made['key']['id']}")
    entry = await newest()
    assert entry["action"] == "key.revoke"
    assert json.loads(entry["before"])["name"] == "shop"
    asked = (await api.post("/routes/triage/replays", json={"version": 2})).json()
    entry = await newest()
    assert (entry["action"], entry["subject"]) == ("replay.ask", asked["id"])
    for _ in range(2):
        await api.post(f"/routes/triage/replays/{asked['id']}/cancel")
    actions = [each["action"] for each in (await api.get("/audit")).json()[:2]]
    assert actions == ["replay.cancel", "replay.ask"]


async def test_a_key_that_is_revoked_meanwhile_stays_revoked(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    made = (await api.post("/keys", json={"name": "shop", "scopes": ["infer"]})).json()
    before = (await stores.credentials.list())[0]
    await stores.credentials.revoke(before.id, by="test")
    with pytest.raises(NotFoundError):
        await stores.credentials.change(made["key"]["id"], lambda key: key, by="test")
    assert await stores.credentials.list() == []


@pytest.mark.parametrize(
    ("limits", "param"),
    [
        ({"requests_per_minute": 0}, "limits.requests_per_minute"),
        ({"concurrency": -1}, "limits.concurrency"),
        ({"monthly_tokens": 10**15}, "limits.monthly_tokens"),
        ({"request_per_minute": 60}, "limits.request_per_minute"),
    ],
)
async def test_a_limit_that_cannot_be_is_refused_by_its_name(
    api: httpx2.AsyncClient, limits: dict[str, int], param: str
) -> None:
    body = {"name": "shop", "scopes": ["infer"], "limits": limits}
    refused = await api.post("/keys", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


async def test_runs_are_queued_followed_and_cancelled(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    run = (await api.post("/runs", json={"route": "triage", "config": {"epochs": 1}})).json()
    assert run["parent"] == "triage@1"
    assert run["state"] == "queued"
    await stores.runs.note(run["id"], RunEvent("training", "step 1", AT, done=1, total=2))
    assert (await api.post(f"/runs/{run['id']}/cancel")).json()["state"] == "cancelled"
    async with api.stream("GET", f"/runs/{run['id']}/events") as response:
        text = "".join([part async for part in response.aiter_text()])
    assert response.headers["content-type"].startswith("text/event-stream")
    progress, end = text.strip().split("\n\n")
    assert "event: progress" in progress
    assert '"message":"step 1"' in progress
    assert end.startswith("event: end")
    assert (await api.post(f"/runs/{run['id']}/cancel")).status_code == 409
    assert (await api.get("/runs/none/events")).status_code == 404
    assert (await api.post("/runs", json={"route": "none"})).status_code == 404


async def test_strangers_and_lost_paths_get_errors_in_openais_shape(
    api: httpx2.AsyncClient,
) -> None:
    unknown = await api.get("/routes", headers={"authorization": "Bearer wrong"})
    assert unknown.status_code == 401
    assert unknown.json()["error"]["code"] == "invalid_api_key"
    assert (await api.get("/routes", headers={"authorization": ""})).status_code == 401
    assert (await api.get("/nothing")).json()["error"]["code"] == "not_found"
    assert (await api.delete("/routes")).status_code == 405
    broken = await api.post("/keys", content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400
    assert "error" in broken.json()


async def test_a_body_has_a_bound_announced_or_not(api: httpx2.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(6):
            yield b" " * 2**20

    announced = await api.post("/keys", content=b" " * 6 * 2**20)
    assert announced.status_code == 413
    assert announced.json()["error"]["code"] == "body_too_large"
    headers = {"content-type": "application/json"}
    assert (await api.post("/keys", content=pieces(), headers=headers)).status_code == 400


async def test_the_bootstrap_key_is_not_revoked_here(api: httpx2.AsyncClient) -> None:
    assert (await api.delete("/keys/bootstrap")).status_code == 409


async def test_no_door_of_the_api_is_open_to_strangers(api: httpx2.AsyncClient) -> None:
    description = (await api.get("http://control/openapi.json")).json()
    doors = [
        (method, path)
        for path, methods in description["paths"].items()
        for method in methods
        if path.startswith("/api/")
    ]
    assert len(doors) > 30
    for method, path in doors:
        place = re.sub(r"{verb}", "hold", path)
        place = re.sub(r"{\w+}", "x", place)
        answer = await api.request(
            method, f"http://control{place}", json={}, headers={"authorization": ""}
        )
        assert answer.status_code == 401, (method, path)


async def test_health_readiness_and_metrics(stores: Stores) -> None:
    registry = CollectorRegistry()
    Counter("sluice_test", "a test", registry=registry).inc()
    transport = httpx2.ASGITransport(create_app(stores, settings(), registry=registry))
    async with httpx2.AsyncClient(transport=transport, base_url="http://control") as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        assert "sluice_test_total 1.0" in (await client.get("/metrics")).text
        docs = await client.get("/docs")
        assert "/api/v1/cases/claim" in docs.text
        assert "http://" not in docs.text
        assert "https://" not in docs.text


async def test_without_the_store_writes_answer_503_and_health_stays_green() -> None:
    async with open_stores("redis://127.0.0.1:1/0") as gone:
        transport = httpx2.ASGITransport(create_app(gone, settings(), bootstrap_key=ADMIN))
        async with httpx2.AsyncClient(transport=transport, base_url="http://control") as client:
            headers = {"authorization": f"Bearer {ADMIN}"}
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/readyz")).status_code == 503
            refused = await client.post(
                "/api/v1/routes/triage/rollout/rollback", json={"reason": "now"}, headers=headers
            )
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert refused.json()["error"]["code"] == "store_unavailable"


async def test_a_key_for_one_route_sees_one_route(api: httpx2.AsyncClient, stores: Stores) -> None:
    await api.put("/routes/other", json={"engine": "main"})
    mine = await add_key(stores, "mine", "train", routes=frozenset({"other"}))
    rows = (await api.get("/routes", headers=mine)).json()
    assert [row["route"]["name"] for row in rows] == ["other"]
    assert (await api.get(f"/versions/{ADAPTED}", headers=mine)).status_code == 403
    body = {"route": "triage"}
    assert (await api.post("/runs", json=body, headers=mine)).status_code == 403
    assert (await api.post("/versions", json=body, headers=mine)).status_code == 403
