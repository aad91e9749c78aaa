"""Streams, however they are cut into pieces."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.sse import StreamReader, blocks, event_data


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def token(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}]})


DONE = b"data: [DONE]\n\n"
USAGE = event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})
ERROR = event({"error": {"message": "EngineCore died", "code": 500}})
STREAM = token("A") + token('\n\ndata: "usage":{') + USAGE + DONE


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges) if end > start]


def passed(reader: StreamReader, parts: list[bytes]) -> bytes:
    return b"".join([*(reader.feed(part) for part in parts), reader.close()])


cuts = st.lists(st.integers(0, 10_000), max_size=12)


@given(cuts)
def test_bytes_pass_unchanged_however_they_are_cut(where: list[int]) -> None:
    reader = StreamReader()
    assert passed(reader, pieces(STREAM, where)) == STREAM
    assert reader.usage is not None
    assert (reader.usage.prompt, reader.usage.completion) == (5, 2)
    assert not reader.failed


@given(cuts)
def test_usage_that_was_not_asked_for_is_taken_out_and_nothing_else(where: list[int]) -> None:
    reader = StreamReader(strip_usage=True)
    assert passed(reader, pieces(STREAM, where)) == STREAM.replace(USAGE, b"")
    assert reader.usage is not None


@given(cuts)
def test_nothing_is_passed_on_but_whole_events(where: list[int]) -> None:
    reader = StreamReader()
    for part in pieces(STREAM, where):
        assert reader.feed(part).endswith((b"\n\n", b""))


@given(cuts)
def test_an_error_event_is_a_failure_and_has_no_done(where: list[int]) -> None:
    reader = StreamReader(strip_usage=True)
    assert passed(reader, pieces(token("A") + ERROR + DONE, where)) == token("A") + ERROR
    assert reader.failed


def test_words_about_errors_are_none() -> None:
    stream = token('{"error": "x"}') + event({"choices": [], "error": None}) + DONE
    reader = StreamReader()
    assert passed(reader, [stream]) == stream
    assert not reader.failed


@given(cuts)
def test_usage_is_found_where_every_event_has_a_place_for_it(where: list[int]) -> None:
    def word(text: str, usage: object = None) -> bytes:
        return event({"usage": usage, "choices": [{"index": 0, "delta": {"content": text}}]})

    stream = word("A") + word("B") + word("C", {"prompt_tokens": 5, "completion_tokens": 2}) + DONE
    reader = StreamReader()
    assert passed(reader, pieces(stream, where)) == stream
    assert reader.usage is not None
    assert (reader.usage.prompt, reader.usage.completion) == (5, 2)


def test_an_unfinished_event_is_passed_on_at_the_end() -> None:
    reader = StreamReader()
    assert reader.feed(token("A") + b"data: {") == token("A")
    assert reader.close() == b"data: {"


def test_usage_in_the_last_piece_of_the_answer_stays_and_counts() -> None:
    last = event({"choices": [{"index": 0, "delta": {}}], "usage": {"completion_tokens": 3}})
    reader = StreamReader(strip_usage=True)
    assert passed(reader, [last + DONE]) == last + DONE
    assert reader.usage is not None
    assert reader.usage.completion == 3


def test_the_usage_of_a_response_is_found_in_its_last_event() -> None:
    completed = {"type": "response.completed", "response": {"usage": {"output_tokens": 4}}}
    stream = b"event: response.completed\n" + event(completed)
    reader = StreamReader(strip_usage=True)
    assert passed(reader, [stream]) == stream
    assert reader.usage is not None
    assert reader.usage.completion == 4


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_either_blank_line_ends_an_event(end: bytes) -> None:
    stream = b"data: 1" + end + b": a comment" + end + b"data: 2" + end
    assert [event_data(block) for block in blocks(stream)] == [b"1", b"", b"2"]
    assert passed(StreamReader(), [stream]) == stream


def test_an_endless_event_is_not_held_for_ever() -> None:
    reader = StreamReader()
    parts = [b"data: " + b"x" * 100_000] * 20
    assert passed(reader, parts) == b"".join(parts)
