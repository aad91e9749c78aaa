"""A small engine that speaks vLLM's HTTP on loopback and fails exactly as a test tells it to.

    async with StubEngine(base="base") as engine:
        engine.script(Reply(status=503))                       # the next inference request
        engine.script(Reply(ending=Ending.SILENCE), times=None)  # all after that
        ...                                                    # requests to engine.url
        await engine.wait_for_cancelled(1)

Nothing here waits for a time: a delay is an `asyncio.Event` that the test sets. Shapes and statuses
were taken from vLLM 0.32.
"""

import asyncio
import enum
import itertools
import json
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import urlsplit

import httptools

JSONObject = dict[str, Any]
Answer = str | Mapping[str, Any]

CREATED = 1_760_000_000
INFERENCE_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"}
)
REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed"}
LINGER_ZERO = struct.pack("ii", 1, 0)


class Ending(enum.Enum):
    """How an answer ends; in a stream, after `Reply.after` events."""

    WHOLE = "whole"
    CLOSE_BEFORE_HEADERS = "close before headers"
    RESET_BEFORE_HEADERS = "reset before headers"
    CLOSE_MIDWAY = "close midway"  # the connection ends between two chunks
    RESET_MIDWAY = "reset midway"
    TRUNCATED = "truncated"  # the connection ends inside a chunk, as after SIGKILL
    ERROR_EVENT = "error event"  # an error event, and then [DONE], as vLLM does on shutdown
    SILENCE = "silence"  # open, and nothing more; without a stream, nothing at all


@dataclass(frozen=True, slots=True)
class Reply:
    """What to do with one request; the default is to answer it as vLLM would.

    `body` is sent as it is, with `status`, in place of the engine's own answer. `text` is what the
    version says, or a function of the parsed request that gives the text or the whole JSON body.
    `chunks` are the raw HTTP chunks of a stream, in place of the engine's own events.
    `hold_headers` keeps everything back until set. `hold_stream` stops a stream after `hold_after`
    events until set. `permits` lets one event out for each permit.
    """

    status: int = 200
    body: bytes | Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    text: str | Callable[[JSONObject], Answer] | None = None
    chunks: Sequence[bytes] | None = None
    hold_headers: asyncio.Event | None = None
    hold_stream: asyncio.Event | None = None
    hold_after: int = 1
    permits: asyncio.Semaphore | None = None
    ending: Ending = Ending.WHOLE
    after: int = 2
    header_bytes: int = 0  # of padding in one header
    keep_alive: bool = True


@dataclass(slots=True)
class Received:
    """One request as it arrived, and what became of its answer."""

    order: int  # of arrival, from 0
    connection: int  # the number of the connection that it came on, from 0
    reused: bool  # whether that connection had carried a request before
    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]  # names in lower case, in the order sent
    body: bytes
    answered: bool = False  # the answer was written to its end
    cancelled: bool = False  # the client closed before that
    broken_off: bool = False  # the stub did, as it was told to
    events_sent: int = 0

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name.lower()), None)

    def json(self) -> Any:
        return json.loads(self.body)


Where = Callable[[Received], bool]


def is_inference(received: Received) -> bool:
    return received.path in INFERENCE_PATHS


def at(path: str) -> Where:
    return lambda received: received.path == path


def on_reused_connection(received: Received) -> bool:
    return received.reused and is_inference(received)


@dataclass(slots=True)
class _Scripted:
    reply: Reply
    where: Where
    left: int | None  # None: for ever


