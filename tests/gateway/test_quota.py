"""Whether a key may have one more request, decided by one worker alone."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.quota import (
    Bucket,
    Budget,
    KeyQuota,
    Refusal,
    Ticket,
    duration,
    period_of,
    seconds_left,
)
from gateway.wire import read_cap
from rollout.credentials import KeyLimits
from rollout.quotas import PATIENCE_SECONDS, Grant

MONTH = "2026-01"


def quota(limits: KeyLimits, workers: int = 1, used: int = 0) -> KeyQuota:
    return KeyQuota("k", limits, Budget(limits.monthly_tokens, MONTH, used), workers, 0.0)


def admitted(outcome: Ticket | Refusal) -> Ticket:
    assert isinstance(outcome, Ticket)
    return outcome


def reason(outcome: Ticket | Refusal) -> str:
    assert isinstance(outcome, Refusal)
    assert outcome.retry_after >= 0
    return outcome.reason


@given(
    maximum=st.integers(1, 1_000),
    workers=st.integers(1, 5),
    asks=st.lists(st.tuples(st.floats(0, 20), st.integers(1, 50)), max_size=200),
)
def test_alone_it_never_admits_more_than_its_share_and_one_burst(
    maximum: int, workers: int, asks: list[tuple[float, int]]
) -> None:
    bucket, now = Bucket(maximum, workers, 0.0), 0.0
    share = float(max(1, maximum // workers))
    spent: list[tuple[float, float]] = []
    for pause, asked in asks:
        now += pause
        cost = min(float(asked), share)
        if bucket.wait(cost, now) == 0:
            bucket.spend(cost)
            spent.append((now, cost))
    for first, (begin, _) in enumerate(spent):
        within = 0.0
        for end, cost in spent[first:]:
            within += cost
            assert within <= share + share * (end - begin) / 60 + 1e-6


@given(shares=st.lists(st.integers(0, 100), min_size=1, max_size=30), tries=st.integers(1, 100))
def test_between_two_words_of_the_ledger_it_spends_what_it_was_granted(
    shares: list[int], tries: int
) -> None:
    bucket = Bucket(100, 1, 0.0)
    for second, credit in enumerate(shares):
        report = bucket.report("requests", float(second))
        bucket.take(Grant(credit, credit, 0), report, float(second))
        spent = 0
        for _ in range(tries):
            if bucket.wait(1, second + 0.5) == 0:
                bucket.spend(1)
                spent += 1
        assert spent == min(credit, tries)


def test_what_is_spent_while_the_answer_is_on_its_way_is_not_forgotten() -> None:
    bucket = Bucket(10, 1, 0.0)
    report = bucket.report("requests", 0.0)
    bucket.spend(4)
    bucket.take(Grant(10, 10, 0), report, 0.1)
    assert bucket.credit == 6


def test_it_refills_by_itself_only_after_the_ledger_was_silent() -> None:
    bucket = Bucket(60, 1, 0.0)
    for _ in range(60):
        assert bucket.wait(1, 0.0) == 0
        bucket.spend(1)
    assert bucket.wait(1, PATIENCE_SECONDS) > 0
    assert bucket.wait(1, PATIENCE_SECONDS + 1) == 0
    # What it gave itself is nobody's debt.
    report = bucket.report("requests", PATIENCE_SECONDS + 1)
    assert (report.spent, report.refilled) == (59, 1)


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_estimate_gives_way_to_what_was_used(length: int, cap: int, used: int) -> None:
    one = quota(KeyLimits(tokens_per_minute=100_000, monthly_tokens=100_000))
    ticket = admitted(one.admit(length, cap, 0.0))
    assert one.tokens is not None
    assert one.tokens.spent == one.budget.reserved == -(-length // 4) + cap
    ticket.settle(used)
    ticket.settle(used)
    assert one.tokens.spent == one.budget.total == used
    assert one.budget.reserved == 0


def test_without_a_cap_answers_are_taken_to_be_as_long_as_before() -> None:
    one = quota(KeyLimits(tokens_per_minute=100_000))
    for _ in range(100):
        admitted(one.admit(40, None, 0.0)).settle(20, 10)
    assert admitted(one.admit(40, None, 0.0)).estimate == 20


def test_a_request_larger_than_the_limit_waits_for_all_of_it() -> None:
    one = quota(KeyLimits(tokens_per_minute=100))
    admitted(one.admit(40_000, 10**12, 0.0)).settle(500)
    assert reason(one.admit(4, 1, 1.0)) == "tokens"


def test_each_limit_refuses_in_its_own_name() -> None:
    assert reason(quota(KeyLimits(monthly_tokens=10), used=10).admit(0, 0, 0.0)) == "budget"
    one = quota(KeyLimits(requests_per_minute=1))
    first = admitted(one.admit(0, 0, 0.0))
    assert reason(one.admit(0, 0, 0.0)) == "requests"
    first.settle(0)
    assert reason(one.admit(0, 0, 0.0)) == "requests"
    one = quota(KeyLimits(concurrency=2))
    first, _ = admitted(one.admit(0, 0, 0.0)), admitted(one.admit(0, 0, 0.0))
    assert reason(one.admit(0, 0, 0.0)) == "concurrency"
    first.settle(0)
    admitted(one.admit(0, 0, 0.0))


def test_a_refused_request_takes_nothing_of_any_limit() -> None:
    one = quota(KeyLimits(requests_per_minute=5, tokens_per_minute=100, concurrency=1))
    ticket = admitted(one.admit(40, 10, 0.0))
    for _ in range(10):
        assert reason(one.admit(40, 10, 0.0)) == "concurrency"
    ticket.settle(20)
    assert one.requests is not None
    assert one.tokens is not None
    assert (one.requests.credit, one.tokens.credit) == (4, 80)


def test_a_budget_counts_what_others_used_and_what_is_under_way() -> None:
    one = quota(KeyLimits(monthly_tokens=100))
    first = admitted(one.admit(0, 30, 0.0))
    one.budget.take(60, 0, MONTH)
    admitted(one.admit(0, 30, 0.0))
    assert reason(one.admit(0, 1, 0.0)) == "budget"
    first.settle(0)
    admitted(one.admit(0, 1, 0.0))


@given(st.integers(0, 1_000), st.integers(0, 1_000))
def test_a_new_month_begins_with_what_was_not_reported(reported: int, fresh: int) -> None:
    budget = Budget(5_000, MONTH)
    budget.used = reported
    budget.take(reported, reported, MONTH)
    budget.used += fresh
    budget.turn("2026-02")
    assert budget.total == budget.used == fresh
    budget.turn("2026-02")
    # An answer about the month before changes nothing.
    budget.take(10**6, reported, MONTH)
    assert budget.total == fresh


@given(st.integers(10**9, 4 * 10**9), st.integers(-12, 14))
def test_months_turn_in_utc_wherever_one_is(at: int, hours: int) -> None:
    now = datetime.fromtimestamp(at, timezone(timedelta(hours=hours)))
    left = seconds_left(now)
    assert 0 < left <= 31 * 86_400
    assert period_of(now) != period_of(now + timedelta(seconds=left))
    assert period_of(now) == period_of(now + timedelta(seconds=left, microseconds=-1))


def test_the_last_second_of_a_year() -> None:
    now = datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert (period_of(now), seconds_left(now)) == ("2026-12", 1)


def test_headers_are_openais() -> None:
    one = quota(KeyLimits(requests_per_minute=60, tokens_per_minute=6_000))
    admitted(one.admit(400, 100, 0.0))
    assert dict(one.headers()) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"1s",
        b"x-ratelimit-limit-tokens": b"6000",
        b"x-ratelimit-remaining-tokens": b"5800",
        b"x-ratelimit-reset-tokens": b"2s",
    }
    assert quota(KeyLimits(concurrency=1)).headers() == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.12, "120ms"), (1.5, "1.5s"), (60, "1m0s"), (61.2, "1m1.2s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("body", "cap"),
    [
        (b"{}", None),
        (b'{"max_tokens": 5}', 5),
        (b'{"max_tokens": 5, "max_completion_tokens": 7, "n": 2}', 14),
        (b'{"max_output_tokens": 3}', 3),
        (b'{"max_tokens": "5"}', None),
        (b'{"max_tokens": -5}', None),
        (b'{"max_tokens": 5, "n": "x"}', 5),
        (b"[", None),
    ],
)
def test_the_cap_of_a_body(body: bytes, cap: int | None) -> None:
    assert read_cap(body) == cap
