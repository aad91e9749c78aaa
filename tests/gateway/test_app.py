"""The surface of the data plane, as clients see it."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from rollout.credentials import ApiKey, digest_secret
from rollout.versions import Prompt, Version
from tests.gateway.serving import (
    AT,
    MESSAGES,
    RunningGateway,
    catalog,
    serving,
    settings,
    until,
)
from tests.stub_engine import Reply, StubEngine

pytestmark = pytest.mark.anyio
ADAPTER = "cd" * 32


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base", any_model=True) as engine:
        yield engine


@pytest.fixture
async def gateway(engine: StubEngine, tmp_path: Path) -> AsyncIterator[RunningGateway]:
    known = catalog(engine.url, versions=[Version("r", 3, "main", "base", AT)])
    async with serving(settings(tmp_path, engine.url), known) as running:
        yield running


async def test_the_official_client_chats(gateway: RunningGateway, engine: StubEngine) -> None:
    async with gateway.client() as client:
        raw = await client.chat.completions.with_raw_response.create(
            model="r",
            messages=[{"role": "user", "content": "Hi"}],
            extra_headers={"x-request-id": "mine-1"},
        )
    answer = raw.parse()
    assert answer.choices[0].message.content == "The stub says yes."
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.headers["x-sluice-route"] == "r"
    assert raw.headers["x-sluice-version"] == "r@1"
    assert raw.headers["x-sluice-arm"] == "stable"
    assert "x-sluice-fallback" not in raw.headers
    received = engine.inference_requests[0]
    assert received.json()["model"] == "base"
    assert received.header("x-request-id") == "mine-1"
    assert received.header("authorization") is None


async def test_the_official_client_streams(gateway: RunningGateway) -> None:
    async with gateway.client() as client:
        stream = await client.chat.completions.create(
            model="r", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "The stub says yes."
    assert all(chunk.usage is None for chunk in chunks)


async def test_usage_on_a_stream_comes_where_it_is_asked_for(gateway: RunningGateway) -> None:
    async with gateway.client() as client:
        stream = await client.chat.completions.create(
            model="r",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None


async def test_every_endpoint_of_inference_answers(gateway: RunningGateway) -> None:
    async with gateway.client() as client:
        completion = await client.completions.create(model="r", prompt="Hi")
        embedding = await client.embeddings.create(model="r", input="Hi", encoding_format="float")
        response = await client.responses.create(model="r", input="Hi")
    assert completion.choices[0].text == "The stub says yes."
    assert embedding.data[0].embedding == [0.6, 0.8]
    assert response.output_text == "The stub says yes."


async def test_the_answers_bytes_are_the_engines(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    odd = b'{ "choices" : [ ],\n "weird": 1.50, "usage": {"prompt_tokens": 1} }'
    engine.script(Reply(body=odd, headers={"x-of-the-engine": "kept"}))
    answer = await gateway.ask()
    assert answer.body == odd
    assert answer.headers["x-of-the-engine"] == "kept"


async def test_the_request_reaches_the_engine_byte_for_byte(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    body = b'{ "x":{"model":"y"},  "model" : "r", "seed": 1.0e0, "messages":[] }'
    await gateway.send(body=body, headers={"x-own": "1", "cookie": "a=b", "te": "trailers"})
    received = engine.inference_requests[0]
    assert received.body == body.replace(b'"model" : "r"', b'"model" : "base"')
    assert received.header("x-own") == "1"
    assert received.header("cookie") is None
    assert received.header("te") is None


async def test_headers_that_connection_names_stay_on_this_hop(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    headers = {"connection": "keep-alive, x-hop", "x-hop": "1", "x-end": "1", "x-request-id": "me"}
    await gateway.ask(**headers)
    received = engine.inference_requests[0]
    assert received.header("x-hop") is None
    assert received.header("x-end") == "1"
    assert received.header("x-request-id") == "me"


async def test_a_pinned_version_answers_as_itself(gateway: RunningGateway) -> None:
    answer = await gateway.ask("r@3")
    assert answer.status == 200
    assert answer.headers["x-sluice-version"] == "r@3"
    assert answer.headers["x-sluice-arm"] == "pinned"


async def test_routes_and_their_versions_are_listed(gateway: RunningGateway) -> None:
    async with gateway.client() as client:
        listed = [model.id async for model in client.models.list()]
        one = await client.models.retrieve("r@3")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("r@9")
    assert listed == ["r", "r@1", "r@3"]
    assert one.id == "r@3"
    assert caught.value.code == "model_not_found"


async def test_a_bad_key_is_an_authentication_error(gateway: RunningGateway) -> None:
    async with gateway.client("sk-wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(model="r", messages=[])
    assert caught.value.code == "invalid_api_key"
    assert (await gateway.send(key=None, body={"model": "r"})).status == 401
    basic = await gateway.send(key=None, headers={"authorization": "Basic abc"}, body={})
    assert basic.status == 401


async def test_an_unknown_model_is_a_404_with_its_param(gateway: RunningGateway) -> None:
    async with gateway.client() as client:
        for model in ("nowhere", "nowhere@1", "r@9"):
            with pytest.raises(openai.NotFoundError) as caught:
                await client.chat.completions.create(model=model, messages=[])
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="r@new", messages=[])


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"model":"r","model":"x"}', b"\xff"])
async def test_what_is_no_request_is_a_400(gateway: RunningGateway, body: bytes) -> None:
    answer = await gateway.send(body=body)
    assert answer.status == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"]


async def test_every_answer_has_the_name_of_its_request(gateway: RunningGateway) -> None:
    for path, status in (("/v1/models", 200), ("/v1/models/r", 200), ("/v1/models/nobody", 404)):
        named = await gateway.send("GET", path, headers={"x-request-id": "mine-1"})
        assert (named.status, named.headers["x-request-id"]) == (status, "mine-1")
        assert (await gateway.send("GET", path)).headers["x-request-id"]
    hostile = await gateway.send("GET", "/v1/models", headers={"x-request-id": "a b"})
    assert hostile.headers["x-request-id"] != "a b"


async def test_unknown_paths_and_methods_are_clear(gateway: RunningGateway) -> None:
    assert (await gateway.send("GET", "/v1/nothing")).status == 404
    assert (await gateway.send("GET", "/v1/chat/completions")).status == 405
    assert (await gateway.send("POST", "/v1/models", {})).status == 405
    assert (await gateway.send("POST", "/v1/nothing", {})).status == 404


async def test_a_body_over_the_limit_is_a_413(engine: StubEngine, tmp_path: Path) -> None:
    config = settings(tmp_path, engine.url, maximum_body_bytes=1000)
    async with serving(config, catalog(engine.url)) as gateway:
        assert (await gateway.send(body={"model": "r", "x": "y" * 1000})).status == 413
        assert (await gateway.send(body={"model": "r", "x": "y" * 100_000})).status == 413
        assert (await gateway.send(body={"model": "r", "x": "y" * 900})).status == 200


async def test_too_many_headers_are_refused(gateway: RunningGateway) -> None:
    answer = await gateway.ask(**{f"x-{number}": "1" for number in range(300)})
    assert answer.status == 431


async def test_a_version_that_no_engine_serves_is_a_503(engine: StubEngine, tmp_path: Path) -> None:
    missing = Version("r", 2, "main", "base", AT, adapter=ADAPTER)
    known = replace(catalog(engine.url, versions=[missing]), residency={})
    async with serving(settings(tmp_path, engine.url), known) as gateway:
        answer = await gateway.ask("r@2")
        assert answer.status == 503
        assert answer.json()["error"]["code"] == "version_not_resident"
        assert answer.headers["retry-after"] == "1"


async def test_a_key_may_use_only_its_routes(engine: StubEngine, tmp_path: Path) -> None:
    narrow = ApiKey("k2", "narrow", digest_secret("sk-n"), frozenset({"infer"}), AT, frozenset())
    labeler = ApiKey("k3", "labeler", digest_secret("sk-l"), frozenset({"label"}), AT)
    known = catalog(engine.url, keys=[narrow, labeler])
    async with serving(settings(tmp_path, engine.url), known) as gateway:
        body = {"model": "r", "messages": MESSAGES}
        assert (await gateway.send(body=body, key="sk-n")).status == 403
        assert (await gateway.send(body=body, key="sk-l")).status == 403
        models = await gateway.send("GET", "/v1/models", key="sk-n")
        assert models.json()["data"] == []


async def test_the_bootstrap_key_is_always_good(
    engine: StubEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_BOOTSTRAP_KEY", "sk-boot")
    known = catalog(engine.url, keys=[])
    async with serving(settings(tmp_path, engine.url), known) as gateway:
        assert (await gateway.send(body={"model": "r"}, key="sk-boot")).status == 200


async def test_a_version_with_a_prompt_brings_it_along(engine: StubEngine, tmp_path: Path) -> None:
    prompt = Prompt(({"role": "system", "content": "Be brief."},))
    known = catalog(engine.url, versions=[Version("r", 2, "main", "base", AT, prompt=prompt)])
    async with serving(settings(tmp_path, engine.url), known) as gateway:
        assert (await gateway.ask("r@2")).status == 200
    messages = engine.inference_requests[0].json()["messages"]
    assert messages == [{"role": "system", "content": "Be brief."}, *MESSAGES]


async def test_an_engines_own_key_is_sent_to_it(tmp_path: Path) -> None:
    async with StubEngine(base="base", api_key="sk-engine") as engine:
        config = settings(tmp_path, engine.url)
        section = config.engines[0].model_copy(update={"api_key": "sk-engine"})
        config = config.model_copy(update={"engines": (section,)})
        async with serving(config, catalog(engine.url)) as gateway:
            assert (await gateway.ask()).status == 200


async def test_without_store_and_file_nothing_is_served_but_health(tmp_path: Path) -> None:
    async with serving(settings(tmp_path, "http://127.0.0.1:9")) as gateway:
        assert (await gateway.send("GET", "/healthz", key=None)).status == 200
        assert (await gateway.send("GET", "/readyz", key=None)).status == 503
        answer = await gateway.ask()
        assert answer.status == 503
        assert answer.json()["error"]["code"] == "not_ready"


async def test_with_a_file_it_is_ready_without_the_store(gateway: RunningGateway) -> None:
    ready = await gateway.send("GET", "/readyz", key=None)
    assert (ready.status, ready.json()["revision"]) == (200, 1)


async def test_metrics_count_by_configured_names_only(gateway: RunningGateway) -> None:
    await gateway.ask()
    await gateway.ask("made-up-by-a-client")
    text = (await gateway.send("GET", "/metrics", key=None)).body.decode()
    assert 'sluice_requests_total{arm="stable",code="200",route="r",version="r@1"} 1.0' in text
    assert 'sluice_requests_total{arm="",code="404",route="",version=""} 1.0' in text
    assert 'sluice_tokens_total{kind="completion",route="r"} 4.0' in text
    assert "sluice_store_up 0.0" in text
    assert "made-up" not in text


async def test_draining_lets_a_stream_finish_and_turns_readiness_red(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    gate = asyncio.Event()
    engine.script(Reply(hold_stream=gate))
    async with gateway.client() as client:
        stream = await client.chat.completions.create(
            model="r", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        first = await anext(aiter(stream))
        gateway.server.handle_exit(15, None)
        ready = await gateway.send("GET", "/readyz", key=None)
        assert (ready.status, ready.json()["status"]) == (503, "draining")
        late = await gateway.ask()
        assert (late.status, late.headers["connection"]) == (200, "close")
        gate.set()
        rest = [chunk async for chunk in stream]
    assert first.choices
    assert rest[-1].choices[0].finish_reason == "stop"
    await until(lambda: gateway.server.should_exit, "the drained gateway to end")


async def test_over_the_limit_of_requests_the_next_is_refused(
    engine: StubEngine, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    engine.script(Reply(hold_headers=gate))
    config = settings(tmp_path, engine.url, maximum_inflight=1)
    async with serving(config, catalog(engine.url)) as gateway:
        first = asyncio.create_task(gateway.ask())
        await engine.wait_for_requests(1)
        # The one that is refused counts while it is refused, so the limit is checked before it.
        answer = await gateway.ask()
        assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
        gate.set()
        assert (await first).status == 200


def test_the_shapes_of_errors_are_openais() -> None:
    from gateway.errors import ModelNotFoundError, error_body

    error = json.loads(error_body(ModelNotFoundError("no", param="model")))["error"]
    assert error == {
        "message": "no",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
