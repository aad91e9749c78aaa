"""What callers say of answers, from the official client to the counts of a trial."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from gateway.errors import OverloadedError
from gateway.evidence import Evidence
from gateway.feedback import FeedbackDesk
from gateway.metrics import Metrics
from gateway.receipts import Receipts
from gateway.settings import FeedbackSection
from rollout.credentials import ApiKey, digest_secret
from rollout.errors import InvalidInputError
from rollout.exchanges import Feedback, Receipt
from rollout.redaction import Redactor
from rollout.routes import Route
from rollout.state import Trial
from rollout.stores import Stores, open_stores
from rollout.versions import Version
from tests.gateway.serving import AT, KEY, RunningGateway, catalog, serving, settings
from tests.stub_engine import StubEngine

pytestmark = pytest.mark.anyio
ADAPTER = "cd" * 32
OTHER = ApiKey("k2", "other", digest_secret("sk-other"), frozenset({"infer"}), AT)
LABELER = ApiKey("k3", "labeler", digest_secret("sk-label"), frozenset({"label"}), AT)
TRIAL = "r@2.2"
VERSION = Version("r", 1, "main", "base", AT)
ON_TRIAL = Trial(TRIAL, 2, "canary", 10.0, AT, AT)


@pytest.fixture
async def engine() -> AsyncIterator[StubEngine]:
    async with StubEngine(base="base", any_model=True) as engine:
        yield engine


@pytest.fixture
async def stores(redis_url: str) -> AsyncIterator[Stores]:
    async with open_stores(redis_url) as opened:
        yield opened


@asynccontextmanager
async def on_trial(folder: Path, engine: StubEngine, store: str) -> AsyncIterator[RunningGateway]:
    """A gateway on a store without routes, which serves its last known catalog: a canary for all."""
    known = catalog(
        engine.url,
        candidate=ADAPTER,
        route=Route("r", "main", capture=1.0),
        keys=[KEY, OTHER, LABELER],
    )
    async with serving(settings(folder, engine.url, store=store), known) as gateway:
        gateway.app._parts.snapshot.adopt(known)  # type: ignore[union-attr]
        yield gateway


@pytest.fixture
async def gateway(
    engine: StubEngine, redis_url: str, tmp_path: Path
) -> AsyncIterator[RunningGateway]:
    async with on_trial(tmp_path, engine, redis_url) as running:
        yield running


async def test_the_official_client_gives_feedback_on_its_answer(
    gateway: RunningGateway, stores: Stores
) -> None:
    async with gateway.client() as client:
        answer = await client.chat.completions.create(
            model="r", messages=[{"role": "user", "content": "Hi"}]
        )
        body = {
            "request_id": answer._request_id,
            "rating": "bad",
            "correction": "Ask anna@example.com.",
            "comment": "call +1 415 555 2671",
        }
        said: Any = await client.post("/feedback", body=body, cast_to=object)
        again: Any = await client.post("/feedback", body=body, cast_to=object)
    assert said == {"object": "feedback", "status": "accepted"}
    assert again == {"object": "feedback", "status": "repeated"}

    (kept,) = await until(lambda: stores.feedback.list("r", TRIAL))
    assert kept.receipt == Receipt("r", 2, "candidate", TRIAL)
    assert (kept.key, kept.rating) == ("k1", "bad")
    assert (kept.correction, kept.comment) == ("Ask [email].", "call [phone]")

    async def counted() -> bool:
        evidence = await stores.evidence.read("r", TRIAL)
        return (evidence.candidate.negative, evidence.candidate.positive) == (1, 0)

    await until(counted)
    text = (await gateway.send("GET", "/metrics", key=None)).body.decode()
    assert 'sluice_feedback_total{rating="bad",route="r"} 1.0' in text


async def test_feedback_on_another_keys_request_finds_nothing(
    gateway: RunningGateway, stores: Stores
) -> None:
    answer = await gateway.ask()
    body = {"request_id": answer.headers["x-request-id"], "rating": "good"}

    async def refused() -> bool:
        # Until it knows that it is alone, the gateway asks around.
        said = await gateway.send("POST", "/v1/feedback", body, key="sk-other")
        assert said.status in (202, 404)
        return said.status == 404 and said.json()["error"]["param"] == "request_id"

    await until(refused)
    assert (await gateway.send("POST", "/v1/feedback", body)).status == 202
    (kept,) = await until(lambda: stores.feedback.list("r", TRIAL))
    assert kept.key == "k1"


async def test_only_a_key_that_may_ask_may_give_feedback(gateway: RunningGateway) -> None:
    body = {"request_id": "x", "rating": "good"}
    assert (await gateway.send("POST", "/v1/feedback", body, key="sk-label")).status == 403
    assert (await gateway.send("POST", "/v1/feedback", body, key=None)).status == 401
    assert (await gateway.send("GET", "/v1/feedback")).status == 405


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"request_id": "x"}, None),
        ({"request_id": "x", "rating": "great"}, "rating"),
        ({"request_id": 1, "rating": "good"}, "request_id"),
        ({"request_id": "x", "rating": "good", "mood": 1}, None),
        ({"request_id": "x", "rating": "good", "comment": "y" * 40_000}, "comment"),
        (b"{", None),
        (b"\xff", None),
        (b"[" * 10_000, None),
    ],
)
async def test_what_is_no_feedback_is_refused(
    gateway: RunningGateway, body: object, param: str | None
) -> None:
    said = await gateway.send("POST", "/v1/feedback", body)
    assert said.status == 400
    assert said.json()["error"]["param"] == param


async def test_feedback_that_is_too_large_is_refused(gateway: RunningGateway) -> None:
    assert (await gateway.send("POST", "/v1/feedback", b" " * 70_000)).status == 413


async def test_feedback_reaches_the_gateway_that_answered(
    gateway: RunningGateway, engine: StubEngine, redis_url: str, tmp_path: Path, stores: Stores
) -> None:
    async with on_trial(tmp_path / "second", engine, redis_url) as second:
        await until(lambda: _alive(stores, 2))
        answer = await gateway.ask(**{"x-request-id": "mine"})
        body = {"request_id": "mine", "rating": "good"}

        async def accepted() -> bool:
            # It may still take itself for the only one.
            return (await second.send("POST", "/v1/feedback", body)).status == 202

        await until(accepted)
        (kept,) = await until(lambda: stores.feedback.list("r", TRIAL))
        assert answer.status == 200
        receipt = kept.receipt
        assert receipt is not None
        assert (receipt.version, receipt.arm, receipt.trial) == (2, "candidate", TRIAL)

        async def counted() -> bool:
            return (await stores.evidence.read("r", TRIAL)).candidate.positive == 1

        await until(counted)


async def test_feedback_waits_for_a_store_that_is_gone_but_no_request_does(
    engine: StubEngine, tmp_path: Path
) -> None:
    config = settings(tmp_path, engine.url, feedback={"maximum_waiting": 2})
    async with serving(config, catalog(engine.url)) as gateway:
        body = {"rating": "bad"}
        statuses = []
        for number in range(3):
            await gateway.ask(**{"x-request-id": f"q{number}"})
            said = await gateway.send("POST", "/v1/feedback", {"request_id": f"q{number}", **body})
            statuses.append(said.status)
        assert statuses == [202, 202, 503]
        assert said.json()["error"]["code"] == "overloaded"
        assert said.headers["retry-after"] == "1"


async def test_captures_are_redacted_before_they_are_stored(
    gateway: RunningGateway, engine: StubEngine, stores: Stores
) -> None:
    engine.text = "Write to anna@example.com."
    content = "I am bob@example.com"
    await gateway.send(body={"model": "r", "messages": [{"role": "user", "content": content}]})
    (taken,) = await until(lambda: stores.captures.take("one", 1, 0.05))
    assert "I am [email]" in taken.exchange.request
    assert taken.exchange.answer.text == "Write to [email]."
    assert engine.inference_requests[0].json()["messages"][0]["content"] == content
    text = (await gateway.send("GET", "/metrics", key=None)).body.decode()
    assert 'sluice_redactions_total{kind="email"} 2.0' in text


def test_only_the_newest_requests_are_known() -> None:
    receipts = Receipts(10)
    for number in range(1000):
        receipts.note("k", str(number), (VERSION, "stable", "", None, ""))
        assert len(receipts) <= 10
    assert receipts.find("k", "999") is not None
    assert receipts.find("k", "1") is None
    assert receipts.find("other", "999") is None


def test_the_first_word_on_a_request_stands_and_a_new_one_of_that_name_is_another() -> None:
    receipts, cell = Receipts(10), Evidence("i").cell("r", ON_TRIAL, "stable")
    desk = FeedbackDesk(FeedbackSection(), receipts, Redactor(), Metrics(), "i")
    receipts.note("k1", "x", (VERSION, "stable", "t", cell, ""))
    assert desk.take(KEY, b'{"request_id":"x","rating":"good"}')
    assert not desk.take(KEY, b'{"request_id":"x","rating":"bad"}')
    assert (cell.tally.positive, cell.tally.negative) == (1, 0)
    receipts.note("k1", "x", (VERSION, "stable", "t", cell, ""))
    assert desk.take(KEY, b'{"request_id":"x","rating":"bad"}')
    assert (cell.tally.positive, cell.tally.negative) == (1, 1)


def test_a_full_desk_counts_nothing() -> None:
    receipts, metrics = Receipts(10), Metrics()
    cell = Evidence("i").cell("r", ON_TRIAL, "stable")
    desk = FeedbackDesk(FeedbackSection(maximum_waiting=1), receipts, Redactor(), metrics, "i")
    for name in ("x", "y"):
        receipts.note("k1", name, (VERSION, "stable", "t", cell, ""))
    desk.take(KEY, b'{"request_id":"x","rating":"bad"}')
    with pytest.raises(OverloadedError):
        desk.take(KEY, b'{"request_id":"y","rating":"bad"}')
    with pytest.raises(InvalidInputError):
        desk.take(KEY, b"{}")
    assert cell.tally.negative == 1
    assert b'sluice_feedback_total{rating="bad",route="r"} 1.0' in generate_latest(metrics.registry)


async def test_the_store_keeps_the_first_word_and_lists_the_oldest_first(stores: Stores) -> None:
    receipt = Receipt("r", 1, "stable", None)
    one = Feedback("x", "k1", "good", AT, receipt=receipt)
    two = Feedback("y", "k1", "bad", datetime(2026, 1, 2, tzinfo=AT.tzinfo), "no", receipt=receipt)
    assert [await stores.feedback.put(each) for each in (two, one)] == ["stored", "stored"]
    assert await stores.feedback.put(one) == "already"
    assert await stores.feedback.list("r", None) == [one, two]
    position = await stores.feedback.newest()
    await stores.feedback.ask_around(Feedback("z", "k1", "good", AT))
    ((entry, asked),) = await stores.feedback.asked(position, 0.05)
    assert asked.request_id == "z"
    assert await stores.feedback.asked(entry, 0.05) == []


async def test_evidence_of_before_there_was_feedback_is_read(
    stores: Stores, redis_url: str
) -> None:
    import redis

    old = (
        '{"requests":3,"errors":1,"fallbacks":0,"slow_first_token":0,"slow_total":0,"seconds":0.5}'
    )
    with redis.Redis.from_url(redis_url) as client:
        client.hset("sluice:evidence:r:t", "i|stable", old)
    counts = (await stores.evidence.read("r", "t")).stable
    assert (counts.requests, counts.positive, counts.negative) == (3, 0, 0)


async def _alive(stores: Stores, count: int) -> bool:
    return len(await stores.presence.live()) == count


async def until(look: Callable[[], Awaitable[Any]]) -> Any:
    """What `look` gives, once there is something."""
    async with asyncio.timeout(10):
        while not (found := await look()):
            await asyncio.sleep(0.02)
    return found
