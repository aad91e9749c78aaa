"""What a good colleague would say of a route, question by question."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.advice import (
    Advice,
    Gathered,
    Sample,
    advise,
    classes_of,
    failures_of,
    sample_of,
)
from rollout.cases import Label, LabelledCase
from rollout.exchanges import Answer, Exchange
from rollout.retraining import Accord
from rollout.tallies import Agreement
from tests.labeler import choice_for
from tests.rollout.test_cases import case

NOW = datetime(2026, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)
TOPICS = ("billing", "hardware", "delivery")


def asked(number: int, said: str, right: str, *, prompt: str = "") -> LabelledCase:
    """Stable said one thing, and a person wrote what would have been right."""
    message = {"role": "user", "content": prompt or f"request number {number}"}
    found = case(id=f"c{number}", stable=said, candidate="no idea")
    found = replace(found, messages=(message,))
    choice = choice_for(found, right)
    correction = right if choice == "neither" else None
    return LabelledCase(found, Label(found.id, "triage", choice, "ann", NOW, correction))


def choices(count: int, wrong: int = 0, said: str = "hardware") -> list[LabelledCase]:
    """A choice among three; in the first `wrong` cases stable said something else."""
    return [
        asked(n, said if n < wrong else TOPICS[n % 3], TOPICS[n % 3] if n >= wrong else "billing")
        for n in range(count)
    ]


def samples(
    count: int = 100, instruction: str = "Sort the request of 1 March.", ago: timedelta = 30 * DAY
) -> list[Sample]:
    """One a day's share from then until now."""
    return [
        Sample(instruction, "it is broken", 200, NOW - ago + ago * n / count, 50, 2)
        for n in range(count)
    ]


def known(**changes: Any) -> Gathered:
    """A route of which nothing speaks against training it."""
    return replace(
        Gathered(
            route="triage",
            stable="triage@4",
            base="base",
            samples=samples(),
            labelled=choices(300, wrong=60),
            agreement=Agreement(0.85, 80),
            accord=Accord(0.8, 0.75, 0.85, 300, 1.0),
            suite_rows=200,
            evaluation_rows=200,
            detectable=0.09,
        ),
        **changes,
    )


def finding(advice: Advice, word: str) -> tuple[str, str]:
    (found,) = [each for each in advice.findings if word in each.question]
    return found.mark, found.says


def test_where_nothing_speaks_against_it_one_should_train() -> None:
    advice = advise(known(), None, NOW)
    assert advice.verdict == "train"
    assert advice.headline.startswith("Train:")
    assert finding(advice, "one task") == (
        "good",
        "100% of 100 captured requests come under one instruction",
    )
    assert "about 7 of 50 tokens" in finding(advice, "save")[1]
    assert "60 wrong answers 60 chose another answer" in finding(advice, "behaviour")[1]


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({"adapters": False}, "no", "loads no adapters"),
        ({"accord": Accord(0.99, 0.975, 1.0, 400, 1.0)}, "no", "hardly anything left"),
        ({"labelled": choices(300, 60, "It is: billing!")}, "first", "60 of 60 wrong answers"),
        ({"agreement": Agreement(0.4, 80)}, "first", "Krippendorff's alpha is 0.40"),
        (
            {"samples": [*samples(80), *samples(40, "Another one.", ago=2 * DAY)]},
            "first",
            "came 2.0 days ago",
        ),
        (
            {"samples": [s for n in range(5) for s in samples(20, f"Task {'abcde'[n]}.")]},
            "first",
            "give each task a route of its own",
        ),
        ({"labelled": choices(40, 12)}, "not yet", "40 different prompts"),
        ({"suite_rows": None, "evaluation_rows": 30}, "not yet", "held-out part would have 30"),
    ],
)
def test_what_stands_in_the_way_is_the_verdict(
    changes: dict[str, Any], verdict: str, words: str
) -> None:
    advice = advise(known(**changes), None, NOW)
    assert advice.verdict == verdict
    assert words in advice.headline


def test_knowledge_that_the_prompt_lacks_is_told_from_behaviour() -> None:
    facts = [
        asked(n, "I am not sure.", f"Your contract ends on {n + 1} May, says Ms Miller.")
        for n in range(20)
    ]
    given = [
        asked(
            100 + n,
            "Order received.",
            f"Order {n} is received.",
            prompt=f"Confirm order {n} for me, please.",
        )
        for n in range(5)
    ]
    failures = failures_of([*facts, *given], None)
    assert [failure.kind for failure in failures] == ["facts"] * 20 + ["wording"] * 5
    advice = advise(known(labelled=[*facts, *given]), None, NOW)
    assert advice.verdict == "first"
    assert "retrieval" in advice.headline


