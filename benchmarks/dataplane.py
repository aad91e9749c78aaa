"""`make bench`: what a request costs in Sluice and in its peers, side by side in one run.

    python -m benchmarks.dataplane [--quick] [--goals] [--only direct,nginx] [--json FILE]

Each round visits every workload, and within it every target in turn, so that a disturbance of the
machine falls on all of them. `docs/performance.md` says how to read the tables.
"""

import argparse
import http.client
import json
import os
import signal
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import compiled, profiling
from benchmarks.goals import NAMED, goals_text, judge_goals
from benchmarks.install import SkipTarget
from benchmarks.load import (
    ANSWER_1,
    ANSWER_32,
    STREAM_1,
    WORKLOADS,
    Endpoint,
    Workload,
    drive,
    find_wrk,
    send,
)
from benchmarks.place import Place, Started
from benchmarks.processes import (
    Cores,
    Processes,
    StartError,
    busy_seconds,
    free_port,
    measure_tree,
)
from benchmarks.report import MEMORY_AFTER, Cell, Figures, Memory, table
from benchmarks.targets import TARGETS, VARIANT_WORKLOADS, Target

# For a look in a minute; the peers that are slow by orders of magnitude are left out.
QUICK = {"rounds": 1, "seconds": 1}
FULL = {"rounds": 3, "seconds": 3}
SLOW = [target.name for target in TARGETS if target.slow]


def measure(
    target: str, started: Started, workload: Workload, number: int, seconds: int, cores: Cores
) -> Cell:
    """Load one target and charge its process tree for what it answered."""
    core = cores.rest if target == "direct" else cores.gateway
    with _awake(started):
        at, busy, beside = time.monotonic(), busy_seconds(core), _cpu_seconds(started.beside)
        before = measure_tree(started.pid)
        result = drive(started.endpoint, workload, seconds, cores.rest)
        after = measure_tree(started.pid)
        elapsed, busy = time.monotonic() - at, busy_seconds(core) - busy
        beside = _cpu_seconds(started.beside) - beside
    cpu = after.cpu_seconds - before.cpu_seconds
    answers = max(1, result.requests)
    return Cell(
        target=target,
        workload=workload.name,
        round=number,
        cpu_microseconds=cpu / answers * 1e6,
        beside_microseconds=beside / answers * 1e6,
        per_second=result.per_second,
        p50_microseconds=result.p50,
        p99_microseconds=result.p99,
        mean_microseconds=result.mean,
        requests=result.requests,
        failed=result.failed,
        unfinished=result.unfinished,
        core_busy=cpu / elapsed,
        foreign=max(0.0, (busy - cpu) / elapsed),
        resident_bytes=after.resident_bytes,
    )


@contextmanager
def _awake(started: Started) -> Iterator[None]:
    for pid in started.awake:
        os.kill(pid, signal.SIGCONT)
    try:
        yield
    finally:
        for pid in started.awake:
            os.kill(pid, signal.SIGSTOP)


def _cpu_seconds(pids: Sequence[int]) -> float:
    return sum(measure_tree(pid).cpu_seconds for pid in pids)


def measure_memory(name: str, started: Started, cores: Cores) -> Iterator[Memory]:
    """What a target holds that was just started, after the first requests and after many."""
    sent = failed = 0
    for requests in MEMORY_AFTER:
        failed += send(started.endpoint, ANSWER_32, requests - sent, cores.rest).failed
        sent = requests
        yield Memory(name, requests, measure_tree(started.pid).resident_bytes, failed)


def run(arguments: argparse.Namespace) -> Figures:
    """Start what was asked for, measure it, end it."""
    with _engine() as place:
        started, missing = _start_all(arguments.only, place)
        memory = _all_memory(started, missing, place.cores) if arguments.memory else []
        cells = list(_rounds(started, missing, place, arguments))
    _say("")
    return Figures(cells, memory, missing)


@contextmanager
def _engine() -> Iterator[Place]:
    """The stub engine, and a place for what stands in front of it."""
    cores = Cores.pick()
    find_wrk()
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        Processes(Path(folder)) as processes,
    ):
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "benchmarks.stub", "--port", str(port)]
        pid = processes.start("stub", command, core=cores.rest, ready=f"{url}/health")
        yield Place(processes, Path(folder), cores, url, pid)


