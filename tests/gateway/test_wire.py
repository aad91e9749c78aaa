"""Bodies: what is read of them, and that every other byte stays."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gateway import wire
from rollout.errors import InvalidInputError
from rollout.versions import Prompt, Version

AT = datetime(2026, 1, 1, tzinfo=UTC)

# Names and texts that look like what is searched for.
texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ['"model"', '"model":"x"', "model", '\\"model\\"', "stream_options", "\\u006d"]
    ),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
OWN = {
    "model", "stream", "stream_options", "prompt_cache_key", "safety_identifier", "user",
}  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A body as a client may write it: any order, any spacing, escaped or not."""
    others = draw(st.dictionaries(texts.filter(lambda name: name not in OWN), values, max_size=5))
    members = list(others.items())
    members.insert(draw(st.integers(0, len(members))), ("model", draw(st.text(min_size=1))))
    if draw(st.booleans()):
        members.insert(draw(st.integers(0, len(members))), ("stream", True))
    body = dict(members)
    text = json.dumps(
        body,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 2])),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,", " : ")])),
    )
    assume("\ud800" not in text)
    return body, text.encode("utf-8", "ignore")


@given(bodies())
def test_splicing_changes_the_model_and_no_other_byte(case: tuple[dict[str, Any], bytes]) -> None:
    body, text = case
    try:
        request = wire.read_request(text)
    except InvalidInputError:
        # A lone surrogate, which is no text at all.
        assume(False)
    spliced = wire.splice(request, b'"other"')
    start, end = request.span
    assert json.loads(text[start:end]) == body["model"]
    assert spliced == text[:start] + b'"other"' + text[end:]
    assert json.loads(spliced) == {**body, "model": "other"}


@given(bodies())
def test_asking_for_usage_adds_only_that(case: tuple[dict[str, Any], bytes]) -> None:
    body, text = case
    try:
        request = wire.read_request(text)
    except InvalidInputError:
        assume(False)
    asked = json.loads(wire.splice(request, b'"other"', ask_usage=True))
    assert asked == {**body, "model": "other", "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, {"include_usage": True}),
        ({}, {"include_usage": True}),
        ({"include_usage": False, "x": 1}, {"include_usage": True, "x": 1}),
        (
            {"continuous_usage_stats": True},
            {"include_usage": True, "continuous_usage_stats": False},
        ),
    ],
)
def test_the_clients_stream_options_are_kept(options: Any, expected: Any) -> None:
    body = {"stream_options": options, "model": "r", "stream": True}
    request = wire.read_request(json.dumps(body).encode())
    assert not request.wants_usage
    asked = json.loads(wire.splice(request, b'"m"', ask_usage=True))
    assert asked == {**body, "model": "m", "stream_options": expected}


def test_stream_options_are_found_however_they_are_spelt() -> None:
    body = rb'{"model":"r","stream":true,"stream\u005foptions":{"include_usage":false}}'
    asked = json.loads(wire.splice(wire.read_request(body), b'"m"', ask_usage=True))
    assert asked["stream_options"] == {"include_usage": True}


def test_a_number_that_no_float_holds_is_no_fault_of_a_version_with_a_prompt() -> None:
    prompt = Prompt(({"role": "system", "content": "Be brief."},))
    request = wire.read_request(b'{"model":"r","messages":[],"seed":1e999}')
    with pytest.raises(InvalidInputError, match="cannot read"):
        wire.render(request, version(prompt=prompt), wire.CHAT)


def test_the_name_of_an_option_inside_the_prompt_is_no_option() -> None:
    body = {"model": "r", "messages": "stream_options", "stream": True}
    request = wire.read_request(json.dumps(body).encode())
    asked = json.loads(wire.splice(request, b'"m"', ask_usage=True))
    assert asked == {**body, "model": "m", "stream_options": {"include_usage": True}}


def test_a_model_inside_the_prompt_is_not_hit() -> None:
    text = rb'{"messages":[{"content":"say \"model\": \"x\""}],"x":{"model":"y"},"model" : "r"}'
    request = wire.read_request(text)
    assert request.model == "r"
    assert wire.splice(request, b'"m"') == text.replace(b'"model" : "r"', b'"model" : "m"')


def test_an_escaped_name_is_the_same_name() -> None:
    text = rb'{"x":{"model":"y"},"\u006dodel":"r"}'
    request = wire.read_request(text)
    assert request.model == "r"
    assert wire.splice(request, b'"m"') == rb'{"x":{"model":"y"},"\u006dodel":"m"}'