class StubEngine:
    """An engine on a port that the OS picks. `stop` and `start` keep that port.

    `base` is the name under which it serves its base; `adapters` are loaded from the start (name to
    path). With `any_model` it answers to every name; else an unknown one is 404 as in vLLM.
    """

    def __init__(
        self,
        base: str = "base",
        *,
        adapters: Mapping[str, str] | None = None,
        text: str | Callable[[JSONObject], Answer] = "The stub says yes.",
        any_model: bool = False,
        check_paths: bool = True,
        api_key: str | None = None,
    ) -> None:
        self.base = base
        self.adapters: dict[str, str] = dict(adapters or {})
        self.text = text
        self.any_model = any_model
        self.check_paths = check_paths
        self.api_key = api_key
        self.healthy = True
        self.waiting = 0  # the waiting queue that /metrics reports
        self.kv_cache_usage = 0.0
        self.requests: list[Received] = []
        self.connections_made = 0
        self.failures: list[Exception] = []  # a test's own function that raised
        self._connections: set[_Connection] = set()
        self._scripts: list[_Scripted] = []
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._port = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()
        if self.failures and error is None:
            raise ExceptionGroup("the stub engine failed by itself", self.failures)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        return self._port

    @property
    def connections_open(self) -> int:
        return len(self._connections)

    @property
    def inference_requests(self) -> list[Received]:
        return [received for received in self.requests if is_inference(received)]

    @property
    def running(self) -> int:
        return sum(
            not (received.answered or received.cancelled or received.broken_off)
            for received in self.inference_requests
        )

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), "127.0.0.1", self._port, reuse_address=True
        )
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the port and reset every open connection; adapters are forgotten only by `forget`."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._connections):
            connection.reset()
        await self.wait_until(lambda: not self._connections, "its connections to end")
        await self._server.wait_closed()
        self._server = None

    def forget(self) -> None:
        """Lose every adapter, as a restarted vLLM does."""
        self.adapters.clear()

    def close_idle_connections(self) -> None:
        """End the keep-alive connections that carry no request, as vLLM does after 5 s."""
        for connection in list(self._connections):
            if connection.idle:
                connection.close()

    def script(self, reply: Reply, *, times: int | None = 1, where: Where = is_inference) -> None:
        """Use `reply` for the next `times` requests that `where` accepts (None: for all from now on).

        Scripts are tried in the order given; the first that accepts the request and isn't used up
        is taken.
        """
        self._scripts.append(_Scripted(reply, where, times))

    def unscript(self) -> None:
        """Answer as vLLM would again."""
        self._scripts.clear()

    async def wait_for_requests(
        self, count: int, *, where: Where = is_inference, limit: float = 30.0
    ) -> list[Received]:
        """Wait until `count` requests that `where` accepts have arrived; return them."""

        def found() -> list[Received]:
            return [received for received in self.requests if where(received)]

        await self.wait_until(lambda: len(found()) >= count, f"{count} requests", limit=limit)
        return found()

    async def wait_for_answered(self, count: int, *, limit: float = 30.0) -> list[Received]:
        """Wait until `count` inference requests were answered to their end; return them."""

        def found() -> list[Received]:
            return [received for received in self.inference_requests if received.answered]

        await self.wait_until(lambda: len(found()) >= count, f"{count} answers", limit=limit)
        return found()

    async def wait_for_cancelled(self, count: int, *, limit: float = 30.0) -> list[Received]:
        """Wait until the client has closed on `count` unfinished inference requests; return them."""

        def found() -> list[Received]:
            return [received for received in self.inference_requests if received.cancelled]

        await self.wait_until(lambda: len(found()) >= count, f"{count} cancelled", limit=limit)
        return found()

    async def wait_until(
        self, holds: Callable[[], bool], what: str, *, limit: float = 30.0
    ) -> None:
        """Wait until `holds()`; it is asked again whenever anything happens at the engine."""
        try:
            async with asyncio.timeout(limit):
                while not holds():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            seen = [
                f"{r.method} {r.path} answered={r.answered} cancelled={r.cancelled}"
                f" events={r.events_sent}"
                for r in self.requests
            ]
            raise AssertionError(
                f"the stub engine waited {limit} s for {what}; it saw {seen}"
            ) from None

    # What the connections call.

    def _take_script(self, received: Received) -> Reply:
        for scripted in self._scripts:
            if scripted.left == 0 or not scripted.where(received):
                continue
            if scripted.left is not None:
                scripted.left -= 1
            return scripted.reply
        return Reply()

    def _notify(self) -> None:
        self._changed.set()

    def _answer(self, received: Received, reply: Reply) -> "_Whole | _Stream":
        if reply.chunks is not None:
            return _Stream(tuple(reply.chunks))
        if reply.body is not None or reply.status != 200:
            return _scripted_answer(reply)
        if not self._admits(received):
            return _Whole(401, _encode({"error": "Unauthorized"}))
        match received.method, received.path:
            case "GET", "/health":
                return _Whole(200 if self.healthy else 503, b"")
            case "GET", "/metrics":
                return _Whole(200, self._metrics().encode(), "text/plain; version=0.0.4")
            case "GET", "/v1/models":
                return _Whole(200, _encode(self._models()))
            case "POST", "/v1/load_lora_adapter":
                return self._load(received)
            case "POST", "/v1/unload_lora_adapter":
                return self._unload(received)
            case "POST", path if path in INFERENCE_PATHS:
                return self._infer(received, reply)
            case _:
                return _Whole(404, _encode({"detail": "Not Found"}))

    def _admits(self, received: Received) -> bool:
        if self.api_key is None or not received.path.startswith("/v1"):
            return True
        return received.header("authorization") == f"Bearer {self.api_key}"

    def _infer(self, received: Received, reply: Reply) -> "_Whole | _Stream":
        try:
            request = received.json()
            if not isinstance(request, dict):
                raise TypeError("the body is not an object")
        except (ValueError, TypeError) as error:
            return _error(400, str(error), "Bad Request")
        model = request.get("model") or self.base
        if not self.any_model and model != self.base and model not in self.adapters:
            message = f"The model `{model}` does not exist."
            return _error(404, message, "NotFoundError", param="model")
        text = self.text if reply.text is None else reply.text
        answer = text(request) if callable(text) else text
        if not isinstance(answer, str):
            return _Whole(200, _encode(answer))
        completion = _Completion.of(received, request, model, answer)
        if received.path == "/v1/embeddings":
            return _Whole(200, _encode(completion.embeddings()))
        if received.path == "/v1/responses":
            if request.get("stream"):
                return _Stream(tuple(completion.response_events()))
            return _Whole(200, _encode(completion.response()))
        if request.get("stream"):
            return _Stream(tuple(completion.events()))
        return _Whole(200, _encode(completion.whole()))

    def _load(self, received: Received) -> "_Whole":
        request = received.json()
        name, path = request.get("lora_name"), request.get("lora_path")
        if not name or not path:
            message = "Both 'lora_name' and 'lora_path' must be provided."
            return _error(400, message, "InvalidUserInput")
        if name in self.adapters and not request.get("load_inplace"):
            message = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the"
                " adapter in place, set 'load_inplace' to True."
            )
            return _error(400, message, "InvalidUserInput")
        if self.check_paths and not Path(path).exists():
            message = f"Loading lora {name} failed: No adapter found for {path}"
            return _error(404, message, "NotFoundError")
        self.adapters[name] = path
        return _text(f"Success: LoRA adapter '{name}' added successfully.")

    def _unload(self, received: Received) -> "_Whole":
        name = received.json().get("lora_name")
        if not name:
            return _error(400, "'lora_name' needs to be provided.", "InvalidUserInput")
        if name not in self.adapters:
            message = f"The lora adapter '{name}' cannot be found."
            return _error(404, message, "NotFoundError")
        del self.adapters[name]
        return _text(f"Success: LoRA adapter '{name}' removed successfully.")

    def _models(self) -> JSONObject:
        served: list[tuple[str, str, str | None]] = [(self.base, f"/models/{self.base}", None)]
        served += [(name, path, self.base) for name, path in self.adapters.items()]
        return {
            "object": "list",
            "data": [
                {
                    "id": name,
                    "object": "model",
                    "created": CREATED,
                    "owned_by": "vllm",
                    "root": root,
                    "parent": parent,
                    "max_model_len": 512,
                    "permission": [],
                }
                for name, root, parent in served
            ],
        }

    def _metrics(self) -> str:
        labels = f'{{engine="0",model_name="{self.base}"}}'
        gauges = {
            "num_requests_running": float(self.running),
            "num_requests_waiting": float(self.waiting),
            "kv_cache_usage_perc": self.kv_cache_usage,
        }
        return "".join(
            f"# TYPE vllm:{name} gauge\nvllm:{name}{labels} {value}\n"
            for name, value in gauges.items()
        )


