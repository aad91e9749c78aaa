"""A run has one trainer at a time; one that lost it can't write any more."""

from dataclasses import replace

import pytest

from rollout.errors import LeaseLostError, NotFoundError
from rollout.evidence import Report, Score
from rollout.runs import RunEvent, RunState, TrainingRun
from rollout.stores import Stores
from tests.stores.conftest import AT

pytestmark = pytest.mark.anyio


def run(run_id: str = "run-1") -> TrainingRun:
    return TrainingRun(run_id, "triage", "triage@1", AT, "ann", config={"epochs": 2})


async def test_a_run_is_taken_by_one_trainer(stores: Stores) -> None:
    await stores.runs.enqueue(run())
    taken = await stores.runs.take("w1", 60)
    assert taken is not None
    assert replace(taken, fence=0) == run()
    assert await stores.runs.take("w2", 60) is None


async def test_a_trainer_that_lost_its_lease_cannot_write(stores: Stores) -> None:
    await stores.runs.enqueue(run())
    first = await stores.runs.take("w1", 0)
    second = await stores.runs.take("w2", 60)
    assert first is not None
    assert second is not None
    assert second.fence > first.fence
    with pytest.raises(LeaseLostError):
        await stores.runs.update(replace(first, state="training"))
    with pytest.raises(LeaseLostError):
        await stores.runs.renew(first, 60)
    await stores.runs.update(replace(second, state="training"))
    assert (await stores.runs.get("run-1")).state == "training"


async def test_an_ended_run_is_not_taken_again(stores: Stores) -> None:
    await stores.runs.enqueue(run())
    taken = await stores.runs.take("w1", 0)
    assert taken is not None
    await stores.runs.update(replace(taken, state="failed", reason="out of memory"))
    assert await stores.runs.take("w2", 60) is None
    assert (await stores.runs.list("triage"))[0].reason == "out of memory"


async def test_a_run_handed_back_waits_anew(stores: Stores) -> None:
    await stores.runs.enqueue(run())
    taken = await stores.runs.take("w1", 60)
    assert taken is not None
    await stores.runs.update(replace(taken, state="queued"))
    assert await stores.runs.take("w2", 60) is not None


async def test_cancelling_ends_a_waiting_run_and_asks_a_running_one(stores: Stores) -> None:
    await stores.runs.enqueue(run("run-1"))
    await stores.runs.enqueue(run("run-2"))
    taken = await stores.runs.take("w1", 60)
    assert taken is not None
    await stores.runs.request_cancel(taken.id)
    assert (await stores.runs.renew(taken, 60)).cancel_requested
    await stores.runs.request_cancel("run-2")
    assert (await stores.runs.get("run-2")).state == "cancelled"
    assert await stores.runs.take("w2", 60) is None
    with pytest.raises(NotFoundError):
        await stores.runs.request_cancel("nope")


async def test_a_waiting_run_is_paused_at_once_and_resumed(stores: Stores) -> None:
    await stores.runs.enqueue(run())
    assert await stores.runs.request_pause("run-1")
    assert (await stores.runs.get("run-1")).state == "paused"
    assert await stores.runs.take("w1", 60) is None
    assert await stores.runs.resume("run-1")
    assert (await stores.runs.get("run-1")).state == "queued"
    assert await stores.runs.take("w1", 60) is not None


async def test_a_running_one_is_asked_to_pause_and_its_trainer_gives_it_back(
    stores: Stores,
) -> None:
    await stores.runs.enqueue(run())
    taken = await stores.runs.take("w1", 0)
    assert taken is not None
    await stores.runs.request_pause("run-1")
    assert (await stores.runs.renew(taken, 0)).pause_requested
    await stores.runs.update(replace(taken, state="paused"))
    assert await stores.runs.take("w2", 60) is None, "though its lease had run out"
    assert await stores.runs.resume("run-1")
    again = await stores.runs.take("w2", 60)
    assert again is not None
    assert not again.pause_requested


async def test_resuming_before_it_paused_lets_it_wait_at_once(stores: Stores) -> None:
    await stores.runs.enqueue(run())
    taken = await stores.runs.take("w1", 60)
    assert taken is not None
    await stores.runs.request_pause("run-1")
    await stores.runs.resume("run-1")
    await stores.runs.update(replace(taken, state="paused"))
    assert (await stores.runs.get("run-1")).state == "queued"
    assert await stores.runs.take("w2", 60) is not None


async def test_a_paused_run_can_be_cancelled_and_an_ended_one_not_paused(stores: Stores) -> None:
    await stores.runs.enqueue(run())
    await stores.runs.request_pause("run-1")
    await stores.runs.request_cancel("run-1")
    assert (await stores.runs.get("run-1")).state == "cancelled"
    assert not await stores.runs.request_pause("run-1")
    assert not await stores.runs.resume("run-1")
    assert (await stores.runs.get("run-1")).state == "cancelled"


@pytest.mark.parametrize("state", ["queued", "training", "paused"])
async def test_one_run_of_a_route_keeps_others_from_starting_by_themselves(
    stores: Stores, state: RunState
) -> None:
    assert await stores.runs.enqueue_alone(run("run-1"))
    if state == "training":
        taken = await stores.runs.take("w1", 60)
        assert taken is not None
    elif state == "paused":
        await stores.runs.request_pause("run-1")
    assert not await stores.runs.enqueue_alone(run("run-2"))
    assert await stores.runs.enqueue_alone(replace(run("run-3"), route="other"))
    await stores.runs.request_cancel("run-1")
    if state == "training":
        assert taken is not None
        await stores.runs.update(replace(taken, state="cancelled"))
    assert await stores.runs.enqueue_alone(run("run-2"))


async def test_events_are_followed_from_where_one_stopped(stores: Stores) -> None:
    one = RunEvent("training", "step 1", AT, done=1, total=2, values={"loss": 0.5})
    two = RunEvent("training", "step 2", AT, done=2, total=2)
    await stores.runs.note("run-1", one)
    ((position, first),) = await stores.runs.events("run-1")
    assert first == one
    assert await stores.runs.events("run-1", after=position) == []
    await stores.runs.note("run-1", two)
    assert [event for _, event in await stores.runs.events("run-1", position, 5)] == [two]


async def test_reports_are_immutable(stores: Stores) -> None:
    report = Report(
        id="r",
        route="triage",
        version="triage@2",
        parent="triage@1",
        suite="s",
        scores=(Score("triage@1", 6, 10, 0.3, 0.8),),
        gained=3,
        lost=1,
        p_value=0.6,
        outcome="inconclusive",
        reason="too few rows",
        created_at=AT,
    )
    await stores.reports.put(report)
    await stores.reports.put(replace(report, outcome="pass"))
    assert await stores.reports.get("r") == report
    assert await stores.reports.list("triage") == [report]
