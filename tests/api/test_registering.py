"""An adapter is registered from a directory or a URL, as what it is said to be, and only if the
route's engine can serve it."""

import asyncio
import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fsspec
import httpx2
import numpy as np
import pytest
from safetensors.numpy import save_file

from rollout.adapters import CONFIG_FILE, WEIGHTS_FILE
from rollout.api.app import create_app
from rollout.artifacts import describe
from rollout.engines import Residency
from rollout.settings import EngineSection, Settings
from rollout.stores import Stores
from tests.api.house import ADAPTED, ADMIN, REPLICA

pytestmark = pytest.mark.anyio
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
async def api(stores: Stores, tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """The control API of an engine that serves revision r2 of its base."""
    engine = EngineSection(name="main", urls=(REPLICA,), base="tiny", base_revision="r2")
    settings = Settings(data_dir=tmp_path / "data", engines=(engine,))
    transport = httpx2.ASGITransport(create_app(stores, settings, bootstrap_key=ADMIN))
    async with httpx2.AsyncClient(
        transport=transport,
        base_url="http://control/api/v1",
        headers={"authorization": f"Bearer {ADMIN}"},
    ) as client:
        yield client


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"r": 8, "lora_alpha": 16, "peft_type": "LORA", "target_modules": ["q_proj"]}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    weights = {
        f"base_model.model.{MODULE}.lora_A.weight": np.ones((8, 4), np.float32),
        f"base_model.model.{MODULE}.lora_B.weight": np.ones((4, 8), np.float32),
    }
    save_file(weights, folder / WEIGHTS_FILE)
    return folder


