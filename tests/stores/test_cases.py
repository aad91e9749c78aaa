"""Captures become pairs and cases exactly once, and a case is decided exactly once."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from rollout.cases import Case, Choice, Label, LabelledCase
from rollout.errors import ConflictError, NotFoundError
from rollout.evidence import PairCounts
from rollout.stores import Stores
from tests.labeler import choice_for
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


def by(labeler: str, choice: Choice, case_id: str = "c1") -> Label:
    return Label(case_id, "triage", choice, labeler, AT)


def asked_of(people: int, case_id: str = "c1") -> Case:
    return replace(case(case_id), labels_needed=people)


async def state(stores: Stores) -> str:
    ((_, found),) = await stores.cases.list("triage")
    return found


async def test_a_case_goes_to_different_people_until_it_has_its_labels(stores: Stores) -> None:
    await offer(stores, asked_of(2))
    await stores.cases.claim("ann")
    assert await stores.cases.label(by("ann", "both"))
    assert await state(stores) == "open"
    assert await pairs(stores) == PairCounts(disagree=1)
    # She has said what she thinks: it is for somebody else.
    assert await stores.cases.claim("ann") == []
    assert not await stores.cases.label(by("ann", "first"))
    assert [claimed.id for claimed in await stores.cases.claim("bob")] == ["c1"]
    assert await stores.cases.label(by("bob", "both"))
    assert await state(stores) == "labelled"
    assert await pairs(stores) == PairCounts(disagree=1, ties=1)
    assert await stores.cases.labelled("triage") == [
        LabelledCase(asked_of(2), by("bob", "both"), (by("ann", "both"),))
    ]


async def test_a_third_person_decides_a_conflict(stores: Stores) -> None:
    await offer(stores, asked_of(2))
    first, second = (choice_for(case(), gold) for gold in ("no", "yes"))
    for labeler, choice in (("ann", first), ("bob", second)):
        await stores.cases.claim(labeler)
        assert await stores.cases.label(by(labeler, choice))
    assert await stores.cases.claim("ann") == await stores.cases.claim("bob") == []
    assert len(await stores.cases.claim("cyd")) == 1
    assert await stores.cases.label(by("cyd", first))
    assert await pairs(stores) == PairCounts(disagree=1, wins=1)
    assert not await stores.cases.label(by("dan", second))
    (stats,) = await stores.cases.stats("triage")
    # Only the two labels that every case gets are compared: 1 - (2 - 1) * 2 / (4 - 2).
    assert stats.agreement.cases == 1
    assert stats.agreement.alpha == pytest.approx(0.0)
    assert stats.win_rates[TRIAL].wins == 1


async def test_what_is_split_to_the_end_is_disputed_and_counts_as_a_tie(stores: Stores) -> None:
    await offer(stores, asked_of(2))
    for labeler, choice in (("ann", "first"), ("bob", "second"), ("cyd", "both")):
        assert await stores.cases.label(by(labeler, choice))  # type: ignore[arg-type]
    assert await state(stores) == "disputed"
    assert await pairs(stores) == PairCounts(disagree=1, ties=1)
    assert await stores.cases.labelled("triage") == []
    (stats,) = await stores.cases.stats("triage")
    assert (stats.open, stats.labelled, stats.disputed) == (0, 0, 1)
    assert stats.oldest_at is None


async def test_people_who_label_at_once_are_all_heard_and_the_pair_counts_once(
    stores: Stores,
) -> None:
    await offer(stores, asked_of(3))
    names = ["ann", "bob", "cyd", "dan"]
    heard = await asyncio.gather(*(stores.cases.label(by(name, "both")) for name in names))
    assert sorted(heard) == [False, True, True, True]
    assert await pairs(stores) == PairCounts(disagree=1, ties=1)
    (row,) = await stores.cases.labelled("triage")
    assert len(row.labels) == 3


async def test_whoever_has_labelled_the_first_hundreds_gets_the_rest(stores: Stores) -> None:
    names = [f"c{number:03}" for number in range(150)]
    await offer(stores, *(asked_of(2, name) for name in names[:99]))
    for name in names[:99]:
        await stores.cases.label(by("ann", "both", name))
    await offer(stores, replace(asked_of(2, names[120]), priority=-9.0))
    assert [found.id for found in await stores.cases.claim("ann", count=5)] == [names[120]]
    assert len(await stores.cases.claim("bob", count=200)) == 99


async def test_a_labeler_is_not_taken_for_one_who_is_named_in_a_comment(stores: Stores) -> None:
    await offer(stores, asked_of(2))
    sly = replace(by("ann", "both"), comment='"labeler":"bob"')
    assert await stores.cases.label(sly)
    assert len(await stores.cases.claim("bob")) == 1


async def test_a_label_of_an_older_release_is_read(stores: Stores) -> None:
    await offer(stores, case())
    await stores.cases.label(label())
    link = stores._link
    stored = (
        '{"case":"c1","route":"triage","choice":"both","labeler":"ann",'
        '"labelled_at":"2026-01-02T03:04:05Z","correction":null,"comment":""}'
    )
    await link.run("HSET", "sluice:labels", "c1", stored)
    (row,) = await stores.cases.labelled("triage")
    assert row == LabelledCase(case(), by("ann", "both"))


async def test_cases_with_several_labels_are_imported_whole(stores: Stores) -> None:
    others = (by("ann", "first"), replace(by("bob", "second"), labelled_at=AT + timedelta(1)))
    last = replace(by("cyd", "second"), labelled_at=AT + timedelta(2))
    row = LabelledCase(asked_of(2), last, others)
    assert await stores.cases.put_labelled([row]) == 1
    assert await stores.cases.labelled("triage") == [row]
    (stats,) = await stores.cases.stats("triage")
    assert (stats.labelled, stats.agreement.cases) == (1, 1)


@pytest.mark.parametrize("after", ["open", "leased", "labelled", "disputed"])
async def test_an_erased_case_leaves_nothing_but_the_evidence(stores: Stores, after: str) -> None:
    empty = await stores.cases.stats("triage")
    await offer(stores, asked_of(2))
    choices: dict[str, list[Choice]] = {
        "labelled": ["first", "second", "second"],
        "disputed": ["first", "second", "both"],
    }
    for labeler, choice in zip("xyz", choices.get(after, []), strict=False):
        await stores.cases.label(by(labeler, choice))
    if after == "leased":
        await stores.cases.claim("ann")
    assert await state(stores) == after
    counted = await pairs(stores)
    assert await stores.cases.erase("c1") == len(choices.get(after, []))
    assert await stores.cases.erase("c1") is None
    assert await stores.cases.list("triage") == []
    assert await stores.cases.stats("triage") == empty
    assert await pairs(stores) == counted
    assert await stores._link.run("KEYS", "sluice:*case*") == []
    # The prompt may become a case again.
    await offer(stores, asked_of(2))
    assert await state(stores) == "open"
