"""From a client's request to a counted pair: every shape of answer, through gateway and shadow."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rollout.api.app import create_app
from rollout.assignment import bucket, unit_of
from rollout.credentials import ApiKey, digest_secret
from rollout.evidence import PairCounts
from rollout.routes import Comparator
from rollout.settings import Settings
from rollout.state import CanarySet
from tests.gateway.serving import MESSAGES, SECRET, RunningGateway, serving, settings
from tests.gateway.serving import until as until_true
from tests.gateway.shadowing import CHAT, NOW, Bed, made_bed, shadow, until
from tests.stub_engine import Received, Reply, is_inference

pytestmark = pytest.mark.anyio


@pytest.fixture
async def bed(redis_url: str) -> AsyncIterator[Bed]:
    async with made_bed(redis_url) as made:
        key = ApiKey("k1", "app", digest_secret(SECRET), frozenset({"infer"}), NOW)
        await made.stores.credentials.add(key, by="test")
        yield made


@asynccontextmanager
async def in_front(bed: Bed, folder: Path) -> AsyncIterator[RunningGateway]:
    async with serving(settings(folder, bed.engine.url, store=bed.url)) as gateway:
        snapshot = gateway.app._parts.snapshot  # type: ignore[union-attr]
        await until_true(lambda: "triage" in snapshot.view.lanes, "the route to be known")
        yield gateway


async def paired(bed: Bed, count: int = 1) -> PairCounts:
    async def are() -> bool:
        return (await bed.pairs()).total == count

    await until(are, "the pair")
    return await bed.pairs()


def stables(received: Received) -> bool:
    return is_inference(received) and received.json()["model"] == "base"


def call(arguments: Mapping[str, Any], place: int | None = None) -> dict[str, Any]:
    index = {} if place is None else {"index": place}
    return index | {
        "id": "call_1",
        "type": "function",
        "function": {"name": "find", "arguments": json.dumps(arguments)},
    }


def chunk(**delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def whole(**message: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": "stop"}
    return {"object": "chat.completion", "choices": [choice]}


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (CHAT, {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "Good or bad?"}),
        ("/v1/responses", {"input": "Good or bad?"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_same_text_agrees_however_it_came(
    bed: Bed, tmp_path: Path, path: str, asked: dict[str, Any], stream: bool
) -> None:
    await bed.update_route(capture=1.0)
    bed.engine.text = "The stub says yes."
    async with in_front(bed, tmp_path) as gateway, shadow(bed) as metrics:
        answered = await gateway.send(path=path, body={"model": "triage", "stream": stream} | asked)
        assert answered.status == 200
        assert await paired(bed) == PairCounts(agree=1)
    compared = metrics.registry.get_sample_value
    assert compared("sluice_shadow_compared_total", {"kind": "exact"}) == 1
    # The shadow asks whole, whatever the client did.
    assert [r.json().get("stream", False) for r in bed.engine.inference_requests] == [stream, False]


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ({"q": "lake", "n": 1}, {"n": 1.0, "q": "lake"}, PairCounts(agree=1)),
        ({"q": "lake"}, {"q": "sea"}, PairCounts(disagree=1)),
    ],
)
async def test_tool_calls_of_a_stream_are_compared_with_whole_ones(
    bed: Bed,
    tmp_path: Path,
    mine: dict[str, Any],
    theirs: dict[str, Any],
    expected: PairCounts,
) -> None:
    await bed.update_route(capture=1.0)
    first = call(mine, 0)
    text = first["function"]["arguments"]
    # The arguments come in pieces, as engines send them.
    first["function"]["arguments"] = text[:5]
    rest = {"index": 0, "function": {"arguments": text[5:]}}
    chunks = [chunk(tool_calls=[first]), chunk(tool_calls=[rest]), b"data: [DONE]\n\n"]
    bed.engine.script(Reply(chunks=chunks), where=stables)
    bed.engine.text = lambda _: whole(content=None, tool_calls=[call(theirs)])
    body = {"model": "triage", "messages": MESSAGES, "stream": True, "tools": [{}]}
    async with in_front(bed, tmp_path) as gateway, shadow(bed):
        assert (await gateway.send(body=body)).status == 200
        assert await paired(bed) == expected
    ((_, asked),) = [(r, r.json()) for r in bed.engine.inference_requests if not stables(r)]
    assert asked["tools"] == [{}]


@pytest.mark.parametrize(
    ("comparator", "candidate", "expected"),
    [
        ("json", '{"b": [1, 2], "a": 1.0}', PairCounts(agree=1)),
        ("text", '{"b": [1, 2], "a": 1.0}', PairCounts(disagree=1)),
        ("json", '{"a": 2, "b": [1, 2]}', PairCounts(disagree=1)),
        ("json", "Sure! Here it is", PairCounts(disagree=1, losses=1, only_stable_valid=1)),
        ("json", '{"b": []}', PairCounts(disagree=1, losses=1, only_stable_valid=1)),
    ],
)
async def test_structured_outputs_are_compared_by_field_and_schema(
    bed: Bed, tmp_path: Path, comparator: Comparator, candidate: str, expected: PairCounts
) -> None:
    schema = None
    if comparator == "json":
        schema = json.dumps({"type": "object", "required": ["a"]})
    await bed.update_route(capture=1.0, comparator=comparator, schema=schema)
    stable = '{"a": 1, "b": [1, 2]}'
    bed.engine.text = lambda request: stable if request["model"] == "base" else candidate
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    body = {"model": "triage", "messages": MESSAGES, "stream": True, "response_format": wanted}
    async with in_front(bed, tmp_path) as gateway, shadow(bed):
        assert (await gateway.send(body=body)).status == 200
        assert await paired(bed) == expected
    assert all(r.json()["response_format"] == wanted for r in bed.engine.inference_requests)


async def test_nobody_outside_can_be_the_shadow(bed: Bed, tmp_path: Path) -> None:
    await bed.update_route(capture=1.0)
    disguises = {
        "x-sluice-shadow": "1",
        "x-sluice-arm": "shadow",
        "x-sluice-trial": bed.trial.id,
        "x-sluice-version": bed.candidate.name,
        "x-sluice-route": "triage",
        "x-sluice-fallback": "1",
        "user-agent": "sluice-shadow",
    }
    async with in_front(bed, tmp_path) as gateway, shadow(bed, priority=100):
        for name, value in disguises.items():
            body = {"model": "triage", "messages": MESSAGES, "priority": 100}
            answered = await gateway.send(body=body, headers={name: value})
            # It is a client like any other: served, counted and captured.
            assert answered.headers["x-sluice-arm"] == "stable"
            assert answered.headers["x-sluice-version"] == "triage@1"
        await paired(bed, len(disguises))
        text = (await gateway.send("GET", "/metrics", key=None)).body.decode()
    lines = [line for line in text.splitlines() if line.startswith("sluice_requests_total{")]
    # What the shadow asked was asked of the engine alone, with no client's name or key on it.
    assert sum(float(line.rpartition(" ")[2]) for line in lines) == len(disguises)
    evidence = await bed.stores.evidence.read("triage", bed.trial.id)
    assert (evidence.stable.requests, evidence.candidate.requests) == (len(disguises), 0)
    own = [r for r in bed.engine.inference_requests if not stables(r)]
    assert len(own) == len(disguises)
    for received in own:
        names = {name for name, _ in received.headers}
        assert names == {"host", "content-length", "content-type"}


async def test_what_the_shadow_asks_is_never_captured(bed: Bed, tmp_path: Path) -> None:
    await bed.update_route(capture=1.0, self_sample=1.0)
    async with in_front(bed, tmp_path) as gateway, shadow(bed):
        await gateway.ask("triage", **{"x-request-id": "once"})
        await paired(bed)
        await bed.settled()
    # One of the client's, one of the candidate, one of stable again: and nothing follows from them.
    assert len(bed.engine.inference_requests) == 3
    assert await bed.stores.captures.waiting() == 0
    exchange = await bed.stores.captures.find("triage", "once")
    assert exchange is not None
    evidence = await bed.stores.evidence.read("triage", bed.trial.id)
    assert (evidence.pairs.total, evidence.floor.total) == (1, 1)


async def test_an_answer_that_nobody_captured_is_explained_by_who_gave_it(
    bed: Bed, tmp_path: Path
) -> None:
    await bed.update_route(capture=0.0)
    rollout = await bed.stores.rollouts.get("triage")
    await bed.stores.rollouts.commit(rollout, CanarySet(100, NOW, "ann", "all of it"))
    control = create_app(bed.stores, Settings(data_dir=tmp_path), bootstrap_key="sk-admin")
    async with (
        in_front(bed, tmp_path) as gateway,
        httpx2.AsyncClient(
            transport=httpx2.ASGITransport(control),
            base_url="http://control/api/v1",
            headers={"authorization": "Bearer sk-admin"},
        ) as api,
    ):
        snapshot = gateway.app._parts.snapshot  # type: ignore[union-attr]
        await until_true(lambda: weight_of(snapshot) == 100, "the canary to be known")
        await gateway.ask("triage", **{"x-request-id": "mine", "x-sluice-session": "anna"})
        found: dict[str, Any] = {}

        async def explained() -> bool:
            answer = await api.get("/routes/triage/explain", params={"request_id": "mine"})
            found.update(answer.json())
            return answer.status_code == 200

        await until(explained, "the gateway to say what it knows")
    unit = unit_of("k1", "anna")
    answered = found["answered"]
    assert (answered["source"], answered["arm"]) == ("gateway", "candidate")
    assert (answered["unit"], answered["trial"]) == (unit, bed.trial.id)
    assert answered["bucket"] == bucket(bed.trial.id, unit) * 100
    assert found["version"]["name"] == bed.candidate.name
    assert found["version"]["version"]["adapter"] == "ab" * 32
    assert found["commit"]["event"]["reason"] == "all of it"


def weight_of(snapshot: Any) -> float | None:
    trial = snapshot.view.lanes["triage"].trial
    return None if trial is None else trial.weight
