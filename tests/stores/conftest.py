"""Open stores on an empty database, and small values to put into them."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from rollout.cases import Case
from rollout.exchanges import Answer, Comparison, Exchange
from rollout.routes import Route
from rollout.stores import Stores, open_stores
from rollout.stores.captures import Taken

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
async def stores(redis_url: str) -> AsyncIterator[Stores]:
    async with open_stores(redis_url) as opened:
        await opened.rollouts.put_route(
            Route(name="triage", engine="main"), by="test", at=AT, base="tiny"
        )
        yield opened


def exchange(request_id: str = "r1") -> Exchange:
    return Exchange(
        request_id=request_id,
        route="triage",
        trial="triage@2.2",
        arm="stable",
        unit="u",
        path="/v1/chat/completions",
        request="{}",
        answer=Answer(version=1, status=200, text="yes"),
        captured_at=AT,
    )


def comparison(request_id: str = "r1", agreement: float = 0.0) -> Comparison:
    return Comparison(
        request_id=request_id,
        route="triage",
        trial="triage@2.2",
        stable=Answer(version=1, status=200, text="yes"),
        candidate=Answer(version=2, status=200, text="no"),
        agreement=agreement,
        kind="exact" if agreement == 1.0 else "text",
    )


def case(case_id: str = "c1", *, prompt: str = "", priority: float = 1.0) -> Case:
    return Case(
        id=case_id,
        route="triage",
        trial="triage@2.2",
        request_id="r1",
        messages=({"role": "user", "content": prompt or case_id},),
        stable=Answer(version=1, status=200, text="yes"),
        candidate=Answer(version=2, status=200, text="no"),
        agreement=0.0,
        kind="text",
        inclusion=1.0,
        priority=priority,
        created_at=AT,
    )


async def capture(stores: Stores, request_id: str = "r1") -> Taken:
    """Append one exchange and take it."""
    await stores.captures.append([exchange(request_id)])
    (taken,) = await stores.captures.take("one", 1, 1.0)
    return taken


async def offer(stores: Stores, *cases: Case) -> None:
    """Put cases into the queue the way the shadow does."""
    for number, offered in enumerate(cases):
        taken = await capture(stores, f"r{number}")
        settled = await stores.captures.settle(taken, comparison(), offered, 100)
        assert settled.state == "counted"
