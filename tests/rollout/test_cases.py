"""What a person is shown, and what follows from what they say."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.cases import (
    Case,
    Choice,
    Label,
    LabelledCase,
    decide,
    gold_text,
    interest,
    normalise,
    outcome,
    prompt_digest,
    same_text,
    stratum_of,
    unsure_of,
)
from rollout.exchanges import Answer, Comparison, Judgement
from tests.labeler import choice_for

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


def said(*choices: Choice) -> list[Label]:
    """Labels of as many people, a minute after each other."""
    return [
        replace(
            label(choice), labeler=f"labeler-{number}", labelled_at=NOW + timedelta(minutes=number)
        )
        for number, choice in enumerate(choices)
    ]


@pytest.mark.parametrize(
    ("needed", "choices", "state", "asked"),
    [
        (1, [], "open", 1),
        (1, ["first"], "labelled", 1),
        (2, ["first"], "open", 2),
        (2, ["first", "first"], "labelled", 2),
        (2, ["first", "second"], "open", 3),
        (2, ["first", "second", "second"], "labelled", 3),
        (2, ["first", "second", "both"], "disputed", 3),
        (2, ["both", "neither"], "open", 3),
        (3, ["first", "first"], "open", 3),
        (3, ["first", "first", "second"], "labelled", 3),
        (3, ["first", "second", "both"], "open", 4),
        (3, ["first", "second", "both", "both"], "disputed", 4),
        (4, ["first", "first", "second", "second"], "open", 5),
        (4, ["first", "first", "second", "second", "first"], "labelled", 5),
    ],
)
def test_a_majority_decides_and_a_conflict_asks_one_more(
    needed: int, choices: list[Choice], state: str, asked: int
) -> None:
    decision = decide(replace(case(), labels_needed=needed), said(*choices))
    assert (decision.state, decision.needed) == (state, asked)
    assert (decision.label is not None) is (state == "labelled")
    assert (decision.outcome is None) is (state == "open")


@given(st.integers(1, 10), st.lists(st.sampled_from(Choice.__args__), max_size=11))  # type: ignore[attr-defined]
def test_more_people_are_never_asked_than_one_beyond_the_plan(
    needed: int, choices: list[Choice]
) -> None:
    asked = replace(case(), labels_needed=needed)
    decision = decide(asked, said(*choices))
    assert needed <= decision.needed or decision.state != "open"
    if len(choices) > needed:
        assert decision.state != "open"
    if decision.label is not None:
        assert 2 * choices.count(decision.label.choice) > len(choices)
        assert decision.outcome == outcome(asked, decision.label)


def test_what_people_cannot_agree_on_is_a_tie() -> None:
    decision = decide(replace(case(), labels_needed=2), said("first", "second", "neither"))
    assert (decision.state, decision.outcome, decision.label) == ("disputed", "tie", None)


def test_of_the_majority_the_newest_label_with_a_correction_decides() -> None:
    one, two, three = said("neither", "neither", "neither")
    asked = replace(case(), labels_needed=3)
    assert decide(asked, [one, two, three]).label is three
    corrected = replace(one, correction="perhaps")
    assert decide(asked, [corrected, two, three]).label is corrected


def test_a_case_is_dated_by_its_last_label() -> None:
    one, two, three = said("first", "first", "second")
    shown = LabelledCase(case(), two, (one, three))
    assert shown.labels == (one, two, three)
    assert shown.decided_at == three.labelled_at


def pair(**fields: Any) -> Comparison:
    plain = Comparison("r", "triage", "t", Answer(4, 200, "a"), Answer(5, 200, "b"), 0.0, "text")
    return replace(plain, **fields)


def sure(confidence: float) -> Answer:
    return Answer(4, 200, "a", confidence=confidence)


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        (pair(), 0.75),
        (pair(outcome="win"), 0.25),
        (pair(judgement=Judgement("judge", "win")), 0.5),
        (pair(judgement=Judgement("judge", "tie", consistent=False)), 1.0),
        (pair(stable=sure(0.9)), 0.55),
        (pair(stable=sure(0.9), candidate=sure(0.2)), 0.9),
        (pair(stable=sure(0.9), judgement=Judgement("judge", "win")), 0.5),
    ],
)
def test_how_unsure_a_pair_is(comparison: Comparison, expected: float) -> None:
    assert unsure_of(comparison) == pytest.approx(expected)


def test_a_prompt_on_which_stable_contradicts_itself_is_unsure() -> None:
    judged = pair(judgement=Judgement("judge", "win"))
    assert unsure_of(judged, pair(agreement=0.3)) == 1.0
    assert unsure_of(judged, pair(agreement=1.0)) == 0.5
    assert unsure_of(pair(outcome="loss"), pair(agreement=0.3)) == 0.25


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_interest_grows_with_distance_and_with_doubt(one: float, other: float, by: float) -> None:
    low, high = sorted((one, other))
    assert -6 <= interest(low, by) <= interest(high, by) <= 0.1
    assert interest(low, by) == interest(by, low)


def test_strata_part_agreements_from_disagreements_and_near_from_far() -> None:
    agreeing = replace(case(), agreement=1.0, inclusion=0.05)
    far, near = replace(case(), unsure=1.0), replace(case(), agreement=0.9)
    assert stratum_of(agreeing) == "0.05|agrees"
    assert len({stratum_of(each) for each in (agreeing, far, near)}) == 3
    assert stratum_of(replace(agreeing, unsure=0.25)) == stratum_of(agreeing)
