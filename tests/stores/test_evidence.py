"""Evidence is summed over workers, counts nothing twice, and outlives those who counted it."""

import asyncio

import pytest
import redis

from rollout.evidence import ArmCounts, Evidence, PairCounts, Stratum, UnitCounts, Verdict
from rollout.stores import Stores
from rollout.stores.evidence import Claim, Table
from tests.stores.conftest import capture, comparison

pytestmark = pytest.mark.anyio
TRIAL = "triage@2.2"
PLACE = ("triage", TRIAL)
NO_UNITS = (0,) * 6

ONE = Table((3, 1, 0, 0, 0, 0.5, 0, 0), (0,) * 8, [(5.0, 3, 1, 0, 0, 0, 0, *NO_UNITS)])
OTHER = Table(
    (3, 1, 0, 0, 0, 0.5, 0, 0),
    (2, 0, 0, 0, 0, 0, 0, 1),
    [(5.0, *NO_UNITS, 2, 0, 0, 1, 0, 0), (20.5, *NO_UNITS, 1, 0, 0, 0, 1, 1)],
)
THREE = ArmCounts(requests=3, errors=1, seconds=0.5)
BOTH = Evidence(
    *PLACE,
    stable=ArmCounts(requests=6, errors=2, seconds=1.0),
    candidate=ArmCounts(requests=2, negative=1),
    strata=(
        Stratum(5.0, UnitCounts(units=3, errors=1), UnitCounts(units=2, slow_total=1)),
        Stratum(20.5, candidate=UnitCounts(units=1, rated=1, bad=1)),
    ),
)


def unit(number: int) -> str:
    """Each with a bit of its own."""
    return f"{number:06x}" + "0" * 26


async def report_both(stores: Stores) -> None:
    assert await stores.evidence.report("i1", {PLACE: ONE})
    assert await stores.evidence.report("i2", {PLACE: OTHER})


async def test_ledgers_are_summed_and_a_repeated_report_counts_once(stores: Stores) -> None:
    await report_both(stores)
    await report_both(stores)
    assert await stores.evidence.read(*PLACE) == BOTH


async def test_many_trials_are_read_in_their_order(stores: Stores) -> None:
    await report_both(stores)
    await stores.evidence.report("i1", {("other", "other@3.1"): ONE})
    taken = await capture(stores)
    await stores.captures.settle(taken, comparison(), None, 1)
    other, none, both = await stores.evidence.read_many(
        [("other", "other@3.1"), ("new", "new@2.2"), PLACE]
    )
    stratum = Stratum(5.0, stable=UnitCounts(units=3, errors=1))
    assert other == Evidence("other", "other@3.1", stable=THREE, strata=(stratum,))
    assert none == Evidence("new", "new@2.2")
    assert both.pairs == PairCounts(disagree=1)
    assert both.strata == BOTH.strata
    assert await stores.evidence.read_many([]) == []


async def test_a_report_of_very_many_trials_arrives_whole(stores: Stores) -> None:
    trials = [(f"r{number}", f"r{number}@2.2") for number in range(5_000)]
    await stores.evidence.report("i1", dict.fromkeys(trials, ONE))
    assert all(each.stable == THREE for each in await stores.evidence.read_many(trials))


async def test_a_silent_ledger_is_folded_and_counts_as_before(stores: Stores) -> None:
    await report_both(stores)
    assert await stores.evidence.fold() == 0
    assert await stores.evidence.fold(idle_seconds=-1) == 2
    assert await stores.evidence.fold(idle_seconds=-1) == 0
    assert await stores.evidence.read(*PLACE) == BOTH
    await stores.evidence.report("i3", {PLACE: ONE})
    assert (await stores.evidence.read(*PLACE)).stable.requests == 9
    assert await stores.evidence.fold(idle_seconds=-1) == 1
    assert (await stores.evidence.read(*PLACE)).stable.requests == 9


async def test_who_comes_back_to_a_folded_ledger_is_told_and_changes_nothing(
    stores: Stores,
) -> None:
    await report_both(stores)
    await stores.evidence.fold(idle_seconds=-1)
    assert not await stores.evidence.report("i1", {PLACE: ONE})
    assert await stores.evidence.read(*PLACE) == BOTH


async def test_many_who_fold_at_once_fold_once(stores: Stores) -> None:
    await report_both(stores)
    await asyncio.gather(*(stores.evidence.fold(idle_seconds=-1) for _ in range(8)))
    assert await stores.evidence.read(*PLACE) == BOTH


async def test_what_an_older_release_counted_is_read(stores: Stores, redis_url: str) -> None:
    old = '{"requests":3,"errors":1,"fallbacks":0,"seconds":0.5,"slow_total":0}'
    with redis.Redis.from_url(redis_url) as client:
        client.hset(f"sluice:evidence:triage:{TRIAL}", "i|stable", old)
    await stores.evidence.report("i1", {PLACE: ONE})
    for _ in range(2):
        evidence = await stores.evidence.read(*PLACE)
        assert evidence.stable == ArmCounts(requests=6, errors=2, seconds=1.0)
        await stores.evidence.fold(idle_seconds=-1)


async def test_what_a_newer_release_counts_beside_is_left_out(
    stores: Stores, redis_url: str
) -> None:
    await stores.evidence.report("i1", {PLACE: ONE})
    with redis.Redis.from_url(redis_url) as client:
        client.hset("sluice:ledger:i1", f"triage|{TRIAL}", f"[[{'1,' * 30}1],[2],[[5,1]]]")
    evidence = await stores.evidence.read(*PLACE)
    assert evidence.candidate == ArmCounts(requests=2)
    assert evidence.strata == (Stratum(5.0, UnitCounts(units=1)),)


async def test_a_unit_is_claimed_once_in_a_trial_by_whomever(stores: Stores) -> None:
    claim = Claim(*PLACE, "seen", [unit(1), unit(2), unit(1)])
    assert await stores.evidence.claim([claim]) == [[True, True, False]]
    later = Claim(*PLACE, "seen", [unit(2), unit(3)])
    rated = Claim(*PLACE, "rated", [unit(1)])
    other = Claim("triage", "triage@3.5", "seen", [unit(1)])
    assert await stores.evidence.claim([later, rated, other]) == [[False, True], [True], [True]]
    assert await stores.evidence.claim([]) == []


async def test_many_who_claim_a_unit_at_once_get_it_once(stores: Stores) -> None:
    claims = [Claim(*PLACE, "seen", [unit(number) for number in range(50)])] * 8
    answers = await asyncio.gather(*(stores.evidence.claim([claim]) for claim in claims))
    assert sum(new for ((*news,),) in answers for new in news) == 50


async def test_verdicts_are_read_back(stores: Stores) -> None:
    verdict = Verdict("pairs", "inconclusive", 1.0, 20.0, 0, "no data yet")
    await stores.evidence.put_verdicts("triage", TRIAL, [verdict])
    assert await stores.evidence.verdicts("triage", TRIAL) == [verdict]
    assert await stores.evidence.verdicts("triage", "other") == []
