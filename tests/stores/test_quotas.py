"""The ledger of limits: what workers hold together is never more than the whole."""

import asyncio
import time
from collections.abc import Mapping, Sequence

import pytest

from rollout.credentials import NO_LIMITS, ApiKey, KeyLimits, limit_problems
from rollout.quotas import Grant, KeyReport, Limit, LimitReport, Settlement
from rollout.stores import GatewayPresence, Stores, keys
from rollout.stores.codec import decode, encode
from tests.stores.conftest import AT

pytestmark = pytest.mark.anyio
MONTH = "2026-01"


@pytest.fixture(autouse=True)
def patient_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause of the machine is taken for a silence; a test that is about one says how long."""
    monkeypatch.setattr("rollout.stores.quotas.PATIENCE_SECONDS", 3600.0)
    monkeypatch.setattr("rollout.stores.quotas.SILENCE_SECONDS", 3600.0)


class Refill:
    """What a limit has gained at most since the test began, for the ledger's clock goes on."""

    def __init__(self, maximum: int = 60) -> None:
        self._per_second = maximum / 60
        self._began = time.monotonic()

    @property
    def most(self) -> float:
        # The store counts in milliseconds.
        return self._per_second * (time.monotonic() - self._began + 0.005)


async def alive(stores: Stores, *workers: str) -> None:
    for worker in workers:
        presence = GatewayPresence(worker, "host", 1, 1, AT)
        await stores.presence.report(presence, ttl_seconds=3600)


class Worker:
    """Tells the ledger what it spent, and holds what it was granted."""

    def __init__(self, stores: Stores, name: str, maximum: int, limit: Limit = "requests") -> None:
        self.stores = stores
        self.name = name
        self.maximum = maximum
        self.limit = limit
        self.spent = 0.0
        self.acknowledged = 0.0
        self.credit = 0.0
        self.refilled = 0.0
        self.count = 0

    async def settle(self, demand: float = 0.0) -> Grant:
        report = LimitReport(
            self.limit, self.maximum, self.spent, self.acknowledged, demand, self.refilled
        )
        told = [KeyReport("k", 0, (report,), self.count)]
        found = await self.stores.quotas.settle(self.name, MONTH, told)
        grant = found.grants["k"].limits[self.limit]
        self.acknowledged, self.credit = self.spent, grant.credit
        return grant

    async def spend_all(self) -> float:
        spent, self.credit = self.credit, 0.0
        self.spent += spent
        await self.settle(demand=100)
        return spent


async def test_credit_goes_to_whoever_asks_and_never_beyond_the_limit(stores: Stores) -> None:
    await alive(stores, "a", "b")
    a, b, refill = Worker(stores, "a", 60), Worker(stores, "b", 60), Refill()
    await a.settle(demand=10)
    # The other could begin with its even part and has not reported yet.
    assert a.credit <= 30 + refill.most
    await b.settle()
    assert b.credit == 3
    await a.settle(demand=10)
    assert 50 <= a.credit <= 57
    total = 0.0
    for _ in range(10):
        total += await a.spend_all() + await b.spend_all()
    assert 55 <= total <= 60 + refill.most


async def test_what_a_new_worker_spends_before_its_first_report_is_everyones_debt(
    stores: Stores,
) -> None:
    await alive(stores, "a")
    a, refill = Worker(stores, "a", 60), Refill()
    await a.settle(demand=10)
    spent = await a.spend_all()
    late = Worker(stores, "late", 60)
    late.spent = 30
    await late.settle(demand=10)
    assert spent == 60
    assert late.credit <= max(0.0, refill.most - 30)
    assert await a.spend_all() <= refill.most


async def test_a_report_that_is_sent_twice_spends_once(stores: Stores) -> None:
    await alive(stores, "a")
    a, refill = Worker(stores, "a", 60), Refill()
    await a.settle(demand=1)
    a.spent = 20
    a.acknowledged = 0
    first = await a.settle(demand=1)
    a.acknowledged = 0
    again = await a.settle(demand=1)
    assert 40 <= first.credit <= again.credit <= 40 + refill.most


async def test_what_a_worker_gave_itself_is_taken_off_and_makes_no_debt(stores: Stores) -> None:
    await alive(stores, "a", "b")
    a, b, refill = Worker(stores, "a", 60), Worker(stores, "b", 60), Refill()
    await a.settle(demand=10)
    await b.settle()
    await a.settle(demand=10)
    # The other let go of 27, of which the first has just taken nearly all.
    a.refilled = 1_000
    await a.spend_all()
    a.refilled = 0
    assert await a.spend_all() <= refill.most
    await b.settle(demand=10)
    assert b.credit >= 3


