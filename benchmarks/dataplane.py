"""`make bench`: what a request costs in Sluice and in its peers, side by side in one run.

    python -m benchmarks.dataplane [--rounds 3] [--seconds 3] [--only direct,nginx] [--json FILE]

Each round visits every workload, and within it every target in turn, so that a disturbance of the
machine falls on all of them. `docs/performance.md` says how to read the table.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from benchmarks.load import DEFAULT_WORKLOADS, KEY, WORKLOADS, Workload, drive, find_wrk
from benchmarks.processes import (
    Cores,
    Processes,
    StartError,
    busy_seconds,
    free_port,
    measure_tree,
)
from benchmarks.targets import TARGETS, Place, SkipTarget, Started, Target

# Work of others on the gateway's core above this share makes a figure doubtful.
FOREIGN_LIMIT = 0.05


@dataclass(frozen=True, slots=True)
class Cell:
    """One target under one workload in one round."""

    target: str
    workload: str
    round: int
    cpu_microseconds: float  # of the target's process tree, for each request
    beside_microseconds: float  # of the processes beside it
    per_second: float
    p50_microseconds: int
    p99_microseconds: int
    requests: int
    failed: int
    core_busy: float  # share of its core that the target used
    foreign: float  # share of that core that others used
    resident_bytes: int


def measure(
    target: str, started: Started, workload: Workload, number: int, seconds: int, cores: Cores
) -> Cell:
    """Load one target and charge its process tree for what it answered."""
    core = cores.rest if target == "direct" else cores.gateway
    at, busy, beside = time.monotonic(), busy_seconds(core), _cpu_seconds(started.beside)
    before = measure_tree(started.pid)
    result = drive(started.url, workload, seconds, cores.rest)
    after = measure_tree(started.pid)
    elapsed, busy = time.monotonic() - at, busy_seconds(core) - busy
    cpu, beside = after.cpu_seconds - before.cpu_seconds, _cpu_seconds(started.beside) - beside
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
        requests=result.requests,
        failed=result.bad_status + result.broken,
        core_busy=cpu / elapsed,
        foreign=max(0.0, (busy - cpu) / elapsed),
        resident_bytes=after.resident_bytes,
    )


def _cpu_seconds(pids: Sequence[int]) -> float:
    return sum(measure_tree(pid).cpu_seconds for pid in pids)


def run(arguments: argparse.Namespace) -> tuple[list[Cell], dict[str, str]]:
    """Start what was asked for, measure it, end it; return the cells, and what was left out."""
    cores = Cores.pick()
    find_wrk()
    workloads = [workload for workload in WORKLOADS if workload.name in arguments.workloads]
    cells: list[Cell] = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        Processes(Path(folder)) as processes,
    ):
        port = free_port()
        engine_url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "benchmarks.stub", "--port", str(port)]
        engine_pid = processes.start("stub", command, core=cores.rest, ready=f"{engine_url}/health")
        place = Place(processes, Path(folder), cores, engine_url, engine_pid)
        started, skipped = _start_all(arguments.only, place)
        for name, target in started.items():
            _say(f"warming up {name}")
            drive(target.url, WORKLOADS[1], 1, cores.rest)
        for number in range(1, arguments.rounds + 1):
            for workload in workloads:
                _set_stream(engine_url, workload)
                for name, target in started.items():
                    _say(f"round {number} of {arguments.rounds}: {workload.name} {name}")
                    cells.append(measure(name, target, workload, number, arguments.seconds, cores))
        _say("")
    return cells, skipped


def _start_all(only: Sequence[str], place: Place) -> tuple[dict[str, Started], dict[str, str]]:
    started: dict[str, Started] = {}
    skipped: dict[str, str] = {}
    for target in TARGETS:
        if target.name not in only:
            continue
        _say(f"starting {target.name}")
        try:
            started[target.name] = _start(target, place)
        except (SkipTarget, StartError) as error:
            skipped[target.name] = str(error)
    return started, skipped


def _start(target: Target, place: Place) -> Started:
    folder = place.folder / target.name
    folder.mkdir()
    started = target.start(
        Place(place.processes, folder, place.cores, place.engine_url, place.engine_pid)
    )
    try:
        _check_answer(started.url)
    except (StartError, OSError, http.client.HTTPException) as error:
        raise StartError(f"{error}; its log ends:\n{place.processes.tail(target.name)}") from error
    return started


def _check_answer(url: str) -> None:
    """One real request first: a table of quick refusals would look splendid."""
    parts = urlsplit(url)
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    for workload, sign in ((WORKLOADS[0], b"chat.completion"), (WORKLOADS[2], b"data: [DONE]")):
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=10)
        try:
            connection.request("POST", "/v1/chat/completions", workload.body, headers)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200 or sign not in body:
            raise StartError(f"it answered {response.status} to {workload.name}: {body[:300]!r}")


def _set_stream(engine_url: str, workload: Workload) -> None:
    parts = urlsplit(engine_url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=5)
    try:
        query = f"chunks={workload.chunks}&delay_ms={workload.delay_ms}"
        connection.request("POST", f"/stub/stream?{query}", b"")
        connection.getresponse().read()
    finally:
        connection.close()


def _yardstick() -> float:
    """Nanoseconds for a turn of an empty loop, the best of five: how fast this machine is."""
    return min(timeit.repeat("pass", number=1_000_000, repeat=5)) / 1e6 * 1e9


def _say(text: str) -> None:
    """Progress, on one line of a terminal; nothing where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[Kbench: {text}" if text else "\r\033[K", end="", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Summary:
    """The rounds of one target under one workload, as medians."""

    cpu: float
    cpu_low: float
    cpu_high: float
    beside: float
    per_second: float
    p50: float
    p99: float
    core_busy: float
    resident_mb: float
    failed: int
    doubtful: bool

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> "Summary":
        cpu = [cell.cpu_microseconds for cell in cells]
        foreign = median(cell.foreign for cell in cells)
        return cls(
            cpu=median(cpu),
            cpu_low=min(cpu),
            cpu_high=max(cpu),
            beside=median(cell.beside_microseconds for cell in cells),
            per_second=median(cell.per_second for cell in cells),
            p50=median(cell.p50_microseconds for cell in cells),
            p99=median(cell.p99_microseconds for cell in cells),
            core_busy=median(cell.core_busy for cell in cells),
            resident_mb=max(cell.resident_bytes for cell in cells) / 1e6,
            failed=sum(cell.failed for cell in cells),
            # The direct cell shares its core with wrk by design.
            doubtful=cells[0].target != "direct" and foreign > FOREIGN_LIMIT,
        )


Summaries = dict[tuple[str, str], Summary]


def summarize(cells: Sequence[Cell]) -> Summaries:
    keys = dict.fromkeys((cell.workload, cell.target) for cell in cells)
    return {
        key: Summary.of([cell for cell in cells if (cell.workload, cell.target) == key])
        for key in keys
    }


def table(summaries: Summaries) -> str:
    """The whole result as text."""
    workloads = list(dict.fromkeys(workload for workload, _ in summaries))
    lines: list[str] = []
    for workload in workloads:
        lines += [f"{workload:<14}{'CPU µs':>9}{'(low–high)':>16}{'beside':>8}{'requests/s':>12}"]
        lines[-1] += f"{'p50 ms':>9}{'p99 ms':>9}{'core':>7}{'RSS MB':>8}{'failed':>8}"
        for (name, target), summary in summaries.items():
            if name == workload:
                lines.append(_row(target, summary))
        lines.append("")
    if any(target == "sluice" for _, target in summaries):
        lines += _ratios(summaries, workloads)
    if any(summary.doubtful for summary in summaries.values()):
        lines += ["* other processes used over 5 % of the gateway's core: run it again", ""]
    return "\n".join(lines)


def _row(target: str, summary: Summary) -> str:
    spread = f"({summary.cpu_low:.0f}–{summary.cpu_high:.0f})"
    mark = "*" if summary.doubtful else " "
    return (
        f"  {target:<12}{summary.cpu:>8.1f}{mark}{spread:>16}{summary.beside:>8.1f}{summary.per_second:>12,.0f}"
        f"{summary.p50 / 1000:>9.3f}{summary.p99 / 1000:>9.3f}{summary.core_busy:>7.0%}"
        f"{summary.resident_mb:>8.0f}{summary.failed:>8}"
    )


def _ratios(summaries: Summaries, workloads: Sequence[str]) -> list[str]:
    """CPU of Sluice over CPU of the peer, of medians and of lows: below 1, Sluice is the cheaper."""
    peers = [t for t in dict.fromkeys(t for _, t in summaries) if t not in ("sluice", "direct")]
    if not peers:
        return []
    lines = [f"{'CPU, sluice ÷':<16}" + "".join(f"{workload:>15}" for workload in workloads)]
    for peer in peers:
        line = f"  {peer:<14}"
        for workload in workloads:
            ours, theirs = summaries[workload, "sluice"], summaries[workload, peer]
            ratios = f"{ours.cpu / theirs.cpu:.2f} ({ours.cpu_low / theirs.cpu_low:.2f})"
            line += f"{ratios:>15}"
        lines.append(line)
    return [
        *lines,
        "  of the medians (of the lows, which other work on the machine disturbs least)",
        "",
    ]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dataplane")
    parser.add_argument("--rounds", type=_positive, default=3)
    parser.add_argument("--seconds", type=_positive, default=3, help="for each figure")
    parser.add_argument(
        "--only",
        type=_names([target.name for target in TARGETS]),
        default=[target.name for target in TARGETS],
        help="targets, with commas between them",
    )
    parser.add_argument(
        "--workloads",
        type=_names([workload.name for workload in WORKLOADS]),
        default=list(DEFAULT_WORKLOADS),
        help="of " + ", ".join(workload.name for workload in WORKLOADS),
    )
    parser.add_argument("--json", type=Path, help="write every figure of every round there")
    return parser.parse_args(argv)


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
    load = os.getloadavg()[0]
    try:
        cells, skipped = run(arguments)
    except StartError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: stopped", file=sys.stderr)
        return 1
    summaries = summarize(cells)
    print(
        f"{os.cpu_count()} cores, load average {load:.2f} before; {arguments.rounds} rounds of"
        f" {arguments.seconds} s; one core for the gateway, one for the stub engine and wrk\n"
        f"yardstick: {_yardstick():.1f} ns for a turn of an empty Python loop\n"
    )
    print(table(summaries))
    for name, reason in skipped.items():
        print(f"left out: {name}: {reason}")
    if arguments.json:
        record = {"cells": [asdict(cell) for cell in cells], "skipped": skipped}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any(summary.failed for summary in summaries.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