def _start_all(only: Sequence[str], place: Place) -> tuple[dict[str, Started], dict[str, str]]:
    started: dict[str, Started] = {}
    missing: dict[str, str] = {}
    for target in TARGETS:
        if target.name not in only:
            continue
        _say(f"starting {target.name}")
        folder = place.folder / target.name
        folder.mkdir()
        try:
            one = target.start(replace(place, folder=folder))
            check_answer(one.endpoint, ANSWER_1)
        except (SkipTarget, StartError, OSError, http.client.HTTPException) as error:
            missing[target.name] = f"{error}\n{place.processes.tail(target.name)}".strip()
        else:
            started[target.name] = one
            missing |= _check_stream(target.name, one.endpoint)
    return started, missing


def _check_stream(name: str, endpoint: Endpoint) -> dict[str, str]:
    """Why its streams cannot be measured, if so: that of a target that only answers."""
    try:
        check_answer(endpoint, STREAM_1)
    except (StartError, OSError, http.client.HTTPException) as error:
        return {f"{name}, streams": str(error)}
    return {}


def check_answer(endpoint: Endpoint, workload: Workload) -> None:
    """One real request first: a table of quick refusals would look splendid."""
    parts = urlsplit(endpoint.url)
    headers = dict(header.split(": ", 1) for header in endpoint.headers)
    headers["content-type"] = "application/json"
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=20)
    try:
        body = workload.body(endpoint.model)
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        said = response.read()
    finally:
        connection.close()
    sign = b"data: [DONE]" if workload.stream else b"chat.completion"
    if response.status != 200 or sign not in said:
        raise StartError(f"it answered {response.status} to {workload.name}: {said[:300]!r}")


def _all_memory(
    started: Mapping[str, Started], missing: dict[str, str], cores: Cores
) -> list[Memory]:
    memory: list[Memory] = []
    for name, target in started.items():
        if name not in ("direct", *SLOW):
            _say(f"memory of {name}")
            try:
                memory += measure_memory(name, target, cores)
            except StartError as error:
                missing[f"{name}, memory"] = str(error)
    return memory


def _rounds(
    started: Mapping[str, Started],
    missing: dict[str, str],
    place: Place,
    arguments: argparse.Namespace,
) -> Iterator[Cell]:
    """Every cell of every round; what cannot be measured is noted in `missing`."""
    for name, target in started.items():
        _say(f"warming up {name}")
        drive(target.endpoint, ANSWER_32, 1, place.cores.rest)
    for number in range(1, arguments.rounds + 1):
        for workload in WORKLOADS:
            if workload.name not in arguments.workloads:
                continue
            _set_stream(place.engine_url, workload)
            for name, target in _visited(started, missing, workload, number):
                _say(f"round {number} of {arguments.rounds}: {workload.name} {name}")
                try:
                    yield measure(name, target, workload, number, arguments.seconds, place.cores)
                except StartError as error:
                    missing[f"{name}, {workload.name}"] = str(error)


def _visited(
    started: Mapping[str, Started], missing: Mapping[str, str], workload: Workload, number: int
) -> Iterator[tuple[str, Started]]:
    """The targets that a workload is put on in this round, with their variants."""
    for target in TARGETS:
        one = started.get(target.name)
        if one is None or not _wanted(target, workload, number, missing):
            continue
        yield target.name, one
        if workload in VARIANT_WORKLOADS:
            for variant, other in one.variants.items():
                yield f"{target.name}, {variant}", other


def _wanted(target: Target, workload: Workload, number: int, missing: Mapping[str, str]) -> bool:
    if workload.stream and f"{target.name}, streams" in missing:
        return False
    return target.takes(workload) and (number == 1 or not target.slow)


def _set_stream(engine_url: str, workload: Workload) -> None:
    parts = urlsplit(engine_url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=5)
    try:
        query = f"chunks={workload.chunks}&delay_ms={workload.delay_ms}"
        connection.request("POST", f"/stub/stream?{query}", b"")
        connection.getresponse().read()
    finally:
        connection.close()


