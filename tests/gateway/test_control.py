"""Files and fine-tuning are the controller's; what only an engine knows is for pinned versions."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from gateway.control import controller_url
from gateway.settings import GatewaySettings
from gateway.wire import passes
from rollout.settings import ControllerSection
from rollout.versions import Prompt, Version
from tests.api.live import live_api
from tests.gateway.serving import AT, SECRET, RunningGateway, catalog, serving, settings, until
from tests.stub_engine import Received, Reply, StubEngine, at

pytestmark = pytest.mark.anyio


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base", any_model=True) as engine:
        yield engine


@pytest.fixture
async def controller() -> AsyncIterator[StubEngine]:
    """Anything that speaks HTTP and says what it got."""
    async with StubEngine() as controller:
        yield controller


@pytest.fixture
async def gateway(
    engine: StubEngine, controller: StubEngine, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    config = settings(tmp_path, engine.url, controller_url=f"{controller.url}/")
    prompt = Prompt(({"role": "system", "content": "Be brief."},))
    carrying = Version("r", 2, "main", "base", AT, prompt=prompt, sampling={"temperature": 0})
    async with serving(config, catalog(engine.url, versions=[carrying])) as running:
        yield running


async def test_the_controller_gets_what_the_client_sent(
    gateway: RunningGateway, controller: StubEngine
) -> None:
    reply = Reply(status=200, body=b'{"id":"file-1"}', headers={"x-of-the-controller": "1"})
    controller.script(reply, where=at("/v1/files/file-1"))
    answer = await gateway.send(
        "DELETE", "/v1/files/file-1?a=%20b", headers={"x-own": "1", "te": "trailers"}
    )
    assert (answer.status, answer.body) == (200, b'{"id":"file-1"}')
    assert answer.headers["x-of-the-controller"] == "1"
    (received,) = controller.requests
    assert (received.method, received.query, received.body) == ("DELETE", "a=%20b", b"")
    assert received.header("authorization") == f"Bearer {SECRET}"
    assert received.header("x-own") == "1"
    assert received.header("te") is None
    assert received.header("x-request-id")


async def test_the_official_client_uploads_a_file(
    gateway: RunningGateway, controller: StubEngine
) -> None:
    body = {"id": "file-1", "object": "file", "purpose": "fine-tune", "bytes": 3, "created_at": 1,
            "filename": "a.jsonl", "status": "processed"}  # fmt: skip
    controller.script(Reply(body=body), where=at("/v1/files"))
    content = b'{"messages":[]}\n' * 40_000
    async with gateway.client() as client:
        file = await client.files.create(file=("a.jsonl", content), purpose="fine-tune")
    assert file.id == "file-1"
    assert content in controller.requests[0].body


async def test_the_controllers_stream_passes_as_it_comes(
    gateway: RunningGateway, controller: StubEngine
) -> None:
    gate = asyncio.Event()
    path = "/v1/fine_tuning/jobs/1/events"
    reply = Reply(chunks=(b"data: 1\n\n", b"data: 2\n\n"), hold_stream=gate)
    controller.script(reply, where=at(path))
    reader, writer = await connect(gateway)
    writer.write(b"GET " + path.encode() + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert b"data: 1" in await reader.readuntil(b"data: 1\n\n")
    gate.set()
    assert b"data: 2" in await reader.read()
    writer.close()


async def test_an_upload_passes_as_it_comes(engine: StubEngine, tmp_path: Path) -> None:
    got, half = bytearray(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while b"second" not in got:
            got.extend(await reader.read(65536))
            if b"first" in got:
                half.set()
        writer.write(b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with (
        server,
        serving(settings(tmp_path, engine.url, controller_url=url), catalog(engine.url)) as gateway,
    ):
        reader, writer = await connect(gateway)
        writer.write(b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 11\r\n\r\nfirst")
        async with asyncio.timeout(10):
            await half.wait()
        writer.write(b"second")
        head = await reader.readuntil(b"ok")
        writer.close()
    assert head.startswith(b"HTTP/1.1 201")
    assert b"content-length: 11" in bytes(got)


async def test_a_client_that_goes_away_ends_the_controllers_stream(
    gateway: RunningGateway, controller: StubEngine
) -> None:
    path = "/v1/fine_tuning/jobs/1/events"
    reply = Reply(chunks=(b"data: 1\n\n", b"data: 2\n\n"), hold_stream=asyncio.Event())
    controller.script(reply, where=at(path))
    reader, writer = await connect(gateway)
    writer.write(b"GET " + path.encode() + b" HTTP/1.1\r\nhost: x\r\n\r\n")
    await reader.readuntil(b"data: 1\n\n")
    writer.close()
    await until(lambda: controller.requests[0].cancelled, "the stream to end")


async def test_a_controller_that_is_not_there_is_a_503(engine: StubEngine, tmp_path: Path) -> None:
    config = settings(tmp_path, engine.url, controller_url="http://127.0.0.1:9")
    async with serving(config, catalog(engine.url)) as gateway:
        answer = await gateway.send("GET", "/v1/files")
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert "the controller does not answer" in answer.json()["error"]["message"]


async def test_the_real_controller_says_what_it_does_not_have_yet(
    engine: StubEngine, tmp_path: Path, redis_url: str
) -> None:
    with live_api(redis_url) as api:
        config = settings(tmp_path, engine.url, controller_url=api.url)
        async with serving(config, catalog(engine.url)) as gateway, gateway.client() as client:
            with pytest.raises(openai.NotFoundError) as caught:
                await client.fine_tuning.jobs.retrieve("none")
    assert caught.value.code == "not_found"


@pytest.mark.parametrize(
    "path", ["/v1/files/../../api/v1/keys", "/v1/files/%2e%2e/x", "/v1/files/a%0d%0ab"]
)
async def test_no_path_leads_out_of_the_controllers_own(
    gateway: RunningGateway, controller: StubEngine, path: str
) -> None:
    assert (await gateway.send("GET", path)).status == 404
    assert controller.requests == []


def test_the_controller_is_looked_for_where_it_listens() -> None:
    own = GatewaySettings()
    assert controller_url(own, ControllerSection()) == "http://127.0.0.1:8001"
    assert controller_url(own, ControllerSection(host="0.0.0.0", port=1)) == "http://127.0.0.1:1"
    assert controller_url(own, ControllerSection(host="::1")) == "http://[::1]:8001"
    named = GatewaySettings(controller_url="http://c:1/")
    assert controller_url(named, ControllerSection()) == "http://c:1"


async def test_other_paths_of_the_engine_pass_for_a_pinned_version(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    engine.script(Reply(body={"data": [{"score": 0.5}]}), where=at("/v1/score"))
    engine.script(Reply(body={"tokens": [1, 2]}), where=at("/tokenize"))
    score = await gateway.send("POST", "/v1/score?x=1", {"model": "r@1", "text_1": "a"})
    tokens = await gateway.send("POST", "/v1/tokenize", {"model": "r@1", "prompt": "a"})
    assert (score.status, score.json()) == (200, {"data": [{"score": 0.5}]})
    assert score.headers["x-sluice-version"] == "r@1"
    assert tokens.json() == {"tokens": [1, 2]}
    assert [(r.path, r.query, r.json()) for r in asked(engine)] == [
        ("/v1/score", "x=1", {"model": "base", "text_1": "a"}),
        ("/tokenize", "", {"model": "base", "prompt": "a"}),
    ]


async def test_the_official_client_has_a_recording_written_down(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    engine.script(Reply(body={"text": "hello"}), where=at("/v1/audio/transcriptions"))
    sound = b'RIFF\r\n\r\nname="model"\r\n\r\nr@2\r\n' + bytes(range(256)) * 100
    async with gateway.client() as client:
        said = await client.audio.transcriptions.create(model="r@1", file=("a.wav", sound))
        with pytest.raises(openai.NotFoundError):
            await client.audio.transcriptions.create(model="r", file=("a.wav", sound))
        with pytest.raises(openai.BadRequestError):
            await client.audio.transcriptions.create(model="r@2", file=("a.wav", sound))
    assert said.text == "hello"
    (received,) = asked(engine)
    assert sound in received.body
    assert b'name="model"\r\n\r\nbase\r\n--' in received.body


HEAD = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nr@1\r\n'


@pytest.mark.parametrize(
    "body",
    [
        b"", HEAD, HEAD + HEAD + b"--b--", b"--b--", HEAD.replace(b'"model"', b"model") + b"--b--",
        HEAD + HEAD.replace(b'"model"', b'"mo\\del"') + b"--b--",
        HEAD + HEAD.replace(b'"model"', b'"x"; name="model"') + b"--b--",
        HEAD + b"--b\r\nX: y\r\n\r\n\r\n--b--", HEAD.replace(b"r@1", b"\xff") + b"--b--",
    ],
)  # fmt: skip
async def test_a_form_that_can_be_read_in_two_ways_is_refused(
    gateway: RunningGateway, engine: StubEngine, body: bytes
) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = await gateway.send("POST", "/v1/audio/translations", body, headers=headers)
    assert answer.status in (400, 404)
    assert asked(engine) == []


async def test_sampling_defaults_are_for_what_samples(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    answer = await gateway.send("POST", "/v1/score", {"model": "r@2", "text_1": "a"})
    assert answer.status == 400
    assert "carries a prompt" in answer.json()["error"]["message"]
    assert asked(engine) == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score", {"model": "r"}),
        ("/v1/score", {}),
        ("/v1/score", b"--x\r\n"),
        ("/v1/load_lora_adapter", {"model": "r@1", "lora_name": "x", "lora_path": "/"}),
        ("/v1/../load_lora_adapter", {"model": "r@1"}),
        ("/v1/a%0d%0ab", {"model": "r@1"}),
        ("/score", {"model": "r@1"}),
        ("/v1", {"model": "r@1"}),
    ],
)
async def test_anything_else_is_a_404_that_reaches_no_engine(
    gateway: RunningGateway, engine: StubEngine, path: str, body: object
) -> None:
    answer = await gateway.send("POST", path, body)
    assert (answer.status, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert asked(engine) == []


async def test_what_the_engine_does_not_have_is_a_404_too(gateway: RunningGateway) -> None:
    answer = await gateway.send("POST", "/v1/rerank", {"model": "r@1"})
    assert (answer.status, answer.json()["error"]["code"]) == (404, "unknown_url")
    unknown = await gateway.send("POST", "/v1/rerank", {"model": "r@9"})
    assert unknown.json()["error"]["code"] == "model_not_found"


def test_only_plain_paths_below_v1_are_passed() -> None:
    assert passes("/v1/audio/speech")
    assert not any(map(passes, ["/v1/", "/v1//x", "/v1/.x", "/v1/a b", "/v2/x", "/v1/x/", "/v1/é"]))


def asked(engine: StubEngine) -> list[Received]:
    """What clients asked, without the checks of health."""
    return [received for received in engine.requests if received.method == "POST"]


async def connect(gateway: RunningGateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port))
