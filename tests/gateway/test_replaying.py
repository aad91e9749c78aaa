"""Replays: past captures through a version, behind what is live, without touching evidence."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from gateway.shadow.fleet import Fleet, pool_limits
from gateway.shadow.metrics import ShadowMetrics
from gateway.shadow.replaying import Replayer
from gateway.shadow.settings import ShadowSettings
from gateway.upstream import UpstreamPool
from rollout.engines import Engine
from rollout.errors import ConflictError, NotFoundError
from rollout.evidence import PairCounts
from rollout.exchanges import Answer
from rollout.redaction import Redactor
from rollout.replays import Replay, ReplayReport
from rollout.routes import Route
from rollout.stores import open_stores
from rollout.stores.captures import Keeping
from rollout.stores.replays import MAXIMUM_UNDER_WAY
from tests.gateway.serving import catalog, serving, settings
from tests.gateway.shadowing import Bed, made_bed, shadow, until
from tests.stub_engine import Reply, StubEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
async def bed(redis_url: str) -> AsyncIterator[Bed]:
    async with made_bed(redis_url) as made:
        await made.stores.captures.append([])
        yield made


def asked(bed: Bed, **changes: Any) -> Replay:
    now = datetime.now(UTC)
    fields: dict[str, Any] = {
        "id": "replay-1",
        "route": "triage",
        "version": bed.candidate.number,
        "since": now - timedelta(hours=1),
        "limit": 100,
        "by": "test",
        "asked_at": now + timedelta(seconds=1),
    }
    return Replay(**(fields | changes))


@asynccontextmanager
async def replaying(
    bed: Bed, consumer: str = "one", *, busy: asyncio.Event | None = None, **table: Any
) -> AsyncIterator[None]:
    settings = ShadowSettings.model_validate({"poll_seconds": 0.02} | table)
    metrics = ShadowMetrics()
    engine = Engine("main", (bed.engine.url,), "base")
    async with UpstreamPool(pool_limits(settings)) as pool:
        fleet = Fleet(bed.stores.catalog, [engine], pool, settings)
        await fleet.refresh()
        replayer = Replayer(
            bed.stores, fleet, metrics, settings, Redactor(), consumer,
            lambda: busy is not None and busy.is_set(),
        )  # fmt: skip
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(fleet.follow()), group.create_task(replayer.run())]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()


async def ended(bed: Bed, replay: str = "replay-1") -> ReplayReport:
    async def is_over() -> bool:
        return (await bed.stores.replays.get(replay)).ended

    await until(is_over, "the replay to end")
    return await bed.stores.replays.report(replay)


async def test_settled_captures_are_put_through_a_version(bed: Bed) -> None:
    async with shadow(bed):
        await bed.capture(bed.exchange("r1"), bed.exchange("agree"))
        await bed.settled()
    live = await bed.pairs()
    await bed.stores.replays.ask(asked(bed))
    async with replaying(bed):
        report = await ended(bed)
    assert (report.replay.state, report.replay.found, report.settled) == ("done", 2, 2)
    assert report.pairs == PairCounts(agree=1, disagree=1)
    assert report.kinds == {"exact": 1, "text": 1}
    (difference,) = report.differences
    assert (difference.request_id, difference.then, difference.now) == ("r1", "good", "bad")
    assert difference.asked == "Good or bad? r1"
    case = await bed.stores.cases.get(str(difference.case))
    assert case.trial == "replay-1"
    assert await bed.pairs() == live
    assert await bed.stores.catalog.wanted() == {bed.candidate.name}


async def test_a_replay_of_the_same_version_compares_it_with_its_answers_of_then(bed: Bed) -> None:
    await bed.capture(bed.exchange("r1"), bed.exchange("r2", answer=Answer(1, 200, "bad")))
    await bed.stores.replays.ask(asked(bed, version=1))
    async with replaying(bed):
        report = await ended(bed)
    assert report.pairs == PairCounts(agree=1, disagree=1)


async def test_captures_of_no_trial_and_of_other_routes(bed: Bed) -> None:
    await bed.capture(
        bed.exchange("r1", trial=None),
        bed.exchange("r2", route="other"),
        bed.exchange("r3", answer=Answer(1, 400, error="too long")),
        bed.exchange("r4", path="/v1/embeddings"),
        bed.exchange("r5", request="{"),
    )
    await bed.stores.replays.ask(asked(bed))
    async with replaying(bed):
        report = await ended(bed)
    assert report.pairs == PairCounts(disagree=1)
    assert report.skipped == {"client_error": 1, "endpoint": 1, "unaskable": 1}


@pytest.mark.parametrize(("rate", "kept"), [(1.0, True), (0.0, False)])
async def test_between_trials_only_what_the_route_says_is_captured(
    redis_url: str, tmp_path: Path, rate: float, kept: bool
) -> None:
    route = Route("r", "main", capture=1.0, capture_idle=rate)
    async with (
        open_stores(redis_url) as stores,
        StubEngine() as engine,
        serving(settings(tmp_path, engine.url, store=redis_url)) as gateway,
    ):
        gateway.app._parts.snapshot.adopt(catalog(engine.url, route=route))  # type: ignore[union-attr]
        await gateway.ask(**{"x-request-id": "kept"})
        await gateway.ask("r@1", **{"x-request-id": "pinned"})
        await gateway.ask(**{"x-request-id": "private", "x-sluice-no-capture": "1"})
        gateway.server.should_exit = True
        found = None

        async def written() -> bool:
            nonlocal found
            found = await stores.captures.find("r", "kept")
            return found is not None

        if kept:
            await until(written, "the capture")
            assert found is not None
            assert not found.trial
            assert found.unit
    # What waited was written at the end.
    async with open_stores(redis_url) as stores:
        assert (await stores.captures.waiting()) == (1 if kept else 0)


async def test_the_newest_take_part_up_to_the_limit(bed: Bed) -> None:
    await bed.capture(*(bed.exchange(f"r{number}") for number in range(5)))
    await bed.stores.replays.ask(asked(bed, limit=2))
    async with replaying(bed):
        report = await ended(bed)
    assert {each.request_id for each in report.differences} == {"r3", "r4"}


async def test_what_is_older_than_asked_takes_no_part(bed: Bed) -> None:
    await bed.capture(bed.exchange("r1"))
    later = datetime.now(UTC) + timedelta(hours=1)
    await bed.stores.replays.ask(asked(bed, since=later, asked_at=later + timedelta(hours=1)))
    async with replaying(bed):
        report = await ended(bed)
    assert (report.replay.state, report.settled) == ("done", 0)


async def test_a_replay_that_lost_its_shadow_goes_on_where_it_was(bed: Bed) -> None:
    hold = asyncio.Event()
    bed.engine.script(Reply(), times=2)
    bed.engine.script(Reply(hold_headers=hold), times=None)
    await bed.capture(*(bed.exchange(f"r{number}") for number in range(5)))
    await bed.stores.replays.ask(asked(bed))
    async with replaying(bed, replay_concurrency=1):

        async def two() -> bool:
            return await bed.stores.replays.settled("replay-1") == 2

        await until(two, "two exchanges")
        await bed.engine.wait_for_requests(3)
    bed.engine.unscript()
    async with replaying(bed, "two"):
        report = await ended(bed)
    assert report.pairs == PairCounts(disagree=5)
    # The one that was under way was asked twice and counted once.
    assert len(bed.engine.inference_requests) == 6


async def test_a_replay_can_be_cancelled(bed: Bed) -> None:
    bed.engine.script(Reply(hold_headers=asyncio.Event()), times=None)
    await bed.capture(bed.exchange("r1"))
    await bed.stores.replays.ask(asked(bed))
    async with replaying(bed):
        await bed.engine.wait_for_requests(1)
        await bed.stores.replays.change("replay-1", state="cancelled")
        await bed.engine.wait_for_cancelled(1)
    report = await bed.stores.replays.report("replay-1")
    assert (report.replay.state, report.settled) == ("cancelled", 0)
    # What has ended stays so, and nobody takes it.
    assert (await bed.stores.replays.change("replay-1", state="running")).state == "cancelled"
    assert await bed.stores.replays.take("two", 1.0) is None


async def test_live_captures_and_live_traffic_come_first(bed: Bed) -> None:
    busy = asyncio.Event()
    busy.set()
    bed.engine.waiting = 10
    await bed.capture(bed.exchange("r1"))
    await bed.stores.replays.ask(asked(bed))
    async with replaying(bed, busy=busy):
        await bed.engine.wait_until(
            lambda: sum(r.path == "/metrics" for r in bed.engine.requests) > 3, "looks at the queue"
        )
        busy.clear()
        await bed.engine.wait_until(
            lambda: sum(r.path == "/metrics" for r in bed.engine.requests) > 6, "more looks"
        )
        assert bed.engine.inference_requests == []
        bed.engine.waiting = 0
        report = await ended(bed)
    assert report.pairs.total == 1


async def test_a_version_that_is_nowhere_fails_the_replay_and_says_so(bed: Bed) -> None:
    await bed.set_resident()
    await bed.capture(bed.exchange("r1"))
    await bed.stores.replays.ask(asked(bed))
    async with replaying(bed, replay_wait_seconds=0.2):
        report = await ended(bed)
    assert report.replay.state == "failed"
    assert "no replica has the version" in report.replay.reason


async def test_too_many_replays_of_a_route_are_refused(bed: Bed) -> None:
    for number in range(MAXIMUM_UNDER_WAY):
        await bed.stores.replays.ask(asked(bed, id=f"replay-{number}"))
    with pytest.raises(ConflictError):
        await bed.stores.replays.ask(asked(bed, id="replay-more"))
    with pytest.raises(NotFoundError):
        await bed.stores.replays.report("replay-unknown")


async def test_captures_are_kept_in_bounds_and_found_by_their_request(bed: Bed) -> None:
    captures = type(bed.stores.captures)(bed.stores.captures._link, Keeping(count=150))
    for start in range(0, 1000, 100):
        await captures.append([bed.exchange(f"r{start + n}") for n in range(100)])
    kept = [
        page
        async for page in captures.between(
            "triage", datetime(2020, 1, 1, tzinfo=UTC), datetime.now(UTC)
        )
    ]
    # The stream is cut in blocks of a hundred.
    assert 150 <= sum(map(len, kept)) <= 350
    found = await captures.find("triage", "r999")
    assert found is not None
    assert found.request_id == "r999"
    assert await captures.find("triage", "r0") is None
    assert await captures.find("other", "r999") is None
    assert await captures.erase(lambda exchange: exchange.request_id == "r999") == 1
    assert await captures.find("triage", "r999") is None


async def test_captures_that_are_too_old_are_let_go_of(bed: Bed) -> None:
    captures = type(bed.stores.captures)(bed.stores.captures._link, Keeping(hours=-1))
    await bed.capture(bed.exchange("r1"))
    await captures.trim()
    assert await bed.stores.captures.find("triage", "r1") is None
    assert await bed.stores.captures.waiting() == 0
