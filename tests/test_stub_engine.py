"""The stub engine answers as vLLM does, and fails only as it was told to."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import httptools
import pytest

from tests.stub_engine import Ending, Reply, StubEngine, at, on_reused_connection

CHAT = "/v1/chat/completions"

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base") as engine:
        yield engine


class Answer:
    """One HTTP answer, as far as it came."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.body = b""
        self.whole = False
        self._parser = httptools.HttpResponseParser(self)

    @property
    def status(self) -> int:
        return self._parser.get_status_code()

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole = True

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        lines = [line for line in self.body.decode().split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@dataclass(slots=True)
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def connect(cls, engine: StubEngine) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", engine.port))

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> None:
        raw = (
            b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        )
        lines = [f"{method} {path} HTTP/1.1", "host: stub", f"content-length: {len(raw)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.writer.write(("\r\n".join(lines) + "\r\n\r\n").encode() + raw)

    async def receive(self) -> Answer:
        """Read until the answer is whole or the connection ends."""
        answer = Answer()
        async with asyncio.timeout(30):
            while not answer.whole and (data := await self.reader.read(65_536)):
                answer.feed(data)
        return answer

    def close(self) -> None:
        self.writer.close()


async def ask(
    engine: StubEngine, method: str, path: str, body: Any = None, **headers: str
) -> Answer:
    client = await Client.connect(engine)
    client.send(method, path, body, **headers)
    try:
        return await client.receive()
    finally:
        client.close()


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": "Hi"}]} | fields


async def test_a_chat_is_answered_in_vllms_shape(engine: StubEngine) -> None:
    answer = await ask(engine, "POST", CHAT, chat(), x_request_id="abc")
    body = answer.json()
    assert answer.status == 200
    assert body["id"] == "chatcmpl-abc"
    assert body["choices"][0]["message"]["content"] == "The stub says yes."
    assert body["usage"]["completion_tokens"] == 4


async def test_a_stream_has_role_tokens_finish_usage_and_done(engine: StubEngine) -> None:
    request = chat(stream=True, stream_options={"include_usage": True})
    first, *tokens, finish, usage = (await ask(engine, "POST", CHAT, request)).events()
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    said = "".join(event["choices"][0]["delta"]["content"] for event in tokens)
    assert said == "The stub says yes."
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 4)


async def test_usage_is_left_out_of_a_stream_unless_asked_for(engine: StubEngine) -> None:
    events = (await ask(engine, "POST", CHAT, chat(stream=True))).events()
    assert all(event["choices"] for event in events)


async def test_a_completion_is_cut_at_max_tokens(engine: StubEngine) -> None:
    request = {"model": "base", "prompt": "Hi", "max_tokens": 2}
    choice = (await ask(engine, "POST", "/v1/completions", request)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("The stub", "length")


async def test_the_text_may_depend_on_the_request(engine: StubEngine) -> None:
    engine.adapters["tuned"] = "/nowhere"
    engine.script(Reply(text=lambda request: f"I am {request['model']}"), times=None)
    for model in ("base", "tuned"):
        body = (await ask(engine, "POST", CHAT, chat(model=model))).json()
        assert body["choices"][0]["message"]["content"] == f"I am {model}"


async def test_a_function_that_raises_fails_the_test() -> None:
    def spoiled(request: dict[str, Any]) -> str:
        raise KeyError(request["model"])

    engine = await StubEngine(text=spoiled).__aenter__()
    with pytest.raises(ConnectionResetError):
        await ask(engine, "POST", CHAT, chat())
    with pytest.raises(ExceptionGroup, match="failed by itself"):
        await engine.__aexit__(None, None, None)


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"{", 400, "Bad Request"),
        (b"[]", 400, "Bad Request"),
        (b'{"model": "other"}', 404, "NotFoundError"),
        (b'{"messages": []}', 200, None),
    ],
)
async def test_bad_requests_get_vllms_errors(
    engine: StubEngine, body: bytes, status: int, kind: str | None
) -> None:
    answer = await ask(engine, "POST", CHAT, body)
    assert answer.status == status
    assert answer.json().get("error", {}).get("type") == kind