def test_an_answer_that_breaks_the_schema_is_wrong_in_form() -> None:
    def valid(text: str) -> bool:
        return text.startswith("{")

    rows = [asked(n, "billing, I think", f'{{"topic": "t{n}"}}') for n in range(30)]
    assert {failure.kind for failure in failures_of(rows, valid)} == {"form"}
    assert advise(known(labelled=rows), valid, NOW).verdict == "first"
    constrained = [replace(sample, constrained=True) for sample in samples()]
    advice = advise(known(labelled=rows, samples=constrained), valid, NOW)
    assert finding(advice, "constraining")[0] == "unknown"


def test_a_number_in_the_instruction_is_no_new_instruction() -> None:
    daily = [
        replace(sample, instruction=f"Today is {n}. Sort it.") for n, sample in enumerate(samples())
    ]
    advice = advise(known(samples=daily), None, NOW)
    assert finding(advice, "one task")[0] == "good"
    assert finding(advice, "stopped changing")[0] == "good"


def test_too_little_known_is_said_and_is_no_reason_against() -> None:
    nothing = Gathered(route="triage", stable="triage@1", base="base")
    advice = advise(nothing, None, NOW)
    assert advice.verdict == "not yet"
    assert finding(advice, "one task")[0] == "unknown"
    assert finding(advice, "agree")[0] == "unknown"
    assert finding(advice, "something to gain")[0] == "unknown"


def test_classes_that_lack_rows_are_named() -> None:
    rows = [*choices(300, 60), *(asked(900 + n, "billing", "refund") for n in range(4))]
    assert classes_of(rows)["refund"] == 4
    assert "fewer than 10 of refund" in finding(advise(known(labelled=rows), None, NOW), "data")[1]


def test_a_request_is_read_for_what_it_asks() -> None:
    body = {
        "model": "triage",
        "messages": [
            {"role": "system", "content": "Sort it."},
            {"role": "user", "content": [{"type": "text", "text": "It is broken."}]},
        ],
        "response_format": {"type": "json_schema"},
    }
    answer = Answer(1, 200, "hardware", prompt_tokens=20, completion_tokens=1)
    exchange = Exchange(
        "r", "triage", None, "stable", "u", "/v1/chat/completions", json.dumps(body), answer, NOW
    )
    found = sample_of(exchange, True)
    assert (found.instruction, found.opening, found.characters) == ("Sort it.", "It is broken.", 21)
    assert (found.constrained, found.prompt_tokens, found.valid) == (True, 20, True)


@pytest.mark.parametrize("request_text", ["", "[]", "no json", '{"messages": [1, null, {}]}'])
def test_a_request_that_cannot_be_read_breaks_nothing(request_text: str) -> None:
    exchange = Exchange(
        "r", "triage", None, "stable", "u", "/v1/completions", request_text, Answer(1, 200), NOW
    )
    assert sample_of(exchange, None).instruction == ""


texts = st.text(max_size=30)


@given(
    rows=st.lists(st.tuples(texts, texts), max_size=40),
    instructions=st.lists(texts, max_size=40),
    alpha=st.one_of(st.none(), st.floats(-1, 1)),
    rows_to_evaluate=st.integers(0, 500),
)
def test_any_route_gets_a_verdict_with_reasons(
    rows: Sequence[tuple[str, str]],
    instructions: Sequence[str],
    alpha: float | None,
    rows_to_evaluate: int,
) -> None:
    gathered = known(
        labelled=[asked(n, said, right) for n, (said, right) in enumerate(rows)],
        samples=[Sample(text, "", len(text), NOW - n * DAY) for n, text in enumerate(instructions)],
        agreement=Agreement(alpha, 50),
        evaluation_rows=rows_to_evaluate,
    )
    advice = advise(gathered, None, NOW)
    assert len(advice.findings) == 11
    assert all(each.says for each in advice.findings)
    assert advice == advise(gathered, None, NOW)
    if advice.verdict == "train":
        assert all(each.mark != "bad" for each in advice.findings)