def say(adapter: Path, **config: Any) -> None:
    path = adapter / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def put_online(adapter: Path) -> str:
    """Its URL."""
    url = f"memory://{uuid.uuid4().hex}"
    for path in adapter.iterdir():
        with fsspec.open(f"{url}/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    return url


async def register(api: httpx2.AsyncClient, **body: Any) -> httpx2.Response:
    return await api.post("/versions", json={"route": "triage", **body})


async def refusal(api: httpx2.AsyncClient, **body: Any) -> tuple[int, str]:
    answer = await register(api, **body)
    return answer.status_code, answer.json()["error"]["param"]


async def test_from_a_url_it_is_the_same_version_as_from_a_directory(
    api: httpx2.AsyncClient, adapter: Path, tmp_path: Path
) -> None:
    from_url = await register(api, adapter_url=put_online(adapter))
    from_folder = await register(api, adapter_path=str(adapter))
    assert (from_url.status_code, from_folder.status_code) == (201, 201)
    first, second = from_url.json()["version"], from_folder.json()["version"]
    assert first["adapter"] == second["adapter"] == describe(adapter).digest
    assert Path(first["adapter_path"], WEIGHTS_FILE).is_file()
    assert first["base_revision"] == "r2"
    assert not [path for path in (tmp_path / "data").iterdir() if path.name.startswith("fetch-")]


async def test_it_must_be_the_one_that_was_asked_for(
    api: httpx2.AsyncClient, adapter: Path
) -> None:
    url = put_online(adapter)
    weights = hashlib.sha256((adapter / WEIGHTS_FILE).read_bytes()).hexdigest()
    assert (await register(api, adapter_url=url, sha256=weights)).status_code == 201
    digest = describe(adapter).digest
    assert (await register(api, adapter_path=str(adapter), sha256=digest)).status_code == 201
    assert await refusal(api, adapter_url=url, sha256="0" * 64) == (400, "sha256")
    assert await refusal(api, adapter_url=url, sha256="short") == (400, "sha256")
    assert await refusal(api, adapter_url="http://127.0.0.1:1/x") == (400, "sha256")
    assert await refusal(api, adapter_url=url, adapter_path="/x") == (400, "adapter_url")
    assert await refusal(api, adapter_url="memory://nowhere") == (400, "adapter_url")


async def test_at_most_so_many_are_fetched_at_once(api: httpx2.AsyncClient, adapter: Path) -> None:
    url = put_online(adapter)
    answers = await asyncio.gather(*(register(api, adapter_url=url) for _ in range(6)))
    # Who comes first is up to the store, which each of them asks before.
    statuses = {answer.status_code for answer in answers}
    assert 201 in statuses
    assert statuses <= {201, 503}
    assert (await register(api, adapter_url=url)).status_code == 201


async def test_it_must_be_made_for_what_the_engine_serves(
    api: httpx2.AsyncClient, stores: Stores, adapter: Path, tmp_path: Path
) -> None:
    async def engine_has(root: str) -> None:
        await stores.catalog.put_residency([Residency("main", REPLICA, True, root=root)])

    def base_with(shape: tuple[int, int], module: str = MODULE) -> str:
        folder = tmp_path / uuid.uuid4().hex
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({f"{module}.weight": np.ones(shape, np.float32)}, folder / "model.safetensors")
        return str(folder)

    path = str(adapter)
    await engine_has(base_with((4, 6)))
    assert await refusal(api, adapter_path=path) == (422, MODULE)
    await engine_has(base_with((4, 4), "model.layers.0.mlp.up_proj"))
    assert await refusal(api, adapter_path=path) == (422, MODULE)
    await engine_has("/not/readable/here")
    assert (await register(api, adapter_path=path)).status_code == 201
    await engine_has(base_with((4, 4), MODULE.replace("model.", "model.language_model.")))
    assert (await register(api, adapter_path=path)).status_code == 201
    await engine_has("org/Small")
    say(adapter, base_model_name_or_path="org/Large")
    assert await refusal(api, adapter_path=path) == (422, "base_model_name_or_path")
    say(adapter, base_model_name_or_path="/a/directory")
    assert (await register(api, adapter_path=path)).status_code == 201
    say(adapter, revision="r1")
    assert await refusal(api, adapter_path=path) == (422, "revision")
    say(adapter, revision="r2", r=64)
    assert await refusal(api, adapter_path=path) == (422, "r")


async def test_why_it_is_not_resident_is_told(api: httpx2.AsyncClient, stores: Stores) -> None:
    served_name = (await api.get(f"/versions/{ADAPTED}")).json()["served_name"]
    why = {served_name: "rank 64 > max_lora_rank 16"}
    await stores.catalog.put_residency(
        [Residency("main", REPLICA, True, frozenset({"tiny"}), missing=why)]
    )
    version = (await api.get(f"/versions/{ADAPTED}")).json()
    assert version["missing"] == {REPLICA: "rank 64 > max_lora_rank 16"}
    (engine,) = (await api.get("/engines")).json()
    assert engine["replicas"][0]["missing"] == {ADAPTED: "rank 64 > max_lora_rank 16"}
    proposal = {"version": ADAPTED, "reason": "try"}
    await api.post("/routes/triage/rollout/propose", json=proposal)
    refused = await api.post("/routes/triage/rollout/canary", json={"percent": 5, "reason": "x"})
    assert refused.status_code == 503
    said = f"{ADAPTED} is not resident yet: replica {REPLICA}: rank 64 > max_lora_rank 16"
    assert refused.json()["error"]["message"] == said
    placements = (await api.get("/routes/triage/rollout")).json()["placements"]
    assert placements[ADAPTED]["missing"] == {REPLICA: "rank 64 > max_lora_rank 16"}
    await stores.catalog.put_residency(
        [Residency("main", "http://other", True, frozenset({served_name}))]
    )
    body = {"percent": 5, "reason": "on one of them", "force": True}
    assert (await api.post("/routes/triage/rollout/canary", json=body)).status_code == 200
    (last, *_) = (await api.get("/routes/triage/history")).json()
    assert last["event"]["reason"] == f"on one of them (forced: not resident on {REPLICA})"
