"""Whom the shadow asks, with which request, and what it gives a person to judge."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.queues import queue_length
from gateway.shadow.pairing import (
    Reason,
    case_for,
    messages_of,
    other_version,
    priority_of,
    roomiest,
    shadow_request,
)
from rollout.errors import InvalidInputError
from rollout.exchanges import Answer, Comparison, Exchange
from rollout.policy import Policy
from rollout.state import Rollout, Trial
from rollout.versions import Prompt, Version

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TRIAL = Trial("triage@5.9", 5, "shadow", 0.0, NOW, NOW)
ROLLOUT = Rollout("triage", 9, stable=4, trial=TRIAL)
MESSAGES = [{"role": "user", "content": "Good or bad?"}]


def exchange(
    version: int = 4,
    *,
    trial: str | None = TRIAL.id,
    path: str = "/v1/chat/completions",
    status: int = 200,
    error: str | None = None,
    **body: Any,
) -> Exchange:
    request = json.dumps({"model": "triage", "messages": MESSAGES} | body)
    answer = Answer(version, status, "good", error=error)
    return Exchange("r1", "triage", trial, "stable", "u", path, request, answer, NOW)


def comparison(request_id: str = "r1", agreement: float = 0.0, **changes: Any) -> Comparison:
    pair = Comparison(
        request_id=request_id,
        route="triage",
        trial=TRIAL.id,
        stable=Answer(4, 200, "good"),
        candidate=Answer(5, 200, "bad"),
        agreement=agreement,
        kind="text",
    )
    return replace(pair, **changes)


VERSION = Version("triage", 5, "main", "base", NOW, adapter="ab" * 32)


@pytest.mark.parametrize(
    ("captured", "asked"),
    [
        (exchange(4), 5),
        (exchange(5), 4),
        (exchange(3), "pinned"),
        (exchange(trial=None), "no_trial"),
        (exchange(trial="triage@5.7"), "stale"),
        (exchange(path="/v1/embeddings"), "endpoint"),
        (exchange(status=400, error="too long"), "client_error"),
        (exchange(status=499, error="the client went away"), "client_error"),
        (exchange(status=503, error="no replica"), "engine_error"),
        (exchange(status=0, error="connection refused"), "engine_error"),
        (exchange(status=500, error="boom"), "engine_error"),
        (exchange(5, status=200, error="EngineCore died"), "engine_error"),
    ],
)
def test_the_side_that_did_not_answer_is_asked(captured: Exchange, asked: int | Reason) -> None:
    assert other_version(captured, ROLLOUT) == asked


@pytest.mark.parametrize("rollout", [None, replace(ROLLOUT, trial=None)])
def test_without_a_trial_nobody_is_asked(rollout: Rollout | None) -> None:
    assert other_version(exchange(), rollout) == "stale"


def test_a_version_is_asked_for_one_whole_answer_and_nothing_else_changes() -> None:
    captured = exchange(
        stream=True, stream_options={"include_usage": True}, n=3, temperature=0.5, priority=-9
    )
    asked = json.loads(shadow_request(captured, VERSION, None))
    assert asked == {
        "model": VERSION.served_name,
        "messages": MESSAGES,
        "temperature": 0.5,
        "n": 1,
    }


def test_an_engine_that_can_is_asked_how_sure_it_is_of_a_chat() -> None:
    def asked(**fields: Any) -> Any:
        body = shadow_request(exchange(**fields), VERSION, None, logprobs=True)
        return json.loads(body).get("logprobs")

    assert asked() is True
    assert asked(logprobs=False) is False


def test_the_priority_is_ours_and_not_the_clients() -> None:
    asked = json.loads(shadow_request(exchange(priority=-9), VERSION, 100))
    assert asked["priority"] == 100


def test_a_version_with_a_prompt_is_asked_with_it() -> None:
    prompt = Prompt(({"role": "system", "content": "Be brief."},))
    prompted = replace(VERSION, prompt=prompt)
    asked = json.loads(shadow_request(exchange(), prompted, None))
    assert asked["messages"] == [*prompt.messages, *MESSAGES]
    with pytest.raises(InvalidInputError):
        shadow_request(exchange(path="/v1/completions", prompt="Good?"), prompted, None)


@pytest.mark.parametrize(
    ("waiting", "asking", "url"),
    [
        ({}, {}, "a"),
        ({"a": 1.0}, {}, "b"),
        ({}, {"a": 1}, "b"),
        ({"a": 1.0}, {"b": 5}, "b"),
        ({"a": 3.0, "b": 2.0}, {}, "b"),
        ({"a": 3.0, "b": 3.0}, {}, None),
    ],
)
def test_the_replica_with_most_room_is_asked(
    waiting: dict[str, float], asking: dict[str, int], url: str | None
) -> None:
    assert roomiest(["a", "b"], waiting, asking, maximum_waiting=2) == url


def test_no_replica_has_room_where_there_is_none() -> None:
    assert roomiest([], {}, {}, maximum_waiting=2) is None


def test_the_length_of_vllms_queue_is_read() -> None:
    metrics = """# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="base"} 2.0
