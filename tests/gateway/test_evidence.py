"""Each unit of a trial counts once, by its first request, in the arm that it was assigned."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from gateway.evidence import Evidence, First
from rollout.assignment import unit_of
from rollout.errors import StoreUnavailableError
from rollout.evidence import Evidence as Found
from rollout.evidence import Stratum, UnitCounts
from rollout.policy import Slo
from rollout.state import Trial
from rollout.stores import Stores, open_stores
from rollout.stores.evidence import UNIT_BITS
from tests.gateway.serving import (
    AT,
    CHAT,
    MESSAGES,
    ROUTE,
    RunningGateway,
    catalog,
    serving,
    settings,
    until,
)
from tests.stub_engine import Reply, StubEngine

pytestmark = pytest.mark.anyio
ADAPTER = "cd" * 32
TRIAL = Trial("r@2.2", 2, "canary", 5.0, AT, AT)
WELL = {"failed": False, "slow_first_token": False, "slow_total": False}
BADLY = {"failed": True, "slow_first_token": False, "slow_total": True}


def unit(number: int) -> str:
    return unit_of("k", str(number))


@pytest.fixture
async def stores(redis_url: str) -> AsyncIterator[Stores]:
    async with open_stores(redis_url) as opened:
        yield opened


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base", any_model=True) as engine:
        yield engine


async def found(stores: Stores) -> Found:
    return await stores.evidence.read("r", TRIAL.id)


async def units(stores: Stores) -> tuple[Stratum, ...]:
    return (await found(stores)).strata


def first_of(evidence: Evidence, number: int, trial: Trial = TRIAL) -> First:
    first = evidence.cell("r", trial, "stable").first(unit(number))
    assert first is not None
    return first


# The worker and the store.


async def test_a_unit_counts_once_over_all_workers_by_the_request_that_came_first(
    stores: Stores,
) -> None:
    one, other = Evidence("one"), Evidence("other")
    slow = first_of(one, 1)
    await one.flush(stores.evidence)
    first_of(other, 1).end(**WELL)
    assert one.cell("r", TRIAL, "stable").first(unit(1)) is None
    await other.flush(stores.evidence)
    assert await units(stores) == ()
    slow.end(**BADLY)
    for each in (one, other, one):
        await each.flush(stores.evidence)
    assert await units(stores) == (Stratum(5.0, UnitCounts(units=1, errors=1, slow_total=1)),)


async def test_a_unit_stays_in_the_stratum_of_the_weight_at_which_it_came(stores: Stores) -> None:
    evidence = Evidence("one")
    first = first_of(evidence, 1)
    raised = replace(TRIAL, weight=20.0)
    assert evidence.cell("r", raised, "candidate").first(unit(1)) is None
    first_of(evidence, 2, raised).end(**WELL)
    first.end(**WELL)
    await evidence.flush(stores.evidence)
    assert await units(stores) == (
        Stratum(5.0, UnitCounts(units=1)),
        Stratum(20.0, UnitCounts(units=1)),
    )


async def test_nobody_counts_as_a_unit_in_the_shadow_and_all_may_later(stores: Stores) -> None:
    evidence = Evidence("one")
    shadow = evidence.cell("r", replace(TRIAL, weight=0.0), "stable")
    assert shadow.units is None
    assert shadow.first(unit(1)) is None
    first_of(evidence, 1).end(**WELL)
    await evidence.flush(stores.evidence)
    assert await units(stores) == (Stratum(5.0, UnitCounts(units=1)),)


async def test_a_unit_rates_once(stores: Stores) -> None:
    workers = Evidence("one"), Evidence("other")
    for bad, evidence in zip((True, False), workers, strict=True):
        cell = evidence.cell("r", TRIAL, "candidate")
        for _ in range(2):
            cell.rate(unit(1), bad=bad)
        cell.rate("", bad=bad)
        await evidence.flush(stores.evidence)
    assert await units(stores) == (Stratum(5.0, candidate=UnitCounts(rated=3, bad=2)),)
    counts = (await found(stores)).candidate
    assert (counts.positive, counts.negative) == (3, 3)


async def test_what_waits_for_the_store_is_bounded_and_what_is_left_out_is_counted(
    stores: Stores,
) -> None:
    evidence = Evidence("one", maximum_waiting=3)
    cell = evidence.cell("r", TRIAL, "stable")
    firsts = [cell.first(unit(number)) for number in range(5)]
    assert [first is not None for first in firsts] == [True, True, True, False, False]
    assert (evidence.take_dropped(), evidence.take_dropped()) == (2, 0)
    await evidence.flush(stores.evidence)
    assert cell.first(unit(4)) is not None


async def test_a_store_that_is_gone_loses_nothing(stores: Stores) -> None:
    evidence = Evidence("one")
    first_of(evidence, 1).end(**WELL)
    evidence.cell("r", TRIAL, "stable").tally.requests += 1
    async with open_stores("redis://127.0.0.1:9/0") as nowhere:
        with pytest.raises(StoreUnavailableError):
            await evidence.flush(nowhere.evidence)
    evidence.forget(())
    await evidence.flush(stores.evidence)
    assert await units(stores) == (Stratum(5.0, UnitCounts(units=1)),)
    assert (await found(stores)).stable.requests == 1


async def test_a_worker_whose_ledger_was_folded_goes_on_without_counting_twice(
    stores: Stores,
) -> None:
    evidence = Evidence("one")
    other = replace(TRIAL, id="other@2.2")
    for trial in (TRIAL, other):
        first_of(evidence, 1, trial).end(**WELL)
    await evidence.flush(stores.evidence)
    assert await stores.evidence.fold(idle_seconds=-1) == 1
    for trial in (TRIAL, other):
        first_of(evidence, 2, trial).end(**BADLY)
        await evidence.flush(stores.evidence)
    expected = (Stratum(5.0, UnitCounts(units=2, errors=1, slow_total=1)),)
    assert await units(stores) == expected
    assert (await stores.evidence.read("r", other.id)).strata == expected


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_the_order_of_reports_and_folds_each_counts_once(
    stores: Stores, seed: int
) -> None:
    chance = Random(seed)
    workers = [Evidence(f"worker-{number}") for number in range(3)]
    requests, seen = 0, set[int]()
    for _ in range(150):
        worker = chance.choice(workers)
        cell = worker.cell("r", TRIAL, "stable")
        match chance.choice(["count", "count", "nameless", "flush", "fold"]):
            case "count":
                number = chance.randrange(40)
                seen.add(number)
                requests += 1
                cell.tally.requests += 1
                cell.book.dirty = True
                if (first := cell.first(unit(number))) is not None:
                    first.end(**WELL)
            case "nameless":
                assert cell.units is not None
                cell.units.end(**WELL)
                cell.book.dirty = True
                seen.add(1_000 + len(seen))
            case "flush":
                await worker.flush(stores.evidence)
            case _:
                await stores.evidence.fold(idle_seconds=-1)
    for worker in workers:
        await worker.flush(stores.evidence)
    assert (await found(stores)).stable.requests == requests
    bits = {int(unit(number)[:6], 16) % UNIT_BITS for number in seen if number < 1_000}
    nameless = sum(number >= 1_000 for number in seen)
    assert await units(stores) == (Stratum(5.0, UnitCounts(units=len(bits) + nameless)),)


async def test_a_trial_that_ended_is_forgotten_once_it_was_reported(stores: Stores) -> None:
    evidence = Evidence("one")
    cell = evidence.cell("r", TRIAL, "stable")
    first_of(evidence, 1).end(**WELL)
    evidence.forget({"r@9.9"})
    assert evidence.cell("r", TRIAL, "stable") is cell
    await evidence.flush(stores.evidence)
    evidence.forget({"r@9.9"})
    assert evidence.cell("r", TRIAL, "stable") is not cell
    assert await units(stores) == (Stratum(5.0, UnitCounts(units=1)),)


async def test_trials_take_turns_where_they_are_many(stores: Stores) -> None:
    evidence = Evidence("one")
    trials = [replace(TRIAL, id=f"r@{number}.1") for number in range(5)]
    for reported in (2, 4, 5):
        for trial in trials:
            evidence.cell("r", trial, "stable").tally.requests += 1
            evidence.cell("r", trial, "stable").book.dirty = True
        await evidence.flush(stores.evidence, at_most=2)
        found = await stores.evidence.read_many([("r", trial.id) for trial in trials])
        assert sum(each.stable.requests > 0 for each in found) == reported


# Requests through a gateway.


@pytest.fixture
async def gateway(
    engine: StubEngine, redis_url: str, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    route = replace(ROUTE, slo=Slo(ttft_seconds=0.1))
    known = catalog(engine.url, candidate=ADAPTER, weight=100.0, route=route)
    config = settings(tmp_path, engine.url, store=redis_url)
    async with serving(config, known) as running:
        running.app._parts.snapshot.adopt(known)  # type: ignore[union-attr]
        yield running


async def counted(gateway: RunningGateway, stores: Stores) -> UnitCounts:
    """The candidate's units as they stand now; stable, at a weight of 100, must have none."""
    await gateway.app.evidence.flush(stores.evidence)
    (stratum,) = await units(stores)
    assert (stratum.weight, stratum.stable) == (100.0, UnitCounts())
    return stratum.candidate