async def test_adapters_come_and_go_with_vllms_statuses(engine: StubEngine, tmp_path: Path) -> None:
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    request = {"lora_name": "tuned", "lora_path": str(tmp_path)}
    assert (await ask(engine, "POST", unload, request)).status == 404
    assert (await ask(engine, "POST", load, request | {"lora_path": "/nowhere"})).status == 404
    loaded = await ask(engine, "POST", load, request)
    assert (loaded.status, loaded.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    again = await ask(engine, "POST", load, request)
    assert (again.status, again.json()["error"]["type"]) == (400, "InvalidUserInput")
    assert (await ask(engine, "POST", load, request | {"load_inplace": True})).status == 200

    base, tuned = (await ask(engine, "GET", "/v1/models")).json()["data"]
    assert (base["id"], base["parent"]) == ("base", None)
    assert (tuned["id"], tuned["root"], tuned["parent"]) == ("tuned", str(tmp_path), "base")

    assert (await ask(engine, "POST", unload, request)).status == 200
    assert (await ask(engine, "POST", CHAT, chat(model="tuned"))).status == 404


async def test_health_and_metrics_say_what_was_set(engine: StubEngine) -> None:
    engine.healthy, engine.waiting = False, 7
    assert (await ask(engine, "GET", "/health")).status == 503
    metrics = (await ask(engine, "GET", "/metrics")).body.decode()
    assert 'vllm:num_requests_waiting{engine="0",model_name="base"} 7.0' in metrics


async def test_requests_are_recorded_byte_for_byte_in_order(engine: StubEngine) -> None:
    bodies = [b'{"model":"base", "n" :1}', b'{"model":"base","x":"\xc3\xa9"}']
    client = await Client.connect(engine)
    for body in bodies:
        client.send("POST", CHAT, body, authorization="Bearer k")
        await client.receive()
    first, second = await engine.wait_for_requests(2)
    assert [first.body, second.body] == bodies
    assert (first.order, first.reused, second.order, second.reused) == (0, False, 1, True)
    assert second.header("Authorization") == "Bearer k"
    client.close()


async def test_scripts_are_used_up_in_order(engine: StubEngine) -> None:
    engine.script(
        Reply(status=503, body={"error": {"message": "busy"}}, headers={"retry-after": "1"})
    )
    engine.script(Reply(status=500), times=2)
    answers = [await ask(engine, "POST", CHAT, chat()) for _ in range(4)]
    assert [answer.status for answer in answers] == [503, 500, 500, 200]
    assert answers[0].headers["retry-after"] == "1"


async def test_a_script_leaves_other_paths_alone(engine: StubEngine) -> None:
    engine.script(Reply(status=500), where=at("/v1/load_lora_adapter"))
    assert (await ask(engine, "POST", CHAT, chat())).status == 200
    assert (await ask(engine, "POST", "/v1/load_lora_adapter", {})).status == 500


async def test_headers_wait_until_the_test_lets_them_go(engine: StubEngine) -> None:
    go = asyncio.Event()
    engine.script(Reply(hold_headers=go))
    answer = asyncio.create_task(ask(engine, "POST", CHAT, chat()))
    await engine.wait_for_requests(1)
    assert engine.running == 1
    go.set()
    assert (await answer).status == 200
    await engine.wait_for_answered(1)
    assert engine.running == 0


async def test_a_stream_waits_until_the_test_lets_it_go_on(engine: StubEngine) -> None:
    go = asyncio.Event()
    engine.script(Reply(hold_stream=go, hold_after=3))
    answer = asyncio.create_task(ask(engine, "POST", CHAT, chat(stream=True)))
    await engine.wait_until(partial(_has_sent, engine, 3), "three events")
    go.set()
    assert (await answer).whole


async def test_permits_let_out_one_event_each(engine: StubEngine) -> None:
    permits = asyncio.Semaphore(0)
    engine.script(Reply(permits=permits))
    answer = asyncio.create_task(ask(engine, "POST", CHAT, chat(stream=True)))
    for sent in range(1, 8):
        permits.release()
        await engine.wait_until(partial(_has_sent, engine, sent), f"{sent} events")
    assert (await answer).whole


async def test_a_client_that_goes_away_is_seen_in_every_phase(engine: StubEngine) -> None:
    never = asyncio.Event()
    engine.script(Reply(hold_headers=never))
    engine.script(Reply(hold_stream=never))
    engine.script(Reply(ending=Ending.SILENCE))
    for count in range(1, 4):
        client = await Client.connect(engine)
        client.send("POST", CHAT, chat(stream=True))
        await engine.wait_for_requests(count)
        client.close()
        assert len(await engine.wait_for_cancelled(count)) == count
    assert engine.running == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ending", [Ending.CLOSE_MIDWAY, Ending.TRUNCATED])
async def test_an_answer_may_break_off(engine: StubEngine, stream: bool, ending: Ending) -> None:
    engine.script(Reply(ending=ending))
    answer = await ask(engine, "POST", CHAT, chat(stream=stream))
    assert (answer.status, answer.whole) == (200, False)
    assert answer.body
    await engine.wait_until(lambda: engine.requests[0].broken_off, "the break")
    assert not engine.requests[0].cancelled


async def test_a_connection_may_close_before_any_byte(engine: StubEngine) -> None:
    engine.script(Reply(ending=Ending.CLOSE_BEFORE_HEADERS))
    client = await Client.connect(engine)
    client.send("POST", CHAT, chat())
    assert await client.reader.read() == b""
    client.close()


@pytest.mark.parametrize("ending", [Ending.RESET_BEFORE_HEADERS, Ending.RESET_MIDWAY])
async def test_a_connection_may_be_reset(engine: StubEngine, ending: Ending) -> None:
    engine.script(Reply(ending=ending))
    with pytest.raises(ConnectionResetError):
        await ask(engine, "POST", CHAT, chat(stream=True))


async def test_only_reused_connections_are_reset_where_asked(engine: StubEngine) -> None:
    engine.script(Reply(ending=Ending.RESET_BEFORE_HEADERS), where=on_reused_connection)
    client = await Client.connect(engine)
    client.send("POST", CHAT, chat())
    assert (await client.receive()).status == 200
    client.send("POST", CHAT, chat())
    with pytest.raises(ConnectionResetError):
        await client.receive()
    client.close()
    assert (await ask(engine, "POST", CHAT, chat())).status == 200


async def test_an_error_event_comes_before_done(engine: StubEngine) -> None:
    engine.script(Reply(ending=Ending.ERROR_EVENT, after=3))
    answer = await ask(engine, "POST", CHAT, chat(stream=True))
    assert answer.whole
    assert answer.events()[3]["error"]["code"] == 500


async def test_raw_chunks_are_sent_as_they_are(engine: StubEngine) -> None:
    engine.script(Reply(chunks=(b"data: {}\n", b"\ndata: [DO", b"NE]\n\n")))
    answer = await ask(engine, "POST", CHAT, chat(stream=True))
    assert answer.body == b"data: {}\n\ndata: [DONE]\n\n"


async def test_headers_may_be_too_large(engine: StubEngine) -> None:
    engine.script(Reply(header_bytes=20_000))
    answer = await ask(engine, "POST", CHAT, chat())
    assert len(answer.headers["x-padding"]) == 20_000


async def test_idle_connections_are_closed_on_demand(engine: StubEngine) -> None:
    client = await Client.connect(engine)
    client.send("POST", CHAT, chat())
    await client.receive()
    await engine.wait_for_answered(1)
    engine.close_idle_connections()
    assert await client.reader.read() == b""
    client.close()
    await engine.wait_until(lambda: engine.connections_open == 0, "the end")


async def test_it_comes_back_on_the_same_port_without_what_it_forgot(tmp_path: Path) -> None:
    async with StubEngine(adapters={"tuned": str(tmp_path)}) as engine:
        url = engine.url
        await engine.stop()
        with pytest.raises(ConnectionRefusedError):
            await Client.connect(engine)
        engine.forget()
        await engine.start()
        assert engine.url == url
        assert len((await ask(engine, "GET", "/v1/models")).json()["data"]) == 1


async def test_a_wait_that_is_not_met_says_what_was_seen(engine: StubEngine) -> None:
    await ask(engine, "POST", CHAT, chat())
    with pytest.raises(AssertionError, match=r"2 requests; it saw \['POST /v1/chat/completions"):
        await engine.wait_for_requests(2, limit=0.01)


async def test_a_key_is_wanted_where_one_is_set() -> None:
    async with StubEngine(api_key="secret") as engine:
        refused = await ask(engine, "POST", CHAT, chat())
        assert (refused.status, refused.json()) == (401, {"error": "Unauthorized"})
        allowed = await ask(engine, "POST", CHAT, chat(), authorization="Bearer secret")
        assert allowed.status == 200


def _has_sent(engine: StubEngine, events: int) -> bool:
    return bool(engine.requests) and engine.requests[0].events_sent == events
