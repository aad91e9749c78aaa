"""Suites and reports over HTTP, with a trainer that runs beside and a gateway that answers."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rollout.stores import Stores
from tests.api.house import ADAPTED, add_key, make_resident, settings
from tests.trainer.answering import answering
from tests.trainer.colours import right
from trainer.settings import TrainerSettings
from trainer.worker import Worker

pytestmark = pytest.mark.anyio

SCORERS = {"scorers": [{"kind": "exact"}, {"kind": "similarity"}]}


def content(count: int = 12, scorers: object = SCORERS, start: int = 0) -> bytes:
    colours = {"red": "warm", "blue": "cold", "green": "mild"}
    lines = [json.dumps(scorers)]
    for number in range(start, start + count):
        colour = list(colours)[number % 3]
        asked = [{"role": "user", "content": f"thing {number} is {colour}"}]
        row = {"id": number, "messages": asked, "gold": colours[colour], "tags": [colour]}
        lines.append(json.dumps(row))
    return "\n".join(lines).encode()


async def add(api: httpx2.AsyncClient, body: bytes, **params: Any) -> httpx2.Response:
    return await api.post("/suites", params={"route": "triage", **params}, content=body)


@pytest.fixture
async def trainer(stores: Stores, tmp_path: Path) -> AsyncIterator[None]:
    await make_resident(stores)
    async with answering(lambda body: right(body) if body["model"] == ADAPTED else "warm") as asked:
        here = settings().model_copy(update={"data_dir": tmp_path})
        own = TrainerSettings(poll_seconds=0.05, gateway_url=asked.url, key="key", load_seconds=60)
        stopping = asyncio.Event()
        serving = asyncio.create_task(Worker(stores, here, own).serve(stopping))
        try:
            yield
        finally:
            stopping.set()
            await serving


async def ended(api: httpx2.AsyncClient, run: dict[str, Any]) -> dict[str, Any]:
    async with asyncio.timeout(120):
        while True:
            found: dict[str, Any] = (await api.get(f"/runs/{run['id']}")).json()
            if found["state"] in ("evaluated", "failed", "refused"):
                return found
            await asyncio.sleep(0.05)


@pytest.mark.usefixtures("trainer")
async def test_a_version_is_evaluated_on_a_registered_suite_and_shown(
    api: httpx2.AsyncClient,
) -> None:
    suite = (await add(api, content(30), note="first")).json()
    assert suite["tags"] == {"red": 10, "blue": 10, "green": 10}

    asked = await api.post("/reports", json={"version": ADAPTED, "suite": suite["digest"][:12]})
    assert asked.status_code == 202
    run = await ended(api, asked.json())
    assert (run["kind"], run["state"], run["parent"]) == ("evaluation", "evaluated", "triage@1")

    report = (await api.get(f"/reports/{run['report'][:12]}")).json()
    assert (report["id"], report["outcome"], report["metric"]) == (run["report"], "pass", "exact")
    assert [each["way"] for each in report["scores"]] == ["version", "parent"]
    assert report["verdicts"][0]["gate"] == "better"
    for params, found in (({"version": ADAPTED}, 1), ({"version": "triage@1"}, 0)):
        assert len((await api.get("/reports", params=params)).json()) == found
    rows = (await api.get(f"/reports/{report['id']}/rows")).json()
    assert [each["change"] for each in rows] == ["gained"] * 20 + ["same"] * 10
    assert (rows[0]["answer"], rows[0]["parent_answer"]) == ("cold", "warm")
    standing = (await api.get(f"/suites/{suite['digest']}")).json()
    assert (standing["judged"], standing["allowed"]) == (1, 12)
    assert standing["looks"][0]["run"] == run["id"]


@pytest.mark.usefixtures("trainer")
async def test_an_evaluation_without_any_suite_ends_with_what_to_do(
    api: httpx2.AsyncClient,
) -> None:
    run = await ended(api, (await api.post("/reports", json={"version": ADAPTED})).json())
    assert run["state"] == "refused"
    assert "sluice suite add triage" in run["reason"]


async def test_the_same_rows_are_the_same_suite(api: httpx2.AsyncClient) -> None:
    first = await add(api, content())
    again = await add(api, content(), note="another word for it")

    assert first.status_code == again.status_code == 201
    assert first.json() == again.json()
    assert len((await api.get("/suites", params={"route": "triage"})).json()) == 1
    assert (await api.get(f"/suites/{first.json()['digest']}/rows")).content.count(b"\n") == 13
    moved = await add(api, content(), vault=True)
    assert moved.status_code == 409
    assert "never leaves or enters the vault" in moved.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "the first line has the scorers"),
        (b'{"id": 1}', "the first line has the scorers"),
        (b'{"scorers": [1]}', "no list of objects"),
        (b'{"scorers": [{"kind": "vibes"}]}\n', "there is no scorer 'vibes'"),
        (b'{"scorers": []}\n{"id": 1}', "line 1: `messages`"),
    ],
)
async def test_a_broken_suite_is_refused_with_what_is_wrong(
    api: httpx2.AsyncClient, body: bytes, why: str
) -> None:
    answer = await add(api, body)
    assert answer.status_code == 400
    assert why in answer.json()["error"]["message"]


async def test_code_takes_an_admin_and_another_route_another_key(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    trains = await add_key(stores, "trains", "train")
    elsewhere = await add_key(stores, "elsewhere", "train", routes=frozenset({"other"}))
    label = await add_key(stores, "labels", "label")
    code = {"scorers": [{"kind": "python", "code": "def grade(s, i): return 1"}]}

    async def tried(body: bytes, headers: dict[str, str]) -> int:
        answer = await api.post("/suites?route=triage", content=body, headers=headers)
        return answer.status_code

    assert await tried(content(scorers=code), trains) == 403
    assert await tried(content(), trains) == 201
    assert (await add(api, content(scorers=code))).status_code == 201
    assert await tried(content(), elsewhere) == 403
    asked = await api.post("/reports", json={"version": ADAPTED}, headers=elsewhere)
    assert asked.status_code == 403
    assert (await api.get("/suites", headers=label)).status_code == 200
    assert await tried(content(), label) == 403


async def test_a_vault_is_opened_for_a_promotion_alone_and_once(
    api: httpx2.AsyncClient, stores: Stores
) -> None:
    vault = (await add(api, content(), vault=True)).json()["digest"]
    wish = {"version": ADAPTED, "suite": vault}

    async def refused(**more: Any) -> str:
        answer = await api.post("/reports", json={**wish, **more})
        assert answer.status_code == 409
        return str(answer.json()["error"]["message"])

    assert "evaluate on an open suite" in await refused()
    assert "say why" in await refused(promotion=True)
    assert "is not on trial" in await refused(promotion=True, reason="to all?")
    proposed = {"version": ADAPTED, "reason": "try", "force": True}
    moved = await api.post("/routes/triage/rollout/propose", json=proposed)
    assert moved.status_code == 200, moved.text
    opened = await api.post("/reports", json={**wish, "promotion": True, "reason": "to all?"})
    assert opened.status_code == 202
    assert "a second look would be a second chance" in await refused(
        promotion=True, reason="once more"
    )
    assert "nobody reads its rows" in (await api.get(f"/suites/{vault}/rows")).text
    entries = [each for each in (await api.get("/audit")).json() if each["action"] == "suite.open"]
    assert [(each["reason"], ADAPTED in each["after"]) for each in entries] == [("to all?", True)]
    (look,) = await stores.suites.looks(vault)
    assert (look.version, look.purpose) == (ADAPTED, "promotion")


async def test_what_cannot_be_compared_is_refused(api: httpx2.AsyncClient) -> None:
    itself = await api.post("/reports", json={"version": "triage@1"})
    assert itself.status_code == 400
    assert "compared with itself" in itself.json()["error"]["message"]
    assert (await api.post("/reports", json={"version": "triage@9"})).status_code == 404
    assert (
        await api.post("/reports", json={"version": ADAPTED, "suite": "ffffff"})
    ).status_code == 404
    for number in range(11):
        asked = await api.post("/reports", json={"version": ADAPTED})
        assert asked.status_code == (202 if number < 10 else 409)