async def test_after_a_time_without_the_ledger_the_first_gets_nothing_that_another_spent(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.stores.quotas.PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr("rollout.stores.quotas.SILENCE_SECONDS", 0.2)
    await alive(stores, "a", "b")
    # A hundred a second: what refills while nobody reports is soon all of it.
    a, b, refill = Worker(stores, "a", 6_000), Worker(stores, "b", 6_000), Refill(6_000)
    await a.settle(demand=10)
    await b.settle(demand=10)
    for _ in range(10):
        await a.spend_all()
        await b.spend_all()
    began = time.monotonic()
    await asyncio.sleep(0.6)
    # Both have given themselves what refilled, and spent it.
    own = 0.5 * (time.monotonic() - began - 0.1) * 100
    a.refilled = b.refilled = own
    for _ in range(5):
        await a.spend_all()
        a.refilled = 0
    await b.spend_all()
    assert 2 * own + a.spent + b.spent <= 6_000 + refill.most


async def test_a_count_that_begins_anew_gives_nothing_back(stores: Stores) -> None:
    await alive(stores, "a")
    a, refill = Worker(stores, "a", 60), Refill()
    await a.settle(demand=10)
    await a.spend_all()
    assert a.credit <= refill.most
    a.spent, a.acknowledged, a.count = 0, 0, 1
    assert (await a.settle(demand=10)).credit <= refill.most
    a.spent = 1
    assert (await a.settle(demand=10)).credit <= refill.most


async def test_a_worker_that_went_silent_loses_its_share_and_mints_no_credit(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.stores.quotas.SILENCE_SECONDS", 0.05)
    await alive(stores, "a", "b")
    a, b, refill = Worker(stores, "a", 60), Worker(stores, "b", 60), Refill()
    await a.settle(demand=10)
    await b.settle(demand=10)
    held = b.credit
    await asyncio.sleep(0.1)
    grant = await a.settle(demand=10)
    for _ in range(5):
        await a.spend_all()
    assert grant.share > 50
    # What the other held may be spent, so only time gives it back.
    assert a.spent <= 60 - held + refill.most


async def test_slots_move_to_whoever_needs_them(stores: Stores) -> None:
    await alive(stores, "a", "b")
    a, b = (Worker(stores, name, 4, "concurrency") for name in "ab")
    await a.settle(demand=4)
    assert a.credit == 2
    await b.settle()
    await a.settle(demand=4)
    assert a.credit == 4
    a.spent = 4
    await a.settle(demand=4)
    await b.settle(demand=4)
    assert b.credit == 0
    a.spent = 1
    await a.settle(demand=1)
    await b.settle(demand=4)
    assert a.credit + b.credit <= 4
    assert b.credit >= 2


async def test_the_only_slot_can_be_had_by_either(stores: Stores) -> None:
    await alive(stores, "a", "b")
    a, b = (Worker(stores, name, 1, "concurrency") for name in "ab")
    await a.settle(demand=1)
    assert a.credit == 1
    await a.settle()
    await b.settle(demand=1)
    assert (a.credit, b.credit) == (0, 1)


async def test_tokens_of_a_month_are_summed_over_workers_once(stores: Stores) -> None:
    async def tell(worker: str, tokens: int, period: str = MONTH) -> int:
        found = await stores.quotas.settle(worker, period, [KeyReport("k", tokens)])
        assert "k" in found.active
        return found.grants["k"].tokens

    assert await tell("a", 10) == 10
    assert await tell("b", 5) == 15
    assert await tell("b", 5) == 15
    assert await tell("a", 30) == 35
    assert await tell("a", 2, "2026-02") == 2
    assert await stores.quotas.month_tokens(MONTH) == {"k": 35}


async def test_a_worker_learns_what_is_in_use_elsewhere(stores: Stores) -> None:
    await alive(stores, "a", "b")
    await Worker(stores, "a", 60).settle(demand=1)
    found = await stores.quotas.settle("b", MONTH, [])
    assert found == Settlement(2, {}, frozenset({"k"}))


async def test_a_key_that_was_stored_before_there_were_limits_has_none(stores: Stores) -> None:
    key = ApiKey("k", "old", "d", frozenset({"infer"}), AT)
    text = encode(key).replace(b',"limits":' + encode(NO_LIMITS), b"")
    assert b"limits" not in text
    await stores._link.run("HSET", keys.CREDENTIALS, "k", text)
    assert await stores.credentials.list() == [key]
    assert decode(ApiKey, text).limits.unlimited


@pytest.mark.parametrize(
    ("limits", "wrong"),
    [
        (KeyLimits(), []),
        (KeyLimits(1, 1, 1, 1), []),
        (KeyLimits(requests_per_minute=0, concurrency=-1), ["requests_per_minute", "concurrency"]),
    ],
)
def test_limits_that_cannot_be_are_named(limits: KeyLimits, wrong: Sequence[str]) -> None:
    problems: Mapping[str, str] = dict(limit_problems(limits))
    assert list(problems) == wrong
