"""What points to a person is gone before anything is stored, and JSON is still the same JSON."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.answers import answer_from_stream
from rollout.exchanges import Answer, Exchange
from rollout.redaction import RedactionTimeoutError, Redactor, compile_pattern

REDACTOR = Redactor(patterns={"ticket": r"TCK-\d+"})

FOUND = [
    ("write to anna.smith+tag@example.co.uk.", "write to [email]."),
    ("<a@b.io>, c_d@sub.example.com", "<[email]>, [email]"),
    ("email=o'brien@example.com&x=1", "email=[email]&x=1"),
    ("user@exämple.de and пётр@пример.рф", "[email] and [email]"),
    ("ops@xn--e1afmkfd.xn--p1ai", "[email]"),
    ("two:a@b.co@c.com", "two:[email]@c.com"),
    ("call +1 415 555 2671 now", "call [phone] now"),
    ("(415) 555-2671 or 415.555.2671", "[phone] or [phone]"),
    ("ring +49 30 901820, +44 20 7946 0958", "ring [phone], [phone]"),
    ("tel:+14155552671", "tel:[phone]"),
    ("4111111111111111", "[card]"),
    ("card 4111 1111 1111 1111 exp 12/27", "card [card] exp 12/27"),
    ("5500-0000-0000-0004, 3400 000000 00009", "[card], [card]"),
    ("1 4111 1111 1111 1111 12", "1 [card] 12"),
    ("6011000000000004", "[card]"),
    ("about TCK-123 from a@b.io", "about [ticket] from [email]"),
]
LEFT = [
    "no@tld", "@app.route('/x')", "a @ b.com", "react@18.2.0", "user@localhost", "@handle",
    "4111 1111 1111 1112", "0000 0000 0000 0000", "1700000000000000000", "12345",
    "2026-11-22 04:15:20", "192.168.100.200", "3.14159265358979", "555-0100", "£1,000,000",
    "ISBN 978-3-16-148410-0", "[email] [phone] [card] [ticket]", "", "Hello.", "TCK-",
    "data:image/png;base64,4155552671+4155552671/AAAA",
]  # fmt: skip


@pytest.mark.parametrize(("text", "redacted"), FOUND)
def test_what_points_to_a_person_gives_way_to_its_kind(text: str, redacted: str) -> None:
    assert REDACTOR.text(text) == redacted


@pytest.mark.parametrize("text", LEFT)
def test_what_only_looks_like_it_is_left(text: str) -> None:
    assert REDACTOR.text(text) == text


def test_json_keeps_its_keys_its_numbers_and_every_byte_in_between() -> None:
    body = '{ "a@b.io":1.50e2, "n": 4111111111111111 ,"t":"\\u0061\\u0040b.io","u":"\\u00fc" }'
    redacted = '{ "a@b.io":1.50e2, "n": 4111111111111111 ,"t":"[email]","u":"\\u00fc" }'
    assert REDACTOR.json(body) == redacted


def test_json_in_a_string_in_json_stays_json() -> None:
    inner = json.dumps({"mail": "a@b.io", "number": 4155552671, "deep": json.dumps(["c@d.io"])})
    done = json.loads(json.loads(REDACTOR.json(json.dumps({"arguments": inner})))["arguments"])
    assert done == {"mail": "[email]", "number": 4155552671, "deep": '["[email]"]'}


@pytest.mark.parametrize("odd", ["1e999", "9" * 5000, '"\\ud800"', '"\\ud800 \\u0000"'])
def test_odd_but_valid_json_keeps_its_keys(odd: str) -> None:
    text = f'{{"c@d.io": {odd}, "x": "a@b.io"}}'
    assert REDACTOR.json(text) == f'{{"c@d.io": {odd}, "x": "[email]"}}'


def test_what_is_no_json_is_redacted_as_text() -> None:
    assert REDACTOR.json('{"c@d.io": NaN}') == '{"[email]": NaN}'


def test_half_a_surrogate_pair_is_no_error() -> None:
    assert REDACTOR.json('["\\ud800 a@b.io"]') == '["\\ud800 [email]"]'


def test_an_exchange_is_redacted_in_all_its_parts_and_counted() -> None:
    call = {"id": "1", "function": {"name": "mail", "arguments": '{"to":"a@b.io"}'}}
    redacted = REDACTOR.exchange(
        exchange(Answer(1, 200, text="ask c@d.io", tool_calls=(call,), error="for e@f.io"))
    )
    done = redacted.exchange
    assert json.loads(done.request)["messages"][0]["content"] == "I am [email], [phone]"
    assert done.answer.text == "ask [email]"
    assert done.answer.tool_calls[0]["function"]["arguments"] == '{"to":"[email]"}'
    assert done.answer.error == "for [email]"
    assert redacted.counts == {"email": 4, "phone": 1}


def test_an_address_that_a_stream_cuts_in_two_is_found() -> None:
    chunks = [
        b'data: {"choices":[{"index":0,"delta":{"content":"ann"}}]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"content":"a@b.i"}}]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"content":"o"}}]}\n\ndata: [DONE]\n\n',
    ]
    assert REDACTOR.answer(answer_from_stream(1, 200, chunks)).text == "[email]"


def test_each_kind_can_be_switched_off() -> None:
    text = "a@b.io 4111111111111111 +14155552671"
    assert Redactor(emails=False).text(text) == "a@b.io [card] [phone]"
    assert Redactor(cards=False, phones=False).text(text) == "[email] 4111111111111111 +14155552671"


def test_numbers_without_a_country_are_found_in_the_regions_named() -> None:
    text = "020 7946 0958 / +1 415 555 2671"
    assert Redactor(phone_regions=["GB"]).text(text) == "[phone] / [phone]"
    assert Redactor(phone_regions=[]).text(text) == "020 7946 0958 / [phone]"


def test_a_pattern_that_never_ends_is_given_up() -> None:
    slow = Redactor(patterns={"slow": r"(?:\w|\d|_\w*)+!"}, maximum_seconds=0.05)
    with pytest.raises(RedactionTimeoutError):
        slow.text("1_" * 5_000 + " !")


def test_text_made_to_be_slow_is_given_up() -> None:
    short = Redactor(maximum_seconds=0.02)
    with pytest.raises(RedactionTimeoutError):
        short.text("41 55 55 26 7 " * 40_000)
    assert Redactor().text("a" * 500_000 + "@") == "a" * 500_000 + "@"


@pytest.mark.parametrize(("name", "pattern"), [("bad", "("), ("Email", "x"), ("phone", "x")])
def test_a_bad_pattern_is_refused_by_its_name(name: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=name):
        compile_pattern(name, pattern)


private = st.sampled_from(
    ["a@b.io", "+1 415 555 2671", "4111 1111 1111 1111", "TCK-7", "[email]", '"', "\\", "[1]", "@"]
)
texts = st.lists(st.one_of(st.text(max_size=8), private), max_size=6).map("".join)
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        texts,
    ),
    lambda each: st.one_of(st.lists(each, max_size=4), st.dictionaries(texts, each, max_size=4)),
    max_leaves=12,
)


@given(values, st.booleans())
def test_json_stays_json_of_the_same_shape(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert shape(json.loads(REDACTOR.json(text))) == shape(value)


@given(values)
def test_a_second_time_changes_nothing(value: Any) -> None:
    once = REDACTOR.json(json.dumps(value))
    assert REDACTOR.json(once) == once


@given(texts)
def test_a_second_time_changes_no_text_either(text: str) -> None:
    once = REDACTOR.text(text)
    assert REDACTOR.text(once) == once


def shape(value: Any) -> Any:
    """The value without what its strings say."""
    if isinstance(value, str):
        return str
    if isinstance(value, list):
        return [shape(each) for each in value]
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    return value


def exchange(answer: Answer) -> Exchange:
    content = "I am a@b.io, +1 415 555 2671"
    return Exchange(
        request_id="1",
        route="r",
        trial="t",
        arm="stable",
        unit="u",
        path="/v1/chat/completions",
        request=json.dumps({"model": "r", "messages": [{"role": "user", "content": content}]}),
        answer=answer,
        captured_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
