"""Answers of every shape that an engine gives, whole and streamed."""

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.answers import answer_from_body, answer_from_stream

TOOL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def body(value: Any) -> bytes:
    return json.dumps(value).encode()


def event(value: Any) -> bytes:
    return b"data: " + body(value) + b"\n\n"


def delta(index: int = 0, finish_reason: str | None = None, **delta: Any) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
    return event({"object": "chat.completion.chunk", "choices": [choice]})


DONE = b"data: [DONE]\n\n"
CHAT = [
    delta(role="assistant", content=""),
    delta(content="Yes"),
    delta(content=", é."),
    delta(finish_reason="stop"),
    event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}),
    DONE,
]


def test_a_chat_is_read_with_its_tokens_and_times() -> None:
    answer = answer_from_body(
        3,
        200,
        body(
            {
                "object": "chat.completion",
                "choices": [{"index": 0, "message": {"content": "Yes"}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 1},
            }
        ),
        total_seconds=0.5,
    )
    assert answer.ok
    assert (answer.version, answer.text, answer.finish_reason) == (3, "Yes", "stop")
    assert (answer.prompt_tokens, answer.completion_tokens, answer.total_seconds) == (7, 1, 0.5)


def test_a_completion_and_a_refusal_have_text_too() -> None:
    assert answer_from_body(1, 200, body({"choices": [{"index": 0, "text": "Yes"}]})).text == "Yes"
    refused = {"choices": [{"index": 0, "message": {"content": None, "refusal": "No."}}]}
    assert answer_from_body(1, 200, body(refused)).text == "No."


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [{"token": "a", "logprob": 0.0}, {"token": "b", "logprob": -1.0}]},
        {"token_logprobs": [None, 0, -1.0]},
    ],
)
def test_how_sure_an_answer_is_comes_from_its_tokens(logprobs: Any) -> None:
    choice = {"index": 0, "text": "ab", "logprobs": logprobs}
    sure = pytest.approx(math.exp(-0.5))
    assert answer_from_body(1, 200, body({"choices": [choice]})).confidence == sure
    assert answer_from_stream(1, 200, [event({"choices": [choice]}), DONE]).confidence == sure


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": [{}]}, 3, [1]])
def test_an_answer_without_probabilities_is_neither_sure_nor_unsure(logprobs: Any) -> None:
    choice = {"index": 0, "text": "ab", "logprobs": logprobs}
    assert answer_from_body(1, 200, body({"choices": [choice]})).confidence is None


def test_of_several_choices_the_first_is_read() -> None:
    choices = [{"index": 1, "text": "second"}, {"index": 0, "text": "first"}]
    assert answer_from_body(1, 200, body({"choices": choices})).text == "first"
    stream = [delta(1, content="second"), delta(0, content="first"), DONE]
    assert answer_from_stream(1, 200, stream).text == "first"


@given(cuts=st.lists(st.integers(0, sum(map(len, CHAT)))), ends=st.sampled_from([b"\n", b"\r\n"]))
def test_a_stream_reads_the_same_however_it_was_cut(cuts: list[int], ends: bytes) -> None:
    data = b"".join(CHAT).replace(b"\n", ends)
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    chunks = [data[start:end] for start, end in itertools.pairwise(edges)]
    answer = answer_from_stream(2, 200, chunks)
    assert answer.ok
    assert (answer.text, answer.finish_reason) == ("Yes, é.", "stop")
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 3)


def test_tool_calls_read_the_same_whole_and_in_pieces() -> None:
    message = {"content": None, "tool_calls": [TOOL]}
    whole = answer_from_body(
        1, 200, body({"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]})
    )
    start = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": '{"a"'}}
    rest = {"index": 0, "function": {"arguments": ": 1}"}}
    streamed = answer_from_stream(
        1,
        200,
        [delta(tool_calls=[start]), delta(tool_calls=[rest], finish_reason="tool_calls"), DONE],
    )
    assert whole.tool_calls == streamed.tool_calls == (TOOL,)
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"


RESPONSE = {
    "object": "response",
    "status": "completed",
    "output": [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "content": [{"type": "output_text", "text": "Yes"}]},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"a": 1}'},
    ],
    "usage": {"input_tokens": 7, "output_tokens": 1},
}


def test_the_responses_endpoint_reads_the_same_whole_and_streamed() -> None:
    whole = answer_from_body(1, 200, body(RESPONSE))
    streamed = answer_from_stream(
        1,
        200,
        [
            event({"type": "response.output_text.delta", "delta": "Yes"}),
            event({"type": "response.completed", "response": RESPONSE}),
        ],
    )
    assert whole == streamed
    assert (whole.text, whole.tool_calls, whole.prompt_tokens) == ("Yes", (TOOL,), 7)


@pytest.mark.parametrize(
    ("status", "data", "message"),
    [
        (404, body({"error": {"message": "no such model", "code": 404}}), "no such model"),
        (401, body({"error": "Unauthorized"}), "Unauthorized"),
        (502, b"<html>", "HTTP status 502"),
        (200, b"<html>", "the engine answered with something that is no JSON object"),
        (200, body({"hello": 1}), "the engine's answer has no choices"),
    ],
)
def test_a_failed_answer_says_why(status: int, data: bytes, message: str) -> None:
    for answer in (answer_from_body(1, status, data), *_as_stream(status, data)):
        assert not answer.ok
        assert answer.error == message
        assert answer.status == status


def _as_stream(status: int, data: bytes) -> list[Any]:
    return [] if status == 200 else [answer_from_stream(1, status, [data])]


def test_no_answer_at_all_keeps_its_reason() -> None:
    answer = answer_from_body(1, 0, b"", error="connection refused")
    assert (answer.ok, answer.status, answer.error) == (False, 0, "connection refused")


def test_an_error_event_before_done_is_a_failure() -> None:
    broken = event({"error": {"message": "EngineCore died", "code": 500}})
    answer = answer_from_stream(1, 200, [*CHAT[:2], broken, DONE])
    assert (answer.ok, answer.text, answer.error) == (False, "Yes", "EngineCore died")


def test_a_stream_without_its_end_is_a_failure() -> None:
    assert answer_from_stream(1, 200, CHAT[:3]).error == "the stream ended before its end"
    assert not answer_from_stream(1, 200, []).ok
