"""What a person is shown, and what follows from what they say."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.cases import (
    Case,
    Choice,
    Label,
    LabelledCase,
    choice_for,
    gold_text,
    normalise,
    outcome,
    prompt_digest,
    same_text,
)
from rollout.exchanges import Answer

NOW = datetime(2026, 1, 1, tzinfo=UTC)
QUESTION = ({"role": "user", "content": "Good or bad?"},)


def case(id: str = "case-a", stable: str = "good", candidate: str = "bad") -> Case:
    return Case(
        id=id,
        route="triage",
        trial="triage@5.9",
        request_id="r1",
        messages=QUESTION,
        stable=Answer(4, 200, stable),
        candidate=Answer(5, 200, candidate),
        agreement=0.0,
        kind="text",
        inclusion=1.0,
        priority=1.0,
        created_at=NOW,
    )


def label(choice: Choice, correction: str | None = None) -> Label:
    return Label("case-a", "triage", choice, "ann", NOW, correction)


def by_order(stable_first: bool) -> Case:
    """A case whose coin fell so."""
    return next(
        found
        for number in range(1000)
        if (found := case(id=f"case-{number}")).stable_first is stable_first
    )


def test_which_answer_is_shown_first_is_a_fair_coin() -> None:
    first = sum(case(id=f"case-{number}").stable_first for number in range(2000))
    assert 900 < first < 1100


@pytest.mark.parametrize("stable_first", [True, False])
@pytest.mark.parametrize(
    ("gold", "result"), [("good", "loss"), ("bad", "win"), ("neutral", "tie"), (" BAD\n", "win")]
)
def test_who_knows_the_right_answer_decides_the_pair_in_either_order(
    stable_first: bool, gold: str, result: str
) -> None:
    shown = by_order(stable_first)
    assert outcome(shown, label(choice_for(shown, gold))) == result


def test_the_answers_are_shown_in_the_order_of_the_coin() -> None:
    assert [answer.text for answer in by_order(True).answers] == ["good", "bad"]
    assert [answer.text for answer in by_order(False).answers] == ["bad", "good"]


def test_a_failed_answer_is_never_the_right_one() -> None:
    failed = replace(case(), candidate=Answer(5, 500, "good", error="boom"))
    assert outcome(failed, label(choice_for(failed, "good"))) == "loss"
    none_right = replace(failed, stable=Answer(4, 200, "bad"))
    assert choice_for(none_right, "good") == "neither"


@pytest.mark.parametrize("stable_first", [True, False])
def test_both_or_neither_is_a_tie(stable_first: bool) -> None:
    shown = by_order(stable_first)
    assert outcome(shown, label("both")) == outcome(shown, label("neither")) == "tie"


@pytest.mark.parametrize("stable_first", [True, False])
def test_the_right_answer_is_read_from_the_label(stable_first: bool) -> None:
    shown = by_order(stable_first)
    first, second = shown.answers
    assert gold_text(LabelledCase(shown, label("first"))) == first.text
    assert gold_text(LabelledCase(shown, label("second"))) == second.text
    assert gold_text(LabelledCase(shown, label("neither"))) is None
    assert gold_text(LabelledCase(shown, label("neither", "neutral"))) == "neutral"
    assert gold_text(LabelledCase(shown, label("first", ""))) == ""


@given(st.text())
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalise(f"  {text}\t") == normalise(text)
    assert same_text(text, f"\n{text} ")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Good or bad?", " good OR  bad?\n", True),
        ("Good or bad?", "Good or bad", False),
        ("Good", [{"type": "text", "text": "Good"}], True),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab", False),
        ("", None, True),
    ],
)
def test_a_prompt_is_named_by_what_it_says(one: Any, other: Any, same: bool) -> None:
    digests = [prompt_digest([{"role": "user", "content": content}]) for content in (one, other)]
    assert (digests[0] == digests[1]) is same


def test_a_prompt_is_named_by_who_says_it_too() -> None:
    system, user = ({"role": role, "content": "a"} for role in ("system", "user"))
    assert prompt_digest([system]) != prompt_digest([user])
    assert prompt_digest([user, user]) != prompt_digest([user])
