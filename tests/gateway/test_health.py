"""When a replica is asked, and when it is left alone."""

from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.balance import pick
from gateway.health import Breaker, Fleet, Replica, check
from gateway.limits import RetryBudget
from gateway.settings import HealthSection, UpstreamSection
from gateway.upstream import UpstreamPool
from rollout.engines import Engine
from tests.stub_engine import Reply as StubReply
from tests.stub_engine import StubEngine, at

SETTINGS = HealthSection(failures=3, open_seconds=1, maximum_open_seconds=4)


def fleet_of(engine: Engine) -> Fleet:
    fleet = Fleet(SETTINGS, 512)
    fleet.adopt([engine])
    return fleet


def opened() -> Breaker:
    breaker = Breaker(SETTINGS)
    for _ in range(3):
        breaker.begin()
        breaker.settle("failed", 0.0)
    return breaker


def test_it_opens_after_failures_in_a_row() -> None:
    breaker = Breaker(SETTINGS)
    breaker.settle("failed", 0.0)
    breaker.settle("failed", 0.0)
    breaker.settle("answered", 0.0)
    breaker.settle("failed", 0.0)
    breaker.settle("failed", 0.0)
    assert breaker.admits(0.0)
    breaker.settle("failed", 0.0)
    assert not breaker.admits(0.5)


def test_one_request_at_a_time_tries_it_again() -> None:
    breaker = opened()
    assert breaker.admits(1.0)
    breaker.begin()
    assert not breaker.admits(1.0)
    breaker.settle("answered", 1.1)
    assert breaker.closed


def test_a_probe_whose_client_left_says_nothing() -> None:
    breaker = opened()
    breaker.begin()
    breaker.settle("unknown", 1.0)
    assert not breaker.closed
    assert breaker.admits(1.0)


def test_it_stays_open_longer_each_time_up_to_a_limit() -> None:
    breaker, now = opened(), 1.0
    for seconds in (2, 4, 4):
        breaker.begin()
        breaker.settle("failed", now)
        assert not breaker.admits(now + seconds - 0.1)
        now += seconds
        assert breaker.admits(now)


def test_requests_that_were_under_way_do_not_push_it_out() -> None:
    breaker = opened()
    for _ in range(50):
        breaker.settle("failed", 0.5)
    assert breaker.admits(1.0)


def test_a_replica_whose_breaker_closes_has_come_back() -> None:
    replica = Replica("http://one", Engine("main", ("http://one",), "base"), SETTINGS)
    for _ in range(SETTINGS.failures):
        replica.begin()
        replica.end("failed", 0.0)
    assert replica.back_since is None
    replica.begin()
    replica.end("answered", 2.0)
    assert replica.back_since == 2.0


def test_replicas_join_when_they_are_found_well_and_leave_without_a_word() -> None:
    fleet = fleet_of(Engine("main", ("http://one",), "base"))
    one = fleet.replicas["http://one"]
    one.begin()
    fleet.adopt([Engine("main", ("http://one", "http://two"), "base")])
    two = fleet.replicas["http://two"]
    urls = ["http://one", "http://two"]
    assert fleet.available(urls, [], 0.0) == [one]
    two.checked(5.0, healthy=True)
    assert fleet.available(urls, [], 5.0) == [one, two]
    assert (one.back_since, two.back_since) == (None, 5.0)
    fleet.adopt([Engine("main", ("http://two",), "base")])
    assert fleet.available(urls, [], 5.0) == [two]
    one.end("answered", 6.0)
    assert one.inflight == 0


def test_replicas_that_take_the_place_of_all_others_are_asked_at_once() -> None:
    fleet = fleet_of(Engine("main", ("http://one",), "base"))
    fleet.adopt([Engine("main", ("http://two",), "base")])
    assert [one.url for one in fleet.available(["http://two"], [], 0.0)] == ["http://two"]


def test_a_replica_that_stays_keeps_what_is_known_of_it() -> None:
    fleet = fleet_of(Engine("main", ("http://one",), "base"))
    replica = fleet.replicas["http://one"]
    replica.checked(0.0, healthy=False)
    engine = Engine("main", ("http://one",), "base", api_key="other")
    fleet.adopt([engine])
    assert fleet.replicas["http://one"] is replica
    assert (replica.engine, replica.healthy) == (engine, False)


class _Replica:
    def __init__(self, inflight: int) -> None:
        self.inflight = inflight


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 2**32))
def test_the_busiest_of_several_is_never_picked(loads: list[int], chance: int) -> None:
    picked = pick([_Replica(load) for load in loads], chance)
    assert picked.inflight in loads
    if len(loads) > 1 and loads.count(max(loads)) == 1:
        assert picked.inflight < max(loads)


def test_replicas_with_the_same_load_share_alike() -> None:
    replicas = [_Replica(0) for _ in range(3)]
    picked = [pick(replicas, chance * 2_654_435_761 % 2**32) for chance in range(3_000)]
    assert all(800 < sum(one is replica for one in picked) < 1_200 for replica in replicas)


def test_retries_are_a_share_of_the_requests() -> None:
    budget = RetryBudget(0.2)
    while budget.spend():
        pass
    for _ in range(100):
        budget.earn()
        budget.spend()
    granted = 0
    for _ in range(1_000):
        budget.earn()
        granted += budget.spend()
    assert 190 <= granted <= 210


@pytest.fixture
async def pool() -> AsyncIterator[UpstreamPool]:
    async with UpstreamPool(UpstreamSection()) as pool:
        yield pool


@pytest.mark.anyio
async def test_a_check_takes_a_dead_replica_out_and_back(pool: UpstreamPool) -> None:
    async with StubEngine() as engine:
        fleet = fleet_of(Engine("main", (engine.url,), "base"))
        replica = fleet.replicas[engine.url]
        engine.healthy = False
        await check(replica, pool, SETTINGS)
        assert fleet.available([engine.url], [], 0.0) == []
        engine.healthy = True
        await check(replica, pool, SETTINGS)
        assert fleet.available([engine.url], [], 0.0) == [replica]
        # From here on it gets a rising part.
        assert replica.back_since is not None
        await engine.stop()
        await check(replica, pool, SETTINGS)
        assert not replica.healthy
        await engine.start()


@pytest.mark.anyio
async def test_a_server_without_a_health_page_is_up(pool: UpstreamPool) -> None:
    async with StubEngine() as engine:
        engine.script(StubReply(status=404), times=None, where=at("/health"))
        fleet = fleet_of(Engine("main", (engine.url,), "base", kind="openai"))
        await check(fleet.replicas[engine.url], pool, SETTINGS)
        assert fleet.replicas[engine.url].healthy
