"""An engine's answer read into values: text, tool calls, why it finished, tokens.

Both ways of answering give the same value, so a streamed answer can be compared with a whole one.
Of several choices (`n`) the first is read.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway import shapes
from gateway.sse import events
from rollout.exchanges import Answer

JsonObject = Mapping[str, Any]

# An engine's message may quote the whole prompt; an error in a history need not.
_LONGEST_ERROR = 500


def answer_from_body(
    version: int,
    status: int,
    body: bytes,
    *,
    ttft_seconds: float | None = None,
    total_seconds: float | None = None,
    error: str | None = None,
) -> Answer:
    """Read a whole body. `status` 0 is no HTTP answer at all, and then `error` says why.

    A status of success with a body that is none of OpenAI's shapes is a failed answer.
    """
    read = _Reading(error=error)
    if not 200 <= status < 300:
        read.error = read.error or _error_message(_decode(body)) or f"HTTP status {status}"
    elif error is None:
        read.whole(_decode(body))
    return read.answer(version, status, ttft_seconds, total_seconds)


def answer_from_stream(
    version: int,
    status: int,
    chunks: Iterable[bytes],
    *,
    ttft_seconds: float | None = None,
    total_seconds: float | None = None,
    error: str | None = None,
) -> Answer:
    """Read a stream of server-sent events, given as the bytes that arrived, however they were cut.

    It failed if it holds an error event (vLLM sends `[DONE]` after one), or ends before its end.
    """
    data = b"".join(chunks)
    if not 200 <= status < 300:
        return answer_from_body(
            version,
            status,
            data,
            ttft_seconds=ttft_seconds,
            total_seconds=total_seconds,
            error=error,
        )
    read = _Reading(error=error)
    for event in events(data):
        read.event(event)
    if not read.finished and read.error is None:
        read.error = "the stream ended before its end"
    return read.answer(version, status, ttft_seconds, total_seconds)


@dataclass(slots=True)
class _Reading:
    """What has been read so far. `tools` are keyed by their index in the answer; `plain` until an
    event of the stream held something else than words."""

    error: str | None = None
    finished: bool = False
    texts: list[str] = field(default_factory=list)
    tools: dict[int, "_Tool"] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    plain: bool = True

    def answer(
        self, version: int, status: int, ttft_seconds: float | None, total_seconds: float | None
    ) -> Answer:
        return Answer(
            version=version,
            status=status,
            text="".join(self.texts),
            tool_calls=tuple(self.tools[index].call() for index in sorted(self.tools)),
            finish_reason=self.finish_reason,
            ttft_seconds=ttft_seconds,
            total_seconds=total_seconds,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            error=None if self.error is None else self.error[:_LONGEST_ERROR],
            confidence=_confidence(self.logprobs),
        )

    def whole(self, body: Any) -> None:
        if not isinstance(body, dict):
            self.error = "the engine answered with something that is no JSON object"
        elif message := _error_message(body):
            self.error = message
        elif body.get("object") == "response":
            self._response(body)
        elif isinstance(body.get("choices"), list):
            self._usage(body)
            self._choices(body, "message")
        elif not isinstance(body.get("data"), list):  # embeddings have no text
            self.error = "the engine's answer has no choices"

    def event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.finished = True
            return
        if self.plain:
            self.plain = self._words(data)
            if self.plain:
                return
        body = _decode(data)
        if not isinstance(body, dict):
            self.error = self.error or "an event of the stream is no JSON object"
        elif message := _error_message(body):
            self.error = self.error or message
        elif isinstance(kind := body.get("type"), str):
            self._response_event(kind, body)
        else:
            self._usage(body)
            self._choices(body, "delta")

    def _words(self, data: bytes) -> bool:
        """Take an event that holds nothing but words, as nearly all do; whether it was one."""
        try:
            piece = shapes.plain_piece.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        for choice in piece.choices:
            if choice.index == 0:
                self.finish_reason = choice.finish_reason or self.finish_reason
                if choice.delta.content is not None:
                    self.texts.append(choice.delta.content)
        return True

    def _choices(self, body: JsonObject, part: str) -> None:
        for choice in _objects(body.get("choices")):
            if choice.get("index", 0) != 0:
                continue
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            self.logprobs += _logprobs(choice.get("logprobs"))
            message = choice.get(part)
            # The older completions have their text in the choice itself.
            self._message(message if isinstance(message, dict) else choice)

    def _message(self, message: JsonObject) -> None:
        for name in ("content", "text", "refusal"):
            if isinstance(text := message.get(name), str):
                self.texts.append(text)
        for position, call in enumerate(_objects(message.get("tool_calls"))):
            self._tool(call.get("index", position)).add(call.get("id"), call.get("function"))
        if isinstance(old_style := message.get("function_call"), dict):
            self._tool(0).add(None, old_style)

    def _tool(self, index: int) -> "_Tool":
        return self.tools.setdefault(index, _Tool())

    def _usage(self, body: JsonObject) -> None:
        usage = body.get("usage")
        if not isinstance(usage, dict):
            return
        self.prompt_tokens = usage.get("prompt_tokens") or usage.get("input_tokens") or 0
        self.completion_tokens = usage.get("completion_tokens") or usage.get("output_tokens") or 0

    def _response(self, body: JsonObject) -> None:
        """`/v1/responses`: its own shape, for a whole body and for the last event of a stream."""
        self._usage(body)
        self.texts.clear()
        self.tools.clear()
        self.finish_reason = "stop" if body.get("status") == "completed" else body.get("status")
        for index, item in enumerate(_objects(body.get("output"))):
            for part in _objects(item.get("content")) if item.get("type") == "message" else ():
                self._message(part)
            if item.get("type") == "function_call":
                self._tool(index).add(item.get("call_id"), item)

    def _response_event(self, kind: str, body: JsonObject) -> None:
        if kind == "response.output_text.delta":
            self.texts.append(str(body.get("delta", "")))
        response = body.get("response")
        if isinstance(response, dict) and kind in _LAST_OF_RESPONSE:
            self.finished = True
            self._response(response)
            if kind == "response.failed":
                self.error = self.error or _error_message(response) or "the response failed"


_LAST_OF_RESPONSE = frozenset({"response.completed", "response.incomplete", "response.failed"})


@dataclass(slots=True)
class _Tool:
    """One tool call; in a stream its arguments arrive in pieces."""

    id: str | None = None
    name: str = ""
    arguments: list[str] = field(default_factory=list)

    def add(self, call_id: Any, function: Any) -> None:
        if isinstance(call_id, str):
            self.id = call_id
        if isinstance(function, dict):
            self.name = function.get("name") or self.name
            self.arguments.append(function.get("arguments") or "")

    def call(self) -> JsonObject:
        """In the shape that a chat message has."""
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def _logprobs(told: Any) -> Iterator[float]:
    """Of the tokens of a chat's choice, or of an older completion's."""
    if not isinstance(told, Mapping):
        return
    older = told.get("token_logprobs")
    values = [token.get("logprob") for token in _objects(told.get("content"))]
    values += older if isinstance(older, list) else []
    # The older form has null for a token that nothing came before.
    yield from (float(value) for value in values if isinstance(value, int | float))


def _confidence(logprobs: Sequence[float]) -> float | None:
    if not logprobs:
        return None
    return min(1.0, math.exp(sum(logprobs) / len(logprobs)))


def _decode(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _error_message(body: Any) -> str | None:
    """OpenAI's error object, or vLLM's bare string; None where the body carries no error."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        return str(error.get("message") or error)
    return str(error) if error else None


def _objects(value: Any) -> Iterator[JsonObject]:
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, dict))
