"""What counts as the same answer, and what only looks different."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.agreement import (
    MOST_FOR_DIFFERENT_TEXTS,
    Agreement,
    compare,
    compare_exchange,
)
from rollout.cases import same_text
from rollout.exchanges import Answer, Exchange, Kind
from rollout.routes import Comparator, JsonRules, Judge, Route, Semantic, route_problems
from rollout.state import Trial

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def said(text: str, *calls: tuple[str, str]) -> Answer:
    return Answer(
        version=1,
        status=200,
        text=text,
        tool_calls=tuple(
            {"id": f"call_{index}", "function": {"name": name, "arguments": arguments}}
            for index, (name, arguments) in enumerate(calls)
        ),
    )


FAILED = Answer(version=1, status=500, error="boom")
BROKEN_OFF = Answer(version=1, status=200, text="Yes", error="the stream ended before its end")
LABELS = json.dumps({"enum": ["good", "bad"]})
SHAPE = json.dumps({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}})


@pytest.mark.parametrize(
    ("stable", "candidate", "expected"),
    [
        (said("Yes"), said("Yes"), Agreement(1.0, "exact")),
        (said("Yes"), said("  yes\n"), Agreement(1.0, "normalised")),
        (said(""), said(""), Agreement(1.0, "exact")),
        (said("Yes"), said(""), Agreement(0.0, "text")),
        (said("Yes"), said("No"), Agreement(0.0, "text")),
        (said("Yes"), FAILED, Agreement(0.0, "failure", "loss")),
        (BROKEN_OFF, said("Yes"), Agreement(0.0, "failure", "win")),
        (FAILED, BROKEN_OFF, Agreement(0.0, "failure", "tie")),
    ],
)
def test_texts(stable: Answer, candidate: Answer, expected: Agreement) -> None:
    assert compare(stable, candidate) == expected


def test_order_of_words_counts() -> None:
    swapped = compare(said("the dog bites the man"), said("the man bites the dog"))
    near = compare(said("the dog bites the man"), said("the dog bites the men"))
    assert 0 < swapped.score <= MOST_FOR_DIFFERENT_TEXTS
    assert near.score > compare(said("the dog bites the man"), said("a cat sleeps")).score


@pytest.mark.parametrize(
    ("comparator", "schema", "stable", "candidate", "expected"),
    [
        ("text", LABELS, "good", "fine", Agreement(0.0, "schema", "loss")),
        ("text", LABELS, "Good", "good", Agreement(0.0, "schema", "win")),
        ("text", LABELS, '"good"', "fine", Agreement(0.0, "schema", "loss")),
        ("text", LABELS, "good", "bad", Agreement(0.0, "text")),
        ("text", LABELS, "fine", "well", Agreement(0.0, "text")),
        ("json", SHAPE, '{"a": 1}', '{"a": "1"}', Agreement(0.0, "schema", "loss")),
        ("json", SHAPE, '{"b": 1}', '{"a": 1}', Agreement(0.0, "schema", "win")),
        ("json", SHAPE, '{"a": 1}', '{"a": 2}', Agreement(0.0, "json")),
        ("json", None, '{"a": 1}', "Sure! {", Agreement(0.0, "schema", "loss")),
        ("json", None, "[" * 5000, "1", Agreement(0.0, "schema", "win")),
        ("json", None, "NaN", "NaN, I think", Agreement(0.25, "text")),
        ("text", "{", "good", "bad", Agreement(0.0, "text")),
        ("text", '{"$ref": "http://nowhere.invalid/"}', "good", "bad", Agreement(0.0, "text")),
    ],
)
def test_a_side_that_alone_breaks_the_schema_has_lost(
    comparator: Comparator, schema: str | None, stable: str, candidate: str, expected: Agreement
) -> None:
    assert compare(said(stable), said(candidate), comparator, schema) == expected


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ({"a": 1, "b": [1, 2]}, {"b": [1.0, 2.0000000001], "a": 1}, 1.0),
        ({"a": "Yes"}, {"a": " yes "}, 1.0),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, 1 / 2),
        ({"a": 1, "b": 2}, {"a": 1}, 1 / 2),
        ({"a": 1, "b": {"c": 1, "d": 2}}, {"a": 1}, 1 / 3),
        ([1, 2, 3], [1, 2, 4], 2 / 3),
        ([1, 2], [2, 1], 0.0),
        ({"a": True}, {"a": 1}, 0.0),
        ({"a": None}, {}, 0.0),
        ({"a": []}, {"a": {}}, 0.0),
        ({"a": [], "b": None}, {"b": None, "a": []}, 1.0),
        ({"a": 10**400}, {"a": 1.5}, 0.0),
        ([], {"a": 1, "b": 2}, 0.0),
    ],
)
def test_json_is_compared_by_field(one: Any, other: Any, share: float) -> None:
    found = compare(said(json.dumps(one)), said(json.dumps(other, indent=1)), "json")
    assert found.score == pytest.approx(share)
    assert found.kind in ("json", "normalised")
    assert found.outcome is None


@pytest.mark.parametrize(
    ("one", "other", "kind", "score"),
    [
        ([("f", '{"a":1}')], [("f", '{"a": 1}')], "exact", 1.0),
        ([("f", '{"a":1}'), ("g", "")], [("g", "{}"), ("f", '{"a": 1.0}')], "tools", 1.0),
        ([("f", '{"a":1}')], [("g", '{"a":1}')], "tools", 0.0),
        ([("f", '{"a":1}')], [("f", '{"a":2}')], "tools", 0.5),
        ([("f", '{"a":1}')], [("f", "{a")], "tools", 0.5),
        ([("f", "1"), ("f", "2")], [("f", "2"), ("f", "1")], "tools", 1.0),
        ([("f", "1"), ("f", "2")], [("f", "1")], "tools", 0.5),
        ([("f", "1")], [], "tools", 0.0),
    ],
)
def test_tool_calls_are_compared_by_name_and_arguments(
    one: list[tuple[str, str]], other: list[tuple[str, str]], kind: Kind, score: float
) -> None:
    comparators: tuple[Comparator, ...] = ("text", "tools", "json")
    for comparator in comparators:
        found = compare(said("", *one), said("", *other), comparator, SHAPE)
        assert found == Agreement(score, kind)


def test_the_ids_of_tool_calls_mean_nothing() -> None:
    one = said("", ("f", "{}"))
    other = replace(one, tool_calls=({"id": "else", "function": one.tool_calls[0]["function"]},))
    assert compare(one, other) == Agreement(1.0, "exact")


texts = st.text(max_size=30) | st.lists(st.sampled_from(["a", "b", "c"]), max_size=6).map(" ".join)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
calls = st.lists(st.tuples(st.sampled_from("fg"), documents.map(json.dumps)), max_size=3)
answers = st.one_of(
    texts.map(said),
    documents.map(json.dumps).map(said),
    st.builds(lambda text, made: said(text, *made), texts, calls),
    st.just(FAILED),
)
comparators = st.sampled_from(["text", "json", "tools", "judge"])
schemas = st.sampled_from([None, LABELS, SHAPE])


@given(answers, answers, comparators, schemas)
def test_agreement_is_symmetric_and_bounded(
    one: Answer, other: Answer, comparator: Comparator, schema: str | None
) -> None:
    found = compare(one, other, comparator, schema)
    back = compare(other, one, comparator, schema)
    mirrored = {"win": "loss", "loss": "win"}
    assert 0.0 <= found.score <= 1.0
    assert back.score == pytest.approx(found.score)
    assert back.kind == found.kind
    assert back.outcome == mirrored.get(found.outcome or "", found.outcome)


@given(texts, texts)
def test_texts_agree_wholly_only_when_they_are_the_same(one: str, other: str) -> None:
    assert (compare(said(one), said(other)).score == 1.0) == same_text(one, other)


@given(answers, comparators, schemas)
def test_an_answer_agrees_with_itself(
    one: Answer, comparator: Comparator, schema: str | None
) -> None:
    assert compare(one, one, comparator, schema).score == (1.0 if one.ok else 0.0)


@given(documents, documents)
def test_json_agrees_wholly_only_when_every_field_does(one: Any, other: Any) -> None:
    found = compare(said(json.dumps(one)), said(json.dumps([other, one])), "json")
    assert found.score < 1.0


@pytest.mark.parametrize("answered", [4, 5])
def test_a_pair_is_put_together_whichever_side_the_client_saw(answered: int) -> None:
    trial = Trial("triage@5.9", 5, "canary", 10.0, NOW, NOW)
    mine, other = replace(said("Yes"), version=answered), replace(said("No"), version=9 - answered)
    exchange = Exchange(
        "r1", "triage", trial.id, "stable", "u", "/v1/chat/completions", "{}", mine, NOW
    )
    pair = compare_exchange(
        exchange, other, trial=trial.id, candidate=trial.candidate, route=Route("triage", "main")
    )
    assert (pair.stable.version, pair.candidate.version) == (4, 5)
    assert (pair.request_id, pair.route, pair.trial) == ("r1", "triage", trial.id)
    assert not pair.agrees


@pytest.mark.parametrize(
    ("rules", "one", "other", "share"),
    [
        (JsonRules(tolerance=0.01), {"a": 100}, {"a": 100.5}, 1.0),
        (JsonRules(tolerance=0.01), {"a": 100}, {"a": 102}, 0.0),
        (JsonRules(unordered=("/tags",)), {"tags": ["x", "y"]}, {"tags": ["y", "x"]}, 1.0),
        (JsonRules(unordered=("/tags",)), {"tags": ["x", "x"]}, {"tags": ["y", "x"]}, 1 / 2),
        (JsonRules(unordered=("/other",)), {"tags": ["x", "y"]}, {"tags": ["y", "x"]}, 0.0),
        (
            JsonRules(unordered=("",)),
            [{"a": 1, "b": 2}, {"a": 3}],
            [{"a": 3}, {"a": 1, "b": 9}],
            2 / 3,
        ),
        (JsonRules(unordered=("/*/t",)), [{"t": [1, 2]}], [{"t": [2, 1]}], 1.0),
        (JsonRules(unordered=("",)), [1, 2, 3], [3], 1 / 3),
        (JsonRules(ignored=("/id",)), {"id": 1, "a": 2}, {"id": 7, "a": 2}, 1.0),
        (JsonRules(ignored=("/id",)), {"id": 1, "a": 2}, {"a": 2}, 1.0),
        (JsonRules(ignored=("/*/at",)), [{"at": 1, "a": 2}], [{"at": 5, "a": 3}], 0.0),
        (JsonRules(ignored=("/a~1b",)), {"a/b": 1}, {"a/b": 2}, 1.0),
    ],
)
def test_a_route_says_what_of_its_json_matters(
    rules: JsonRules, one: Any, other: Any, share: float
) -> None:
    there = compare(said(json.dumps(one)), said(json.dumps(other)), "json", rules=rules)
    back = compare(said(json.dumps(other)), said(json.dumps(one)), "json", rules=rules)
    assert there.score == pytest.approx(share)
    assert back.score == pytest.approx(share)


def test_the_rules_hold_for_the_arguments_of_tools() -> None:
    one = said("", ("find", '{"id": 1, "q": "x"}'))
    other = said("", ("find", '{"id": 2, "q": "x"}'))
    assert compare(one, other).score == 0.75
    assert compare(one, other, rules=JsonRules(ignored=("/id",))).score == 1.0


def test_each_step_that_was_tried_is_told_with_its_cost() -> None:
    ticks = iter(range(100))
    found = compare(said("Yes"), said("No"), clock=lambda: float(next(ticks)))
    assert [(step.name, step.agreement) for step in found.steps] == [
        ("failure", None),
        ("exact", None),
        ("tools", None),
        ("schema", None),
        ("normalised", None),
        ("json", None),
        ("text", 0.0),
    ]
    assert {step.seconds for step in found.steps} == {1.0}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"json_rules": JsonRules(tolerance=1.0)}, "json_rules.tolerance"),
        ({"json_rules": JsonRules(unordered=("tags",))}, "json_rules.unordered"),
        ({"semantic": Semantic("main", agrees_from=1.5)}, "semantic.agrees_from"),
        ({"semantic": Semantic()}, "semantic.engine"),
        ({"semantic": Semantic("main", local="/models/x")}, "semantic.engine"),
        ({"judge": Judge("main", sample=2)}, "judge.sample"),
        ({"judge": Judge("main", seconds=0)}, "judge.seconds"),
        ({"judge": Judge("main", maximum_tokens=0)}, "judge.maximum_tokens"),
        ({"comparator": "judge"}, "judge"),
    ],
)
def test_comparing_that_makes_no_sense_is_named(changes: dict[str, Any], field: str) -> None:
    route = replace(Route("triage", "main"), **changes)
    assert [name for name, _ in route_problems(route)] == [field]
