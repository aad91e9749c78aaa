"""What strangers send: never a 500, never a hang, and never another request than the one they sent."""

import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from rollout.versions import Prompt
from tests.gateway.raw import Wire, connected
from tests.gateway.serving import (
    CHAT,
    MESSAGES,
    SECRET,
    Reply,
    RunningGateway,
    catalog,
    serving,
    settings,
)
from tests.stub_engine import Reply as EngineReply
from tests.stub_engine import StubEngine

pytestmark = pytest.mark.anyio
ADAPTER = "cd" * 32
MAXIMUM = 100_000
BODY = json.dumps({"model": "r", "messages": MESSAGES}).encode()
KEY = f"authorization: Bearer {SECRET}\r\n".encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + KEY
REQUEST = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
# A word that must never come out as the label of a metric.
MARK = "h0stile"

few = bounded(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base") as engine:
        yield engine


@pytest.fixture
async def gateway(engine: StubEngine, tmp_path: Path) -> AsyncIterator[RunningGateway]:
    config = settings(tmp_path, engine.url, maximum_body_bytes=MAXIMUM, body_seconds=0.3)
    async with serving(config, catalog(engine.url)) as running:
        yield running


def assert_is_an_error(answer: Reply, *statuses: int) -> Any:
    """In OpenAI's shape; returns what is in it."""
    assert answer.status in statuses, (answer.status, answer.body)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    return error


# Bodies, by a grammar that knows what JSON is and does not keep to it.

names = st.sampled_from(
    [
        '"model"', '"mod\\u0065l"', '"\\u006Dodel"', '"Model"', '"model "', '"stream"',
        '"stream_options"', '"stream\\u005foptions"', '"user"', '"messages"', '"x"', '""',
        '"\\ud83d\\ude00"', '"\\ud800"', "model", "'model'", "1",
    ]
)  # fmt: skip
atoms = st.sampled_from(
    [
        '"r"', '"r@1"', '"\\u0072"', '"base"', '"r@9"', '"nobody"', '""', "null", "true", "false",
        "0", "-0", "1e999", "9" * 400, "1.50", "01", ".5", "NaN", "-Infinity", '"\\ud800"', '"\t"',
        '"\\"model\\": \\"r\\""', '{"model":"x"}', '{"include_usage":false}',
        '{"include_usage":true}', "[]", "{}", "[[[[[[[[]]]]]]]]", '"\\x41"', '"é☃"', "tru", "",
    ]
)  # fmt: skip
spaces = st.sampled_from(["", " ", "\n", "\r\n\t", "\x0b", "\xa0", "/**/"])
usual = st.sampled_from([("", "")] * 6 + [("\ufeff", ""), (" ", "\n"), ("", " x"), ("", "\x00")])


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    members = [f"{draw(names)}{draw(spaces)}:{draw(atoms)}" for _ in range(draw(st.integers(0, 3)))]
    if draw(st.integers(0, 9)):
        members.insert(draw(st.integers(0, len(members))), f'"model"{draw(spaces)}: "r"')
    if draw(st.booleans()):
        members.insert(draw(st.integers(0, len(members))), '"stream": true')
    before, after = draw(usual)
    joined = draw(st.sampled_from([","] * 8 + [", ", "", ",,"])).join(members)
    return f"{before}{{{joined}}}{after}".encode()


@given(text=texts())
@example(text=b'{"model":"r","model":"nobody"}')
@example(text=b'{"model":"nobody","mod\\u0065l":"r"}')
@example(text=b'{"model":"r","stream":true,"stream\\u005foptions":{"include_usage":false}}')
@example(text=b'{"stream": true,"model": "r","stream_options":{"model":"x"}}')
@few
async def test_the_engine_gets_the_clients_body_or_nothing(
    gateway: RunningGateway, engine: StubEngine, text: bytes
) -> None:
    before = len(engine.inference_requests)
    answer = await gateway.send(body=text)
    received = engine.inference_requests[before:]
    if not received:
        assert_is_an_error(answer, 400, 404)
        return
    pairs = json.loads(text, object_pairs_hook=list)
    assert [value for name, value in pairs if name == "model"] in (["r"], ["r@1"])
    assert [each.json()["model"] for each in received] == ["base"]
    assert _is_spliced(text, received[0].body), (text, received[0].body)
    if received[0].json().get("stream") is True:
        assert received[0].json()["stream_options"]["include_usage"] is True


def _is_spliced(sent: bytes, received: bytes) -> bool:
    """Whether only the value of `model` differs, and `stream_options` where they had to be set."""
    ours = (b'"stream_options":{"include_usage":true},', b',"include_usage":true')
    without = [received, *(received.replace(each, b"", 1) for each in ours)]
    set_to = b'{"include_usage":true}'
    if received.count(set_to) == 1:
        was = (b'{"include_usage":false}', b"null", b"{}")
        without += [received.replace(set_to, options) for options in was]
    return any(_but_for_the_model(sent, each) for each in without)


def _but_for_the_model(sent: bytes, received: bytes) -> bool:
    return any(
        sent.startswith(received[: found.start()]) and sent.endswith(received[found.end() :])
        for found in re.finditer(b'"base"', received)
    )


@given(junk=st.binary(max_size=200))
@few
async def test_bytes_that_mean_nothing_are_a_400(gateway: RunningGateway, junk: bytes) -> None:
    for path in (CHAT, "/v1/responses", "/v1/feedback"):
        answer = await gateway.send(path=path, body=junk)
        assert answer.status == 501 or assert_is_an_error(answer, 400)


SHAPES = [
    b"", b" ", b"null", b"[]", b'"r"', b"1", b"{}", b"{", b'{"model"', b'{"model":', b"\xff\xfe",
    b"\xef\xbb\xbf" + BODY, BODY.decode().encode("utf-16"), BODY + b"\x00", BODY + BODY,
    b'{"model":"r","x":"\xed\xa0\x80"}', b'{"model":"r","x":"\xc0\xaf"}', b'{"model":"\\ud800"}',
    b'{"model":"r","messages":' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    b'{"model":"r","x":' + b'{"x":' * 15_000 + b"1" + b"}" * 15_000 + b"}",
    b'{"model":null}', b'{"model":5}', b'{"model":["r"]}', b'{"model":{"r":1}}', b'{"model":true}',
    b'{"model":"r","stream":"true"}', b'{"model":"r","stream":1}', b'{"model":"r","user":{}}',
    b'{"model":"r","stream":true,"stream_options":[]}',
    b'{"model":"r","stream":true,"stream_options":{"include_usage":"yes"}}',
    b'{"model":"r","stream":true,"stream_options":null,"stream_options":{}}',
    b'{"model":"r","model":"r"}', b'{"model":"r","a":1,"mod\\u0065l":"nobody"}',
]  # fmt: skip


async def test_what_is_no_request_is_a_400_on_every_endpoint(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    for path in (CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses"):
        for body in SHAPES:
            if path not in (CHAT, "/v1/completions") and body.count(b"stream_options") == 2:
                continue
            answer = await gateway.send(path=path, body=body)
            assert_is_an_error(answer, 400), body[:60]
    assert engine.inference_requests == []


async def test_the_deepest_body_that_passes_comes_out_whole(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    """Wherever the border lies, on one side of it is an answer and on the other a 400."""
    statuses = []
    for depth in (10, 200, 800, 940, 960, 980, 990, 1_000, 1_100):
        body = b'{"model":"r","x":' + b"[" * depth + b"]" * depth + b"}"
        engine.script(EngineReply(body=b"{}"))
        answer = await gateway.send(body=body)
        statuses.append(answer.status)
    assert set(statuses) == {200, 400}
    assert statuses == sorted(statuses)


async def test_huge_numbers_pass_untouched(gateway: RunningGateway, engine: StubEngine) -> None:
    body = b'{"model":"r","seed":1e999999,"x":-0.0,"y":' + b"9" * 5_000 + b',"messages":[]}'
    engine.script(EngineReply(body=b"{}"))
    assert (await gateway.send(body=body)).status == 200
    assert engine.inference_requests[0].body == body.replace(b'"r"', b'"base"')


async def test_images_and_fields_of_tomorrow_pass_untouched(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    image = "data:image/png;base64," + "iVBORw0KGgo/+A==" * 4_000
    content = [{"type": "image_url", "image_url": {"url": image, "detail": "high"}, "\u2603": 1.0}]
    message = {"role": "user", "content": content}
    for path, fields in (
        (CHAT, {"messages": [message], "tomorrow": {"x": [None, 1e2]}}),
        ("/v1/responses", {"input": [message], "store": False}),
        ("/v1/embeddings", {"input": ["a", [1, 2]], "dimensions": 2}),
    ):
        body = json.dumps({**fields, "model": "r@1"}, ensure_ascii=False, indent=1).encode()
        assert (await gateway.send(path=path, body=body)).status == 200
        assert engine.inference_requests[-1].body == body.replace(b'"r@1"', b'"base"')


ASKED = [
    ("nobody", 404, "model_not_found"),
    ("r@9", 404, "model_not_found"),
    ("base", 404, "model_not_found"),
    ("R", 404, "model_not_found"),
    ("r ", 404, "model_not_found"),
    ("r@01", 404, "model_not_found"),
    ("@1", 404, "model_not_found"),
    ("../r", 404, "model_not_found"),
    ("r\r\nx-evil: 1", 404, "model_not_found"),
    ("r\x00", 404, "model_not_found"),
    ("r@", 400, None),
    ("r@-1", 400, None),
    ("r@1@1", 400, None),
    ("r@" + "9" * 5_000, 400, None),
    ("r@１", 400, None),
    (MARK, 404, "model_not_found"),
]


async def test_what_is_not_there_is_said_to_be_not_there(gateway: RunningGateway) -> None:
    for model, status, code in ASKED:
        answer = await gateway.ask(model)
        error = assert_is_an_error(answer, status)
        assert code is None or error["code"] == code
        assert "x-evil" not in answer.headers


PATHS = [
    "/", "/v1", "/v1/", "/v2/chat/completions", "/v1/chat/completions/", "/v1/Chat/completions",
    "//v1/chat/completions", "/v1/chat/../completions", "/v1/%2e%2e/metrics", f"/v1/{MARK}",
    "/v1/chat/completions%00", "/v1/chat/completions%0d%0ax-evil:%201", "/v1/%ff%fe", "/v1/%", "/*",
]  # fmt: skip


async def test_no_path_is_answered_by_accident(gateway: RunningGateway, engine: StubEngine) -> None:
    for path in PATHS:
        for method in ("GET", "POST", "DELETE"):
            answer = await gateway.send(method, path, BODY)
            assert_is_an_error(answer, 404, 405)
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH"):
        assert_is_an_error(await gateway.send(method, CHAT), 405)
    assert engine.inference_requests == []


async def test_nobody_changes_an_engine_through_the_gateway(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    body = json.dumps({"model": "r@1", "lora_name": "x", "lora_path": "/"}).encode()
    for verb in (
        "load",
        "unload",
        "%6coad",
        "Load",
        "./load",
        "x/../load",
        "/load",
        "x%2f..%2fload",
    ):
        for end in ("", "/", "?x", "%20", "%00", ";x"):
            answer = await gateway.send(path=f"/v1/{verb}_lora_adapter{end}", body=body)
            assert_is_an_error(answer, 404)
    assert [each.path for each in engine.requests if "adapter" in each.path.lower()] in (
        [],
        # Other letters are another path, which no engine has.
        ["/v1/Load_lora_adapter"] * 2,
    )


async def test_a_client_names_no_label_of_a_metric(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    engine.script(EngineReply(status=418, body=b"{}"))
    await gateway.ask(MARK)
    await gateway.ask(f"r@{MARK}")
    await gateway.send(MARK.upper(), f"/v1/{MARK}", BODY)
    await gateway.send(path=f"{CHAT}?{MARK}=1", body=BODY, headers={"x-request-id": MARK})
    await gateway.ask(**{"x-sluice-session": MARK, "user-agent": MARK, f"x-{MARK}": "1"})
    await gateway.send("GET", f"/v1/models/{MARK}")
    text = (await gateway.send("GET", "/metrics", key=None)).body.decode()
    assert MARK not in text.lower()


async def test_a_model_inside_the_prompt_is_only_text(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    for content in ('"model":"nobody"', '","model":"nobody","x":"', '\\","model":"x', "\\u0022"):
        body = json.dumps({"messages": [{"role": "user", "content": content}], "model": "r"})
        assert (await gateway.send(body=body.encode())).status == 200
        received = engine.inference_requests[-1]
        assert received.body == body.replace('"model": "r"', '"model": "base"').encode()


# Versions that carry a prompt, whose bodies are encoded anew.


async def test_a_clients_mistake_does_not_count_against_a_candidate(
    engine: StubEngine, tmp_path: Path
) -> None:
    known = catalog(engine.url, candidate=ADAPTER)
    prompted = replace(known.versions["r@2"], prompt=Prompt(({"role": "system", "content": "x"},)))
    known = replace(known, versions={**known.versions, "r@2": prompted})
    async with serving(settings(tmp_path, engine.url), known) as gateway:
        for body in (
            b'{"model":"r","messages":[],"seed":1e999}',
            b'{"model":"r","messages":"Hi"}',
            b'{"model":"r"}',
        ):
            answer = await gateway.send(body=body)
            assert_is_an_error(answer, 400)
        counts = gateway.app.evidence.tally("r", "r@2.2", "candidate").counts()
    assert (counts.errors, counts.fallbacks) == (0, 0)
    assert engine.inference_requests == []


# The size and the pace of bodies.


async def test_the_limit_of_a_body_is_exact(gateway: RunningGateway, engine: StubEngine) -> None:
    for size, status in ((MAXIMUM, 200), (MAXIMUM + 1, 413)):
        body = BODY[:-1] + b" " * (size - len(BODY)) + b"}"
        assert len(body) == size
        assert (await gateway.send(body=body)).status == status
        async with connected(gateway) as wire:
            wire.send(HEAD + b"transfer-encoding: chunked\r\n\r\n" + _chunked(body, 7_000))
            answered, headers, data = await wire.answer()
            assert answered == status
            if status == 413:
                assert json.loads(data)["error"]["code"] == "request_too_large"
                assert headers["connection"] == "close"
    assert len(engine.inference_requests) == 2


async def test_a_body_without_an_end_is_refused(gateway: RunningGateway) -> None:
    async with connected(gateway) as wire:
        wire.send(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(MAXIMUM // 10_000 + 1):
            wire.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert (await wire.answer())[0] == 413


async def test_one_that_announces_too_much_is_not_told_to_send(gateway: RunningGateway) -> None:
    async with connected(gateway) as wire:
        wire.send(HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % (MAXIMUM + 1))
        assert (await wire.answer())[0] == 413


SLOW = [
    b"content-length: 500\r\n\r\n",
    b"expect: 100-continue\r\ncontent-length: 500\r\n\r\n",
    b"content-length: 500\r\n\r\n{",
    b"transfer-encoding: chunked\r\n\r\n",
    b"transfer-encoding: chunked\r\n\r\n5;" + b"x" * 5_000,
    b"transfer-encoding: chunked\r\n\r\n0\r\nx: 1\r\n",
]


async def test_a_body_that_never_comes_has_a_limit(gateway: RunningGateway) -> None:
    for body in SLOW:
        async with connected(gateway) as wire:
            wire.send(HEAD + body)
            while (found := await wire.answer())[0] == 100:
                continue
            assert found[0] == 400, body
            message = json.loads(found[2])["error"]["message"]
            assert message.startswith("the body did not arrive")
    assert gateway.app.inflight == 0


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    cuts=st.sets(st.integers(1, 300), max_size=6),
    extension=st.sampled_from([b"", b";a=b", b";a"]),
    trailer=st.sampled_from([b"", b"x-end: 1\r\n"]),
)
@few
async def test_chunks_may_be_cut_anywhere(
    gateway: RunningGateway,
    engine: StubEngine,
    sizes: list[int],
    cuts: set[int],
    extension: bytes,
    trailer: bytes,
) -> None:
    parts: list[bytes] = []
    position = 0
    while position < len(BODY):
        size = sizes[len(parts) % len(sizes)]
        part = BODY[position : position + size]
        parts.append(b"%x%b\r\n%b\r\n" % (len(part), extension, part))
        position += size
    data = HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"".join(parts)
    data += b"0\r\n" + trailer + b"\r\n"
    async with connected(gateway) as wire:
        edges = [0, *sorted(len(HEAD) + cut for cut in cuts), len(data)]
        for start, end in pairwise(edges):
            wire.send(data[start:end])
            await wire.flushed()
        assert (await wire.answer())[0] == 200
    assert engine.inference_requests[-1].body == BODY.replace(b'"r"', b'"base"')


async def test_trailers_are_no_headers(gateway: RunningGateway, engine: StubEngine) -> None:
    chunks = b"transfer-encoding: chunked\r\n\r\n" + _chunked(BODY, 50)[:-2]
    async with connected(gateway) as wire:
        wire.send(HEAD + chunks + b"x-request-id: late\r\nx-late: 1\r\n\r\n")
        status, headers, _ = await wire.answer()
        assert (status, headers["x-request-id"] == "late") == (200, False)
        assert engine.inference_requests[0].header("x-late") is None
        # Nor is a key that comes after the body.
        anonymous = HEAD.replace(KEY, b"")
        wire.send(anonymous + chunks + KEY + b"\r\n")
        assert (await wire.answer())[0] == 401
    async with connected(gateway) as wire:
        wire.send(HEAD + chunks + b"x: 1234567890\r\n" * 30_000)
        assert (await wire.answer())[0] == 431


# One request must not be read as two.

TWO = b"0\r\n\r\n" + REQUEST
SMUGGLED = [
    b"content-length: %d\r\ntransfer-encoding: chunked\r\n\r\n" % len(TWO) + TWO,
    b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n" + TWO,
    b"content-length: 0\r\ncontent-length: %d\r\n\r\n" % len(TWO) + TWO,
    b"content-length: %d\r\ncontent-length: %d\r\n\r\n" % (len(TWO), len(TWO)) + TWO,
    b"content-length: 0, %d\r\n\r\n" % len(TWO) + TWO,
    b"content-length: +5\r\n\r\n" + TWO,
    b"content-length: 0x5\r\n\r\n" + TWO,
    b"content-length: 5 5\r\n\r\n" + TWO,
    b"content-length:\r\n\r\n" + TWO,
    b"content-length: 18446744073709551621\r\n\r\n" + TWO,
    b"content-length : 5\r\n\r\n" + TWO,
    b"content\x00-length: 5\r\n\r\n" + TWO,
    b"transfer-encoding : chunked\r\n\r\n" + TWO,
    b"transfer-encoding: xchunked\r\n\r\n" + TWO,
    b"transfer-encoding: chunked, identity\r\n\r\n" + TWO,
    b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n" + TWO,
    b"transfer-encoding:\x0bchunked\r\n\r\n" + TWO,
    b"transfer-encoding: \x00chunked\r\n\r\n" + TWO,
    b"transfer-encoding: identity\r\ncontent-length: 5\r\n\r\n" + TWO,
    b"x: a\rtransfer-encoding: chunked\r\n\r\n" + TWO,
    b"x: a\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n" + TWO,
    b"transfer-encoding: chunked\r\n\r\n0x0\r\n\r\n" + REQUEST,
    b"transfer-encoding: chunked\r\n\r\n-0\r\n\r\n" + REQUEST,
    b"transfer-encoding: chunked\r\n\r\n+0\r\n\r\n" + REQUEST,
    b"transfer-encoding: chunked\r\n\r\n10000000000000000\r\n\r\n" + REQUEST,
    b"transfer-encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n" + REQUEST,
    b"transfer-encoding: chunked\r\n\r\n0\n\n" + REQUEST,
]


async def test_what_two_readers_could_read_differently_is_refused(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    for data in SMUGGLED:
        async with connected(gateway) as wire:
            wire.send(HEAD + data)
            status, headers, body = await wire.answer()
            assert (status, headers["connection"]) == (400, "close"), data
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
            assert await wire.rest() == b"", data
    assert engine.inference_requests == []


async def test_what_cannot_be_read_behind_a_request_does_not_answer_for_it(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    broken = HEAD + b"transfer-encoding: chunked\r\n\r\nno chunk"
    async with connected(gateway) as wire:
        wire.send(REQUEST + broken)
        status, headers, body = await wire.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert json.loads(body)["object"] == "chat.completion"
        assert await wire.rest() == b""
    assert len(engine.inference_requests) == 1


async def test_pipelined_requests_of_all_kinds_are_answered_in_order(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    wanted = [200, 404, 400, 401, 405, 200]
    requests = [
        REQUEST,
        b"GET /v1/nothing HTTP/1.1\r\nhost: x\r\n\r\n",
        HEAD + b"content-length: 2\r\n\r\n[]",
        REQUEST.replace(KEY, b""),
        b"GET /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + _chunked(BODY, 30),
    ]
    async with connected(gateway) as wire:
        wire.send(b"".join(requests) * 3)
        assert [(await wire.answer())[0] for _ in range(3 * len(wanted))] == wanted * 3
    assert len(engine.inference_requests) == 6


# Heads.


ODD = [
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /v1/models HTTP/2.0\r\n\r\n",
    b"GET  /v1/models HTTP/1.1\r\n\r\n",
    b"GET /v1/mod els HTTP/1.1\r\n\r\n",
    b"GET \xff\xfe HTTP/1.1\r\n\r\n",
    b"GET http:// HTTP/1.1\r\n\r\n",
    b"CONNECT x:80 HTTP/1.1\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\n\r\n",
    b"NOTHING / HTTP/1.1\r\n\r\n",
    b"GET /v1/models\r\n\r\n",
    HEAD + b"x: a\r\n b\r\n\r\n",
    HEAD + b": a\r\n\r\n",
    HEAD + b"x\xe9: a\r\n\r\n",
    b"\x00" * 100,
    b"{" * 70_000,
]


async def test_an_odd_head_is_answered_and_leaves_nothing_behind(
    gateway: RunningGateway, engine: StubEngine
) -> None:
    for data in ODD:
        async with connected(gateway) as wire:
            wire.send(data)
            status, _, body = await wire.answer()
            assert status in (400, 401, 404, 405), data
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert engine.inference_requests == []
    assert (await gateway.ask()).status == 200


async def test_ten_thousand_headers_are_no_trouble_anywhere(gateway: RunningGateway) -> None:
    many = b"".join(b"x-%d: 1\r\n" % number for number in range(10_000))
    for line in (b"GET /v1/models", b"GET /healthz", b"POST " + CHAT.encode(), b"GET /x"):
        async with connected(gateway) as wire:
            wire.send(line + b" HTTP/1.1\r\n" + KEY + many + b"\r\n")
            assert (await wire.answer())[0] in (200, 404, 400, 431)


async def test_no_header_is_let_in_by_a_value(gateway: RunningGateway, engine: StubEngine) -> None:
    query = "?a=%0d%0ax-evil:%201"
    answer = await gateway.send(
        path=CHAT + query,
        body={"model": "r", "messages": MESSAGES, "user": "u\r\nx-evil: 1"},
        headers={"x-request-id": "a%0d%0ax-evil: 1", "x-sluice-session": "s\tx-evil: 1"},
    )
    received = engine.inference_requests[0]
    assert (answer.status, received.query) == (200, query[1:])
    assert received.header("x-evil") is None
    assert "x-evil" not in answer.headers
    assert "evil" not in answer.headers["x-request-id"]


@pytest.mark.parametrize("connection", [b"", b"connection: keep-alive\r\n"])
async def test_http_1_0_is_answered_and_closed(gateway: RunningGateway, connection: bytes) -> None:
    async with connected(gateway) as wire:
        head = HEAD.replace(b"HTTP/1.1\r\nhost: x", b"HTTP/1.0") + connection
        wire.send(head + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
        assert (await wire.answer())[0] == 200
        assert await wire.rest() == b""


async def test_a_client_that_stops_reading_is_given_up(engine: StubEngine, tmp_path: Path) -> None:
    stream = BODY[:-1] + b', "stream": true}'
    engine.script(EngineReply(chunks=[b"data: " + b"x" * 65_536 + b"\n\n"] * 1_000))
    async with (
        serving(settings(tmp_path, engine.url, stall_seconds=0.2), catalog(engine.url)) as gateway,
        connected(gateway) as wire,
    ):
        wire.send(HEAD + b"content-length: %d\r\n\r\n" % len(stream) + stream)
        await engine.wait_for_cancelled(1)
        assert await _end_of(wire)


async def _end_of(wire: Wire) -> bool:
    try:
        while await wire.some():
            pass
    except ConnectionError:
        return True
    return True


def _chunked(body: bytes, size: int) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
