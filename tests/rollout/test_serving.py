"""What must be resident, and a replica brought there against an engine that fails in every way."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.catalog import Catalog
from rollout.engines import Engine, Residency, placement
from rollout.errors import EngineUnavailableError, UnservableError
from rollout.serving import (
    Listing,
    Replica,
    ReplicaApi,
    Waits,
    idle_adapters,
    is_ours,
    required_versions,
    residency_plan,
    wait_resident,
)
from rollout.state import Rollout, Trial
from rollout.stores import open_stores
from rollout.stores.codec import decode
from rollout.versions import Version
from tests.engines import VllmServer
from tests.rollout.house import until
from tests.stub_engine import Ending, Reply, StubEngine, at

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
WAITS = Waits(answer=30.0, load=30.0, probe=30.0, drain=30.0, notice=5.0, retry=2.0, patience=2)

LOAD, UNLOAD = at("/v1/load_lora_adapter"), at("/v1/unload_lora_adapter")
HEALTH, MODELS = at("/health"), at("/v1/models")


def version(number: int, weights: str | None = None, path: Path | str | None = None) -> Version:
    return Version(
        route="triage",
        number=number,
        engine="main",
        base="base",
        created_at=AT,
        adapter=weights * 64 if weights else None,
        adapter_path=str(path) if path else None,
    )


def named(weights: str) -> str:
    return f"base-{weights * 20}"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """A stub engine with a replica to look after it, and a clock that the test turns."""

    stub: StubEngine
    api: ReplicaApi
    replica: Replica
    clock: Clock
    path: Path

    def version(self, number: int, weights: str) -> Version:
        return version(number, weights, self.path)

    async def settle(self, *required: Version) -> Residency:
        """Pass after pass, until there is nothing more to do at once."""
        while True:
            done = await self.replica.reconcile(required)
            if not done.unfinished:
                return done.residency


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with StubEngine(base="base") as stub, httpx2.AsyncClient(trust_env=False) as client:
        engine = Engine("main", (stub.url,), base="base", max_adapters=3)
        clock = Clock()
        yield Bench(
            stub,
            ReplicaApi(client, engine, stub.url, WAITS),
            Replica(client, engine, stub.url, WAITS, clock),
            clock,
            tmp_path,
        )


# What must be resident.


def rollout(route: str, stable: int, candidate: int | None, previous: int | None) -> Rollout:
    trial = None
    if candidate is not None:
        trial = Trial(f"{route}@{candidate}.1", candidate, "shadow", 0.0, AT, AT)
    return Rollout(route, revision=1, stable=stable, previous=previous, trial=trial)


def catalog(*rollouts: Rollout, versions: Mapping[int, str | None]) -> Catalog:
    return Catalog(
        revision=1,
        rollouts={r.route: r for r in rollouts},
        versions={
            f"triage@{number}": version(number, weights) for number, weights in versions.items()
        },
    )


def test_stable_candidate_wanted_and_previous_are_required_in_that_order() -> None:
    seen = catalog(rollout("triage", 2, 3, 1), versions={1: "a", 2: "b", 3: "c", 4: "d", 5: "e"})
    required = required_versions(seen, frozenset({"triage@4"}))
    assert [v.number for v in required["main"]] == [2, 3, 4, 1]


def test_one_routes_candidate_never_takes_the_place_of_anothers_stable() -> None:
    one, other = rollout("triage", 2, 3, 1), rollout("faq", 5, 6, 4)
    weights = {f"triage@{n}": w for n, w in ((1, "a"), (2, "b"), (3, "c"))}
    weights |= {f"faq@{n}": w for n, w in ((4, "d"), (5, "e"), (6, "f"))}
    seen = Catalog(
        revision=1,
        rollouts={each.route: each for each in (one, other)},
        versions={
            name: replace(version(int(name[-1]), w), route=name.split("@")[0])
            for name, w in weights.items()
        },
    )
    required = required_versions(seen, frozenset())
    assert [v.number for v in required["main"]] == [2, 5, 3, 6, 1, 4]


def test_the_bare_base_the_unknown_and_the_same_weights_twice_need_no_slot() -> None:
    seen = catalog(rollout("triage", 1, 2, None), versions={1: None, 2: "b", 3: "b"})
    required = required_versions(seen, frozenset({"triage@3", "triage@9"}))
    assert [v.number for v in required["main"]] == [2]


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        (named("a"), True),
        ("base", False),
        ("base-french", False),
        (f"other-{'a' * 20}", False),
        (f"base-{'A' * 20}", False),
        (f"base-{'a' * 21}", False),
    ],
)
def test_only_names_of_our_scheme_are_ours(name: str, ours: bool) -> None:
    assert is_ours(name, "base") is ours


A, B, C, D, THEIRS = named("a"), named("b"), named("c"), named("d"), "base-french"


@pytest.mark.parametrize(
    ("adapters", "required", "drained", "load", "unload", "refused"),
    [
        ((), (), (), (), (), ()),
        ((), (A, B), (), (A, B), (), ()),
        ((A,), (A, B), (), (B,), (), ()),
        ((A, C), (A,), (), (), (), ()),  # idle, and still draining
        ((A, C), (A,), (C,), (), (C,), ()),
        ((A, B, C), (A, D), (), (), (), ()),  # full until one has drained
        ((A, B, C), (A, D), (B,), (), (B,), ()),  # out first, in at the next pass
        ((A, B), (A, D), (B,), (D,), (B,), ()),
        ((), (A, B, C, D), (), (A, B, C), (), (D,)),  # the least important has no room
        ((A, B, D), (A, B, C, D), (D,), (), (D,), (D,)),  # and makes room
        ((THEIRS,), (A, B, C), (THEIRS,), (A, B), (), (C,)),  # theirs stays
    ],
)
def test_plans(
    adapters: tuple[str, ...],
    required: tuple[str, ...],
    drained: tuple[str, ...],
    load: tuple[str, ...],
    unload: tuple[str, ...],
    refused: tuple[str, ...],
) -> None:
    plan = residency_plan(
        frozenset(adapters), required, frozenset(drained), base="base", max_adapters=3
    )
    assert (plan.load, plan.unload, plan.refused) == (load, unload, refused)


names = st.sampled_from([A, B, C, D, THEIRS, "base-german", named("e")])


@given(
    adapters=st.frozensets(names, max_size=5),
    required=st.lists(names.filter(lambda name: is_ours(name, "base")), unique=True),
    drained=st.frozensets(names),
    max_adapters=st.integers(1, 5),
)
def test_a_plan_never_exceeds_the_slots_nor_touches_what_is_needed_or_not_ours(
    adapters: frozenset[str], required: list[str], drained: frozenset[str], max_adapters: int
) -> None:
    plan = residency_plan(adapters, required, drained, base="base", max_adapters=max_adapters)
    assert not plan.load or len(adapters) + len(plan.load) <= max_adapters
    assert set(plan.load) <= set(required) - adapters
    assert set(plan.unload) <= drained & adapters
    assert all(is_ours(name, "base") for name in plan.unload)
    assert not set(plan.unload) & (set(required) - set(plan.refused))
    assert set(plan.unload) <= idle_adapters(
        adapters, required, base="base", max_adapters=max_adapters
    )


def test_a_placement_says_where_a_version_answers_and_where_not_and_why() -> None:
    wanted = version(2, "a")
    has = Residency("main", "http://1", ready=True, served=frozenset({"base", A}))
    why = {A: "rank 64 > max_lora_rank 16"}
    lacks = Residency("main", "http://2", True, frozenset({"base"}), missing=why)
    down = Residency("main", "http://3", ready=False, down="connection refused")
    other = Residency("other", "http://4", ready=True)
    fine = placement(wanted, [has, down, other])
    assert (fine.everywhere, fine.on, fine.reason) == (True, ("http://1",), "")
    assert fine.down == {"http://3": "connection refused"}
    partly = placement(wanted, [lacks, has, other])
    assert not partly.everywhere
    assert partly.on == ("http://1",)
    assert partly.reason == "replica http://2: rank 64 > max_lora_rank 16"
    nowhere = placement(wanted, [down, other])
    assert not nowhere.everywhere
    assert nowhere.reason == "replica http://3: connection refused"
    assert "no replica of engine 'main' is known" in placement(wanted, [other]).reason
    assert placement(version(1), [lacks]).everywhere
    assert not placement(version(1), [down]).everywhere


def test_what_an_older_release_stored_of_a_replica_is_read() -> None:
    stored = '{"engine": "main", "url": "http://1", "ready": true, "served": ["base"]}'
    assert decode(Residency, stored) == Residency("main", "http://1", True, frozenset({"base"}))


# A replica.


@pytest.mark.anyio
async def test_a_missing_adapter_is_loaded_probed_and_only_then_admitted(bench: Bench) -> None:
    admitted = asyncio.Event()
    bench.stub.script(Reply(hold_headers=admitted))
    passing = asyncio.create_task(bench.settle(bench.version(2, "a")))
    (probe,) = await bench.stub.wait_for_requests(1, limit=60)
    assert probe.json()["model"] == A
    assert probe.json()["max_tokens"] == 1
    assert bench.stub.adapters == {A: str(bench.path)}
    assert not passing.done()
    admitted.set()
    residency = await passing
    served = frozenset({"base", A})
    assert residency == Residency("main", bench.stub.url, True, served, root="/models/base")


@pytest.mark.anyio
async def test_each_admission_is_told_before_the_next_is_begun(bench: Bench) -> None:
    required = [bench.version(2, "a"), bench.version(3, "b")]
    first = await bench.replica.reconcile(required)
    assert first.unfinished
    assert first.residency.served == {"base", A}
    assert first.residency.missing == {B: "it is being loaded"}
    second = await bench.replica.reconcile(required)
    assert not second.unfinished
    assert second.residency.served == {"base", A, B}
    assert not second.residency.missing


@pytest.mark.anyio
async def test_what_is_resident_is_left_alone(bench: Bench) -> None:
    await bench.settle(bench.version(2, "a"))
    asked = len(bench.stub.inference_requests)
    residency = await bench.settle(bench.version(2, "a"))
    assert A in residency.served
    assert len(bench.stub.inference_requests) == asked


@pytest.mark.anyio
async def test_an_adapter_found_on_the_engine_is_proved_before_it_is_trusted(
    bench: Bench,
) -> None:
    bench.stub.adapters[A] = str(bench.path)
    bench.stub.script(Reply(status=500, body={"error": {"message": "EngineCore died"}}))
    assert (await bench.settle(bench.version(2, "a"))).served == {"base"}
    assert "EngineCore died" in bench.replica.failures[A]
    bench.clock.now += 10
    assert (await bench.settle(bench.version(2, "a"))).served == {"base", A}
    assert not bench.replica.failures


@pytest.mark.anyio
async def test_whoever_takes_over_trusts_what_was_made_known_and_is_still_there(
    bench: Bench,
) -> None:
    required = [bench.version(2, "a"), bench.version(3, "b"), bench.version(4, "c")]
    before = await bench.settle(*required)
    asked = len(bench.stub.inference_requests)
    del bench.stub.adapters[C]
    async with httpx2.AsyncClient(trust_env=False) as client:
        engine = Engine("main", (bench.stub.url,), base="base", max_adapters=3)
        successor = Replica(client, engine, bench.stub.url, WAITS)
        successor.remember(before)
        done = await successor.reconcile(required[:2])
        assert done.residency.served == {"base", A, B}
    assert len(bench.stub.inference_requests) == asked


@pytest.mark.anyio
async def test_an_engine_that_forgot_its_adapters_gets_them_again(bench: Bench) -> None:
    await bench.settle(bench.version(2, "a"))
    bench.stub.forget()
    assert (await bench.settle(bench.version(2, "a"))).served == {"base", A}
    assert bench.stub.adapters == {A: str(bench.path)}


@pytest.mark.anyio
async def test_what_nobody_needs_is_told_first_and_unloaded_later(bench: Bench) -> None:
    await bench.settle(bench.version(2, "a"), bench.version(3, "b"))
    assert (await bench.settle(bench.version(2, "a"))).served == {"base", A, B}
    bench.clock.now += WAITS.drain
    assert (await bench.settle(bench.version(2, "a"))).served == {"base", A}
    assert set(bench.stub.adapters) == {A, B}
    bench.clock.now += WAITS.notice
    await bench.settle(bench.version(2, "a"))
    assert set(bench.stub.adapters) == {A}


@pytest.mark.anyio
async def test_what_is_needed_again_while_it_drains_stays(bench: Bench) -> None:
    both = bench.version(2, "a"), bench.version(3, "b")
    await bench.settle(*both)
    await bench.settle(both[0])
    bench.clock.now += WAITS.drain + 1
    await bench.settle(both[0])
    assert (await bench.settle(*both)).served == {"base", A, B}
    bench.clock.now += WAITS.notice
    assert (await bench.settle(*both)).served == {"base", A, B}


@pytest.mark.anyio
async def test_a_full_replica_makes_room_for_what_matters_more(bench: Bench) -> None:
    old = [bench.version(number, weights) for number, weights in ((1, "a"), (2, "b"), (3, "c"))]
    await bench.settle(*old)
    needed = [bench.version(4, "d"), *old]
    full = await bench.settle(*needed)
    assert set(bench.stub.adapters) == {A, B, C}
    assert "waits until an adapter" in full.missing[D]
    bench.clock.now += WAITS.drain + WAITS.notice
    await bench.settle(*needed)
    residency = await bench.settle(*needed)
    assert residency.served == {"base", D, A, B}
    assert set(bench.stub.adapters) == {A, B, D}
    assert set(residency.missing) == {C}
    assert "no room: its 3 adapter slots" in residency.missing[C]


@pytest.mark.anyio
async def test_an_adapter_that_the_engine_refuses_is_tried_ever_more_rarely(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    error = {"error": {"message": "LoRA rank 64 is greater than max_lora_rank 16"}}
    bench.stub.script(Reply(status=500, body=error), times=None, where=LOAD)

    async def loads_tried() -> int:
        await bench.settle(bench.version(2, "a"), bench.version(3, "b"))
        return sum(LOAD(received) for received in bench.stub.requests)

    refused = await bench.settle(bench.version(2, "a"))
    assert refused.served == {"base"}
    assert refused.missing == {
        A: f"cannot serve {A} (500): LoRA rank 64 is greater than max_lora_rank 16"
    }
    assert "greater than max_lora_rank" in bench.replica.failures[A]
    assert "greater than max_lora_rank" in caplog.text
    assert await loads_tried() == 2  # b is not held up by a
    assert await loads_tried() == 2
    bench.clock.now += 2
    assert await loads_tried() == 4
    bench.clock.now += 2
    assert await loads_tried() == 4
    bench.clock.now += 2
    assert await loads_tried() == 6


@pytest.mark.anyio
async def test_an_engine_that_is_down_serves_nothing_and_comes_back(bench: Bench) -> None:
    await bench.settle(bench.version(2, "a"))
    await bench.stub.stop()
    down = await bench.settle(bench.version(2, "a"))
    assert not down.ready
    assert not down.served
    assert down.down.startswith("does not answer")
    bench.stub.forget()
    await bench.stub.start()
    bench.stub.script(Reply(status=503), where=HEALTH)
    assert await bench.settle(bench.version(2, "a")) == down  # one reason, told once
    assert (await bench.settle(bench.version(2, "a"))).served == {"base", A}


@pytest.mark.anyio
async def test_what_the_engine_says_is_shortened(bench: Bench) -> None:
    error = {"error": {"message": "Traceback:\n" + "a line\n" * 200}}
    bench.stub.script(Reply(status=500, body=error), where=LOAD)
    reason = (await bench.settle(bench.version(2, "a"))).missing[A]
    assert "Traceback: a line a line" in reason
    assert len(reason) <= 301


@pytest.mark.anyio
async def test_an_adapter_of_another_base_is_not_loaded(bench: Bench) -> None:
    engine = Engine("main", (bench.stub.url,), base="base", base_revision="r2")
    older = replace(bench.version(2, "a"), base_revision="r1")
    same = replace(bench.version(3, "b"), base_revision="r2")
    other = replace(bench.version(4, "c"), base="other")
    async with httpx2.AsyncClient(trust_env=False) as client:
        replica = Replica(client, engine, bench.stub.url, WAITS)
        while (done := await replica.reconcile([older, same, other])).unfinished:
            pass
    assert done.residency.served == {"base", B}
    assert "made for revision r1 of the base, and the engine serves r2" in done.residency.missing[A]
    assert "made for base 'other'" in done.residency.missing[other.served_name]
    assert set(bench.stub.adapters) == {B}


@pytest.mark.anyio
async def test_a_dead_engine_process_behind_a_live_server_is_down(bench: Bench) -> None:
    await bench.settle()
    bench.stub.healthy = False
    assert not (await bench.settle()).ready
    bench.stub.healthy = True
    bench.stub.script(Reply(status=503), where=MODELS)
    assert not (await bench.settle()).ready
    assert (await bench.settle()).ready


@pytest.mark.anyio
async def test_a_replica_that_is_only_slow_is_asked_again_before_it_is_given_up(
    bench: Bench,
) -> None:
    engine = Engine("main", (bench.stub.url,), base="base")
    hurried = Waits(answer=0.3, patience=2)
    async with httpx2.AsyncClient(trust_env=False) as client:
        replica = Replica(client, engine, bench.stub.url, hurried)

        async def ready() -> bool:
            return (await replica.reconcile(())).residency.ready

        # The machine may be the one that is slow, before and after what is scripted.
        await until(ready, "it to be ready")
        bench.stub.script(Reply(ending=Ending.SILENCE), times=3, where=HEALTH)
        assert [await ready() for _ in range(3)] == [True, False, False]
        await until(ready, "it to be ready again")


@pytest.mark.anyio
async def test_any_openai_server_is_only_asked_whether_it_is_there() -> None:
    async with StubEngine(base="gpt") as stub, httpx2.AsyncClient(trust_env=False) as client:
        engine = Engine("far", (stub.url,), base="gpt", kind="openai")
        replica = Replica(client, engine, stub.url, WAITS)
        done = await replica.reconcile([version(2, "a", "/x")])
        served = frozenset({"gpt"})
        assert done.residency == Residency("far", stub.url, True, served, root="/models/gpt")
        assert [received.path for received in stub.requests] == ["/v1/models"]


@pytest.mark.anyio
async def test_the_engines_key_is_sent() -> None:
    async with StubEngine(api_key="k") as stub, httpx2.AsyncClient(trust_env=False) as client:
        with_key = Engine("main", (stub.url,), base="base", api_key="k")
        assert await ReplicaApi(client, with_key, stub.url, WAITS).list_served() == Listing(
            frozenset(), "/models/base"
        )
        without = Engine("main", (stub.url,), base="base")
        with pytest.raises(EngineUnavailableError, match="set `api_key` of engine 'main'"):
            await ReplicaApi(client, without, stub.url, WAITS).list_served()


# One request each.


@pytest.mark.anyio
async def test_loading_and_unloading_twice_is_fine(bench: Bench) -> None:
    for _ in range(2):
        await bench.api.load(A, str(bench.path))
    assert (await bench.api.list_served()).adapters == {A}
    for _ in range(2):
        await bench.api.unload(A)
    assert not (await bench.api.list_served()).adapters


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (Reply(status=500, body={"error": {"message": "rank 64 > 16"}}), "rank 64 > 16"),
        (Reply(status=500, body=b"Internal Server Error"), "Internal Server Error"),
        (Reply(status=400, body={"error": {"message": "bad"}}), "bad"),
        (Reply(status=404, body={"detail": "Not Found"}), "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (Reply(status=404, body={"error": {"message": "No adapter"}}), "must be able to read"),
    ],
)
async def test_a_refusal_to_load_says_why(bench: Bench, reply: Reply, says: str) -> None:
    bench.stub.script(reply, where=LOAD)
    with pytest.raises(UnservableError, match=says):
        await bench.api.load(A, str(bench.path))


@pytest.mark.anyio
async def test_a_path_that_the_engine_cannot_see_is_named(bench: Bench) -> None:
    with pytest.raises(UnservableError, match="finds no adapter at /nowhere"):
        await bench.api.load(A, "/nowhere")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "reply", [Reply(ending=Ending.RESET_BEFORE_HEADERS), Reply(status=503, body=b"")]
)
async def test_an_engine_that_does_not_answer_a_load_is_unavailable(
    bench: Bench, reply: Reply
) -> None:
    bench.stub.script(reply, where=LOAD)
    with pytest.raises(EngineUnavailableError):
        await bench.api.load(A, str(bench.path))


@pytest.mark.anyio
@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"data": [1]}', b'{"object": "list"}'])
async def test_something_else_on_that_port_is_no_engine(bench: Bench, body: bytes) -> None:
    bench.stub.script(Reply(body=body), where=MODELS)
    with pytest.raises(EngineUnavailableError, match="OpenAI-compatible"):
        await bench.api.list_served()


@pytest.mark.anyio
async def test_an_unload_that_fails_is_repeated(bench: Bench) -> None:
    await bench.settle(bench.version(2, "a"))
    await bench.settle()
    bench.clock.now += WAITS.drain + WAITS.notice
    bench.stub.script(Reply(status=500, body=b"no"), where=UNLOAD)
    await bench.settle()
    assert set(bench.stub.adapters) == {A}
    await bench.settle()
    assert not bench.stub.adapters


# Waiting for it.


@pytest.mark.anyio
async def test_waiting_ends_when_the_last_ready_replica_serves_the_version(redis_url: str) -> None:
    wanted = version(2, "a")
    both = frozenset({"base", A})
    async with open_stores(redis_url) as stores:
        await stores.catalog.put_residency(
            [
                Residency("main", "http://1", True, both),
                Residency("main", "http://2", True, frozenset({"base"})),
                Residency("main", "http://3", False),
            ]
        )
        waiting = asyncio.create_task(wait_resident(stores, wanted, 30, poll_seconds=0.01))
        assert not (await asyncio.wait([waiting], timeout=0.05))[0]
        await stores.catalog.put_residency([Residency("main", "http://2", True, both)])
        await waiting


@pytest.mark.anyio
async def test_waiting_in_vain_says_for_whom(redis_url: str) -> None:
    async with open_stores(redis_url) as stores:
        with pytest.raises(EngineUnavailableError, match="no replica of engine 'main' is known"):
            await wait_resident(stores, version(2, "a"), 0.0)
        lacks = Residency("main", "http://2", True, missing={A: "rank 64 > 16"})
        await stores.catalog.put_residency([lacks])
        with pytest.raises(EngineUnavailableError, match="replica http://2: rank 64 > 16"):
            await wait_resident(stores, version(2, "a"), 0.05, poll_seconds=0.01)


# The real engine.


@pytest.mark.vllm
@pytest.mark.anyio
async def test_real_vllm_is_brought_to_hold_two_adapters_and_to_drop_one(
    vllm_engine: VllmServer, tiny_adapters: Mapping[str, Path]
) -> None:
    def real(number: int, weights: str, path: Path) -> Version:
        return Version(
            route="triage",
            number=number,
            engine="main",
            base=vllm_engine.base,
            created_at=AT,
            adapter=weights * 64,
            adapter_path=str(path),
        )

    first = real(2, "1", tiny_adapters["first"])
    second = real(3, "2", tiny_adapters["second"])
    missing = real(4, "3", Path("/nowhere/at/all"))
    clock = Clock()
    engine = Engine("main", (vllm_engine.url,), base=vllm_engine.base)
    async with httpx2.AsyncClient(trust_env=False) as client:
        replica = Replica(client, engine, vllm_engine.url, Waits(), clock)
        api = ReplicaApi(client, engine, vllm_engine.url, Waits())

        async def settle(*required: Version) -> frozenset[str]:
            while (done := await replica.reconcile(required)).unfinished:
                pass
            assert done.residency.ready
            return done.residency.served

        base = vllm_engine.base
        try:
            served = await settle(first, second, missing)
            assert served == {base, first.served_name, second.served_name}
            assert "/nowhere/at/all" in replica.failures[missing.served_name]
            await api.load(first.served_name, str(tiny_adapters["first"]))  # again
            await settle(first)
            clock.now += 60
            assert await settle(first) == {base, first.served_name}
            assert second.served_name not in (await api.list_served()).adapters
            with pytest.raises(UnservableError, match="does not exist"):
                await api.probe(second.served_name)
        finally:
            for each in (first, second):
                await api.unload(each.served_name)
