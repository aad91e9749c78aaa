"""Many routes: what a controller's tick and the store cost with 500 trials and 100 gateways.

    python -m benchmarks.many_routes            # about a minute
    python -m benchmarks.many_routes --quick    # fewer routes and gateways, to see that it runs

The store is the bundled Valkey as `sluice up` starts it: append-only, fsync always. The gateways
are what a gateway worker reports with, 100 of them in a process of their own; each changes what it
knows of every trial once a second, and reports as gateways do: every second, of at most so many
trials at once, with new units to claim. The controller is the real one, without engines.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import httpx2
import uvloop
from prometheus_client import CollectorRegistry

from benchmarks.processes import TICKS, Cores, Processes, free_port
from gateway.evidence import REPORTED_AT_MOST, Evidence
from gateway.routing import index
from rollout.assignment import unit_of
from rollout.controller import collect_seldom
from rollout.loops import Controller
from rollout.metrics import ControllerMetrics
from rollout.policy import Policy, Slo
from rollout.routes import Route
from rollout.settings import Settings
from rollout.state import CanarySet, Proposed, Trial
from rollout.stores import GatewayPresence, Stores, open_stores
from rollout.stores.embedded import valkey_command
from rollout.versions import Version

_VERSIONS_EACH: Final = 4
_NEW_UNITS_EACH: Final = 10
_STARTING_SECONDS: Final = 30
_GOAL_TICK_SECONDS: Final = 1.0
_GOAL_STORE_SHARE: Final = 0.20


@dataclass(frozen=True, slots=True)
class Size:
    routes: int
    gateways: int
    ticks: int


FULL: Final = Size(routes=500, gateways=100, ticks=30)
QUICK: Final = Size(routes=20, gateways=5, ticks=3)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="a controller's tick with many routes on trial")
    parser.add_argument("--quick", action="store_true", help="few of everything, in seconds")
    parser.add_argument("--gateways", nargs=2, metavar=("URL", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if options.gateways is not None:
            url, count = options.gateways
            with suppress(KeyboardInterrupt):
                runner.run(report_for_ever(url, int(count)))
            return 0
        with tempfile.TemporaryDirectory() as folder, Processes(Path(folder)) as processes:
            return runner.run(measure(processes, QUICK if options.quick else FULL))


async def measure(processes: Processes, size: Size) -> int:
    cores = Cores.pick()
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    ready = f"tcp://127.0.0.1:{port}"
    store = processes.start(
        "valkey", valkey_command(processes.folder, port), core=cores.rest, ready=ready
    )
    async with open_stores(url) as stores, httpx2.AsyncClient(trust_env=False) as client:
        _say(f"{size.routes} routes on trial, {size.routes * _VERSIONS_EACH} versions")
        await populate(stores, size.routes)
        command = [sys.executable, "-m", "benchmarks.many_routes"]
        gateways = processes.start(
            "gateways",
            [*command, "--gateways", url, str(size.gateways)],
            core=cores.rest,
            ready=ready,
        )
        settings = Settings.model_validate({"store": {"url": url}, "engines": [], "routes": []})
        controller = Controller(stores, client, settings, ControllerMetrics(CollectorRegistry()))
        await controller.hold_lease()
        await controller.tick()
        if not await _all_report(stores, size.gateways):
            _say(f"the gateways do not all report; they said: {processes.tail('gateways')}")
            return 1
        collect_seldom()
        await controller.hold_lease()
        good = await _ticks(controller, stores, size, store, gateways)
        await _reloads(stores, store, size.gateways)
    return 0 if good else 1


async def _all_report(stores: Stores, gateways: int) -> bool:
    for _ in range(_STARTING_SECONDS):
        await asyncio.sleep(1.0)
        if len(await stores.presence.live()) >= gateways:
            return True
    return False


async def populate(stores: Stores, routes: int) -> None:
    """Every route with its versions, the second of them in a canary."""
    at = datetime.now(UTC)
    places = asyncio.Semaphore(16)

    async def make(name: str) -> None:
        async with places:
            slo = Slo(ttft_seconds=0.5, total_seconds=5.0)
            policy = Policy(minimum_pairs=1_000_000)
            route = Route(name, "main", slo=slo, policy=policy)
            await stores.rollouts.put_route(route, by="bench", at=at, base="base")
            for number in range(2, _VERSIONS_EACH + 1):
                version = Version(name, number, "main", "base", at, adapter=f"{number:064x}")
                await stores.rollouts.register(version)
            rollout = await stores.rollouts.get(name)
            first = await stores.rollouts.commit(rollout, Proposed(2, at, "bench"))
            await stores.rollouts.commit(first.rollout, CanarySet(10.0, at, "bench"))

    await asyncio.gather(*(make(f"route-{number}") for number in range(routes)))


async def report_for_ever(url: str, count: int) -> None:
    """Be that many gateway workers."""
    async with open_stores(url) as stores:
        catalog = await stores.catalog.load()
        trials = [each.trial for each in catalog.rollouts.values() if each.trial is not None]
        await asyncio.gather(*(_report(stores, number, trials, count) for number in range(count)))


async def _report(stores: Stores, number: int, trials: Sequence[Trial], count: int) -> None:
    chance = random.Random(number)
    evidence = Evidence(f"{number:032x}")
    presence = GatewayPresence(f"{number:032x}", "bench", number, 0, datetime.now(UTC))
    # Not all at the same moment, as they would not be.
    due = time.monotonic() + number / count
    while True:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        due += 1.0
        for trial in trials:
            arm: Any = "candidate" if chance.random() < 0.1 else "stable"
            cell = evidence.cell(trial.id.partition("@")[0], trial, arm)
            cell.tally.requests += 1
            cell.tally.seconds += 0.1
            if cell.units is not None:
                cell.units.end(
                    failed=chance.random() < 0.01, slow_first_token=False, slow_total=False
                )
            cell.book.dirty = True
        for _ in range(_NEW_UNITS_EACH):
            trial = chance.choice(trials)
            first = evidence.cell(trial.id.partition("@")[0], trial, "stable").first(
                unit_of("bench", str(chance.random()))
            )
            if first is not None:
                first.end(failed=False, slow_first_token=False, slow_total=False)
        await stores.presence.report(presence)
        await evidence.flush(stores.evidence, REPORTED_AT_MOST)


async def _ticks(
    controller: Controller, stores: Stores, size: Size, store: int, gateways: int
) -> bool:
    ticks: list[float] = []
    judged: list[float] = []
    observed: list[float] = []
    cpu, reporting, began = _cpu(store), _cpu(gateways), time.monotonic()
    own = time.process_time()
    for number in range(size.ticks):
        await controller.hold_lease()
        before = time.process_time()
        ticks.append(await _timed(controller.tick))
        judged.append(time.process_time() - before)
        if number % 5 == 0:
            observed.append(await _timed(controller.observe))
        await asyncio.sleep(max(0.0, 1.0 - ticks[-1]))
    seconds = time.monotonic() - began
    share = (_cpu(store) - cpu) / seconds
    worst = max(ticks)
    _say(f"tick: median {statistics.median(ticks):.3f} s, longest {worst:.3f} s (goal < 1 s)")
    _say(f"tick: CPU {statistics.median(judged):.3f} s of the controller")
    _say(f"what /metrics shows: median {statistics.median(observed):.3f} s, every 5 s")
    _say(f"store: {share:.1%} of a core (goal < {_GOAL_STORE_SHARE:.0%})")
    _say(f"controller: {(time.process_time() - own) / seconds:.1%} of a core")
    each = (_cpu(gateways) - reporting) / seconds / size.gateways
    _say(f"a gateway: {each:.2%} of a core for its reports")
    rollouts = (await stores.catalog.load()).rollouts.values()
    evidence = await stores.evidence.read_many(
        [(each.route, each.trial.id) for each in rollouts if each.trial]
    )
    _say(f"requests counted: {sum(e.stable.requests + e.candidate.requests for e in evidence):,}")
    return worst < _GOAL_TICK_SECONDS and share < _GOAL_STORE_SHARE


async def _reloads(stores: Stores, store: int, gateways: int) -> None:
    """What a commit costs, which every gateway follows by loading the catalog."""
    catalog = await stores.catalog.load()
    loads = [await _timed(stores.catalog.load) for _ in range(5)]
    _say(f"a gateway loads the catalog in {statistics.median(loads) * 1000:.0f} ms")
    indexed = [_timed_now(lambda: index(catalog, {})) for _ in range(5)]
    _say(f"and lays it out in {statistics.median(indexed) * 1000:.0f} ms")
    before = _cpu(store)
    rounds = 3
    for _ in range(rounds * gateways):
        await stores.catalog.load()
    spent = (_cpu(store) - before) / rounds
    _say(f"a commit that {gateways} gateways follow: {spent * 1000:.0f} ms of the store")


async def _timed(step: Callable[[], Awaitable[object]]) -> float:
    before = time.perf_counter()
    await step()
    return time.perf_counter() - before


def _timed_now(step: Callable[[], object]) -> float:
    before = time.perf_counter()
    step()
    return time.perf_counter() - before


def _cpu(pid: int) -> float:
    """CPU seconds of one process: children, which rewrite the append-only file, have another core."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