@dataclass(frozen=True, slots=True)
class _Whole:
    status: int
    body: bytes
    content_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class _Stream:
    events: tuple[bytes, ...]


def _encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _text(message: str) -> _Whole:
    return _Whole(200, message.encode(), "text/plain; charset=utf-8")


def _error(status: int, message: str, kind: str, param: str | None = None) -> _Whole:
    error = {"message": message, "type": kind, "param": param, "code": status}
    return _Whole(status, _encode({"error": error}))


def _scripted_answer(reply: Reply) -> _Whole:
    if reply.body is None:
        return _error(reply.status, "The stub was told to say so.", "InternalServerError")
    body = reply.body if isinstance(reply.body, bytes) else _encode(reply.body)
    return _Whole(reply.status, body)


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class _Completion:
    """The answer to one inference request, in each of the shapes that it can be asked for."""

    id: str
    chat: bool
    model: str
    tokens: tuple[str, ...]
    finish_reason: str
    prompt_tokens: int
    choices: int
    include_usage: bool
    logprobs: bool

    @classmethod
    def of(cls, received: Received, request: JSONObject, model: str, text: str) -> Self:
        chat = received.path == "/v1/chat/completions"
        tokens = tuple(_tokens(text))
        limit = request.get("max_completion_tokens") or request.get("max_tokens") or len(tokens)
        request_id = received.header("x-request-id") or f"{received.order:032x}"
        options = request.get("stream_options") or {}
        return cls(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            chat=chat,
            model=model,
            tokens=tokens[:limit],
            finish_reason="length" if limit < len(tokens) else "stop",
            prompt_tokens=len(received.body.split()),
            choices=request.get("n") or 1,
            include_usage=bool(options.get("include_usage")),
            logprobs=request.get("logprobs") not in (None, False),
        )

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    def usage(self) -> JSONObject:
        completion = len(self.tokens) * self.choices
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": None,
        }

    def whole(self) -> JSONObject:
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._whole_choice(index) for index in range(self.choices)]
        return self._envelope(kind) | {"choices": choices, "usage": self.usage()}

    def events(self) -> Iterator[bytes]:
        if self.chat:
            for index in range(self.choices):
                yield self._chunk(index, {"role": "assistant", "content": ""})
        for token in self.tokens:
            for index in range(self.choices):
                yield self._chunk(index, {"content": token})
        for index in range(self.choices):
            yield self._chunk(index, {"content": ""}, self.finish_reason)
        if self.include_usage:
            yield _event(self._envelope(self._chunk_kind) | {"choices": [], "usage": self.usage()})
        yield DONE

    def embeddings(self) -> JSONObject:
        row = {"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}
        usage = {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens}
        return self._envelope("list") | {"data": [row], "usage": usage}

    def response(self) -> JSONObject:
        content = {"type": "output_text", "text": self.text, "annotations": []}
        message = {"type": "message", "role": "assistant", "content": [content]}
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": CREATED,
            "model": self.model,
            "status": "completed",
            "output": [message],
            "usage": {
                "input_tokens": self.prompt_tokens,
                "output_tokens": len(self.tokens),
                "total_tokens": self.prompt_tokens + len(self.tokens),
            },
        }

    def response_events(self) -> Iterator[bytes]:
        for token in self.tokens:
            yield self._response_event("response.output_text.delta", {"delta": token})
        yield self._response_event("response.completed", {"response": self.response()})

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _envelope(self, kind: str) -> JSONObject:
        return {"id": self.id, "object": kind, "created": CREATED, "model": self.model}

    def _whole_choice(self, index: int) -> JSONObject:
        choice: JSONObject = {"index": index}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": self.text, "tool_calls": []}
        else:
            choice["text"] = self.text
        logprobs = self._logprobs(self.tokens) if self.logprobs else None
        return choice | {"logprobs": logprobs, "finish_reason": self.finish_reason}

    def _chunk(self, index: int, delta: JSONObject, finish_reason: str | None = None) -> bytes:
        choice: JSONObject = {"index": index}
        if self.chat:
            choice["delta"] = delta
        else:
            choice["text"] = delta["content"]
        tokens = (delta["content"],) if delta["content"] else ()
        logprobs = self._logprobs(tokens) if self.logprobs and tokens else None
        choice |= {"logprobs": logprobs, "finish_reason": finish_reason}
        return _event(self._envelope(self._chunk_kind) | {"choices": [choice]})

    def _logprobs(self, tokens: Sequence[str]) -> JSONObject:
        if self.chat:
            return {
                "content": [
                    {"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": []}
                    for token in tokens
                ]
            }
        return {"tokens": list(tokens), "token_logprobs": [-0.5] * len(tokens)}

    def _response_event(self, kind: str, fields: JSONObject) -> bytes:
        return f"event: {kind}\n".encode() + _event({"type": kind} | fields)


