"""Files of other programs: read, written, and refused by the line where they are broken."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.datasets import Dataset, Example, Unanswered, from_rows
from rollout.errors import InvalidInputError
from rollout.formats import FORMATS, IMPORTED, Format, read_rows, write_rows

ASK = {"role": "user", "content": "Is it on?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}

LINES: dict[Format, dict[str, Any]] = {
    "openai-chat": {"messages": [ASK, YES]},
    "openai-preference": {
        "input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [YES],
        "non_preferred_output": [NO],
    },
    "trl-prompt-completion": {"prompt": "Is it on?", "completion": "yes"},
    "trl-preference": {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    "trl-unpaired": {"prompt": [ASK], "completion": [YES], "label": True},
    "axolotl-conversations": {
        "conversations": [{"from": "human", "value": "Is it on?"}, {"from": "gpt", "value": "yes"}]
    },
    "axolotl-alpaca": {"instruction": "Is it on?", "input": "", "output": "yes"},
    "axolotl-preference": {"messages": [ASK], "chosen": YES, "rejected": NO},
}


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("name", LINES)
def test_each_format_is_known_by_its_first_line(name: Format) -> None:
    read = read_rows(lines(LINES[name]), "triage")
    (row,) = read.rows
    assert (read.format, row.messages, row.gold) == (name, (ASK,), "yes")
    assert row.rejected == (("no",) if "preference" in name else ())


def test_a_refused_answer_alone_has_no_right_one() -> None:
    given = {"prompt": [ASK], "completion": [NO], "label": False}
    (row,) = read_rows(lines(given), "triage").unanswered
    assert (row.messages, row.rejected) == ((ASK,), ("no",))


def test_tools_calls_and_weights_are_kept() -> None:
    first = {"role": "assistant", "content": "wait", "weight": 0}
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "on", "tool_call_id": "1"}
    chat = {"messages": [ASK, first, ASK, calling, result, YES], "tools": [TOOL]}
    (row,) = read_rows(lines(chat), "triage").rows
    assert row.tools == (TOOL,)
    assert row.messages[1] == first
    assert row.messages[3] == {**calling, "content": ""}
    (row,) = read_rows(lines({"messages": [ASK, calling]}), "triage").rows
    assert (row.gold, row.calls) == ("", (CALL,))


def test_the_same_line_twice_is_two_rows_with_ids_that_do_not_depend_on_the_order() -> None:
    one, other = LINES["openai-chat"], {"messages": [ASK, NO]}
    ids = [row.case for row in read_rows(lines(one, other, one), "triage").rows]
    assert len(set(ids)) == 3
    assert set(ids) == {row.case for row in read_rows(lines(one, one, other), "triage").rows}


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm() -> None:
    content = b"\xef\xbb\xbf" + lines(LINES["openai-chat"]).replace(b"\n", b"\r\n") + b"\r\n"
    assert len(read_rows(content, "triage").rows) == 1


BROKEN: dict[str, tuple[bytes, str]] = {
    "no JSON": (b'{"messages": [', "no JSON"),
    "no object": (b"[1, 2]", "no JSON object"),
    "UTF-8": (b'{"messages": "\xff\xfe"}', "no UTF-8"),
    "NUL": (b'{"messages": "a\0b"}', "NUL"),
    "NUL in an escape": (rb'{"messages": "\u0000"}', "NUL"),
    "half a pair": (rb'{"messages": "\ud800"}', "no JSON|surrogate"),
    "too long": (b'{"messages": "' + b"a" * (5 << 20) + b'"}', "MiB"),
    "deep": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deep"),
    "rather deep": (b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}", "deep"),
    "another format": (lines({"prompt": "a", "completion": "b"}), "messages: it is missing"),
    "no messages": (lines({"messages": []}), "no message in it"),
    "messages are a text": (lines({"messages": "hello"}), "no list of messages"),
    "role": (lines({"messages": [{"role": "bot", "content": "a"}, YES]}), r"\[0\]\.role: 'bot'"),
    "role of a kind": (lines({"messages": [{"role": [], "content": "a"}, YES]}), "no role"),
    "nothing said": (
        lines({"messages": [ASK, {"role": "assistant", "content": " "}]}),
        "assistant says nothing",
    ),
    "no answer": (lines({"messages": [YES, ASK]}), "not the assistant's"),
    "only an answer": (lines({"messages": [YES]}), "nobody asks anything|no message"),
    "a picture": (
        lines({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, YES]}),
        "only parts of text",
    ),
    "a number": (lines({"messages": [{"role": "user", "content": 3}, YES]}), "no text"),
    "weight": (lines({"messages": [ASK, {**YES, "weight": 0.5}]}), "weight"),
    "unlearnt": (lines({"messages": [ASK, {**YES, "weight": 0}]}), "weight 0"),
    "calls": (lines({"messages": [ASK, {**YES, "tool_calls": [{}]}]}), "no function"),
    "tools": (lines({"messages": [ASK, YES], "tools": {}}), "no list of tools"),
    "a mark in the middle": (b"\xef\xbb\xbf" + lines(LINES["openai-chat"]), "no JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named(name: str) -> None:
    line, why = BROKEN[name]
    content = lines(LINES["openai-chat"]) + b"\n" + line.rstrip(b"\n") + b"\n"
    with pytest.raises(InvalidInputError, match=why) as caught:
        read_rows(content, "triage")
    assert caught.value.param == "line 3"
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        ("\ufeff{}".encode("utf-16-le"), "UTF-16"),
        (lines({"a": 1}), "no known format"),
    ],
)
def test_a_file_that_is_none_is_refused(content: bytes, why: str) -> None:
    with pytest.raises(InvalidInputError, match=why):
        read_rows(content, "triage")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[bytes, Format | None]:
    """A good line in which one value is another one, or some bytes are others."""
    name = draw(st.sampled_from(sorted(LINES)))
    values = json.loads(json.dumps(LINES[name]))
    place: Any = values
    while True:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not (isinstance(place[key], dict | list) and place[key]) or draw(st.booleans()):
            break
        place = place[key]
    place[key] = draw(json_values)
    content = bytearray(lines(values))
    for _ in range(draw(st.integers(0, 2))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content), draw(st.sampled_from([name, None]))


@given(damaged())
def test_a_damaged_file_is_read_or_refused_by_its_line(file: tuple[bytes, Format | None]) -> None:
    content, name = file
    with suppress(InvalidInputError):
        read = read_rows(content, "triage", name)
        assert from_rows(read.rows, read.unanswered).content


@given(st.binary(max_size=60), st.sampled_from([*IMPORTED, None]))
def test_bytes_of_any_kind_are_read_or_refused(content: bytes, name: Format | None) -> None:
    with suppress(InvalidInputError):
        read = read_rows(content, "triage", name)
        assert read.rows or read.unanswered


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)


@given(texts, texts, texts, st.sampled_from(IMPORTED))
def test_what_is_written_in_a_format_is_read_back(
    asked: str, gold: str, rejected: str, name: Format
) -> None:
    content = b"".join(write_rows(sample(asked, gold, rejected), name))
    read = read_rows(content, "triage", name)
    row = read.rows[0]
    assert (row.messages, row.gold) == (({"role": "user", "content": asked},), gold)
    if "preference" in name:
        assert row.rejected == (rejected,)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_can_be_written_for_one_split(name: Format) -> None:
    dataset = sample("a", "b", "c")
    assert b"".join(write_rows(dataset, name, "train"))
    assert not b"".join(write_rows(dataset, name, "heldout"))


def sample(asked: str, gold: str, rejected: str) -> Dataset:
    messages = ({"role": "user", "content": asked},)
    row = Example("c1", messages, gold, "ada", "first", 1.0, "k", "train", rejected=(rejected,))
    without = Unanswered("c2", messages, ("c",), 1.0, "k", "train")
    return from_rows([row], [without])