vllm:num_requests_waiting{engine="1",model_name="base"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0
vllm:num_requests_running{engine="0",model_name="base"} 9.0
"""
    assert queue_length(metrics) == 3.0
    assert queue_length("") == 0.0


def test_a_disagreement_becomes_a_case_of_the_clients_own_words() -> None:
    found = case_for(comparison(), exchange(), Policy())
    assert found is not None
    assert list(found.messages) == MESSAGES
    assert (found.stable.text, found.candidate.text) == ("good", "bad")
    assert (found.trial, found.inclusion, found.created_at) == (TRIAL.id, 1.0, NOW)


def test_the_same_pair_makes_the_same_case_again() -> None:
    assert case_for(comparison(), exchange(), Policy()) == case_for(
        comparison(), exchange(), Policy()
    )
    other_trial = case_for(comparison(trial="triage@5.11"), exchange(), Policy())
    assert other_trial is not None
    assert other_trial.id != getattr(case_for(comparison(), exchange(), Policy()), "id", None)


def test_a_pair_with_a_failed_side_has_nothing_to_judge() -> None:
    assert case_for(comparison(kind="failure", outcome="loss"), exchange(), Policy()) is None


@pytest.mark.parametrize("agreement", [0.0, 1.0])
def test_cases_are_sampled_with_the_chance_that_they_carry(agreement: float) -> None:
    policy = Policy(disagreement_sample=0.5, agreement_sample=0.1)
    chance = 0.1 if agreement == 1.0 else 0.5
    cases = [
        found
        for number in range(2000)
        if (found := case_for(comparison(f"r{number}", agreement), exchange(), policy))
    ]
    assert {found.inclusion for found in cases} == {chance}
    assert len(cases) == pytest.approx(2000 * chance, rel=0.2)


def test_a_sample_of_nothing_takes_nothing() -> None:
    policy = Policy(disagreement_sample=0.0, agreement_sample=0.0)
    assert case_for(comparison(), exchange(), policy) is None


@given(st.floats(0, 0.99), st.floats(0, 0.99), st.timedeltas(timedelta(), timedelta(days=1000)))
def test_what_is_further_apart_or_newer_comes_first(
    one: float, other: float, later: timedelta
) -> None:
    near, far = sorted((one, other), reverse=True)
    now = NOW.timestamp()
    assert priority_of(comparison(agreement=far), now, 0.5) >= priority_of(
        comparison(agreement=near), now, 0.5
    )
    newer = (NOW + later).timestamp()
    assert priority_of(comparison(agreement=one), newer, 0.5) >= priority_of(
        comparison(agreement=one), now, 0.5
    )


@given(st.floats(0, 0.99), st.floats(0.25, 1), st.floats(0.25, 1))
def test_of_pairs_as_far_apart_the_less_sure_one_comes_first(
    agreement: float, one: float, other: float
) -> None:
    sure, unsure = sorted((one, other))
    pair, now = comparison(agreement=agreement), NOW.timestamp()
    assert priority_of(pair, now, unsure) >= priority_of(pair, now, sure)


def test_a_pair_half_as_unsure_is_a_day_behind() -> None:
    pair, now = comparison(agreement=0.0), NOW.timestamp()
    day_before = (NOW - timedelta(days=1)).timestamp()
    assert priority_of(pair, now, 0.5) == pytest.approx(priority_of(pair, day_before, 1), abs=0.05)


def test_a_prompt_on_which_stable_contradicts_itself_comes_before_others() -> None:
    steady = case_for(comparison(), exchange(), Policy(), comparison(agreement=1.0))
    wavering = case_for(comparison(), exchange(), Policy(), comparison(agreement=0.0))
    assert steady is not None
    assert wavering is not None
    assert wavering.priority > steady.priority
    assert (steady.unsure, wavering.unsure) == (0.75, 1.0)


def test_sampled_agreements_lie_among_the_disagreements() -> None:
    now = NOW.timestamp()
    places = [priority_of(comparison(f"r{number}", 1.0), now, 0.75) for number in range(100)]
    halfway = priority_of(comparison(agreement=0.5), now, 0.75)
    assert 30 < sum(place > halfway for place in places) < 70


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({"messages": MESSAGES}, MESSAGES),
        ({"prompt": "Good or bad?"}, MESSAGES),
        ({"input": "Good or bad?"}, MESSAGES),
        ({"input": MESSAGES}, MESSAGES),
        (
            {"input": "Good or bad?", "instructions": "Be brief."},
            [{"role": "system", "content": "Be brief."}, *MESSAGES],
        ),
        ({"prompt": [1, 2, 3]}, [{"role": "user", "content": ""}]),
    ],
)
def test_every_endpoints_request_reads_as_messages(
    body: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    assert list(messages_of(json.dumps(body))) == messages