def _tokens(text: str) -> Iterator[str]:
    """A word with the space before it is a token."""
    for index, word in enumerate(text.split(" ")):
        yield word if index == 0 else f" {word}"


class _Connection(asyncio.Protocol):
    """One client connection: requests in, answered one after the other."""

    def __init__(self, engine: StubEngine) -> None:
        self._engine = engine
        self._number = 0
        self._served = 0
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._lost = asyncio.Event()
        self._requests: asyncio.Queue[Received] = asyncio.Queue(maxsize=1_000)
        self._current: Received | None = None
        self._task: asyncio.Task[None] | None = None
        self._ended_by_us = False
        self._url = b""
        self._headers: list[tuple[str, str]] = []
        self._body: list[bytes] = []

    @property
    def idle(self) -> bool:
        return self._current is None and self._requests.empty()

    def close(self) -> None:
        self._ended_by_us = True
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        self._ended_by_us = True
        if self._transport is not None:
            sock: socket.socket = self._transport.get_extra_info("socket")
            if sock.fileno() != -1:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but their type.
        self._transport = cast("asyncio.Transport", transport)
        self._writable.set()
        self._number = self._engine.connections_made
        self._engine.connections_made += 1
        self._engine._connections.add(self)
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def connection_lost(self, error: Exception | None) -> None:
        self._lost.set()
        self._engine._connections.discard(self)
        if self._task is not None:
            self._task.cancel()
        unfinished = [] if self._current is None else [self._current]
        while not self._requests.empty():
            unfinished.append(self._requests.get_nowait())
        for received in unfinished:
            received.cancelled = not (received.answered or self._ended_by_us)
            received.broken_off = not received.answered and self._ended_by_us
        self._engine._notify()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # httptools' side

    def on_message_begin(self) -> None:
        self._url, self._headers, self._body = b"", [], []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        parts = urlsplit(self._url.decode("latin-1"))
        received = Received(
            order=len(self._engine.requests),
            connection=self._number,
            reused=self._served > 0,
            method=self._parser.get_method().decode(),
            path=parts.path,
            query=parts.query,
            headers=tuple(self._headers),
            body=b"".join(self._body),
        )
        self._served += 1
        self._engine.requests.append(received)
        self._requests.put_nowait(received)
        self._engine._notify()

    # the answer

    async def _serve(self) -> None:
        while True:
            received = await self._requests.get()
            self._current = received
            try:
                await self._answer(received, self._engine._take_script(received))
            except Exception as error:  # noqa: BLE001 - raised again where the engine is left
                self._engine.failures.append(error)
                self.reset()
                return
            if received.answered:
                self._current = None
            self._engine._notify()

    async def _answer(self, received: Received, reply: Reply) -> None:
        if reply.hold_headers is not None:
            await reply.hold_headers.wait()
        if reply.ending is Ending.CLOSE_BEFORE_HEADERS:
            return self.close()
        if reply.ending is Ending.RESET_BEFORE_HEADERS:
            return self.reset()
        answer = self._engine._answer(received, reply)
        if isinstance(answer, _Whole):
            await self._send_whole(received, reply, answer)
        else:
            await self._send_stream(received, reply, answer)
        if not reply.keep_alive:
            self.close()
        return None

    async def _send_whole(self, received: Received, reply: Reply, answer: _Whole) -> None:
        if reply.ending is Ending.SILENCE:
            await self._stay_silent()
        length = f"content-length: {len(answer.body)}"
        head = _head(answer.status, answer.content_type, length, reply)
        match reply.ending:
            case Ending.CLOSE_MIDWAY | Ending.TRUNCATED | Ending.RESET_MIDWAY:
                self._write(head + answer.body[: len(answer.body) // 2])
                await self._break_off(reply)
            case _:
                received.answered = True
                self._write(head + answer.body)
                await self._writable.wait()

    async def _send_stream(self, received: Received, reply: Reply, answer: _Stream) -> None:
        content_type = "text/event-stream; charset=utf-8"
        self._write(_head(200, content_type, "transfer-encoding: chunked", reply))
        for number in itertools.count():
            if number == reply.hold_after and reply.hold_stream is not None:
                await reply.hold_stream.wait()
            if number == reply.after and reply.ending is not Ending.WHOLE:
                return await self._end_badly(received, reply, answer)
            if number == len(answer.events):
                break
            if reply.permits is not None:
                await reply.permits.acquire()
            await self._writable.wait()
            self._send_event(received, answer.events[number])
        received.answered = True
        self._write(b"0\r\n\r\n")
        return None

    async def _end_badly(self, received: Received, reply: Reply, answer: _Stream) -> None:
        match reply.ending:
            case Ending.ERROR_EVENT:
                error = {"message": "EngineCore died", "type": "InternalServerError"}
                event = _event({"error": error | {"param": None, "code": 500}})
                self._send_event(received, event)
                self._send_event(received, DONE)
                received.answered = True
                self._write(b"0\r\n\r\n")
            case Ending.SILENCE:
                await self._stay_silent()
            case Ending.TRUNCATED:
                event = answer.events[min(reply.after, len(answer.events) - 1)]
                self._write(_chunk(event)[: len(event) // 2])
                await self._break_off(reply)
            case _:
                await self._break_off(reply)

    def _send_event(self, received: Received, event: bytes) -> None:
        self._write(_chunk(event))
        received.events_sent += 1
        self._engine._notify()

    async def _break_off(self, reply: Reply) -> None:
        if reply.ending is Ending.RESET_MIDWAY:
            return self.reset()
        return self.close()

    async def _stay_silent(self) -> None:
        await self._lost.wait()

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)


def _head(status: int, content_type: str, framing: str, reply: Reply) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}",
        "server: uvicorn",
        f"content-type: {content_type}",
        framing,
    ]
    lines += [f"{name}: {value}" for name, value in reply.headers.items()]
    if reply.header_bytes:
        lines.append(f"x-padding: {'x' * reply.header_bytes}")
    if not reply.keep_alive:
        lines.append("connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
