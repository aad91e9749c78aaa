"""Datasets over HTTP, built by a trainer that runs beside."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rollout.stores import Stores
from tests.api.house import add_key, settings
from tests.trainer.samples import labelled, sentences
from trainer.settings import TrainerSettings
from trainer.worker import Worker

pytestmark = pytest.mark.anyio


@pytest.fixture
async def trainer(stores: Stores, tmp_path: Path) -> AsyncIterator[None]:
    here = settings().model_copy(update={"data_dir": tmp_path})
    stopping = asyncio.Event()
    worker = Worker(stores, here, TrainerSettings(poll_seconds=0.05))
    serving = asyncio.create_task(worker.serve(stopping))
    try:
        yield
    finally:
        stopping.set()
        await serving


async def built(api: httpx2.AsyncClient, **config: Any) -> str:
    body = {"route": "triage", "config": config, "wait_seconds": 25}
    answer = await api.post("/datasets", json=body)
    assert answer.status_code == 202
    run = answer.json()
    assert (run["state"], run["kind"]) == ("built", "dataset")
    return str(run["dataset"])


@pytest.mark.usefixtures("trainer")
async def test_a_dataset_is_built_shown_compared_and_written_in_other_formats(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    rows = sentences(20)
    await stores.cases.put_labelled(rows[:10])
    before = await built(api)
    again = labelled(99, rows[0].case.messages[0]["content"], "warm")
    await stores.cases.put_labelled([*rows[10:], again])
    after = await built(api, heldout=0.3)

    listed = (await api.get("/datasets", params={"route": "triage"})).json()
    assert [each["digest"] for each in listed] == [after, before]
    manifest = (await api.get(f"/datasets/{after[:12]}/manifest")).json()
    assert (manifest["digest"], manifest["rows"]) == (after, 20)
    dropped = (await api.get(f"/datasets/{after}/dropped", params={"reason": "repeats"})).json()
    assert dropped == [{"case": "c00099", "reason": "repeats another", "kept": "c00000"}]
    changes = (await api.get(f"/datasets/{before}/diff", params={"after": after})).json()["changes"]
    assert [each["case"] for each in changes if each["kind"] == "added"] == [
        f"c{number:05d}" for number in range(10, 20)
    ]
    lines = (await api.get(f"/datasets/{after}")).content.splitlines()
    assert len(lines) == 20
    params = {"format": "openai-chat", "split": "train"}
    chats = (await api.get(f"/datasets/{after}", params=params)).content.splitlines()
    assert len(chats) == manifest["splits"]["train"]
    assert json.loads(chats[0])["messages"][-1]["role"] == "assistant"


@pytest.mark.usefixtures("trainer")
async def test_a_run_may_be_asked_to_train_on_a_dataset_of_its_route(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    await stores.cases.put_labelled(sentences(10))
    digest = await built(api)
    body = {"route": "triage", "dataset": digest[:10]}
    run = await api.post("/runs", json=body)
    assert run.status_code == 201
    assert run.json()["dataset"] == digest
    await api.put("/routes/another", json={"engine": "main"})
    refused = await api.post("/runs", json={**body, "route": "another"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dataset")
    assert (await api.post("/runs", json={**body, "dataset": "0" * 64})).status_code == 404


@pytest.mark.usefixtures("trainer")
async def test_a_file_is_brought_in(api: httpx2.AsyncClient) -> None:
    lines = [
        {"prompt": row.case.messages[0]["content"], "chosen": "yes", "rejected": f"no, {number}"}
        for number, row in enumerate(sentences(5))
    ]
    content = "\n".join(map(json.dumps, lines))
    params = {"route": "triage", "file": "pairs.jsonl", "heldout": "0", "wait_seconds": "25"}
    run = (await api.post("/datasets/import", params=params, content=content)).json()
    manifest = (await api.get(f"/datasets/{run['dataset']}/manifest")).json()
    assert (manifest["rows"], manifest["preferences"]) == (5, 5)
    assert manifest["source"] == "pairs.jsonl (trl-preference)"


async def test_a_broken_file_is_refused_with_its_line(api: httpx2.AsyncClient) -> None:
    content = b'{"messages": [{"role": "user", "content": "a"}]}'
    answer = await api.post("/datasets/import", params={"route": "triage"}, content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "line 1"
    assert (await api.get("/datasets")).json() == []
    nowhere = await api.post("/datasets/import", params={"route": "nope"}, content=b"{}")
    assert nowhere.status_code == 404


async def test_a_dataset_that_nobody_builds_is_told_as_it_is(api: httpx2.AsyncClient) -> None:
    body = {"route": "triage", "wait_seconds": 0.3}
    assert (await api.post("/datasets", json=body)).json()["state"] == "queued"
    for _ in range(9):
        assert (await api.post("/datasets", json={"route": "triage"})).status_code == 202
    assert (await api.post("/datasets", json={"route": "triage"})).status_code == 409


async def test_a_setting_that_is_none_is_refused(api: httpx2.AsyncClient) -> None:
    for config in ({"source": "0" * 64}, {"heldout": 2}, {"rank": 3}):
        answer = await api.post("/datasets", json={"route": "triage", "config": config})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == f"config.{next(iter(config))}"


async def test_rows_are_for_trainers_of_the_route(api: httpx2.AsyncClient, stores: Stores) -> None:
    other = await add_key(stores, "other", "train", routes=frozenset({"another"}))
    labeler = await add_key(stores, "labeler", "label")
    body = {"route": "triage"}
    assert (await api.post("/datasets", json=body, headers=other)).status_code == 403
    assert (await api.post("/datasets", json=body, headers=labeler)).status_code == 403
    params = {"route": "triage"}
    done = await api.post("/datasets/import", params=params, content=b"", headers=other)
    assert done.status_code == 403
    assert (await api.get("/datasets/" + "0" * 64)).status_code == 404
