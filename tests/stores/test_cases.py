"""Captures become pairs and cases exactly once, and a case is labelled exactly once."""

from dataclasses import replace

import pytest

from rollout.cases import Label, LabelledCase, choice_for
from rollout.errors import ConflictError, NotFoundError
from rollout.evidence import ArmCounts, PairCounts, Verdict
from rollout.stores import Stores
from tests.stores.conftest import AT, capture, case, comparison, exchange, offer

pytestmark = pytest.mark.anyio
TRIAL = "triage@2.2"


def label(case_id: str = "c1", labeler: str = "ann", gold: str = "no") -> Label:
    return Label(case_id, "triage", choice_for(case(case_id), gold), labeler, AT)


async def pairs(stores: Stores) -> PairCounts:
    return (await stores.evidence.read("triage", TRIAL)).pairs


async def test_a_capture_is_taken_by_one_consumer_only(stores: Stores) -> None:
    await stores.captures.append([exchange("r1"), exchange("r2")])
    (first,) = await stores.captures.take("one", 1, 1.0)
    (second,) = await stores.captures.take("two", 5, 1.0)
    assert first.exchange == exchange("r1")
    assert second.exchange == exchange("r2")
    assert await stores.captures.take("three", 5, 0.01) == []


async def test_captures_of_a_dead_consumer_are_taken_over(stores: Stores) -> None:
    taken = await capture(stores)
    assert await stores.captures.take_over("two", 3600, 10) == []
    assert await stores.captures.take_over("two", 0, 10) == [taken]


async def test_settling_twice_counts_once(stores: Stores) -> None:
    taken = await capture(stores)
    first = await stores.captures.settle(taken, comparison(), case(), 100)
    assert (first.state, first.offered) == ("counted", True)
    second = await stores.captures.settle(taken, comparison(), case("c2"), 100)
    assert (second.state, second.offered) == ("already", False)
    assert await pairs(stores) == PairCounts(disagree=1)
    assert await stores.captures.waiting() == 0


async def test_a_dropped_capture_counts_nothing(stores: Stores) -> None:
    taken = await capture(stores)
    assert (await stores.captures.settle(taken, None, None, 100)).state == "dropped"
    assert await pairs(stores) == PairCounts()


async def test_a_pair_decided_by_failure_counts_for_its_side(stores: Stores) -> None:
    taken = await capture(stores)
    failure = replace(comparison(), kind="failure", outcome="loss")
    await stores.captures.settle(taken, failure, None, 100)
    assert await pairs(stores) == PairCounts(failed=1, losses=1)


async def test_a_prompt_makes_one_case_in_a_trial(stores: Stores) -> None:
    await offer(stores, case("c1", prompt="Hello  World"), case("c2", prompt="hello world"))
    assert [found.id for found, _ in await stores.cases.list("triage")] == ["c1"]


async def test_a_full_queue_drops_and_counts(stores: Stores) -> None:
    for number in range(3):
        taken = await capture(stores, f"r{number}")
        await stores.captures.settle(taken, comparison(), case(f"c{number}"), 2)
    (stats,) = await stores.cases.stats("triage")
    assert (stats.open, stats.dropped) == (2, 1)
    assert stats.oldest_at == AT


async def test_the_most_important_case_is_claimed_first(stores: Stores) -> None:
    await offer(stores, case("c1", priority=0.1), case("c2", priority=0.9))
    (first,) = await stores.cases.claim("ann")
    (second,) = await stores.cases.claim("bob")
    assert (first.id, second.id) == ("c2", "c1")
    assert await stores.cases.claim("cyd") == []


async def test_a_case_whose_lease_ran_out_is_claimed_by_another(stores: Stores) -> None:
    await offer(stores, case())
    await stores.cases.claim("ann", lease_seconds=0)
    (claimed,) = await stores.cases.claim("bob")
    assert claimed.id == "c1"
    with pytest.raises(ConflictError):
        await stores.cases.label(label(labeler="ann"))


async def test_a_released_case_is_open_again(stores: Stores) -> None:
    await offer(stores, case())
    await stores.cases.claim("ann")
    with pytest.raises(ConflictError):
        await stores.cases.release("c1", "bob")
    await stores.cases.release("c1", "ann")
    assert [state for _, state in await stores.cases.list("triage")] == ["open"]


async def test_a_second_label_changes_nothing(stores: Stores) -> None:
    await offer(stores, case())
    assert await stores.cases.label(label(gold="no"))
    assert await stores.cases.label(label(gold="no"))  # the same one, sent again
    assert not await stores.cases.label(label(labeler="bob", gold="yes"))
    assert await pairs(stores) == PairCounts(disagree=1, wins=1)
    (labelled,) = await stores.cases.labelled("triage")
    assert labelled == LabelledCase(case(), label(gold="no"))


async def test_labels_decide_pairs(stores: Stores) -> None:
    await offer(stores, case("c1"), case("c2"), case("c3"))
    for case_id, gold in (("c1", "no"), ("c2", "yes"), ("c3", "perhaps")):
        await stores.cases.label(label(case_id, gold=gold))
    assert await pairs(stores) == PairCounts(disagree=3, wins=1, losses=1, ties=1)


async def test_an_unknown_case_is_not_found(stores: Stores) -> None:
    with pytest.raises(NotFoundError):
        await stores.cases.label(label("nope"))


async def test_labelled_cases_can_be_imported_once(stores: Stores) -> None:
    rows = [LabelledCase(case(name), label(name)) for name in ("c1", "c2")]
    assert await stores.cases.put_labelled(rows) == 2
    assert await stores.cases.put_labelled(rows) == 0
    assert await stores.cases.labelled("triage") == rows


async def test_evidence_sums_incarnations_and_a_repeated_report_counts_once(
    stores: Stores,
) -> None:
    counts = ArmCounts(requests=3, errors=1, seconds=0.5)
    for _ in range(2):
        await stores.evidence.report("i1", "triage", TRIAL, {"stable": counts})
    await stores.evidence.report("i2", "triage", TRIAL, {"stable": counts, "candidate": counts})
    evidence = await stores.evidence.read("triage", TRIAL)
    assert evidence.stable == ArmCounts(requests=6, errors=2, seconds=1.0)
    assert evidence.candidate == counts


async def test_verdicts_are_read_back(stores: Stores) -> None:
    verdict = Verdict("pairs", "inconclusive", 1.0, 20.0, 0, "no data yet")
    await stores.evidence.put_verdicts("triage", TRIAL, [verdict])
    assert await stores.evidence.verdicts("triage", TRIAL) == [verdict]
    assert await stores.evidence.verdicts("triage", "other") == []