def profile(arguments: argparse.Namespace) -> str:
    """Where Sluice spends its time under one workload."""
    workload = next(one for one in WORKLOADS if one.name == arguments.profile)
    with _engine() as place:
        started = next(one for one in TARGETS if one.name == "sluice").start(place)
        _set_stream(place.engine_url, workload)
        drive(started.endpoint, workload, 1, place.cores.rest)
        with profiling.recording(started.pid, place, arguments.seconds) as recorded:
            result = drive(started.endpoint, workload, arguments.seconds + 2, place.cores.rest)
        text = profiling.text(recorded.read_text())
    return f"{workload.name}: {result.per_second:,.0f} a second while it was watched\n{text}"


def _yardstick() -> float:
    """Nanoseconds for a turn of an empty loop, the best of five: how fast this machine is."""
    return min(timeit.repeat("pass", number=1_000_000, repeat=5)) / 1e6 * 1e9


def _say(text: str) -> None:
    """Progress, on one line of a terminal; nothing where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[Kbench: {text}" if text else "\r\033[K", end="", file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    names = [target.name for target in TARGETS]
    workloads = [workload.name for workload in WORKLOADS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dataplane")
    parser.add_argument("--quick", action="store_true", help="one round of 1 s, no slow peers")
    parser.add_argument("--goals", action="store_true", help="only what the goals need")
    parser.add_argument("--rounds", type=_positive)
    parser.add_argument("--seconds", type=_positive, help="for each figure")
    parser.add_argument("--only", type=_names(names), help="targets, with commas between them")
    parser.add_argument(
        "--workloads", type=_names(workloads), default=workloads, help="of " + ", ".join(workloads)
    )
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        help="after 10,000 and 100,000 requests; left out by --quick",
    )
    parser.add_argument("--json", type=Path, help="write every figure of every round there")
    parser.add_argument("--read", type=Path, help="print again what --json wrote; measure nothing")
    parser.add_argument("--profile", choices=workloads, help="where Sluice spends its time instead")
    arguments = parser.parse_args(argv)
    plan = QUICK if arguments.quick else FULL
    arguments.rounds = arguments.rounds or plan["rounds"]
    arguments.seconds = arguments.seconds or (10 if arguments.profile else plan["seconds"])
    if arguments.memory is None:
        arguments.memory = not arguments.quick
    if arguments.only is None:
        fast = [name for name in names if name not in SLOW]
        arguments.only = list(NAMED) if arguments.goals else fast if arguments.quick else names
    return arguments


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            message = f"{', '.join(unknown)}: there are {', '.join(known)}"
            raise argparse.ArgumentTypeError(message)
        return names

    return parse


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that children are ended too
    try:
        if arguments.profile:
            print(profile(arguments))
            return 0
        record = json.loads(arguments.read.read_text()) if arguments.read else _measure(arguments)
    except (StartError, SkipTarget, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: stopped", file=sys.stderr)
        return 1
    figures = Figures.from_record(record)
    goals = judge_goals(figures)
    print("\n".join(record["notes"]) + "\n")
    print(table(figures))
    print(goals_text(goals))
    if arguments.goals:
        return 0 if all(goal.state == "met" for goal in goals) else 1
    failed = sum(cell.failed for cell in figures.cells if cell.target.startswith("sluice"))
    return 1 if failed or any(name.startswith("sluice") for name in figures.missing) else 0


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and give the record of it that `--json` keeps."""
    words = compiled.in_words()
    before, at = os.getloadavg()[0], time.monotonic()
    figures = run(arguments)
    minutes = (time.monotonic() - at) / 60
    notes = [
        f"{os.cpu_count()} cores, load average {before:.2f} before; {arguments.rounds} rounds of"
        f" {arguments.seconds} s, {minutes:.1f} minutes in all; one core for the gateway, one for"
        " the stub engine and the client",
        f"yardstick: {_yardstick():.1f} ns for a turn of an empty Python loop",
        words,
    ]
    record: dict[str, Any] = {
        "notes": notes,
        "cells": [asdict(cell) for cell in figures.cells],
        "memory": [asdict(one) for one in figures.memory],
        "missing": figures.missing,
        "goals": [asdict(goal) | {"state": goal.state} for goal in judge_goals(figures)],
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    raise SystemExit(main())