@pytest.mark.parametrize(
    "text",
    [
        rb'{"model":"a","model":"b"}',
        rb'{"model":"a","x":1,"model":"b"}',
        rb'{"model":"a","x":1,"\u006dodel":"b"}',
        rb'{"\u006dodel":"a","\u006dodel":"b"}',
        rb'{"model":"a","model":"a"}',
    ],
)
def test_a_second_model_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidInputError, match="twice"):
        wire.read_request(text)


@pytest.mark.parametrize(
    ("text", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"null", None),
        (b'"model"', None),
        (b'{"model":"r"} x', None),
        (b'{"model":"r","x":NaN}', None),
        (b'\xef\xbb\xbf{"model":"r"}', None),
        (b'{"model":"r","x":"\xff"}', None),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"model":"r"}', None),
        (b"{}", "model"),
        (b'{"model":""}', "model"),
        (b'{"model":null}', "model"),
        (b'{"model":5}', "model"),
        (b'{"model":["r"]}', "model"),
        (b'{"model":"r","stream":"yes"}', "stream"),
        (b'{"model":"r","user":7}', "user"),
        (b'{"model":"r","stream_options":[]}', "stream_options"),
    ],
)
def test_what_is_no_request_is_refused_with_its_field(text: bytes, param: str | None) -> None:
    with pytest.raises(InvalidInputError) as caught:
        wire.read_request(text)
    assert caught.value.status == 400
    assert caught.value.param == param


def test_the_sticky_key_is_the_most_specific_that_the_client_gave() -> None:
    def sticky(**fields: str) -> str | None:
        return wire.read_request(json.dumps({"model": "r", **fields}).encode()).sticky

    assert sticky(user="u", safety_identifier="s", prompt_cache_key="p") == "p"
    assert sticky(user="u", safety_identifier="s") == "s"
    assert sticky(user="u") == "u"
    assert sticky(messages='"user":"u"') is None


def version(**fields: Any) -> Version:
    return Version("r", 2, "main", "base", AT, **fields)


def rendered(body: dict[str, Any], path: str = wire.CHAT, **fields: Any) -> Any:
    request = wire.read_request(json.dumps({"model": "r", **body}).encode())
    return json.loads(wire.render(request, version(**fields), path))


def test_a_version_without_a_prompt_only_gets_its_name() -> None:
    text = b'{ "model": "r", "seed" : 1.0 }'
    body = wire.render(wire.read_request(text), version(adapter="ab" * 32), wire.CHAT)
    assert body == b'{ "model": "base-' + b"ab" * 10 + b'", "seed" : 1.0 }'


def test_a_prompt_is_put_before_the_clients_messages() -> None:
    prompt = Prompt(({"role": "system", "content": "Be brief."},))
    messages = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]
    assert rendered({"messages": messages, "x": 1}, prompt=prompt) == {
        "model": "base",
        "messages": [{"role": "system", "content": "Be brief."}, *messages],
        "x": 1,
    }


def test_a_prompt_takes_the_place_of_the_system_message() -> None:
    prompt = Prompt(({"role": "system", "content": "Be brief."},), mode="replace_system")
    messages = [
        {"role": "developer", "content": "Mine."},
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Also mine."},
    ]
    assert rendered({"messages": messages}, prompt=prompt)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_a_prompt_goes_before_the_input_of_a_response() -> None:
    prompt = Prompt(({"role": "system", "content": "Be brief."},))
    assert rendered({"input": "Hi"}, wire.RESPONSES, prompt=prompt)["input"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_sampling_defaults_give_way_to_the_client() -> None:
    body = rendered({"temperature": 1}, sampling={"temperature": 0, "seed": 7})
    assert (body["temperature"], body["seed"]) == (1, 7)


@pytest.mark.parametrize("body", [{}, {"messages": "Hi"}, {"messages": {"role": "user"}}])
def test_messages_that_are_none_are_refused(body: dict[str, Any]) -> None:
    prompt = Prompt(({"role": "system", "content": "Be brief."},))
    with pytest.raises(InvalidInputError) as caught:
        rendered(body, prompt=prompt)
    assert caught.value.param == "messages"


def test_usage_is_read_in_either_spelling() -> None:
    chat = wire.read_usage(b'{"usage":{"prompt_tokens":3,"completion_tokens":4,"x":null}}')
    response = wire.read_usage(b'{"usage":{"input_tokens":3,"output_tokens":4}}')
    assert chat is not None
    assert response is not None
    assert (chat.prompt, chat.completion) == (response.prompt, response.completion) == (3, 4)
    assert wire.read_usage(b'{"usage":null}') is None
    assert wire.read_usage(b"oops") is None
    assert wire.read_usage(b'{"usage":{"prompt_tokens":-5}}') is None
