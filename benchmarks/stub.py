"""The engine that gateways are measured against: fixed answers, faster than any gateway.

    python -m benchmarks.stub --port 9100 [--chunks 64 --delay-ms 20]

`POST /stub/stream?chunks=64&delay_ms=20` changes the stream while it runs. One core gives 16 to 20
thousand answers a second, so that what a benchmark measures is the gateway.
"""

import argparse
import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast
from urllib.parse import parse_qs, urlsplit

import httptools
import uvloop

BASE = "bench-base"
CREATED = 1_760_000_000
PROMPT_TOKENS = 48
ANSWER_TOKENS = 32
STREAM_MARKS = (b'"stream":true', b'"stream": true')
USAGE_MARKS = (b'"include_usage":true', b'"include_usage": true')
INFERENCE_PATHS = (b"/v1/chat/completions", b"/v1/completions")


def _http(status: str, content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nserver: uvicorn\r\ncontent-type: {content_type}\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


def _http_json(value: object, status: str = "200 OK") -> bytes:
    return _http(status, "application/json", json.dumps(value, separators=(",", ":")).encode())


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(value: object) -> bytes:
    return _chunk(b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n")


def _usage(tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "total_tokens": PROMPT_TOKENS + tokens,
        "completion_tokens": tokens,
    }


def _answer() -> bytes:
    return _http_json(
        {
            "id": "chatcmpl-0123456789abcdef0123456789abcdef",
            "object": "chat.completion",
            "created": CREATED,
            "model": BASE,
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": "A sluice box governs the flow. " * (ANSWER_TOKENS // 7),
                        "tool_calls": [],
                    },
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": _usage(ANSWER_TOKENS),
        }
    )


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
STREAM_END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _stream_event(**fields: object) -> bytes:
    envelope = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": BASE,
    }
    return _event(envelope | fields)


def _choice(delta: dict[str, str], finish_reason: str | None = None) -> list[object]:
    return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]


@dataclass(frozen=True, slots=True)
class Stream:
    """`pieces` are written one at a time, `delay` seconds apart; a reader sees each by itself."""

    pieces: tuple[bytes, ...]
    pieces_with_usage: tuple[bytes, ...]
    delay: float

    @classmethod
    def of(cls, chunks: int, delay: float) -> "Stream":
        role = _stream_event(choices=_choice({"role": "assistant", "content": ""}))
        token = _stream_event(choices=_choice({"content": " flows"}))
        finish = _stream_event(choices=_choice({"content": ""}, "stop"))
        usage = _stream_event(choices=[], usage=_usage(chunks - 2))
        pieces = (STREAM_HEAD + role, *[token] * (chunks - 2), finish)
        return cls((*pieces, STREAM_END), (*pieces, usage, STREAM_END), delay)


class Stub:
    """What all connections share."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.answer = _answer()
        self.adapters: list[str] = []

    def other(self, method: bytes, url: bytes, body: bytes) -> bytes:
        """The answer to everything but inference."""
        parts = urlsplit(url.decode("latin-1"))
        match method, parts.path:
            case b"GET", "/health":
                return _http("200 OK", "text/plain", b"")
            case b"GET", "/v1/models":
                return _http_json(self._models())
            case b"GET", "/metrics":
                return _http("200 OK", "text/plain; version=0.0.4", self._metrics())
            case b"POST", "/v1/load_lora_adapter":
                self.adapters.append(json.loads(body)["lora_name"])
                return _http("200 OK", "text/plain", b"Success: LoRA adapter added successfully.")
            case b"POST", "/v1/unload_lora_adapter":
                self.adapters.remove(json.loads(body)["lora_name"])
                return _http("200 OK", "text/plain", b"Success: LoRA adapter removed successfully.")
            case b"POST", "/stub/stream":
                query = parse_qs(parts.query)
                delay = float(query["delay_ms"][0]) / 1000
                self.stream = Stream.of(int(query["chunks"][0]), delay)
                return _http("200 OK", "text/plain", b"")
            case _:
                return _http_json({"detail": "Not Found"}, "404 Not Found")

    def _models(self) -> object:
        names = [(BASE, None), *[(name, BASE) for name in self.adapters]]
        data = [
            {
                "id": name,
                "object": "model",
                "created": CREATED,
                "owned_by": "vllm",
                "root": name,
                "parent": parent,
                "max_model_len": 4096,
            }
            for name, parent in names
        ]
        return {"object": "list", "data": data}

    def _metrics(self) -> bytes:
        gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        label = f'{{engine="0",model_name="{BASE}"}}'
        return "".join(f"vllm:{name}{label} 0.0\n" for name in gauges).encode()


class Connection(asyncio.Protocol):
    """One client connection; a client sends its next request after the answer to the last."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._url = b""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but their type.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _error: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            if self._transport is not None:
                self._transport.close()

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        stub, body, transport = self._stub, self._body, self._transport
        if transport is None:
            return
        if self._url not in INFERENCE_PATHS:
            transport.write(stub.other(self._parser.get_method(), self._url, body))
        elif any(mark in body for mark in STREAM_MARKS):
            stream = stub.stream
            asked = any(mark in body for mark in USAGE_MARKS)
            self._write_next(stream.pieces_with_usage if asked else stream.pieces, 0, stream.delay)
        else:
            transport.write(stub.answer)

    def _write_next(self, pieces: tuple[bytes, ...], number: int, delay: float) -> None:
        if self._transport is None:
            return
        self._transport.write(pieces[number])
        number += 1
        if number == len(pieces):
            return
        # uvloop joins the writes of one turn of the loop; a turn for each keeps them apart.
        if delay:
            self._loop.call_later(delay, self._write_next, pieces, number, delay)
        else:
            self._loop.call_soon(self._write_next, pieces, number, delay)


async def serve(port: int, stream: Stream, ready: Callable[[int], None]) -> None:
    """Answer on `port` (0: one that the OS picks, told to `ready`) until cancelled."""
    stub = Stub(stream)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(stub), "127.0.0.1", port, backlog=4096)
    ready(server.sockets[0].getsockname()[1])
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stub", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: one that the OS picks")
    parser.add_argument("--chunks", type=int, default=32, help="of a stream, at least 2")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="between the chunks")
    arguments = parser.parse_args()
    stream = Stream.of(max(2, arguments.chunks), arguments.delay_ms / 1000)
    with suppress(KeyboardInterrupt):
        uvloop.run(serve(arguments.port, stream, _tell))


def _tell(port: int) -> None:
    print(f"http://127.0.0.1:{port}", flush=True)


if __name__ == "__main__":
    main()
