"""Processes that a benchmark starts on a core of their own, measures as trees, and always ends."""

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
END_SECONDS = 5.0


class StartError(Exception):
    """A process did not come up; the message holds the end of what it said."""


@dataclass(frozen=True, slots=True)
class Cores:
    """The gateway under test has `gateway` to itself; everything that only serves it has `rest`."""

    gateway: int
    rest: int

    @classmethod
    def pick(cls) -> "Cores":
        usable = sorted(os.sched_getaffinity(0))
        if len(usable) < 2:
            raise StartError(
                "this benchmark needs two cores, one for the gateway and one for the load:"
                f" this process may use only {usable}"
            )
        return cls(usable[0], usable[1])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Processes:
    """Starts processes in sessions of their own and ends all of them, children too, on leaving."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ask every session to end, and kill what is left of them 5 s later."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + END_SECONDS
            for process in self._started:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                    # One that was stopped would not hear of it.
                    os.killpg(process.pid, signal.SIGCONT)
            for process in self._started:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        core: int | None,
        ready: str,
        environ: Mapping[str, str] | None = None,
        limit: float = 60.0,
    ) -> int:
        """Start `command` on `core` (None: on any); return its pid once `ready` answers.

        `ready` is a URL that answers below 400, or `tcp://host:port` that accepts. Raises
        StartError with the end of the log where that takes longer than `limit` seconds.
        """
        log = self.folder / f"{name}.log"
        with log.open("wb") as output, _pinned(core):
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(os.environ) | dict(environ or {}),
                start_new_session=True,
            )
        self._started.append(process)
        deadline = time.monotonic() + limit
        while not _answers(ready):
            if process.poll() is not None:
                said = f"ended with status {process.returncode}"
                raise StartError(f"{name} {said}; its log ends:\n{_tail(log)}")
            if time.monotonic() > deadline:
                said = f"was not ready at {ready} after {limit:.0f} s"
                raise StartError(f"{name} {said}; its log ends:\n{_tail(log)}")
            time.sleep(0.05)
        return process.pid

    def tail(self, name: str) -> str:
        """The end of what `name` said so far, if it was started here."""
        log = self.folder / f"{name}.log"
        return _tail(log) if log.exists() else ""


@contextmanager
def _pinned(core: int | None) -> Iterator[None]:
    """What is started inside inherits the core, and so do its threads and children."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if core is None else {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _answers(url: str) -> bool:
    parts = urlsplit(url)
    assert parts.hostname is not None
    try:
        if parts.scheme == "tcp":
            with socket.create_connection((parts.hostname, parts.port), timeout=1):
                return True
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=1)
        try:
            connection.request("GET", parts.path or "/")
            return connection.getresponse().status < 400
        finally:
            connection.close()
    except (OSError, http.client.HTTPException):
        return False


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@dataclass(frozen=True, slots=True)
class TreeUse:
    """CPU seconds used so far by a process and its children, and bytes resident now.

    Children that have ended are in the CPU time; pages shared between processes are counted in
    each.
    """

    cpu_seconds: float
    resident_bytes: int


def measure_tree(root: int) -> TreeUse:
    stats = _stats()
    ticks = pages = 0
    pending = [root]
    while pending:
        pid = pending.pop()
        if (stat := stats.get(pid)) is not None:
            ticks += stat.ticks
            pages += stat.resident_pages
        pending += [child for child, stat in stats.items() if stat.parent == pid]
    return TreeUse(ticks / TICKS, pages * PAGE)


@dataclass(frozen=True, slots=True)
class _Stat:
    parent: int
    ticks: int
    resident_pages: int


def _stats() -> dict[int, _Stat]:
    stats: dict[int, _Stat] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            # The name in parentheses may itself hold spaces and parentheses.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            # After the name: state, ppid (1), …, utime (11), stime, cutime, cstime, …, rss (21).
            ticks = sum(int(field) for field in fields[11:15])
            stats[int(entry.name)] = _Stat(int(fields[1]), ticks, int(fields[21]))
    return stats


def busy_seconds(core: int) -> float:
    """Seconds that `core` has spent on anything but idling since the machine started."""
    with Path("/proc/stat").open() as stat:
        for line in stat:
            name, *fields = line.split()
            if name == f"cpu{core}":
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
                return (user + nice + system + irq + softirq + steal) / TICKS
    raise StartError(f"/proc/stat knows no core {core}")
