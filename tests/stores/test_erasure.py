"""What belongs to a client, to a request or to the past is erased wherever it is kept."""

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from rollout.cases import Label
from rollout.exchanges import Feedback, Receipt
from rollout.stores import Erased, Stores
from tests.stores.conftest import AT, capture, case, comparison, exchange, offer

pytestmark = pytest.mark.anyio
NO_TRIAL = Receipt("triage", 1, "stable", None)


def feedback(request_id: str, *, unit: str = "", at: datetime = AT) -> Feedback:
    return Feedback(request_id, "key-a", "bad", at, receipt=replace(NO_TRIAL, unit=unit))


async def left(stores: Stores) -> tuple[list[str], list[str], list[str]]:
    """Cases, requests of captures and requests of feedback."""
    cases = [found.id for found, _ in await stores.cases.list("triage")]
    taken = await stores.captures.take("later", 100, 0.01)
    said = await stores.feedback.list("triage", None)
    return sorted(cases), [each.exchange.request_id for each in taken], [
        each.request_id for each in said
    ]  # fmt: skip


async def test_all_that_belongs_to_a_unit_is_erased_and_nothing_else(stores: Stores) -> None:
    hers = replace(case("c1"), unit="hers", request_id="of-c1")
    sly = replace(case("c2"), unit="his", messages=({"role": "user", "unit": "hers"},))
    await offer(stores, hers, sly)
    await stores.cases.label(Label("c1", "triage", "both", "ann", AT))
    await stores.captures.append(
        [replace(exchange("captured"), unit="hers"), replace(exchange("other"), unit="his")]
    )
    for each in (
        feedback("of-c1"),
        feedback("captured"),
        feedback("known", unit="hers"),
        feedback("other", unit="his"),
    ):
        await stores.feedback.put(each)
    await stores.feedback.ask_around(replace(feedback("captured"), receipt=None))
    erased = await stores.erasure.erase(unit="hers")
    assert erased == Erased(cases=1, labels=1, captures=1, feedback=4, case_ids=("c1",))
    assert await left(stores) == (["c2"], ["other"], ["other"])
    assert await stores.feedback.newest() == "0-0"
    assert not await stores.erasure.erase(unit="hers")


async def test_one_request_is_erased(stores: Stores) -> None:
    await offer(
        stores,
        replace(case("c1"), unit="hers", request_id="one"),
        replace(case("c2"), unit="hers", request_id="two"),
    )
    await stores.feedback.put(feedback("one", unit="hers"))
    await stores.feedback.put(feedback("two", unit="hers"))
    erased = await stores.erasure.erase(request_id="one")
    assert (erased.cases, erased.feedback) == (1, 1)
    assert await left(stores) == (["c2"], [], ["two"])


async def test_cases_of_older_releases_belong_to_nobody(stores: Stores) -> None:
    await offer(stores, case())
    assert not await stores.erasure.erase(unit="")


async def test_a_shadow_cannot_settle_what_was_erased_in_its_hands(stores: Stores) -> None:
    taken = await capture(stores)
    assert (await stores.erasure.erase(unit="u")).captures == 1
    settled = await stores.captures.settle(taken, comparison(), case(), 100)
    assert (settled.state, settled.offered) == ("already", False)
    assert await left(stores) == ([], [], [])


async def test_what_is_older_is_erased_a_bounded_number_at_a_time(stores: Stores) -> None:
    old, new = AT - timedelta(days=3), AT + timedelta(days=3)
    ages = {"c1": old, "c2": old, "c3": new, "c4": old}
    await offer(stores, *(replace(case(name), created_at=at) for name, at in ages.items()))
    # It was labelled lately, but what it holds is old.
    await stores.cases.label(Label("c2", "triage", "both", "ann", new))
    await stores.captures.append([replace(exchange(), captured_at=old), exchange("new")])
    await stores.feedback.put(feedback("old", at=old))
    await stores.feedback.put(feedback("new"))
    first = await stores.erasure.expire({"triage": AT}, 2)
    assert (first["triage"].cases, first["triage"].captures, first["triage"].feedback) == (2, 1, 1)
    assert (await stores.erasure.expire({"triage": AT}, 2))["triage"].cases == 1
    assert await stores.erasure.expire({"triage": AT}, 2) == {}
    assert await stores.erasure.expire({"elsewhere": new}, 2) == {}
    assert await left(stores) == (["c3"], ["new"], ["new"])


async def test_many_pages_are_looked_through(stores: Stores) -> None:
    count = 1200
    await stores.captures.append(
        [replace(exchange(f"r{number}"), unit=f"u{number % 2}") for number in range(count)]
    )
    for number in range(0, count, 2):
        await stores.feedback.put(feedback(f"r{number}"))
    erased = await stores.erasure.erase(unit="u0")
    assert (erased.captures, erased.feedback) == (count // 2, count // 2)