async def test_a_session_counts_once_and_every_nameless_request_does(
    gateway: RunningGateway, stores: Stores
) -> None:
    for _ in range(3):
        await gateway.ask(**{"x-sluice-session": "ann"})
        await gateway.ask(**{"x-request-id": "always-the-same"})
        await gateway.ask()
    assert await counted(gateway, stores) == UnitCounts(units=5)
    assert (await found(stores)).candidate.requests == 9


async def test_a_fallback_counts_as_an_error_of_the_candidate_once(
    gateway: RunningGateway, engine: StubEngine, stores: Stores
) -> None:
    engine.script(Reply(status=500), where=lambda request: ADAPTER[:8] in request.body.decode())
    for _ in range(2):
        assert (await gateway.ask(**{"x-sluice-session": "ann"})).status == 200
    assert await counted(gateway, stores) == UnitCounts(units=1, errors=1)


async def test_what_the_client_did_wrong_is_no_error(
    gateway: RunningGateway, engine: StubEngine, stores: Stores
) -> None:
    engine.script(Reply(status=400))
    assert (await gateway.ask()).status == 400
    assert await counted(gateway, stores) == UnitCounts(units=1)


async def test_a_client_that_leaves_is_no_error_but_may_have_waited_too_long(
    gateway: RunningGateway, engine: StubEngine, stores: Stores
) -> None:
    engine.script(Reply(hold_headers=asyncio.Event()), times=2)
    body = {"model": "r", "messages": MESSAGES, "stream": True}
    for number, seconds in enumerate((0.15, 0.0), start=1):
        task = asyncio.create_task(gateway.send(path=CHAT, body=body))
        await engine.wait_for_requests(number)
        await asyncio.sleep(seconds)
        task.cancel()
        await engine.wait_for_cancelled(number)
    await until(lambda: gateway.app.inflight == 0, "the requests to end")
    assert await counted(gateway, stores) == UnitCounts(units=2, slow_first_token=1)


async def test_a_pinned_version_counts_nowhere(gateway: RunningGateway, stores: Stores) -> None:
    await gateway.ask("r@2")
    await gateway.app.evidence.flush(stores.evidence)
    assert await found(stores) == Found("r", TRIAL.id)


async def test_a_rating_counts_for_the_unit_at_the_weight_of_its_request(
    gateway: RunningGateway, stores: Stores
) -> None:
    for rating in ("bad", "good"):
        reply = await gateway.ask(**{"x-sluice-session": "ann"})
        given = {"request_id": reply.headers["x-request-id"], "rating": rating}
        assert (await gateway.send(path="/v1/feedback", body=given)).status == 202
    assert await counted(gateway, stores) == UnitCounts(units=1, rated=1, bad=1)
